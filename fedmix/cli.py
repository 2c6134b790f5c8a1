"""The front door: one command a door, errors as one sentence, and exit code 0 only for success.

Heavy rooms are imported inside the commands, so that ``--help`` and a misspelt key answer at once.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fedmix import config
from fedmix.__main__ import INTERRUPTED, STOPPED, importing
from fedmix.commands.audit import audit, canaries
from fedmix.commands.consoles import error_console, out_console
from fedmix.commands.prepare import prepare
from fedmix.commands.report import report
from fedmix.commands.screen import Screen
from fedmix.commands.server import server_app
from fedmix.commands.shard import shard_app
from fedmix.commands.site import site_app
from fedmix.errors import ConfigError, FedmixError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
config_app = typer.Typer(
    no_args_is_help=True, help="Look at experiment files.\n\nExample:  fedmix config show configs/demo.yaml"
)
app.command()(prepare)
app.command()(audit)
app.command()(canaries)
app.command()(report)
app.add_typer(shard_app, name="shard")
app.add_typer(site_app, name="site")
app.add_typer(config_app, name="config")
app.add_typer(server_app, name="server")


class Engine(StrEnum):
    """What runs under Flower's Grid."""

    inprocess = "inprocess"
    ray = "ray"
    superlink = "superlink"


@app.callback()
def _door() -> None:
    """Train one image-text model over hospitals that hold images, reports, or both, without sharing data.

    Start with:  fedmix simulate configs/demo.yaml
    """


@app.command()
def simulate(
    experiment_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="experiment as YAML, such as configs/demo.yaml")],
    out: Annotated[Path | None, typer.Option(help="run folder; runs/NAME if left out")] = None,
    engine: Annotated[Engine, typer.Option(help="what runs under Flower's Grid")] = Engine.inprocess,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one value")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    seed: Annotated[int | None, typer.Option(help="instead of the experiment's")] = None,
) -> None:
    """Train a whole federation on this machine, evaluate it and write a report.

    Example:  fedmix simulate configs/demo.yaml --set model.width=128 --out runs/wide
    """
    changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    experiment = config.load(experiment_file, changes)
    if engine is Engine.inprocess:
        from simulations import forkserver

        forkserver.start()  # the workers' imports run beside ours
    with importing():
        from fedmix.report.summary import read_report
        from fedmix.report.terminal import LiveView, final_table, remarks
        from simulations.run import simulate as run
        from simulations.study import run_study

    if not resume:
        _show_warm_start(experiment)
    folder = out or Path("runs") / experiment.name
    if experiment.study is not None:
        with LiveView(out_console) as live:
            page = run_study(experiment, folder, engine_name=engine.value, resume=resume, view=Screen(live))
        _show_studies([folder])
        out_console.print(Text(f"report: {page}"), soft_wrap=True)
        return
    with LiveView(out_console) as live:
        page = run(experiment, folder, engine_name=engine.value, resume=resume, view=Screen(live))
    report = read_report(folder)
    out_console.print(final_table(report), *remarks(report), sep="\n")
    if (ratio := report.timing.overhead_ratio) is not None:
        about = "wall time of the rounds over the time in which a site was training; 1 is none"
        out_console.print(Text(f"overhead ratio {ratio:.3f}: {about}"), soft_wrap=True)
    out_console.print(Text(f"report: {page}"), soft_wrap=True)


def _show_warm_start(experiment: config.Experiment) -> None:
    """Say once, before anything is drawn or trained, what the initial model takes from files."""
    if experiment.model.warm_start is None:
        return
    from fedmix.data.tokenizer import Tokenizer
    from fedmix.report.warm_start import warm_start_table
    from server.held_out import warm_started

    _, report = warm_started(experiment, Tokenizer.load(experiment.data.tokenizer))
    if report is not None:
        out_console.print(warm_start_table(report))


@app.command()
def phantom(
    preview: Annotated[Path | None, typer.Option(help="write a contact sheet of all looks as PNG")] = None,
    size: Annotated[int, typer.Option(min=48, max=512, help="pixels a side of the sheet's phantoms")] = 128,
    seed: Annotated[int, typer.Option(help="of the sheet")] = 0,
    looks: Annotated[bool, typer.Option("--looks", help="list the looks, one a line")] = False,
    experiment: Annotated[Path | None, typer.Option(help="experiment of which a site's phantoms are to be drawn")] = None,
    site: Annotated[str | None, typer.Option(help="that site, one of its data.sites")] = None,
    shard: Annotated[Path | None, typer.Option(help="the folder to write that site's prepared shard to")] = None,
) -> None:
    """Draw synthetic chest phantoms: what the simulations train on when no real data is at hand.

    Example:  fedmix phantom --preview phantoms.png

    Example, the shard of a site:  fedmix phantom --experiment configs/smoke.yaml --site north --shard shards/north
    """
    from fedmix.data.phantom import LOOKS, contact_sheet

    if experiment is not None and site is not None and shard is not None:
        from simulations.partition import draw_site

        draw_site(config.load(experiment).data, site, shard)
        out_console.print(Text(f"wrote {shard}"), soft_wrap=True)
    elif (experiment, site, shard) != (None, None, None):
        raise ConfigError("a site's phantoms take all three: --experiment CONFIG --site NAME --shard FOLDER")
    elif looks or preview is None:
        out_console.print("\n".join(LOOKS))
    if preview is not None:
        try:
            contact_sheet(size, seed).save(preview)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write {preview}: {error}; name a .png in a folder you may write") from None
        out_console.print(Text(f"wrote {preview}"), soft_wrap=True)


@config_app.command("schema")
def config_schema() -> None:
    """Print JSON Schema, so that an editor completes and checks experiment files.

    Example:  fedmix config schema > fedmix.schema.json
    """
    sys.stdout.write(json.dumps(config.json_schema(), indent=2) + "\n")


@config_app.command("show")
def config_show(
    experiment_file: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print an experiment with every default written out, and its fingerprint.

    Example:  fedmix config show configs/demo.yaml --set seed=3
    """
    experiment = config.load(experiment_file, overrides or [])
    sys.stdout.write(f"# fingerprint {experiment.fingerprint()}\n{experiment.to_yaml()}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="model folder, such as runs/demo/model")],
    data: Annotated[list[Path], typer.Option(help="prepared shard; give it again for more")],
    out: Annotated[Path, typer.Option(help="where evaluation.json goes")] = Path("evaluation"),
    image_size: Annotated[
        int | None, typer.Option(help="pixels a side of the shards' images, if the model's patch positions shall be resampled")
    ] = None,
    rerank_top: Annotated[
        int, typer.Option(min=0, help="candidates of each retrieval query that the match head orders anew; 0 is none")
    ] = 0,
    fine_tune_steps: Annotated[
        int, typer.Option(min=0, help="most steps of training the image encoder on each share of the labels; 0 is none")
    ] = 0,
    prompt_tune_steps: Annotated[
        int, typer.Option(min=0, help="steps of tuning prompts on each share of the labels; 0 is none")
    ] = 0,
) -> None:
    """Evaluate a model on the test split of prepared shards; their training split trains the probes.

    Example:  fedmix evaluate runs/demo/model --data shards/nih --out runs/nih
    """
    with importing():
        from fedmix.data.shard import Shard
        from fedmix.evaluation import suite
        from fedmix.model.folder import load_model
        from fedmix.report.files import write_json
        from server import held_out

    out.mkdir(parents=True, exist_ok=True)  # before minutes of work, if it cannot be
    loaded, sizes, tokenizer = load_model(model, image_size=image_size)
    studies = held_out.of_shards([Shard.open(path) for path in data], sizes.image_size, tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=None)
        result = suite.evaluate(
            loaded,
            studies,
            tokenizer=tokenizer,
            settings=suite.EvaluationSettings(
                rerank_top=rerank_top,
                fine_tune_steps=fine_tune_steps,
                prompt_tune_steps=prompt_tune_steps,
                trained_on=sizes.trained_on,
            ),
            on_progress=lambda name, done, total: progress.update(task, description=name, completed=done, total=total),
        )
    found = result.as_report()
    write_json(out / "evaluation.json", found)
    table = Table("measure", "value", box=None)
    for place, value in _headline(found):
        table.add_row(place, f"{value:.3f}")
    out_console.print(table)
    for place, why in found["skipped"].items():
        out_console.print(Text(f"left out: {place}: {why}"), soft_wrap=True)
    out_console.print(Text(f"wrote {out / 'evaluation.json'}"), soft_wrap=True)


class FitChoice(StrEnum):
    """How a picture that is not square becomes one."""

    pad = "pad"
    crop = "crop"


class NormaliseChoice(StrEnum):
    """What is done to a picture's grey values."""

    none = "none"
    standard = "standard"


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="model folder such as runs/demo/model, or the run's folder")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    fit: Annotated[FitChoice | None, typer.Option(help="how the sites' pictures were prepared; pad if left out")] = None,
    normalise: Annotated[
        NormaliseChoice | None, typer.Option(help="the same; none for phantoms and standard for shards if left out")
    ] = None,
    licence: Annotated[str, typer.Option(help="of the weights, as Hugging Face names it, such as apache-2.0")] = "unknown",
    replace: Annotated[bool, typer.Option("--replace", help="replace an exported model that is there")] = False,
) -> None:
    """Write a trained model as a Hugging Face style folder with a model card; `fedmix.load` in Python reads it.

    Example:  fedmix export runs/demo/model --out exported/demo
    """
    with importing():
        from fedmix.trained.export import export as write

    about = write(
        model,
        out,
        fit=fit.value if fit else None,
        normalise=normalise.value if normalise else None,
        licence=licence,
        replace=replace,
    )
    if about.preparation_is_assumed:
        assumed = f"--fit {about.preparation.fit} --normalise {about.preparation.normalise}"
        error_console.print(
            f"how the sites prepared pictures is not recorded; took {assumed}, say so if it was otherwise", soft_wrap=True
        )
    out_console.print(Text(f"wrote {out}"), soft_wrap=True)


def _headline(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an evaluation that a terminal has room for; evaluation.json has them all, with intervals."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in ("per_label", "chance"):
            yield from _headline(value, f"{place}{name}/")
        elif name in ("macro_auroc", "r@1", "r@10", "psnr_db", "ssim", "bits_per_token") and isinstance(value, float):
            yield place + name, value


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, or folders of studies")],
    out: Annotated[
        Path | None, typer.Option(help="also write it: .md, .html with drawings, .svg with a study's differences")
    ] = None,
) -> None:
    """Put runs side by side, or the methods of a study, with intervals over its seeds; an unfinished study too.

    Example:  fedmix compare runs/compare --out comparison.html
    """
    from fedmix.report.comparison import side_by_side
    from fedmix.report.html import write_comparison, write_study
    from fedmix.report.study import is_study, read_study
    from fedmix.report.terminal import grid_table

    are_studies = [is_study(run) for run in runs]
    if any(are_studies) and not all(are_studies):
        raise ConfigError("some of these folders hold a study and some a single run; compare studies, or runs")
    if all(are_studies):
        _show_studies(runs)
        page = None if out is None else write_study(out, [read_study(run) for run in runs])
    else:
        found = side_by_side(runs)
        if found.warning:
            out_console.print(Text(found.warning, style="yellow"))
        out_console.print(grid_table(found.grid, "run"))
        page = None if out is None else write_comparison(out, found)
    if page is not None:
        out_console.print(Text(str(page)), soft_wrap=True)


def _show_studies(folders: Sequence[Path]) -> None:
    from fedmix.report.comparison import compared
    from fedmix.report.study import read_study
    from fedmix.report.study_terminal import study_tables

    for folder in folders:
        for part in study_tables(compared(read_study(folder))):
            out_console.print(part)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="one bench; all if left out")] = None,
    case: Annotated[str | None, typer.Option(help="one case of it; all if left out")] = None,
) -> None:
    """Measure speed as ratios side by side in one run, one JSON line a case. Benches: step, federation, prepare, privacy.

    Example:  fedmix bench federation --case overhead
    """
    from simulations.bench.cases import BENCHES

    if name is not None and name not in BENCHES:
        raise ConfigError(f"no bench {name!r}; there are {', '.join(BENCHES)}")
    chosen = {each: cases for each, cases in BENCHES.items() if name in (None, each) and case in (None, *cases)}
    if not chosen:
        raise ConfigError(f"no case {case!r}; there are {', '.join(one for cases in BENCHES.values() for one in cases)}")
    for cases in chosen.values():
        for measure in [cases[case]] if case else cases.values():
            sys.stdout.write(json.dumps(measure()) + "\n")
            sys.stdout.flush()


def main() -> None:
    """Run the command line; what a user can mend is one sentence and exit code 1, Ctrl-C is 130."""
    try:
        code = app(standalone_mode=False)
    except FedmixError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that is a file: the user's to mend, and never a bug's traceback
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if type(error).__module__.split(".")[0] == "click":
            error.show()  # type: ignore[attr-defined]  # click's own usage errors know how to print themselves
            sys.exit(getattr(error, "exit_code", 2))
        raise
    if code == INTERRUPTED:  # typer returns it for Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one must not spoil the exit
        error_console.print(STOPPED, soft_wrap=True)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str) -> NoReturn:
    error_console.print(Text(f"fedmix: {sentence}"), soft_wrap=True)
    sys.exit(1)
