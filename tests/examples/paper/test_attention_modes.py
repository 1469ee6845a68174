"""The picture of three modes of attention."""

from examples.paper import attention_modes


def test_each_mode_is_what_its_title_says(tmp_path, capsys):
    for seed in range(3):
        flags = attention_modes.Flags(seed=seed, out=tmp_path)
        attention_modes.main(flags, attention_modes.prepare(flags))
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
        assert [row[0] for row in rows] == ["normal", "malignant", "benign"]
        assert all(row[0] == row[-1] for row in rows)
    assert (tmp_path / "attention_modes.png").stat().st_size > 10_000
