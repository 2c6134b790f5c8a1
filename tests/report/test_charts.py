from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmix.report import charts
from fedmix.report.charts import Curve
from fedmix.report.history import Point, StageSpan

STAGES = (StageSpan("masked", 1, 20), StageSpan("aligned", 21, 30))


def curve(*values: float, first: int = 1, name: str = "image sites") -> Curve:
    return Curve(name, "stream-image", [Point(first + number, value) for number, value in enumerate(values)])


@given(st.floats(-1e4, 1e4), st.floats(1e-4, 1e6))
def test_ticks_enclose_the_values_in_few_even_steps(low: float, span: float) -> None:
    levels = charts.ticks(low, low + span)
    slack = 1e-6 * (levels[1] - levels[0])
    assert levels[0] <= low + slack
    assert levels[-1] >= low + span - slack
    assert 2 <= len(levels) <= 6
    steps = [later - earlier for earlier, later in pairwise(levels)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


def test_ticks_of_equal_values_are_still_an_axis() -> None:
    assert len(charts.ticks(3.0, 3.0)) >= 2
    assert len(charts.ticks(0.0, 0.0)) >= 2


def test_lower_values_are_drawn_lower_and_later_rounds_further_right() -> None:
    panel = charts.line_panel("loss", [curve(3.0, 1.0)], STAGES, (1, 30))
    first, last = (tuple(map(float, place.split())) for place in panel.strokes[0].path[1:].split("L"))
    assert first[0] < last[0]
    assert first[1] < last[1], "y runs down"


def test_every_coordinate_lies_in_the_panel() -> None:
    panel = charts.line_panel("loss", [curve(*range(30)), curve(5.0, first=30)], STAGES, (1, 30))
    for stroke in panel.strokes:
        for place in stroke.path[1:].split("L"):
            x, y = map(float, place.split())
            assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
            assert charts.TOP <= y <= charts.LINE_HEIGHT - charts.BOTTOM
    assert panel.strokes[1].is_dot


def test_a_stage_begins_halfway_between_the_rounds_around_it() -> None:
    panel = charts.line_panel("loss", [curve(*range(30))], STAGES, (1, 30))
    across = charts.Scale(1, 30, charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert panel.bands[1].x == pytest.approx(across(20.5))
    assert [band.has_edge for band in panel.bands] == [False, True]


def test_values_at_the_ends_of_curves_do_not_lie_on_each_other() -> None:
    panel = charts.line_panel("loss", [curve(1.0, 0.5), curve(1.0, 0.501), curve(1.0, 0.502)], (), (1, 2))
    places = sorted(end.at for end in panel.ends)
    assert all(later - earlier >= charts.MIN_LABEL_GAP - 1e-9 for earlier, later in pairwise(places))
    assert places[-1] <= charts.LINE_HEIGHT - charts.BOTTOM


def test_the_value_of_a_curve_that_ends_early_lies_on_no_curve() -> None:
    falling = curve(*(5 - 0.1 * number for number in range(20)), name="report sites")
    going_on = curve(*(3.22 for _ in range(10)), first=21)  # ten pixels above the other's end
    panel = charts.line_panel("loss", [falling, going_on], STAGES, (1, 30))
    early = next(end for end in panel.ends if end.text == "3.10" and end.x < charts.WIDTH - charts.RIGHT)
    width = charts.CHARACTER * len(early.text)
    left = early.x - (width if early.anchor == "end" else 0)
    for stroke in panel.strokes:
        for place in stroke.path[1:].split("L"):
            x, y = map(float, place.split())
            assert not (left <= x <= left + width and abs(y - early.at) < 5)


def test_a_curve_that_hardly_changes_is_drawn_flat() -> None:
    panel = charts.line_panel("loss", [curve(2.0882, 2.0890)], (), (1, 2))
    first, last = (float(place.split()[1]) for place in panel.strokes[0].path[1:].split("L"))
    assert abs(first - last) < 3
    steep = charts.line_panel("loss", [curve(2.0, 3.0)], (), (1, 2))
    first, last = (float(place.split()[1]) for place in steep.strokes[0].path[1:].split("L"))
    assert abs(first - last) > 100


def test_a_name_is_cut_to_its_room_and_what_stands_behind_it_is_not() -> None:
    for name in ("Pleural Thickening", "pneumothorax right"):
        assert charts.fitted(name, charts.BAR_LEFT - 10, " (77)") == f"{name} (77)"
    cut = charts.fitted("universitaetsklinikum-hamburg-eppendorf", 118, " (1,200)")
    assert cut.startswith("univ")
    assert cut.endswith("… (1,200)")
    assert len(cut) < 24


def test_a_run_of_one_round_has_a_chart() -> None:
    panel = charts.line_panel("loss", [curve(0.7)], (StageSpan("masked", 1, 1),), (1, 1))
    assert all(math.isfinite(value) for stroke in panel.strokes for value in stroke.end)


def test_bars_start_at_chance_and_go_left_below_it() -> None:
    panel = charts.bar_panel("AUROC", {"a": 0.75, "b": 0.4}, 0.575)
    above, below = panel.bars
    assert above.x == pytest.approx(panel.chance)
    assert below.x + below.width == pytest.approx(panel.chance)
    assert below.is_below
    assert panel.macro is not None
    assert panel.chance < panel.macro.at < above.x + above.width
