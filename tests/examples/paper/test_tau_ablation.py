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


def test_two_taus_however_near_have_each_a_folder_and_a_column(tmp_path, capsys):
    taus = (0.1, 0.1 + 1e-9)
    flags = tau_ablation.Flags(models=("swin",), taus=taus, steps=2, out=tmp_path)
    tasks = tau_ablation.prepare(flags)

    def train(name, config, data, folder, norms):
        line = {"run": name, "step": 2, "loss": 1.0, "val_loss": 5 + config.tau}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    tau_ablation.main(flags, {"swin": tasks["swin"]._replace(train=train)})
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]["swin"]
    assert [run["val_loss"] for run in runs.values()] == [5 + tau for tau in taus]
    assert [float(tau) for tau in runs] == list(taus)
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "validation", "loss", "tau", "0.1", "tau", "0.100000001"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taus": (0.01, -1.0)}, r"--taus 0\.01 -1\.0: it must be at least 0"),
        ({"models": ()}, "--models: name at least one, and each once"),
        ({"taus": ()}, "--taus: name at least one"),
        ({"taus": (0.1, 0.3, 0.1)}, "--taus: name at least one, and each once"),
        ({"seed": -1}, "--seed -1: it must be"),
    ],
)
def test_bad_flags_say_what_to_write(tmp_path, changes, message):
    flags = tau_ablation.Flags(**changes, out=tmp_path / "out")
    with pytest.raises(SystemExit, match=message):
        program.run(lambda: flags, tau_ablation.prepare, tau_ablation.main)
    assert not flags.out.exists()
