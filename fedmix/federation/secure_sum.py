"""A sum of the sites' changes that shows no site's own: what is added, in which numbers, and under which masks.

After Bonawitz et al. 2017 (Practical Secure Aggregation for Privacy-Preserving Machine Learning, section 4, double masking).
The sites that train a TOWER (fedmix/federation/update.py) are its cohort. Each weighs its change, rounds it to whole steps of
a stated range, and adds modulo 2^32 one stream of masks that it shares with each other member, with opposite signs, and one
of its own seed. Alone such an upload is uniform noise; in the sum the shared streams cancel.

What it promises, with keys that the plan names: a coordinator that follows the protocol learns sums of ``threshold`` sites or
more, and fewer sites than that in league with it help it to nothing but their own parts of a sum. One that tells different
sites of different survivors learns no site's own change as long as no site is in league with it, for ``threshold`` is more than
half of the sites; of n sites with d allowed to drop out it gets no sum of fewer than ``threshold`` either where d (d + 1) < n.
What a sum tells of its sites it tells (of two, each knows the other's part); only differential privacy bounds that.

Weights follow from the plan's rule and from counts that are signed before anything is trained, so each site works out its
own. Where sites drop out after their keys were shared, the sum is divided by the weights of those that are left. That is not
the rule's own weighing of those that are left where it has a fixed mix of streams.

Flower's own stream (``pseudo_rand_gen``, flwr 1.41.0) folds a seed into 32 bits and feeds them to the Mersenne Twister, so a
server could try every seed; AES-256 in counter mode takes its place here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmix import config
from fedmix.batch import Stream
from fedmix.errors import UpdateError
from fedmix.federation.slabs import Group
from fedmix.federation.update import REACHED_BY, Tower, Update, group_of, tower_of
from fedmix.federation.weights import rule_weights

Words = NDArray[np.uint32]

SEED_BYTES = 32  # of a mask's stream: an AES-256 key
CHUNK = 1 << 18  # words of a stream held at a time


@dataclass(frozen=True)
class Member:
    """A site that takes part in a round's sum; ``studies`` is what its weight counts."""

    site: str
    stream: Stream
    studies: int


# ---- who adds what


def towers_of(stream: Stream) -> tuple[Tower, ...]:
    """The towers that a site of a stream trains."""
    return tuple(tower for tower, streams in REACHED_BY.items() if stream in streams)


def cohorts(members: Iterable[Member], threshold: int) -> dict[Tower, tuple[str, ...]]:
    """The sites of each tower in name order; a tower of fewer sites than the threshold is left out, and stays as it is."""
    members = sorted(members, key=lambda one: one.site)
    found: dict[Tower, tuple[str, ...]] = {
        tower: tuple(one.site for one in members if one.stream in streams) for tower, streams in REACHED_BY.items()
    }
    return {tower: sites for tower, sites in found.items() if len(sites) >= threshold}


def weights(members: Iterable[Member], tower: Tower, settings: config.Aggregation) -> dict[str, float]:
    """What each site of a tower multiplies its change with before it leaves: the rule's weights, of every site positive."""
    # A change is not needed for its weight, and its steps are those of everybody.
    everyone = tuple(Update(one.site, {}, {one.stream: one.studies}, 1) for one in sorted(members, key=lambda one: one.site))
    reaching = REACHED_BY[tower]
    senders = tuple(one for one in everyone if any(one.examples.get(stream) for stream in reaching))
    return rule_weights(Group(tower, tower, (), senders, everyone), settings)


def counted(stage: config.Stage, studies: int) -> int:
    """Studies that a site's weight counts: those of the steps asked for, at most those that it has."""
    return min(stage.local_steps * stage.batch_size, studies)


def layout(shapes: Mapping[str, Sequence[int]], tower: Tower) -> list[tuple[str, int]]:
    """A tower's parameters in the order in which they lie in its vector, and how many words each takes."""
    return [(name, int(np.prod(shapes[name], dtype=np.int64))) for name in sorted(shapes) if tower_of(group_of(name)) == tower]


# ---- numbers


def step_of(settings: config.SecureSum) -> float:
    """The value of one whole step: ``clip`` is 2^(bits - 1) - 1 of them."""
    return settings.clip / levels_of(settings)


def levels_of(settings: config.SecureSum) -> int:
    """Whole steps from zero to the end of the range."""
    return int(2 ** (settings.bits - 1) - 1)


def quantise(change: NDArray[np.float32], weight: float, settings: config.SecureSum) -> tuple[Words, int]:
    """A change, clipped to the range, weighed and rounded to the nearest step, as words modulo 2^32, flat.

    The second value counts the coordinates that were clipped. Raises UpdateError for values that are not finite.
    """
    values = change.reshape(-1).astype(np.float64)
    if not bool(np.isfinite(values).all()):
        raise UpdateError("the update holds values that are not finite; lower the learning rate at this site")
    num_clipped = int((np.abs(values) > settings.clip).sum())
    np.clip(values, -settings.clip, settings.clip, out=values)
    values *= weight / step_of(settings)
    return np.rint(values).astype(np.int32).view(np.uint32), num_clipped


def vector_of(
    changes: Mapping[str, NDArray[np.float32]],
    shapes: Mapping[str, Sequence[int]],
    tower: Tower,
    weight: float,
    settings: config.SecureSum,
) -> tuple[Words, int]:
    """A tower's changes as one vector of words (``layout``), and how many values were clipped.

    A parameter that is not among them was not trained, and has not changed.
    """
    places = layout(shapes, tower)
    vector, start, num_clipped = np.zeros(sum(size for _, size in places), np.uint32), 0, 0
    for name, size in places:
        if name in changes:
            vector[start : start + size], clipped = quantise(changes[name], weight, settings)
            num_clipped += clipped
        start += size
    return vector, num_clipped


def check_range(total: Words, weight: float, num_sites: int, settings: config.SecureSum) -> None:
    """Raise UpdateError for a sum beyond what sites of this weight together can have sent.

    A site rounds by half a step at most. Where masks are left over the words are spread over all of 2^32, so this finds it.
    """
    most = weight * levels_of(settings) + num_sites
    if total.size and float(np.abs(total.view(np.int32).astype(np.int64)).max()) > most:
        raise UpdateError("the sum is outside the range that its sites may send in; a site sent something else than was agreed")


def dequantise(total: Words, factor: float, settings: config.SecureSum) -> NDArray[np.float32]:
    """The sum's values, times a factor."""
    values: NDArray[np.float32] = (total.view(np.int32) * (step_of(settings) * factor)).astype(np.float32)
    return values


# ---- masks


def add_stream(vector: Words, seed: bytes, sign: int) -> None:
    """Add a seed's stream of words to a vector, or take it away with ``sign`` -1, in place and modulo 2^32.

    The stream is AES-256 in counter mode from zero, so a seed makes masks once: every site, tower and round has fresh ones.
    """
    if len(seed) != SEED_BYTES:
        raise UpdateError(f"a mask's seed has {SEED_BYTES} bytes, this one has {len(seed)}")
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    for start in range(0, len(vector), CHUNK):
        piece = vector[start : start + CHUNK]
        words = np.frombuffer(stream.update(bytes(4 * len(piece))), "<u4")
        (np.add if sign > 0 else np.subtract)(piece, words, out=piece)


def sign_of(site: str, other: str) -> int:
    """The sign with which a site adds the stream that it shares with another: they are opposite."""
    return 1 if site < other else -1


def commitment(seed: bytes) -> str:
    """What a site says of its seed beforehand: it fits one seed, and shows nothing of it."""
    return hashlib.sha256(b"fedmix secure sum seed\0" + seed).hexdigest()
