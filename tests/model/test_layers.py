import math

import pytest
import timm.layers
import tiny
import torch

from fedmix.model.layers import Attention, MixedBlock, pick, sincos_grid, split_like, to_image, to_patches


def test_patches_are_numbered_row_by_row() -> None:
    """A 4 x 4 image of the numbers 0..15 in patches of 2 x 2."""
    patches = to_patches(torch.arange(16.0).reshape(1, 4, 4), 2)
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_image_comes_back_from_its_patches(patch_size: int) -> None:
    image = tiny.images(3)
    assert torch.equal(to_image(to_patches(image, patch_size), patch_size), image)


def test_projecting_patches_equals_a_strided_convolution() -> None:
    image, weight = tiny.images(2), torch.randn(5, 64, generator=tiny.generator(1))
    convolved = torch.nn.functional.conv2d(image.unsqueeze(1), weight.reshape(5, 1, 8, 8), stride=8)
    torch.testing.assert_close(to_patches(image, 8) @ weight.T, convolved.flatten(2).transpose(1, 2))


def test_pick_takes_each_studys_own_rows() -> None:
    items, index = torch.randn(3, 5, 2), torch.tensor([[4, 0], [1, 1], [2, 3]])
    expected = torch.stack([torch.stack([items[b, k] for k in index[b]]) for b in range(3)])
    assert torch.equal(pick(items, index), expected)


def test_split_like_undoes_a_concatenation() -> None:
    tokens = {"image": torch.randn(2, 3, 4), "text": torch.randn(2, 5, 4)}
    again = split_like(torch.cat(list(tokens.values()), dim=1), tokens)
    assert all(torch.equal(again[name], tokens[name]) for name in tokens)


def test_positions_equal_sines_and_cosines_written_as_a_loop() -> None:
    table = sincos_grid(3, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (row, column):
                angles = [place * 10000.0 ** -(k / 2) for k in range(2)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected))


def test_every_place_has_a_position_of_its_own() -> None:
    assert torch.pdist(sincos_grid(7, 32)).min() > 0.1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_timms_with_its_parameters_and_its_gradients(*, autocast: bool, is_masked: bool) -> None:
    torch.manual_seed(3)
    ours, theirs = Attention(32, 4), timm.layers.Attention(32, 4, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    theirs.fused_attn = False
    attend_B11T = (torch.arange(7) < torch.tensor([[3], [7]]))[:, None, None] if is_masked else None
    results = []
    for attention in (ours, theirs):
        tokens_BTD = torch.randn(2, 7, 32, generator=tiny.generator(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mixed_BTD = attention(tokens_BTD, attend_B11T)
        (mixed_BTD.float() * torch.randn(2, 7, 32, generator=tiny.generator(2))).sum().backward()
        results.append([mixed_BTD.float(), tokens_BTD.grad, attention.qkv.weight.grad])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_block_equals_a_pre_norm_transformer_block_of_torch() -> None:
    """With one set of weights for both modalities it is the textbook block."""
    block = MixedBlock(16, 2, 4.0, modality_experts=False)
    reference = torch.nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    ours = {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj.weight": block.attention.proj.weight,
        "self_attn.out_proj.bias": block.attention.proj.bias,
        "linear1.weight": block.mlp["shared"].fc1.weight,
        "linear1.bias": block.mlp["shared"].fc1.bias,
        "linear2.weight": block.mlp["shared"].fc2.weight,
        "linear2.bias": block.mlp["shared"].fc2.bias,
        "norm1.weight": block.attention_norm["shared"].weight,
        "norm1.bias": block.attention_norm["shared"].bias,
        "norm2.weight": block.mlp_norm["shared"].weight,
        "norm2.bias": block.mlp_norm["shared"].bias,
    }
    reference.load_state_dict({name: value.detach() for name, value in ours.items()})
    tokens = {"image": torch.randn(2, 3, 16), "text": torch.randn(2, 4, 16)}
    attend = torch.ones(2, 7, dtype=torch.bool)
    attend[1, 5:] = False
    out = torch.cat(list(block(tokens, attend[:, None, None, :]).values()), dim=1)
    reference.train()  # evaluation mode takes a fused path that drops padded tokens
    expected = reference(torch.cat(list(tokens.values()), dim=1), src_key_padding_mask=~attend)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_modality_experts_give_each_modality_its_own_ffn_and_norms() -> None:
    block = MixedBlock(16, 2, 2.0, modality_experts=True)
    tokens = {"image": torch.randn(2, 3, 16), "text": torch.randn(2, 4, 16)}
    before = block(tokens, None)
    with torch.no_grad():
        block.mlp["text"].fc2.bias.add_(1.0)
    after = block(tokens, None)
    assert torch.equal(before["image"], after["image"])
    torch.testing.assert_close(after["text"], before["text"] + 1.0)
