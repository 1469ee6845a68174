import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_layers import forward, linear, parameters, random_model

from models.swin import CONFIGS, Config, Swin, focus, linear_attention

TINY = Config(
    image_size=12,
    num_channels=2,
    patch_size=1,
    num_classes=5,
    width=4,
    depths=(2, 4),
    num_heads=(1, 2),
    window_size=3,
)
FLATTEN = dataclasses.replace(TINY, num_linear_stages=1)


def build(config=TINY, seed=0):
    return Swin(config, rngs=nnx.Rngs(seed))


def images(batch=2):
    return jax.random.normal(jax.random.key(0), (batch, 12, 12, 2))


@pytest.mark.parametrize(
    ("name", "count"),
    [("small", 49_606_258), ("base", 87_768_224), ("flatten-small", 50_510_288)],
)
def test_has_the_published_number_of_parameters(name, count):
    model = nnx.eval_shape(lambda: Swin(CONFIGS[name], rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_a_pixel_reaches_its_own_window_and_by_the_shift_those_around_it():
    model = random_model(Swin, TINY)
    stage = model.stages[0]
    grid = jax.random.normal(jax.random.key(0), (1, 12, 12, 4))
    changed = grid.at[0, 2, 2, 0].add(1.0)  # at the end of the first window of 3 x 3
    # The first block: rows 0 to 2. The second, shifted by 1: windows 1 to 3, 4 to 6, and the
    # wrapped 10, 11 apart from 0. So the change arrives in rows 0 to 3.
    reached = np.abs(forward(stage, grid) - forward(stage, changed)).max((0, 3)) > 1e-6
    assert reached[:4, :4].all()
    assert reached.sum() == 16


def test_focused_linear_attention_equals_its_quadratic_form(x64):
    rng = np.random.default_rng(0)
    q, k = rng.uniform(0, 1, (2, 2, 20, 3, 4))
    v = rng.standard_normal((2, 20, 3, 4))
    weights = np.einsum("btnh,bsnh->bnts", q, k)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, v)
    np.testing.assert_allclose(linear_attention(q, k, v), expected, atol=1e-5)
    np.testing.assert_allclose(
        linear_attention(*np.float32([q, k, v])), expected, atol=1e-5, rtol=1e-5
    )


def test_focus_keeps_the_norm_and_sharpens_the_direction():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 4))
    scale = np.random.default_rng(1).uniform(0.5, 2, (3, 4))
    positive = (np.maximum(x, 0) + 1e-6) / scale
    norm = lambda x: np.sqrt((x**2).sum((-1, -2), keepdims=True))  # noqa: E731
    expected = positive**3 / norm(positive**3) * norm(positive)
    np.testing.assert_allclose(
        focus(jnp.array(x), jnp.array(scale)), expected, rtol=1e-4, atol=1e-9
    )


def test_focused_linear_attention_equals_han_et_al_in_numpy():
    """The whole layer, with the convolution by its definition."""
    config = dataclasses.replace(
        TINY, image_size=4, width=6, depths=(1,), num_heads=(2,), num_linear_stages=1
    )
    graph, state = nnx.split(random_model(Swin, config).stages[0].blocks.attention)
    layer = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    p = parameters(layer)
    grid = np.random.default_rng(0).standard_normal((2, 4, 4, 6))
    tokens = grid.reshape(2, 16, 6)
    q, k, v = (linear(tokens, p[name]) for name in ("query", "key", "value"))
    k = k + p["position_embedding"].reshape(16, 2, 3)

    def focused(x):
        x = (np.maximum(x, 0) + 1e-6) / np.log1p(np.exp(p["scale"])).reshape(2, 3)
        norms = [np.linalg.norm(y.reshape(2, 16, 6), axis=-1) for y in (x, x**3)]
        return x**3 * (norms[0] / norms[1])[..., None, None]

    weights = np.einsum("btnh,bsnh->bnts", focused(q), focused(k))
    weights /= 16 * (weights.mean(-1, keepdims=True) + 1e-6)
    y = np.einsum("bnts,bsnh->btnh", weights, v)
    padded = np.pad(v.reshape(2, 4, 4, 2, 3), ((0, 0), (2, 2), (2, 2), (0, 0), (0, 0)))
    convolved = sum(
        padded[:, i : i + 4, j : j + 4] * p["convolution"]["kernel"][i, j, 0]
        for i in range(5)
        for j in range(5)
    )
    y = y + convolved.reshape(2, 16, 2, 3) + p["convolution"]["bias"]
    expected = np.einsum("btnh,nhd->btd", y, p["out"]["kernel"]) + p["out"]["bias"]
    found = layer(jnp.array(grid, jnp.float32), jnp.array(0)).reshape(2, 16, 6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stochastic_depth_grows_over_all_stages():
    model = random_model(Swin, dataclasses.replace(FLATTEN, stochastic_depth=0.9))
    np.testing.assert_allclose(
        [*model.stages[0].depths, *model.stages[1].depths], np.linspace(0, 1, 6)
    )
    assert np.abs(forward(model, images()) - forward(model, images())).max() > 1e-5
    model.eval()
    np.testing.assert_array_equal(forward(model, images()), forward(model, images()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 13, "patch_size": 2}, "stage 0 a grid of whole windows of 3 tokens"),
        ({"image_size": 18}, None),
        ({"window_size": 4}, "stage 1 a grid of whole windows of 4 tokens"),
        ({"depths": (2, 2, 2), "num_heads": (1, 2, 4), "image_size": 6}, "stage 2"),
    ],
)
def test_a_grid_that_the_windows_do_not_cover_is_an_error(change, message):
    config = dataclasses.replace(TINY, **change)
    if message is None:
        nnx.eval_shape(lambda: build(config))
    else:
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda: build(config))


def test_images_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"\(1, 6, 6, 2\), not \(batch, 12, 12, 2\)"):
        random_model(Swin, TINY)(jnp.zeros((1, 6, 6, 2)))
