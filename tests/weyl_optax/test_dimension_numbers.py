from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from weyl_optax import dimension_numbers_from, scale_by_weyl_bound, tabulate


def test_the_default_reads_the_last_two_axes():
    params = {
        "a": jnp.float32(1.0),
        "b": jnp.ones(5),
        "c": jnp.ones((3, 4)),
        "d": {"e": jnp.ones((2, 6, 3, 4)), "f": jnp.ones((1, 4)), "n": jnp.arange(3)},
    }
    assert tabulate(params) == (
        "path  shape         read as\n"
        "a     ()            1 scalar\n"
        "b     (5,)          1 vector of 5\n"
        "c     (3, 4)        1 matrix of 3 x 4\n"
        "d/e   (2, 6, 3, 4)  12 matrices of 3 x 4\n"
        "d/f   (1, 4)        1 matrix of 1 x 4\n"
        "d/n   (3,)          unbounded"
    )


def test_a_tree_written_for_muon_works_unchanged():
    numbers = {
        "q": MuonDimensionNumbers(0, (1, 2)),
        "o": MuonDimensionNumbers((-3, -2), -1),
        "b": None,
    }
    params = {"q": jnp.ones((8, 2, 4)), "o": jnp.ones((2, 4, 8)), "b": jnp.ones(8)}
    for spec in (numbers, lambda params: numbers):
        assert tabulate(params, spec) == (
            "path  shape      read as\n"
            "b     (8,)       unbounded\n"
            "o     (2, 4, 8)  1 matrix of 8 x 8\n"
            "q     (8, 2, 4)  1 matrix of 8 x 8"
        )
    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers)
    ours = optax.chain(muon, scale_by_weyl_bound(weight_dimension_numbers=numbers))
    updates, _ = ours.update(params, ours.init(params), params)
    assert updates["q"].shape == (8, 2, 4)


def test_each_head_may_be_a_matrix_of_its_own():
    table = tabulate(jnp.ones((8, 3, 4)), MuonDimensionNumbers(0, 2))
    assert table.endswith("3 matrices of 8 x 4")


BAD = [
    ({"w": MuonDimensionNumbers(0, 2)}, r"'w' of shape \(3, 4\): axis 2 is out of bounds"),
    ({"w": MuonDimensionNumbers(0, 0)}, r"'w' of shape \(3, 4\), which names an axis twice"),
    ({"w": MuonDimensionNumbers(0, (1, -1))}, "names an axis twice"),
    ({"w": MuonDimensionNumbers(-3, 1)}, "axis -3 is out of bounds"),
    ({"w": MuonDimensionNumbers(None, 1)}, r"reduction_axis=None.* for the leaf 'w'"),
    ({"w": MuonDimensionNumbers(0, "1")}, r"output_axis='1'.* for the leaf 'w'"),
    ({}, r"no entry for the leaf 'w' of shape \(3, 4\)"),
    ({"w": MuonDimensionNumbers(), "v": None}, "an entry at 'v', where params has no leaf"),
    ({"w": (0, 1)}, r"no entry for the leaf 'w'"),
    ({"w": "matrix"}, r"'matrix' for the leaf 'w'"),
    ({"v": MuonDimensionNumbers()}, r"no entry for the leaf 'w'"),
]


@pytest.mark.parametrize(("numbers", "message"), BAD)
def test_a_specification_that_does_not_fit_is_named(numbers, message):
    solver = scale_by_weyl_bound(weight_dimension_numbers=numbers)
    with pytest.raises(ValueError, match=message):
        solver.init({"w": jnp.ones((3, 4))})


def test_a_vector_is_written_with_no_reduction_axis():
    solver = scale_by_weyl_bound(weight_dimension_numbers={"b": MuonDimensionNumbers()})
    with pytest.raises(
        ValueError, match=r"MuonDimensionNumbers\(reduction_axis=\(\), output_axis=0\)"
    ):
        solver.init({"b": jnp.ones(3)})


def test_two_leaves_of_one_path_are_named():
    with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
        scale_by_weyl_bound().init({"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}})
    params = {"a/b": jnp.ones((6, 4)), "a": {"b": jnp.ones((5, 6))}}
    with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
        dimension_numbers_from(
            lambda params, x: (x @ params["a/b"], params["a"]["b"] @ x.T), params, jnp.ones((2, 6))
        )


def test_one_entry_may_be_for_a_whole_subtree():
    w = jnp.ones((20, 24))
    params = {"a": {"q": w, "k": w}, "b": {"bias": jnp.ones(8)}, "c": [w, jnp.ones((3, 4, 5))]}
    numbers = {
        "a": MuonDimensionNumbers(1, 0),
        "b": None,
        "c": [MuonDimensionNumbers(0, 1), MuonDimensionNumbers(0, (1, 2))],
    }
    assert tabulate(params, numbers).splitlines()[1:] == [
        "a/k     (20, 24)   1 matrix of 24 x 20",
        "a/q     (20, 24)   1 matrix of 24 x 20",
        "b/bias  (8,)       unbounded",
        "c/0     (20, 24)   1 matrix of 20 x 24",
        "c/1     (3, 4, 5)  1 matrix of 3 x 20",
    ]
    assert "2 matrices" not in tabulate({"a": w, "b": w}, MuonDimensionNumbers(0, 1))


def test_a_field_called_value_has_a_name():
    class Attention(NamedTuple):
        query: jnp.ndarray
        value: jnp.ndarray

    attention = {"attn": Attention(jnp.ones((20, 24)), jnp.ones((24, 20)))}
    assert [row.split()[0] for row in tabulate(attention).splitlines()[1:]] == [
        "attn/query",
        "attn/value",
    ]


def test_an_equinox_model_of_numbers_is_a_tree_although_it_can_be_called():
    model = eqx.nn.Linear(24, 20, key=jax.random.key(0))
    numbers = eqx.tree_at(
        lambda m: (m.weight, m.bias),
        model,
        (MuonDimensionNumbers(1, 0), MuonDimensionNumbers((), 0)),
    )
    assert "1 matrix of 24 x 20" in tabulate(model, numbers)


def test_a_reading_by_rank_of_more_than_a_matrix_is_said(caplog):
    scale_by_weyl_bound().init({"query": jnp.ones((64, 4, 16)), "w": jnp.ones((3, 4))})
    (record,) = caplog.records
    assert "query (64, 4, 16) as 64 matrices of 4 x 16" in record.message
    assert "dimension_numbers_from" in record.message
    scale_by_weyl_bound(weight_dimension_numbers=MuonDimensionNumbers(0, (1, 2))).init(
        {"query": jnp.ones((64, 4, 16))}
    )
    scale_by_weyl_bound().init({"w": jnp.ones((3, 4))})
    assert len(caplog.records) == 1
