"""The live page's content: how a run stands, from its folder alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SITES, experiment, manifest, metrics_rows

from fedmix.errors import RunError
from fedmix.report.files import write_json
from fedmix.report.live import LivePage, read_now

HOSTILE = "<script>alert(1)</script>[red]\"'&"
HOLDING = (
    "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A process that works in a run folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate("\n")


@pytest.fixture
def going_on(tmp_path: Path) -> Path:
    """Three rounds committed; in the fourth one site has answered and one was dropped."""
    folder = tmp_path / "demo"
    folder.mkdir()
    write_json(folder / "manifest.json", manifest("running"))
    write_lines(folder / "metrics.jsonl", metrics_rows(3))
    fourth = [row for row in metrics_rows(4) if row["round"] == 4]
    dropped = {"event": "dropped", "stage": "masked", "round": 4, "site": "hill", "why": "no reply before the deadline"}
    write_lines(folder / "events.jsonl", [*metrics_rows(3), fourth[0], dropped])
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_round_that_is_going_on_is_told_before_it_is_committed(going_on: Path) -> None:
    with held(going_on):
        now = read_now(going_on)
    assert (now.state, now.sentence, now.round) == ("running", "A process works on it.", 3)
    sites = {site.name: site for site in now.sites}
    assert sites["north"].round == "4"
    assert (sites["hill"].round, sites["hill"].state) == ("3", "dropped")
    assert sites["east"].state == "waiting"
    assert [(one.round, one.site, one.why) for one in now.troubles] == [(4, "hill", "no reply before the deadline")]
    assert ("dropped or failed", "1") in now.facts


def test_bytes_and_seconds_are_sums_over_rounds_counted_once_though_two_files_tell_them(going_on: Path) -> None:
    sites = {site.name: site for site in read_now(going_on).sites}
    assert (sites["west"].bytes_up, sites["west"].bytes_down, sites["west"].train_s) == ("1.83 MB", "9.9 MB", "24 s")


def test_a_run_whose_process_has_gone_is_stopped(going_on: Path) -> None:
    assert read_now(going_on).state == "stopped"
    assert "goes on with --resume" in read_now(going_on).sentence


def test_only_a_run_that_somebody_works_on_has_time_left(going_on: Path) -> None:
    (going_on / "config.yaml").write_text(experiment().to_yaml())
    with held(going_on):
        assert "left" in dict(read_now(going_on).facts)
    assert "left" not in dict(read_now(going_on).facts)


@pytest.mark.parametrize(
    ("state", "cause", "sentence"),
    [
        ("completed", None, "The run is completed; its report is in the run folder."),
        ("failed", "round 9: 0 of 2 replies.", "This run failed: round 9: 0 of 2 replies."),
        ("failed", None, "This run failed: it recorded no cause."),
    ],
)
def test_an_end_is_told_with_its_cause(going_on: Path, state: str, cause: str | None, sentence: str) -> None:
    write_json(going_on / "manifest.json", manifest(state, cause=cause))
    now = read_now(going_on)
    assert (now.state, now.sentence) == (state, sentence)


def test_sites_and_rounds_that_are_planned_are_there_before_any_row(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(experiment().to_yaml())
    write_json(tmp_path / "manifest.json", manifest("running"))
    now = read_now(tmp_path)
    assert [(site.name, site.stream, site.state) for site in now.sites] == [(*site, "waiting") for site in SITES.items()]
    assert (now.round, now.total_rounds) == (0, 30)
    assert "No training losses were recorded." in LivePage(tmp_path).now()


def test_after_the_last_round_the_page_says_what_follows(going_on: Path) -> None:
    (going_on / "config.yaml").write_text(experiment().to_yaml())
    write_lines(going_on / "metrics.jsonl", metrics_rows())
    with held(going_on):
        assert read_now(going_on).sentence == "All rounds are done; evaluation and other methods follow."


def test_a_row_that_is_being_written_is_left_for_the_next_time(going_on: Path) -> None:
    before = read_now(going_on)
    with (going_on / "events.jsonl").open("a") as file:
        file.write('{"event": "site", "stage": "mas')
    assert read_now(going_on) == before


def test_a_page_is_drawn_anew_when_a_row_comes_or_its_process_goes(going_on: Path) -> None:
    page = LivePage(going_on)
    first = page.now()
    assert page.now() is first
    with held(going_on):
        assert '<dd class="state running">' in page.now()
    assert page.now() == first
    write_lines(going_on / "metrics.jsonl", metrics_rows(4))
    assert "Round <b>4</b>" in page.now()


def test_a_folder_that_is_damaged_under_the_page_is_a_sentence_and_heals(going_on: Path) -> None:
    page = LivePage(going_on)
    whole = (going_on / "metrics.jsonl").read_text()
    (going_on / "metrics.jsonl").write_text("{\n" + whole)
    assert "metrics.jsonl line 1" in page.now()
    (going_on / "metrics.jsonl").write_text(whole)
    assert "Round <b>3</b>" in page.now()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run yet"):
        LivePage(tmp_path)


def test_names_and_reasons_that_are_markup_are_shown_as_text(going_on: Path) -> None:
    rows = metrics_rows(3)
    rows[0] = rows[0] | {"site": HOSTILE, "stage": HOSTILE}
    write_lines(going_on / "metrics.jsonl", rows)
    write_lines(going_on / "events.jsonl", [{"event": "dropped", "stage": "s", "round": 1, "site": HOSTILE, "why": HOSTILE}])
    write_json(going_on / "manifest.json", manifest("failed", cause=HOSTILE, name=HOSTILE))
    whole = LivePage(going_on).whole()
    assert whole.count("<script") == 1, "the page's own"
    assert "<script>alert" not in whole
    assert whole.count("&lt;script&gt;alert(1)&lt;/script&gt;[red]") >= 5
