from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from torch import Tensor, nn

from fedmix.errors import DataError
from fedmix.model import pyramid
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import to_image

EXPERTS = pytest.mark.parametrize("experts", [True, False], ids=["experts", "shared"])


@pytest.fixture(params=["experts", "shared", "skipping", "pairs"])
def net(request: pytest.FixtureRequest) -> MixedModel:
    """With experts, with one FFN for both, with text experts that leave padding out, and with experts of joint sequences."""
    made = tiny.model(modality_experts=request.param != "shared", pair_experts=int(request.param == "pairs"))
    made.skips_padding = request.param == "skipping"
    return made


def assert_close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def wider(words_BL: Tensor, num: int) -> Tensor:
    """The same reports with more padding."""
    return torch.cat([words_BL, words_BL.new_zeros(len(words_BL), num)], dim=1)


# ---- visible patches


def test_encoding_what_is_visible_equals_encoding_all_when_all_is_visible(net: MixedModel) -> None:
    image = tiny.images(3)
    everything = tiny.places(3, range(tiny.NUM_PATCHES))
    shown, full = net.encode(image_BSS=image, visible_BK=everything), net.encode(image_BSS=image)
    assert torch.equal(shown.tokens["image"], full.tokens["image"])


def test_order_in_which_patches_are_given_changes_nothing_but_the_order(net: MixedModel) -> None:
    image, order = tiny.images(2), torch.tensor([4, 1, 5, 0, 3, 2])
    plain = net.encode(image_BSS=image, visible_BK=tiny.places(2, tiny.VISIBLE)).tokens["image"]
    mixed = net.encode(image_BSS=image, visible_BK=tiny.places(2, tiny.VISIBLE)[:, order]).tokens["image"]
    assert_close(mixed[:, 0], plain[:, 0])
    assert_close(mixed[:, 1:], plain[:, 1:][:, order])


def test_pixels_of_hidden_patches_cannot_influence_anything(net: MixedModel) -> None:
    """Bit for bit: even what the hidden pixels hold in secret must not leak into a prediction."""
    image, visible = tiny.images(2), tiny.places(2, tiny.VISIBLE)
    hidden = torch.ones(2, tiny.NUM_PATCHES, dtype=torch.bool).scatter_(1, visible, False)
    pixels = hidden.reshape(2, 4, 4).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    changed = torch.where(pixels, torch.rand(image.shape), image)
    assert torch.equal(net.regenerate(image, hidden), net.regenerate(changed, hidden))
    one, other = (net.encode(image_BSS=i, visible_BK=visible, words_BL=tiny.words(2)) for i in (image, changed))
    assert torch.equal(net.decode_patches(one, visible), net.decode_patches(other, visible))
    assert torch.equal(one.tokens["text"], other.tokens["text"])


def test_pixels_of_visible_patches_do_influence_the_hidden_ones(net: MixedModel) -> None:
    image, visible = tiny.images(1), tiny.places(1, tiny.VISIBLE)
    changed = image.clone()
    changed[:, :8, :8] = 1 - changed[:, :8, :8]  # patch 0 is visible
    predicted, other = (net.decode_patches(net.encode(image_BSS=one, visible_BK=visible), visible) for one in (image, changed))
    assert (predicted[:, 1] - other[:, 1]).abs().max() > 1e-4


def test_regenerate_reads_the_visible_patches_of_its_mask(net: MixedModel) -> None:
    image, visible = tiny.images(2), tiny.places(2, tiny.VISIBLE)
    hidden = torch.ones(2, tiny.NUM_PATCHES, dtype=torch.bool).scatter_(1, visible, False)
    drawn = net.regenerate(image, hidden)
    assert drawn.shape == image.shape
    expected = net.decode_patches(net.encode(image_BSS=image, visible_BK=visible), visible)
    assert_close(drawn, to_image(pyramid.join("multi_scale", expected), 8))


def test_mask_that_hides_more_in_one_image_than_in_another_is_refused() -> None:
    """Reading it by its first row would show the second image's hidden patches to the encoder."""
    hidden = torch.zeros(2, tiny.NUM_PATCHES, dtype=torch.bool)
    hidden[0, :4] = hidden[1, :6] = True
    with pytest.raises(DataError, match="the same number of hidden patches in every image"):
        tiny.model().regenerate(tiny.images(2), hidden)


# ---- words and padding


def test_more_padding_changes_no_report(net: MixedModel) -> None:
    words = tiny.words(3)
    assert_close(net.encode_text(wider(words, 3)), net.encode_text(words))
    assert_close(net.text_features(wider(words, 3)), net.text_features(words))
    assert_close(net.word_logits(wider(words, 3))[:, : words.shape[1]], net.word_logits(words))


def test_padded_report_is_read_as_if_it_were_alone(net: MixedModel) -> None:
    words = tiny.words(3, lengths=[5, 9, 12])
    for row, length in enumerate((5, 9, 12)):
        assert_close(net.encode_text(words)[row], net.encode_text(words[row : row + 1, :length])[0])


def test_more_padding_changes_nothing_in_a_joint_sequence(net: MixedModel) -> None:
    image, words, visible = tiny.images(3), tiny.words(3), tiny.places(3, tiny.VISIBLE)
    plain = net.encode(image_BSS=image, visible_BK=visible, words_BL=words)
    padded = net.encode(image_BSS=image, visible_BK=visible, words_BL=wider(words, 3))
    assert_close(padded.tokens["image"], plain.tokens["image"])
    # Tokens at padded places are computed but stand for nothing.
    present = words != 0
    assert_close(padded.tokens["text"][:, : words.shape[1]][present], plain.tokens["text"][present])


@EXPERTS
def test_skipping_padding_changes_no_word_no_patch_and_no_gradient(experts: bool) -> None:
    words, image, visible = tiny.words(3, lengths=[4, 9, 6]), tiny.images(3), tiny.places(3, tiny.VISIBLE)
    found: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for skips in (False, True):
        net = tiny.model(modality_experts=experts)
        net.skips_padding = skips
        encoded = net.encode(image_BSS=image, visible_BK=visible, words_BL=words)
        spoken, seen = encoded.tokens["text"][words != 0], encoded.tokens["image"]
        (spoken.square().sum() + seen.sum() + net.encode_text(words)[:, 0].sum()).backward()
        gradients = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
        found.append((spoken, seen, gradients))
    (spoken, seen, plain), (spoken_too, seen_too, skipping) = found
    assert_close(spoken_too, spoken)
    assert_close(seen_too, seen)
    assert set(plain) == set(skipping)
    for name, gradient in plain.items():
        torch.testing.assert_close(skipping[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_longer_report_does_change_the_reading(net: MixedModel) -> None:
    words = tiny.words(2, lengths=[5, 5])
    longer = torch.cat([words, torch.full((2, 1), 7)], dim=1)
    assert (net.encode_text(longer) - net.encode_text(words)).abs().max() > 1e-4


def test_order_of_words_matters(net: MixedModel) -> None:
    words = torch.tensor([[tiny.SUMMARY, 7, 8, 9]])
    assert (net.encode_text(words) - net.encode_text(words[:, [0, 3, 2, 1]])).abs().max() > 1e-5


def test_text_features_are_summary_mean_and_maximum_of_the_present_words(net: MixedModel) -> None:
    words = tiny.words(2, lengths=[4, 7])
    tokens = net.encode(words_BL=words).tokens["text"]
    for row, length in enumerate((4, 7)):
        present = tokens[row, :length]
        expected = torch.cat([present[0], present.mean(dim=0), present.max(dim=0).values])
        assert_close(net.text_features(words)[row], expected)


# ---- studies do not see each other


def test_permuting_studies_permutes_the_outputs(net: MixedModel) -> None:
    image, words, order = tiny.images(4), tiny.words(4), torch.tensor([2, 0, 3, 1])
    hidden = torch.zeros(4, tiny.NUM_PATCHES, dtype=torch.bool)
    hidden[:, 5:] = True
    assert_close(net.encode_image(image[order]), net.encode_image(image)[order])
    assert_close(net.image_features(image[order]), net.image_features(image)[order])
    assert_close(net.encode_text(words[order]), net.encode_text(words)[order])
    assert_close(net.word_logits(words[order], image[order]), net.word_logits(words, image)[order])
    assert_close(net.regenerate(image[order], hidden, words[order]), net.regenerate(image, hidden, words)[order])


def test_study_alone_reads_as_in_a_batch(net: MixedModel) -> None:
    image, words = tiny.images(3), tiny.words(3)
    for row in range(3):
        one = slice(row, row + 1)
        assert_close(net.encode_image(image[one])[0], net.encode_image(image)[row])
        assert_close(net.word_logits(words[one], image[one])[0], net.word_logits(words, image)[row])


def test_embeddings_have_norm_one(net: MixedModel) -> None:
    for embedding in (net.encode_image(tiny.images(3)), net.encode_text(tiny.words(3))):
        assert_close(embedding.norm(dim=-1), torch.ones(3))


# ---- joint sequences


def test_report_changes_the_regenerated_image(net: MixedModel) -> None:
    image, hidden = tiny.images(1), torch.zeros(1, tiny.NUM_PATCHES, dtype=torch.bool)
    hidden[:, 4:] = True
    alone, one, other = (net.regenerate(image, hidden, words) for words in (None, tiny.words(1), tiny.words(1, seed=9)))
    assert (one - other).abs().max() > 1e-4
    assert (one - alone).abs().max() > 1e-4


def test_image_changes_the_words_that_are_expected(net: MixedModel) -> None:
    words = tiny.words(1)
    alone, one, other = (net.word_logits(words, image) for image in (None, tiny.images(1), tiny.images(1, seed=9)))
    assert (one - other).abs().max() > 1e-4
    assert (one - alone).abs().max() > 1e-4


# ---- gradients go only where a modality went

IMAGE_PARTS = ("embed_image", "patch_decoder")
TEXT_PARTS = ("embed_text", "word_head")
PAIR_PARTS = ("projection", "match_head")


def speaks_of(name: str, modality: str) -> bool:
    return name.startswith({"image": IMAGE_PARTS, "text": TEXT_PARTS}[modality]) or f".{modality}." in name


@pytest.mark.parametrize(("pass_name", "absent"), [("image", "text"), ("text", "image")])
def test_pass_over_one_modality_leaves_no_gradient_on_the_other_or_on_pairs(
    net: MixedModel, pass_name: str, absent: str
) -> None:
    tiny.PASSES[pass_name](net).backward()
    touched = tiny.touched(net)
    foreign = {name for name, _ in net.named_parameters() if speaks_of(name, absent) or name.startswith(PAIR_PARTS)}
    assert foreign
    assert touched & foreign == set()


@pytest.mark.parametrize(("pass_name", "present"), [("image", "image"), ("text", "text")])
def test_pass_over_one_modality_reaches_all_of_its_own_parameters(net: MixedModel, pass_name: str, present: str) -> None:
    tiny.PASSES[pass_name](net).backward()
    trunk = {name for name, _ in net.named_parameters() if ".attention." in name or ".shared." in name}
    own = {name for name, _ in net.named_parameters() if speaks_of(name, present)}
    own |= {name for name in trunk if name.startswith(("blocks.", "norm."))}
    own -= {name for name in own if name.startswith(PAIR_PARTS)}
    assert own - tiny.touched(net) == set()


def test_joint_pass_reaches_everything_but_the_projection_and_the_experts_that_another_stands_in_for(net: MixedModel) -> None:
    tiny.joint_pass(net).backward()
    names = {name for name, _ in net.named_parameters()}
    replaced = {f"{name.split('.pair.')[0]}.{kind}." for name in names if ".pair." in name for kind in ("image", "text")}
    assert names - tiny.touched(net) == {name for name in names if name.startswith(("projection", *replaced))}


# ---- what per-sample gradients need


def owners(net: nn.Module) -> dict[str, nn.Module]:
    """Modules that own parameters themselves."""
    return {name: module for name, module in net.named_modules() if list(module.parameters(recurse=False))}


def test_every_parameter_belongs_to_a_linear_a_norm_or_a_table(net: MixedModel) -> None:
    """Opacus computes per-sample gradients for these; a bare parameter would have none."""
    assert {type(module) for module in owners(net).values()} == {nn.Linear, nn.LayerNorm, nn.Embedding}


@pytest.mark.parametrize("pass_name", tiny.PASSES)
def test_no_module_runs_twice_in_one_pass(net: MixedModel, pass_name: str) -> None:
    calls: Counter[str] = Counter()
    for name, module in owners(net).items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    tiny.PASSES[pass_name](net)
    assert calls
    assert set(calls.values()) == {1}


def test_no_parameter_is_shared_by_two_modules(net: MixedModel) -> None:
    held = [id(parameter) for module in owners(net).values() for parameter in module.parameters(recurse=False)]
    assert len(held) == len(set(held))


# ---- sizes


@EXPERTS
def test_experts_are_separate_or_shared(experts: bool) -> None:
    names = {name for name, _ in tiny.model(modality_experts=experts).blocks.named_parameters()}
    kinds = {part for name in names for part in name.split(".") if part in ("image", "text", "shared")}
    assert kinds == ({"image", "text"} if experts else {"shared"})


@pytest.mark.parametrize("target", ["multi_scale", "single_scale", "norm_pix"])
def test_every_vision_target_can_be_regenerated(target: str) -> None:
    net, hidden = tiny.model(vision_target=target), torch.zeros(2, tiny.NUM_PATCHES, dtype=torch.bool)
    hidden[:, ::2] = True
    drawn = net.regenerate(tiny.images(2), hidden)
    assert drawn.shape == (2, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert drawn.isfinite().all()


def test_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    one, again, other = (tiny.parameters_of(tiny.model(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])
