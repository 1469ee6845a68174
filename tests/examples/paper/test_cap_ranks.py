"""The table of losses over the rank of the cap."""

import json

import pytest

from examples import program
from examples.paper import cap_ranks


def test_each_run_is_a_line_and_none_is_trained_twice(tmp_path, capsys):
    flags = cap_ranks.Flags(
        models=("vit",), ranks=(0, 4), steps=(2, 3), learning_rates=(0.01,), seeds=2,
        table=tmp_path / "table.jsonl", out=tmp_path / "out",
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
        ({"ranks": (-1,)}, "--cap-rank -1: it must be at least 2"),
        ({"seeds": 0}, "--seeds 0: it must be at least 1"),
        ({"steps": (0,)}, "--steps"),
        ({"tau": -1.0}, r"--tau -1\.0"),
    ],
)
def test_bad_flags_say_what_to_write(tmp_path, changes, message):
    paths = {"table": tmp_path / "table.jsonl", "out": tmp_path / "out"}
    flags = cap_ranks.Flags(**{"models": ("vit",)} | paths | changes)
    with pytest.raises(SystemExit, match=message):
        program.run(lambda: flags, cap_ranks.prepare, cap_ranks.main)
    assert not flags.out.exists()
