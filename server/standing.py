"""How a coordinator stands: whether its SuperLink serves, which sites are online, how far runs have come."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmix.disk import is_held
from fedmix.report.history import EVENTS
from server import certificates
from server.arrivals import Arrival, arrivals
from server.control import Node, connected, is_healthy
from server.home import Home


@dataclass(frozen=True)
class SiteStanding:
    """A registered site: online, offline, never seen, or pending until the SuperLink knows it. ``seen``: ISO 8601.

    ``arrival``: how much of an answer has come, if one is on its way.
    """

    name: str
    state: str
    seen: str
    arrival: Arrival | None = None


@dataclass(frozen=True)
class RunStanding:
    """A run folder: its state and cause, rounds committed of how many, and what last went wrong in it."""

    name: str
    state: str
    rounds: int
    last_error: str


@dataclass(frozen=True)
class Standing:
    """All of it. ``certificate_ends``: the day on which server.crt ends, and what to do where that is soon."""

    is_healthy: bool
    certificate_ends: str
    sites: tuple[SiteStanding, ...]
    runs: tuple[RunStanding, ...]


def standing(home: Home) -> Standing:
    """How the coordinator of a home stands now. Raises RunError if the SuperLink serves but does not answer."""
    healthy = is_healthy(home)
    nodes: dict[str, Node] = {}
    if healthy:
        with connected(home) as control:
            nodes = {node.site: node for node in control.nodes()}
    coming = arrivals(home.database)
    sites = (_site(name, nodes, healthy=healthy) for name in home.registered())
    return Standing(
        healthy,
        _ending(certificates.expires(home.certificate), datetime.datetime.now(datetime.UTC)),
        tuple(replace(site, arrival=coming.get(site.name)) for site in sites),
        tuple(_run(folder) for folder in sorted(home.runs.iterdir()) if folder.is_dir()),
    )


def _ending(ends: datetime.datetime, now: datetime.datetime) -> str:
    is_soon = ends - now < datetime.timedelta(days=certificates.RENEW_DAYS)
    return f"{ends:%Y-%m-%d}" + (
        "; stop the coordinator and start it again before then, which issues it anew" if is_soon else ""
    )


def _site(name: str, nodes: Mapping[str, Node], *, healthy: bool) -> SiteStanding:
    node = nodes.get(name)
    if node is None:
        return SiteStanding(name, "pending" if healthy else "unknown", "")
    return SiteStanding(name, "online" if node.is_online else "offline" if node.seen else "never seen", node.seen)


def _run(folder: Path) -> RunStanding:
    manifest: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((folder / "manifest.json").read_text())
    state = str(manifest.get("state", "not begun"))
    if state == "running" and not is_held(folder):
        state = "stopped"
    committed = sorted(path.name for path in (folder / "checkpoints").glob("round-*"))
    rounds = int(committed[-1].removeprefix("round-")) if committed else 0
    return RunStanding(folder.name, state, rounds, str(manifest.get("cause") or _last_trouble(folder)))


def _last_trouble(folder: Path) -> str:
    """The last site that was dropped or round that failed, as the run's rows tell it."""
    trouble = ""
    with contextlib.suppress(FileNotFoundError), (folder / EVENTS).open() as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row.get("event") in ("dropped", "failed"):
                    who = f", {row['site']}" if row["site"] else ""
                    trouble = f"round {row['round']}{who}: {row['why']}"
    return trouble
