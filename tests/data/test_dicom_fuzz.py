"""Damaged files behind the walls: the parent lives, nothing hangs, memory stays within its limit, every refusal has a code.

FEDMIX_FUZZ_FILES sets how many mutants the slow test reads (100,000 unless it says otherwise).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mutation import MutantReader
from pydicom import uid
from radiographs import LOSSLESS, bare, file_of, marked, open_data, table

from fedmix.data.quarantine import REASONS, RefusedError
from fedmix.data.walls import Walls


def own_files(folder: Path) -> tuple[Path, ...]:
    """Small files in every encoding, with every tag that changes how they are shown."""
    eight = (marked(32, 48) >> 4).astype(np.uint8)
    shown = {"WindowCenter": [2048, 100], "WindowWidth": [4096, 50], "RescaleSlope": 1, "RescaleIntercept": 0}
    curve = table(0, 12, np.arange(256, dtype=np.uint16) * 16)
    files = [file_of(marked(32, 48), syntax=syntax, **shown) for syntax in LOSSLESS]
    files += [file_of(eight, bits=8, syntax=uid.JPEGBaseline8Bit), bare(marked(32, 48)), bare(marked(32, 48), implicit=False)]
    files += [file_of(marked(32, 48), VOILUTSequence=curve), file_of(marked(32, 48), ModalityLUTSequence=curve)]
    for number, data in enumerate(files):
        (folder / f"{number}.dcm").write_bytes(data)
    return tuple(sorted(folder.glob("*.dcm")))


def read_all(files: tuple[Path, ...], count: int, *, seed: int) -> Counter[str]:
    """How often each outcome was seen."""
    seen: Counter[str] = Counter()
    peak_kib, last = 0, time.monotonic()
    with Walls(MutantReader(files, seed), workers=2) as walls:
        for answer in walls.map(range(count)):
            assert time.monotonic() - last < 60
            last = time.monotonic()
            if isinstance(answer, RefusedError):
                seen[answer.code] += 1
                continue
            word, peak = answer.decode().split()
            seen[word] += 1
            peak_kib = max(peak_kib, int(peak))
    assert seen.total() == count
    assert set(seen) <= {"read", *REASONS}
    assert peak_kib <= 1 << 20
    return seen


def test_mutants_of_our_own_files_are_read_or_refused(tmp_path):
    seen = read_all(own_files(tmp_path), 2000, seed=1)
    assert 100 < seen["read"] < 1900  # the damage is neither fatal always nor never
    assert len(seen) > 10


@pytest.mark.data
def test_mutants_of_real_files_are_read_or_refused():
    files = tuple(path for path in sorted((open_data() / "dicom").rglob("*.dcm")) if path.stat().st_size < 300_000)
    seen = read_all(files, 300, seed=2)
    assert 15 < seen["read"] < 285


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_very_many_mutants_are_read_or_refused(tmp_path, capsys):
    count = int(os.environ.get("FEDMIX_FUZZ_FILES", "100000"))
    seen = read_all(own_files(tmp_path), count, seed=3)
    with capsys.disabled():
        print("\n", dict(seen.most_common()))
