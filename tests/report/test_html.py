from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from little import values
from synthetic_run import evaluation, manifest, metrics_rows, report_values, write_examples

from fedmix.errors import RunError
from fedmix.report.comparison import side_by_side
from fedmix.report.files import write_json
from fedmix.report.html import read_page, write_comparison, write_report
from fedmix.report.summary import read_report

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects addresses and text, and checks that elements close in the order they open."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.images_without_alt = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.images_without_alt += tag == "img" and not named.get("alt")
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def words(path: Path) -> str:
    text = " ".join(read(path).text).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(text.split())


def test_report_is_one_file_that_asks_for_nothing_else(run_dir: Path) -> None:
    path = write_report(run_dir)
    reader, source = read(path), path.read_text(encoding="utf-8")
    pictures = [address for address in reader.addresses if not address.startswith("#")]
    assert pictures
    assert all(address.startswith("data:image/png;base64,") for address in pictures)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert not re.search(r"https?://|@import|url\(", source)
    assert reader.images_without_alt == 0


def test_report_stays_under_3_mb_with_large_pictures(run_dir: Path) -> None:
    write_examples(run_dir / "evaluation", size=224, count=8)
    assert write_report(run_dir).stat().st_size < 3_000_000


def test_report_holds_the_headline_numbers_of_every_method(run_dir: Path) -> None:
    text = words(write_report(run_dir))
    report = read_report(run_dir)
    methods = [report.evaluation, *(baseline.evaluation for baseline in report.baselines.values())]
    assert len(methods) == 3
    for found in methods:
        values = found.model_dump(by_alias=True)
        for reading in ("zero_shot", "linear_probe"):
            block = values["classification"][reading]
            assert f"{block['macro_auroc']:.3f}" in text
            assert f"{block['ci95'][0]:.3f}–{block['ci95'][1]:.3f}" in text  # noqa: RUF001
        assert f"{100 * values['retrieval']['image_to_text']['r@10']:.1f} %" in text
        assert f"{values['regeneration']['psnr_db']:.2f}" in text
        assert f"{values['language']['bits_per_token']:.2f}" in text
    for value in ("0.661", "17.12", "20.48", "6.31"):
        assert value in text, "guesses without a model"


def test_a_cell_that_does_not_apply_is_seen_as_a_dash_and_heard_as_words(run_dir: Path) -> None:
    assert "unigram" in words(write_report(run_dir))
    text = words(write_report(run_dir)).split("word frequencies")[1]
    assert text.startswith(" – does not apply" * 5 + " 6.31"), text[:200]  # noqa: RUF001
    assert "A dash without a number: does not apply." in text


def test_report_tells_what_re_ranking_did(make_run: Callable[..., Path]) -> None:
    values = report_values()
    now = {"r@1": 0.251, "gain_r@1": 0.16, "gain_r@1_ci95": [0.12, 0.2]}
    values["evaluation"]["retrieval"]["reranked"] = {"image_to_text": now, "text_to_image": now, "top": 20}
    assert "With the first 20 in the match head's order, R@1 of images is 25.1 %" in words(write_report(make_run(**values)))


def test_every_finding_has_a_bar_with_its_value(run_dir: Path) -> None:
    text = words(write_report(run_dir))
    values = read_report(run_dir).evaluation.model_dump()
    for name, value in values["classification"]["zero_shot"]["per_label"].items():
        assert name.replace("_", " ") in text
        assert f"{value:.3f}" in text


def test_charts_are_well_formed_and_described(run_dir: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", write_report(run_dir).read_text(encoding="utf-8"), re.DOTALL)
    charts = [drawing for drawing in map(ElementTree.fromstring, drawings) if drawing.get("role") == "img"]
    assert len(charts) == 4 + 4 + 2 + 6, "losses, central curves, findings, strips"
    assert all(chart.get("aria-label") for chart in charts)


def test_names_from_data_are_text_and_never_markup(make_run: Callable[..., Path]) -> None:
    values = report_values()
    hostile = "<script>alert(1)</script>[red]\"'&"
    values["sites"][0]["name"] = hostile
    values["run"]["name"] = hostile
    values["baselines"][hostile] = {"evaluation": evaluation(0.5)}
    values["evaluation"]["classification"]["zero_shot"]["per_label"][hostile] = 0.6
    path = write_report(make_run(**values))
    reader = read(path)
    assert "script" not in reader.tags
    assert hostile in "".join(reader.text)
    assert html.escape("<script>alert(1)</script>") in path.read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8"), re.DOTALL):
        ElementTree.fromstring(drawing)


def test_examples_of_a_site_leave_no_picture_and_no_word(run_dir: Path) -> None:
    write_examples(run_dir / "evaluation", source="site")
    path = write_report(run_dir)
    assert all(address.startswith("#") for address in read(path).addresses)
    assert "pacemaker is in place" not in words(path)
    assert "only from synthetic or public studies" in words(path)


def test_failed_run_shows_state_and_cause_first_and_what_it_learned(run_dir: Path) -> None:
    (run_dir / "report.json").unlink()
    write_json(run_dir / "manifest.json", manifest("failed", cause="round 9: 0 of 2 replies."))
    text = words(write_report(run_dir))
    assert "This run failed. round 9: 0 of 2 replies. It wrote no report.json" in text
    assert text.index("This run failed") < text.index("Masked vision modelling")
    assert "There is no evaluation" in text


def test_failed_run_with_a_report_keeps_its_numbers(make_run: Callable[..., Path]) -> None:
    run = report_values()["run"] | {"state": "failed", "cause": "evaluation stopped"}
    text = words(write_report(make_run(run=run)))
    assert "This run failed. evaluation stopped." in text
    assert "22.15" in text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "manifest.json", "config.yaml", "evaluation"])
def test_each_missing_file_is_told_in_a_sentence(run_dir: Path, missing: str) -> None:
    target = run_dir / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    sentence = {
        "metrics.jsonl": "No training losses were recorded.",
        "manifest.json": "The run folder holds no manifest.json.",
        "config.yaml": "The run folder holds no config.yaml.",
        "evaluation": "This run kept no example pictures.",
    }[missing]
    assert sentence in words(write_report(run_dir))


def test_a_report_does_not_tell_where_files_lay_on_the_machine_that_ran_it(run_dir: Path) -> None:
    with (run_dir / "config.yaml").open("a") as file:
        file.write(
            "data:\n  cache: /home/someone/phantoms\n  sites:\n  - shard: '/srv/x ray/west'\n"
            "  tokenizer: fedmix/data/tokenizer.json\n"
        )
    page = write_report(run_dir).read_text()
    assert "someone" not in page
    assert "x ray/west" not in page
    assert "cache: (a path of the machine that ran it)" in page
    assert "tokenizer: fedmix/data/tokenizer.json" in page


def test_empty_evaluation_unknown_bytes_and_unknown_times_still_make_a_report(make_run: Callable[..., Path]) -> None:
    values = report_values(evaluation={}, baselines={}, sites=[])
    values["communication"] = dict.fromkeys(values["communication"])
    values["timing"] = dict.fromkeys(values["timing"])
    text = words(write_report(make_run(**values)))
    assert "There is no evaluation" in text
    assert "No times were recorded." in text
    assert "What each site held was not recorded." in text


def test_times_of_sites_side_by_side_are_not_shown_as_shares_of_the_wall(make_run: Callable[..., Path]) -> None:
    page = read_page(make_run(timing=report_values()["timing"] | {"local_train_s": 900.0}))
    assert all(part.share is None for part in page.times)
    whole = read_page(make_run())
    assert sum(part.share or 0.0 for part in whole.times) == pytest.approx(1.0)


def test_what_rounds_took_beyond_training_is_a_sentence(make_run: Callable[..., Path]) -> None:
    timing = report_values()["timing"]
    assert "The rounds took 6.1 % longer than the time in which" in words(write_report(make_run()))
    assert "took as long as the time" in read_page(make_run(timing=timing | {"overhead_ratio": 1.0})).overhead
    assert read_page(make_run(timing=timing | {"overhead_ratio": None})).overhead == ""


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"neither report\.json nor manifest\.json"):
        write_report(tmp_path)


def test_comparison_is_written_as_html_or_markdown_by_its_name(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    page = write_comparison(tmp_path / "compare.html", side_by_side([run, run]))
    assert "22.15" in words(page)
    assert write_comparison(tmp_path / "compare.md", side_by_side([run])).read_text().startswith("|")


def test_runs_judged_on_different_studies_have_no_best_and_are_told_apart(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    alike = side_by_side([run_dir, other])
    assert not alike.warning
    assert [row.name for row in alike.grid.rows] == [f"demo ({run_dir})", f"demo ({other})"]
    assert any(cell and cell.is_best for row in alike.grid.rows for cell in row.cells)
    report = json.loads((other / "report.json").read_text())
    report["evaluation"]["retrieval"]["image_to_text"]["gallery"] += 1
    (other / "report.json").write_text(json.dumps(report))
    different = side_by_side([run_dir, other])
    assert not any(cell and cell.is_best for row in different.grid.rows for cell in row.cells)
    for kind in ("md", "html"):
        text = write_comparison(tmp_path / f"compare.{kind}", different).read_text()
        assert text.index("different held-out studies") < text.index("22.15")
        assert "best in its column" not in text


def test_phantoms_of_another_seed_are_different_studies(run_dir: Path, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        folder = tmp_path / f"run-{seed}"
        shutil.copytree(run_dir, folder)
        wanted = values(folder)
        wanted["data"]["held_out"]["phantom"]["seed"] = seed
        (folder / "config.yaml").write_text(yaml.safe_dump(wanted))
        found.append(folder)
    assert side_by_side(found).warning
    assert not side_by_side([found[0], found[0]]).warning


def test_long_runs_of_many_sites_stay_small(run_dir: Path) -> None:
    rows = metrics_rows(1)
    with (run_dir / "metrics.jsonl").open("w") as file:
        import json

        for number in range(1, 801):
            file.writelines(json.dumps(entry | {"round": number}) + "\n" for entry in rows)
    assert write_report(run_dir).stat().st_size < 400_000


def test_what_each_sites_patients_have_borne_is_shown(make_run: Callable[..., Path]) -> None:
    site = {"name": "north", "epsilon": 2.51, "epsilon_rdp": 2.93, "steps": 40.0, "noise_multiplier": 1.1, "sample_rate": 0.05}
    privacy = {"mode": "dp", "epsilon": 2.51, "delta": 1e-5, "unit": "patient", "relation": "add or remove one patient"}
    text = words(write_report(make_run(privacy=privacy | {"accountant": "prv", "steps": 40.0, "sites": [site]})))
    assert "Privacy spent" in text
    assert "epsilon at delta = 1e-05, add or remove one patient; PRV accountant, RDP as a check." in text
    assert "north 2.51 2.93 40 1.1 0.05" in text
    assert "Privacy spent" not in words(write_report(make_run()))
