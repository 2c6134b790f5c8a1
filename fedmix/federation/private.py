"""A step whose gradient tells little of any one patient: what fedmix/privacy/dpsgd.py does, for this model and its losses.

The loss of a patient is the mean over its studies, and of a study what ``Learner.loss`` says of a batch of that study alone:
each masked term over what is hidden of the study, weighted. No term may look at two patients, so there is no contrast and no
matching. Which parameters move, and with how much noise, must not depend on the data: they are found once by reading a
made-up study, and get noise in every step, also in one that drew nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from fedmix import config
from fedmix.batch import STREAMS, Batch, Stream, placed
from fedmix.errors import ConfigError
from fedmix.federation.local import Assignment, Seen, Start, arithmetic, take_steps
from fedmix.federation.microbatch import Within
from fedmix.federation.optimisers import OptimiserState
from fedmix.federation.trainable import is_trained
from fedmix.federation.update import Update
from fedmix.model.layers import keep_activations
from fedmix.objectives.mixture import Learner
from fedmix.privacy.dpsgd import ClippedSum, learning_modules, noised, poisson_sample


class Patients(Protocol):
    """Where a private step's studies come from (fedmix/data/loading.py has one)."""

    @property
    def num_patients(self) -> int:
        """Patients to draw from."""
        ...

    @property
    def expected(self) -> int:
        """Patients that a step draws on average."""
        ...

    @property
    def rate(self) -> float:
        """Each patient's chance."""
        ...

    def draw(self, drawn: Tensor, chance: Generator) -> Batch | None:
        """Studies of patients by number, ``patient`` saying whose each is from 0 on; None of nobody."""
        ...


@dataclass(frozen=True)
class Protection:
    """How a site's steps are protected: ``noise_multiplier`` is sigma, ``chance`` a generator that nobody can repeat.

    ``most_studies``: of a patient in one step's draw. ``micro_batch``: studies computed at a time, None all at once.
    """

    settings: config.Privacy
    noise_multiplier: float
    chance: Generator
    micro_batch: int | None = None


def train(
    learner: Learner,
    patients: Patients,
    assignment: Assignment,
    stream: Stream,
    protection: Protection,
    *,
    start: Start,
    precision: str = "float32",
    on_step: Callable[[int], None] | None = None,
) -> tuple[Update, OptimiserState]:
    """``local.train`` with a private gradient in every step; the model is ``narrowed`` to what is trained (trainable.py).

    The update tells no losses, which are the data's own, and counts the expected studies, not those that came: whoever
    reads it learns only what the noise covers.
    """
    model = learner.model
    keep_activations(model, wanted=True)
    model.skips_padding = False  # what is flattened has no row of its own
    learner = learner.at_round_start()
    model.train()
    with no_gradients_of(model):
        steps = PrivateSteps(learner, patients, stream, protection, partial(arithmetic, precision, model.device.type))

        def leave_gradient(step: int) -> Seen:
            steps.descend()
            return Seen({}, steps.examples)

        return take_steps(model, assignment, leave_gradient, start, on_step=on_step)


class PrivateSteps:
    """What leaves a private step's gradient in a learner's model."""

    def __init__(self, learner: Learner, patients: Patients, stream: Stream, protection: Protection, within: Within) -> None:
        check(learner.objectives)
        self._learner, self._patients, self._protection, self._within = learner, patients, protection, within
        self.examples: dict[Stream, int] = {one: patients.expected if one == stream else 0 for one in STREAMS}
        modules = learning_modules(learner.model, partial(is_trained, trainable=protection.settings.trainable))
        made_up = ClippedSum(modules, protection.settings.clip)
        with made_up.watching():
            add(_reads_all(learner), made_up, made_up_study(learner, stream), protection.chance, within=within)
        self._reached = frozenset(made_up.totals)
        self._modules = {name: module for name, module in modules.items() if f"{name}.weight" in self._reached}

    def descend(self) -> None:
        """Draw patients and leave (sum of their clipped gradients + noise) / expected patients in the model."""
        settings, chance = self._protection.settings, self._protection.chance
        found = ClippedSum(self._modules, settings.clip)
        with found.watching():
            for drawn in self._pieces(poisson_sample(self._patients.num_patients, self._patients.rate, chance)):
                batch = self._patients.draw(drawn, chance)
                if batch is not None:
                    add(self._learner, found, batch, chance, within=self._within)
        for name, parameter in self._learner.model.named_parameters():
            if name in self._reached:
                total = found.totals.get(name)
                parameter.grad = noised(
                    torch.zeros_like(parameter) if total is None else total,
                    noise_multiplier=self._protection.noise_multiplier,
                    clip=settings.clip,
                    expected=self._patients.expected,
                    chance=chance,
                )

    def _pieces(self, drawn: Tensor) -> Iterator[Tensor]:
        """The drawn patients, as many at a time as can have ``micro_batch`` studies; a patient is never cut."""
        if self._protection.micro_batch is None:
            yield drawn
            return
        yield from drawn.split(max(1, self._protection.micro_batch // self._protection.settings.studies_per_patient))


def add(
    learner: Learner, found: ClippedSum, batch: Batch, chance: Generator, *, within: Within = contextlib.nullcontext
) -> Tensor:
    """Add a batch's clipped gradients and return their norms before that [U]; a study weighs 1 over its patient's in the batch.

    ``within``: the arithmetic of forward passes alone; sums and norms are float32.
    """
    assert batch.patient is not None
    share_B = 1.0 / batch.patient.bincount()[batch.patient]
    readings = learner.plan_each(batch, chance)
    counted: dict[str, Tensor] = {}
    for reading, study_N in readings:
        for name, count_N in reading.counts().items():
            counted[name] = counted.get(name, torch.zeros(len(batch))).index_add(0, study_N, count_N)
    weights = learner.objectives.model_dump(include=set(counted))
    for reading, study_N in readings:
        if not reading.counts() or not len(reading):
            continue
        with within(), found.rows_of(batch.patient[study_N]):
            totals = learner.ask_each(reading, learner.encode(reading))
        weight_B = {name: weights[name] * share_B / counted[name].clamp_min(1.0) for name in totals}
        parts = [(total_N * placed(weight_B[name][study_N], total_N.device)).sum() for name, total_N in totals.items()]
        loss = torch.stack(parts).sum()
        if loss.requires_grad:  # not where only what is frozen was asked
            loss.backward()
    return found.add(int(batch.patient.max()) + 1)


def check(objectives: config.Objectives) -> None:
    """Refuse what is no sum over patients; the config refuses it too, before any data is read."""
    if any(getattr(objectives, name) for name in config.COMPARING) or objectives.joint_masking != "both":
        raise ConfigError(
            f"{', '.join(config.COMPARING)} compare studies of different patients, and one_at_a_time shares a batch's pairs "
            "out, so no patient has a gradient of its own; under privacy.mode = dp set these to 0 and joint_masking to both"
        )


def made_up_study(learner: Learner, stream: Stream) -> Batch:
    """A batch of one study that is nobody's, of black pixels and one word."""
    model = learner.model
    word = next(number for number in range(len(learner.word_ids.special_ids) + 1) if number not in learner.word_ids.special_ids)
    return Batch(
        image=torch.zeros(1, model.image_size, model.image_size) if stream != "text" else None,
        text=torch.full((1, 3), word) if stream != "image" else None,
        has_image=torch.tensor([stream != "text"]),
        has_text=torch.tensor([stream != "image"]),
        patient=torch.tensor([0]),
    )


def _reads_all(learner: Learner) -> Learner:
    """The learner that reads every pair as one sequence too, if some are: what can be reached is reached."""
    share = 1.0 if learner.objectives.joint_share else 0.0
    return replace(learner, objectives=learner.objectives.model_copy(update={"joint_share": share}))


@contextlib.contextmanager
def no_gradients_of(model: nn.Module) -> Iterator[None]:
    """Autograd computes no parameter's gradient within: book-keeping needs only those at what modules give."""
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for parameter, was in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(was)
