"""QK-Clip: the logits after the step, on the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from weyl_optax.contrib import qk_clip


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    layer = lambda: {  # noqa: E731
        "kernel": jax.random.normal(next(keys), (2, 8, 3, 4)),
        "bias": jax.random.normal(next(keys), (2, 3, 4)),
    }
    return {"blocks": {"attention": {name: layer() for name in ("query", "key", "value")}}}


X = jax.random.normal(jax.random.key(9), (5, 8))


def logits(params):
    """(blocks, heads, tokens, tokens)"""
    attention = params["blocks"]["attention"]
    query, key = (
        jnp.einsum("td,bdnh->btnh", X, attention[name]["kernel"]) + attention[name]["bias"][:, None]
        for name in ("query", "key")
    )
    return jnp.einsum("btnh,bsnh->bnts", query, key) / 2


def test_logits_above_the_threshold_come_down_to_it_and_others_stay():
    params = make_params()
    largest = logits(params).max((-1, -2))
    threshold = float(np.median(largest))
    solver = qk_clip(threshold)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(solver.update)(
        zeros, solver.init(params), params, max_logits={"blocks/attention": largest}
    )
    after = logits(optax.apply_updates(params, updates)).max((-1, -2))
    assert 0 < (largest > threshold).sum() < largest.size
    np.testing.assert_allclose(after, np.minimum(largest, threshold), rtol=1e-5)
    for leaf in updates["blocks"]["attention"]["value"].values():
        np.testing.assert_array_equal(leaf, 0)


def test_the_step_counts_as_well():
    """The weights after the step are scaled: in all, sqrt(t / S) (W + u)."""
    params = make_params()
    steps = jax.tree.map(lambda p: 0.1 * jnp.sin(p), params)
    solver = qk_clip(1.0)
    largest = jnp.array([[4.0, 1.0, 0.5], [16.0, 1.0, 9.0]])
    updates, _ = solver.update(
        steps, solver.init(params), params, max_logits={"blocks/attention": largest}
    )
    scale = np.array([[0.5, 1, 1], [0.25, 1, 1 / 3]])
    for name in ("query", "key"):
        kernel, step, update = (
            tree["blocks"]["attention"][name]["kernel"] for tree in (params, steps, updates)
        )
        np.testing.assert_allclose(
            kernel + update, scale[:, None, :, None] * (kernel + step), rtol=1e-5, atol=1e-6
        )


def test_what_is_missing_or_does_not_fit_is_an_error():
    params = make_params()
    solver = optax.chain(optax.sgd(0.1), qk_clip())
    state = solver.init(params)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params, max_logits="):
        solver.update(params, state, params)
    with pytest.raises(ValueError, match="no entry for the attention 'blocks/attention'"):
        solver.update(params, state, params, max_logits={"blocks": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"shape \(3,\), and the leaf 'blocks/attention/"):
        solver.update(params, state, params, max_logits={"blocks/attention": jnp.ones(3)})
    with pytest.raises(ValueError, match="threshold must be above 0"):
        qk_clip(0.0)


def test_the_threshold_may_be_a_hyperparameter_of_a_jitted_step():
    params = make_params()
    logits = {"blocks/attention": jnp.full((2, 3), 400.0)}
    solver = optax.inject_hyperparams(qk_clip)(threshold=100.0)
    found, _ = jax.jit(solver.update)(params, solver.init(params), params, max_logits=logits)
    expected, _ = qk_clip(100.0).update(params, optax.EmptyState(), params, max_logits=logits)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_logits_of_no_layer_are_an_error():
    params = make_params()
    renamed = {"blocks": {"attention": {"q_proj": params["blocks"]["attention"]["query"]}}}
    solver, largest = qk_clip(1.0), jnp.full((2, 3), 100.0)
    for tree, logits_of in (
        (renamed, {"blocks/attention": largest}),
        (params, {"blocks/attention": largest, "blocks/other": largest}),
    ):
        with pytest.raises(ValueError, match=r"where no layer matches .*query.* Give layers="):
            solver.update(tree, solver.init(tree), tree, max_logits=logits_of)
