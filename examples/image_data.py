"""Labelled images, and batches of them from Grain."""

import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from grain.sharding import ShardOptions
from PIL import Image, ImageOps
from tqdm import tqdm

from examples import augmentation, files, shards

TRIES = 100  # images in place of one that cannot be read


class Example(NamedTuple):
    """An image of a source, and its label."""

    index: int
    image: Image.Image | None  # None where it cannot be read
    label: int


class Digits(grain.sources.RandomAccessDataSource):
    """Images that are in memory, uint8 (number, height, width)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(index, Image.fromarray(self._images[index]), self._labels[index])

    def halves(self) -> tuple["Digits", "Digits"]:
        """The first half of them, and the second."""
        half = len(self) // 2
        return (
            Digits(self._images[:half], self._labels[:half]),
            Digits(self._images[half:], self._labels[half:]),
        )


class Files(grain.sources.RandomAccessDataSource):
    """Image files, decoded when they are asked for.

    Gray of 16 bits is taken to use 8, 10, 12, 14 or all of them, the same in all files, by the
    largest value in a sample of these: so a dark image stays dark, and a camera of 12 bits has
    its whole range. In gray of 32 bits, whose range is nowhere said, the least value of each image
    is black, and the largest one white.
    """

    def __init__(self, paths: list[str], labels: list[int], mode: str):
        self.paths = paths
        self.bits = _used_bits(files.sample(paths))
        self._labels, self._mode = labels, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        try:
            image = _decoded(self.paths[index], self._mode, self.bits)
        except Exception:  # Pillow raises almost anything for broken files
            image = None
        return Example(index, image, self._labels[index])


def _decoded(path: str, mode: str, bits: int = 16) -> Image.Image:
    """An image upright, in color or gray of 8 bits; what is transparent is white."""
    with _opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # gray of 16 or 32 bits, which `convert` would cut off
            pixels = np.asarray(image, np.float64)
            finite = pixels[np.isfinite(pixels)]
            ends = (0, 2**bits - 1) if _has_16_bits(file) else (finite.min(), finite.max())
            image = Image.fromarray(_to_8_bits(pixels, *ends))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """A file, without Pillow's warnings of odd metadata, and of images that are merely large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as file:
            yield file


def _has_16_bits(file: Image.Image) -> bool:
    """Whether an image is gray of 16 bits, which Pillow gives 32 where it is a PGM."""
    return file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PPM")


def _used_bits(paths: Iterable[str]) -> int:
    """How many bits the images use that are gray of 16 bits."""
    largest = 0
    for path in paths:
        with contextlib.suppress(Exception), _opened(path) as file:
            if _has_16_bits(file):
                largest = max(largest, int(np.asarray(file).max()))
    return next(bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits)


def _to_8_bits(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Gray from black to white; what is not a number is black."""
    shares = np.clip((pixels - low) / max(high - low, 1e-9), 0, 1)
    return np.round(np.nan_to_num(shares) * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train on and images held out."""

    train: Digits | Files
    validation: Digits | Files
    classes: list[str]
    mean: tuple[float, ...]  # of each channel, between 0 and 1
    std: tuple[float, ...]
    fingerprint: str  # of both
    skipped: set[str] = dataclasses.field(default_factory=set)  # so far, as they were no images

    @property
    def are_files(self) -> bool:
        """Whether they have many sizes and take time to read; the others are used as they are."""
        return isinstance(self.train, Files)


def load_images(path: Path | None, num_channels: int) -> Images:
    """Finds images.

    Args:
        path: A folder with `train` and `val`, in each of which is a folder per class. By
            default, scikit-learn's handwritten digits, 8 x 8 pixels in gray.
        num_channels: 3 for color, 1 for gray.

    Raises:
        ValueError: If there are none.
    """
    if path is None:
        if num_channels != 1:
            raise ValueError(
                "--data: the digits are 8 x 8 in gray, for a nano model. Name a folder."
            )
        return _digits()
    for folder in (path, path / "train", path / "val"):
        if not folder.is_dir():
            raise ValueError(
                f"--data {path}: no folder {folder}. It takes the layout of ImageNet, "
                "train/<class>/<image> and val/<class>/<image>."
            )
    classes, held_out = (_classes(path / part) for part in ("train", "val"))
    others = set(held_out) - set(classes)
    if others:
        raise ValueError(f"--data {path}: val has classes that train lacks: {sorted(others)}.")
    mode = "RGB" if num_channels == 3 else "L"
    # The mean and deviation of ImageNet, in color and in gray.
    mean, std = (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if mode == "RGB" else ((0.449,), (0.226,))
    )
    train, validation = (_files(path / part, classes, mode) for part in ("train", "val"))
    train.bits = validation.bits = max(train.bits, validation.bits)
    everything = [Path(file) for file in train.paths + validation.paths]
    return Images(train, validation, classes, mean, std, files.fingerprint(path, everything))


def _digits() -> Images:
    """The 1,797 digits in an order of chance, which is always the same; 397 are held out."""
    from sklearn.datasets import load_digits  # here, as each worker process imports this file

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    labels = digits.target[order].astype(np.int32)
    train, validation = (
        Digits(pixels[part], labels[part]) for part in (slice(1400), slice(1400, None))
    )
    classes = [str(i) for i in range(10)]
    digest = hashlib.blake2b(pixels.tobytes() + labels.tobytes(), digest_size=16)
    return Images(train, validation, classes, (0.305,), (0.376,), digest.hexdigest())


def _classes(folder: Path) -> list[str]:
    """The folders of a folder, but those that are hidden."""
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _files(folder: Path, classes: list[str], mode: str) -> Files:
    """The images of a folder; what each class has, and what is left out of it, is printed."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        present = files.find(folder / name) if (folder / name).is_dir() else []
        found = [
            str(file) for file in present if file.exists() and _is_image(file.relative_to(folder))
        ]
        left_out = len(present) - len(found)
        if left_out or len(classes) <= 20:
            print(f"{folder / name}: {len(found)} images, {left_out} other files left out")
        # None may be held out of a class, but one without any to train on is a mistake.
        if not found and (present or folder.name == "train"):
            raise ValueError(
                f"--data: no images in {folder / name}"
                + (f", where {present[0].name} is none, as the others" if present else "")
                + ". Give it some, or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"--data: no images in the folders of {folder}.")
    source = Files(paths, labels, mode)
    if all(source[i].image is None for i in range(len(source))):
        raise ValueError(
            f"--data: none of the {len(paths)} images in {folder} can be read, as {paths[0]}."
        )
    return source


# Those that Pillow knows by sight and cannot decode (alone), and pages.
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC"}


@functools.cache
def _suffixes() -> set[str]:
    """Those of the formats that Pillow reads; it loads all its plugins for that."""
    extensions = Image.registered_extensions()
    return {
        suffix for suffix, kind in extensions.items() if kind in Image.OPEN.keys() - NO_PICTURES
    }


def _is_image(path: Path) -> bool:
    """By its suffix; hidden files, and files in hidden folders, are none."""
    return path.suffix.lower() in _suffixes() and not files.is_hidden(path)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How images are varied in training; 0 for not at all."""

    rand_augment: tuple[float, float] = (0.0, 0.0)  # magnitude, 0 to 10, and its deviation
    random_erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha of Beta(alpha, alpha)
    cutmix: float = 0.0  # the same
    label_smoothing: float = 0.0


def training_batches(
    images: Images,
    size: int,
    batch_size: int,
    varied: Augmentation,
    seed: int,
    workers: int,
    shard: ShardOptions = shards.ALL_ROWS,
) -> grain.DatasetIterator:
    """Endless batches, every epoch in an order of its own, read by worker processes.

    A batch is a dict of `image`, uint8 (batch, size, size, channels), and `target`, float32
    (batch, classes), the probability of each class. In place of an image that cannot be read
    comes another one, drawn by chance; its file is named, once, and kept in `images.skipped`.

    A shard has its rows of every batch, see `shards.batch`.
    """
    dataset = grain.MapDataset.source(images.train).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(
        functools.partial(
            _training_example, images.train, _shape(images, size), images.are_files, varied
        )
    )
    dataset = shards.batch(dataset, batch_size, shard).random_map(
        functools.partial(_training_batch, len(images.classes), varied)
    )
    return iter(_read(dataset, images, images.train, workers))


def validation_batches(
    images: Images, size: int, batch_size: int, workers: int, shard: ShardOptions = shards.ALL_ROWS
) -> Iterable[dict[str, np.ndarray]]:
    """All images held out, in batches of one size.

    A batch is a dict of `image`, uint8 (batch, size, size, channels); `label`, int32 (batch,);
    and `weight`, float32 (batch,), which is 0 for what fills the last batch up, and for images
    that cannot be read. A shard has its rows of every batch.
    """
    number = len(images.validation)
    filled = -(-number // batch_size) * batch_size
    dataset = grain.MapDataset.source(images.validation).repeat()[:filled]
    dataset = dataset.map_with_index(
        functools.partial(_validation_example, _shape(images, size), images.are_files, number)
    )
    return _read(shards.batch(dataset, batch_size, shard), images, images.validation, workers)


def _shape(images: Images, size: int) -> tuple[int, int, int]:
    return size, size, len(images.mean)


def _training_example(
    source: Digits | Files,
    shape: tuple[int, int, int],
    crop: bool,
    varied: Augmentation,
    example: Example,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    image, label = _readable(source, example, rng)
    if crop:
        image = augmentation.random_crop(image, shape[0], rng)
    if varied.rand_augment[0]:
        image = augmentation.rand_augment(image, *varied.rand_augment, rng)
    pixels = augmentation.random_erasing(_pixels(shape, image), varied.random_erasing, rng)
    return {"image": pixels, "label": np.int32(label), "broken": _broken(example)}


def _readable(
    source: Digits | Files, example: Example, rng: np.random.Generator
) -> tuple[Image.Image, int]:
    """An image and its label, or those of another example where this one cannot be read."""
    for _ in range(TRIES):
        if example.image is not None:
            return example.image, example.label
        example = source[int(rng.integers(len(source)))]
    raise OSError(f"--data: {TRIES} images drawn by chance, and none of them can be read")


def _validation_example(
    shape: tuple[int, int, int], crop: bool, number: int, index: int, example: Example
) -> dict[str, np.ndarray]:
    image = example.image
    if image is not None and crop:
        image = augmentation.center_crop(image, shape[0])
    return {
        "image": np.zeros(shape, np.uint8) if image is None else _pixels(shape, image),
        "label": np.int32(example.label),
        "weight": np.float32(image is not None and index < number),
        "broken": _broken(example),
    }


def _pixels(shape: tuple[int, int, int], image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.uint8).reshape(shape)


def _broken(example: Example) -> np.int32:
    """Which file cannot be read, from 1; 0 for none."""
    return np.int32(0 if example.image is not None else 1 + example.index)


def _training_batch(
    num_classes: int,
    varied: Augmentation,
    batch: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    smoothing = varied.label_smoothing
    target = (1 - smoothing) * np.eye(num_classes)[batch["label"]] + smoothing / num_classes
    image, target = augmentation.mix(batch["image"], target, varied.mixup, varied.cutmix, rng)
    return {"image": image, "target": np.float32(target), "broken": batch["broken"]}


def _read(
    dataset: grain.MapDataset, images: Images, source: Digits | Files, workers: int
) -> grain.IterDataset:
    """Reads in worker processes, and keeps account here of what they could not read."""

    def account(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for index in batch.pop("broken"):
            if index and (path := source.paths[index - 1]) not in images.skipped:
                images.skipped.add(path)
                tqdm.write(f"skipped {path}: it cannot be read as an image", file=sys.stderr)
        # Copied out of Grain's shared memory: an array that is left there to the garbage collector
        # may have its file closed twice, and the second time it is another file.
        return {name: np.array(values) for name, values in batch.items()}

    reader = dataset.to_iter_dataset()
    if images.are_files:
        flags.FLAGS.mark_as_parsed()  # Grain's, which its worker processes ask for
        options = grain.multiprocessing.MultiprocessingOptions(workers)
        reader = reader.mp_prefetch(options, _end_with_parent)
    return reader.map(account)


def _end_with_parent(worker: int, count: int) -> None:
    """Ends a worker process as its parent ends: Grain's wait for ever for one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
