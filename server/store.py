"""The run folder: what a run is, what happened, and a checkpoint of every committed round.

A round is committed in one rename: everything is written beside its place, flushed to the disk, and then appears whole.
Whatever a killed run leaves half-written is ignored and removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmix import config
from fedmix.disk import flush, reason_of, write_whole
from fedmix.errors import RunError
from fedmix.federation.update import digest
from fedmix.model import pretrained

NUM_CHECKPOINTS = 2  # the newest and the one before it, should the newest be damaged
LIBRARIES = ("fedmix", "flwr", "torch", "timm", "tokenizers", "numpy", "safetensors", "scikit-learn", "pydantic")

Parameters = dict[str, Tensor]
Row = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Committed:
    """Where a run stands: everything the next round depends on, written in one commit.

    ``outer``: the server's optimiser, "<moment>/<parameter>" -> tensor. ``totals``: sums that go on (bytes, seconds, examples).
    ``screening``: what refusals remember (fedmix/federation/screening.py). ``second_moments``: the sites' mean of AdamW's v.
    Which sites a round asks and what they draw follows from seed and round, so no random state is kept.
    """

    round_number: int
    parameters: Parameters
    outer: Parameters
    totals: dict[str, float]
    screening: dict[str, Any] = field(default_factory=dict)
    second_moments: dict[str, float] = field(default_factory=dict)


class RunStore:
    """One run folder; server/README.md says what is in it."""

    _earlier_s: float
    _manifest: dict[str, Any]
    _unlock: Callable[[], object]
    damaged: tuple[str, ...] = ()  # checkpoints newer than ``latest`` that cannot be read; their rounds happen again

    def __init__(self, folder: Path, experiment: config.Experiment, *, resume: bool) -> None:
        """Begin or take up a run. Raises RunError if the folder cannot be written, is in use, or holds another run."""
        self.folder, self._experiment = folder, experiment
        self._checkpoints, self._metrics = folder / "checkpoints", folder / "metrics.jsonl"
        self._opened = time.time()
        try:
            if resume:
                self._take_up()
            else:
                self._begin()
        except OSError as error:
            raise RunError(f"cannot write the run folder {folder}: {reason_of(error)}; choose another with --out") from None

    @property
    def run_id(self) -> str:
        """The run's identity on the wire and in the sites' state folders."""
        return str(self._manifest["run_id"])

    @property
    def spool_folder(self) -> Path:
        """Where a round's updates are kept until they are added up."""
        return self.folder / "spool"

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says."""
        return dict(self._manifest)

    @property
    def wall_s(self) -> float:
        """Seconds this run has taken so far: since it was opened, and up to the checkpoint it was taken up from."""
        return self._earlier_s + time.time() - self._opened

    def latest(self) -> Committed | None:
        """The newest checkpoint that is whole, or None before the first."""
        folders = self._committed()
        self.damaged = ()
        for folder in reversed(folders):
            committed = _read_checkpoint(folder)
            if committed is not None:
                return committed
            self.damaged = (*self.damaged, folder.name)
        if folders:
            raise RunError(f"every checkpoint in {self._checkpoints} is damaged; start anew in another folder with --out")
        return None

    def commit(self, committed: Committed) -> None:
        """Write a round's checkpoint so that it is there whole or not at all, and drop the oldest."""
        name = f"round-{committed.round_number:05d}"
        partial, final = self._checkpoints / f".{name}.partial", self._checkpoints / name
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_checkpoint(partial, committed, wall_s=self.wall_s, fingerprint=self._manifest["fingerprint"])
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, which the run fell back from
            os.rename(partial, final)
            flush(self._checkpoints)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write the checkpoint of round {committed.round_number}: {reason_of(error)}; the round before it "
                "is kept, make room and go on with --resume"
            ) from None
        for stale in self._committed()[:-NUM_CHECKPOINTS]:
            shutil.rmtree(stale, ignore_errors=True)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let another process take the run up; meanwhile this one only waits, and then reads what was committed."""
        self._unlock()
        try:
            yield
        finally:
            self._lock()

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows to metrics.jsonl."""
        try:
            with self._metrics.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())  # a round is committed after its rows, and has them even if the power fails
        except OSError as error:
            raise RunError(
                f"cannot write {self._metrics}: {error.strerror}; make room and go on with --resume, no committed round is lost"
            ) from None

    def has_row(self, event: str, round_number: int) -> bool:
        """Whether metrics.jsonl already tells this of a round."""
        return any(row["event"] == event and row["round"] == round_number for row in self._rows())

    def finish(self, state: str, cause: str | None = None) -> None:
        """Say how the run ended: completed, failed and the cause, or running and therefore resumable."""
        self._manifest |= {"state": state, "cause": cause, "finished": time.time()}
        with contextlib.suppress(OSError):  # on a full disk the reason that is on its way to the user counts more
            self._write_manifest()

    def _begin(self) -> None:
        if (self.folder / "manifest.json").exists() and not self._failed_before_training():
            raise RunError(
                f"{self.folder} already holds a run; go on with --resume, choose another folder with --out, or remove it"
            )
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._metrics.unlink(missing_ok=True)
        self._earlier_s = 0.0
        write_whole(self.folder / "config.yaml", self._experiment.to_yaml())
        # Last, because a folder with a manifest is a run.
        self._manifest = _manifest(self._experiment)
        self._write_manifest()

    def _failed_before_training(self) -> bool:
        """Whether the run in this folder stopped on an error before its first checkpoint: there is nothing to lose."""
        try:
            return bool(json.loads((self.folder / "manifest.json").read_text())["state"] == "failed") and not self._committed()
        except (ValueError, KeyError, TypeError):
            return False

    def _take_up(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            raise RunError(f"{self.folder} holds no run to resume; start it without --resume")
        self._lock()
        try:
            self._manifest = dict(json.loads(path.read_text()))
            began_with = self._manifest["fingerprint"], self._manifest["run_id"]
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path} is damaged; start the run anew in another folder with --out") from None
        self._check_unchanged(began_with[0])
        self._checkpoints.mkdir(exist_ok=True)
        for partial in self._checkpoints.glob(".*.partial"):
            shutil.rmtree(partial)
        shutil.rmtree(self.spool_folder, ignore_errors=True)
        committed = self.latest()
        self._drop_lost_rows(committed.round_number if committed else 0)
        self._earlier_s = committed.totals.get("wall_s", 0.0) if committed else 0.0
        # What the fingerprint leaves out may differ: paths, workers, deadlines, evaluation.
        write_whole(self.folder / "config.yaml", self._experiment.to_yaml())
        self._manifest |= {"state": "running", "cause": None}
        self._write_manifest()

    def _check_unchanged(self, fingerprint: str) -> None:
        """Raise RunError unless the experiment, and the files that it starts from, are those that the run began with."""
        if fingerprint != self._experiment.fingerprint():
            raise RunError(
                f"the experiment has changed since the run in {self.folder} began (fingerprints differ), so going on would "
                "mix two experiments; restore the config, or start anew in another folder with --out"
            )
        if self._manifest.get("warm_start", {}) != warm_start_hashes(self._experiment):
            raise RunError(
                f"the files of model.warm_start are not those that the run in {self.folder} began with (hashes differ); put "
                "them back, or start anew in another folder with --out"
            )

    def _lock(self) -> None:
        """Keep the folder to this process while it lives; the kernel lets go of it however the process ends."""
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(f"the run in {self.folder} is going on in another process; wait for it, or stop it first") from None
        except OSError:
            pass  # a file system without locks

    def _drop_lost_rows(self, last: int) -> None:
        """Remove the rows of rounds that were never committed; they are about to happen again."""
        if self._metrics.exists():
            write_whole(self._metrics, "".join(json.dumps(row) + "\n" for row in self._rows() if row["round"] <= last))

    def _rows(self) -> list[Row]:
        """The rows of metrics.jsonl that are whole; a kill may have torn the last one."""
        if not self._metrics.exists():
            return []
        found = []
        for line in self._metrics.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("round"), int) and "event" in row:
                    found.append(row)
        return found

    def _committed(self) -> list[Path]:
        return sorted(path for path in self._checkpoints.glob("round-*") if path.is_dir())

    def _write_manifest(self) -> None:
        write_whole(self.folder / "manifest.json", json.dumps(self._manifest, indent=2) + "\n")


def row_of(event: str, *, stage: str, round_number: int, site: str | None, values: Mapping[str, float]) -> Row:
    """A line of metrics.jsonl, as of now."""
    return {
        "time": time.time(),
        "event": event,
        "stage": stage,
        "round": round_number,
        "site": site,
        "values": {name: float(value) for name, value in values.items()},
    }


def _write_checkpoint(folder: Path, committed: Committed, *, wall_s: float, fingerprint: str) -> None:
    save_file(committed.parameters, folder / "model.safetensors")
    save_file(committed.outer, folder / "outer.safetensors")
    facts = {
        "round": committed.round_number,
        "fingerprint": fingerprint,
        "totals": committed.totals | {"wall_s": wall_s},
        "screening": committed.screening,
        "second_moments": committed.second_moments,
        "model_sha256": digest(committed.parameters),
        "outer_sha256": digest(committed.outer),
    }
    text = json.dumps(facts)
    (folder / "round.json").write_text(text)
    (folder / "round.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    for path in (*folder.iterdir(), folder):
        flush(path)


def _read_checkpoint(folder: Path) -> Committed | None:
    """A checkpoint, or None if any of its files is missing, cut short or changed."""
    try:
        text = (folder / "round.json").read_text()
        if hashlib.sha256(text.encode()).hexdigest() != (folder / "round.sha256").read_text():
            return None
        facts = json.loads(text)
        parameters = load_file(folder / "model.safetensors")
        outer = load_file(folder / "outer.safetensors")
        if (digest(parameters), digest(outer)) != (facts["model_sha256"], facts["outer_sha256"]):
            return None
        return Committed(
            int(facts["round"]),
            parameters,
            outer,
            dict(facts["totals"]),
            dict(facts["screening"]),
            dict(facts["second_moments"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def warm_start_hashes(experiment: config.Experiment) -> dict[str, str]:
    """SHA-256 of the files of model.warm_start by role, empty without one; the fingerprint knows nothing of paths."""
    files = experiment.model.warm_start
    return {} if files is None else pretrained.hashes(files.image, files.text, files.model)


def _manifest(experiment: config.Experiment) -> dict[str, Any]:
    """Versions, seed, commit, fingerprint, hardware and state: what a reader needs to believe or repeat a run."""
    return {
        "schema": 1,
        "name": experiment.name,
        "run_id": f"{experiment.name}-{os.urandom(6).hex()}",
        "seed": experiment.seed,
        "fingerprint": experiment.fingerprint(),
        "warm_start": warm_start_hashes(experiment),
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


@lru_cache(maxsize=1)
def _commit() -> str | None:
    """The commit this code runs from, or None where it is installed without its repository."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
