"""Experts of joint sequences: who trains them, who is sent them, and that without them nothing is another model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import Tensor

from fedmix import config
from fedmix.federation.local import Assignment, train
from fedmix.federation.update import REACHED_BY, group_of, tower_of
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import MixedBlock
from fedmix.objectives.mixture import Learner

EVERYTHING = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5}


def learner(num_blocks: int = 1, **objectives: Any) -> Learner:
    return tiny.learner(**(EVERYTHING | objectives), sizes={"pair_experts": num_blocks})


def of_pairs(net: MixedModel) -> set[str]:
    return {name for name, _ in net.blocks.named_parameters(prefix="blocks") if "pair" in name.split(".")}


def tokens() -> dict[str, Tensor]:
    return {"image": torch.randn(2, 3, 16), "text": torch.randn(2, 4, 16)}


# ---- shapes


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_only_the_last_blocks_have_an_expert_as_large_as_the_others(num_blocks: int) -> None:
    net = tiny.model(pair_experts=num_blocks)
    shapes = {name: value.shape for name, value in net.named_parameters()}
    found = of_pairs(net)
    assert {int(name.split(".")[1]) for name in found} == set(range(2 - num_blocks, 2))
    assert len(found) == 6 * num_blocks  # the norm's two and the FFN's four
    assert all(shapes[name] == shapes[name.replace("pair", "image")] for name in found)


def test_without_them_the_model_is_drawn_as_before() -> None:
    plain, asked = tiny.parameters_of(tiny.model()), tiny.parameters_of(tiny.model(pair_experts=0))
    assert plain.keys() == asked.keys()
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"pair_experts": 5}, "pair_experts = 5 is more than the 4 blocks of depth"),
        ({"pair_experts": 1, "modality_experts": False}, "set modality_experts to true, or pair_experts to 0"),
        ({"pair_experts": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_refused(wanted: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        config.Model(**wanted)


# ---- what they read


def test_joint_tokens_of_both_kinds_go_through_the_one_expert() -> None:
    block, joint = MixedBlock(16, 2, 2.0, modality_experts=True, pair_expert=True), tokens()
    before = block(joint, None)
    with torch.no_grad():
        block.mlp["pair"].fc2.bias.add_(1.0)
    after = block(joint, None)
    for name in joint:
        torch.testing.assert_close(after[name], before[name] + 1.0)
    with torch.no_grad():
        block.mlp["image"].fc2.bias.add_(1.0)
        block.mlp["text"].fc2.bias.add_(1.0)
    assert all(torch.equal(block(joint, None)[name], after[name]) for name in joint)


@pytest.mark.parametrize("name", ["image", "text"])
def test_one_modality_alone_keeps_its_own_expert(name: str) -> None:
    with_pairs = MixedBlock(16, 2, 2.0, modality_experts=True, pair_expert=True)
    plain = MixedBlock(16, 2, 2.0, modality_experts=True)
    plain.load_state_dict({key: value for key, value in with_pairs.state_dict().items() if ".pair." not in key})
    alone = {name: tokens()[name]}
    assert torch.equal(with_pairs(alone, None)[name], plain(alone, None)[name])


def test_an_expert_that_is_a_copy_of_both_others_changes_nothing() -> None:
    """Where image and text expert are alike, the joint one that is their copy computes what they did."""
    plain = MixedBlock(16, 2, 2.0, modality_experts=True)
    for part in (plain.mlp, plain.mlp_norm):
        part["text"].load_state_dict(part["image"].state_dict())
    block = MixedBlock(16, 2, 2.0, modality_experts=True, pair_expert=True)
    copies = {key.replace(".image.", ".pair."): value for key, value in plain.state_dict().items() if key.startswith("mlp")}
    block.load_state_dict(copies | plain.state_dict())
    joint = tokens()
    for name, expected in plain(joint, None).items():
        torch.testing.assert_close(block(joint, None)[name], expected)


# ---- who trains them


@pytest.mark.parametrize(("kinds", "stream"), [("iii", "image"), ("ttt", "text"), ("iittt", "image"), ("pppp", "paired")])
def test_unpaired_studies_leave_them_without_gradient_and_pairs_train_them(kinds: str, stream: str) -> None:
    one = learner(2)
    one.loss(one.terms(tiny.batch(kinds), tiny.generator())).backward()
    found = of_pairs(one.model)
    assert tiny.touched(one.model) & found == (found if stream == "paired" else set())


def test_pairs_that_are_only_read_apart_leave_them_alone() -> None:
    one = learner(2, match=0.0, joint_share=0.0)
    one.loss(one.terms(tiny.batch("pppp"), tiny.generator())).backward()
    assert tiny.touched(one.model) & of_pairs(one.model) == set()


def test_they_are_groups_that_only_paired_sites_train_and_receive() -> None:
    groups = {group_of(name) for name in of_pairs(tiny.model(pair_experts=2))}
    assert groups == {"block0.pair", "block1.pair"}
    assert {REACHED_BY[tower_of(group)] for group in groups} == {("paired",)}


class Fresh:
    """Another batch of the same studies at every step."""

    def __init__(self, kinds: str) -> None:
        self.kinds = kinds

    def batch(self, step: int) -> Any:
        return tiny.batch(self.kinds, seed=step)


@pytest.mark.parametrize(("kinds", "is_sent"), [("iii", False), ("ttt", False), ("pppp", True)])
def test_a_site_sends_them_if_it_trained_them(kinds: str, is_sent: bool) -> None:
    one = learner(1)
    plan = config.Stage(name="s", rounds=1, local_steps=2, optimiser=config.Optimiser(weight_decay=0.5))
    before = tiny.parameters_of(one.model)
    update, _ = train(one, Fresh(kinds), Assignment("west", plan, 0, 0))
    sent = {name for name in update.deltas if group_of(name) == "block1.pair"}
    assert sent == (of_pairs(one.model) if is_sent else set())
    moved = {name for name in of_pairs(one.model) if not torch.equal(one.model.get_parameter(name), before[name])}
    assert moved == sent


def test_hidden_words_of_eight_pairs_are_learnt_by_heart_through_them() -> None:
    """Eight pairs by heart, with everything but the experts of joint sequences and the word head held still."""
    net, image, words = tiny.model(pair_experts=2), tiny.images(8), tiny.words(8)
    asked = words.masked_fill(torch.arange(words.shape[1]) == 3, tiny.MASK)
    moving = [value for name, value in net.named_parameters() if name in of_pairs(net) or "word_head" in name]
    net.requires_grad_(requires_grad=False)
    for value in moving:
        value.requires_grad_()
    optimiser = torch.optim.AdamW(moving, lr=5e-3)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(net.word_logits(asked, image)[:, 3], words[:, 3])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 3.0
    assert losses[-1] < 0.1
