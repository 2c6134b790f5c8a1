"""A run's curves for TensorBoard or MLflow, written from its folder: during the run or after it, and without the run knowing.

Both are optional packages (`pip install 'fedmix[tracking]'`). Everything goes into a folder of this machine: no server is
asked, and MLflow's reports on its own use are switched off. Names begin with the site, or with what they are of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedmix.errors import RunError
from fedmix.report.history import History, read_history
from fedmix.report.page import read_manifest

EVENTS_SHOWN = ("site", "round", "evaluation")  # not "aggregate": hundreds of weights and cosines a round
BATCH = 1000  # metrics that MLflow takes at a time
EXPERIMENT = "fedmix"


class Scalar(NamedTuple):
    """One value of a curve; ``time`` in unix seconds."""

    name: str
    round: int
    value: float
    time: float


def scalars(history: History) -> Iterator[Scalar]:
    """Every number of sites, rounds and central evaluations, such as ``north/train/mvm/loss``."""
    for entry in history.entries:
        if entry.event in EVENTS_SHOWN:
            for name, value in entry.values.items():
                yield Scalar(f"{entry.site or entry.event}/{name}", entry.round, value, entry.time or 0.0)


def log_to_tensorboard(run_dir: Path, folder: Path) -> Path:
    """Write event files into ``folder`` under the run's name; returns where. Raises RunError if they are there already."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("TensorBoard is not installed; install it with: pip install 'fedmix[tracking]'") from None
    found = _found(run_dir)
    place = folder / run_dir.resolve().name
    if place.exists():
        raise RunError(f"{place} is there already, and its curves would be drawn twice; remove it or name another folder")
    with SummaryWriter(str(place)) as writer:
        for one in found:
            writer.add_scalar(one.name, one.value, one.round, walltime=one.time)
    return place


def log_to_mlflow(run_dir: Path, folder: Path) -> Path:
    """Add an MLflow run to ``folder``/mlflow.db, with the manifest as its tags; returns the database."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    try:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise RunError("MLflow is not installed; install it with: pip install 'fedmix[tracking]'") from None
    found = [Metric(_plain(one.name), one.value, round(one.time * 1000), one.round) for one in _found(run_dir)]
    folder.mkdir(parents=True, exist_ok=True)
    database = folder.resolve() / "mlflow.db"
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    known = client.get_experiment_by_name(EXPERIMENT)
    number = known.experiment_id if known else client.create_experiment(EXPERIMENT, (database.parent / "artifacts").as_uri())
    tags = {_plain(path.replace(" / ", ".")): value for path, value in read_manifest(run_dir)}
    begun = client.create_run(number, run_name=run_dir.resolve().name, tags=tags).info.run_id
    for start in range(0, len(found), BATCH):
        client.log_batch(begun, metrics=found[start : start + BATCH])
    client.set_terminated(begun)
    return database


def _found(run_dir: Path) -> list[Scalar]:
    found = list(scalars(read_history(run_dir / "metrics.jsonl")))
    if not found:
        raise RunError(f"{run_dir} holds no numbers yet: metrics.jsonl is empty or absent; give the folder of a run")
    return found


def _plain(name: str) -> str:
    """A name as MLflow takes it, which knows no ``@``."""
    return re.sub(r"[^\w\-. :/]", "_", name)
