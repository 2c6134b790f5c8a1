"""A site's whole job in a round: H optimiser steps from the server's model, and the change that came of them.

Two traps decide the details. Parameters that no loss reached must keep ``grad is None``: zeroed gradients still let
AdamW's decay and Muon's momentum move them, and so would a proximal term of their own. And everything random follows from
(seed, site, stage, step), never from a counter, so that a resumed round, another engine or another number of workers gives
the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedmix import config
from fedmix.batch import STREAMS, Batch, Stream, Term
from fedmix.errors import RunError, UpdateError
from fedmix.federation.update import Update, group_of
from fedmix.objectives.mixture import Learner

OptimiserState = dict[str, Tensor]  # "<optimiser>/<parameter>/<moment>" -> tensor

BETAS = (0.9, 0.98)  # of AdamW
SETTLED = 10_000  # steps after which AdamW's bias correction is 1 to a float64


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


class Optimisers:
    """Muon on the matrices of the blocks and AdamW on everything else, or AdamW alone (config), as one."""

    def __init__(self, model: nn.Module, settings: config.Optimiser) -> None:
        self._settings = settings
        matrices, tables, vectors = _kinds(model, muon=settings.kind == "muon")
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups = [
            {"params": tables, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=BETAS, fused=True)
        self._adamw = adamw
        self._second_moments: dict[str, float] = {}  # to start from, until a parameter's first gradient
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {"adamw": (adamw, settings.lr)}
        if matrices:
            muon = torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay)
            self._parts["muon"] = (muon, settings.muon_lr)

    def step(self, progress: float) -> None:
        """Clip the gradient, set the learning rate for ``progress`` (0..1 of the stage), step, and drop the gradients."""
        parameters = [parameter for parameter in self._names if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm)
        if not bool(norm.isfinite()):
            raise UpdateError("the gradient is not finite; lower optimiser.lr or optimiser.muon_lr for this stage")
        for parameter in parameters:
            mean = self._second_moments.pop(self._names[parameter], 0.0)
            if mean > 0:  # zero tells nothing, and AdamW would divide by it
                self._start(parameter, mean)
        for optimiser, peak in self._parts.values():
            for group in optimiser.param_groups:
                group["lr"] = peak * cosine(progress, warmup=self._settings.warmup, final=self._settings.final_lr)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def start_from(self, second_moments: Mapping[str, float]) -> None:
        """Let AdamW start from the sites' mean of its second moment, one number a parameter (FedAdamW, 2510.27486).

        It takes effect at a parameter's first gradient, so that what no loss reaches has no moments.
        """
        taken = {self._names[parameter] for group in self._adamw.param_groups for parameter in group["params"]}
        if set(second_moments) - taken or not all(0 <= mean < math.inf for mean in second_moments.values()):
            raise RunError("the second moments to start from should be positive numbers of parameters that AdamW trains here")
        self._second_moments = dict(second_moments)

    def second_moments(self, trained: Container[str]) -> dict[str, float]:
        """Mean of AdamW's second moment, bias-corrected, of its parameters among ``trained``."""
        return {
            self._names[parameter]: float(moments["exp_avg_sq"].double().mean()) / (1.0 - BETAS[1] ** float(moments["step"]))
            for parameter, moments in self._adamw.state.items()
            if self._names[parameter] in trained
        }

    def _start(self, parameter: Tensor, mean: float) -> None:
        """Make ``mean`` the second moment. AdamW has one count of steps for both corrections, so it is set past either.

        A first moment that was kept is corrected here instead; a new one starts at zero and takes some ten steps to fill.
        """
        moments = self._adamw.state[parameter]
        if moments:
            moments["exp_avg"] /= 1.0 - BETAS[0] ** float(moments["step"])
        else:
            moments["exp_avg"] = torch.zeros_like(parameter)
        moments["exp_avg_sq"] = torch.full_like(parameter, mean)
        moments["step"] = torch.tensor(float(SETTLED))

    def state(self) -> OptimiserState:
        """Moments of every parameter that has taken a step."""
        return {
            f"{kind}/{self._names[parameter]}/{moment}": value
            for kind, (optimiser, _) in self._parts.items()
            for parameter, moments in optimiser.state.items()
            for moment, value in moments.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take moments up again; a state of another optimiser or model is refused."""
        by_name = {name: parameter for parameter, name in self._names.items()}
        for key, value in state.items():
            kind, _, place = key.partition("/")
            name, _, moment = place.partition("/")
            fits = kind in self._parts and name in by_name and (value.ndim == 0 or value.shape == by_name[name].shape)
            if not fits:  # a moment is a number or as large as its parameter
                raise RunError("the optimiser state kept at this site belongs to another experiment; start the run anew")
            self._parts[kind][0].state[by_name[name]][moment] = value.clone()


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Run the model in ``precision``; losses stay float32 whatever it is.

    bfloat16 is autocast. On CPUs its flash attention kernel took 45 % of a step, so the plain one is used.
    """
    if precision == "float32":
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def cosine(progress: float, *, warmup: float, final: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to ``final``."""
    if progress < warmup:
        return progress / warmup
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / max(1.0 - warmup, 1e-9)))


def train(
    learner: Learner,
    batches: Batches,
    assignment: Assignment,
    *,
    optimiser_state: Mapping[str, Tensor] | None = None,
    second_moments: Mapping[str, float] | None = None,
    precision: str = "float32",
    on_step: Callable[[int], None] | None = None,
) -> tuple[Update, OptimiserState]:
    """Take the round's steps in place and return the update and the optimiser state to keep at the site.

    ``second_moments``: the sites' means of AdamW's second moment, from which a stage that aggregates them starts the round.
    """
    model, stage = learner.model, assignment.stage
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimisers = Optimisers(model, stage.optimiser)
    optimisers.load(optimiser_state or {})
    optimisers.start_from(second_moments or {})
    done = _Work()
    model.train()
    model.skips_padding = True
    learner = learner.at_round_start()
    for step in range(assignment.first_step, assignment.first_step + stage.local_steps):
        batch = batches.batch(step)
        chance = torch.Generator().manual_seed(seed_of(assignment.seed, assignment.site, stage.name, step, "masks"))
        with arithmetic(precision):
            terms = learner.terms(batch, chance)
            loss = learner.loss(terms)
        loss.backward()
        pull(model, before, stage.optimiser.proximal)
        done.count(model, batch, terms)
        optimisers.step((step + 1) / assignment.num_stage_steps)
        if on_step is not None:
            on_step(step)
    # A group is sent whole: a report that is only read beside an image skips the last layers of the text expert.
    groups = {group_of(name) for name in done.trained}
    deltas = {
        name: parameter.detach() - before[name] for name, parameter in model.named_parameters() if group_of(name) in groups
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

    def count(self, model: nn.Module, batch: Batch, terms: Mapping[str, Term]) -> None:
        """Add a step, while its gradients are there."""
        self.trained.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)
        for stream, count in batch.counts().items():
            self.examples[stream] += count
        for name, term in terms.items():
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


def _kinds(model: nn.Module, *, muon: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices of the blocks (for Muon), other matrices and tables (decayed), and vectors (not decayed)."""
    matrices: list[Tensor] = []
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if muon and is_for_muon(name, parameter.ndim):
            matrices.append(parameter)
        elif parameter.ndim > 1 and not _is_tag(name):
            tables.append(parameter)
        else:
            vectors.append(parameter)
    return matrices, tables, vectors


def is_for_muon(name: str, num_dims: int) -> bool:
    """Whether a parameter is a matrix of the blocks, which Muon trains where it is used."""
    return num_dims == 2 and "blocks." in name


def _is_tag(name: str) -> bool:
    """Positions, tags, the temperature and the sigmoids' bias: decaying them towards zero means nothing."""
    return any(part in name for part in ("position", "tag", "temperature", "contrast_bias"))
