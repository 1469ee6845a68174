from examples.paper import comparison_tables
from examples.paper.comparison_tables import Tuned
from examples.paper.search import Search


def line(val_loss, seed=0, test_loss=None):
    return {"seed": seed, "val_loss": val_loss, "test_loss": test_loss, "cpu_seconds": 30.0}


SETTINGS = {"learning_rate": 0.01, "b2": 0.901}
RANGES = {"learning_rate": (1e-3, 1e-1), "b2": (0.9, 0.999)}
SEARCH = Search(SETTINGS, [SETTINGS] * 4, RANGES)
ADAMW = Tuned(
    SEARCH,
    trials=[line(2.0), line(2.04), line(2.2), line(None)],
    fresh=[line(2.0, s, 2.1 + 0.01 * s) for s in range(1, 6)],
    rates=[(1.0, line(2.0)), (10.0, line(2.3))],
)
MUON = Tuned(
    SEARCH,
    trials=[line(1.9)],
    fresh=[line(1.9, s, 2.05 + 0.011 * s) for s in range(1, 6)],
    rates=[(1.0, line(1.9))],
)


def test_the_report_has_intervals_of_student_and_paired_differences():
    text = comparison_tables.report({"adamw": ADAMW, "muon": MUON}, steps=800)
    results, differences, sensitivity = text.split("\n\n")
    # The seeds of AdamW are 0.01 apart: deviation 0.01581, of which Student's 2.776 / sqrt(5).
    muon, adamw = results.splitlines()[1:]
    assert "2.130 ± 0.020  5      2.000       4 " in adamw
    assert "2.083 ± 0.022  5      1.900       1 " in muon
    assert adamw.endswith("learning_rate 0.01, b2 0.901!")
    # Their difference is 0.05 - 0.001 s.
    adamw, muon = differences.splitlines()[1:]
    assert "+0.047 ± 0.002*" in adamw
    adamw = sensitivity.splitlines()[1]
    assert "50%" in adamw
    assert adamw.split()[-3:] == ["2.000", "2.300", "30"]


def test_no_difference_has_no_star():
    assert comparison_tables.interval([0.1, -0.1, 0.05], sign="+") == "+0.017 ± 0.259"
