"""A site's whole job in a round: H optimiser steps from the server's model, and the change that came of them.

Two traps decide the details. Parameters that no loss reached must keep ``grad is None``: zeroed gradients still let
AdamW's decay and Muon's momentum move them, and so would a proximal term of their own. And everything random follows from
(seed, site, stage, step), never from a counter, so that a resumed round, another engine or another number of workers gives
the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedmix import config, heap
from fedmix.batch import STREAMS, Batch, Stream, Term
from fedmix.errors import ConfigError
from fedmix.federation.microbatch import Parts, descend
from fedmix.federation.optimisers import Optimisers, OptimiserState
from fedmix.federation.update import Update, group_of
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import keep_activations
from fedmix.objectives.mixture import Learner


class Batches(Protocol):
    """Where a site's batches come from: a pure function of the step number within the stage."""

    def batch(self, step: int) -> Batch:
        """The batch of a step counted from 0 within the stage."""
        ...


@dataclass(frozen=True)
class Assignment:
    """What the server asks of a site in one round: steps ``first_step`` .. ``first_step + stage.local_steps`` of a stage."""

    site: str
    stage: config.Stage
    first_step: int
    seed: int

    @property
    def num_stage_steps(self) -> int:
        """Steps of the whole stage, over which the learning rate follows one cosine."""
        return self.stage.rounds * self.stage.local_steps


def seed_of(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed from a hash of what it is for: independent streams without counting."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def device_named(name: str) -> torch.device:
    """The device of a config. Raises ConfigError where this machine has none of the kind."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("federation.device = cuda, but torch finds no CUDA device here; set it to cpu in this site's copy")
    return torch.device(name)


@contextmanager
def arithmetic(precision: str, device: str = "cpu") -> Iterator[None]:
    """Run the model in ``precision`` on a kind of device; losses stay float32 whatever it is.

    bfloat16 is autocast; its parameters, gradients and moments stay float32 too.
    """
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def train(
    learner: Learner,
    batches: Batches,
    assignment: Assignment,
    *,
    optimiser_state: Mapping[str, Tensor] | None = None,
    second_moments: Mapping[str, float] | None = None,
    precision: str = "float32",
    parts: Parts | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Update, OptimiserState]:
    """Take the round's steps in place and return the update and the optimiser state to keep at the site.

    ``second_moments``: the sites' means of AdamW's second moment, from which a stage that aggregates them starts the round.
    ``parts``: how a step is cut into micro-batches and among processes, None not at all. Every process returns the same.
    """
    parts = parts or Parts()
    keep_activations(learner.model, wanted=parts.keeps_activations)
    learner.model.skips_padding = True
    learner = learner.at_round_start()
    within = partial(arithmetic, precision, learner.model.device.type)

    def leave_gradient(step: int) -> Seen:
        batch = batches.batch(step)
        chance = torch.Generator().manual_seed(seed_of(assignment.seed, assignment.site, assignment.stage.name, step, "masks"))
        return Seen(descend(learner, batch, chance, parts=parts, within=within), batch.counts())

    start = Start(optimiser_state or {}, second_moments or {})
    return take_steps(learner.model, assignment, leave_gradient, start, on_step=on_step)


@dataclass(frozen=True)
class Start:
    """What a round's optimiser begins with: the moments kept at the site, and the sites' means of the second."""

    optimiser_state: Mapping[str, Tensor]
    second_moments: Mapping[str, float]


class Seen(NamedTuple):
    """What a step tells of itself beside its gradient: its terms, and its studies by stream."""

    terms: Mapping[str, Term]
    examples: Mapping[Stream, int]


def take_steps(
    model: MixedModel,
    assignment: Assignment,
    leave_gradient: Callable[[int], Seen],
    start: Start,
    *,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Update, OptimiserState]:
    """Take the round's steps, of which ``leave_gradient`` leaves the gradients in the model one by one."""
    stage = assignment.stage
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimisers = Optimisers(model, stage.optimiser)
    optimisers.load(start.optimiser_state)
    optimisers.start_from(start.second_moments)
    done = _Work()
    model.train()
    with heap.keeping():
        for step in range(assignment.first_step, assignment.first_step + stage.local_steps):
            seen = leave_gradient(step)
            pull(model, before, stage.optimiser.proximal)
            done.count(model, seen)
            optimisers.step((step + 1) / assignment.num_stage_steps)
            if on_step is not None:
                on_step(step)
    optimisers.check()
    # A group is sent whole: a report that is only read beside an image skips the last layers of the text expert.
    groups = {group_of(name) for name in done.trained}
    deltas = {
        name: (parameter.detach() - before[name]).cpu()
        for name, parameter in model.named_parameters()
        if group_of(name) in groups
    }
    moments = optimisers.second_moments(done.trained) if stage.optimiser.second_moment == "aggregated" else {}
    update = Update(assignment.site, deltas, done.examples, stage.local_steps, done.metrics(), moments)
    return update, optimisers.state()


class _Work:
    """What a round's steps add up to: parameters with a gradient, studies and losses."""

    def __init__(self) -> None:
        self.trained: set[str] = set()
        self.examples: dict[Stream, int] = dict.fromkeys(STREAMS, 0)
        self._sums: dict[str, Term] = {}

    def count(self, model: nn.Module, seen: Seen) -> None:
        """Add a step, while its gradients are there."""
        self.trained.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)
        for stream, count in seen.examples.items():
            self.examples[stream] += count
        for name, term in seen.terms.items():
            kept = Term(term.total.detach(), term.weight)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Losses as (sum, weight)."""
        return {f"{name}/loss": (float(term.total), float(term.weight)) for name, term in self._sums.items()}


def pull(model: nn.Module, start: Mapping[str, Tensor], strength: float) -> None:
    """Add the gradient of FedProx's term, strength / 2 |w - start|^2 (1812.06127), where a loss has left a gradient."""
    if strength == 0:
        return
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start[name], alpha=strength)
