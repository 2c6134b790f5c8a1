from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch

from fedmix import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory its own way")

NUM_TENSORS, MEBIBYTES = 20, 16
PAGES = NUM_TENSORS * (MEBIBYTES << 20) // resource.getpagesize()


def faults_of_tensors_made_and_freed() -> int:
    """Pages that the system had to hand out for tensors of 16 MiB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(NUM_TENSORS):
        torch.ones(MEBIBYTES << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_within_keeping_a_freed_tensors_pages_serve_the_next_one() -> None:
    heap.give_back()
    given_back = faults_of_tensors_made_and_freed()
    with heap.keeping():
        faults_of_tensors_made_and_freed()
        kept = faults_of_tensors_made_and_freed()
    assert given_back > 0.9 * PAGES
    assert kept < 0.05 * PAGES


AFTERWARDS = """
import resource, torch
from pathlib import Path
from fedmix import heap
def held(): return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
before = held()
with heap.keeping():
    several = [torch.ones(16 << 18) for _ in range(16)]
    assert held() - before > 240
    del several
    assert held() - before > 200, "not kept"
assert held() - before < 40, "not given back"
"""


def test_what_was_kept_goes_back_at_the_end() -> None:
    subprocess.run([sys.executable, "-c", AFTERWARDS], check=True, timeout=120)
