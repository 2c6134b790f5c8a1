"""What Flower's programs are given: nothing that calls home, the programs beside this Python, and a home of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"

# Of an array that is sent. A broken line loses the two objects that are on their way, and each has to pass in Flower's 30 s:
# down to 0.6 Mbit/s. With Flower's own 5 MiB none does at 2 Mbit/s.
OBJECT_BYTES = 1 << 20

FLOWER_ENVIRONMENT = {  # flower.md: no telemetry, no update check, no installs of its own
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(OBJECT_BYTES),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def flower_environment(home: Path) -> dict[str, str]:
    """The whole environment of one of Flower's programs; ``home`` is made, and is where Flower keeps its own files.

    A proxy that is set is used for everything but this machine itself, which no proxy can reach.
    """
    home.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    own = {"PATH": path, "FLWR_HOME": str(home.absolute())}
    return {**os.environ, **FLOWER_ENVIRONMENT, **{name: _direct(name) for name in ("NO_PROXY", "no_proxy")}, **own}


def _direct(name: str) -> str:
    """The hosts that are reached without the proxy, this machine among them."""
    return ",".join([*filter(None, [os.environ.get(name)]), LOOPBACK, "localhost"])
