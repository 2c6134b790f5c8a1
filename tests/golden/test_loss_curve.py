"""A golden loss curve: ten CPU steps of the tiny model, so that a change of the numbers cannot slip in with a refactor.

A refactor reproduces the curve. A change that is meant to move it says why in its commit and renews it there:
``pytest tests/golden --renew-golden`` writes loss_curve.json anew; the test then skips, and must be run again without.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from fedmix import config
from fedmix.batch import Batch
from fedmix.federation.local import Assignment, train

CURVE = Path(__file__).with_name("loss_curve.json")
NUM_STEPS = 10


class Mixed:
    """Images alone, reports alone and pairs, other ones at each step."""

    def batch(self, step: int) -> Batch:
        return tiny.batch("iittpppp", seed=step)


def loss_curve(kind: str) -> dict[str, list[float]]:
    """The mean of each term at each of ten steps, one round a step, with moments kept from round to round."""
    learner = tiny.learner(seed=2024, mvm=1.0, mlm=0.3, contrast=1.0, match=0.5, joint_share=0.5)
    plan = config.Stage(name="golden", rounds=NUM_STEPS, local_steps=1, optimiser=config.Optimiser(kind=kind))
    curve: dict[str, list[float]] = {}
    state = None
    for step in range(NUM_STEPS):
        update, state = train(learner, Mixed(), Assignment("golden", plan, step, seed=7), optimiser_state=state)
        for name, (total, weight) in update.metrics.items():
            curve.setdefault(name, []).append(total / weight)
    return curve


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_ten_steps_reproduce_the_golden_loss_curve(kind: str, pytestconfig: pytest.Config) -> None:
    """Within 1e-4 of each value, relative: processors round float32 differently."""
    found = loss_curve(kind)
    golden = json.loads(CURVE.read_text()) if CURVE.exists() else {}
    if pytestconfig.getoption("renew_golden"):
        rounded = {name: [float(f"{value:.7g}") for value in values] for name, values in found.items()}
        CURVE.write_text(json.dumps(golden | {kind: rounded}, indent=1) + "\n")
        pytest.skip(f"wrote {CURVE.name} anew; say in the commit why the numbers moved")
    assert set(found) == set(golden[kind])
    for name, values in found.items():
        assert values == pytest.approx(golden[kind][name], rel=1e-4), f"{name} of {kind} moved"
