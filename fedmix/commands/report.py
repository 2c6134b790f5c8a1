"""`fedmix report`: a run's pages written anew, or a live one served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedmix.commands.consoles import out_console


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, such as runs/demo")],
    serve: Annotated[
        bool, typer.Option("--serve", help="show a page of the run that keeps itself up to date, on this machine, until Ctrl-C")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="that --serve listens on; 0 is any free one")] = 0,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write the run's curves there for TensorBoard, and nothing else")
    ] = None,
    mlflow: Annotated[
        Path | None, typer.Option(metavar="DIR", help="add the run's curves to mlflow.db there, and nothing else")
    ] = None,
) -> None:
    """Write report.html, report.md and model_card.md of a run (compare.html of a study) anew from its folder, or watch a run.

    Example:  fedmix report runs/demo

    Example, while it runs:  fedmix report runs/demo --serve

    Example, for TensorBoard:  fedmix report runs/demo --tensorboard logs
    """
    if serve:
        from fedmix.report import serving

        serving.serve(run, port, on_start=lambda address: _say(f"{address} shows {run}; Ctrl-C ends it"))
    elif tensorboard is not None or mlflow is not None:
        from fedmix.report import tracking

        if tensorboard is not None:
            _say(str(tracking.log_to_tensorboard(run, tensorboard)))
        if mlflow is not None:
            _say(str(tracking.log_to_mlflow(run, mlflow)))
    else:
        from fedmix.report.html import write_report, write_study
        from fedmix.report.study import is_study, read_study

        _say(str(write_study(run / "compare.html", [read_study(run)]) if is_study(run) else write_report(run)))


def _say(line: str) -> None:
    out_console.print(Text(line), soft_wrap=True)
