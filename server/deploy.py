"""The ServerApp that a SuperLink runs; ``fedmix.deployment.bundle`` names it to Flower."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.deployment import plan as plans
from fedmix.deployment.ledger import Ledger
from fedmix.errors import FedmixError, RunError
from fedmix.report.history import EVENTS
from server import held_out as central
from server.app import build_app
from server.books import Books
from server.gathering import Watch
from server.home import LEDGER, PLAN, RUNS
from server.link import LinkGrid
from server.store import RunStore

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")  # it comes over the Control API, so it never leads out of RUNS

STOPPED = "it was stopped; go on with --resume"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or take up, the run that the run config names."""
    folder = run_folder(context.run_config, os.environ)
    experiment = config.load(folder / "config.yaml")
    store = RunStore(folder, experiment, resume=(folder / "manifest.json").exists())
    tell = teller(folder, lambda row: print(json.dumps(dict(row)), flush=True))  # into the run's log (flwr log)
    try:
        held_out = None
        if experiment.evaluation.every:
            held_out = central.load(experiment.data, Tokenizer.load(experiment.data.tokenizer))
        books = books_of(folder, os.environ)
        server_app = build_app(experiment, store, watch=tell, held_out=held_out, evaluates_beside=True, books=books)
        server_app(LinkGrid(grid), context)
    except (FedmixError, OSError) as error:
        store.finish("failed", str(error))
        raise
    except RunNotRunningException:
        store.finish("failed", STOPPED)
        raise


def run_folder(run_config: Mapping[str, object], environment: Mapping[str, str]) -> Path:
    """The folder of the run that was asked for; the name alone travels to the sites, never a path of the server."""
    name = str(run_config.get("run", ""))
    if not RUN_NAME.fullmatch(name):
        raise RunError(
            f"the run config's run should name a run folder, it is {name!r}; start with: flwr run --run-config 'run=\"NAME\"'"
        )
    if RUNS not in environment:
        raise RunError(f"{RUNS} is not set; start flower-superexec with the folder of run folders in it")
    folder = Path(environment[RUNS]) / name
    if not (folder / "config.yaml").exists():
        raise RunError(f"there is no run {name!r} with a config.yaml in the folder that {RUNS} names")
    return folder


def books_of(folder: Path, environment: Mapping[str, str]) -> Books | None:
    """The books of a run that follows a plan, which stands in its folder; a simulation has neither. Raises RunError."""
    if not (folder / PLAN).exists():
        return None
    if LEDGER not in environment:
        raise RunError(f"{LEDGER} is not set; start flower-superexec with the coordinator's ledger in it")
    ledger, plan = Ledger(Path(environment[LEDGER])), folder / PLAN
    return Books(ledger, plans.digest(plan), plans.read(plan).keys)


def teller(folder: Path, show: Watch) -> Watch:
    """What shows each row, and keeps it as a line of JSON in a file of the run folder for whoever else watches."""

    def tell(row: Mapping[str, Any]) -> None:
        show(row)
        with (folder / EVENTS).open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    return tell
