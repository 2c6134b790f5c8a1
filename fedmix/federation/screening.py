"""What the server refuses: a reply is screened before any arithmetic sees it, and a refusal drops its site for the round.

Cheap checks come first: counts and steps, then the closed schema of the arrays (names, types, shapes), and only then their
values. The length of an update is bounded group by group by the running median of what was taken before from sites of the
same stream, and always by the longest way that the steps asked for can lead (``reach``): whoever multiplies its update a
little more every round gets no further than that. Norms are forgotten when a stage begins, because another learning rate
makes updates of another length; until some are taken, ``reach`` alone decides.

This bounds what one bad reply can do. It does not recognise a site that lies within what an honest one could have sent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmix import config
from fedmix.batch import STREAMS, Stream
from fedmix.errors import UpdateError
from fedmix.federation.compression import LEVELS, Parts, check_parts, num_kept, parts_of
from fedmix.federation.optimisers import is_for_muon
from fedmix.federation.slabs import Shapes, norm
from fedmix.federation.update import REACHED_BY, Contribution, group_of, rows_of, tower_of

# AdamW with beta 0.9 and 0.98 (local.py): the mean of gradients over the root of the mean of their squares, both with the
# weights that the betas give, is by Cauchy and Schwarz at most sqrt(0.1^2 / 0.02 / (1 - 0.9^2 / 0.98)) = 1.70.
ADAMW_STEP = 1.70
# Newton and Schulz' five steps leave singular values of at most 1.203, the largest that 3.4445 x - 4.775 x^3 + 2.0315 x^5
# reaches on [0, 1.203]; the rest is for bfloat16. Times Muon's sqrt(max(1, rows / columns)) a step is sqrt(rows) long.
MUON_STEP = 1.30
# With second moments of other sites, whose gradients may be smaller than this site's, AdamW's ratio has no strict bound.
AGGREGATED_SLACK = 4.0

Norms = dict[str, float]  # parameter group -> length of an update


@dataclass(frozen=True)
class Asked:
    """What a site was asked for: ``studies`` is the number it registered when it was greeted."""

    stream: Stream
    steps: int
    batch_size: int
    studies: int


# ---- counts


def check_work(
    examples: Mapping[Stream, int], steps: int, metrics: Mapping[str, tuple[float, float]], asked: Asked
) -> dict[Stream, int]:
    """Refuse a site that did not do the work it was asked for; returns the studies that count for its weight.

    These are at most what the site registered: more steps over the same studies make no more of them.
    """
    if set(examples) - set(STREAMS):
        raise UpdateError(f"an update counts its studies as {', '.join(STREAMS)} and nothing else")
    own = examples.get(asked.stream, 0)
    if any(count < 0 for count in examples.values()) or sum(examples.values()) <= 0 or steps <= 0:
        raise UpdateError("an update must come from at least one step on at least one study")
    if sum(examples.values()) != own:
        raise UpdateError(
            f"the site counts {sum(examples.values()) - own} studies of a stream that is not its own ({asked.stream})"
        )
    if steps != asked.steps:
        raise UpdateError(f"the site took {steps} steps, it was asked for {asked.steps}")
    most = 2 * asked.steps * asked.batch_size  # twice: batches drawn study by study (differential privacy) vary
    if own > most:
        raise UpdateError(f"the site counts more than {most} studies, which its steps cannot have seen")
    if not all(math.isfinite(total) and math.isfinite(weight) and weight >= 0 for total, weight in metrics.values()):
        raise UpdateError("update holds metrics that are not finite, or of negative weight")
    return {stream: min(own, asked.studies) if stream == asked.stream else 0 for stream in STREAMS}


def check_second_moments(moments: Mapping[str, float], shapes: Shapes, optimiser: config.Optimiser) -> None:
    """Refuse means of AdamW's second moment that no clipped gradient can have left; a large one would stop every site."""
    if moments and optimiser.second_moment != "aggregated":
        raise UpdateError("update holds second moments, which this stage does not aggregate")
    unknown = [name for name in moments if name not in shapes]
    if unknown:
        raise UpdateError(f"{len(unknown)} second moments are of parameters that the site was not to train")
    for name, value in moments.items():
        if optimiser.kind == "muon" and is_for_muon(name, len(shapes[name])):
            raise UpdateError(
                f"{name}: update holds its second moment, but Muon trains it and has none"
            )  # sites would refuse it
        most = 1.01 * optimiser.clip_norm**2 / max(math.prod(shapes[name]), 1)  # squares of a gradient sum to clip_norm^2
        if not 0.0 <= value <= most:  # false for NaN as well
            raise UpdateError(f"{name}: mean second moment is {value:.3g}, gradients clipped as asked leave at most {most:.3g}")


# ---- arrays


def check_names(names: Collection[str], shapes: Shapes, stream: Stream, wire: config.Wire) -> None:
    """Refuse an update unless it holds whole groups of what its stream trains, each parameter with all of its parts.

    ``names`` are those on the wire, parameter + part; ``shapes`` are the parameters that the site was sent or holds.
    """
    expected = _places(shapes, stream, wire)
    unknown = [name for name in names if name not in expected]
    if unknown:  # counted and not repeated: the site chose them
        raise UpdateError(f"{len(unknown)} tensors in the update are not among those that the site was to train")
    if not names:
        raise UpdateError("the update is empty: the site trained no parameter")
    wanted: dict[str, list[str]] = {}
    for name, (parameter, _) in expected.items():
        wanted.setdefault(group_of(parameter), []).append(name)
    for group in sorted({group_of(expected[name][0]) for name in names}):
        missing = [name for name in wanted[group] if name not in names]
        if missing:
            raise UpdateError(f"the update holds {group} without {missing[0]}; a site sends all of it or nothing")


def check_arrays(arrays: Mapping[str, NDArray[Any]], shapes: Shapes, stream: Stream, wire: config.Wire) -> dict[str, Parts]:
    """The arrays of an update by parameter and part, once names, types, shapes and values are what can be decoded.

    Only headers are looked at until all of them fit.
    """
    check_names(arrays.keys(), shapes, stream, wire)
    expected = _places(shapes, stream, wire)
    coded: dict[str, Parts] = {}
    for name, array in arrays.items():
        parameter, part = expected[name]
        dtype, shape = parts_of(shapes[parameter], wire)[part]
        if array.dtype != dtype or array.shape != shape:
            raise UpdateError(f"{name}: update is {array.shape} {array.dtype}, the model has {shape} {dtype}")
        coded.setdefault(parameter, {})[part] = array
    for parameter, parts in coded.items():
        try:
            check_parts(parts, rows_of(shapes[parameter])[1], wire)
        except UpdateError as error:
            raise UpdateError(f"{parameter}: {error}") from None
    return coded


def norms_of(update: Contribution, shapes: Shapes) -> Norms:
    """Length of an update by parameter group; refuses one that is not finite. It is decoded slab by slab."""
    groups: dict[str, list[str]] = {}
    for name in sorted(update.names()):
        groups.setdefault(group_of(name), []).append(name)
    norms = {group: norm(update, names, shapes) for group, names in groups.items()}
    for group, length in norms.items():
        if not math.isfinite(length):  # squares of float32 fit into float64
            raise UpdateError(f"{group}: update holds values that are not finite; lower the learning rate at this site")
    return norms


# ---- how far steps can lead


def reach(
    parameters: Mapping[str, Tensor], stages: Sequence[config.Stage], wire: config.Wire, *, noise_std: float = 0.0
) -> Norms:
    """The longest change of each parameter group that a round of any of these stages can make.

    Give the stages so far: what coding lost in one may be sent in the next. The learning rates fall from their peak, so S
    steps sum to at most S lr. AdamW moves an entry by at most ``ADAMW_STEP`` lr a step, whatever the gradient, and Muon a
    matrix by ``MUON_STEP`` lr sqrt(rows). Decay takes lr weight_decay of the parameter a step, and shrinks what was moved
    before it, so

        |theta_S - theta_0| <= S lr (step + weight_decay |theta_0|)    while lr weight_decay <= 1

    ``noise_std``: of what a site adds to every number before it leaves; d of them are longer than sqrt(d) + 6 deviations with
    a chance below 1e-8.
    """
    squares: dict[str, float] = {}
    for name, value in parameters.items():
        length = float(torch.linalg.vector_norm(value, dtype=torch.float64))
        shape = tuple(value.shape)
        noise = noise_std * (math.sqrt(math.prod(shape)) + 6.0)
        way = max(_way(name, shape, length, stage.local_steps, stage.optimiser) for stage in stages)
        farthest = (way + noise) * _stretch(rows_of(shape)[1], wire)
        group = group_of(name)
        squares[group] = squares.get(group, 0.0) + farthest**2
    return {group: math.sqrt(square) for group, square in squares.items()}


class Screen:
    """What refusals remember from round to round, as plain JSON values in the checkpoint: strikes and norms.

    The norms of a round count from the next one on, in the order of the sites' names, so it does not matter who answers
    first. ``keep`` makes them last; those of a round that failed are forgotten with the object.
    """

    def __init__(
        self, settings: config.Screening, stage: str, strikes: Mapping[str, int], norms: Mapping[str, Sequence[float]]
    ):
        self._settings, self._stage = settings, stage
        self._strikes = dict(strikes)
        self._norms = {key: list(values) for key, values in norms.items()}  # "<group>/<stream>" -> the last ``window``
        self._taken: dict[str, tuple[Stream, Norms]] = {}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], settings: config.Screening, stage: config.Stage) -> Screen:
        """The screen of a round of ``stage``; an empty ``kept`` is that of a new run."""
        norms = kept["norms"] if kept.get("stage") == stage.name else {}
        return cls(settings, stage.name, kept.get("strikes", {}), norms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; nothing in them changes when this object does."""
        norms = {key: list(values) for key, values in sorted(self._norms.items())}
        return {"stage": self._stage, "strikes": dict(sorted(self._strikes.items())), "norms": norms}

    def bound(self, group: str, stream: Stream, reach: float) -> float:
        """The longest update of a group that is taken from a site of this stream; ``reach`` is that of the group."""
        known = self._norms.get(f"{group}/{stream}", ())
        median = statistics.median(known) if known else 0.0
        return min(self._settings.norm_bound * median, reach) if median > 0 else reach

    def take(self, site: str, stream: Stream, norms: Norms, reach: Norms) -> None:
        """Refuse an update that is too long in one of its groups; remember the others' norms for the next round."""
        for group, length in norms.items():
            most = self.bound(group, stream, reach[group])
            if length > most:
                raise UpdateError(
                    f"{group}: update is {length:.3g} long, at most {most:.3g} is taken from {stream} sites; "
                    "look at this site's data and learning rate"
                )
        self._taken[site] = stream, dict(norms)

    def keep(self) -> None:
        """The round counts: remember the norms of the updates taken in it."""
        for _, (stream, norms) in sorted(self._taken.items()):
            for group, length in norms.items():
                known = self._norms.setdefault(f"{group}/{stream}", [])
                known.append(length)
                del known[: -self._settings.window]
        self._taken.clear()

    def strike(self, site: str) -> int:
        """Note that a site's reply was refused for what it held; returns how often that was so in this run."""
        self._strikes[site] = self._strikes.get(site, 0) + 1
        return self._strikes[site]

    def struck_out(self) -> frozenset[str]:
        """Sites that are not asked again in this run."""
        return frozenset(site for site, count in self._strikes.items() if count >= self._settings.max_strikes)


def _places(shapes: Shapes, stream: Stream, wire: config.Wire) -> dict[str, tuple[str, str]]:
    """Name on the wire -> parameter and part, of everything that a site of this stream can train."""
    return {
        name + part: (name, part)
        for name, shape in shapes.items()
        if stream in REACHED_BY[tower_of(group_of(name))]
        for part in parts_of(shape, wire)
    }


def _way(name: str, shape: tuple[int, ...], length: float, steps: int, optimiser: config.Optimiser) -> float:
    """The longest way of a parameter that is ``length`` long."""
    if optimiser.kind == "muon" and is_for_muon(name, len(shape)):
        rate, step = optimiser.muon_lr, MUON_STEP * math.sqrt(shape[0])
    else:
        slack = AGGREGATED_SLACK if optimiser.second_moment == "aggregated" else 1.0
        rate, step = optimiser.lr, slack * ADAMW_STEP * math.sqrt(math.prod(shape))
    return steps * rate * (step + optimiser.weight_decay * length)


def _stretch(columns: int, wire: config.Wire) -> float:
    """How many times as long coding can make an update.

    Rounding moves a value by one of ``LEVELS`` of its row's largest. Where only a row's largest are sent, error feedback adds
    what was not sent before: up to 2 / share of an update (1901.09847, lemma 3).
    """
    kept = num_kept(columns, wire)
    rounding = 1.0 + math.sqrt(kept) / LEVELS[wire.coding] if wire.coding in LEVELS else 1.0
    return rounding * (2.0 * columns / kept if wire.error_feedback and kept < columns else 1.0)
