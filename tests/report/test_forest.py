"""A study's differences as one picture: to the right is better in every column, and what an interval says is what is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic_study import LEVELS
from synthetic_study import write_study as written

from fedmix.errors import RunError
from fedmix.report.comparison import compared, side_by_side
from fedmix.report.forest import Column, forest
from fedmix.report.html import write_comparison, write_study
from fedmix.report.study import ATTACKS, MEASURES, Study, read_study

UTILITY = [name for name in MEASURES if name not in ATTACKS]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return read_study(written(tmp_path / "study"))


def column(study: Study, regime: int, name: str) -> Column:
    return next(one for one in forest(study).blocks[regime].columns if one.title.startswith(MEASURES[name].title))


def test_right_is_better_whichever_way_a_measure_counts(study: Study) -> None:
    assert [name for name, _ in forest(study).blocks[0].names] == ["paired only", "site west", "best site", "centralised"]
    for name in ("zero_shot_auroc", "psnr_db", "bits_per_token"):
        found = column(study, 0, name)
        worse, _, _, better = (mark.x - found.zero for mark in found.marks)
        assert worse < 0 < better, name


def test_a_mark_lies_where_its_difference_is(study: Study) -> None:
    found = column(study, 1, "psnr_db")
    middle = (found.start + found.stop) / 2
    assert found.zero == pytest.approx(middle)
    reach = 1.25 * max(
        abs(one.mean)
        for method in ("paired_only", "site_west", "centralised")
        if (one := study.difference("scarce", method, "psnr_db"))
    )
    one = study.difference("scarce", "paired_only", "psnr_db")
    assert one is not None
    assert found.marks[0].x == pytest.approx(middle - one.mean / reach * (found.stop - middle))
    assert found.marks[0].text == "\N{MINUS SIGN}2.49"


def test_only_a_clear_difference_gets_a_verdict(study: Study) -> None:
    for number, regime in enumerate(("plentiful", "scarce")):
        for name in UTILITY:
            for method, mark in zip(
                ("paired_only", "site_west", "best_site", "centralised"), column(study, number, name).marks, strict=True
            ):
                one = study.difference(regime, method, name)
                assert one is not None
                assert one.interval is not None
                assert (mark.verdict != "open") == (one.interval[0] * one.interval[1] > 0)


def test_an_interval_beyond_its_column_is_cut_and_says_so(tmp_path: Path) -> None:
    wide = [dict(level) for level in LEVELS["scarce"]]
    wide[0]["paired_only"], wide[1]["paired_only"] = 0.9, 0.1
    found = column(read_study(written(tmp_path / "wide", {"scarce": wide})), 0, "psnr_db")
    mark = found.marks[0]
    assert mark.interval == (found.start, found.stop)
    assert mark.is_cut == (True, True)
    assert mark.verdict == "open"


def test_one_seed_has_a_place_and_no_verdict(tmp_path: Path) -> None:
    found = column(read_study(written(tmp_path / "one", {"scarce": LEVELS["scarce"][:1]})), 0, "psnr_db")
    assert {(mark.interval, mark.verdict) for mark in found.marks} == {(None, "open")}


def test_the_picture_is_xml_that_stands_alone(study: Study, tmp_path: Path) -> None:
    path = write_study(tmp_path / "figure.svg", [study])
    root = ElementTree.fromstring(path.read_text())
    assert root.tag == f"{SVG}svg"
    texts = {"".join(one.itertext()) for one in root.iter(f"{SVG}text")}
    assert {"paired only", "plentiful", "scarce"} <= texts
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * 4 * len(UTILITY)
    assert "href" not in path.read_text()
    for circle in root.iter(f"{SVG}circle"):
        assert math.isfinite(float(circle.attrib["cx"]))
        assert 0 < float(circle.attrib["cx"]) < float(root.attrib["width"])
        assert 0 < float(circle.attrib["cy"]) < float(root.attrib["height"])


def test_a_method_that_has_not_learnt_a_measure_has_a_dash_there_and_marks_elsewhere(tmp_path: Path) -> None:
    folder = written(tmp_path / "study", {"scarce": LEVELS["scarce"]})
    for path in folder.glob("scarce/*/report.json"):
        report = json.loads(path.read_text())
        del report["baselines"]["paired_only"]["evaluation"]["retrieval"]
        report["baselines"]["paired_only"]["evaluation"]["skipped"] = {"retrieval": "the model learnt mvm"}
        path.write_text(json.dumps(report))
    study = read_study(folder)
    assert [mark is None for mark in column(study, 0, "image_to_text_r10").marks] == [True, False, False, False]
    assert None not in column(study, 0, "psnr_db").marks
    root = ElementTree.fromstring(write_study(tmp_path / "figure.svg", [study]).read_text())
    assert sum(one.text == "\N{EN DASH}" for one in root.iter(f"{SVG}text")) == 2  # either direction of retrieval
    means = compared(study).regimes[0].means
    cells = {row.name: row.cells for row in means.rows}["paired only"]
    assert [cell.text for cell in cells if cell and cell.note] == ["\N{EN DASH}"] * 2


def test_untrained_models_would_press_all_others_together(tmp_path: Path) -> None:
    levels = [level | {"random_init": 0.0} for level in LEVELS["scarce"]]
    figure = forest(read_study(written(tmp_path / "study", {"scarce": levels})))
    assert "random init" not in [name for name, _ in figure.blocks[0].names]


def test_what_cannot_be_drawn_is_said(study: Study, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a picture holds one study, 2 were given"):
        write_study(tmp_path / "figure.svg", [study, study])
    alone = read_study(written(tmp_path / "alone", {"scarce": [{"fedmix": 0.5}]}))
    with pytest.raises(RunError, match="no method beside the main one yet"):
        write_study(tmp_path / "figure.svg", [alone])
    with pytest.raises(RunError, match="of a study; for single runs"):
        write_comparison(tmp_path / "figure.svg", side_by_side([]))
    assert not (tmp_path / "figure.svg").exists()
