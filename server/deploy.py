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

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import FedmixError, RunError
from server import held_out as central
from server.app import build_app
from server.link import LinkGrid
from server.store import RunStore

RUNS = "FEDMIX_RUNS"  # the environment variable of flower-superexec that names the folder of run folders
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")  # it comes over the Control API, so it never leads out of RUNS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or take up, the run that the run config names."""
    folder = run_folder(context.run_config, os.environ)
    experiment = config.load(folder / "config.yaml")
    store = RunStore(folder, experiment, resume=(folder / "manifest.json").exists())
    try:
        held_out = None
        if experiment.evaluation.every:
            held_out = central.load(experiment.data, Tokenizer.load(experiment.data.tokenizer))
        build_app(experiment, store, watch=tell, held_out=held_out, evaluates_beside=True)(LinkGrid(grid), context)
    except (FedmixError, OSError) as error:
        store.finish("failed", str(error))
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


def tell(row: Mapping[str, Any]) -> None:
    """A row for whoever reads the run's log (flwr log): one line of JSON."""
    print(json.dumps(dict(row)), flush=True)
