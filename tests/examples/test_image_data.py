import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from grain.sharding import ShardOptions
from PIL import Image

from examples import augmentation
from examples.image_data import (
    Augmentation,
    Files,
    _training_example,
    load_images,
    training_batches,
    validation_batches,
)


def test_the_digits_are_whole_and_held_apart():
    images = load_images(None, 1)
    assert (len(images.train), len(images.validation), len(images.classes)) == (1400, 397, 10)
    batches = list(validation_batches(images, 8, 100, workers=1))
    assert [b["image"].shape for b in batches] == [(100, 8, 8, 1)] * 4
    assert sum(b["weight"].sum() for b in batches) == 397
    first = np.asarray(images.validation[0].image)
    np.testing.assert_array_equal(batches[0]["image"][0, :, :, 0], first)
    assert first.max() == 255
    pixels = np.stack([np.asarray(images.train[i].image) for i in range(1400)]) / 255
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [0.305, 0.376], atol=2e-3)


def test_an_epoch_has_every_image_once_and_the_iterator_can_be_saved():
    images = load_images(None, 1)
    make = lambda: training_batches(images, 8, 700, Augmentation(), seed=3, workers=1)  # noqa: E731
    iterator = make()
    epoch = np.concatenate([next(iterator)["image"] for _ in range(2)])
    everything = np.stack([np.asarray(images.train[i].image) for i in range(1400)])
    rows = lambda x: x.reshape(1400, 64)[np.lexsort(x.reshape(1400, 64).T)]  # noqa: E731
    np.testing.assert_array_equal(rows(epoch), rows(everything))
    state, expected = iterator.get_state(), next(iterator)
    fresh = make()
    fresh.set_state(state)
    for key, value in next(fresh).items():
        np.testing.assert_array_equal(value, expected[key])


def test_shards_put_together_are_the_whole_batches():
    images = load_images(None, 1)
    varied = Augmentation(random_erasing=0.5, mixup=0.8, cutmix=1.0)

    def batches(make, *arguments):
        whole = itertools.islice(make(*arguments), 4)
        shards = [
            itertools.islice(make(*arguments, ShardOptions(index, 2)), 4) for index in range(2)
        ]
        return zip(whole, *shards, strict=True)

    for found in (
        batches(training_batches, images, 8, 8, varied, 0, 1),
        batches(validation_batches, images, 8, 100, 1),
    ):
        for whole, *shards in found:
            for key, value in whole.items():
                np.testing.assert_array_equal(np.concatenate([s[key] for s in shards]), value)


def test_targets_have_the_labels_and_smoothing():
    images = load_images(None, 1)
    batch = next(training_batches(images, 8, 50, Augmentation(label_smoothing=0.1), 0, 1))
    np.testing.assert_allclose(batch["target"].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(batch["target"].max(1), 0.9 + 0.1 / 10, rtol=1e-6)
    places = [
        next(j for j in range(1400) if (np.asarray(images.train[j].image) == x[..., 0]).all())
        for x in batch["image"][:5]
    ]
    labels = [images.train[j].label for j in places]
    np.testing.assert_array_equal(batch["target"][:5].argmax(1), labels)


@pytest.mark.slow
def test_a_folder_is_read_by_workers_and_broken_files_are_named_and_skipped(image_folder, capfd):
    images = load_images(image_folder, 3)
    assert images.classes == ["blue", "green"]
    assert (len(images.train), len(images.validation)) == (10, 6)
    varied = Augmentation((9, 0.5), 0.25, 0.8, 1.0, 0.1)
    iterator = training_batches(images, 16, 5, varied, seed=0, workers=2)
    batches = list(itertools.islice(iterator, 4))  # two epochs
    for batch in batches:
        assert batch["image"].shape == (5, 16, 16, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["target"].shape == (5, 2)
        np.testing.assert_allclose(batch["target"].sum(1), 1, rtol=1e-6)
        assert batch["image"].reshape(5, -1).any(1).all()  # none is black
    state, expected = iterator.get_state(), next(iterator)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["image"], expected["image"])
    iterator.close()

    (validation,) = validation_batches(images, 16, 8, workers=2)
    np.testing.assert_array_equal(validation["weight"].sum(), 5)
    for pixels, label in zip(
        validation["image"][validation["weight"] > 0],
        validation["label"][validation["weight"] > 0],
        strict=True,
    ):
        color = {"blue": (20, 40, 220), "green": (30, 200, 60)}[images.classes[label]]
        np.testing.assert_allclose(pixels.mean((0, 1)), color, atol=12)
    broken = {
        str(image_folder / "train" / "blue" / "1.jpeg"),
        str(image_folder / "val" / "green" / "2.jpeg"),
    }
    # None lies in the shared memory of the workers.
    for batch in (*batches, validation):
        assert all(type(values) is np.ndarray and values.flags.owndata for values in batch.values())
    assert images.skipped == broken
    said = capfd.readouterr().err
    for path in broken:
        assert said.count(f"skipped {path}: it cannot be read as an image") == 1


READER = """
import multiprocessing, sys, time
from pathlib import Path
from examples.image_data import Augmentation, load_images, training_batches

if __name__ == "__main__":
    varied = Augmentation((0.0, 0.0), 0.0, 0.0, 0.0, 0.0)
    batches = training_batches(load_images(Path(sys.argv[1]), 3), 16, 5, varied, 0, workers=2)
    next(batches)
    print("workers", *(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(300)
"""


def is_running(stat):
    try:
        return " Z " not in stat.read_text()  # a zombie waits to be counted
    except OSError:
        return False


@pytest.mark.slow
def test_no_worker_stays_behind_when_its_program_is_killed(image_folder, tmp_path):
    program = tmp_path / "reader.py"
    program.write_text(READER)
    with subprocess.Popen(
        [sys.executable, program, image_folder],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as reader:
        said = next(line for line in reader.stdout if line.startswith("workers"))
        reader.kill()
    workers = [Path("/proc") / pid / "stat" for pid in said.split()[1:]]
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_another_image_takes_the_place_of_one_that_cannot_be_read(image_folder):
    """With its own label, and any of those that are left; the one is named."""
    for file in (image_folder / "train").rglob("[0-3].jpeg"):
        file.write_bytes(b"x")
    images = load_images(image_folder, 3)
    colors, whole = ((20, 40, 220), (30, 200, 60)), [0, 0]
    rng = np.random.default_rng(0)
    for example in [images.train[i] for i in range(10)] * 20:
        read = _training_example(images.train, (16, 16, 3), True, Augmentation(), example, rng)
        np.testing.assert_allclose(read["image"].mean((0, 1)), colors[read["label"]], atol=15)
        assert read["broken"] == (0 if example.image else 1 + example.index)
        whole[read["label"]] += example.image is None
    assert min(whole) > 50  # of 160


def test_images_that_are_gone_end_a_training(image_folder):
    images = load_images(image_folder, 3)
    image_folder.rename(image_folder.with_name("gone"))
    with pytest.raises(OSError, match="100 images drawn by chance, and none of them can be read"):
        _training_example(
            images.train, (16, 16, 3), True, Augmentation(), images.train[0],
            np.random.default_rng(0),
        )  # fmt: skip


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*absent"):
        load_images(tmp_path / "absent", 3)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no folder .*val\. It takes the layout of ImageNet"):
        load_images(tmp_path, 3)
    (tmp_path / "val" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"val has classes that train lacks: \['dog'\]"):
        load_images(tmp_path, 3)
    (tmp_path / "val" / "dog").rmdir()
    with pytest.raises(ValueError, match=r"no images in .*train.cat\. Give it some, or remove"):
        load_images(tmp_path, 3)
    (tmp_path / "train" / "cat" / "a.xcf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.cat, where a\.xcf is none"):
        load_images(tmp_path, 3)
    Image.new("L", (4, 4)).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"no images in the folders of .*val"):
        load_images(tmp_path, 3)
    with pytest.raises(ValueError, match="the digits are 8 x 8 in gray"):
        load_images(None, 3)


def test_hidden_folders_and_files_are_no_classes_and_all_that_pillow_reads_counts(
    image_folder, capsys
):
    for part in ("train", "val"):
        (image_folder / part / ".ipynb_checkpoints").mkdir()
        inside = image_folder / part / "blue" / ".ipynb_checkpoints"
        inside.mkdir()
        Image.new("RGB", (9, 9)).save(inside / "0-checkpoint.png")
        Image.new("RGB", (9, 9)).save(image_folder / part / "blue" / "more.tif")
        Image.new("RGB", (9, 9)).save(image_folder / part / "green" / "more.GIF")
        (image_folder / part / "green" / "gone.png").symlink_to(image_folder / "absent.png")
    images = load_images(image_folder, 3)
    assert images.classes == ["blue", "green"]
    assert (len(images.train), len(images.validation)) == (12, 8)
    said = capsys.readouterr().out
    for part, name, taken, left_out in (
        ("train", "blue", 6, 2), ("train", "green", 6, 1), ("val", "blue", 4, 1)
    ):  # fmt: skip
        folder = image_folder / part / name
        assert f"{folder}: {taken} images, {left_out} other files left out\n" in said


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_gray_of_16_bits_keeps_its_levels(tmp_path, suffix):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    for mode in ("L", "RGB"):
        image = Files([str(tmp_path / f"ramp.{suffix}")], [0], mode)[0].image
        assert image.mode == mode
        pixels = np.asarray(image).reshape(64, 64, -1)[..., 0]
        np.testing.assert_array_equal(pixels, np.round(ramp / 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_gray_of_32_bits_goes_from_its_least_to_its_largest_value(tmp_path, dtype):
    ramp = np.linspace(-1000, 3000, 256).reshape(16, 16).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / "ramp.tiff")
    pixels = np.asarray(Files([str(tmp_path / "ramp.tiff")], [0], "L")[0].image)
    np.testing.assert_allclose(pixels, (ramp + 1000.0) * 255 / 4000, atol=0.6)
    Image.fromarray(np.full((4, 4), 7, dtype)).save(tmp_path / "flat.tiff")
    assert not np.asarray(Files([str(tmp_path / "flat.tiff")], [0], "L")[0].image).any()


def decoded(path, mode="L"):
    return np.asarray(Files([str(path)], [0], mode)[0].image, float)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_gray_of_fewer_bits_in_16_has_its_whole_range(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 400).round().astype(np.uint16).reshape(20, 20)
    Image.fromarray(ramp).save(tmp_path / "ramp.tiff")
    expected = ramp * (255 / (2**bits - 1))
    np.testing.assert_allclose(decoded(tmp_path / "ramp.tiff"), expected, atol=0.51)


@pytest.mark.parametrize(("brightest", "white"), [(65535, 65535), (4000, 4095), (900, 1023)])
@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("bright_part", ["train", "val"])
def test_a_dark_image_of_16_bits_stays_dark_beside_a_bright_one(
    tmp_path, brightest, white, suffix, bright_part
):
    """All files have the range that the brightest of them uses."""
    ramp = np.linspace(0, 1, 400).reshape(20, 20)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for name, largest in (("0", 200), ("1", brightest if part == bright_part else 200)):
            pixels = np.round(largest * ramp).astype(np.uint16)
            file = tmp_path / part / "a" / f"{name}.{suffix}"
            if suffix == "pgm":
                file.write_bytes(b"P5 20 20 65535\n" + pixels.astype(">u2").tobytes())
            else:
                Image.fromarray(pixels).save(file)
    images = load_images(tmp_path, 1)
    for source in (images.train, images.validation):
        dark = np.asarray(source[0].image, float)
        np.testing.assert_allclose(dark, np.round(200 * ramp) * 255 / white, atol=0.51)
    bright = (images.train if bright_part == "train" else images.validation)[1].image
    assert np.asarray(bright).max() == round(brightest * 255 / white)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_not_finite_is_the_darkest_or_the_brightest(tmp_path, value):
    ramp = np.linspace(-3, 5, 256, dtype=np.float32).reshape(16, 16)
    ramp[4, 4] = value
    Image.fromarray(ramp).save(tmp_path / "ramp.tiff")
    expected = (np.clip(np.nan_to_num(ramp, nan=-3), -3, 5) + 3) * 255 / 8
    np.testing.assert_allclose(decoded(tmp_path / "ramp.tiff"), expected, atol=0.51)
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "none.tiff")
    assert Files([str(tmp_path / "none.tiff")], [0], "L")[0].image is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
@pytest.mark.parametrize("hidden", [0, 99])
def test_what_is_transparent_is_white(tmp_path, mode, hidden):
    """A stroke of black on transparency, whatever color is hidden below."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:4] = 255
    gray = np.where(alpha == 255, 3, hidden).astype(np.uint8)
    options = {}
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(np.dstack([gray] * (len(mode) - 1) + [alpha]))
    else:  # one color is transparent
        image = Image.fromarray(gray)
        options = {"transparency": (hidden,) * 3 if mode == "RGB" else hidden}
        if mode == "P":
            image.putpalette(bytes(x for level in range(256) for x in [level] * 3))
        image = image.convert(mode) if mode == "RGB" else image
    image.save(tmp_path / "a.png", **options)
    expected = np.where(alpha == 255, 3, 255)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), expected)
    color = decoded(tmp_path / "a.png", "RGB")
    np.testing.assert_array_equal(color, np.repeat(expected[..., None], 3, -1))


def test_half_transparent_is_halfway_to_white(tmp_path):
    Image.new("RGBA", (4, 4), (100, 0, 200, 128)).save(tmp_path / "a.png")
    expected = np.array([100, 0, 200]) * 128 / 255 + 127
    np.testing.assert_allclose(decoded(tmp_path / "a.png", "RGB")[0, 0], expected, atol=1)


@pytest.mark.parametrize("suffix", ["h5", "grib", "bufr", "mpg", "ps", "eps", "wmf", "iim"])
def test_what_pillow_knows_and_cannot_show_is_no_image(tmp_path, suffix):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / part / "a" / "a.png")
    (tmp_path / "train" / "a" / f"b.{suffix}").write_bytes(b"")
    assert len(load_images(tmp_path, 1).train) == 1


@pytest.mark.parametrize("part", ["train", "val"])
def test_images_of_which_none_can_be_read_are_an_error(image_folder, part):
    for file in (image_folder / part).rglob("*.jpeg"):
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"none of the \d+ images in .*{part} can be read"):
        load_images(image_folder, 3)


def test_the_fingerprint_is_that_of_names_sizes_and_contents_wherever_they_lie(
    image_folder, tmp_path
):
    before = load_images(image_folder, 3).fingerprint
    image_folder.rename(tmp_path / "moved")
    assert load_images(tmp_path / "moved", 3).fingerprint == before
    file = tmp_path / "moved" / "train" / "blue" / "3.jpeg"
    file.rename(file.with_name("9.jpeg"))
    assert load_images(tmp_path / "moved", 3).fingerprint != before
    file.with_name("9.jpeg").rename(file)
    assert load_images(tmp_path / "moved", 3).fingerprint == before
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    assert load_images(tmp_path / "moved", 3).fingerprint != before


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = Files([str(tmp_path / "a.png")], [0], "L")[0].image
    np.testing.assert_array_equal(np.asarray(image), np.rot90(pixels, -1))


def test_a_decompression_bomb_is_no_image_and_ends_nothing(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    Image.new("L", (4, 4)).save(tmp_path / "a.bmp")
    header = bytearray((tmp_path / "a.bmp").read_bytes())
    header[18:26] = np.array([60000, 60000], np.int32).tobytes()  # width and height
    (tmp_path / "damaged.bmp").write_bytes(header)
    files = Files(
        [str(tmp_path / name) for name in ("bomb.png", "damaged.bmp", "a.bmp")], [0] * 3, "L"
    )
    assert [files[i].image is None for i in range(3)] == [True, True, False]


def picture(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 0 * x], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_center_crop_keeps_the_middle():
    pixels = np.asarray(augmentation.center_crop(picture(), 16), float)
    # Seven eighths of 30 is 26.25: columns 6.9 to 33.1 and rows 1.9 to 28.1.
    np.testing.assert_allclose(pixels[8, [0, -1], 0], 255 * np.array([7.2, 31.8]) / 40, atol=4)
    np.testing.assert_allclose(pixels[[0, -1], 8, 1], 255 * np.array([2.2, 26.8]) / 30, atol=4)


def test_random_crops_are_parts_of_the_image_and_half_are_flipped():
    rng = np.random.default_rng(0)
    crops = [np.asarray(augmentation.random_crop(picture(), 8, rng), float) for _ in range(400)]
    slopes = np.array([crop[4, -1, 0] - crop[4, 0, 0] for crop in crops])
    assert 0.4 < np.mean(slopes > 0) < 0.6
    heights = np.array([crop[-1, 4, 1] - crop[0, 4, 1] for crop in crops])
    assert (heights > 0).all()
    # The part is w x h of 40 x 30, seen at 7/8 of its sides.
    areas = np.abs(slopes) * heights / (255 * 7 / 8) ** 2
    assert 0.06 < areas.min() < 0.12
    assert areas.max() < 1.05
    ratios = (np.abs(slopes) * 40) / (heights * 30)
    assert 0.7 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.42


@pytest.mark.parametrize("operation", augmentation.OPERATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_each_operation_changes_the_image_and_keeps_its_size(operation, mode):
    noise = Image.effect_noise((40, 30), 40).convert(mode)
    image = Image.blend(picture().convert(mode), noise, 0.5)
    for sign in (-1, 1):
        changed = operation(image, 0.9, sign)
        assert (changed.size, changed.mode) == (image.size, mode)
        for strength in (0.0, 1.0):
            assert operation(image, strength, sign).size == image.size
        color_of_gray = mode == "L" and operation is augmentation.OPERATIONS[7]
        assert (changed.tobytes() == image.tobytes()) == color_of_gray


def test_rand_augment_applies_two_operations_half_of_the_time(monkeypatch):
    applied = []
    monkeypatch.setattr(
        augmentation,
        "OPERATIONS",
        [lambda i, s, sign, n=n: applied.append((n, s, sign)) or i for n in range(5)],
    )
    rng = np.random.default_rng(0)
    for _ in range(1000):
        augmentation.rand_augment(picture(), 9, 0.5, rng)
    numbers, strengths, signs = map(np.array, zip(*applied, strict=True))
    assert 900 < len(applied) < 1100
    assert min(np.bincount(numbers)) > 150
    np.testing.assert_allclose([strengths.mean(), strengths.std()], [0.9, 0.05], atol=0.01)
    assert strengths.max() <= 1
    assert abs(signs.mean()) < 0.1


def test_random_erasing_puts_noise_into_one_rectangle():
    rng = np.random.default_rng(0)
    pixels = np.zeros((40, 40, 3), np.uint8)
    shares = []
    for _ in range(300):
        erased = augmentation.random_erasing(pixels, 0.25, rng).any(-1)
        if erased.any():
            rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
            inside = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert inside.mean() > 0.9
            shares.append(inside.size / 1600)
    assert 45 < len(shares) < 105
    assert min(shares) > 0.01
    assert max(shares) < 0.36
    assert not pixels.any()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_shares_pixels_and_targets_alike(mixup, cutmix):
    rng = np.random.default_rng(0)
    images = np.zeros((4, 16, 16, 1), np.uint8)
    images[::2] = 200
    targets = np.float32([[1, 0], [0, 1], [1, 0], [0, 1]])
    kinds = set()
    for _ in range(40):
        mixed, soft = augmentation.mix(images, targets, mixup, cutmix, rng)
        np.testing.assert_allclose(mixed.mean((1, 2, 3)) / 200, soft[:, 0], atol=3e-3)
        np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
        kinds.add(set(np.unique(mixed)) <= {0, 200})
    assert kinds >= ({False} if not cutmix else {True} if not mixup else {True, False})
    np.testing.assert_array_equal(augmentation.mix(images, targets, 0, 0, rng)[0], images)
