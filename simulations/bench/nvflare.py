"""NVFLARE's simulator on the same work, in a virtual environment of its own: its libraries are not ours to install beside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fedmix.errors import RunError
from simulations.bench.trivial import Size

VERSION = "2.9.0"
JOB = Path(__file__).parent / "nvflare_job/job.py"
INSTALL_S, RUN_S = 900, 900


def environment() -> Path:
    """The Python of an environment that holds NVFLARE, made on first use. Raises RunError where it cannot be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fedmix" / f"nvflare-{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"
    python, ready = folder / "bin/python", folder / "ready"
    if ready.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _must_do([sys.executable, "-m", "venv", str(folder)], "no environment for NVFLARE could be made")
    _must_do([str(python), "-m", "pip", "install", "--quiet", f"nvflare=={VERSION}", "numpy>=2"], "NVFLARE cannot be installed")
    ready.touch()
    return python


def run(python: Path, size: Size, folder: Path) -> float:
    """Wall of the work in seconds. Raises RunError if NVFLARE does not come to its end with the right model."""
    folder.mkdir(parents=True)
    command = [str(python), str(JOB), str(folder), str(size.num_sites), str(size.num_rounds), str(size.num_values)]
    started = time.perf_counter()
    _must_do(command, "NVFLARE's simulator failed", RUN_S)
    return time.perf_counter() - started


def _must_do(command: list[str], trouble: str, timeout_s: float = INSTALL_S) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # ours are not its libraries
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired:
        raise RunError(f"{trouble}: not done after {timeout_s:.0f} s") from None
    if ended.returncode:
        raise RunError(f"{trouble}: {(ended.stderr.strip() or 'no word').splitlines()[-1]}")
