"""Two real processes that talk through gloo. tests/federation/test_microbatch.py has every objective, with ranks as threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from deaths import ended, forked
from safetensors.torch import load_file, save_file

from fedmix import config
from fedmix.batch import Batch
from fedmix.federation.local import Assignment, train
from fedmix.federation.microbatch import Parts
from fedmix.federation.ranks import joined

EVERYTHING = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5, "match_negatives": "hard"}
PLAN = config.Stage(name="joint", rounds=1, local_steps=3, optimiser=config.Optimiser(kind="adamw"))


@dataclass(frozen=True)
class Fresh:
    """Another batch of the same streams at every step."""

    kinds: str

    def batch(self, step: int) -> Batch:
        return tiny.batch(self.kinds, seed=step)


@pytest.mark.parametrize("kinds", ["ppppp", "iii"])
def test_two_gloo_processes_train_as_one_does(kinds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names, and the same change but for the order of sums; both processes end with the same bits."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    alone, _ = train(tiny.learner(**EVERYTHING), Fresh(kinds), Assignment("west", PLAN, 0, 0))

    def job(number: int) -> None:
        with joined(tmp_path / "meeting", number, 2, timeout_s=60.0) as ranks:
            update, _ = train(
                tiny.learner(**EVERYTHING), Fresh(kinds), Assignment("west", PLAN, 0, 0), parts=Parts(ranks=ranks)
            )
        assert update.examples == alone.examples
        save_file(dict(update.deltas), tmp_path / f"{number}.safetensors")

    children = [forked(lambda number=number: job(number), tmp_path) for number in range(2)]
    assert [ended(pid) for pid in children] == [0, 0]
    first, second = (load_file(tmp_path / f"{number}.safetensors") for number in range(2))
    assert set(first) == set(alone.deltas)
    assert all(torch.equal(first[name], second[name]) for name in first)
    apart = sum(float((first[name] - delta).square().sum()) for name, delta in alone.deltas.items())
    assert apart < 1e-6 * sum(float(delta.square().sum()) for delta in alone.deltas.values())
