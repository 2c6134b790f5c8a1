"""Warm starts against the models they come from: tiny ViTs of timm and BERTs of transformers, random and saved here."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import VisionTransformer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTMAEConfig, ViTMAEForPreTraining

from fedmix import config
from fedmix.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from fedmix.errors import ConfigError
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import sincos_grid
from fedmix.model.pretrained import LoadReport, hashes, warm_start

WORDS = ("heart", "lung", "clear", "##s", "nodule", "left")
OURS, THEIRS = (*SPECIAL_TOKENS, *WORDS), (*SPECIAL_TOKENS, "the", "lung", "##s", "heart", "banana", "left", "nodule")


def tokenizer_file(tokens: tuple[str, ...]) -> str:
    backend = Backend(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend.to_str()


def tokenizer(tokens: tuple[str, ...] = OURS) -> Tokenizer:
    return Tokenizer(tokenizer_file(tokens).encode())


def model(**sizes: object) -> MixedModel:
    return tiny.model(vocabulary=len(OURS), **sizes)


def vit(**wanted: Any) -> VisionTransformer:
    """timm's ViT of the tiny model's sizes, with our epsilon unless told otherwise."""
    sizes = {"img_size": 32, "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = VisionTransformer(**(sizes | {"norm_layer": partial(nn.LayerNorm, eps=1e-5)} | wanted))
        scatter(found)
    return found.eval()


def bert(kind: Callable[[BertConfig], Any] = BertModel, **wanted: Any) -> Any:
    sizes = {"vocab_size": len(THEIRS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 16, "layer_norm_eps": 1e-5}
    with torch.random.fork_rng():
        torch.manual_seed(6)
        found = kind(BertConfig(**(sizes | wanted)))
        scatter(found)
    return found.eval()


def scatter(net: nn.Module) -> None:
    """Make biases and norms random too: a parameter put in the wrong place then changes the answer."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name.lower() and "weight" in name else 0.0))


def saved(net: nn.Module | dict[str, Tensor], folder: Path, name: str = "vit.safetensors") -> Path:
    tensors = net.state_dict() if isinstance(net, nn.Module) else net
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name)
    return folder / name


def bert_folder(folder: Path, net: Any = None, tokens: tuple[str, ...] = THEIRS) -> Path:
    net = bert() if net is None else net
    net.config.save_pretrained(folder)
    saved(net, folder, "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer_file(tokens))
    return folder


def start(net: MixedModel, *, image: Path | None = None, text: Path | None = None) -> LoadReport:
    return warm_start(net, image=image, text=text, tokenizer=tokenizer())


def states(report: LoadReport) -> dict[str, str]:
    return {entry.name: entry.state for entry in report.entries}


def as_timm_sees(image_BSS: Tensor) -> Tensor:
    return ((image_BSS - 0.5) / 0.25).unsqueeze(1).expand(-1, 3, -1, -1)


# ---- image


def test_image_trunk_gives_what_timms_vit_gives(tmp_path: Path) -> None:
    """Patches, positions, summary, both blocks and the last norm: the whole trunk, not one block."""
    net, reference = model(), vit()
    start(net, image=saved(reference, tmp_path))
    ours = net.encode(image_BSS=tiny.images(3)).tokens["image"]
    torch.testing.assert_close(ours, reference.forward_features(as_timm_sees(tiny.images(3))), rtol=1e-4, atol=1e-5)


def test_epsilon_is_all_that_differs_from_a_stock_vit(tmp_path: Path) -> None:
    net, reference = model(), vit(norm_layer=partial(nn.LayerNorm, eps=1e-6))
    start(net, image=saved(reference, tmp_path))
    ours = net.encode(image_BSS=tiny.images(3)).tokens["image"]
    difference = (ours - reference.forward_features(as_timm_sees(tiny.images(3)))).abs().max()
    assert 1e-5 < difference < 2e-2


@pytest.mark.parametrize("experts", [True, False])
def test_every_parameter_is_told_once_and_new_ones_are_untouched(tmp_path: Path, experts: bool) -> None:
    net = model(modality_experts=experts)
    before = tiny.parameters_of(net)
    report = start(net, image=saved(vit(), tmp_path))
    assert [entry.name for entry in report.entries] == list(before)
    for name, state in states(report).items():
        assert torch.equal(net.get_parameter(name), before[name]) == (state == "new"), name
    assert sum(report.count(state)[0] for state in ("loaded", "resampled", "new")) == len(before)
    taken = sum(before[name].numel() for name, state in states(report).items() if state == "loaded")
    assert report.count("loaded") == (2 * 12 + 6, taken)


def test_other_grid_and_patch_are_resampled_as_timm_does(tmp_path: Path) -> None:
    net, reference = model(), vit(img_size=80, patch_size=16)
    report = start(net, image=saved(reference, tmp_path))
    places = resample_abs_pos_embed(reference.pos_embed, [4, 4])[0]
    torch.testing.assert_close(net.embed_image.position.weight, places[1:])
    filters = resample_patch_embed(reference.patch_embed.proj.weight, [8, 8]).sum(dim=1)
    torch.testing.assert_close(net.embed_image.project.weight, filters.flatten(1), rtol=1e-4, atol=1e-5)
    found = {entry.name: entry for entry in report.entries}
    assert found["embed_image.position.weight"].resampled_from == (26, 32)
    assert found["embed_image.project.weight"].resampled_from == (32, 3, 16, 16)
    assert report.count("resampled")[0] == 2


def test_vit_without_a_class_token_leaves_the_summary_new(tmp_path: Path) -> None:
    net = model()
    report = start(net, image=saved(vit(class_token=False, global_pool="avg"), tmp_path))
    assert states(report)["embed_image.tags.weight"] == "new"
    assert states(report)["embed_image.position.weight"] == "loaded"


def test_hugging_faces_mae_starts_like_timms(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"image_size": 32, "patch_size": 8, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    mae = ViTMAEForPreTraining(ViTMAEConfig(**sizes, decoder_num_attention_heads=2, decoder_intermediate_size=16))
    scatter(mae)
    mae.save_pretrained(tmp_path)  # its names on the disk are not those in memory
    net = model()
    start(net, image=tmp_path)
    tokens = torch.randn(2, 5, 32, generator=tiny.generator())
    theirs = mae.vit.layers[1] if hasattr(mae.vit, "layers") else mae.vit.encoder.layer[1]
    answer = theirs(tokens)
    ours = net.blocks[1]({"image": tokens}, None)["image"]
    torch.testing.assert_close(ours, answer[0] if isinstance(answer, tuple) else answer, rtol=0.0, atol=2e-2)
    assert torch.equal(net.norm["image"].weight, mae.vit.layernorm.weight)


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_prefix_of_a_training_script_is_no_obstacle(tmp_path: Path, prefix: str) -> None:
    plain, prefixed = model(), model()
    start(plain, image=saved(vit(), tmp_path))
    start(prefixed, image=saved({prefix + name: value for name, value in vit().state_dict().items()}, tmp_path))
    assert all(torch.equal(plain.get_parameter(name), value) for name, value in prefixed.named_parameters())


@pytest.mark.parametrize(("depth", "note"), [(1, "1 layers were taken, the model's last 1 are new"), (3, "are left out")])
def test_first_layers_are_taken_where_depths_differ(tmp_path: Path, depth: int, note: str) -> None:
    net, reference = model(), vit(depth=depth)
    report = start(net, image=saved(reference, tmp_path))
    assert any(note in line for line in report.notes)
    assert states(report)["blocks.1.attention.qkv.weight"] == ("new" if depth == 1 else "loaded")
    assert torch.equal(net.blocks[0].attention.qkv.weight, reference.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_named_size_has_the_blocks_of_timms_vit_of_that_name(size: str) -> None:
    """Shape by shape, patch, heads and depth too, so that its public checkpoints fit."""
    sizes = config.Model.model_validate({"size": size})
    one_block = sizes.model_copy(update={"depth": 1, "decoder_depth": 1})
    net = MixedModel(one_block, image_size=224, max_words=64, vocabulary=len(OURS))
    with torch.device("meta"):
        reference = timm.create_model(f"vit_{size}_patch16_224", num_classes=0)
    assert sizes.depth == len(reference.blocks)
    ours = [value.shape for name, value in net.blocks[0].named_parameters() if ".text." not in name]
    theirs = [value.shape for value in reference.blocks[0].parameters()]
    assert sorted(ours) == sorted(theirs)
    assert net.blocks[0].attention.num_heads == reference.blocks[0].attn.num_heads
    assert net.embed_image.project.in_features * 3 == reference.patch_embed.proj.weight[0].numel()
    assert net.num_patches == reference.patch_embed.num_patches


def test_public_vit_fits_the_named_size_at_another_resolution(tmp_path: Path) -> None:
    sizes = config.Model.model_validate({"size": "tiny", "depth": 1})
    net = MixedModel(sizes, image_size=96, max_words=8, vocabulary=len(OURS))
    report = start(net, image=saved(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), tmp_path))
    assert [entry.name for entry in report.entries if entry.state == "resampled"] == ["embed_image.position.weight"]
    assert report.notes == ()


# ---- text


def test_words_are_mapped_by_their_string(tmp_path: Path) -> None:
    net, reference = model(), bert()
    before = tiny.parameters_of(net)["embed_text.word.weight"]
    report = start(net, text=bert_folder(tmp_path, reference))
    table = reference.embeddings.word_embeddings.weight
    for number, token in enumerate(OURS):
        expected = table[THEIRS.index(token)] if token in THEIRS else before[number]
        assert torch.equal(net.embed_text.word.weight[number], expected), token
    assert "10 of 11 word embeddings were found by their string, 1 are new" in report.notes
    assert states(report)["embed_text.word.weight"] == "resampled"
    words = next(entry for entry in report.entries if entry.name == "embed_text.word.weight")
    assert (words.resampled_from, words.num_taken, words.num_new) == ((12, 32), 10 * 32, 32)
    assert sum(report.count(state)[1] for state in ("loaded", "resampled", "new")) == sum(p.numel() for p in net.parameters())


def test_same_tokenizer_maps_words_one_to_one(tmp_path: Path) -> None:
    net, reference = model(), bert(vocab_size=len(OURS))
    report = start(net, text=bert_folder(tmp_path, reference, OURS))
    assert torch.equal(net.embed_text.word.weight, reference.embeddings.word_embeddings.weight)
    assert states(report)["embed_text.word.weight"] == "loaded"


def test_first_attention_reads_and_says_what_berts_does(tmp_path: Path) -> None:
    """Embeddings, their norm, q, k, v and projection; after it BERT normalises the residual and we do not."""
    net, reference = model(), bert(vocab_size=len(OURS))
    start(net, text=bert_folder(tmp_path, reference, OURS))
    words_BL = torch.tensor([[2, 5, 6, 7, 9]])
    block = net.blocks[0]
    ours = block.attention(block.attention_norm["text"](net.embed_text(words_BL)))
    layer = reference.encoder.layer[0].attention
    theirs = layer.output.dense(layer.self(reference.embeddings(words_BL))[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ffn_and_its_norm_are_berts(tmp_path: Path) -> None:
    net, reference = model(), bert()
    start(net, text=bert_folder(tmp_path, reference))
    tokens = torch.randn(2, 4, 32, generator=tiny.generator())
    for block, layer in zip(net.blocks, reference.encoder.layer, strict=True):
        assert torch.equal(block.mlp["text"].fc1.weight, layer.intermediate.dense.weight)
        normed = layer.attention.output.LayerNorm(tokens)
        theirs = layer.output.dense(layer.intermediate(normed))
        torch.testing.assert_close(block.mlp["text"](block.mlp_norm["text"](tokens)), theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(net.blocks[1].attention_norm["text"].weight, reference.encoder.layer[0].output.LayerNorm.weight)
    assert torch.equal(net.norm["text"].bias, reference.encoder.layer[1].output.LayerNorm.bias)


@pytest.mark.parametrize("rows", [7, 40])
def test_positions_are_berts_first_and_new_where_berts_end(tmp_path: Path, rows: int) -> None:
    net, reference = model(), bert(max_position_embeddings=rows)
    before = tiny.parameters_of(net)["embed_text.position.weight"]
    report = start(net, text=bert_folder(tmp_path, reference))
    taken = min(rows, tiny.MAX_WORDS)
    assert torch.equal(net.embed_text.position.weight[:taken], reference.embeddings.position_embeddings.weight[:taken])
    assert torch.equal(net.embed_text.position.weight[taken:], before[taken:])
    assert {entry.name: entry.num_new for entry in report.entries}["embed_text.position.weight"] == 32 * (
        tiny.MAX_WORDS - taken
    )


def test_oldest_names_and_a_model_with_heads_are_read(tmp_path: Path) -> None:
    net, reference = model(), bert(BertForMaskedLM)
    folder = bert_folder(tmp_path, reference)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in reference.state_dict().items()
    }
    saved(old, folder, "model.safetensors")
    start(net, text=folder)
    layer = reference.bert.encoder.layer[1]
    assert torch.equal(net.blocks[1].mlp_norm["text"].weight, layer.attention.output.LayerNorm.weight)


# ---- both


def test_attention_is_the_images_and_the_text_expert_is_berts(tmp_path: Path) -> None:
    net, image, text = model(), vit(), bert()
    report = start(net, image=saved(image, tmp_path), text=bert_folder(tmp_path, text))
    assert torch.equal(net.blocks[0].attention.qkv.weight, image.blocks[0].attn.qkv.weight)
    assert torch.equal(net.blocks[0].mlp["image"].fc1.weight, image.blocks[0].mlp.fc1.weight)
    assert torch.equal(net.blocks[0].mlp["text"].fc1.weight, text.encoder.layer[0].intermediate.dense.weight)
    trunk = ("blocks", "norm", "embed_image", "embed_text")
    assert {name.split(".")[0] for name, state in states(report).items() if state == "new"}.isdisjoint(trunk)


def test_attention_beyond_a_shallower_image_checkpoint_is_new_not_berts(tmp_path: Path) -> None:
    report = start(model(), image=saved(vit(depth=1), tmp_path), text=bert_folder(tmp_path))
    assert states(report)["blocks.1.attention.qkv.weight"] == "new"
    assert states(report)["blocks.1.mlp.text.fc1.weight"] == "loaded"


def test_shared_experts_are_the_images_and_this_is_said(tmp_path: Path) -> None:
    net, image = model(modality_experts=False), vit()
    report = start(net, image=saved(image, tmp_path), text=bert_folder(tmp_path))
    assert torch.equal(net.blocks[0].mlp["shared"].fc1.weight, image.blocks[0].mlp.fc1.weight)
    assert any("experts are shared" in note for note in report.notes)


# ---- wrong and partial files


def refused(net: MixedModel, message: str, *, image: Path | None = None, text: Path | None = None) -> None:
    """The start is refused with this message, names no path, and leaves the model as it was."""
    before = tiny.parameters_of(net)
    with pytest.raises(ConfigError, match=message) as caught:
        start(net, image=image, text=text)
    assert str((image or text or Path("-")).parent) not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_other_width_is_refused_with_both_widths(tmp_path: Path) -> None:
    refused(model(), r"image is 64 wide and model.width is 32", image=saved(vit(embed_dim=64), tmp_path))
    refused(model(), r"text is 64 wide and model.width is 32", text=bert_folder(tmp_path, bert(hidden_size=64)))


def test_text_that_does_not_fit_leaves_the_image_side_unloaded_too(tmp_path: Path) -> None:
    image, text = saved(vit(), tmp_path), bert_folder(tmp_path, bert(hidden_size=64))
    refused(model(), "text is 64 wide", image=image, text=text)


def test_other_ffn_is_refused_with_both_shapes(tmp_path: Path) -> None:
    refused(
        model(), r"fc1.weight is 64x32, the model's is 128x32; set model.mlp_ratio", image=saved(vit(mlp_ratio=2), tmp_path)
    )


def test_other_heads_are_refused_where_attention_is_berts_and_noted_for_a_vit(tmp_path: Path) -> None:
    refused(model(), "has 4 heads and model.num_heads is 2", text=bert_folder(tmp_path, bert(num_attention_heads=4)))
    report = start(model(), image=saved(vit(), tmp_path))
    assert any("those of ViTs are 64 wide, the model's 16" in note for note in report.notes)


@pytest.mark.parametrize(
    ("gone", "count"), [(("blocks.0.attn.qkv.weight",), 1), (("blocks.1.mlp.fc1.bias", "norm.weight", "pos_embed"), 3)]
)
def test_partial_image_file_is_refused_with_names_and_counts(tmp_path: Path, gone: tuple[str, ...], count: int) -> None:
    kept = {name: value for name, value in vit().state_dict().items() if name not in gone}
    refused(model(), f"image lacks {count} of the 29 tensors expected of it: .*{gone[0]}", image=saved(kept, tmp_path))


def test_partial_text_file_is_refused_with_names_and_counts(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if ".layer.1." not in name}
    saved(kept, folder, "model.safetensors")
    refused(
        model(), r"text lacks 16 of the 37 tensors expected of it: encoder.layer.1.attention.self.query.weight", text=folder
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickled checkpoint", b"\x10" * 200])
def test_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vit.pth").write_bytes(content)
    refused(model(), "image is not a whole safetensors file", image=tmp_path / "vit.pth")


def test_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(vit(), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(model(), "image is not a whole safetensors file", image=path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = vit().state_dict()
    tensors["blocks.1.norm2.bias"][3] = float("nan")
    refused(model(), r"blocks.1.mlp_norm.image.bias holds numbers that are not finite", image=saved(tensors, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    net, tensors = model(), {name: value.to(dtype) for name, value in vit(img_size=80).state_dict().items()}
    start(net, image=saved(tensors, tmp_path))
    assert torch.equal(net.blocks[0].attention.qkv.weight, tensors["blocks.0.attn.qkv.weight"].float())
    assert {value.dtype for value in net.parameters()} == {torch.float32}


def test_missing_file_is_refused(tmp_path: Path) -> None:
    refused(model(), "image: there is no such file", image=tmp_path / "none.safetensors")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (bert_folder(folder) / name).unlink()
        refused(model(), f"text has no {name}; name a folder that holds", text=folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json lacks a whole number for hidden_size"),
        ({"num_hidden_layers": "2", "intermediate_size": 0}, "for num_hidden_layers, intermediate_size"),
        ({"model_type": "roberta"}, "has model_type 'roberta', expected one of bert"),
        ({"hidden_size": 64}, "text is 64 wide"),
    ],
)
def test_config_json_without_its_sizes_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = bert_folder(tmp_path)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    refused(model(), message, text=folder)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_config_json_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    folder = bert_folder(tmp_path)
    (folder / "config.json").write_text(content)
    refused(model(), "config.json is not a JSON object", text=folder)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    (folder / "tokenizer.json").write_text(tokenizer_file((*THEIRS, "more")))
    refused(model(), "counts to 12, the checkpoint has 12 word embeddings", text=folder)
    (folder / "tokenizer.json").write_text(tokenizer_file((*SPECIAL_TOKENS, "herz")))
    refused(model(), "none of the 11 words of data.tokenizer", text=folder)


def test_vit_with_parts_that_our_block_has_not_is_refused(tmp_path: Path) -> None:
    """Layer scale left out would multiply every residual by a hundred or more."""
    refused(model(), r"trunk has not: blocks.N.ls1.gamma", image=saved(vit(init_values=0.01), tmp_path))
    refused(model(), r"trunk has not: blocks.N.attn.k_norm", image=saved(vit(qk_norm=True), tmp_path))
    refused(model(), r"reg_token", image=saved(vit(reg_tokens=2, no_embed_class=True), tmp_path))


# ---- content


def test_hashes_tell_content_and_not_path(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        bert_folder(tmp_path / name)
        saved(vit(), tmp_path / name)
    here, there = (hashes(tmp_path / name / "vit.safetensors", tmp_path / name) for name in ("here", "there"))
    assert here == there
    assert sorted(here) == ["image", "text/config.json", "text/model.safetensors", "text/tokenizer.json"]
    (tmp_path / "there" / "config.json").write_text("{}")
    changed = hashes(None, tmp_path / "there")
    assert changed["text/config.json"] != here["text/config.json"]
    assert hashes(None, None) == {}


def test_grid_of_a_fresh_model_is_not_what_the_tests_compare_with() -> None:
    """Else a start that forgot the positions would pass."""
    assert torch.equal(model().embed_image.position.weight, sincos_grid(4, 32))


# ---- experts of joint sequences


@pytest.mark.parametrize("sides", [("image",), ("text",), ("image", "text")])
def test_experts_of_joint_sequences_start_as_copies_of_the_image_expert_or_else_of_the_text_expert(
    tmp_path: Path, sides: tuple[str, ...]
) -> None:
    net = model(pair_experts=1)
    image = saved(vit(), tmp_path) if "image" in sides else None
    text = bert_folder(tmp_path / "bert") if "text" in sides else None
    report = start(net, image=image, text=text)
    for part in (net.blocks[1].mlp, net.blocks[1].mlp_norm):
        for name, value in part["pair"].named_parameters():
            assert torch.equal(value, part[sides[0]].get_parameter(name))
    assert any(f"copies of the {sides[0]} experts" in note for note in report.notes)
    assert {state for name, state in states(report).items() if ".pair." in name} == {"loaded"}


def test_an_expert_of_joint_sequences_above_the_checkpoints_layers_stays_new(tmp_path: Path) -> None:
    net = model(depth=3, pair_experts=2)
    found = states(start(net, image=saved(vit(), tmp_path)))
    assert {state for name, state in found.items() if name.startswith("blocks.1.") and ".pair." in name} == {"loaded"}
    assert {state for name, state in found.items() if name.startswith("blocks.2.") and ".pair." in name} == {"new"}
