"""DP-SGD with patients as the unit: who is drawn, what one patient's gradient is, how far it may reach, and the noise.

One step (Abadi et al., 1607.00133, algorithm 1, with patients in place of examples; user-level sampling of 2407.07737):

    include each patient with probability q = B / N, all on their own
    g_u = gradient of the mean loss over the patient's studies;   c_u = min(1, C / |g_u|)
    g = (sum_u c_u g_u + N(0, sigma^2 C^2 I)) / B                 B is the EXPECTED number of patients, whoever came

Per-patient gradients are never kept. Book-keeping (2210.00038) notes what each module read and the gradient at what it gave,
from one forward and one backward pass; from these come first every patient's norm, then the clipped sum. Opacus' own modules
do this for a row of a batch. Here a patient is several rows of several calls (studies, and an image, its report and both
together), which Opacus adds up BY ROW NUMBER, whoever is in the row. So every row is told its patient, and what reaches Opacus'
samplers are tensors whose row is a patient, with the tokens of all of a patient's rows behind each other.

Norms and sums are float32 whatever the model computes in: a product rounded to bfloat16 could be longer than its norm says.
What chance decides here must be secret, or whoever knows it subtracts the noise: ``secret_chance`` and nothing else seeds it.
It is torch's generator, which is no cryptographic one, and its normal numbers are floats (Mironov 2012); both are limits.

Shapes: N rows of a call, U patients, T tokens, D what a module reads, E what it gives.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from torch import Generator, Tensor, nn

from fedmix.errors import ConfigError

# Of float32 that is formed for a moment: larger blocks the C library gives back each time (fedmix/heap.py), and their pages
# are paid for again; and a core's cache holds more of smaller ones.
PIECE_BYTES = 16 * 2**20


def secret_chance() -> Generator:
    """A generator that nobody can repeat, seeded by the system."""
    return Generator().manual_seed(secrets.randbits(63))


def poisson_sample(num_patients: int, rate: float, chance: Generator) -> Tensor:
    """Numbers of the patients that a step draws, each with probability ``rate``; perhaps nobody."""
    return (torch.rand(num_patients, generator=chance, dtype=torch.float64) < rate).nonzero().flatten()


def clip_factors(norm_U: Tensor, clip: float) -> Tensor:
    """c_u = min(1, C / |g_u|) [U]; zero for a gradient that is not finite, so that it adds nothing."""
    return torch.where(norm_U.isfinite(), (clip / norm_U.clamp_min(clip)).clamp_max(1.0), 0.0)


def noised(total: Tensor, *, noise_multiplier: float, clip: float, expected: float, chance: Generator) -> Tensor:
    """(total + N(0, (sigma C)^2)) / B, of the shape and on the device of ``total``."""
    noise = torch.randn(total.shape, generator=chance) * (noise_multiplier * clip)
    return total.add_(noise.to(total.device)).div_(expected)


@dataclass(frozen=True)
class _Call:
    """One call of a module: what it read [N, ...], the gradient at what it gave [N, ..., E], and whose each row is."""

    read: Tensor
    gradient: Tensor
    patient_N: Tensor

    def pieces(self) -> Iterator[_Call]:
        """The call a few rows at a time."""
        size = _at_a_time(max(self.read[0].numel(), self.gradient[0].numel()))
        parts = zip(self.read.split(size), self.gradient.split(size), self.patient_N.split(size), strict=True)
        yield from (_Call(*part) for part in parts)


@dataclass
class ClippedSum:
    """The sum of clipped per-patient gradients, in parts that memory holds: ``add`` for each, then ``total``.

    Only modules that are watched count; the parameters of the others stay as they are.
    """

    modules: Mapping[str, nn.Module]
    clip: float
    totals: dict[str, Tensor] = field(default_factory=dict)
    _calls: dict[str, list[_Call]] = field(default_factory=dict)
    _patient_N: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the calls of the modules; their parameters need no gradient of autograd meanwhile."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def rows_of(self, patient_N: Tensor) -> Iterator[None]:
        """Within, row i of every call is of patient ``patient_N[i]``, a number below that given to ``add``."""
        self._patient_N = patient_N
        try:
            yield
        finally:
            self._patient_N = None

    def add(self, num_patients: int) -> Tensor:
        """Clip what the calls since the last ``add`` hold of each patient, add it to the totals, and return the norms [U]."""
        squared_U = torch.zeros(num_patients)
        for name, calls in self._calls.items():
            squared_U = squared_U.to(calls[0].gradient.device) + _squared_norms(self.modules[name], calls, num_patients)
        norm_U = squared_U.sqrt()
        factor_U = clip_factors(norm_U, self.clip)
        for name, calls in self._calls.items():
            for call in chain.from_iterable(call.pieces() for call in calls):
                factor_N = factor_U[call.patient_N.to(factor_U.device)]
                for parameter, part in _weighted(self.modules[name], call, factor_N).items():
                    whole = f"{name}.{parameter}"
                    self.totals[whole] = self.totals[whole].add_(part) if whole in self.totals else part
        self._calls.clear()
        return norm_U

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def note(module: nn.Module, read: tuple[Any, ...], given: Tensor) -> Tensor | None:
            patient_N = self._patient_N
            if patient_N is None or not torch.is_grad_enabled():
                return None
            assert len(given) == len(patient_N), f"{name} does not read studies in its first dimension"
            if not given.requires_grad:  # the first module that learns: from here on autograd has to look back
                given = given.detach().requires_grad_()
            noted = read[0].detach()
            given.register_hook(
                lambda gradient: self._calls.setdefault(name, []).append(_Call(noted, gradient.detach(), patient_N))
            )
            return given

        return note


def learning_modules(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    """The modules that hold the parameters whose names are wanted; raises ConfigError where Opacus knows no sampler."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not any(wanted(f"{name}.{parameter}") for parameter, _ in module.named_parameters(recurse=False)):
            continue
        if type(module) not in (nn.Linear, nn.Embedding, nn.LayerNorm):
            raise ConfigError(f"no per-patient gradient is known for a {type(module).__name__}; leave {name} untrained")
        found[name] = module
    return found


# ---- norms


def _squared_norms(module: nn.Module, calls: Sequence[_Call], num_patients: int) -> Tensor:
    """Squared length [U] of each patient's gradient at a module's parameters, over all calls."""
    if isinstance(module, nn.Embedding):
        return _of_table(calls, num_patients)
    read_UTD, gradient_UTE = _by_patient(calls, num_patients)
    if isinstance(module, nn.Linear):
        bias_U = gradient_UTE.sum(dim=1, dtype=torch.float32).square().sum(dim=1) if module.bias is not None else 0.0
        return _of_matrix(read_UTD, gradient_UTE) + bias_U
    with _learning(module):
        samples = GradSampleModule.GRAD_SAMPLERS[type(module)](module, [read_UTD.float()], gradient_UTE.float())
    return torch.stack([sample.flatten(1).square().sum(dim=1) for sample in samples.values()]).sum(dim=0)


def _of_matrix(read_UTD: Tensor, gradient_UTE: Tensor) -> Tensor:
    """|sum_t e_t d_t^T|^2 for every patient, by whichever way computes less (mixed ghost clipping, 2205.10683)."""
    num_tokens, width, given = read_UTD.shape[1], read_UTD.shape[2], gradient_UTE.shape[2]
    is_ghost = num_tokens * (width + given) <= width * given
    of_piece, largest = (_by_tokens, num_tokens * max(num_tokens, width, given)) if is_ghost else (_by_entries, width * given)
    size = _at_a_time(largest)
    parts = zip(read_UTD.split(size), gradient_UTE.split(size), strict=True)
    return torch.cat([of_piece(read.float(), gradient.float()) for read, gradient in parts])


def _by_tokens(read_UTD: Tensor, gradient_UTE: Tensor) -> Tensor:
    products_UTT = (read_UTD @ read_UTD.mT) * (gradient_UTE @ gradient_UTE.mT)
    return products_UTT.sum(dim=(1, 2), dtype=torch.float64).clamp_min(0)


def _by_entries(read_UTD: Tensor, gradient_UTE: Tensor) -> Tensor:
    return (gradient_UTE.mT @ read_UTD).square().sum(dim=(1, 2), dtype=torch.float64)


def _at_a_time(num_values: int) -> int:
    """How many rows of so many float32 values make a piece, at least one."""
    return max(1, PIECE_BYTES // (4 * max(1, num_values)))


def _of_table(calls: Sequence[_Call], num_patients: int) -> Tensor:
    """The same for look-ups: what a patient looked up twice is added before it is squared."""
    patient_M = torch.cat([call.patient_N.to(call.read.device).repeat_interleave(call.read[0].numel()) for call in calls])
    number_M = torch.cat([call.read.flatten() for call in calls])
    gradient_ME = torch.cat([call.gradient.flatten(0, -2) for call in calls]).float()
    key_K, place_M = (patient_M * (number_M.max() + 1) + number_M).unique(return_inverse=True)
    row_KE = gradient_ME.new_zeros(len(key_K), gradient_ME.shape[1]).index_add(0, place_M, gradient_ME)
    squared_K = row_KE.square().sum(dim=1, dtype=torch.float64)
    return squared_K.new_zeros(num_patients).index_add(0, key_K // (number_M.max() + 1), squared_K)


def _by_patient(calls: Sequence[_Call], num_patients: int) -> tuple[Tensor, Tensor]:
    """What a module read [U, T, D] and the gradients at what it gave [U, T, E], patient by patient; zeros fill up."""
    if len(calls) == 1 and torch.equal(calls[0].patient_N, torch.arange(num_patients)):
        return _tokens(calls[0].read), _tokens(calls[0].gradient)
    tokens = [(_tokens(call.read), _tokens(call.gradient), call.patient_N) for call in calls]
    patient_M = torch.cat([patient_N.repeat_interleave(read.shape[1]) for read, _, patient_N in tokens])
    order_M = patient_M.argsort(stable=True)
    count_U = patient_M.bincount(minlength=num_patients)
    place_M = torch.empty_like(patient_M)
    place_M[order_M] = torch.arange(len(patient_M)) - (count_U.cumsum(0) - count_U)[patient_M[order_M]]

    def laid_out(values: list[Tensor]) -> Tensor:
        flat_MD = torch.cat([value.flatten(0, 1) for value in values])
        whole_UTD = flat_MD.new_zeros(num_patients, int(count_U.max()), flat_MD.shape[1])
        whole_UTD[patient_M.to(flat_MD.device), place_M.to(flat_MD.device)] = flat_MD
        return whole_UTD

    return laid_out([read for read, _, _ in tokens]), laid_out([gradient for _, gradient, _ in tokens])


def _tokens(values: Tensor) -> Tensor:
    """Rows of tokens, [N, T, D]."""
    return values.reshape(len(values), -1, values.shape[-1])


# ---- sums


def _weighted(module: nn.Module, call: _Call, factor_N: Tensor) -> dict[str, Tensor]:
    """The gradient of a call at a module's parameters, each row times its patient's factor."""
    gradient_NTE = _tokens(call.gradient).float() * factor_N.float()[:, None, None]
    read = call.read.float() if call.read.is_floating_point() else call.read
    if not bool(factor_N.all()):  # zero times infinity is not zero
        gradient_NTE[factor_N == 0] = 0.0
        read = read.clone() if read.is_floating_point() else read
        if read.is_floating_point():
            read[factor_N == 0] = 0.0
    gradient_ME = gradient_NTE.flatten(0, 1)
    if isinstance(module, nn.Embedding):
        return {"weight": torch.zeros_like(module.weight).index_add(0, read.flatten(), gradient_ME)}
    read_MD = read.reshape(len(gradient_ME), -1)
    if isinstance(module, nn.Linear):
        parts = {"weight": gradient_ME.mT @ read_MD}
    else:
        assert isinstance(module, nn.LayerNorm)
        normed_MD = F.layer_norm(read_MD, module.normalized_shape, eps=module.eps)
        parts = {"weight": (normed_MD * gradient_ME).sum(dim=0)}
    return parts | ({"bias": gradient_ME.sum(dim=0)} if module.bias is not None else {})


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """Opacus' samplers leave out parameters that want no gradient."""
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_()
    try:
        yield
    finally:
        for parameter, was in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(was)
