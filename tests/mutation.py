"""Damage to DICOM files, the same for the same number: what a bad disk does, and what someone who means harm does."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedmix.data import dicom
from fedmix.data.images import ImageOptions, read_image
from fedmix.data.quarantine import RefusedError

OPTIONS, GATES = ImageOptions(size=32), dicom.Gates(secondary_capture=True)
ODD = (
    b"\x00\x00",
    b"\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\x7f",
    b"\xfe\xff\x00\xe0",
    b"\xfe\xff\x0d\xe0",
)
ODD_VRS = (b"SQ\0\0\xff\xff\xff\xff", b"UN\0\0\xff\xff\xff\xff", b"OB\0\0\xff\xff\xff\x7f", b"DS", b"US", b"UT")


@dataclass(frozen=True)
class MutantReader:
    """Number of a mutant -> what reading it came to, and the worker's peak memory in KiB; for a walled worker."""

    files: tuple[Path, ...]
    seed: int

    def __call__(self, number: int) -> bytes:
        data = mutant(self.files, self.seed, number)
        try:
            dicom.read_header(data)
            read_image(data, OPTIONS, gates=GATES)
            word = "read"
        except RefusedError as refused:
            word = refused.code
        return f"{word} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}".encode()


def mutant(files: tuple[Path, ...], seed: int, number: int) -> bytes:
    """A file with one to three kinds of damage."""
    chance = np.random.default_rng((seed, number))
    data = bytearray(_bytes_of(files[number % len(files)]))
    for _ in range(1 + int(chance.integers(0, 3))):
        _damage(data, chance)
    return bytes(data)


@lru_cache(maxsize=64)
def _bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def _damage(data: bytearray, chance: np.random.Generator) -> None:
    if len(data) < 200:
        return
    # Mostly where a change has a meaning: tags at the front, and what opens the pixels.
    pixels = max(132, data.rfind(b"\xe0\x7f\x10\x00"))
    start, end = ((132, pixels), (pixels, pixels + 200), (pixels, len(data)), (0, len(data)))[chance.integers(0, 4)]
    at = int(chance.integers(start, max(start + 1, min(end, len(data) - 1))))
    length = int(2 ** chance.uniform(0, 8))
    kind = chance.integers(0, 8)
    if kind == 0:
        data[at] ^= 1 << int(chance.integers(0, 8))
    elif kind == 1:
        data[at : at + length] = chance.bytes(length)
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length] * int(chance.integers(1, 40))
    elif kind == 4:
        del data[int(chance.integers(100, len(data))) :]
    elif kind == 5:
        odd = ODD[chance.integers(0, len(ODD))]
        data[at : at + len(odd)] = odd
    else:
        _damage_a_tag(data, chance, pixels)


def _damage_a_tag(data: bytearray, chance: np.random.Generator, pixels: int) -> None:
    """Another type, length or value for a tag of the groups that matter."""
    group = (b"\x28\x00", b"\x08\x00", b"\x02\x00", b"\xe0\x7f")[chance.integers(0, 4)]
    at = data.find(group, int(chance.integers(0, pixels)))
    if at < 0 or at + 12 > len(data):
        return
    odd = (*ODD, *ODD_VRS)[chance.integers(0, len(ODD) + len(ODD_VRS))]
    offset = at + int(chance.choice((2, 4, 6, 8)))
    data[offset : offset + len(odd)] = odd
