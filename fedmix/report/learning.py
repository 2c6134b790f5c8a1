"""What was learnt from round to round, as charts: the losses of sites and streams, and the central evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmix.report import charts
from fedmix.report.history import History, Point

OBJECTIVE_TITLES = {
    "mvm": "Masked vision modelling",
    "mlm": "Masked language modelling",
    "contrast": "Image-text contrast",
    "match": "Image-text matching",
    "semantic": "Contrast by findings",
    "local": "Contrast of sentences and patches",
    "anchor": "Distance to the round's start",
}
CENTRAL_TITLES = {
    "zero_shot/macro_auroc": "Zero-shot AUROC",
    "linear_probe/macro_auroc": "Linear probe AUROC",
    "retrieval/r@10": "R@10, mean of both directions, %",
    "regeneration/psnr_db": "Regeneration PSNR, dB",
    "language/bits_per_token": "Bits per token",
}
IN_PERCENT = ("retrieval/r@10",)
CENTRAL_STUDIES = 500  # that evaluation.suite.quick draws
ABOUT_CENTRAL = (
    f"On the same {CENTRAL_STUDIES} test studies every time, or all where there are fewer (still fewer images and reports for "
    "PSNR and bits), to show the course. Results are measured on all test studies and may differ: R@10 here is among the pairs "
    "of these few, which may be fewer than in the results."
)
MAX_CENTRAL_PANELS = 9
STREAMS = ("image", "text", "paired")  # those with a colour of their own


@dataclass(frozen=True)
class Section:
    """Charts with the sentence that stands in for them when there are none."""

    panels: tuple[charts.LinePanel, ...] = ()
    absence: str = ""
    streams: frozenset[str] = frozenset()  # that the panels draw, for the key
    about: str = ""


def losses(history: History, stream_of: Mapping[str, str]) -> Section:
    """One panel for each objective: thin lines for sites, thick lines for streams."""
    panels = []
    for objective in history.objectives():
        metric = f"train/{objective}/loss"
        by_site, by_stream = history.site_curves(metric), history.stream_curves(metric, stream_of)
        if len(by_site) > charts.MAX_SITE_CURVES:
            by_site = {}
        curves = [charts.Curve(site, _style(stream_of.get(site, "")), points, False) for site, points in by_site.items()]
        curves += [charts.Curve(f"{stream} sites", _style(stream), points) for stream, points in by_stream.items()]
        title = OBJECTIVE_TITLES.get(objective, objective)
        panels.append(charts.line_panel(title, curves, history.stages, _span(history)))
    return Section(tuple(panels), "" if panels else "No training losses were recorded.", frozenset(stream_of.values()))


def central(history: History) -> Section:
    """A panel for each number of the central evaluation that was measured more than once."""
    curves = history.central_curves()
    names = [name for name in CENTRAL_TITLES if name in curves] + [name for name in curves if name not in CENTRAL_TITLES]
    panels = []
    for name in names[:MAX_CENTRAL_PANELS]:
        title = CENTRAL_TITLES.get(name, name)
        scale = 100 if name in IN_PERCENT else 1
        points = [Point(point.round, scale * point.value) for point in curves[name]]
        curve = charts.Curve("central evaluation", "central", points)
        panels.append(charts.line_panel(title, [curve], history.stages, _span(history)))
    absence = "Fewer than two central evaluations were recorded during training, so there is no curve."
    return Section(tuple(panels), "" if panels else absence, about=ABOUT_CENTRAL)


def _span(history: History) -> tuple[int, int]:
    """First and last round that any line speaks of."""
    rounds = [entry.round for entry in history.entries]
    return min(rounds), max(rounds)


def _style(stream: str) -> str:
    return f"stream-{stream}" if stream in STREAMS else "stream-other"
