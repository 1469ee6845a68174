from examples.paper import comparison_tables
from examples.paper.comparison_tables import Tuned
from examples.paper.search import Search


def line(val_loss, seed=0, test_loss=None):
    return {"seed": seed, "val_loss": val_loss, "test_loss": test_loss}


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
    results, differences, sensitivity = map(cells_of, text.split("\n\n"))
    # The seeds of AdamW are 0.01 apart: deviation 0.01581, of which Student's 2.776 / sqrt(5).
    adamw = ["2.130 ± 0.020", "5", "2.000", "4", "learning_rate 0.01, b2 0.901!"]
    muon = ["2.083 ± 0.022", "5", "1.900", "1", "learning_rate 0.01, b2 0.901!"]
    assert list(results) == ["Muon, no warmup", "AdamW, no warmup"]
    assert results == {"AdamW, no warmup": adamw, "Muon, no warmup": muon}
    # Their difference is 0.05 - 0.001 s.
    assert differences["AdamW, no warmup"] == ["+0.047 ± 0.002 ↑"]
    assert differences["Muon, no warmup"] == [""]
    assert sensitivity["AdamW, no warmup"] == ["50%", "2.000", "2.300"]
    assert sensitivity["Muon, no warmup"] == ["100%", "1.900", ""]


def test_an_optimizer_without_fresh_seeds_is_last_and_nothing_is_compared_with_none():
    text = comparison_tables.report({"lion": ADAMW._replace(fresh=[]), "radam": MUON}, steps=800)
    results, sensitivity = map(cells_of, text.split("\n\n"))
    assert list(results) == ["RAdam, no warmup", "Lion, no warmup"]
    assert results["Lion, no warmup"][:3] == ["", "0", "2.000"]
    assert list(sensitivity) == ["Lion, no warmup", "RAdam, no warmup"]


def cells_of(table):
    """The cells of the lines of a table in Markdown, by what they begin with."""
    _, _, *lines = table.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def test_an_arrow_says_lower_or_higher_and_nothing_where_zero_is_inside():
    interval = comparison_tables.interval
    assert interval([0.1, -0.1, 0.05], sign="+") == "+0.017 ± 0.259"
    assert interval([-0.11, -0.1, -0.09], sign="+") == "-0.100 ± 0.025 ↓"
    assert interval([0.11, 0.1, 0.09], sign="+") == "+0.100 ± 0.025 ↑"
    assert interval([0.11, 0.1, 0.09]) == "0.100 ± 0.025"
