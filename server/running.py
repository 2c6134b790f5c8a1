"""A run over real sites, as its coordinator sees it: the plan, the run folder, the rows as they come, and the end.

The ServerApp that trains is a process of the SuperExec's, and goes on when whoever watches it goes away. What watches here
only hands the run in, follows it, and evaluates the model at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.deployment import bundle
from fedmix.deployment import plan as plans
from fedmix.disk import is_held
from fedmix.errors import FedmixError, RunError
from fedmix.report import html
from fedmix.report.history import EVENTS
from server import deploy
from server import held_out as central
from server.app import quick_evaluation
from server.arrivals import Arriving, arrivals
from server.conclusion import evaluate, write_report
from server.control import FlowerRun, connected
from server.coordinator import AWAY_S
from server.home import PLAN, Home
from server.model_folder import save_model
from server.planning import Agreed
from server.store import Committed, RunStore

POLL_S = 0.5
ASK_S = 3.0  # between questions to the SuperLink
DEAD_S = 10.0  # so long after a ServerApp has let go of its folder its end must have been noted
DIED = "the ServerApp ended without a word (killed, or out of memory?)"


class View(Protocol):
    """What shows a run while it goes on."""

    def start(self, total_rounds: int, sites: Mapping[str, str]) -> None:
        """A run of so many rounds over sites, given as name and stream, begins."""

    def update(self, row: Mapping[str, Any]) -> None:
        """A row has come."""

    def say(self, sentence: str) -> None:
        """Something that is not a round."""


def run(home: Home, agreed: Agreed, *, resume: bool, view: View) -> Path:
    """Run, take up or follow a plan's run, evaluate the model and write the report; returns the page.

    Raises FedmixError with the run's own cause if it fails; the run folder then says ``failed`` and why. Ctrl-C stops the
    run, which is taken up with ``resume``.
    """
    folder = home.runs / agreed.plan.name
    if missing := sorted(set(agreed.plan.sites) - set(home.registered())):
        raise RunError(f"{', '.join(missing)} not registered; ask for key.pub, then: fedmix server register SITE --key key.pub")
    with connected(home) as control:
        active = next((one for one in control.runs() if one.name == folder.name and not one.is_over), None)
        if resume and active is not None and (folder / EVENTS).exists() and not is_held(folder):
            control.stop(active.run_id)  # its ServerApp told of rounds, and died while nobody watched
            active = None
        _prepare(folder, agreed, home, resume=resume, is_active=active is not None)
        if active is None:
            (folder / EVENTS).unlink(missing_ok=True)
            number = control.start(bundle.write(home.flower("user") / "bundle"), folder.name)
        else:
            number = active.run_id
            view.say("the run is going on; following it")
    view.start(agreed.experiment.num_rounds, {site.name: site.stream for site in agreed.experiment.data.sites})
    try:
        ended = _follow(home, folder, number, view)
    except KeyboardInterrupt:
        with connected(home) as control:
            control.stop(number)
        raise
    return _conclude(folder, agreed.experiment, ended, view)


def _prepare(folder: Path, agreed: Agreed, home: Home, *, resume: bool, is_active: bool) -> None:
    """Make the run folder, or see that it may be taken up."""
    if (folder / PLAN).exists() and plans.digest(folder / PLAN) != agreed.digest:
        raise RunError(f"the run in {folder} follows another plan; give the experiment another name, or move that folder away")
    was_begun = is_active or (folder / "manifest.json").exists()
    if was_begun and not resume:
        raise RunError(f"{folder} already holds a run; go on with --resume, or move the folder away")
    if resume and not was_begun:
        raise RunError(f"{folder} holds no run to resume; start it without --resume")
    folder.mkdir(parents=True, exist_ok=True)
    if not is_active:
        shutil.copyfile(home.plans / f"{agreed.digest}.yaml", folder / PLAN)
        (folder / "config.yaml").write_text(agreed.experiment.to_yaml())


def _follow(home: Home, folder: Path, number: int, view: View) -> FlowerRun:
    """Show a run's rows as they come, until it is over; returns its last record.

    A ServerApp that died is not waited for: Flower would notice after minutes, its lock on the run folder tells at once.
    """
    events, asked, answered, was_held, free_since = _Tail(folder / EVENTS), 0.0, time.monotonic(), False, 0.0
    is_away = False  # the SuperLink
    arriving = Arriving(view.say)
    while True:
        for row in events.rows():
            view.update(row)
        now, holds = time.monotonic(), is_held(folder)
        was_held, free_since = was_held or holds, now if holds else free_since
        if now - asked > ASK_S:
            asked = now
            arriving.update(arrivals(home.database))
            try:
                with connected(home) as control:
                    found = next(one for one in control.runs() if one.run_id == number)
                    if not found.is_over and was_held and now - free_since > DEAD_S:
                        control.stop(number)
                        return FlowerRun(number, found.name, "finished:failed", DIED)
                answered, is_away = now, False
                if found.is_over and not holds:
                    for row in events.rows():
                        view.update(row)
                    return found
            except RunError as error:
                if now - answered > AWAY_S:
                    raise
                if not is_away:
                    view.say(f"{error} Waiting for it.")
                is_away = True
        time.sleep(POLL_S)


class _Tail:
    """The rows that a growing file has gained."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def rows(self) -> list[dict[str, Any]]:
        """Whole lines since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, whole))
        return [json.loads(line) for line in whole]


def _conclude(folder: Path, experiment: config.Experiment, ended: FlowerRun, view: View) -> Path:
    """Evaluate and report a run that has trained every round, or say why it has not."""
    cause = _cause(folder, ended)
    if not (folder / "manifest.json").exists():
        raise RunError(cause)
    store = RunStore(folder, experiment, resume=True)
    try:
        committed = store.latest()
        if committed is None or committed.round_number < experiment.num_rounds:
            raise RunError(cause)
        return _reported(store, experiment, committed, view)
    except (FedmixError, OSError) as error:
        store.finish("failed", str(error))
        raise


def _reported(store: RunStore, experiment: config.Experiment, committed: Committed, view: View) -> Path:
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    held_out = central.load(experiment.data, tokenizer)
    # A kill may have come between the last round and its point on the learning curve.
    add_point = quick_evaluation(experiment, store, view.update, held_out)
    add_point(committed.round_number, experiment.stages[-1].name, committed.parameters)
    view.say("evaluating the model")
    evaluation = evaluate(experiment, committed.parameters, held_out, tokenizer=tokenizer, folder=store.folder)
    save_model(store.folder / "model", experiment, committed.parameters, tokenizer)
    write_report(experiment, store, evaluation, {})
    return html.write_report(store.folder)


def _cause(folder: Path, ended: FlowerRun) -> str:
    """Why a run ended before its last round, in its own words if it had any."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["state"] == "failed" and manifest["cause"]:
            return str(manifest["cause"])
    if ended.status == "finished:stopped":
        return deploy.STOPPED
    return f"{ended.details or DIED}; go on with --resume"
