"""The C library's heap, told what suits the work: training wants freed tensors kept, a server wants them given back.

Left alone, glibc returns each large tensor to the system when it is freed, and the next step pays for every page of it again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
NEVER, LARGEST = -1, 32 << 20  # bytes; of a block, glibc refuses more
LARGE_BLOCK, SPARE = 4 << 20, 128 << 10


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Within it freed memory stays with the process, ready for the next step; afterwards it goes back to the system."""
    _set(LARGEST, NEVER)
    try:
        yield
    finally:
        give_back()


def give_back() -> None:
    """Return what is free, and from now on each block of 4 MiB or more when it is freed."""
    _set(LARGE_BLOCK, SPARE)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library, which has its own ways
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(M_TRIM_THRESHOLD, trim_threshold)
