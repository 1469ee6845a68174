import numpy as np
import pytest
from PIL import Image

from examples import placement, program

COLORS = {"blue": (20, 40, 220), "green": (30, 200, 60)}


@pytest.fixture
def image_folder(tmp_path):
    """JPEGs of two colors in the layout of ImageNet: 10 to train on and 6 held out.

    One of the first is no image, and one of the others is cut off.
    """
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for part, number in (("train", 5), ("val", 3)):
        for name, color in COLORS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                noise = rng.integers(-15, 15, (20 + 5 * i, 30, 3))
                image = Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8))
                image.save(folder / part / name / f"{i}.jpeg", quality=95)
    (folder / "train" / "blue" / "1.jpeg").write_bytes(b"no image at all")
    cut = folder / "val" / "green" / "2.jpeg"
    cut.write_bytes(cut.read_bytes()[:400])
    (folder / "train" / "blue" / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_device():
    """A program that is not told --mesh trains on one device: eight virtual ones take longer."""
    make_mesh = program.make_mesh

    def on_one(config):
        if config.mesh is None:
            return placement.make_mesh(None, rows=1)
        return make_mesh(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_mesh", on_one)
        yield
