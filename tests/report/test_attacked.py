"""A study with a lying site: honest runs beside every attack, and nothing that failed is dropped."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from synthetic_study import write_study

from fedmix import config
from fedmix.report import html
from fedmix.report.attacked import lies
from fedmix.report.comparison import Comparison, compared
from fedmix.report.study import PLANTED, Study, read_study
from fedmix.report.study_terminal import study_tables

LIES = {
    "bad_match": {"site": "west", "kind": "bad_match", "finding": "edema"},
    "scaled": {"attack.site": "west", "attack.kind": "scale"},
}
REGIMES = {"honest": {}, "bad_match": {"attack": LIES["bad_match"]}, "scaled": LIES["scaled"]}
HONEST = [{"fedmix": 0.8, "median": 0.7}, {"fedmix": 0.82, "median": 0.72}, {"fedmix": 0.78, "median": 0.68}]
SCALED = [{"fedmix": 0.3, "median": 0.71}, {"fedmix": 0.31, "median": 0.7}, {"fedmix": 0.27, "median": 0.69}]


def attacked(folder: Path, regimes: dict[str, Any] = REGIMES) -> Path:
    """The synthetic study under other regimes; one in ten marked images passes with honest sites, half with a planted mark."""
    write_study(folder, {name: SCALED if name == "scaled" else HONEST for name in regimes})
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["study"]["regimes"], values["baselines"] = regimes, {"median": {"aggregation": {"combine": "median"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for path in folder.glob("*/seed-*/report.json"):
        report = json.loads(path.read_text())
        for branch in (report, *report["baselines"].values()):
            rate = 0.5 if "bad_match" in path.parts else 0.1
            other = {"rate": {"edema": 0.9}, "worst": 0.9}  # a mark that nobody planted
            marks = {"patch": {"rate": {"edema": rate, "nodule": 0.7}, "worst": 0.7}, "wave": other}
            branch["evaluation"]["classification"]["triggers"] = marks
        path.write_text(json.dumps(report))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return read_study(attacked(tmp_path / "study"))


def screen(one: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in study_tables(one):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_planted_mark_is_read_where_it_was_planted_and_where_all_are_honest(study: Study) -> None:
    planted, honest = (study.estimate(regime, "median", PLANTED) for regime in ("bad_match", "honest"))
    assert planted is not None
    assert honest is not None
    assert (planted.mean, honest.mean) == (pytest.approx(0.5), pytest.approx(0.1))
    assert study.estimate("scaled", "median", PLANTED) is None, "who changes updates plants none"


def test_every_attack_stands_beside_honest_sites_and_what_it_broke_is_marked(study: Study) -> None:
    tables = {table.title: table.grid for table in compared(study).attacks}
    quality, _, mark = tables.values()
    assert [measure.title for measure in quality.measures] == ["honest", "bad match", "scaled"]
    assert [measure.title for measure in mark.measures] == ["honest", "bad match"]
    broken = {row.name: [cell.is_best for cell in row.cells if cell] for row in quality.rows}
    assert broken == {"fedmix": [False, False, True], "median": [False, False, False]}
    assert [cell.text for cell in mark.rows[0].cells if cell] == ["10.0 %", "50.0 %"]


def test_what_every_lying_site_does_is_said_in_words_under_one_name(study: Study, tmp_path: Path) -> None:
    one = compared(study)
    marked = (
        "bad match: west marks 20 % of its studies, images without edema, with a patch and pairs them with reports of edema."
    )
    assert one.lies == (marked, "scaled: west sends its update.")
    pages = [html.write_study(tmp_path / f"page.{kind}", [study]).read_text() for kind in ("md", "html")]
    for text in (screen(one, 200), *pages):
        words = " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())
        assert marked in words
        assert "bad_match" not in words
    assert "number&#39;s median over the sites" in pages[1]
    assert 'class="best worse"' in pages[1], "what an attack broke is not marked as what is best"


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"kind": "scale", "strength": 10.0}, "its update, 10 times as long"),
        ({"kind": "sign_flip"}, "its update turned round"),
        ({"kind": "noise", "strength": 3.0}, "noise in place of its update, 3 times as long"),
        ({"kind": "little_is_enough"}, "the mean of the others' updates, moved 1 standard deviation against it"),
    ],
)
def test_every_kind_of_attack_has_words(attack: dict[str, Any], said: str, study: Study) -> None:
    lying = config.Attack.model_validate({"site": "east"} | attack)
    assert lies(replace(study, attacks={"one_lie": lying})) == (f"one lie: east sends {said}.",)


def test_a_difference_between_regimes_is_paired_by_seed(study: Study) -> None:
    change = study.change("honest", "scaled", "fedmix", "psnr_db")
    assert change is not None
    assert change.by_seed == pytest.approx({1: -8.4 * 0.5, 2: -8.4 * 0.51, 3: -8.4 * 0.51})


def test_an_attack_under_which_runs_fail_says_so_and_a_mean_says_of_how_many_seeds_it_is(tmp_path: Path) -> None:
    folder = attacked(tmp_path / "study")
    for regime, seed in (("bad_match", 2), ("scaled", 1), ("scaled", 2), ("scaled", 3)):
        broken = folder / regime / f"seed-{seed}"
        shutil.rmtree(broken)
        broken.mkdir()
        (broken / "manifest.json").write_text(json.dumps({"state": "failed", "cause": "no site's update was taken"}))
    one = compared(read_study(folder))
    row = one.attacks[0].grid.rows[0]
    assert [cell and (cell.text, cell.setting) for cell in row.cells][2] == ("failed", "")
    assert [cell and cell.setting for cell in row.cells][:2] == ["", "2 of 3 seeds"]
    pages = [html.write_study(tmp_path / f"page.{kind}", [read_study(folder)]).read_text() for kind in ("md", "html")]
    for text in (screen(one, 80), *pages):
        words = " ".join(text.replace("\\_", "_").split())
        assert "4 failed" in words
        assert "scaled, seed 3: no site's update was taken" in words.replace("&#39;", "'")
        assert "2 of 3" in words
        assert "failed" in words


def test_without_an_attack_or_without_honest_sites_nothing_stands_beside_anything(tmp_path: Path) -> None:
    assert compared(read_study(write_study(tmp_path / "plain"))).attacks == ()
    lies = {name: values for name, values in REGIMES.items() if name != "honest"}
    assert compared(read_study(attacked(tmp_path / "lies", lies))).attacks == ()


def test_six_regimes_fit_a_terminal_of_eighty_columns(tmp_path: Path) -> None:
    more = dict.fromkeys(("scaled_10", "sign_flipped", "little_is_enough", "noise"), LIES["scaled"])
    one = compared(read_study(attacked(tmp_path / "study", {"honest": {}, "bad_match": {"attack": LIES["bad_match"]}} | more)))
    text = screen(one, 80)
    assert max(map(len, text.splitlines())) <= 80
    table = text.split("under attack")[1]
    assert table.count("fedmix") == 1, "not cut into two"
