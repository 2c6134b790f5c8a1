"""`fedmix prepare`: a site's files become a shard."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedmix.commands.consoles import error_console, out_console
from fedmix.errors import ConfigError

if TYPE_CHECKING:
    from fedmix.data.layouts.records import Source, SourceOptions
    from fedmix.data.prepare import PrepareOptions, PrepareSummary


class LayoutChoice(StrEnum):
    """How the files lie; the names of ``fedmix.data.layouts.registry``, here so that --help imports no reader."""

    chexpert = "chexpert"
    dicom = "dicom"
    mimic_cxr = "mimic-cxr"
    mimic_cxr_jpg = "mimic-cxr-jpg"
    nih14 = "nih14"
    openi = "openi"
    padchest = "padchest"
    table = "table"


class StreamChoice(StrEnum):
    """What a shard keeps of each study."""

    image = "image"
    text = "text"
    paired = "paired"


class PhiChoice(StrEnum):
    """What happens to a text that still holds a date, a number or a name."""

    quarantine = "quarantine"
    counted = "count"


class ViewsChoice(StrEnum):
    """Which images are taken."""

    frontal = "frontal"
    frontal_or_unknown = "frontal-or-unknown"
    all = "all"


class Rate(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        """The rate of the last half minute, blank until there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f}/s", style="progress.data.speed")


NUM_CORES = max(1, len(os.sched_getaffinity(0)))
FOR_TABLES = "Only for the layout table"

Layout = Annotated[LayoutChoice, typer.Argument(metavar="LAYOUT", help=f"one of {', '.join(LayoutChoice)}")]
Root = Annotated[Path, typer.Argument(metavar="ROOT", help="the data set's folder, as it was downloaded or exported")]
Out = Annotated[Path, typer.Option(help="the shard's folder")]
Stream = Annotated[StreamChoice | None, typer.Option(help="keep only this kind; everything if left out")]
Views = Annotated[ViewsChoice | None, typer.Option(help="of the images; frontal if left out, all for the layout table")]
Sections = Annotated[str, typer.Option(help="of the reports, comma-separated, or whole")]
Phi = Annotated[
    PhiChoice,
    typer.Option(help="texts with dates, phone numbers, addresses, record numbers or names: left out, or counted"),
]
Reports = Annotated[
    Path | None, typer.Option(help="MIMIC: their folder, if not below ROOT; dicom: a CSV with StudyInstanceUID and report")
]
Unmarked = Annotated[bool, typer.Option("--unmarked/--no-unmarked", help="take DICOM images whose BurnedInAnnotation is blank")]
Captures = Annotated[bool, typer.Option("--captures", help="take DICOM secondary captures, which may show a name")]
KeepCharacteristics = Annotated[
    bool,
    typer.Option(
        "--keep-characteristics",
        help="keep sex and age band (0-17, 18-39, 40-59, 60-79, 80+) for subgroups of an evaluation; table: columns sex, age",
    ),
]
Encoding = Annotated[str | None, typer.Option(help="of texts that are not UTF-8, such as cp1252; else refused")]
Lang = Annotated[str, typer.Option(help="table, dicom: language of the texts where no column lang says, such as en or pt-BR")]
Part = Annotated[
    str | None,
    typer.Option(
        help="such as 1/3: of the patients outside the official test split only the first of three parts, by the site "
        "key; one data set then plays several institutes"
    ),
]
Shares = Annotated[str, typer.Option(help="of train, val and test, by patient, where the data set has no splits of its own")]
Size = Annotated[int, typer.Option(min=8, max=1024, help="pixels a side")]
Fit = Annotated[str, typer.Option(help="pad or crop: how a picture that is not square becomes one")]
Normalise = Annotated[str, typer.Option(help="none, or standard: grey brought to mean .5, deviation .2")]
MaxWords = Annotated[int, typer.Option(min=4, max=512, help="token ids kept of a report")]
Labels = Annotated[str | None, typer.Option(help="findings to keep, comma-separated, or none; all if left out")]
TokenizerFolder = Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder; the shipped one if left out")]
KeyFile = Annotated[Path, typer.Option(help="the site's secret key; made if absent, never leaves the site")]
MaxBadShare = Annotated[float, typer.Option(min=0.0, max=1.0, help="more bad rows than this fail the command")]
Workers = Annotated[int, typer.Option(min=1)]
Replace = Annotated[bool, typer.Option("--replace", help="replace a shard that is there")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="start over; an interrupted preparation of this shard is gone on with otherwise")
]
Preview = Annotated[Path | None, typer.Option(help="folder for a contact sheet and a page of counts; holds patients' images")]
Csv = Annotated[Path | None, typer.Option(help="the table below ROOT; its only CSV if left out", rich_help_panel=FOR_TABLES)]
ImageColumn = Annotated[str | None, typer.Option(help="image if left out", rich_help_panel=FOR_TABLES)]
ReportColumn = Annotated[str | None, typer.Option(help="text if left out", rich_help_panel=FOR_TABLES)]
LabelColumn = Annotated[str | None, typer.Option(help="labels if left out", rich_help_panel=FOR_TABLES)]
PatientColumn = Annotated[str | None, typer.Option(help="patient_id if left out", rich_help_panel=FOR_TABLES)]
SplitColumn = Annotated[str | None, typer.Option(help="split if left out", rich_help_panel=FOR_TABLES)]


def prepare(
    layout: Layout,
    root: Root,
    out: Out,
    stream: Stream = None,
    views: Views = None,
    sections: Sections = "findings,impression",
    phi: Phi = PhiChoice.quarantine,
    reports: Reports = None,
    unmarked: Unmarked = True,
    captures: Captures = False,
    keep_characteristics: KeepCharacteristics = False,
    encoding: Encoding = None,
    lang: Lang = "",
    part: Part = None,
    shares: Shares = "0.8,0.1,0.1",
    size: Size = 224,
    fit: Fit = "pad",
    normalise: Normalise = "standard",
    max_words: MaxWords = 128,
    labels: Labels = None,
    tokenizer: TokenizerFolder = None,
    key_file: KeyFile = Path("site.key"),
    max_bad_share: MaxBadShare = 0.2,
    workers: Workers = NUM_CORES,
    replace: Replace = False,
    fresh: Fresh = False,
    preview: Preview = None,
    csv: Csv = None,
    image_column: ImageColumn = None,
    text_column: ReportColumn = None,
    label_column: LabelColumn = None,
    patient_column: PatientColumn = None,
    split_column: SplitColumn = None,
) -> None:
    """Prepare a data set, or a hospital's own files, as a de-identified shard.

    `table` takes a CSV with image and/or text columns (PNG or JPEG, 8 or 16 bit), `dicom` any folder of DICOM files; the
    others are public data sets as their owners hand them out. What cannot be used is left out and counted by reason. A command
    that was interrupted goes on where it was when it is given again.

    Example:  fedmix prepare nih14 data/nih --stream image --size 96 --out shards/nih
    """
    from fedmix.data import prepare as preparing
    from fedmix.data.images import ImageOptions
    from fedmix.data.layouts.records import SourceOptions
    from fedmix.report.preview import check_place

    if preview is not None:
        check_place(preview, out)
    columns = {"image": image_column, "text": text_column, "labels": label_column}
    columns |= {"patient": patient_column, "split": split_column}
    given = {name: column for name, column in columns.items() if column is not None}
    _check_fits(layout, lang, has_table_options=bool(given or csv))
    options = preparing.PrepareOptions(
        image=ImageOptions(size=size, fit=fit, normalise=normalise),  # type: ignore[arg-type]  # checked by ImageOptions
        stream=stream.value if stream else None,
        sections=tuple(name.strip() for name in sections.split(",")),
        max_words=max_words,
        phi=phi.value,
        views=views.value if views else None,
        takes_unmarked=unmarked,
        takes_captures=captures,
        keeps_characteristics=keep_characteristics,
        max_bad_share=max_bad_share,
        replace=replace,
        fresh=fresh,
        split_shares=_shares(shares),
        part=_part(part),
    )
    source_options = SourceOptions(_label_names(labels), encoding, reports, lang)
    _prepare(
        lambda: _source(layout, root, source_options, csv, given),
        out,
        options,
        tokenizer=tokenizer,
        key_file=key_file,
        workers=workers,
    )
    if preview is not None:
        _look(out, preview)


def _check_fits(layout: LayoutChoice, lang: str, *, has_table_options: bool) -> None:
    """Raise ConfigError for options that this layout has no use for."""
    if layout is not LayoutChoice.table and has_table_options:
        raise ConfigError(f"--csv and the names of columns are for the layout table; {layout} knows its own, leave them out")
    if lang and layout not in (LayoutChoice.table, LayoutChoice.dicom):
        raise ConfigError(
            f"--lang is for the layouts table and dicom; {layout} knows the language of its reports, leave it out"
        )


def _prepare(
    open_source: Callable[[], Source],
    out: Path,
    options: PrepareOptions,
    *,
    tokenizer: Path | None,
    key_file: Path,
    workers: int,
) -> None:
    """Look through the data set and prepare it, with a bar that shows how far it is; then say what came of it."""
    from fedmix.data import prepare as preparing
    from fedmix.data.keys import site_key
    from fedmix.data.tokenizer import Tokenizer

    with _progress() as progress:
        task = progress.add_task("looking through", total=None)
        source = open_source()
        progress.update(task, description="preparing")
        summary = preparing.prepare(
            source,
            out,
            options=options,
            tokenizer=Tokenizer.load(tokenizer),
            key=site_key(key_file),
            workers=workers,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out_console.print(_summary_table(summary, out))


def _look(shard: Path, preview: Path) -> None:
    """Write what a person should look at before training."""
    from fedmix.data.shard import Shard
    from fedmix.report.preview import write_preview

    out_console.print(f"look at {write_preview(Shard.open(shard, verify=False), preview)}", soft_wrap=True, markup=False)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal)


def _source(layout: LayoutChoice, root: Path, options: SourceOptions, csv: Path | None, columns: dict[str, Any]) -> Source:
    from fedmix.data.layouts.paths import real_root
    from fedmix.data.layouts.registry import open_source
    from fedmix.data.layouts.table import TableColumns, TableOptions, table_source

    if layout is not LayoutChoice.table:
        return open_source(layout.value, root, options)
    return table_source(real_root(root), options, TableOptions(csv=csv, columns=TableColumns(**columns)))


def _shares(shares: str) -> tuple[float, float, float]:
    """The three numbers of ``--shares``; whether they add up is asked where they are used."""
    try:
        train, val, test = map(float, shares.split(","))
    except ValueError:
        raise ConfigError(f"--shares is {shares!r}; give three numbers that add up to 1, such as 0.8,0.1,0.1") from None
    return train, val, test


def _part(part: str | None) -> tuple[int, int] | None:
    """Which part of how many ``--part`` asks for."""
    if part is None:
        return None
    number, _, num_parts = part.partition("/")
    if not (number.isdecimal() and num_parts.isdecimal()):
        raise ConfigError(f"--part is {part!r}; give a part and how many there are, such as 1/3")
    return int(number), int(num_parts)


def _label_names(labels: str | None) -> tuple[str, ...] | None:
    """The findings that ``--labels`` asks for; None takes all that the data set names."""
    if labels is None:
        return None
    return () if labels == "none" else tuple(name.strip() for name in labels.split(","))


def _summary_table(summary: PrepareSummary, out: Path) -> Table:
    table = Table(title=Text(f"{out}: {summary.studies} studies of {summary.rows} rows in {summary.seconds:.1f} s"), box=None)
    table.add_column("what")
    table.add_column("count", justify="right")
    for stream, count in summary.written.items():
        table.add_row(f"{stream} studies", str(count))
    table.add_row("patients", str(summary.num_patients))
    for split, count in summary.splits.items():
        table.add_row(f"split {split}", str(count))
    for code, count in summary.quarantined.items():
        table.add_row(Text(f"left out: {code}", style="yellow"), str(count))
    for kind, count in summary.phi.items():
        table.add_row(Text(f"kept with {kind}", style="yellow"), str(count))
    for note in summary.notes:
        table.add_row(Text(note, style="dim"), "")
    return table
