"""The parts of fused kernels, as programs cut them."""

import jax
import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers
from test_reading_table import NOTHING, TABLE, f32

from weyl_optax import SplitDimensionNumbers, dimension_numbers_from, tabulate

# The sizes of the table: d 6, h 2, k 3, f 7. Each index of an axis by itself is a batch axis.
PARTS = {
    "attention_fused": {"qkv": SplitDimensionNumbers((0,), (1,), 1, (6, 6, 6))},
    "attention_fused_by_axes": {"qkv": MuonDimensionNumbers((0,), (2, 3))},
    "attention_fused_with_bias": {
        "qkv": SplitDimensionNumbers((0,), (1,), 1, (6, 6, 6)),
        "bias": SplitDimensionNumbers((), (0,), 0, (6, 6, 6)),
    },
    "attention_fused_of_grouped_queries": {
        "qkv": SplitDimensionNumbers((0,), (1, 2), 1, (2, 1, 1))
    },
    "gated_experts_by_ragged_products": {"up": SplitDimensionNumbers((1,), (2,), 2, (7, 7))},
    "gemma_mlp": {"gating": MuonDimensionNumbers((1,), (2,))},
    "grouped_queries": {"kv": MuonDimensionNumbers((0,), (2, 3))},
    "latent_attention_fused": {
        "kva": SplitDimensionNumbers((0,), (1,), 1, (5, 2)),
        "kvb": SplitDimensionNumbers((0,), (1, 2), 2, (3, 3)),
    },
    "lstm": {
        "w": SplitDimensionNumbers((0,), (1,), 1, (6, 6, 6, 6)),
        "u": SplitDimensionNumbers((0,), (1,), 1, (6, 6, 6, 6)),
        "b": SplitDimensionNumbers((), (0,), 0, (6, 6, 6, 6)),
    },
    "swiglu_fused": {"fused": SplitDimensionNumbers((0,), (1,), 1, (7, 7))},
    "unstacked fused kernel": {"w": SplitDimensionNumbers((1,), (0,), 0, (6, 6, 6))},
}


def test_the_parts_of_the_programs_of_the_table_and_of_no_others():
    for name, (fn, leaves, inputs) in TABLE.items():
        if any(right == NOTHING for _, right in leaves.values()):
            continue
        params = {leaf: f32(*shape) for leaf, (shape, _) in leaves.items()}
        whole = dimension_numbers_from(fn, params, *inputs)
        parts = dimension_numbers_from(fn, params, *inputs, by_part=True)
        assert parts == whole | PARTS.get(name, {}), name


def halves(y):
    return jnp.split(y, 2, -1)


def rotated(w, x):
    first, second = halves(x @ w)
    return jnp.concatenate([first - 2 * second, second + 2 * first], -1)


def rotated_halves(w, x):
    first, second = halves(x @ w)
    return x @ w + jnp.concatenate([-second, first], -1)


def complex_pairs(w, x):
    return jnp.abs(jax.lax.complex(*halves(x @ w)))


def interleaved(w, x):
    y = (x @ w).reshape(2, 4, 3, 2)
    return jax.nn.relu(y[..., 0]) * y[..., 1]


def cut_in_two_ways(w, x):
    y = x @ w
    return jax.nn.relu(y[:, :12]) * jax.nn.gelu(y[:, 12:]), jax.nn.relu(y[:, :8])


def one_piece(w, x):
    return (x @ w)[:, :20] ** 2


def partly_rotated(w, x):
    y = x @ w
    first, second = halves(y[:, :8])
    return jnp.concatenate([first - 2 * second, second + 2 * first, y[:, 8:]], -1) ** 2


def joined_after_a_map(w, x):
    pair = jax.lax.map(lambda x: tuple(halves(x @ w)), x)
    return jnp.concatenate(pair, -1) ** 2


def joined_after_a_branch(w, x):
    pair = jax.lax.cond(x[0, 0] > 0, lambda: halves(x @ w), lambda: halves(2 * x @ w))
    return jnp.concatenate(pair, -1) ** 2


def padded(w, x):
    first, second = halves(x @ w)
    return (jnp.pad(first, ((0, 0), (12, 0))) + jnp.pad(second, ((0, 0), (0, 12)))) ** 2


def scattered(w, x):
    y = x @ w
    return (jnp.zeros(y.shape).at[:, :12].set(y[:, 12:]).at[:, 12:].set(y[:, :12])) ** 2


def split_in_one(w, x):
    (y,) = jnp.split(x @ w, 1, -1)
    return y**2


def strided(w, x):
    return jax.nn.relu((x @ w)[:, ::2]) * (x @ w)[:, 1::2]


@pytest.mark.parametrize(
    "fn",
    [
        rotated,
        rotated_halves,
        partly_rotated,
        complex_pairs,
        interleaved,
        cut_in_two_ways,
        one_piece,
        joined_after_a_map,
        joined_after_a_branch,
        padded,
        scattered,
        split_in_one,
        strided,
    ],
)
def test_one_matrix_stays_one(fn):
    numbers = dimension_numbers_from(fn, f32(6, 24), f32(2, 6), by_part=True)
    assert numbers == MuonDimensionNumbers((0,), (1,))


def gated(y):
    return jax.nn.silu(y[..., :8]) * y[..., 8:]


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: gated(2 * (x @ w).astype(jnp.bfloat16) / 3),
        lambda w, x: gated((x @ w).reshape(-1, 1, 16)),
        lambda w, x: gated((w.T @ x.T).T - x[0, 0]),
        lambda w, x: jax.nn.relu(x @ w[:, :8]) * (x @ w[:, 8:]),
        lambda w, x: gated(jax.device_put(jax.lax.stop_gradient((x @ w + 0j).real))),
        lambda w, x: jax.vmap(jax.checkpoint(lambda x: gated(x @ w)))(x),
        lambda w, x: jax.lax.map(lambda x: gated(x @ w), x),
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: gated(x @ w), lambda: x @ w[:, :8]),
    ],
)
def test_parts_are_seen_through_what_comes_between(fn):
    numbers = dimension_numbers_from(fn, f32(6, 16), f32(2, 6), by_part=True)
    assert numbers == SplitDimensionNumbers((0,), (1,), 1, (8, 8))


def test_parts_of_layers_that_are_scanned_over():
    def loss(params, x):
        def layer(x, w):
            gate, up = jnp.split(x @ w["up"] + w["bias"], [8], -1)
            return x + (jax.nn.silu(gate) * up) @ w["down"], None

        return jax.lax.scan(layer, x, params)[0]

    params = {"up": f32(3, 6, 16), "bias": f32(3, 16), "down": f32(3, 8, 6)}
    numbers = dimension_numbers_from(loss, params, f32(2, 6), by_part=True)
    assert tabulate(params, numbers).splitlines()[1:] == [
        "bias  (3, 16)     3 vectors of 8, 3 vectors of 8",
        "down  (3, 8, 6)   3 matrices of 8 x 6",
        "up    (3, 6, 16)  3 matrices of 6 x 8, 3 matrices of 6 x 8",
    ]


def test_positions_that_are_cut_are_no_fused_bias():
    def loss(params, x):
        h = x + params["positions"]
        return h[:, 0] @ params["a"], jax.nn.relu(h[:, 1:]) @ params["b"]

    params = {"positions": f32(5, 6), "a": f32(6, 4), "b": f32(6, 4)}
    whole = dimension_numbers_from(loss, params, f32(2, 5, 6))
    assert dimension_numbers_from(loss, params, f32(2, 5, 6), by_part=True) == whole


def test_groups_that_are_summed_over_are_no_axis_of_the_leaf():
    numbers = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])

    def loss(w, x):
        y = jax.lax.ragged_dot_general(x, w, jnp.array([2, 4]), numbers)
        return jnp.tanh(y[:, :2]) * y[:, 2:]

    assert isinstance(
        dimension_numbers_from(loss, f32(6, 4), f32(6, 4), by_part=True), MuonDimensionNumbers
    )


def test_an_override_counts_before_the_parts():
    numbers = dimension_numbers_from(
        lambda params, x: gated(x @ params["w"]),
        {"w": f32(6, 16)},
        f32(2, 6),
        by_part=True,
        overrides={"w": MuonDimensionNumbers(0, 1)},
    )
    assert numbers == {"w": MuonDimensionNumbers(0, 1)}
