"""DP-SGD with patients as the unit: who is drawn, what one patient's gradient is, how far it may reach, and the noise.

One step (Abadi et al., 1607.00133, algorithm 1, with patients in place of examples; user-level sampling of 2407.07737):

    include each patient with probability q = B / N, all on their own
    g_u = gradient of the mean loss over the patient's studies;   c_u = min(1, C / |g_u|)
    g = (sum_u c_u g_u + N(0, sigma^2 C^2 I)) / B                 B is the EXPECTED number of patients, whoever came

Per-patient gradients are never kept. Book-keeping (2210.00038) notes what each module read and the gradient at what it gave,
from one forward and one backward pass; from these come first every patient's norm, then the clipped sum. Opacus' own modules
do this for a row of a batch. Here a patient is several rows of several calls (studies, and an image, its report and both
together), which Opacus adds up BY ROW NUMBER, whoever is in the row. So every row is told its patient, and norms are taken of
tensors whose row is a patient, with the tokens of all of a patient's rows behind each other.

Norms and sums are float32 whatever the model computes in: a product rounded to bfloat16 could be longer than its norm says.
Where a norm is a difference of large numbers the most that rounding can hide is added to it (``_by_tokens``); other sums are
as exact as float32 is, some 1e-5 of their terms' lengths.
Under autocast what is multiplied is bfloat16 already, and a float32 sum of its products loses nothing (``_of_bfloat16``).
What chance decides here must be secret, or whoever knows it subtracts the noise: ``secret_chance`` and nothing else seeds it.
It is torch's generator, which is no cryptographic one, and its normal numbers are floats (Mironov 2012); both are limits.

Shapes: N rows of a call, U patients, T tokens, D what a module reads, E what it gives.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedmix.errors import ConfigError

# Of float32 that is formed for a moment: larger blocks the C library gives back each time (fedmix/heap.py), and their pages
# are paid for again; and a core's cache holds more of smaller ones.
PIECE_BYTES = 16 * 2**20
ROUNDING = 2.0**-24 * 1.1  # of a float32 operation at most, and what the products of such errors add


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
    noise = torch.normal(0.0, noise_multiplier * clip, total.shape, generator=chance)
    return total.add_(noise.to(total.device)).div_(expected)


@dataclass(frozen=True)
class _Call:
    """One call of a module: what it read [N, ...], the gradient at what it gave [N, ..., E], and whose each row is."""

    read: Tensor
    gradient: Tensor
    patient_N: Tensor


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
        handles += [
            module.register_forward_pre_hook(_as_multiplied)
            for module in self.modules.values()
            if isinstance(module, nn.Linear)
        ]
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
        squared_U, vectors = torch.zeros(num_patients), dict[str, Tensor]()
        for name, calls in self._calls.items():
            of_weight_U, own = _found(self.modules[name], calls, num_patients)
            of_vectors_U = [vector_UE.square().sum(dim=1) for vector_UE in own.values()]
            squared_U = squared_U.to(of_weight_U.device) + torch.stack([of_weight_U, *of_vectors_U]).sum(dim=0)
            vectors |= {f"{name}.{parameter}": vector_UE for parameter, vector_UE in own.items()}
        norm_U = squared_U.sqrt()
        factor_U = clip_factors(norm_U, self.clip).float()
        for whole, vector_UE in vectors.items():
            vector_UE[factor_U == 0] = 0.0  # zero times infinity is not zero
            self._total(whole, vector_UE[0]).add_(factor_U @ vector_UE)
        for name, calls in self._calls.items():
            if f"{name}.weight" not in vectors:
                for call in calls:
                    _add_weighted(self._total(f"{name}.weight", self.modules[name].get_parameter("weight")), call, factor_U)
        self._calls.clear()
        return norm_U

    def _total(self, whole: str, like: Tensor) -> Tensor:
        if whole not in self.totals:
            self.totals[whole] = torch.zeros_like(like, dtype=torch.float32)
        return self.totals[whole]

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


def _as_multiplied(module: nn.Module, read: tuple[Tensor]) -> tuple[Tensor]:
    """What a linear module reads in the type in which autocast multiplies it, so that it is converted once and noted small."""
    device = read[0].device.type
    return (read[0].to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else read


def learning_modules(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    """The modules that hold the parameters whose names are wanted; raises ConfigError for other kinds of module."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not any(wanted(f"{name}.{parameter}") for parameter, _ in module.named_parameters(recurse=False)):
            continue
        if type(module) not in (nn.Linear, nn.Embedding, nn.LayerNorm):
            raise ConfigError(f"no per-patient gradient is known for a {type(module).__name__}; leave {name} untrained")
        found[name] = module
    return found


# ---- norms


def _found(module: nn.Module, calls: Sequence[_Call], num_patients: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Of each patient's gradient at a module: the squared length at its matrix or table [U], and its vectors whole [U, E]."""
    if isinstance(module, nn.Embedding):
        return _of_table(calls, num_patients), {}
    read_UTD, gradient_UTE = _by_patient(calls, num_patients)
    if isinstance(module, nn.Linear):
        squared_U, bias_UE = _of_matrix(read_UTD, gradient_UTE)
        return squared_U, {"bias": bias_UE} if module.bias is not None else {}
    assert isinstance(module, nn.LayerNorm)
    vectors = _of_norm(module, read_UTD, gradient_UTE)
    return vectors["weight"].new_zeros(num_patients), vectors


def _of_norm(module: nn.LayerNorm, read_UTD: Tensor, gradient_UTD: Tensor) -> dict[str, Tensor]:
    """Each patient's gradient at a LayerNorm's scale and shift [U, D]."""
    scale, shift = [], []
    for read, gradient in _pieces(read_UTD[0].numel(), read_UTD, gradient_UTD):
        shift.append(gradient.float().sum(dim=1))
        scale.append(F.layer_norm(read.float(), module.normalized_shape, eps=module.eps).mul_(gradient).sum(dim=1))
    return {"weight": torch.cat(scale)} | ({"bias": torch.cat(shift)} if module.bias is not None else {})


def _of_matrix(read_UTD: Tensor, gradient_UTE: Tensor) -> tuple[Tensor, Tensor]:
    """|sum_t e_t d_t^T|^2 for every patient, by whichever way computes less (mixed ghost clipping, 2205.10683); sum_t e_t."""
    num_tokens, width, given = read_UTD.shape[1], read_UTD.shape[2], gradient_UTE.shape[2]
    is_ghost = num_tokens * (width + given) <= width * given
    of_piece, largest = (_by_tokens, num_tokens * max(num_tokens, width, given)) if is_ghost else (_by_entries, width * given)
    squared, sums = [], []
    with _of_bfloat16(read_UTD, gradient_UTE):
        for read, gradient in _pieces(largest, read_UTD, gradient_UTE):
            wide = gradient.float()
            squared.append(of_piece(read.float(), wide))
            sums.append(wide.sum(dim=1))
    return torch.cat(squared), torch.cat(sums)


def _by_tokens(read_UTD: Tensor, gradient_UTE: Tensor) -> Tensor:
    """At least the squared length, whatever was rounded: tokens whose gradients cancel would otherwise look short.

    Each of the T^2 terms is known to (D + E + T) roundings of the product of its four lengths.
    """
    products_UTT, others_UTT = read_UTD @ read_UTD.mT, gradient_UTE @ gradient_UTE.mT
    squared_UT = products_UTT.diagonal(dim1=1, dim2=2) * others_UTT.diagonal(dim1=1, dim2=2)
    reach_U = squared_UT.sqrt().sum(dim=1, dtype=torch.float64)  # were all tokens' gradients of one direction
    num_roundings = read_UTD.shape[2] + gradient_UTE.shape[2] + read_UTD.shape[1]
    computed_U = products_UTT.mul_(others_UTT).sum(dim=2).sum(dim=1, dtype=torch.float64)
    return computed_U.clamp_min(0) + ROUNDING * num_roundings * reach_U.square()


def _by_entries(read_UTD: Tensor, gradient_UTE: Tensor) -> Tensor:
    length_UE: Tensor = torch.linalg.vector_norm(gradient_UTE.mT @ read_UTD, dim=2)
    return length_UE.square().sum(dim=1, dtype=torch.float64)


def _pieces(num_values: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of all tensors at a time, of which each makes so many float32 values."""
    num_rows = len(tensors[0])
    num = max(1, min(num_rows, math.ceil(4 * num_values * num_rows / PIECE_BYTES)))
    yield from zip(*(tensor.chunk(num) for tensor in tensors), strict=True)


def _of_table(calls: Sequence[_Call], num_patients: int) -> Tensor:
    """Squared length [U] of each patient's gradient at a table; rows looked up twice are added before they are squared."""
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


def _add_weighted(total: Tensor, call: _Call, factor_U: Tensor) -> None:
    """Add a call's gradient at a matrix or a table, each row times its patient's factor."""
    read, gradient, factor_N = call.read, _tokens(call.gradient), factor_U[call.patient_N.to(factor_U.device)]
    if not bool(factor_N.all()):  # zero times infinity is not zero
        kept = factor_N.nonzero().flatten()
        read, gradient, factor_N = read[kept], gradient[kept], factor_N[kept]
    if not read.is_floating_point():
        total.index_add_(0, read.flatten(), (gradient.float() * factor_N[:, None, None]).flatten(0, 1))
        return
    read = _tokens(read)
    with _of_bfloat16(read, gradient) as is_rounded:
        for piece in _pieces(max(math.prod(read.shape[1:]), math.prod(gradient.shape[1:])), read, gradient, factor_N):
            _add_product(total, *piece, is_rounded=is_rounded)


def _add_product(total_ED: Tensor, read_NTD: Tensor, gradient_NTE: Tensor, factor_N: Tensor, *, is_rounded: bool) -> None:
    """Add sum_n c_n sum_t e_t d_t^T; the smaller of the two is what the factors are multiplied with."""
    factor_N11 = factor_N[:, None, None]
    if read_NTD.shape[2] <= gradient_NTE.shape[2]:
        gradient_ME = gradient_NTE.float().flatten(0, 1)
        for term_MD in _terms((read_NTD * factor_N11).flatten(0, 1), is_rounded=is_rounded):
            total_ED.addmm_(gradient_ME.mT, term_MD)
    else:
        read_MD = read_NTD.float().flatten(0, 1)
        for term_ME in _terms((gradient_NTE * factor_N11).flatten(0, 1), is_rounded=is_rounded):
            total_ED.addmm_(term_ME.mT, read_MD)


# ---- products of bfloat16 numbers with float32 sums


@contextmanager
def _of_bfloat16(*operands: Tensor) -> Iterator[bool]:
    """Whether float32 products within round what they multiply to bfloat16; they may only if all ``operands`` are just that.

    torch has no product of bfloat16 matrices with a float32 result on a CPU. It can allow oneDNN to round the operands of a
    float32 product, which those that were bfloat16 survive unchanged: AMX multiplies them as what they are and sums in
    float32, other processors do it all in float32. The permission is the process's, so it is given for these products alone.
    """
    if any(operand.dtype != torch.bfloat16 or operand.device.type != "cpu" for operand in operands):
        yield False
        return
    with _rounding():
        yield _does_round()


@contextmanager
def _rounding() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _does_round() -> bool:
    """Whether this processor makes use of the permission, tried on a product that is large enough for it."""
    finer = torch.full((256, 256), 1 + 2**-10)
    with _rounding():
        return not torch.equal(finer @ torch.eye(256), finer)


def _terms(values: Tensor, *, is_rounded: bool) -> list[Tensor]:
    """What adds up to float32 ``values`` exactly and survives rounding: three bfloat16 numbers of 8 bits each have their 24."""
    if not is_rounded:
        return [values]
    first = values.bfloat16().float()
    second = (values - first).bfloat16().float()
    return [first, second, values - first - second]
