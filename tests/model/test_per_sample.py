"""Opacus against a loop over single studies: the reference anyone can believe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from opacus import GradSampleModule
from torch import Tensor

from fedmix.model.encoder import MixedModel

# Look-ups and images are the first things computed, so no input of theirs has a gradient; that is as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

NUM_STUDIES = 4
LossOfRows = Callable[[MixedModel, slice], Tensor]


def image_loss(net: MixedModel, rows: slice) -> Tensor:
    visible = tiny.places(NUM_STUDIES, tiny.VISIBLE)[rows]
    values = net.decode_patches(net.encode(image_BSS=tiny.images(NUM_STUDIES)[rows], visible_BK=visible), visible)
    return values.square().mean(dim=(1, 2)).sum()


def text_loss(net: MixedModel, rows: slice) -> Tensor:
    words = tiny.words(NUM_STUDIES, lengths=[8] * NUM_STUDIES)[rows]
    logits: Tensor = net.word_head(net.encode(words_BL=words).tokens["text"])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="sum")


def padded_text_loss(net: MixedModel, rows: slice) -> Tensor:
    return net.word_logits(tiny.words(NUM_STUDIES)[rows])[:, 1:5].square().mean(dim=(1, 2)).sum()


def joint_loss(net: MixedModel, rows: slice) -> Tensor:
    words, visible = tiny.words(NUM_STUDIES)[rows], tiny.places(NUM_STUDIES, tiny.VISIBLE)[rows]
    encoded = net.encode(image_BSS=tiny.images(NUM_STUDIES)[rows], visible_BK=visible, words_BL=words)
    matched: Tensor = net.match_head(encoded.tokens["image"][:, 0], encoded.tokens["text"][:, 0])
    return matched.square().sum() + net.decode_patches(encoded, visible).square().mean(dim=(1, 2)).sum()


def image_embedding_loss(net: MixedModel, rows: slice) -> Tensor:
    return net.encode_image(tiny.images(NUM_STUDIES)[rows])[:, :3].sum()


@pytest.mark.parametrize(
    "sizes", [{}, {"modality_experts": False}, {"pair_experts": 1}], ids=["experts", "shared", "pair_experts"]
)
@pytest.mark.parametrize("loss_of", [image_loss, text_loss, padded_text_loss, joint_loss, image_embedding_loss])
def test_opacus_per_sample_gradients_equal_a_loop_over_studies(loss_of: LossOfRows, sizes: dict[str, object]) -> None:
    net = tiny.model(**sizes)
    expected: dict[str, list[Tensor]] = {}
    for row in range(NUM_STUDIES):
        net.zero_grad(set_to_none=True)
        loss_of(net, slice(row, row + 1)).backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                expected.setdefault(name, []).append(parameter.grad)
    net.zero_grad(set_to_none=True)
    watched = GradSampleModule(net, loss_reduction="sum")
    loss_of(net, slice(None)).backward()
    found = {name: parameter.grad_sample for name, parameter in net.named_parameters() if parameter.grad_sample is not None}
    watched.remove_hooks()
    assert set(found) == set(expected)
    for name, gradients in expected.items():
        torch.testing.assert_close(
            found[name], torch.stack(gradients), atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
