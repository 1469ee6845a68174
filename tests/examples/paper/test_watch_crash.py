"""The page of a crash, in a real browser."""

import shutil

import jax
import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from examples import language, program
from examples.paper import crash_page, watch_crash
from examples.recorder import read_metrics

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 240_000  # milliseconds, for a busy machine
SMALL = "--steps 4 --watch 2".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with short runs of the ViT, and their page."""
    folder = tmp_path_factory.mktemp("vit") / "run"
    flags = watch_crash.parse([*SMALL, "--model", "vit", "--out", str(folder)])
    watch_crash.main(flags, watch_crash.prepare(flags))
    return folder


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=PATIENCE
        )
        yield browser
        browser.close()


@pytest.mark.slow
def test_frames_and_terms_are_those_of_the_steps(finished):
    blocks, heads, tokens = 4, 4, 17
    for name in crash_page.RUNS:
        lines = read_metrics(finished, name)
        run = crash_page.read(finished, name)
        assert [line["step"] for line in lines] == [1, 2, 4] == run.steps.tolist()
        assert all(len([k for k in line if k.startswith("watch/")]) == 15 * 4 for line in lines)
        assert run.maps.shape == (3, blocks, heads, tokens, tokens)
        np.testing.assert_allclose(run.maps.astype(float).sum(-1), 1, atol=5e-3)  # float16
        assert (run.entropy >= 0).all()
        assert (run.entropy <= np.log(tokens) + 1e-5).all()
    starts = [read_metrics(finished, name)[0] for name in crash_page.RUNS]
    for key in starts[0]:
        if key.startswith("watch/"):  # of the weights from which the first step starts
            assert starts[0][key] == starts[1][key], key


@pytest.mark.slow
def test_a_gpt_is_measured_as_well(tmp_path):
    flags = watch_crash.parse(["--out", str(tmp_path / "run")])
    experiment = watch_crash.prepare(flags)
    config = experiment.model.config
    assert config.learning_rate == watch_crash.PRESETS["gpt"].learning_rate
    assert experiment.entropy == pytest.approx(3.14, abs=0.2)  # of the bytes of source text
    arrays = jax.eval_shape(
        lambda: watch_crash.measure_attention(
            language.make_model(config, experiment.model.data), experiment.inputs
        )
    )
    shapes = {name: array.shape for name, array in arrays.items()}
    each_map = (4, 2, 4)  # blocks, examples, heads
    assert shapes == {
        "entropy": each_map,
        "effective_rank": each_map,
        "mode": each_map,
        "maps": (4, 4, 128, 128),
        "energy": (4, 4, 32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(finished, browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    trouble = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url))
    page.goto((finished / "index.html").as_uri())
    trouble.remove((finished / "index.html").as_uri())

    # Every picture has lines, and text in the color of the page.
    pictures = page.locator("figure svg")
    assert pictures.count() == 5
    ink = page.evaluate("getComputedStyle(document.body).color")
    for picture in pictures.all():
        box = picture.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
        assert picture.locator("g[id^=line2d] path").count() > 10
        color = picture.evaluate(
            "svg => getComputedStyle(svg.querySelector('g[id^=text] text')).fill"
        )
        assert color == ink

    def maps():
        return page.evaluate("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")

    def colors():
        return page.evaluate(
            "[...document.querySelectorAll('canvas')].map(c => new Set(new Uint32Array("
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"
        )

    # The animation moves by itself, stops, and goes where it is sent.
    assert len(maps()) == len(crash_page.RUNS)
    assert min(colors()) > 1
    before = maps()
    page.wait_for_function(
        "before => document.querySelector('canvas').toDataURL() != before", arg=before[0]
    )
    page.get_by_role("button", name="Pause").click()
    slider = page.get_by_label("frame")
    frames = []
    for frame in range(3):
        slider.fill(str(frame))
        frames.append(maps())
    assert len({frame[0] for frame in frames}) == 3
    assert len(set(frames[0])) == 1  # all runs start from the same weights
    assert frames[2][0] != frames[2][-1]
    assert "step 4: entropy" in page.locator("#maps").inner_text()
    assert not trouble
    page.close()


def test_signs_of_a_crash_and_of_a_success():
    steps = np.arange(3)

    def run(losses, qk, entropy, mode):
        lines = [
            {"step": i, "loss": loss}
            | {f"watch/blocks/0/{term}": value for term in ("W_qW_k", "x", "grad_x")}
            for i, (loss, value) in enumerate(zip(losses, qk, strict=True))
        ]
        lines[-1]["val_loss"] = losses[-1]
        shape = np.ones((3, 1, 1, 1))
        return crash_page.Run(
            lines,
            steps,
            entropy=np.reshape(entropy, (3, 1, 1, 1)) * shape,
            effective_rank=shape,
            mode=np.reshape(mode, (3, 1, 1, 1)),
            energy=np.reshape(entropy, (3, 1, 1, 1)) * np.ones((3, 1, 1, 8)) / 4,
            maps=np.ones((3, 1, 1, 2, 2)) / 2,
        )

    runs = {
        "adamw": run([5.0, 9.0, 3.5], [0.1, 50.0, 20.0], [3.9, 0.5, 0.1], [0, 3, 3]),
        "adamw2": run([5.0, 4.0, 2.5], [0.1, 0.5, 2.0], [3.0, 3.5, 3.2], [0, 1, 0]),
    }
    signs = crash_page.find_signs(runs, entropy=3.1)
    seen = {sign.name.split(",")[0].split(":")[0]: sign.seen for sign in signs}
    assert seen["The loss turns up"] == [True, False]
    assert seen["‖W<sub>q</sub>ᵀW<sub>k</sub>‖₂ grows more than a hundredfold"] == [True, False]
    assert seen["The entropy of attention falls below a tenth"] == [True, False]
    assert seen["Over a tenth of the maps collapse malignantly"] == [True, False]
    assert seen["Over a tenth of the maps collapse benignly"] == [False, False]
    assert seen["Its energy concentrates"] == [True, False]
    values = {sign.name: sign.values for sign in signs}
    assert values["‖W<sub>q</sub>ᵀW<sub>k</sub>‖₂ grows more than a hundredfold"] == [
        "0.1 at the start, at most 50 (500 times)",
        "0.1 at the start, at most 2 (20 times)",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.012"),
        (7660.047, "7,660"),
        (63.4, "63"),
        (2.34e7, "2.3 · 10⁷"),
        (4.56e-12, "4.6 · 10⁻¹²"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_of_the_page(number, text):
    assert crash_page._number(number) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "0"], "--watch 0: it must be at least 1"),
        (["--steps", "0"], "--steps 0: it must be at least 1"),
    ],
)
def test_bad_flags_say_what_to_write(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    parse = lambda: watch_crash.parse([*arguments, "--out", str(out)])  # noqa: E731
    with pytest.raises(SystemExit, match=message):
        program.run(parse, watch_crash.prepare, watch_crash.main)
    assert not out.exists()
