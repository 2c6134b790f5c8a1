"""A run over real sites, as its coordinator sees it: the plan, the run folder, the rows as they come, and the end.

The ServerApp that trains is a process of the SuperExec's, and goes on when whoever watches it goes away. What watches here
only hands the run in, follows it, and evaluates the model at the end.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.deployment import bundle
from fedmix.deployment import plan as plans
from fedmix.deployment.plan import Plan
from fedmix.errors import ConfigError, FedmixError, RunError
from fedmix.report import html
from server import deploy
from server import held_out as central
from server.app import quick_evaluation
from server.conclusion import evaluate, write_report
from server.control import FlowerRun, connected
from server.home import Home
from server.model_folder import save_model
from server.store import Committed, RunStore

POLL_S = 0.5
ASK_S = 3.0  # between questions to the SuperLink
PATIENCE_S = 300.0  # without a SuperLink; its supervisor starts it again within a minute
DEAD_S = 10.0  # so long after a ServerApp has let go of its folder its end must have been noted
DIED = "the ServerApp ended without a word (killed, or out of memory?); go on with --resume"


class View(Protocol):
    """What shows a run while it goes on."""

    def start(self, total_rounds: int, sites: Mapping[str, str]) -> None:
        """A run of so many rounds over sites, given as name and stream, begins."""

    def update(self, row: Mapping[str, Any]) -> None:
        """A row has come."""

    def say(self, sentence: str) -> None:
        """Something that is not a round."""


@dataclass(frozen=True)
class Agreed:
    """A plan of this coordinator's, its digest, and the experiment with this machine's own paths."""

    plan: Plan
    digest: str
    experiment: config.Experiment


def make_plan(home: Home, experiment: config.Experiment, sites: Sequence[str], *, out: Path, valid_days: int) -> Agreed:
    """Write a plan for the sites to approve, and keep what running it needs. Raises ConfigError."""
    plan = Plan.of(experiment, sites, coordinator=home.settings().address, valid_days=valid_days)
    own = config.build(_with_whole_paths(plans.restrict(experiment, sites)), source="the experiment")
    digest = plans.write(plan, out)
    home.plans.mkdir(exist_ok=True)
    shutil.copyfile(out, home.plans / f"{digest}.yaml")
    _experiment_file(home, digest).write_text(own.to_yaml())
    return Agreed(plan, digest, own)


def read_plan(home: Home, path: Path) -> Agreed:
    """A plan that may be run now. Raises ConfigError if it has ended, is not of this coordinator, or of other code."""
    plan, digest = plans.read(path), plans.digest(path)
    if not plan.is_valid_on(datetime.datetime.now(datetime.UTC).date()):
        raise ConfigError(f"the plan was valid until {plan.valid_until}; make a new one, which the sites approve anew")
    if plan.code != plans.code_hash():
        raise ConfigError(
            "the plan was made with another version of fedmix than this one; make a new one for the sites to approve"
        )
    if not _experiment_file(home, digest).exists():
        raise ConfigError(
            f"the plan was not made in {home.folder}, or was changed since; run the file that `server plan` wrote"
        )
    experiment = config.load(_experiment_file(home, digest))
    if experiment.fingerprint() != plan.fingerprint:
        raise ConfigError(f"{_experiment_file(home, digest)} is not the plan's experiment; make a new plan")
    return Agreed(plan, digest, experiment)


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
        _prepare(folder, agreed, home, resume=resume)
        if active is None:
            (folder / deploy.EVENTS).unlink(missing_ok=True)
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


def is_held(folder: Path) -> bool:
    """Whether a process works in a run folder."""
    with contextlib.suppress(FileNotFoundError), (folder / ".lock").open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def _experiment_file(home: Home, digest: str) -> Path:
    return home.plans / f"{digest}.experiment.yaml"


def _with_whole_paths(experiment: config.Experiment) -> dict[str, Any]:
    """The experiment's values with the coordinator's own paths from the root: the ServerApp starts in another folder."""
    values, data = experiment.model_dump(mode="json"), experiment.data
    values["data"]["cache"] = str(data.cache.absolute())
    values["data"]["held_out"]["shards"] = [str(path.absolute()) for path in data.held_out.shards]
    if experiment.model.warm_start is not None:
        files = experiment.model.warm_start.model_dump()
        values["model"]["warm_start"] = {role: path and str(path.absolute()) for role, path in files.items()}
    return values


def _prepare(folder: Path, agreed: Agreed, home: Home, *, resume: bool) -> None:
    """Make the run folder, or see that it may be taken up."""
    if (folder / deploy.PLAN).exists() and plans.digest(folder / deploy.PLAN) != agreed.digest:
        raise RunError(f"the run in {folder} follows another plan; give the experiment another name, or move that folder away")
    if (folder / "manifest.json").exists() != resume:
        raise RunError(
            f"{folder} holds no run to resume; start it without --resume"
            if resume
            else f"{folder} already holds a run; go on with --resume, or move the folder away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not is_held(folder):
        shutil.copyfile(home.plans / f"{agreed.digest}.yaml", folder / deploy.PLAN)
        (folder / "config.yaml").write_text(agreed.experiment.to_yaml())


def _follow(home: Home, folder: Path, number: int, view: View) -> FlowerRun:
    """Show a run's rows as they come, until it is over; returns its last record.

    A ServerApp that died is not waited for: Flower would notice after minutes, its lock on the run folder tells at once.
    """
    events, asked, answered, was_held, free_since = _Tail(folder / deploy.EVENTS), 0.0, time.monotonic(), False, 0.0
    while True:
        for row in events.rows():
            view.update(row)
        now, holds = time.monotonic(), is_held(folder)
        was_held, free_since = was_held or holds, now if holds else free_since
        if now - asked > ASK_S:
            asked = now
            try:
                with connected(home) as control:
                    found = next(one for one in control.runs() if one.run_id == number)
                    if not found.is_over and was_held and now - free_since > DEAD_S:
                        control.stop(number)
                        return FlowerRun(number, found.name, "finished:failed", DIED)
                answered = now
                if found.is_over and not holds:
                    for row in events.rows():
                        view.update(row)
                    return found
            except RunError as error:
                if answered == now or now - answered > PATIENCE_S:
                    raise
                view.say(f"{error} Waiting for it.")
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
    return ended.details or DIED
