"""A round's job in several processes of this machine: started here, watched, and brought home as one update.

They are plain child processes. torchrun's agent would listen on every interface of the machine and take over the signals of
the process that it runs in, and workers of a pool may not have children of multiprocessing's. Nothing here opens a port that
another machine could reach: the processes meet at a file in a folder of this user's alone, and talk over loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmix.errors import RunError
from fedmix.federation.optimisers import OptimiserState
from fedmix.federation.update import Update

PREFIX = ".ranks-"  # begins the names of the folders that jobs lie in; no run's folder begins with a dot
MEETING, TASK, GIVEN, FOUND, RESULT, REFUSED = (
    "meeting",
    "task.json",
    "given.safetensors",
    "found.safetensors",
    "result.json",
    "refused",
)
POLL_S = 0.05


@dataclass(frozen=True)
class Task:
    """What every process of a job is told, in values that JSON holds: whose job, and which steps of which stage."""

    site: str
    experiment: str
    shard: str
    stage: str
    first_step: int
    second_moments: dict[str, float]
    total: int
    timeout_s: float


def train(
    task: Task, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, state: Path
) -> tuple[Update, OptimiserState]:
    """``local.train`` by ``task.total`` processes; raises RunError when one of them fails or all are not done in time.

    What they write lies in the site's state folder, and is removed.
    """
    state.mkdir(parents=True, exist_ok=True)
    for left in state.glob(f"{PREFIX}*"):  # by a job that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=state) as name:
        folder = Path(name)
        (folder / TASK).write_text(json.dumps(asdict(task)))
        save(folder / GIVEN, parameters=parameters, moments=moments)
        try:
            _run(folder, task)
        except RunError:
            logs = [path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))]
            (state / "last_error.txt").write_text("\n".join(logs))
            raise
        deltas, kept = load(folder / FOUND, "parameters"), load(folder / FOUND, "moments")
        result = json.loads((folder / RESULT).read_text())
    metrics = {name: (total, weight) for name, (total, weight) in result["metrics"].items()}
    return Update(task.site, deltas, result["examples"], result["steps"], metrics, result["second_moments"]), kept


def save(path: Path, **parts: Mapping[str, Tensor]) -> None:
    """Tensors of several mappings as one file."""
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)


def load(path: Path, part: str) -> dict[str, Tensor]:
    """One of the mappings that ``save`` wrote."""
    return {name.removeprefix(f"{part}/"): value for name, value in load_file(path).items() if name.startswith(f"{part}/")}


def _run(folder: Path, task: Task) -> None:
    """Start the processes and wait for all of them; when one fails, or time is up, none is left."""
    processes = [_start(folder, number) for number in range(task.total)]
    deadline = time.monotonic() + task.timeout_s
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() > deadline:
                raise RunError(
                    f"this site's {task.total} processes were not done after {task.timeout_s:g} s; "
                    "raise federation.deadline_s, or lower the stage's local_steps"
                )
            time.sleep(POLL_S)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.communicate()
    _check(folder, codes)


def _start(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """A process of its own group, which ends when its input does: with this process, however that ends."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    with (folder / f"{number}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "client.rank", str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            process_group=0,
        )


def _check(folder: Path, codes: Sequence[int | None]) -> None:
    """Raise what the process that failed first had to say; the others fail because it did."""
    refusals = sorted(folder.glob(f"{REFUSED}-*"))
    if refusals:
        raise RunError(refusals[0].read_text())
    failed = {number: code for number, code in enumerate(codes) if code}
    if failed:
        number, code = min(failed.items(), key=lambda item: (item[1] > 0, item[0]))  # a signal comes from outside
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RunError(
            f"process {number} of this site's {len(codes)} ended early ({how}); "
            "last_error.txt in its state folder has the details"
        )
