"""A site's optimisers as one: which parameter is whose, one learning-rate curve for all, and moments by parameter name.

Only parameters with a gradient take part in a step; local.py says why the others must have none instead of a zero.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from fedmix import config
from fedmix.errors import RunError, UpdateError
from fedmix.federation.muon import BatchedMuon

OptimiserState = dict[str, Tensor]  # "<optimiser>/<parameter>/<moment>" -> tensor

BETAS = (0.9, 0.98)  # of AdamW
SETTLED = 10_000  # steps after which AdamW's bias correction is 1 to a float64


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
        self._norms: Tensor | None = None  # their sum is not finite from the first norm on that is not
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {"adamw": (adamw, settings.lr)}
        if matrices:
            muon = BatchedMuon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay)
            self._parts["muon"] = (muon, settings.muon_lr)

    def step(self, progress: float) -> None:
        """Clip the gradient, set the learning rate for ``progress`` (0..1 of the stage), step, and drop the gradients."""
        parameters = [parameter for parameter in self._names if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm)
        self.remember(norm)
        if norm.device.type == "cpu":
            self.check()  # before the model moves
        for parameter in parameters:
            mean = self._second_moments.pop(self._names[parameter], 0.0)
            if mean > 0:  # zero tells nothing, and AdamW would divide by it
                self._start(parameter, mean)
        for optimiser, peak in self._parts.values():
            for group in optimiser.param_groups:
                group["lr"] = peak * cosine(progress, warmup=self._settings.warmup, final=self._settings.final_lr)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def remember(self, norm: Tensor) -> None:
        """Keep a gradient's norm for ``check``."""
        self._norms = norm if self._norms is None else self._norms + norm

    def check(self) -> None:
        """Raise UpdateError if a gradient was not finite: at every step on a CPU. A GPU would have to be waited for, so there
        the caller asks once a round, before anything of it is used.
        """
        if self._norms is not None and not bool(self._norms.isfinite()):
            raise UpdateError("the gradient is not finite; lower optimiser.lr or optimiser.muon_lr for this stage")

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
        moments["step"] = torch.tensor(float(SETTLED), device=parameter.device)

    def state(self) -> OptimiserState:
        """Moments of every parameter that has taken a step, on the CPU."""
        return {
            f"{kind}/{self._names[parameter]}/{moment}": value.cpu()
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
            self._parts[kind][0].state[by_name[name]][moment] = value.to(by_name[name].device, copy=True)


def cosine(progress: float, *, warmup: float, final: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to ``final``."""
    if progress < warmup:
        return progress / warmup
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / max(1.0 - warmup, 1e-9)))


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
