"""How a run stands now, for a page that keeps itself up to date: going on, ended, failed, or left by its process.

Everything is read from the run folder, so the page can be opened and closed without the run noticing, and the run's
process may be on this machine or gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmix import config
from fedmix.disk import is_held
from fedmix.errors import ConfigError, RunError
from fedmix.report import charts, learning, quantities
from fedmix.report.files import read_json
from fedmix.report.history import EVENTS, History, Trouble, read_so_far
from fedmix.report.learning import Section
from fedmix.report.pages import environment
from fedmix.report.progress import Progress, SiteState

MAX_TROUBLES = 12  # the newest
MAX_WHY = 400  # characters of a reason
FILES = ("manifest.json", "metrics.jsonl", EVENTS)  # whose change changes the page


@dataclass(frozen=True)
class SiteRow:
    """One site as the table shows it; ``round`` is the last one it sent an update in."""

    name: str
    stream: str
    state: str
    round: str
    losses: str
    bytes_up: str
    bytes_down: str
    train_s: str


@dataclass(frozen=True)
class Now:
    """Everything the page draws."""

    name: str
    state: str  # running, stopped, completed or failed
    sentence: str
    facts: tuple[tuple[str, str], ...]
    round: int
    total_rounds: int
    sites: tuple[SiteRow, ...]
    troubles: tuple[Trouble, ...]  # newest first
    num_troubles: int
    losses: Section
    central: Section


class LivePage:
    """The page of a run folder, drawn anew when a file in it has changed or its process has gone."""

    def __init__(self, run_dir: Path) -> None:
        """Raises RunError if the folder holds no run."""
        self._run_dir = run_dir
        self._seen: object = None
        self._drawn = ""
        read_now(run_dir)

    def whole(self) -> str:
        """The page with what is known now in it, so that it says something without its script too."""
        return environment().get_template("live.html.j2").render(name=self._run_dir.resolve().name, now=self.now())

    def now(self) -> str:
        """What changes of the page; a run folder that cannot be read at the moment is a sentence on it."""
        seen = (*(_stamp(self._run_dir / name) for name in FILES), is_held(self._run_dir))
        if seen != self._seen:
            template = environment().get_template("now.html.j2")
            try:
                found, problem = read_now(self._run_dir), ""
            except RunError as error:
                found, problem = None, str(error)
            self._drawn = template.render(now=found, problem=problem, charts=charts, streams=learning.STREAMS)
            self._seen = seen
        return self._drawn


def read_now(run_dir: Path) -> Now:
    """How a run stands; raises RunError if the folder holds no run, or a damaged one."""
    manifest = read_json(run_dir / "manifest.json")
    if not isinstance(manifest, Mapping):
        raise RunError(
            f"{run_dir} holds no run yet: no manifest.json; give the folder of a run that has begun, of a study one in it"
        )
    history, troubles = read_so_far(run_dir)
    planned = _planned(run_dir / "config.yaml")
    progress = _progress(history, planned)
    stream_of = {name: site.stream for name, site in progress.sites.items()}
    state = _state(manifest, run_dir)
    return Now(
        name=str(manifest.get("name") or run_dir.name),
        state=state,
        sentence=_sentence(state, str(manifest.get("cause") or ""), progress),
        facts=tuple(_facts(manifest, progress, history, is_under_way=state == "running", num_troubles=len(troubles))),
        round=progress.round,
        total_rounds=progress.total_rounds,
        sites=tuple(_row(name, site, troubles) for name, site in progress.sites.items()),
        troubles=tuple(Trouble(one.round, one.site, one.why[:MAX_WHY]) for one in troubles[: -MAX_TROUBLES - 1 : -1]),
        num_troubles=len(troubles),
        losses=learning.losses(history, stream_of),
        central=learning.central(history),
    )


def _stamp(path: Path) -> tuple[int, int]:
    """When a file last changed, and its size; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _planned(path: Path) -> config.Experiment | None:
    """The run's experiment; None for one that this fedmix cannot read: its sites then appear as they report."""
    try:
        return config.load(path)
    except ConfigError:
        return None


def _progress(history: History, planned: config.Experiment | None) -> Progress:
    """All rows taken in one by one, as a terminal would have seen them."""
    streams: dict[str, str] = {site.name: site.stream for site in planned.data.sites} if planned else {}
    streams |= {name: found for name, found in history.streams().items() if name not in streams}
    progress = Progress(planned.num_rounds if planned else 0, {name: SiteState(stream) for name, stream in streams.items()})
    for entry in history.entries:
        progress.add(entry)
    return progress


def _state(manifest: Mapping[str, Any], run_dir: Path) -> str:
    state = str(manifest.get("state"))
    if state in ("completed", "failed"):
        return state
    return "running" if is_held(run_dir) else "stopped"


def _sentence(state: str, cause: str, progress: Progress) -> str:
    if state == "completed":
        return "The run is completed; its report is in the run folder."
    if state == "failed":
        return f"This run failed: {(cause or 'it recorded no cause').rstrip('.')}."
    if state == "stopped":
        return "No process works in the run folder: the run was stopped, or is just being started. It goes on with --resume."
    if progress.total_rounds and progress.round >= progress.total_rounds:
        return "All rounds are done; evaluation and other methods follow."
    return "A process works on it."


def _facts(
    manifest: Mapping[str, Any], progress: Progress, history: History, *, is_under_way: bool, num_troubles: int
) -> list[tuple[str, str]]:
    started = manifest.get("started")
    left = progress.seconds_left()
    has_rounds_left = is_under_way and 0 < progress.round < progress.total_rounds
    facts = {
        "stage": progress.stage,
        "started": quantities.moment(started) if isinstance(started, float | str) else "",
        "last word": _clock(max((entry.time for entry in history.entries if entry.time is not None), default=None)),
        "last round took": quantities.duration(progress.round_seconds) if progress.round_seconds is not None else "",
        "left": f"about {quantities.duration(left)}" if left is not None and has_rounds_left else "",
        "sent by all sites": quantities.size(progress.bytes_up()),
        "dropped or failed": str(num_troubles or ""),
    }
    return [(name, text) for name, text in facts.items() if text]


def _clock(moment: float | None) -> str:
    """A moment of unix seconds to the second, in UTC: a page that is looked at while it changes needs no day."""
    return "" if moment is None else f"{datetime.fromtimestamp(moment, tz=UTC):%H:%M:%S} UTC"


def _row(name: str, site: SiteState, troubles: Sequence[Trouble]) -> SiteRow:
    last_trouble = max((one.round for one in troubles if one.site == name), default=0)
    return SiteRow(
        name=name,
        stream=site.stream,
        state="dropped" if last_trouble > (site.round or 0) else site.state,
        round=quantities.DASH if site.round is None else str(site.round),
        losses=", ".join(f"{objective} {value:.3g}" for objective, value in site.losses.items()) or quantities.DASH,
        bytes_up=quantities.size(site.bytes_up),
        bytes_down=quantities.size(site.bytes_down),
        train_s=quantities.duration(site.train_s),
    )
