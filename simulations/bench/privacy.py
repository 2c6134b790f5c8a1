"""What differential privacy costs: a private training step beside the plain one at the same batch.

``dp_step``: ViT-S (config ``size: small``), 224 px, bfloat16, AdamW, on the images of 64 patients; a whole private step, from
drawing the batch to the optimiser, over ``fedmix.federation.local.train``'s. ``dp_step_float32``: the same in float32.
``dp_step_text``: on reports. Each line has the peak memory of a process that takes either step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context

import torch
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch
from fedmix.federation import local, private
from fedmix.federation.private import Protection
from fedmix.privacy.dpsgd import secret_chance
from simulations.bench import Line
from simulations.bench.contest import OurStep, Work, in_turns, now, prepared
from simulations.bench.step import ADAMW, small
from simulations.bench.trivial import peak_bytes

SETTINGS = config.Privacy(mode="dp", noise_multiplier=1.0)


@dataclass
class Everyone:
    """The studies of plain batches as patients of their own, all of whom are drawn: the plain step's work and no more."""

    batches: local.Batches
    num_patients: int
    rate: float = 1.0
    step: int = 0

    @property
    def expected(self) -> int:
        """All of them."""
        return self.num_patients

    def draw(self, drawn: Tensor, chance: Generator) -> Batch:
        """The next batch, each study a patient."""
        self.step += 1
        return replace(self.batches.batch(self.step), patient=torch.arange(self.num_patients))


@dataclass(frozen=True)
class PrivateStep:
    """A turn of private training on the batches of a plain one."""

    plain: OurStep
    stream: config.StreamName

    def __call__(self) -> list[float]:
        """Seconds of each step but the first."""
        marks: list[float] = []
        private.train(
            self.plain.learner,
            Everyone(self.plain.batches, self.plain.assignment.stage.batch_size),
            self.plain.assignment,
            self.stream,
            Protection(SETTINGS, noise_multiplier=1.0, chance=secret_chance()),
            start=local.Start({}, {}),
            precision=self.plain.precision,
            on_step=lambda step: marks.append(now()),
        )
        return [after - before for before, after in pairwise(marks)]


def without_contrast(plain: Work, precision: str) -> Work:
    """The same work in another precision, with what private steps can learn from."""
    stage = plain.stage.model_copy(update={"objectives": config.Objectives()})
    federation = plain.experiment.federation.model_copy(update={"precision": precision})
    experiment = plain.experiment.model_copy(update={"stages": (stage,), "federation": federation})
    return replace(plain, experiment=experiment)


def dp_step(case: str, work: Work) -> Line:
    """A private step over a plain one, in time and in memory."""
    with prepared(work, **ADAMW) as (plain, _):
        seconds = in_turns({"private": PrivateStep(plain, work.stream), "plain": plain})
    peaks = {name: _peak_alone(work, is_private=name == "private") for name in seconds}
    line: Line = {
        "bench": "privacy",
        "case": case,
        "value": round(seconds["private"], 5),
        "unit": "s",
        "against": f"the plain step, AdamW in both: {work}",
        "ratio": round(seconds["private"] / seconds["plain"], 4),
    }
    return line | {"peak_bytes": peaks["private"], "plain_peak_bytes": peaks["plain"]}


def _peak_alone(work: Work, *, is_private: bool) -> int:
    """Peak memory of a new process that takes a turn of either step."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_peak, work, is_private).result()


def _peak(work: Work, is_private: bool) -> int:
    with prepared(work, **ADAMW) as (plain, _):
        contestant = PrivateStep(plain, work.stream) if is_private else plain
        contestant()
    return peak_bytes()


CASES: dict[str, Callable[[], Line]] = {
    "dp_step": lambda: dp_step("dp_step", without_contrast(small("image", num_steps=4), "bfloat16")),
    "dp_step_float32": lambda: dp_step("dp_step_float32", without_contrast(small("image", num_steps=4), "float32")),
    "dp_step_text": lambda: dp_step("dp_step_text", without_contrast(small("text", num_steps=4), "bfloat16")),
}
