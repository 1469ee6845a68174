"""The ablation of tau, on a small scale."""

import json

import pytest

from examples import program
from examples.paper import tau_ablation


@pytest.mark.slow
def test_table_and_picture(tmp_path, capsys):
    flags = tau_ablation.Flags(models=("swin",), taus=(0.01,), steps=2, out=tmp_path / "out")
    tau_ablation.main(flags, tau_ablation.prepare(flags))
    runs = json.loads((flags.out / "summary.json").read_text())["runs"]
    table = capsys.readouterr().out
    assert "tau 0.01" in table
    assert f"{runs['swin']['0.01']['val_loss']:.3f}" in table
    assert (flags.out / "tau_ablation.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taus": (0.01, -1.0)}, r"--tau -1\.0: it must be at least 0"),
        ({"models": ()}, "--models and --taus: name at least one of each"),
        ({"taus": ()}, "--models and --taus: name at least one of each"),
        ({"seed": -1}, "--seed -1: it must be"),
    ],
)
def test_bad_flags_say_what_to_write(tmp_path, changes, message):
    flags = tau_ablation.Flags(**changes, out=tmp_path / "out")
    with pytest.raises(SystemExit, match=message):
        program.run(lambda: flags, tau_ablation.prepare, tau_ablation.main)
    assert not flags.out.exists()
