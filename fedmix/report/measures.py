"""The headline table: which numbers a method is judged by, how each is read from an evaluation, and which is best.

One table of cells is drawn three times: in report.html, in the terminal and, for several runs, as Markdown. A method that
lacks a number gets a dash that points to a numbered reason; a guess that has no such number at all, such as a mean image
asked for an AUROC, gets a dash alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fedmix.report import markdown, quantities
from fedmix.report.evaluated import Classifier, Evaluation, Fidelity, Language, Ranking, Regeneration, Words
from fedmix.report.summary import Report

Kind = Literal["main", "baseline", "reference"]
NOT_EVALUATED = "not evaluated in this run"
GAP = "A dash without a number: does not apply."
NO_REASON = "could not be computed; the run gave no reason"

# What each baseline is, for readers who do not know its name.
ABOUT_METHOD = {
    "fedmix": "the method under study",
    "random_init": "weights never trained",
    "public_init": "public start weights, never trained here",
    "best_site": "the better of the sites alone",
    "fedavg_all": "plain FedAvg over all sites",
    "modality_aware_joint": "our weights, one stage",
    "modality_exact": "FedAvg among sites of the same data",
    "fedcola": "FedCola's rule",
    "paired_only": "only sites with pairs",
    "paired_long": "the same, for the time of all sites",
    "paired_fedavg": "FedAvg over sites with pairs",
    "fedprox": "FedAvg with a proximal term",
    "one_shot": "one average of site models a stage",
    "contrast_only": "contrast of pairs alone, as in ConVIRT and CLIP",
    "contrast_margin": "the same with a multi-margin loss",
    "semantic_only": "images and reports by findings, as in MedCLIP",
    "contrast_local": "and of sentences and patches, as in GLoRIA and LoVT",
    "masked_records": "pairs hidden together, as in MRM",
    "image_mae": "images alone, as in MAE",
    "text_mlm": "reports alone, as in BERT",
    "centralised": "all data pooled: equal samples, more steps",
    "centralised_steps": "all data pooled: equal samples and steps",
    "raw_pixels": "grey values",
    "mean_image": "the average image",
    "mean_image_fitted": "scaled to what is visible",
    "interpolation": "visible neighbours",
    "mean_image_fitted_and_interpolation": "both of these",
    "unigram": "word frequencies",
}


@dataclass(frozen=True)
class Score:
    """A number read from an evaluation, its interval, what it was measured against, or why it is missing."""

    value: float | None
    interval: tuple[float, float] | None = None
    setting: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Measure:
    """One column: its name, where its number is, how it is shown and which direction is good."""

    title: str
    short: str
    better: Literal["higher", "lower"]
    read: Callable[[Evaluation], Score]
    show: Callable[[float], str]
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """One number as shown. ``note`` is the number of the reason why it is a dash."""

    text: str
    interval: str = ""
    setting: str = ""
    is_best: bool = False
    note: int | None = None
    score: Score = Score(None)


@dataclass(frozen=True)
class Row:
    """One method or run; a cell is None where the measure has no meaning for it."""

    name: str
    about: str
    kind: Kind
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Grid:
    """Measures across, methods or runs down; ``notes`` are the reasons that dashes point to, counted from 1."""

    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """For each measure the setting that all its cells share, or nothing where they differ."""
        columns = (
            {row.cells[position].setting for row in self.rows if row.cells[position]} - {""}  # type: ignore[union-attr]
            for position in range(len(self.measures))
        )
        return tuple(column.pop() if len(column) == 1 else "" for column in columns)

    @property
    def has_gaps(self) -> bool:
        """Whether any measure has no meaning for a row."""
        return any(cell is None for row in self.rows for cell in row.cells)

    @property
    def has_numbers(self) -> bool:
        """Whether any cell holds a number."""
        return any(cell is not None and cell.note is None for row in self.rows for cell in row.cells)


def _absent(evaluation: Evaluation, place: str) -> Score:
    """A part that is not there, with the reason that the evaluation gives for it or for what it belongs to."""
    skipped = evaluation.skipped
    return Score(None, reason=skipped.get(place) or skipped.get(place.split("/")[0]) or NOT_EVALUATED)


def _of_classifier(block: Classifier) -> Score:
    trained = f", trained on {block.num_train:,}" if block.num_train else ""
    setting = "" if block.num_test is None else f"{block.num_test:,} studies{trained}"
    return Score(block.macro_auroc, block.ci95, setting, block.reason_for("macro_auroc"))


def _of_ranking(block: Ranking) -> Score:
    chance = chance_at_10(block)
    num = block.num_queries
    queries = "" if num is None else f"{quantities.plural(num, 'query', 'queries')}, each in a gallery "
    setting = "" if chance is None else f"{queries}of {block.gallery:,}; chance {quantities.percent(chance)}"
    return Score(block.recall_10, block.recall_10_ci95, setting, block.reason_for("r@10"))


def _of_fidelity(block: Fidelity, whole: Regeneration) -> Score:
    """``whole`` says on which images, for guesses too."""
    images = "" if whole.num_images is None else quantities.plural(whole.num_images, "image")
    return Score(block.psnr_db, block.psnr_db_ci95, _joined(images, _hidden(whole.mask_ratio)), block.reason_for("psnr_db"))


def _of_words(block: Words, whole: Language) -> Score:
    words = "" if whole.num_tokens is None else quantities.plural(whole.num_tokens, "token")
    texts = "" if whole.num_texts is None else f" of {quantities.plural(whole.num_texts, 'report')}"
    setting = _joined(words + texts, _hidden(whole.mask_ratio))
    return Score(block.bits_per_token, block.ci95, setting, block.reason_for("bits_per_token"))


def _hidden(mask_ratio: float | None) -> str:
    return "" if mask_ratio is None else f"{quantities.percent(mask_ratio, 0)} hidden"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _zero_shot(evaluation: Evaluation) -> Score:
    block = evaluation.classification and evaluation.classification.zero_shot
    return _of_classifier(block) if block else _absent(evaluation, "classification/zero_shot")


def _linear_probe(evaluation: Evaluation) -> Score:
    block = evaluation.classification and evaluation.classification.linear_probe
    return _of_classifier(block) if block else _absent(evaluation, "classification/linear_probe")


def _few_label_probe(evaluation: Evaluation) -> Score:
    block = evaluation.classification and evaluation.classification.few_label_probe
    return _of_classifier(block) if block else _absent(evaluation, "classification/few_label_probe")


def chance_at_10(block: Ranking) -> float | None:
    """The recall at 10 that guessing gives: as evaluated, or from the gallery; None where neither is known."""
    if not block.gallery:
        return None
    chance = block.chance.get("r@10")
    return min(1.0, 10 / block.gallery) if chance is None else chance


def _image_to_text(evaluation: Evaluation) -> Score:
    block = evaluation.retrieval and evaluation.retrieval.image_to_text
    return _of_ranking(block) if block else _absent(evaluation, "retrieval")


def _text_to_image(evaluation: Evaluation) -> Score:
    block = evaluation.retrieval and evaluation.retrieval.text_to_image
    return _of_ranking(block) if block else _absent(evaluation, "retrieval")


def _psnr(evaluation: Evaluation) -> Score:
    block = evaluation.regeneration
    return _of_fidelity(block, block) if block else _absent(evaluation, "regeneration")


def _bits(evaluation: Evaluation) -> Score:
    block = evaluation.language
    return _of_words(block, block) if block else _absent(evaluation, "language")


def passing_mark(evaluation: Evaluation, trigger: str, finding: str) -> float | None:
    """Of the images without a finding, the share that passes for having it once the mark is on them; 5 % pass unmarked."""
    found = evaluation.classification and evaluation.classification.triggers
    mark = getattr(found, trigger, None) if found else None
    return mark.rate.get(finding) if mark else None


def _membership(evaluation: Evaluation) -> Score:
    block = evaluation.membership
    if block is None:
        return _absent(evaluation, "membership")
    return Score(block.auc, block.auc_ci95, "attack on patients", block.reason_for("auc"))


MEASURES = (
    Measure("Zero-shot AUROC", "zero-\nshot\nAUROC", "higher", _zero_shot, quantities.decimal),
    Measure("Linear probe AUROC", "linear\nprobe\nAUROC", "higher", _linear_probe, quantities.decimal),
    Measure(
        "R@10 image\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}text",
        "R@10 %\nimage\n→ text",
        "higher",
        _image_to_text,
        quantities.percent,
    ),
    Measure(
        "R@10 text\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}image",
        "R@10 %\ntext →\nimage",
        "higher",
        _text_to_image,
        quantities.percent,
    ),
    Measure("PSNR", "PSNR\ndB", "higher", _psnr, lambda value: quantities.decimal(value, 2), "dB"),
    Measure("Bits per token", "bits\n/token", "lower", _bits, lambda value: quantities.decimal(value, 2)),
)
FEW_LABEL_PROBE = Measure(
    "Probe AUROC, few labels", "probe\nfew\nlabels", "higher", _few_label_probe, quantities.decimal
)  # of a study's tables
MEMBERSHIP = Measure("Membership AUC", "mem-\nber\nAUC", "lower", _membership, quantities.decimal)  # where it was attacked
PLANTED = Measure(  # where a site taught one; which mark and finding it was is in the study's config, not in an evaluation
    "Planted mark passes for its finding", "planted\nmark\n%", "lower", lambda evaluation: Score(None), quantities.percent
)
ZERO_SHOT, LINEAR_PROBE, IMAGE_TO_TEXT, TEXT_TO_IMAGE, PSNR, BITS = range(len(MEASURES))


def method_name(name: str) -> str:
    """A method's name for people."""
    return name.replace("_", " ")


def headline(report: Report) -> Grid:
    """This run's method, its baselines, then the guesses that need no model."""
    methods = _methods(report)
    entries = [
        _entry(name, "baseline" if position else "main", _scores(found)) for position, (name, found) in enumerate(methods)
    ]
    return _grid([*entries, *_references(report.evaluation)])


def compare_table(reports: Sequence[Report]) -> Grid:
    """One row for each run, in the order given."""
    return _grid([_Entry(report.run.name, "", "baseline", _scores(report.evaluation)) for report in reports])


def as_markdown(grid: Grid, *, with_settings: bool = False) -> str:
    """The table as GitHub Markdown, the best of each column in bold; with what a cell's number is of, if that is wanted."""
    titles = [f"{measure.title} {measure.unit}".strip() for measure in grid.measures]
    lines = [markdown.row(["", *map(markdown.text, titles)]), markdown.row(["---", *["---:"] * len(titles)])]
    for row in grid.rows:
        lines.append(markdown.row([markdown.text(row.name), *(_markdown_cell(cell, with_settings) for cell in row.cells)]))
    notes = [f"{number}. {markdown.text(note)}" for number, note in enumerate(grid.notes, 1)]
    gaps = ["", GAP] if grid.has_gaps else []
    return "\n".join([*lines, *([""] if notes else []), *notes, *gaps]) + "\n"


def recovered_gap(report: Report) -> list[tuple[Measure, float | None]]:
    """(fedmix - best site) / (centralised - best site) for each measure that all three have.

    None where pooling the data brought nothing over the best site: the ratio then says nothing. Empty without both baselines.
    """
    if not {"best_site", "centralised"} <= report.baselines.keys():
        return []
    evaluations = (report.evaluation, report.baselines["best_site"].evaluation, report.baselines["centralised"].evaluation)
    gaps: list[tuple[Measure, float | None]] = []
    for measure in MEASURES:
        ours, alone, pooled = (measure.read(evaluation).value for evaluation in evaluations)
        if ours is None or alone is None or pooled is None:
            continue
        sign = 1 if measure.better == "higher" else -1
        gaps.append((measure, (ours - alone) / (pooled - alone) if sign * (pooled - alone) > 0 else None))
    return gaps


def every_number(report: Report) -> tuple[tuple[str, ...], list[tuple[str, list[str]]]]:
    """Method names, and one row for each number of any evaluation: its path and each method's value as text."""
    methods = _methods(report)
    flat = [dict(_leaves(found.model_dump(mode="json", by_alias=True, exclude_unset=True))) for _, found in methods]
    paths = dict.fromkeys(path for leaves in flat for path in leaves)
    rows = [(path, [leaves.get(path, quantities.DASH) for leaves in flat]) for path in paths]
    return tuple(method_name(name) for name, _ in methods), rows


class _Entry(NamedTuple):
    """A row before it is known which values are best."""

    name: str
    about: str
    kind: Kind
    scores: Sequence[Score | None]


def _entry(name: str, kind: Kind, scores: Sequence[Score | None]) -> _Entry:
    return _Entry(method_name(name), ABOUT_METHOD.get(name, ""), kind, scores)


def _methods(report: Report) -> list[tuple[str, Evaluation]]:
    return [("fedmix", report.evaluation), *((name, baseline.evaluation) for name, baseline in report.baselines.items())]


def _scores(evaluation: Evaluation) -> list[Score | None]:
    return [measure.read(evaluation) for measure in MEASURES]


def _references(evaluation: Evaluation) -> Iterator[_Entry]:
    """What needs no model: a probe on pixels, guessed images, guessed words."""
    pixels = evaluation.classification and evaluation.classification.raw_pixels
    if pixels:
        yield _entry("raw_pixels", "reference", _only(LINEAR_PROBE, _of_classifier(pixels)))
    if evaluation.regeneration:
        for name, guess in evaluation.regeneration.baselines.items():
            yield _entry(name, "reference", _only(PSNR, _of_fidelity(guess, evaluation.regeneration)))
    if evaluation.language:
        for name, words in evaluation.language.baselines.items():
            yield _entry(name, "reference", _only(BITS, _of_words(words, evaluation.language)))


def _only(position: int, score: Score) -> list[Score | None]:
    return [score if column == position else None for column in range(len(MEASURES))]


def _grid(entries: Sequence[_Entry]) -> Grid:
    best = [_best(measure, [entry.scores[column] for entry in entries]) for column, measure in enumerate(MEASURES)]
    notes: dict[str, int] = {}
    rows = []
    for name, about, kind, scores in entries:
        cells = tuple(_cell(MEASURES[column], score, best[column], notes) for column, score in enumerate(scores))
        rows.append(Row(name, about, kind, cells))
    return Grid(MEASURES, tuple(rows), tuple(notes))


def _best(measure: Measure, scores: Sequence[Score | None]) -> str | None:
    """The best value as it is shown, so that two values that read alike are both marked; none if nothing to beat."""
    values = [score.value for score in scores if score is not None and score.value is not None]
    if len(values) < 2:
        return None
    return measure.show(max(values) if measure.better == "higher" else min(values))


def _cell(measure: Measure, score: Score | None, best: str | None, notes: dict[str, int]) -> Cell | None:
    """One cell; a reason not met before is added to ``notes``."""
    if score is None:
        return None
    if score.value is None:
        return Cell(quantities.DASH, note=notes.setdefault(score.reason or NO_REASON, len(notes) + 1))
    text = measure.show(score.value)
    interval = "" if score.interval is None else quantities.span(*map(measure.show, score.interval))
    return Cell(text, interval, score.setting or "", is_best=text == best, score=score)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        yield path, " to ".join(_leaf(item) for item in value) if value else quantities.DASH
    elif not isinstance(value, list):
        yield path, _leaf(value)


def _leaf(value: Any) -> str:
    if value is None:
        return quantities.DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown_cell(cell: Cell | None, with_setting: bool) -> str:
    if cell is None:
        return quantities.DASH
    text = f"**{cell.text}**" if cell.is_best else cell.text
    told = [part for part in (cell.interval, cell.setting if with_setting else "") if part]
    note = f" [{cell.note}]" if cell.note else ""
    return f"{text} ({'; '.join(told)})" if told else f"{text}{note}"
