"""Against figures that were published with entries of the speedruns."""

import json

import numpy as np
import pytest

from examples import significance

# Step 2750 of pull request 321 of modded-nanogpt.
RECORD_44 = """3.27891 3.27961 3.27934 3.27866 3.27952 3.27679 3.27971 3.27867 3.27842 3.28014
3.27892 3.27891 3.27988 3.27946 3.27783 3.28001 3.27760 3.27848 3.27838 3.27788"""
# Of its record of 2025-01-04: p=0.0001, mean 3.2791.
SOFT_CAP = """3.2798 3.2804 3.2837 3.2808 3.2782 3.2801 3.283 3.2825 3.2777 3.2769 3.2834 3.2832
3.2753 3.2809 3.2778 3.2801 3.2799 3.2804 3.2765 3.2792 3.2786 3.2792 3.2801 3.2762 3.2803 3.2784
3.2792 3.2791 3.2769 3.279 3.2784 3.2775 3.283 3.2785 3.2753 3.2805 3.2766 3.2766 3.2781 3.2819
3.2754 3.2827 3.2803 3.2784 3.2802 3.2794 3.2765 3.278 3.2782 3.278 3.2816 3.279 3.2771 3.2791
3.2768 3.2781 3.2794 3.2798 3.2785 3.2804 3.2777 3.2765 3.2796 3.278 3.2803 3.2793 3.2793 3.2788
3.2797 3.278 3.2799 3.2813 3.2803 3.2768 3.2803 3.2796 3.28 3.2796 3.2783 3.278"""


def losses(text):
    return np.array([float(x) for x in text.split()])


def test_the_statistic_of_a_published_record():
    (row,) = significance.test({2750: losses(RECORD_44)}, 3.28)
    assert row.mean == pytest.approx(3.278856, abs=1e-6)
    assert row.statistic == pytest.approx(0.00511, abs=1e-5)
    assert row.passes


def test_the_t_test_of_a_published_record():
    (row,) = significance.test({1390: losses(SOFT_CAP)}, 3.28)
    assert f"{row.t_test:.4f}" == "0.0001"
    assert f"{row.mean:.4f}" == "3.2791"


@pytest.mark.parametrize(
    ("mean", "num_runs", "passes"),  # the rules: one run needs 3.276, four need 3.278
    [(3.2759, 1, True), (3.2761, 1, False), (3.2779, 4, True), (3.2781, 4, False)],
)
def test_the_examples_of_the_rules(mean, num_runs, passes):
    values = mean + 1e-3 * (np.arange(num_runs) - (num_runs - 1) / 2)
    (row,) = significance.test({1: values}, 3.28)
    assert row.passes == passes
    assert (row.z_test < 0.001) == passes


def test_reads_folders_and_names_the_first_step_that_passes(tmp_path, capsys):
    folders = []
    for seed, shift in enumerate((0.0, 0.001, -0.001)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        lines = [
            {"run": "adamw2", "step": step, "loss": 3.0, "val_loss": loss + shift}
            for step, loss in ((10, 3.3), (20, 3.279), (30, 3.277), (40, 3.276))
        ]
        lines += [{"run": "adamw2", "step": 45 + seed, "loss": 3.0, "val_loss": 3.0}]
        lines += [{"run": "adamw", "step": 10, "loss": 3.0}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.json").write_text(json.dumps({"seed": seed, "tau": 0.1}))
        folders.append(folder)
    significance.main(significance.Flags(tuple(folders)))
    out = capsys.readouterr().out
    assert "3 runs of adamw2: a loss of 3.28 is reached after 30 steps" in out
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["10", "20", "30", "40"]
    with pytest.raises(SystemExit, match="has no validation of adamw"):
        significance.main(significance.Flags(tuple(folders), run="adamw"))
    with pytest.raises(SystemExit, match=r"both have --seed 1\. Give each run once"):
        significance.main(significance.Flags((*folders, folders[1])))
    (folders[2] / "config.json").write_text(json.dumps({"seed": 2, "tau": 0.3}))
    with pytest.raises(SystemExit, match="differ in tau"):
        significance.main(significance.Flags(tuple(folders)))


def test_a_run_that_diverged_is_above_every_target(tmp_path):
    line = {"run": "adamw2", "step": 10, "loss": 3.0, "val_loss": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0}))
    (row,) = significance.test(significance.read((tmp_path,), "adamw2"), 3.28)
    assert (row.mean, row.z_test, row.passes) == (np.inf, 1.0, False)


def test_no_folder_is_an_error():
    with pytest.raises(ValueError, match="Name at least one folder"):
        significance.read((), "adamw2")
