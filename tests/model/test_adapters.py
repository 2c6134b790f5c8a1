"""Adapters of the trunk: they begin as nothing, and what they learned is a change of the matrices beneath them."""

from __future__ import annotations

import tiny
import torch

from fedmix.model import adapters
from fedmix.model.encoder import MixedModel


def given(model: MixedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.encode(image_BSS=tiny.images(3), words_BL=tiny.words(3)).tokens["text"]


def test_adapters_begin_as_nothing_and_leave_the_model_as_it_was() -> None:
    model = tiny.model()
    before, plain = dict(model.named_parameters()), given(model)
    with adapters.adapted(model, 2, lambda name: tiny.generator(1)) as bases:
        assert torch.equal(given(model), plain)
        learned = [name for name, _ in model.named_parameters() if adapters.learns(name)]
        assert len(learned) == len(bases) == 2 * (2 + 2 * 2)  # blocks x (attention's two, and two of each expert)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_merged_change_computes_what_the_adapters_did_and_is_as_long() -> None:
    model = tiny.model()
    names = {name for name, _ in model.named_parameters()}
    with adapters.adapted(model, 2, lambda name: tiny.generator(len(name))) as bases:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if adapters.learns(name):
                    parameter.normal_(std=0.1, generator=tiny.generator(7))
        learned = given(model)
        deltas = {
            name: parameter.detach().clone() if adapters.learns(name) else torch.zeros_like(parameter)
            for name, parameter in model.named_parameters()
        }
    whole = adapters.merged(deltas, bases)
    assert whole.keys() == names
    for name in bases:
        torch.testing.assert_close(whole[f"{name}.weight"].norm(), deltas[f"{name}.{adapters.LEARNED}.weight"].norm())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(whole[name])
    torch.testing.assert_close(given(model), learned, rtol=1e-4, atol=1e-5)


def test_a_rank_above_the_width_is_the_whole_matrix() -> None:
    with adapters.adapted(tiny.model(), 1000, lambda name: tiny.generator(1)) as bases:
        basis = bases["blocks.0.attention.qkv"]
    assert basis.shape == (32, 32)
    torch.testing.assert_close(basis @ basis.T, torch.eye(32), rtol=0.0, atol=1e-5)
