"""What a site trains is what the config lets it: the rest stays to the bit, and updates keep the model's own names."""

from __future__ import annotations

import pytest
import tiny
import torch

from fedmix import config
from fedmix.batch import Batch
from fedmix.federation import local
from fedmix.federation.trainable import HEADS, narrowed
from fedmix.federation.update import Update, group_of
from fedmix.objectives.mixture import Learner


class Same:
    """Always the same pairs."""

    def batch(self, step: int) -> Batch:
        return tiny.batch("pppp")


def trained(learner: Learner, **privacy: object) -> Update:
    stage = config.Stage(name="s", rounds=1, local_steps=2, batch_size=4, objectives=learner.objectives)
    with narrowed(learner.model, config.Privacy(mode="none", **privacy), 3, "s") as whole:  # type: ignore[arg-type]
        update, _ = local.train(learner, Same(), local.Assignment("x", stage, 0, 0))
    return whole(update)


def test_adapters_change_the_trunks_matrices_within_their_rank_and_nothing_else() -> None:
    learner = tiny.learner(mvm=1.0, mlm=0.3)
    shapes = {name: parameter.shape for name, parameter in learner.model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    update = trained(learner, trainable="adapters", adapter_rank=2)
    assert all(update.deltas[name].shape == shapes[name] for name in update.deltas)
    moved = {name for name, delta in update.deltas.items() if bool(delta.any())}
    assert moved == {name for name in shapes if name.startswith("blocks.") and len(shapes[name]) == 2}
    assert all(int(torch.linalg.matrix_rank(update.deltas[name], atol=1e-6)) <= 2 for name in moved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in learner.model.named_parameters())
    assert all(parameter.requires_grad for parameter in learner.model.parameters())


def test_all_sites_adapt_in_the_same_subspace_so_their_mean_stays_in_it() -> None:
    updates = [trained(tiny.learner(seed, mvm=1.0, mlm=0.3), trainable="adapters", adapter_rank=1) for seed in (0, 1)]
    name = "blocks.0.attention.qkv.weight"
    mean = sum(update.deltas[name] for update in updates) / 2
    assert int(torch.linalg.matrix_rank(mean, atol=1e-6)) == 1


def test_heads_alone_are_trained_without_differential_privacy_too() -> None:
    update = trained(tiny.learner(mvm=1.0, mlm=0.3), trainable="heads")
    assert {group_of(name) for name in update.deltas} == HEADS - {"shared.norm"}


@pytest.mark.parametrize("trainable", ["all", "heads", "adapters"])
def test_a_job_that_fails_leaves_the_model_whole(trainable: str) -> None:
    model = tiny.model()
    names = [name for name, _ in model.named_parameters()]
    settings = config.Privacy(mode="none", trainable=trainable)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="stop"), narrowed(model, settings, 3, "s"):
        raise RuntimeError("stop")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
