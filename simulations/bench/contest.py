"""Training steps and what they are held against, in turns in one process: noise on the machine hits all alike."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fedmix import config
from fedmix.batch import Batch
from fedmix.data.tokenizer import Tokenizer
from fedmix.federation import local
from fedmix.objectives.mixture import Learner
from simulations.cost import batches, learner

TURNS = 3
Contestant = Callable[[], list[float]]  # a turn: seconds of each of its steps


@dataclass(frozen=True)
class Work:
    """A kind of step: the stage in which an experiment's sites of a stream first take part, and the threads that compute.

    ``num_steps``: of a turn, one more than are counted.
    """

    experiment: config.Experiment
    stream: config.StreamName
    num_threads: int
    num_steps: int = 3

    @property
    def stage(self) -> config.Stage:
        """The first stage of the stream."""
        return next(stage for stage in self.experiment.stages if self.stream in stage.streams)

    @property
    def site(self) -> config.Site:
        """The first site of the stream."""
        return next(site for site in self.experiment.data.sites if site.stream == self.stream)

    def __str__(self) -> str:
        sizes, data = self.experiment.model, self.experiment.data
        studies = {"image": f"images of {data.image_size} px", "text": "reports", "paired": f"pairs of {data.image_size} px"}
        threads = f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        precision = self.experiment.federation.precision
        return f"width {sizes.width}, {self.stage.batch_size} {studies[self.stream]}, {precision}, {threads}"


def in_turns(contestants: Mapping[str, Contestant], *, turns: int = TURNS) -> dict[str, float]:
    """Median seconds of a step of each: a turn of the first, a turn of the second, and again, so that noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, contestant in contestants.items():
            seconds[name] += contestant()
    return {name: median(found) for name, found in seconds.items()}


@dataclass(frozen=True)
class OurStep:
    """A turn of training as a site trains, one optimiser step after the other."""

    learner: Learner
    batches: local.Batches
    assignment: local.Assignment
    precision: str

    def __call__(self) -> list[float]:
        """Seconds of each step but the first, which also pays for a copy of the model."""
        marks: list[float] = []
        local.train(
            self.learner, self.batches, self.assignment, precision=self.precision, on_step=lambda step: marks.append(now())
        )
        return [after - before for before, after in pairwise(marks)]


@contextmanager
def prepared(work: Work, *, device: str = "cpu", **optimiser: Any) -> Iterator[tuple[OurStep, Batch]]:
    """Our step with a model, a prepared shard and the work's threads; and one batch of it."""
    stage = work.stage.model_copy(
        update={"rounds": 1, "local_steps": work.num_steps, "optimiser": work.stage.optimiser.model_copy(update=optimiser)}
    )
    tokenizer, threads_before = Tokenizer.load(work.experiment.data.tokenizer), torch.get_num_threads()
    torch.set_num_threads(work.num_threads)
    try:
        with tempfile.TemporaryDirectory(prefix="fedmix-bench-") as folder:
            pupil = learner(work.experiment, stage, tokenizer)
            pupil.model.to(device)
            drawn = batches(work.experiment, stage, work.site, tokenizer, Path(folder))
            assignment = local.Assignment(work.site.name, stage, 0, work.experiment.seed)
            yield OurStep(pupil, drawn, assignment, work.experiment.federation.precision), drawn.batch(0)
    finally:
        torch.set_num_threads(threads_before)


def repeated(job: Callable[[], None], num_steps: int) -> Contestant:
    """A job as a turn of that many steps; the first warms up, as in ours."""

    def turn() -> list[float]:
        marks = []
        for _ in range(num_steps):
            job()
            marks.append(now())
        return [after - before for before, after in pairwise(marks)]

    return turn


def now() -> float:
    """The clock, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
