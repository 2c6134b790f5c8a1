"""An experiment repeated over seeds and regimes, so that differences between methods come with intervals.

A cell is one regime with one seed: an ordinary run folder, ``OUT/REGIME/seed-N``, with the main method and its
baselines. Cells are independent, so as many run at once as the cores carry, each in a process of its own with one worker:
that keeps every core busy where a round of few sites would not. What is finished is kept; ``resume`` takes up the rest,
in the middle of a baseline too.

Disk: a cell draws its sites' phantoms into its own folder and removes them at its end, so no more than the cells at work
take any; of a finished cell stay the report, metrics, the main model and each run's checkpoints, no optimiser state.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fedmix import config
from fedmix.errors import FedmixError, RunError
from fedmix.report import files, html, study, study_value
from simulations import baselines, forkserver
from simulations.cells import Cell, cells_of
from simulations.cost import step_costs
from simulations.progress import Progress
from simulations.run import EngineName, View, simulate

PAGE = "compare.html"


def run_study(experiment: config.Experiment, out: Path, *, engine_name: EngineName, resume: bool, view: View) -> Path:
    """Run every cell that is not completed; returns the path of the page that compares the methods.

    Raises RunError, after all other cells, if a cell failed; what it was is in the cell's manifest.
    """
    cells = cells_of(experiment, out)
    _open(experiment, out, resume=resume)
    waiting = [cell for cell in cells if not cell.is_done]
    if len(waiting) < len(cells):
        view.say(f"{len(cells) - len(waiting)} of {len(cells)} cells are completed and kept")
    failed = Crew(_at_once(experiment, engine_name), engine_name, Progress(cells, waiting, view)).run(waiting)
    if waiting or not (out / study.COSTS).exists():
        view.say("measuring what an optimiser step costs")  # now that nothing else of ours runs
        write_costs([cell for cell in cells if cell.is_done], out)
    page = write_standing(out)
    if failed:
        causes = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
        raise RunError(f"{len(failed)} of {len(cells)} cells failed ({causes}); mend the cause and go on with --resume")
    return page


def write_costs(cells: Sequence[Cell], out: Path) -> None:
    """Measure one step of every kind that the cells' methods take, and keep it in costs.json."""
    files.write_json(out / study.COSTS, {"schema": 1, "steps": step_costs(_trained_by(cells))})


def write_standing(out: Path) -> Path:
    """study.json and the page that compares the methods, from what is there; returns the page's path."""
    found = study.read_study(out)
    values = {regime: value for regime in found.regimes if (value := study_value.as_json(found, regime))}
    files.write_json(out / "study.json", study.as_json(found) | ({"site_value": values} if values else {}))
    return html.write_study(out / PAGE, [found])


def _trained_by(cells: Sequence[Cell]) -> Iterator[config.Experiment]:
    """Every federated experiment of the cells: the main one and its baselines."""
    for cell in cells:
        yield cell.experiment
        for name in cell.experiment.baselines:
            if name not in (*baselines.SPECIAL, *baselines.UNTRAINED):
                yield from baselines.federated(cell.experiment, name).values()


def _open(experiment: config.Experiment, out: Path, *, resume: bool) -> None:
    """Begin or take up the study's folder; config.yaml in it is the whole study."""
    place = out / "config.yaml"
    if resume and not place.exists():
        raise RunError(f"{out} holds no study to resume; start it without --resume")
    if not resume and place.exists():
        raise RunError(f"{out} already holds a study; go on with --resume, choose another folder with --out, or remove it")
    if (out / "manifest.json").exists():
        raise RunError(f"{out} holds a single run, not a study; choose another folder with --out")
    files.write_text(place, experiment.to_yaml())


def _at_once(experiment: config.Experiment, engine_name: EngineName) -> int:
    """How many cells run at once: one a core, fewer where a site or a cell takes several of them."""
    if engine_name != "inprocess":  # Ray wants the machine for itself
        return 1
    federation = experiment.federation
    per_cell = federation.threads_per_site * federation.processes_per_site * max(1, federation.workers)
    return max(1, len(os.sched_getaffinity(0)) // per_cell)


@dataclass
class Crew:
    """Cells at work, ``at_once`` of them side by side, each in a process of its own."""

    at_once: int
    engine_name: EngineName
    progress: Progress
    _running: dict[Connection, tuple[Cell, Any]] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Run all of them; returns the causes of those that failed, by name."""
        forkserver.start()
        waiting, failed = list(cells), dict[str, str]()
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.at_once:
                    # The last cells share the cores that nobody waits for any more.
                    share = max(1, self.at_once // (len(self._running) + len(waiting)))
                    self._start(waiting.pop(0), share)
                for ready in wait(list(self._running)):
                    assert isinstance(ready, Connection)
                    failed |= self._hear(ready)
        finally:
            for _, process in self._running.values():
                process.kill()
                process.join()
        return failed

    def _start(self, cell: Cell, share: int) -> None:
        context = get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run_cell, args=(cell, share, self.engine_name, theirs))
        process.start()
        theirs.close()
        self._running[ours] = (cell, process)

    def _hear(self, connection: Connection) -> dict[str, str]:
        """Take what a cell tells; at its end the study's page is written anew. Returns the cause if it failed."""
        cell, process = self._running[connection]
        try:
            self.progress.hear(cell, connection.recv())
            return {}
        except EOFError:
            del self._running[connection]
            process.join()
        self.progress.end(cell)
        write_standing(cell.folder.parents[1])
        ended = f"its process ended with code {process.exitcode}"
        return {} if cell.is_done else {cell.name: self.progress.causes.get(cell.name, ended)}


def _run_cell(cell: Cell, share: int, engine_name: EngineName, connection: Connection) -> None:
    """A cell's process: run it, tell the study what happens, leave nothing large behind."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # Ctrl-C: the study says it, once
    threading.Thread(target=_die_with_study, daemon=True).start()
    federation = cell.experiment.federation
    workers = federation.workers or share
    experiment = cell.experiment.model_copy(update={"federation": federation.model_copy(update={"workers": workers})})
    # Not more for a cell that has the machine to itself: the number is part of what an evaluation finds, in the last digits.
    torch.set_num_threads(federation.threads_per_site)
    voice = _Voice(connection)
    try:
        page = simulate(
            experiment,
            cell.folder,
            engine_name=engine_name,
            resume=(cell.folder / "manifest.json").exists(),
            view=voice,
            on_method=voice.begin,
        )
        assert page.exists()
        _tidy(cell)
    except (FedmixError, OSError) as error:
        connection.send({"failed": str(error)})


def _tidy(cell: Cell) -> None:
    """Remove what only a run that goes on needs: drawn phantoms, optimiser states."""
    for path in (cell.folder / ".phantoms", cell.folder / "sites", *cell.folder.glob("baselines/*/sites")):
        shutil.rmtree(path, ignore_errors=True)


def _die_with_study() -> None:
    """End this cell when the study is killed, or it would train on unseen and lock its folder against a resumed study."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Voice:
    """A cell's View: what it is told goes to the study."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def begin(self, method: str) -> None:
        self._connection.send({"method": method})

    def start(self, total_rounds: int, sites: Mapping[str, str]) -> None:
        """Nothing: the study knows the cell's rounds."""

    def update(self, row: Mapping[str, Any]) -> None:
        if row["event"] in ("round", "dropped", "failed"):
            self._connection.send({"row": dict(row)})

    def say(self, sentence: str) -> None:
        """Nothing: a cell says which method it is at."""
