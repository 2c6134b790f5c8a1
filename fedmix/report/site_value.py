"""What each hospital gave and what it got: the federation's model beside its own, on patients of its own.

A number stands here only where the hospital measured it; one that was asked and did not answer is named with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmix.report import markdown, measures, quantities
from fedmix.report.evaluated import Evaluation
from fedmix.report.summary import Report, Site, SiteScore

HEAD = ("hospital", "measure", "alone", "federation", "got")
ABOUT = (
    "Each hospital scored the last model on patients of its own that it never trained on, and sent sums. Alone: the model that "
    "it trained for itself in as many steps of its own. Weight of what it gave: its part of what moved each part of the model."
)
WITHOUT = "without_"  # begins the name of the baseline that left a site out
HELD = {"image": "images", "text": "reports", "paired": "pairs"}
TOWERS = ("shared", "image", "text", "pair")


@dataclass(frozen=True)
class Kind:
    """How a measure of a site is called and shown; ``sign``: 1 where higher is better, -1 where lower is.

    ``unit`` is that of a difference: of percentages it is points.
    """

    title: str
    over: str
    sign: int
    show: Callable[[float], str]
    unit: str

    def amount(self, difference: float) -> str:
        """How large a difference is, without its sign and unit."""
        return self.show(abs(difference)).split(" ")[0]


KINDS = {
    "score/psnr_db": Kind("PSNR of hidden patches", "images", 1, lambda value: f"{value:.2f} dB", "dB"),
    "score/bits_per_token": Kind("bits per hidden token", "tokens", -1, lambda value: f"{value:.3f}", "bits a token"),
    "score/r1_of_32": Kind("R@1 among 32", "queries", 1, quantities.percent, "points"),
}


@dataclass(frozen=True)
class Line:
    """One measure of one hospital as text in the order of HEAD; ``gain`` is positive where the federation is better."""

    site: Site
    texts: tuple[str, ...]
    gain: float | None = None


def lines(report: Report) -> tuple[Line, ...]:
    """A line for each hospital's measures, or for the reason that there is none; nothing where none was asked."""
    found: list[Line] = []
    for site in report.sites:
        if site.unscored is not None:
            found.append(Line(site, (site.name, f"no score: {site.unscored}", "", "", "")))
        found += [_line(site, name, score) for name, score in site.scores.items() if name in KINDS]
    return tuple(found)


def contributions(report: Report) -> tuple[str, ...]:
    """What each site that was asked gave, and for each that was left out once what the central evaluation says with it and
    without it.
    """
    asked = [site for site in report.sites if site.scores or site.unscored is not None]
    without = tuple(
        f"With and without {site.name}: {quantities.listing(changes)}."
        for site in report.sites
        if (other := report.baselines.get(f"{WITHOUT}{site.name}"))
        and (changes := _changes(report.evaluation, other.evaluation))
    )
    return (*(f"{site.name} gave {gave(site)}." for site in asked), *without)


def _changes(whole: Evaluation, without: Evaluation) -> list[str]:
    """Measures that both have, in the order of the headline table."""
    found = [(measure, measure.read(whole).value, measure.read(without).value) for measure in measures.MEASURES]
    return [
        f"{measure.title} {measure.show(ours)} and {measure.show(theirs)} {measure.unit}".rstrip()
        for measure, ours, theirs in found
        if ours is not None and theirs is not None
    ]


def verdict(found: Sequence[Line]) -> str:
    """Who gains, in a sentence that claims nothing of a hospital that did not measure it."""
    asked = list(dict.fromkeys(line.site.name for line in found))
    gains = {name: [line.gain for line in found if line.site.name == name and line.gain is not None] for name in asked}
    compared = [name for name in asked if gains[name]]
    if not compared:
        return "No hospital's model of its own was scored, so nothing says what any of them gained."
    winners = [name for name in compared if min(gains[name]) > 0]
    losers = [name for name in compared if min(gains[name]) <= 0]
    others = f" Worse or no better on some measure: {quantities.listing(losers)}." if losers else ""
    rest = f" Not compared: {quantities.listing([name for name in asked if not gains[name]])}." if asked != compared else ""
    return f"{len(winners)} of {quantities.plural(len(asked), 'hospital')} gained on every measure of its own.{others}{rest}"


def as_markdown(found: Sequence[Line], contributed: Sequence[str]) -> str:
    """The table and its sentences, and what was said of sites that were left out."""
    table = markdown.table(HEAD, [line.texts for line in found], num_words=2)
    about = f"{markdown.text(verdict(found))} {markdown.text(ABOUT)}\n\n{table}\n" if found else ""
    return about + markdown.items(contributed)


def gave(site: Site) -> str:
    """Studies as the site declared them, bytes, and its weight."""
    weights = [f"{100 * site.shares[tower]:.0f} % {tower}" for tower in TOWERS if site.shares.get(tower)]
    parts = [f"{quantities.count(site.studies)} {HELD.get(site.stream, site.stream)}", quantities.size(site.bytes_up)]
    return "; ".join([*parts, f"weight {', '.join(weights)}"] if weights else parts)


def _line(site: Site, name: str, score: SiteScore) -> Line:
    kind = KINDS[name]
    measure = f"{kind.title} ({quantities.count(score.weight)} {kind.over})"
    value = kind.show(score.value)
    if score.alone is None:
        return Line(site, (site.name, measure, quantities.DASH, value, quantities.DASH))
    gain = kind.sign * (score.value - score.alone)
    got = f"{kind.amount(gain)} {kind.unit} {'better' if gain > 0 else 'worse'}" if gain else "no difference"
    return Line(site, (site.name, measure, kind.show(score.alone), value, got), gain)
