"""A study as tables and drawings: nothing is lost on a narrow screen, and panels of one measure share an axis."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from synthetic_run import evaluation
from synthetic_study import LEVELS
from synthetic_study import write_study as written

from fedmix.report import charts, comparison
from fedmix.report.comparison import compared, signed
from fedmix.report.html import write_study
from fedmix.report.quantities import DASH
from fedmix.report.study import ATTACKS, MEASURES, read_study
from fedmix.report.study_terminal import study_tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "study")


def screen(folder: Path, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in study_tables(compared(read_study(folder))):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- tables


def test_a_difference_has_its_sign_and_zero_has_none() -> None:
    psnr, recall = MEASURES["psnr_db"], MEASURES["image_to_text_r10"]
    assert signed(psnr, 0.168) == "+0.17"
    assert signed(psnr, -0.168) == "\N{MINUS SIGN}0.17"
    assert signed(psnr, -0.0001) == "0.00"
    assert signed(recall, 0.0312) == "+3.1", "in percentage points"


def test_a_study_that_attacked_its_models_has_a_column_of_it(folder: Path) -> None:
    plain = compared(read_study(folder)).regimes[0]
    path = folder / "plentiful/seed-1/report.json"
    report = json.loads(path.read_text())
    report["evaluation"]["membership"] = {"auc": 0.61, "auc_ci95": [0.58, 0.64]}
    path.write_text(json.dumps(report))
    attacked, other = compared(read_study(folder)).regimes
    assert MEASURES["membership_auc"] not in plain.means.measures
    assert MEASURES["membership_auc"] not in other.means.measures
    assert attacked.means.measures[-1] == MEASURES["membership_auc"]
    cells = {row.name: row.cells[-1] for row in attacked.means.rows}
    assert cells["fedmix"] is not None
    assert cells["fedmix"].text == "0.610"
    path = folder / "plentiful/seed-1/report.json"
    report["baselines"]["paired_only"]["evaluation"]["membership"] = {"auc": 0.482, "auc_ci95": [0.45, 0.52]}
    path.write_text(json.dumps(report))
    [regime, _] = compared(read_study(folder)).regimes
    assert "Membership" not in regime.winners, "less than .5 is as much a guess"
    assert not any(row.cells[-1] and row.cells[-1].is_best for row in regime.means.rows)
    assert MEASURES["membership_auc"].title not in str(attacked.gaps), "no utility, so no gap to recover"


def test_tables_hold_means_differences_and_mark_what_is_clear(folder: Path) -> None:
    plentiful, scarce = compared(read_study(folder)).regimes
    column = list(MEASURES).index("psnr_db")
    means = {row.name: row.cells[column] for row in plentiful.means.rows}
    assert means["fedmix"] is not None
    assert means["fedmix"].text == "20.72"
    assert [name for name, cell in means.items() if cell and cell.is_best] == ["centralised"]
    assert plentiful.means.rows[0].kind == "main"
    less = {row.name: row.cells[column] for row in scarce.differences.rows}
    assert "fedmix" not in less
    assert less["paired only"] is not None
    assert less["paired only"].text == "+2.49"
    assert less["paired only"].is_best, "the interval leaves zero out"
    narrow = plentiful.differences.rows[0].cells[column]
    assert narrow is not None
    # Differences of .02, .04 and .02 in level: mean .0267, half width .0287, so zero is inside.
    assert (narrow.text, narrow.is_best) == ("+0.22", False)


def winners(folder: Path, level: dict[str, list[dict[str, float]]]) -> str:
    [regime] = compared(read_study(written(folder, level))).regimes
    return regime.winners


def test_wins_and_losses_of_a_difference_are_marked_apart_whichever_way_is_better(folder: Path, tmp_path: Path) -> None:
    found = compared(read_study(folder)).regimes[1].differences
    for name in ("psnr_db", "bits_per_token"):
        column = found.measures.index(MEASURES[name])
        marks = {row.name: getattr(row.cells[column], "is_worse", None) for row in found.rows}
        assert marks == {"paired only": False, "site west": False, "best site": False, "centralised": True}
        assert all(row.cells[column] and row.cells[column].is_best for row in found.rows)
    text = write_study(tmp_path / "page.html", [read_study(folder)]).read_text()
    assert '<span class="best worse">\N{MINUS SIGN}0.84' in text
    assert "Lower is better in Bits per token: there a negative one favours fedmix." in text


def test_a_run_that_came_out_as_ours_is_called_the_same(tmp_path: Path) -> None:
    level = [{"fedmix": 0.6, "paired_only": 0.6}, {"fedmix": 0.5, "paired_only": 0.5}]
    [row] = compared(read_study(written(tmp_path / "study", {"scarce": level}))).regimes[0].differences.rows
    assert {cell.text for cell in row.cells if cell} == {"same"}
    assert "±0" not in screen(tmp_path / "study", 80).split("fedmix less")[1]


def test_a_dash_says_why_it_is_one_and_what_nobody_has_is_no_column(folder: Path) -> None:
    for path in folder.glob("plentiful/seed-*/report.json"):
        report = json.loads(path.read_text())
        for branch in (report, *report["baselines"].values()):
            del branch["evaluation"]["language"]
        del report["baselines"]["paired_only"]["evaluation"]["regeneration"]
        report["evaluation"]["membership"] = {"auc": 0.61, "auc_ci95": [0.58, 0.64]}
        path.write_text(json.dumps(report))
    found = compared(read_study(folder)).regimes[0].means
    assert MEASURES["bits_per_token"] not in found.measures
    paired = next(row for row in found.rows if row.name == "paired only")
    reasons = [found.notes[cell.note - 1] for cell in paired.cells if cell and cell.note]
    assert reasons == ["this method has not learnt it", "nobody attacked this method"]


def test_whoever_leads_is_said_to_be_clear_only_of_whom_seeds_tell_it_apart(folder: Path, tmp_path: Path) -> None:
    for regime in compared(read_study(folder)).regimes:
        assert "Zero-shot AUROC: centralised (" in regime.winners
        assert regime.winners.count(", clear of all others)") == len(MEASURES.keys() - ATTACKS)  # attacked in no run here
    wide = [{"fedmix": 0.6, "paired_only": 0.5}, {"fedmix": 0.62, "paired_only": 0.61}]
    for leader, other in (("fedmix", "paired_only"), ("paired_only", "fedmix")):
        swapped = [{leader: seed["fedmix"], other: seed["paired_only"]} for seed in wide]
        text = winners(tmp_path / leader, {"scarce": swapped})
        assert f"PSNR: {leader} (".replace("_", " ") in text
        assert text.count(f", not clear of {other})".replace("_", " ")) == len(MEASURES.keys() - ATTACKS)


def test_one_seed_tells_nothing_apart(tmp_path: Path) -> None:
    text = winners(tmp_path / "study", {"scarce": [{"fedmix": 0.6, "paired_only": 0.3}]})
    assert text.startswith("Best numbers, of one seed, which tells nothing apart.")
    assert "clear of" not in text


def test_methods_whose_means_read_alike_share_the_lead(tmp_path: Path) -> None:
    level = [{"fedmix": 0.6, "paired_only": 0.6, "centralised": 0.1}] * 2
    text = winners(tmp_path / "study", {"scarce": level})
    assert "PSNR: fedmix and paired only alike (19.04, clear of all others)" in text


def test_many_methods_that_the_leader_is_not_clear_of_are_counted(tmp_path: Path) -> None:
    others = {f"method_{number}": 0.5 - number / 100 for number in range(6)}
    level = [{"fedmix": 0.7} | others, {"fedmix": 0.4} | others]
    text = winners(tmp_path / "study", {"scarce": level})
    assert "fedmix (18.62, not clear of method 0, method 1, method 2 and 3 more)" in text


def test_costs_and_gaps_are_told_and_an_untrained_model_costs_nothing(folder: Path) -> None:
    plentiful = compared(read_study(folder)).regimes[0]
    rows = {row.name: row.texts for row in plentiful.costs}
    assert rows["fedmix"] == ("8", "8", "8", "16", "9.5", "4 kB")
    assert "random init" not in rows
    [gap] = plentiful.gaps
    assert ("PSNR", "75 %") in gap.texts
    assert "Recovered gap from the best site to centralised: " in comparison.gap_sentence(gap)


def test_core_seconds_that_nobody_measured_say_why(folder: Path, tmp_path: Path) -> None:
    assert compared(read_study(folder)).regimes[0].cost_notes == ()
    (folder / "costs.json").unlink()
    place = folder / "plentiful/seed-1/baselines/paired_only/config.yaml"
    values = yaml.safe_load(place.read_text())
    for stage in values["stages"]:
        stage.pop("objectives", None)
    place.write_text(yaml.safe_dump(values | {"privacy": {"mode": "dp", "noise_multiplier": 1.0}}))
    regime = compared(read_study(folder)).regimes[0]
    core = {row.name: row.texts[comparison.COSTS.index("Core seconds")] for row in regime.costs}
    assert (core["fedmix"], core["paired only"], core["centralised"]) == (f"{DASH}¹", f"{DASH}²", "9.0")
    pages = [write_study(tmp_path / f"page.{kind}", [read_study(folder)]).read_text() for kind in ("md", "html")]
    for page in (screen(folder, 80), *pages):
        words = " ".join(page.split())
        assert "¹ Core seconds: not measured with this version" in words
        assert "² Core seconds: not measured: a step with noise" in words


def test_no_gap_is_said_in_words(tmp_path: Path) -> None:
    worse = {regime: [seed | {"centralised": 0.1} for seed in seeds] for regime, seeds in LEVELS.items()}
    [gap] = compared(read_study(written(tmp_path / "study", worse))).regimes[0].gaps
    assert gap.texts == ()
    assert "none to recover in Zero-shot AUROC" in comparison.gap_sentence(gap)


def test_of_a_gap_that_seeds_do_not_tell_from_nothing_no_share_is_given(tmp_path: Path) -> None:
    pooled = (0.52, 0.49, 0.56)
    level = [{"fedmix": 0.7, "best_site": 0.5, "centralised": one} for one in pooled]
    [gap] = compared(read_study(written(tmp_path / "study", {"scarce": level}))).regimes[0].gaps
    assert gap.texts == ()
    assert "gap too small to share out in Zero-shot AUROC" in comparison.gap_sentence(gap)
    assert " %" not in comparison.gap_sentence(gap)


@pytest.mark.parametrize("width", [40, 50, 60, 80, 140])
def test_the_terminal_shows_every_number_at_any_width(folder: Path, width: int) -> None:
    text = screen(folder, width)
    assert max(map(len, text.splitlines())) <= width
    assert "6 of 6 runs" in text
    for one in compared(read_study(folder)).regimes:
        for grid in (one.means, one.differences):
            for row in grid.rows:
                assert all(word in text for word in row.name.split())
                assert all(cell is None or cell.text.removesuffix(" %") in text for cell in row.cells)
        assert all(cost in text for row in one.costs for cost in row.texts)
    assert "…" not in text, "nothing is cut"
    assert "±0.83" in text  # of fedmix's PSNR: 8.4 x .04 x 4.303 / sqrt 3


def test_an_unfinished_study_says_so_everywhere(tmp_path: Path) -> None:
    folder = written(tmp_path / "study", {"plentiful": LEVELS["plentiful"][:1]})
    told = "1 of 6 runs complete: 2 regimes, 3 seeds each."
    assert told in screen(folder, 80)
    found = compared(read_study(folder))
    assert [regime.name for regime in found.regimes] == ["plentiful"]
    assert "±" not in screen(folder, 80)
    for suffix in (".html", ".md"):
        assert told in write_study(tmp_path / f"page{suffix}", [read_study(folder)]).read_text()


def test_a_study_of_which_nothing_is_there_yet_is_a_page_too(tmp_path: Path) -> None:
    folder = written(tmp_path / "study", {})
    assert "0 of 6 runs" in screen(folder, 80)
    assert "No method has been evaluated yet." in write_study(tmp_path / "page.html", [read_study(folder)]).read_text()


def test_where_seeds_are_wanting_every_number_says_of_how_many_it_is(tmp_path: Path) -> None:
    whole, torn = LEVELS["plentiful"][0], {"fedmix": 0.8, "centralised": 0.9}
    folder = written(tmp_path / "study", {"plentiful": [whole, torn]})
    [regime] = compared(read_study(folder)).regimes
    assert regime.basis.startswith("Not every method has all seeds yet")
    told = {row.name: {cell.setting for cell in row.cells if cell and not cell.note} for row in regime.means.rows}
    assert (told["fedmix"], told["paired only"]) == ({"2 of 3 seeds"}, {"1 of 3 seeds"})
    less = {row.name: row.cells[0] for row in regime.differences.rows}
    assert less["paired only"] is not None
    assert (less["paired only"].setting, less["paired only"].is_best) == ("1 of 3 seeds", False)
    pages = [write_study(tmp_path / f"page.{kind}", [read_study(folder)]).read_text() for kind in ("md", "html")]
    for page in (screen(folder, 140), *pages):
        assert "1 of 3" in page
        assert "2 of 3" in page
        assert regime.basis in " ".join(page.split())
    [whole_regime, _] = compared(read_study(written(tmp_path / "whole"))).regimes
    assert whole_regime.basis == "Means over 3 seeds."
    assert not any(cell.setting for row in whole_regime.means.rows for cell in row.cells if cell)


# ---- drawings and pages


def test_panels_of_a_measure_share_an_axis_and_better_numbers_lie_where_the_axis_says(folder: Path) -> None:
    for figure in compared(read_study(folder)).figures:
        first, second = figure.panels
        assert first.ticks == second.ticks
        for panel in figure.panels:
            start, stop = charts.BAR_LEFT, charts.WIDTH - charts.INTERVAL_RIGHT
            for one in panel.whiskers:
                assert all(start - 1e-6 <= x <= stop + 1e-6 for x in (one.x, *(one.interval or ()), *one.dots))
            assert panel.line == panel.whiskers[0].x
            assert panel.whiskers[-1].y < panel.height - charts.BOTTOM
    psnr = next(figure for figure in compared(read_study(folder)).figures if figure.title.startswith("PSNR"))
    places = {one.name: one.x for one in psnr.panels[0].whiskers}
    assert places["best site"] < places["paired only"] < places["fedmix"] < places["centralised"]


def test_an_interval_beyond_the_axis_is_cut_and_says_so() -> None:
    measure = MEASURES["psnr_db"]
    rows = [
        charts.IntervalRow("a", "main", 2.0, (-0.5, 4.5), (1.0, 2.0, 3.0)),
        charts.IntervalRow("b", "baseline", 2.5, (1.5, 3.0), (2.0, 2.5, 3.0)),
        charts.IntervalRow("c", "baseline", 1.0, None, (1.0,)),
    ]
    wide, narrow, single = charts.interval_panel("one", rows, [1.0, 2.0, 3.0], measure).whiskers
    assert wide.is_cut == (True, True)
    assert wide.interval == (charts.BAR_LEFT, charts.WIDTH - charts.INTERVAL_RIGHT)
    assert narrow.is_cut == (False, False)
    assert single.interval is None
    assert single.dots == (), "a seed that is the mean is not drawn twice"


class Tags(HTMLParser):
    """Counts tags and collects text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in ("meta", "br", "circle", "line", "path", "rect", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "line", "path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_self_contained_and_holds_every_method_and_regime(folder: Path, tmp_path: Path) -> None:
    text = write_study(tmp_path / "page.html", [read_study(folder)]).read_text()
    page = Tags()
    page.feed(text)
    assert page.open == []
    words = " ".join(" ".join(page.words).split())
    for name in ("fedmix", "paired only", "best site", "centralised", "plentiful", "scarce", "Student's t over seeds"):
        assert name in words
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert text.count("<figure>") == 2 * len(MEASURES.keys() - ATTACKS), "nobody was attacked"
    assert "default-src 'none'" in text


def test_the_page_says_which_study_it_is_of_and_how_many_studies_it_rests_on(folder: Path, tmp_path: Path) -> None:
    study = read_study(folder)
    found = evaluation(0.5)
    num_test, gallery = found["classification"]["zero_shot"]["num_test"], found["retrieval"]["image_to_text"]["gallery"]
    text = write_study(tmp_path / "page.html", [study]).read_text()
    assert "<title>pairs: " in text
    assert ">pairs</h1>" in text
    assert "the method of this run" not in text
    for regime in ("plentiful", "scarce"):
        [number] = re.findall(rf'<a href="#([\w-]+)">{regime}</a>', text)
        assert f'<h2 id="{number}">{regime}</h2>' in text
    table = write_study(tmp_path / "page.md", [study]).read_text()
    for page in (text.replace("\N{NO-BREAK SPACE}", " "), table, screen(folder, 200)):
        assert f"findings in {num_test:,} held-out test studies" in page
        assert f"R@10 among {gallery:,} candidates, where guessing gives" in page
    assert study.judged_on.count("Judged on") == 1, "all runs alike"


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    folder = written(tmp_path / "study")
    report = folder / "plentiful/seed-1/report.json"
    report.write_text(report.read_text().replace('"paired_only"', '"<b>|odd"'))
    assert "<b>" not in write_study(tmp_path / "page.html", [read_study(folder)]).read_text()
    table = write_study(tmp_path / "page.md", [read_study(folder)]).read_text()
    assert "&lt;b>\\|odd" in table


def test_several_studies_share_a_page_under_their_names(folder: Path, tmp_path: Path) -> None:
    found = read_study(folder)
    text = write_study(tmp_path / "page.html", [found, found]).read_text()
    assert text.count("<h2 id=") == len(set(re.findall(r'<h2 id="([^"]+)"', text)))
