"""The run folder: what a run is, what happened, and a checkpoint of every committed round.

A round is committed in one rename: everything is written beside its place, flushed to the disk, and then appears whole.
Whatever a killed run leaves half-written is ignored and removed by the next one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmix import config
from fedmix.errors import RunError
from fedmix.federation.update import digest

NUM_CHECKPOINTS = 2  # the newest and the one before it, should the newest be damaged
LIBRARIES = ("fedmix", "flwr", "torch", "timm", "tokenizers", "numpy", "safetensors", "scikit-learn", "pydantic")

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Committed:
    """Where a run stands: rounds done, parameters, outer velocity, and the sums that go on (bytes, seconds, examples)."""

    round_number: int
    parameters: Parameters
    velocity: Parameters
    totals: dict[str, float]


class RunStore:
    """One run folder; see design.md for what is in it."""

    def __init__(self, folder: Path, experiment: config.Experiment, *, resume: bool) -> None:
        """Begin or take up a run. Raises RunError if the folder cannot be written or holds another or a finished run."""
        self.folder, self._experiment = folder, experiment
        self._checkpoints, self._metrics = folder / "checkpoints", folder / "metrics.jsonl"
        try:
            if resume:
                self._take_up()
            else:
                self._begin()
        except OSError as error:
            raise RunError(f"cannot write the run folder {folder}: {error.strerror}; choose another with --out") from None

    @property
    def run_id(self) -> str:
        """The run's identity on the wire and in the sites' state folders."""
        return str(self._manifest["run_id"])

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says."""
        return dict(self._manifest)

    def latest(self) -> Committed | None:
        """The newest checkpoint that is whole, or None before the first."""
        for folder in reversed(self._committed()):
            try:
                facts = json.loads((folder / "round.json").read_text())
                parameters = load_file(folder / "model.safetensors")
                velocity = load_file(folder / "velocity.safetensors")
            except (OSError, ValueError, SafetensorError):
                continue
            if digest(parameters) == facts["model_sha256"]:
                return Committed(int(facts["round"]), parameters, velocity, dict(facts["totals"]))
        if self._committed():
            raise RunError(f"every checkpoint in {self._checkpoints} is damaged; start the run anew without --resume")
        return None

    def commit(self, committed: Committed) -> None:
        """Write a round's checkpoint so that it is there whole or not at all, and drop the oldest."""
        name = f"round-{committed.round_number:05d}"
        partial, final = self._checkpoints / f".{name}.partial", self._checkpoints / name
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(committed.parameters, partial / "model.safetensors")
            save_file(committed.velocity, partial / "velocity.safetensors")
            facts = {"round": committed.round_number, "totals": committed.totals, "model_sha256": digest(committed.parameters)}
            (partial / "round.json").write_text(json.dumps(facts))
            for path in partial.iterdir():
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            _flush(self._checkpoints)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise RunError(
                f"cannot write the checkpoint of round {committed.round_number}: {reason}; the round before it is kept, "
                "make room and go on with --resume"
            ) from None
        for stale in self._committed()[:-NUM_CHECKPOINTS]:
            shutil.rmtree(stale, ignore_errors=True)

    def log(
        self, event: str, *, stage: str, round_number: int, site: str | None, values: Mapping[str, float]
    ) -> dict[str, Any]:
        """Append one row to metrics.jsonl and return it."""
        row = {
            "time": time.time(),
            "event": event,
            "stage": stage,
            "round": round_number,
            "site": site,
            "values": {name: float(value) for name, value in values.items()},
        }
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def finish(self, state: str, cause: str | None = None) -> None:
        """Say how the run ended: completed, failed and why, or running and therefore resumable."""
        self._manifest |= {"state": state, "cause": cause, "finished": time.time()}
        self._write_manifest()

    def _begin(self) -> None:
        if (self.folder / "manifest.json").exists():
            raise RunError(
                f"{self.folder} already holds a run; go on with --resume, choose another folder with --out, or remove it"
            )
        self._checkpoints.mkdir(parents=True)
        self._manifest = _manifest(self._experiment)
        self._write_manifest()
        (self.folder / "config.yaml").write_text(self._experiment.to_yaml())

    def _take_up(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            raise RunError(f"{self.folder} holds no run to resume; start it without --resume")
        try:
            self._manifest = json.loads(path.read_text())
        except ValueError:
            raise RunError(f"{path} is damaged; start the run anew in another folder") from None
        if self._manifest["fingerprint"] != self._experiment.fingerprint():
            raise RunError(
                "the experiment has changed since this run began (fingerprints differ), so going on would mix two "
                "experiments; restore the config, or start anew in another folder with --out"
            )
        self._checkpoints.mkdir(exist_ok=True)
        for partial in self._checkpoints.glob(".*.partial"):
            shutil.rmtree(partial)
        self._drop_lost_rows()
        self._manifest |= {"state": "running", "cause": None}
        self._write_manifest()

    def _drop_lost_rows(self) -> None:
        """Remove the rows of rounds that were never committed; they are about to happen again."""
        if not self._metrics.exists():
            return
        committed = self.latest()
        last = committed.round_number if committed else 0
        kept = []
        for line in self._metrics.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by the kill
            if row["round"] <= last:
                kept.append(line + "\n")
        _replace(self._metrics, "".join(kept))

    def _committed(self) -> list[Path]:
        return sorted(path for path in self._checkpoints.glob("round-*") if path.is_dir())

    def _write_manifest(self) -> None:
        _replace(self.folder / "manifest.json", json.dumps(self._manifest, indent=2) + "\n")


def _manifest(experiment: config.Experiment) -> dict[str, Any]:
    """Versions, seed, commit, fingerprint, hardware and state: what a reader needs to believe or repeat a run."""
    return {
        "schema": 1,
        "name": experiment.name,
        "run_id": f"{experiment.name}-{os.urandom(6).hex()}",
        "seed": experiment.seed,
        "fingerprint": experiment.fingerprint(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            "gpus": torch.cuda.device_count(),
        },
        "started": time.time(),
        "state": "running",
        "cause": None,
    }


def _commit() -> str | None:
    """The commit this code runs from, or None where it is installed without its repository."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    """Have the disk confirm a file or folder before something relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
