"""Labelled images, and batches of them from Grain."""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from grain.sharding import ShardOptions
from PIL import Image, ImageOps
from tqdm import tqdm

from examples import augmentation, files, shards


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


class Files(grain.sources.RandomAccessDataSource):
    """Image files, decoded when they are asked for."""

    def __init__(self, paths: list[str], labels: list[int], mode: str):
        self.paths = paths
        self._labels, self._mode = labels, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        try:
            image = _decoded(self.paths[index], self._mode)
        except Exception:  # Pillow raises almost anything for broken files
            image = None
        return Example(index, image, self._labels[index])


def _decoded(path: str, mode: str) -> Image.Image:
    """An image upright, in color or gray of 8 bits; what is transparent is white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of images that are merely large
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # gray of 16 or 32 bits, which `convert` would cut off
                image = Image.fromarray(_to_8_bits(np.asarray(image, np.float64), image.mode))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)


def _to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Gray over its whole range.

    That is of 16 bits, or of the 8, 10, 12 or 14 of them that are used; or else from the least to
    the largest value that is finite.
    """
    finite = pixels[np.isfinite(pixels)]
    low, high = finite.min(), finite.max()
    if mode.startswith("I;16"):
        low, high = 0, next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    pixels = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
    return np.round((pixels - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)


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
    everything = map(Path, train.paths + validation.paths)
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
        found = [str(file) for file in present if _is_image(file.relative_to(folder))]
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
    (batch, classes), the probability of each class. An image that cannot be read is black,
    its target is 0, and its file is named, once, and kept in `images.skipped`.

    A shard has its rows of every batch, see `shards.batch`.
    """
    dataset = grain.MapDataset.source(images.train).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(
        functools.partial(_training_example, _shape(images, size), images.are_files, varied)
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
    shape: tuple[int, int, int],
    crop: bool,
    varied: Augmentation,
    example: Example,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    image = example.image
    if image is not None and crop:
        image = augmentation.random_crop(image, shape[0], rng)
    if image is not None and varied.rand_augment[0]:
        image = augmentation.rand_augment(image, *varied.rand_augment, rng)
    element = _element(shape, example._replace(image=image))
    element["image"] = augmentation.random_erasing(element["image"], varied.random_erasing, rng)
    return element


def _validation_example(
    shape: tuple[int, int, int], crop: bool, number: int, index: int, example: Example
) -> dict[str, np.ndarray]:
    if example.image is not None and crop:
        example = example._replace(image=augmentation.center_crop(example.image, shape[0]))
    element = _element(shape, example)
    element["weight"] *= np.float32(index < number)
    return element


def _element(shape: tuple[int, int, int], example: Example) -> dict[str, np.ndarray]:
    is_broken = example.image is None
    pixels = np.zeros(shape, np.uint8) if is_broken else np.asarray(example.image, np.uint8)
    return {
        "image": pixels.reshape(shape),
        "label": np.int32(example.label),
        "weight": np.float32(not is_broken),
        "broken": np.int32(is_broken * (1 + example.index)),  # 0 for none
    }


def _training_batch(
    num_classes: int,
    varied: Augmentation,
    batch: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    smoothing = varied.label_smoothing
    target = (1 - smoothing) * np.eye(num_classes)[batch["label"]] + smoothing / num_classes
    target *= batch["weight"][:, None]
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
        return batch

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
