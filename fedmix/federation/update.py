"""What a site sends back, and which parameters belong together.

A parameter GROUP is the unit that is trained, sent and averaged as one: a block's shared attention, its image expert, its
text expert, its expert of joint sequences, and so on. A TOWER says which streams reach a group, and with what fixed share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from fedmix.batch import Stream
from fedmix.errors import UpdateError

Kind = TypeVar("Kind")
Tower = Literal["shared", "image", "text", "pair"]

# Streams whose losses reach each tower.
REACHED_BY: dict[Tower, tuple[Stream, ...]] = {
    "shared": ("image", "text", "paired"),
    "image": ("image", "paired"),
    "text": ("text", "paired"),
    "pair": ("paired",),
}


class Contribution(Protocol):
    """What a site gives to a round, as aggregation reads it: slice by slice, wherever the change itself lies.

    ``examples``: studies that count for the weight, by stream. ``steps``: optimiser steps taken. ``second_moments``: mean of
    AdamW's second moment by parameter, empty unless the stage aggregates it.
    """

    @property
    def site(self) -> str:
        """The site's name."""
        ...

    @property
    def examples(self) -> Mapping[Stream, int]:
        """Studies by stream."""
        ...

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def second_moments(self) -> Mapping[str, float]:
        """Mean of AdamW's second moment by parameter."""
        ...

    def names(self) -> Collection[str]:
        """Parameters whose change was sent."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` .. ``stop - 1`` of a parameter's change, float32 [stop - start, columns] (``rows_of``)."""
        ...


@dataclass(frozen=True)
class Update:
    """What one site learned in one round, in memory.

    ``deltas``: parameter name -> float32 change, only of groups that the site trained. ``examples``: studies processed in
    this round by stream. ``steps``: optimiser steps taken. ``metrics``: name -> (sum, weight), to be added, never averaged.
    """

    site: str
    deltas: Mapping[str, Tensor]
    examples: Mapping[Stream, int]
    steps: int
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    second_moments: Mapping[str, float] = field(default_factory=dict)

    def names(self) -> Collection[str]:
        """Parameters that this site trained."""
        return self.deltas.keys()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter's change, float32 [stop - start, columns]."""
        delta = self.deltas[name]
        return delta.reshape(rows_of(delta.shape))[start:stop]


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter as lines: rows and columns. A vector or a number is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def group_of(parameter: str) -> str:
    """The group a parameter belongs to, such as ``block2.attention`` or ``text.embedding``."""
    parts = parameter.split(".")
    match parts[0]:
        case "embed_image" | "embed_text":
            return f"{parts[0].removeprefix('embed_')}.embedding"
        case "patch_decoder":
            return "image.decoder"
        case "word_head":
            return "text.head"
        case "projection" | "match_head":
            return f"pair.{parts[0]}"
        case "norm":
            return f"{parts[1]}.norm"
        case "blocks" if parts[2] == "attention":
            return f"block{parts[1]}.attention"
        case "blocks":  # blocks.<index>.<attention_norm | mlp_norm | mlp>.<image | text | pair | shared>
            return f"block{parts[1]}.{parts[3]}"
    raise UpdateError(f"parameter {parameter!r} belongs to no group; give its room a line in federation/update.py")


def tower_of(group: str) -> Tower:
    """The tower of a group, which decides whose steps count for it."""
    towers: tuple[Tower, ...] = ("image", "text", "pair")
    return next((tower for tower in towers if tower in group.split(".")), "shared")


def mean_metrics(sums: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over sites of metrics kept as (sum, weight); a site without the metric is left out, not averaged in as zero."""
    added: dict[str, tuple[float, float]] = {}
    for metrics in sums:
        for name, (total, weight) in metrics.items():
            old = added.get(name, (0.0, 0.0))
            added[name] = (old[0] + total, old[1] + weight)
    return {name: total / weight for name, (total, weight) in added.items() if weight > 0}


def typed(values: Mapping[str, object], key: str, kind: type[Kind]) -> Kind:
    """The value of a received field, which must be there and of exactly this type; raises UpdateError otherwise."""
    value = values.get(key)
    if type(value) is not kind:
        raise UpdateError(f"field {key!r} of a message should be {kind.__name__}, it is {type(value).__name__}")
    return value


def digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of parameters, in name order: the identity of a model."""
    seen = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach().cpu().contiguous()
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())  # else [2, 3] and [3, 2] would be one model
        seen.update(value.numpy().reshape(-1).view("uint8").data)
    return seen.hexdigest()


def digests(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of every parameter group."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        groups.setdefault(group_of(name), {})[name] = value
    return {group: digest(members) for group, members in groups.items()}


def base_of(groups: Mapping[str, str]) -> str:
    """The identity of what a site trains from: SHA-256 over its groups' digests, in name order."""
    return hashlib.sha256("".join(f"{group} {groups[group]}\n" for group in sorted(groups)).encode()).hexdigest()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
