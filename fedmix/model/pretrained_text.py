"""What a BERT holds, under our names; pretrained.py says what is taken and what stays different."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmix.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from fedmix.errors import ConfigError
from fedmix.model.checkpoints import (
    SUFFIXES,
    TEXT,
    Found,
    check_width,
    depth_notes,
    expert_of,
    joined,
    read,
    refuse_others,
    require,
    text_file,
)
from fedmix.model.encoder import MixedModel

TEXT_KINDS = ("bert", "cxr-bert")  # RoBERTa's kind counts positions from 2 and cuts words in another way
TEXT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def text_parameters(model: MixedModel, folder: Path, tokenizer: Tokenizer, notes: list[str]) -> dict[str, Found]:
    """Words, positions, blocks and last norm of a BERT, under our names."""
    sizes = text_sizes(text_file(folder, "config.json"))
    tensors = _bert_names(read(text_file(folder, "model.safetensors"), TEXT))
    depth, expert = sizes["num_hidden_layers"], expert_of("text", model)
    tables = [f"embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")]
    wanted = [f"{part}.{kind}" for part in ("embeddings.LayerNorm", *_bert_parts(depth)) for kind in SUFFIXES]
    require(tensors, [*tables, *wanted], TEXT)
    refuse_others(tensors, "encoder.layer.", set(wanted), TEXT)
    check_width(model, sizes["hidden_size"], TEXT)
    if any(tensors[table].ndim != 2 or tensors[table].shape[1] != sizes["hidden_size"] for table in tables):
        raise ConfigError(f"{TEXT}: model.safetensors and config.json are of different models; save them together")
    found = _words(model, tensors[tables[0]], _their_tokenizer(folder), tokenizer, notes)
    found["embed_text.position.weight"] = _first_rows(model.embed_text.position.weight, tensors[tables[1]])
    found["embed_text.tag.weight"] = Found(tensors[tables[2]][:1])
    taken = min(depth, len(model.blocks))
    for kind in SUFFIXES:
        for layer in range(taken):
            for ours, value in _bert_layer(tensors, layer, expert, kind).items():
                found[f"blocks.{layer}.{ours}.{kind}"] = Found(value)
        found[f"norm.{expert}.{kind}"] = Found(tensors[f"encoder.layer.{taken - 1}.output.LayerNorm.{kind}"])
    notes += depth_notes("text", depth, len(model.blocks))
    return found


def text_sizes(file: Path) -> dict[str, int]:
    """The sizes that config.json promises."""
    try:
        values: Any = json.loads(file.read_bytes())
    except (ValueError, OSError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{TEXT}: config.json is not a JSON object; save the model again with save_pretrained(folder)")
    kind = values.get("model_type")
    if kind not in TEXT_KINDS:
        raise ConfigError(f"{TEXT}: config.json has model_type {kind!r}, expected one of {', '.join(TEXT_KINDS)}")
    wrong = [name for name in TEXT_SIZES if not isinstance(values.get(name), int) or values[name] < 1]
    if wrong:
        raise ConfigError(
            f"{TEXT}: config.json lacks a whole number for {', '.join(wrong)}; save it with save_pretrained(folder)"
        )
    return {name: values[name] for name in TEXT_SIZES}


def _bert_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of a model with heads; the oldest files call a LayerNorm's weight and bias gamma and beta."""
    plain = ((re.sub(r"^bert\.", "", name), value) for name, value in tensors.items())
    return {name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
            for name, value in plain}  # fmt: skip


def _bert_parts(depth: int) -> list[str]:
    parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
    return [f"encoder.layer.{layer}.{part}" for layer in range(depth) for part in parts]


def _bert_layer(tensors: Mapping[str, Tensor], layer: int, expert: str, kind: str) -> dict[str, Tensor]:
    """Weights, or biases, of one of our blocks; the module's docstring says why the norms go where they go."""
    own = f"encoder.layer.{layer}"
    before = f"encoder.layer.{layer - 1}.output.LayerNorm" if layer else "embeddings.LayerNorm"
    attention = [tensors[f"{own}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
    return {
        "attention.qkv": joined(attention, TEXT),
        "attention.proj": tensors[f"{own}.attention.output.dense.{kind}"],
        f"attention_norm.{expert}": tensors[f"{before}.{kind}"],
        f"mlp_norm.{expert}": tensors[f"{own}.attention.output.LayerNorm.{kind}"],
        f"mlp.{expert}.fc1": tensors[f"{own}.intermediate.dense.{kind}"],
        f"mlp.{expert}.fc2": tensors[f"{own}.output.dense.{kind}"],
    }


def _their_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(text_file(folder, "tokenizer.json"))
    except ConfigError as error:
        raise ConfigError(f"{TEXT}: {error}") from None


def _words(
    model: MixedModel, theirs_VD: Tensor, their_tokenizer: Tokenizer, tokenizer: Tokenizer, notes: list[str]
) -> dict[str, Found]:
    """Our word table with every row that their vocabulary has under the same string; the same tokenizer maps one to one."""
    ours, theirs = tokenizer.vocabulary, their_tokenizer.vocabulary
    if max(theirs.values()) >= len(theirs_VD):
        raise ConfigError(
            f"{TEXT}: tokenizer.json counts to {max(theirs.values())}, the checkpoint has {len(theirs_VD)} word embeddings; "
            "take the tokenizer that belongs to it"
        )
    common = sorted(set(ours) & set(theirs), key=ours.__getitem__)
    if set(common) <= {*SPECIAL_TOKENS, *(token for token in ours if ours[token] in tokenizer.special_ids)}:
        raise ConfigError(f"{TEXT}: none of the {len(ours)} words of data.tokenizer is in its tokenizer.json; take another")
    words_VD = model.embed_text.word.weight.detach().clone()
    words_VD[[ours[token] for token in common]] = theirs_VD[[theirs[token] for token in common]]
    is_same = tokenizer.fingerprint == their_tokenizer.fingerprint and theirs_VD.shape == words_VD.shape
    if len(common) < len(ours):
        notes.append(
            f"{len(common)} of {len(ours)} word embeddings were found by their string, {len(ours) - len(common)} are new"
        )
    num_new = (len(words_VD) - len(common)) * words_VD.shape[1]
    return {"embed_text.word.weight": Found(words_VD, None if is_same else tuple(theirs_VD.shape), num_new)}


def _first_rows(own_LD: Tensor, theirs_LD: Tensor) -> Found:
    """The first positions; where theirs end, ours stay new."""
    rows_LD, num_rows = own_LD.detach().clone(), min(len(own_LD), len(theirs_LD))
    rows_LD[:num_rows] = theirs_LD[:num_rows]
    num_new = rows_LD[num_rows:].numel()
    return Found(rows_LD, None if theirs_LD.shape == rows_LD.shape else tuple(theirs_LD.shape), num_new)
