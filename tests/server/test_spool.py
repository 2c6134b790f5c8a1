"""The round's updates on disk: the same numbers slice by slice, nothing left behind, a full disk in one sentence."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from fedmix import config
from fedmix.errors import RunError
from fedmix.federation import compression
from fedmix.federation.update import rows_of
from server.spool import Coded, Spool

SHAPES = {
    "blocks.0.mlp.image.fc1.weight": torch.Size([40, 30]),
    "embed_image.projection.weight": torch.Size([8, 1, 4, 4]),
    "norm.image.bias": torch.Size([30]),
    "pair.temperature": torch.Size([]),
}
CODINGS = get_args(config.Wire.model_fields["coding"].annotation)


def coded(wire: config.Wire, seed: int = 0) -> Coded:
    chance = torch.Generator().manual_seed(seed)
    deltas = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    parts, _ = compression.encode(deltas, {}, wire, chance)
    return Coded("west", {"paired": 4}, 2, parts, SHAPES, wire, {"mvm/loss": (1.0, 2.0)}, {"norm.image.bias": 0.5})


def whole(update: Coded, name: str) -> torch.Tensor:
    return update.rows(name, 0, rows_of(SHAPES[name])[0])


@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_read_back_is_what_was_written_whole_and_in_slices(coding: str, keep: float, tmp_path: Path) -> None:
    wire = config.Wire(coding=coding, keep=keep)
    spool = Spool(tmp_path)
    updates = [coded(wire, seed) for seed in (1, 2)]
    kept = [spool.add(update) for update in updates]
    for before, after in zip(updates, kept, strict=True):
        assert replace(after, parts=before.parts) == before
        assert set(after.names()) == set(SHAPES)
        for name, shape in SHAPES.items():
            assert torch.equal(whole(after, name), whole(before, name))
            assert whole(after, name).shape == rows_of(shape)
        slices = [after.rows("blocks.0.mlp.image.fc1.weight", start, start + 13) for start in range(0, 40, 13)]
        assert torch.equal(torch.cat(slices), whole(before, "blocks.0.mlp.image.fc1.weight"))
    spool.close()


def test_nothing_has_a_name_and_nothing_is_left(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.add(coded(config.Wire()))
    assert list((tmp_path / "spool").iterdir()) == []
    spool.close()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """A disk on which no file can grow beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with disk_of(1000), pytest.raises(RunError, match=r"cannot keep a round's updates: .*; make room .* --resume"):
        spool.add(coded(config.Wire()))
    spool.close()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs /proc, which nobody can write to")
def test_a_folder_that_cannot_be_written_is_one_sentence() -> None:
    with pytest.raises(RunError, match="cannot keep a round's updates in /proc/nowhere"):
        Spool(Path("/proc/nowhere"))
