"""What each hospital gave and got: shown where it was measured, and never claimed of a hospital that measured nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic_run import evaluation, report_values
from synthetic_study import write_study

from fedmix.report import html, narrative, site_value, study_value
from fedmix.report.comparison import compared
from fedmix.report.files import write_json
from fedmix.report.html import write_report
from fedmix.report.quantities import DASH
from fedmix.report.study import read_study
from fedmix.report.study_terminal import study_tables
from fedmix.report.summary import Report, build_report, parse_report
from fedmix.report.terminal import remarks

PSNR, BITS, RANK = "score/psnr_db", "score/bits_per_token", "score/r1_of_32"


def scored(**by_site: dict[str, Any]) -> dict[str, Any]:
    """Values of a report in which some sites say more than their counts."""
    values = report_values()
    values["sites"] = [site | by_site.get(site["name"], {}) for site in values["sites"]]
    return values


def report(**by_site: dict[str, Any]) -> Report:
    return parse_report(build_report(**scored(**by_site)))


def score(value: float, alone: float | None, weight: float = 200.0) -> dict[str, Any]:
    return {"value": value, "weight": weight, "alone": alone}


HILL = {"scores": {PSNR: score(21.5, 20.0), RANK: score(0.5, 0.25)}, "shares": {"shared": 0.4, "pair": 1.0}}
WEST = {"scores": {BITS: score(3.0, 3.5)}, "shares": {"shared": 0.2, "text": 0.5}}
NORTH = {"unscored": "too few patients", "shares": {"image": 0.25}}


def test_fewer_bits_and_more_decibels_are_both_better() -> None:
    found = {(line.site.name, line.texts[1].split(" (")[0]): line for line in site_value.lines(report(hill=HILL, west=WEST))}
    assert found["west", "bits per hidden token"].texts[2:] == ("3.500", "3.000", "0.500 bits a token better")
    assert found["hill", "PSNR of hidden patches"].texts[2:] == ("20.00 dB", "21.50 dB", "1.50 dB better")
    assert found["hill", "R@1 among 32"].texts[1:] == ("R@1 among 32 (200 queries)", "25.0 %", "50.0 %", "25.0 points better")
    worse = site_value.lines(report(west={"scores": {BITS: score(4.0, 3.5)}}))
    assert worse[0].texts[-1] == "0.500 bits a token worse"
    assert worse[0].gain == -0.5


def test_a_hospital_gave_its_studies_bytes_and_weight_and_that_is_said_once(run_dir: Path) -> None:
    [text] = site_value.contributions(report(hill=HILL))
    assert text.startswith("hill gave ")
    assert " pairs; " in text
    assert text.endswith("; weight 40 % shared, 100 % pair.")
    write_json(run_dir / "report.json", build_report(**scored(hill=HILL)))
    for page in (write_report(run_dir).read_text(), (run_dir / "report.md").read_text()):
        assert page.replace("\N{NO-BREAK SPACE}", " ").count("40 % shared") == 1


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ({"hill": HILL, "west": WEST}, "2 of 2 hospitals gained on every measure of its own."),
        (
            {"hill": HILL, "west": {"scores": {BITS: score(4.0, 3.5)}}},
            "1 of 2 hospitals gained on every measure of its own. Worse or no better on some measure: west.",
        ),
        (
            {"hill": HILL, "north": NORTH, "west": {"scores": {BITS: score(4.0, None)}}},
            "1 of 3 hospitals gained on every measure of its own. Not compared: north and west.",
        ),
        ({"north": NORTH}, "No hospital's model of its own was scored, so nothing says what any of them gained."),
    ],
)
def test_the_verdict_counts_only_what_was_measured(sites: dict[str, Any], expected: str) -> None:
    assert site_value.verdict(site_value.lines(report(**sites))) == expected


def test_every_page_shows_the_table_and_says_that_sums_left(run_dir: Path) -> None:
    write_json(run_dir / "report.json", build_report(**scored(hill=HILL, north=NORTH)))
    html, text = write_report(run_dir).read_text(), (run_dir / "report.md").read_text()
    for page in (html, text):
        assert "What each hospital gave and got" in page
        assert "no score: too few patients" in page
        assert "21.50 dB" in page
        assert "No noise covers these sums." in page
    file = io.StringIO()
    Console(file=file, width=100).print(*remarks(report(hill=HILL, north=NORTH)))
    assert "1.50 dB better" in file.getvalue()


def test_the_answer_stands_before_what_a_hospital_gave_and_that_is_said_once(run_dir: Path) -> None:
    both = {"scores": {BITS: score(4.0, 3.5), PSNR: score(20.0, 19.0)}}
    write_json(run_dir / "report.json", build_report(**scored(hill=both)))
    page = write_report(run_dir).read_text()
    section = page.split('aria-label="What each hospital gave and got"')[1].split("</section>")[0]
    table, after = section.split("</table>")
    assert re.findall(r'scope="col"[^>]*>(\w+)', table) == ["Hospital", "Measure", "Alone", "Federation", "Got"]
    assert table.count('rowspan="2"') == 1, "the hospital stands once"
    assert len(re.findall(r"<tr", table)) == 3
    assert "gave" not in table
    assert after.count("hill gave ") == 1


def test_nothing_is_shown_where_nothing_was_asked(run_dir: Path) -> None:
    assert site_value.lines(report()) == ()
    assert "hospital gave" not in write_report(run_dir).read_text()
    assert not [sentence for sentence in narrative.protection(report()) if "sent sums" in sentence]


def test_a_site_that_was_left_out_once_has_what_the_federation_lost(run_dir: Path) -> None:
    values = report_values()
    ours, other = values["evaluation"], evaluation(0.6, 9)
    values["baselines"]["without_hill"] = {"evaluation": other}
    found = site_value.contributions(parse_report(build_report(**values)))
    (sentence,) = found
    assert sentence.startswith("With and without hill: Zero-shot AUROC ")
    assert f"PSNR {ours['regeneration']['psnr_db']:.2f} and {other['regeneration']['psnr_db']:.2f} dB" in sentence
    write_json(run_dir / "report.json", build_report(**values))
    assert "With and without hill" in write_report(run_dir).read_text()
    assert "With and without hill" in (run_dir / "report.md").read_text()


def valued(folder: Path, gains: Sequence[float]) -> Path:
    """A study whose seeds have west's bits alone and with the federation, which are better by ``gains``."""
    write_study(folder)
    for seed, gain in enumerate(gains, 1):
        values = scored(west={"scores": {BITS: score(3.0, 3.0 + gain), PSNR: score(20.0, None)}})
        write_json(folder / f"plentiful/seed-{seed}/report.json", build_report(**values))
    return folder


def test_a_study_takes_differences_within_a_seed_and_gives_their_interval(tmp_path: Path) -> None:
    found = read_study(valued(tmp_path / "study", (0.1, 0.2, 0.3)))
    bits, psnr = study_value.rows(found, "plentiful")
    assert bits.got is not None
    assert bits.got.mean == pytest.approx(0.2)
    half = 4.302652729911275 * 0.1 / 3**0.5  # t for two degrees of freedom
    assert bits.got.interval == pytest.approx((0.2 - half, 0.2 + half))
    assert bits.texts == (
        "west",
        "bits per hidden token",
        "3.200",
        "3.000",
        "+0.200 bits a token",
        "\N{MINUS SIGN}0.048 to +0.448",
    )
    assert (psnr.got, psnr.alone, psnr.texts[2:]) == (None, None, (DASH, "20.00 dB", DASH, ""))
    assert study_value.rows(found, "scarce") == ()
    told = study_value.as_json(found, "plentiful")["west"]
    assert told[BITS]["got"]["n"] == 3
    assert told[PSNR]["alone"] is None


def test_a_study_shows_what_each_hospital_got_on_every_page(tmp_path: Path) -> None:
    folder = valued(tmp_path / "study", (0.1, 0.1, 0.1))
    found = read_study(folder)
    pages = [html.write_study(folder / f"compare.{kind}", [found]).read_text() for kind in ("html", "md")]
    file = io.StringIO()
    Console(file=file, width=80).print(*study_tables(compared(found)))
    for page in (*pages, file.getvalue()):
        assert "bits per hidden token" in page
        assert "+0.100" in page
        assert "bits a token" in page.replace("\n", " ")
    assert '<th scope="row">west<small>bits per hidden token</small></th>' in pages[0], "a scrolled row keeps its measure"
