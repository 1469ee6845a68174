"""The table of losses over the rank of the cap."""

import json

import pytest

from examples import program, training
from examples.paper import cap_ranks, run_table


def test_each_run_is_a_line_and_none_is_trained_twice(tmp_path, capsys):
    flags = cap_ranks.Flags(
        models=("vit",), ranks=(0, 4), steps=(2, 3), learning_rates=(0.01,), seeds=2,
        table=tmp_path / "table.jsonl",
    )  # fmt: skip
    models, trained = cap_ranks.prepare(flags), []

    def train(name, config, data, folder, norms):
        trained.append((name, config.steps, config.cap_rank, config.seed))
        loss = config.steps + config.cap_rank / 10 + 2 * config.seed
        line = {"run": name, "step": 2, "loss": 1.0, "val_loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    models["vit"] = models["vit"]._replace(train=train)
    for _ in range(2):
        cap_ranks.main(flags, models)
    assert len(trained) == len(set(trained)) == 8
    assert {name for name, *_, rank, _ in trained if rank == 4} == {"adamw2_cap"}
    assert {name for name, *_, rank, _ in trained if rank == 2} == {"adamw2"}  # which has no cap
    assert len(flags.table.read_text().splitlines()) == 8
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[-6:] for row in rows] == [  # the mean of two seeds is 1 above the first
        ["0.01", "|", "3.200", "|", "3.400", "|"],
        ["0.01", "|", "4.200", "|", "4.400", "|"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": ()}, "--ranks: name at least one, and each once"),
        ({"learning_rates": (0.1, 0.1)}, "--learning-rates: name at least one, and each once"),
        ({"ranks": (0, 1)}, "--ranks: each must be 0, for no cap, or at least 2"),
        ({"learning_rates": (-1.0,)}, r"--learning-rates -1\.0: it must be at least 0"),
        ({"seeds": 0}, "--seeds 0: it must be at least 1"),
        ({"steps": (0,)}, "--steps"),
        ({"tau": -1.0}, r"--tau -1\.0"),
    ],
)
def test_bad_flags_say_what_to_write(tmp_path, changes, message):
    options = {"models": ("vit",), "table": tmp_path / "table.jsonl"}
    flags = cap_ranks.Flags(**options | changes)
    with pytest.raises(SystemExit, match=message):
        program.run(lambda: flags, cap_ranks.prepare, cap_ranks.main)
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_is_said_not_to_be_kept(tmp_path):
    flags = cap_ranks.Flags(models=("vit",), ranks=(4,), table=tmp_path / "table.jsonl")
    models = cap_ranks.prepare(flags)

    def train(*_, **__):
        raise training.Stopped("adamw2_cap is saved at step 1")

    models["vit"] = models["vit"]._replace(train=train)
    with pytest.raises(training.Stopped, match="nothing kept of the run that was begun"):
        cap_ranks.main(flags, models)


def test_a_line_without_a_loss_is_left_out(tmp_path, capsys):
    table = tmp_path / "table.jsonl"
    table.write_text('{"model": "vit", "val_loss": 1.0}\n{"model": "vit"}\n')
    assert run_table.read(table) == [{"model": "vit", "val_loss": 1.0}]
    assert "a damaged line is left out" in capsys.readouterr().out
