"""Curves for TensorBoard and MLflow, read back by their own readers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import SITES, metrics_rows

from fedmix.errors import RunError
from fedmix.report import tracking
from fedmix.report.history import read_history


def expected(site: str, metric: str) -> list[tuple[int, float]]:
    return [(row["round"], row["values"][metric]) for row in metrics_rows() if row["site"] == site and metric in row["values"]]


def test_names_tell_sites_rounds_and_evaluations_apart(run_dir: Path) -> None:
    found = list(tracking.scalars(read_history(run_dir / "metrics.jsonl")))
    assert {one.name.split("/")[0] for one in found} == {*SITES, "round", "evaluation"}
    assert [(one.round, one.value) for one in found if one.name == "north/train/mvm/loss"] == expected(
        "north", "train/mvm/loss"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_every_curve_back(run_dir: Path, tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    place = tracking.log_to_tensorboard(run_dir, tmp_path / "logs")
    assert place == tmp_path / "logs" / "demo"
    back = reading.EventAccumulator(str(place), size_guidance={"scalars": 0})
    back.Reload()
    assert {"north/train/mvm/loss", "round/time/round_s", "evaluation/retrieval/r@10"} <= set(back.Tags()["scalars"])
    found = [(one.step, one.value) for one in back.Scalars("north/train/mvm/loss")]
    assert found == [(number, pytest.approx(value)) for number, value in expected("north", "train/mvm/loss")]
    with pytest.raises(RunError, match="drawn twice"):
        tracking.log_to_tensorboard(run_dir, tmp_path / "logs")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_every_curve_and_the_manifest_back(run_dir: Path, tmp_path: Path) -> None:
    client_of = pytest.importorskip("mlflow.tracking").MlflowClient
    database = tracking.log_to_mlflow(run_dir, tmp_path / "logs")
    client = client_of(tracking_uri=f"sqlite:///{database}")
    (found,) = client.search_runs([client.get_experiment_by_name("fedmix").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["versions.torch"] == "2.11.0"
    assert "evaluation/retrieval/r_10" in found.data.metrics
    curve = client.get_metric_history(found.info.run_id, "north/train/mvm/loss")
    assert sorted((one.step, one.value) for one in curve) == expected("north", "train/mvm/loss")


@pytest.mark.parametrize(
    ("log", "package", "name"),
    [
        (tracking.log_to_tensorboard, "torch.utils.tensorboard", "TensorBoard"),
        (tracking.log_to_mlflow, "mlflow.entities", "MLflow"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_what_installs_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[Path, Path], Path], package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=rf"{name} is not installed; install it with: pip install 'fedmix\[tracking\]'"):
        log(run_dir, run_dir / "logs")
