from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from synthetic_run import SITES, evaluation, metrics_rows, report_values, row

from fedmix.commands.screen import Screen
from fedmix.report.measures import compare_table
from fedmix.report.summary import Report, build_report, parse_report
from fedmix.report.terminal import LiveView, final_table, grid_table, remarks, values_text, view, wants_plain

HOSTILE = "[red]x[/red]\x1b[31m\n"


def report(**changes: Any) -> Report:
    return parse_report(build_report(**report_values(**changes)))


def terminal(width: int = 60, *, is_terminal: bool = True) -> Console:
    environment = {"TERM": "xterm-256color"}
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=is_terminal, record=True, _environ=environment)


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def shown(console: Console) -> str:
    return console.export_text()


def fed(width: int, rows: list[dict[str, Any]]) -> str:
    """What the live view shows after so many rows, without the screen."""
    live = LiveView(terminal(width), is_plain=True)
    live.start(30, SITES)
    for entry in rows:
        live.update(entry)
    console = terminal(width)
    console.print(view(live.progress, width))
    return shown(console)


def test_one_plain_line_a_round_where_there_is_no_terminal() -> None:
    console = terminal(60, is_terminal=False)
    with LiveView(console) as live:
        live.start(30, SITES)
        for entry in metrics_rows(5):
            live.update(entry)
    lines = shown(console).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "30 rounds, 6 sites", "round 1/30", "round 2/30", "round 3/30", "round 4/30", "round 5/30", "round 5 evaluation",
    ]  # fmt: skip
    assert "mvm" in lines[1]
    assert "\x1b" not in shown(console)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("CI", "true")])
def test_plain_under_ci_and_no_color(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    assert not wants_plain(terminal())
    monkeypatch.setenv(name, value)
    assert wants_plain(terminal())


def test_plain_in_a_dumb_terminal() -> None:
    assert wants_plain(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}))


def test_live_view_draws_in_a_terminal_and_leaves_the_last_state() -> None:
    console = terminal(80)
    with LiveView(console) as live:
        assert not live.is_plain
        live.start(30, SITES)
        for entry in metrics_rows():
            live.update(entry)
    assert "round 30 of 30" in shown(console)


def test_a_lines_losses_are_those_of_the_sites_that_it_counts() -> None:
    first, *_ = SITES
    rows = [row("site", "masked", 1, site, 0.0, {"train/mvm/loss": 8.0}) for site in SITES]
    rows += [row("round", "masked", 1, None, 1.0, {}), row("site", "aligned", 2, first, 2.0, {"train/mvm/loss": 2.0})]
    console = terminal(80, is_terminal=False)
    with LiveView(console) as live:
        live.start(2, SITES)
        for entry in [*rows, row("round", "aligned", 2, None, 3.0, {})]:
            live.update(entry)
    _, of_all, of_one = shown(console).splitlines()
    assert "mvm 8 " in of_all
    assert "mvm 2 " in of_one


@pytest.mark.parametrize("width", [60, 120])
def test_view_fits_its_width_and_keeps_sites_losses_and_bytes(width: int) -> None:
    text = fed(width, metrics_rows(25))
    assert max(map(len, text.splitlines())) <= width
    for part in (*SITES, "mvm", "mlm", "contrast", "match", "MB", "round 25 of 30", "evaluated after round 25"):
        assert part in text
    assert ("examples/s" in text) == (width == 120)


def test_states_tell_who_has_sent_and_who_is_missed() -> None:
    rows = metrics_rows(12)
    live = LiveView(terminal(), is_plain=True)
    live.start(30, SITES)
    for entry in rows:
        live.update(entry)
    states = {name: site.state for name, site in live.progress.sites.items()}
    assert states == {name: "missed" if name == "east" else "sent" for name in SITES}
    live.update(row("site", "masked", 13, "west", 0.0, {}))
    assert live.progress.sites["west"].state == "sent"
    assert live.progress.sites["east"].state == "waiting"


def test_time_left_is_rounds_left_at_the_pace_of_the_last_rounds() -> None:
    live = LiveView(terminal(), is_plain=True)
    live.start(10, {})
    live.update(row("round", "masked", 1, None, 100.0, {"time/round_s": 7.0}))
    assert live.progress.seconds_left() == pytest.approx(63.0)
    live.update(row("round", "masked", 2, None, 110.0, {"time/round_s": 7.0}))
    assert live.progress.seconds_left() == pytest.approx(80.0), "what lies between rounds, such as evaluation, counts too"


def test_names_from_data_cannot_colour_or_break_the_screen() -> None:
    for is_terminal in (True, False):
        console = terminal(100, is_terminal=is_terminal)
        with LiveView(console) as live:
            live.start(3, {HOSTILE: HOSTILE})
            live.update(row("site", HOSTILE, 1, HOSTILE, 0.0, {"train/[blink]\x1b/loss": 1.0}))
            live.update(row("round", HOSTILE, 1, None, 0.0, {}))
            live.update(row("evaluation", HOSTILE, 1, None, 0.0, {HOSTILE: 1.0}))
        fresh = terminal(100)
        fresh.print(view(live.progress, 100))
        text = shown(fresh)
        assert text.count("[red]x[/red]") == 4, "stage, site, stream and metric"
        assert "[blink]" in text
        assert isinstance(console.file, io.StringIO)
        written = console.file.getvalue()
        assert "[red]x[/red]" in written
        assert "\x1b[31m\n" not in written
        assert "[red]x[/red]\x1b" not in written


def test_many_sites_do_not_push_the_bar_off_the_screen() -> None:
    live = LiveView(terminal(), is_plain=True)
    live.start(3, {f"site-{number}": "image" for number in range(50)})
    console = terminal()
    console.print(view(live.progress, 60))
    text = shown(console)
    assert len(text.splitlines()) < 24
    assert "and 34 more sites" in text


@pytest.mark.parametrize("width", [30, 50, 60])
def test_final_table_keeps_every_value_and_breaks_no_word(width: int) -> None:
    values = report_values()
    values["baselines"]["single_scale_without_experts"] = {"evaluation": evaluation(0.6, 9)}
    found = report(**values)
    console = terminal(width)
    console.print(final_table(found))
    text = shown(console)
    assert max(map(len, text.splitlines())) <= width
    assert "experts" in text
    assert "interpolation" in text
    for evaluated in (found.evaluation, *(baseline.evaluation for baseline in found.baselines.values())):
        numbers = evaluated.model_dump()
        assert f"{numbers['classification']['zero_shot']['macro_auroc']:.3f}" in text
        assert f"{numbers['classification']['linear_probe']['macro_auroc']:.3f}" in text
        assert f"{numbers['regeneration']['psnr_db']:.2f}" in text
        assert f"{numbers['language']['bits_per_token']:.2f}" in text
    assert "[1] the gallery held fewer than ten reports" in " ".join(text.split())
    assert "…" not in text


def test_an_evaluation_is_told_by_the_names_of_its_measures() -> None:
    found = {"zero_shot/macro_auroc": 0.5371, "retrieval/r@10": 0.0958, "regeneration/psnr_db": 14.2, "time/evaluate_s": 12.0}
    assert values_text(found) == "zero-shot AUROC 0.537  R@10 9.6 %  PSNR 14.20 dB  took 12 s"
    assert values_text({"mvm": 0.12345}) == "mvm 0.123", "losses have their own names"
    live = LiveView(terminal(80), is_plain=True)
    live.start(1, {})
    live.update(row("evaluation", "masked", 1, None, 0.0, found))
    console = terminal(80)
    console.print(view(live.progress, 80))
    assert "R@10 9.6 %" in shown(console)


def test_final_table_shows_names_as_they_are() -> None:
    values = report_values()
    values["baselines"] = {"[bold]sly": {"evaluation": evaluation(0.6, 9)}}
    console = terminal(80)
    console.print(final_table(report(**values)))
    assert "[bold]sly" in shown(console)


def test_remarks_tell_what_the_table_has_no_column_for() -> None:
    values = report_values()
    now = {"r@1": 0.251}
    values["evaluation"]["retrieval"]["reranked"] = {"image_to_text": now, "text_to_image": now, "top": 20}
    found = [str(line) for line in remarks(parse_report(build_report(**values)))]
    assert len(found) == 2
    assert "R@1 of images is 25.1 % and was" in found[0]
    assert remarks(report()) == []


def test_names_in_tables_and_reasons_above_the_live_view_are_words_and_never_markup() -> None:
    values = report_values()
    values["run"]["name"] = HOSTILE
    values["baselines"][HOSTILE] = {"evaluation": evaluation(0.5)}
    found = parse_report(build_report(**values))
    console = terminal(160)
    console.print(final_table(found), grid_table(compare_table([found]), "run"))
    Screen(LiveView(console, is_plain=True)).update(
        {"event": "dropped", "stage": "masked", "round": 1, "site": HOSTILE, "why": HOSTILE}
    )
    assert isinstance(console.file, io.StringIO)
    assert "[red]x[/red]\x1b" not in console.file.getvalue()
    assert "31m\n" not in console.file.getvalue()
    assert shown(console).count("[red]x[/red]") == 4, "baseline, run, site and reason"
