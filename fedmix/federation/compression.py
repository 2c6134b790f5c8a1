"""How a site's update travels: fewer bits a value, or only the largest values of a row, and what that lost is sent later.

Integers have one scale a row and are rounded stochastically, so a coded value is right on average (QSGD, 1610.02132). What
coding lost stays at the site and is added to its next update (error feedback, 1901.09847); with that even 4 bits or a few
per cent of the values train as well as float32 (2501.18512, 2508.15706). It is the change that is coded, never the weights:
a row's scale then shrinks as training settles.

A coded parameter is some PARTS, arrays with one line per row (``rows_of``): ``""`` values, ``":scale"``, ``":index"``. On the
wire an array is called parameter + part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmix import config
from fedmix.errors import RunError, UpdateError
from fedmix.federation.update import rows_of

Parts = dict[str, NDArray[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),  # two values a byte
}
LEVELS = {"int8": 127, "int4": 7}  # as many below zero as above: a row and its negative are coded alike
LARGEST = 65504.0  # of float16; no weight of a model that works moves so far in a round
SMALLEST = torch.finfo(torch.float32).tiny  # dividing by anything smaller would lose bits, or be by zero


def num_kept(columns: int, settings: config.Wire) -> int:
    """Values of a row that are sent."""
    return columns if settings.keep == 1.0 else max(1, round(settings.keep * columns))


def is_exact(settings: config.Wire) -> bool:
    """Whether decoding gives back what was encoded, to the bit; then nothing is left over to keep."""
    return settings.coding == "float32" and settings.keep == 1.0


def parts_of(shape: Sequence[int], settings: config.Wire) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The arrays that a parameter of this shape travels as, and no other: part -> dtype and shape."""
    rows, columns = rows_of(shape)
    kept = num_kept(columns, settings)
    width = (kept + 1) // 2 if settings.coding == "int4" else kept
    parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {"": (DTYPES[settings.coding], (rows, width))}
    if settings.coding in LEVELS:
        parts[":scale"] = (np.dtype(np.float32), (rows,))
    if kept < columns:
        parts[":index"] = (_index_dtype(columns), (rows, kept))
    return parts


def encode(
    deltas: Mapping[str, Tensor], residual: Mapping[str, Tensor], settings: config.Wire, generator: torch.Generator
) -> tuple[dict[str, Parts], dict[str, Tensor]]:
    """Code an update (float32 changes by parameter); returns parameter -> parts, and the residual to keep at the site.

    The residual of a parameter that this update does not hold is kept as it is. Raises UpdateError on values that no
    coding can hold, and RunError where the residual is another model's.
    """
    coded: dict[str, Parts] = {}
    keeps_residual = settings.error_feedback and not is_exact(settings)
    left = dict(residual) if keeps_residual else {}
    for name in sorted(deltas):  # the generator is drawn from in name order, whatever order the model has
        delta = deltas[name]
        wanted = delta.detach().reshape(rows_of(delta.shape))
        if name in left:
            if left[name].shape != delta.shape:
                raise RunError("the residual kept at this site belongs to another experiment; start the run anew")
            wanted = wanted + left[name].reshape(wanted.shape)
        _check_values(name, wanted, exact=is_exact(settings))
        coded[name] = _encode_rows(wanted, settings, generator)
        if keeps_residual:
            left[name] = (wanted - decode_rows(coded[name], wanted.shape[1], settings)).reshape(delta.shape)
    return coded, left


def decode_rows(parts: Mapping[str, NDArray[Any]], columns: int, settings: config.Wire) -> Tensor:
    """Coded rows as float32 [rows given, columns]; ``parts`` may be a slice of a parameter's rows.

    Whatever ``check_parts`` lets through is decoded to finite values.
    """
    kept = num_kept(columns, settings)
    values = _unpack(parts[""])[:, :kept] if settings.coding == "int4" else parts[""]
    values = np.array(values, dtype=np.float32, order="C")  # a copy: arrays that were received cannot be written to
    if settings.coding in LEVELS:
        values *= parts[":scale"][:, None]
    if kept == columns:
        return torch.from_numpy(values)
    rows = torch.zeros(len(values), columns)
    return rows.scatter_(1, torch.from_numpy(parts[":index"].astype(np.int64)), torch.from_numpy(values))


def check_parts(parts: Mapping[str, NDArray[Any]], columns: int, settings: config.Wire) -> None:
    """Raise UpdateError where parts of the right names, types and shapes hold values that cannot be decoded."""
    if settings.coding in LEVELS:
        scale = parts[":scale"]
        if not bool(((scale >= 0.0) & (scale <= LARGEST)).all()):  # false for NaN as well
            raise UpdateError(f"coded rows hold a scale that is not a number from 0 to {LARGEST:.0f}")
    elif not bool(np.isfinite(parts[""]).all()):
        raise UpdateError("coded rows hold values that are not finite; lower the learning rate at this site")
    if num_kept(columns, settings) < columns:
        index = parts[":index"]
        if not bool(((index >= 0) & (index < columns)).all()):
            raise UpdateError(f"coded rows hold an index that is not one of a row's {columns} places")
        if not bool((index[:, 1:] > index[:, :-1]).all()):
            raise UpdateError("coded rows hold indices that repeat or do not rise within a row")


def _check_values(name: str, wanted: Tensor, *, exact: bool) -> None:
    if not bool(wanted.isfinite().all()):
        raise UpdateError(f"{name}: update holds values that are not finite; lower the learning rate at this site")
    if not exact and bool((wanted.abs() > LARGEST).any()):
        raise UpdateError(f"{name}: update holds values beyond {LARGEST:.0f}; lower the learning rate at this site")


def _encode_rows(wanted: Tensor, settings: config.Wire, generator: torch.Generator) -> Parts:
    parts: Parts = {}
    kept = num_kept(wanted.shape[1], settings)
    values = wanted
    if kept < wanted.shape[1]:
        index = wanted.abs().topk(kept, dim=1, sorted=False).indices.sort(dim=1).values
        values = wanted.gather(1, index)
        parts[":index"] = index.numpy().astype(_index_dtype(wanted.shape[1]))
    if settings.coding == "float32":
        return {"": values.contiguous().numpy()} | parts
    if settings.coding == "float16":
        return {"": values.to(torch.float16).numpy()} | parts
    whole, scale = _round(values, LEVELS[settings.coding], generator)
    parts[":scale"] = scale.numpy()
    return {"": _pack(whole) if settings.coding == "int4" else whole.to(torch.int8).numpy()} | parts


def _round(values: Tensor, levels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Whole multiples of one step a row, and the steps [rows]: up with the chance of what is missing below, else down."""
    scale = (values.abs().amax(dim=1) / levels).clamp_min_(SMALLEST)
    steps = values / scale[:, None]
    low = steps.floor()
    chance = torch.rand(steps.shape, generator=generator)
    # The division may have put a row's largest value a hair beyond the last level.
    return low.add_(chance < steps.sub_(low)).clamp_(-levels, levels), scale


def _index_dtype(columns: int) -> np.dtype[Any]:
    """Places in a row: beside 4-bit values an index is most of what is sent, so it is as short as the row allows."""
    return np.dtype(np.uint16 if columns <= 1 << 16 else np.int32)


def _pack(whole: Tensor) -> NDArray[Any]:
    """Two values of -8 .. 7 a byte, the first in the lower half; a row of an odd number ends in an empty half."""
    nibbles = torch.nn.functional.pad((whole + 8.0).to(torch.uint8), (0, whole.shape[1] % 2))
    packed: NDArray[Any] = (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).numpy()
    return packed


def _unpack(packed: NDArray[Any]) -> NDArray[np.int8]:
    """The inverse of ``_pack``, an even number of values a row. Slicing is eight times as fast as a table of 256 pairs."""
    values = np.empty((len(packed), 2 * packed.shape[1]), np.int8)
    values[:, ::2] = packed & 15
    values[:, 1::2] = packed >> 4
    values -= 8
    return values
