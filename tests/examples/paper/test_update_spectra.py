"""The singular values of an update, before and after the cap."""

import jax
import numpy as np
import pytest

from examples import program
from examples.paper import update_spectra


def test_singular_values_are_of_each_layers_matrix():
    rng = np.random.default_rng(0)
    query, out = rng.normal(size=(2, 2, 6, 2, 5)), rng.normal(size=(2, 2, 5, 6))
    update = {"blocks": {"attention": {"query": {"kernel": query[0]}, "out": {"kernel": out}}}}
    for kind, matrices in (("query", query[0].reshape(2, 6, 10)), ("out", out.reshape(2, 10, 6))):
        found = update_spectra.singular_values(update, f"attention/{kind}")
        expected = [np.sqrt(np.linalg.eigvalsh(a @ a.T)[::-1][:6]) for a in matrices]
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    with pytest.raises(ValueError, match="no kernel of mlp/up"):
        update_spectra.singular_values(update, "mlp/up")


@pytest.mark.slow
def test_the_cap_lowers_the_leading_ones_and_leaves_the_others(tmp_path, capsys):
    flags = update_spectra.Flags(steps=8, cap_rank=16, out=tmp_path)
    problem = update_spectra.prepare(flags)
    before, after = update_spectra.updates(problem)
    assert {u.shape for u in jax.tree.leaves(before)} == {u.shape for u in jax.tree.leaves(after)}
    for kind in ("attention/query", "mlp/down"):
        old, new = (update_spectra.singular_values(tree, kind) for tree in (before, after))
        assert (new[:, 0] < 0.7 * old[:, 0]).all()
        assert (new[:, 0] > 0.8 * old[:, 15]).all()  # the level, which is an estimate from below
        np.testing.assert_allclose(new[:, 40:], old[:, 40:], rtol=0.2)
    update_spectra.main(flags, problem)
    assert "mlp/down" in capsys.readouterr().out
    assert (tmp_path / "update_spectra.png").stat().st_size > 10_000


def test_bad_flags_say_what_to_write(tmp_path):
    flags = update_spectra.Flags(steps=1, out=tmp_path / "out")
    with pytest.raises(SystemExit, match="--steps must be at least 2"):
        program.run(lambda: flags, update_spectra.prepare, update_spectra.main)
    assert not flags.out.exists()
