"""What an image checkpoint holds, under our names; pretrained.py says what is taken and what stays different."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from fedmix.errors import ConfigError
from fedmix.model.checkpoints import (
    IMAGE,
    SUFFIXES,
    Found,
    check_width,
    depth_notes,
    depth_of,
    expert_of,
    image_file,
    joined,
    named,
    num_heads_of,
    read,
    refuse_others,
    require,
    shape_of,
    width_of,
)
from fedmix.model.encoder import MixedModel

IMAGE_BLOCK = {  # ours -> timm's, inside a block
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "attention_norm.{expert}": "norm1",
    "mlp_norm.{expert}": "norm2",
    "mlp.{expert}.fc1": "mlp.fc1",
    "mlp.{expert}.fc2": "mlp.fc2",
}
HUGGING_FACE_TO_TIMM = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^layernorm\.", "norm."),
    (r"^fc_norm\.", "norm."),  # timm's name where the mean is read instead of the class token
)


def image_parameters(model: MixedModel, path: Path, notes: list[str]) -> dict[str, Found]:
    """Patches, positions, summary, blocks and last norm of a ViT, under our names."""
    tensors = _timm_names(read(image_file(path), IMAGE))
    depth = depth_of(tensors, "blocks.")
    blocks = {named(ours, "image", model): timm for ours, timm in IMAGE_BLOCK.items()}
    wanted = [f"blocks.{layer}.{timm}.{kind}" for layer in range(depth) for timm in blocks.values() for kind in SUFFIXES]
    ends = ["pos_embed", *(f"{name}.{kind}" for name in ("patch_embed.proj", "norm") for kind in SUFFIXES)]
    require(tensors, [*ends, *wanted], IMAGE)
    refuse_others(tensors, "blocks.", set(wanted), IMAGE)
    check_width(model, tensors["norm.weight"].numel(), IMAGE)
    found = _embedding(model, tensors)
    for layer in range(min(depth, len(model.blocks))):
        for ours, timm in blocks.items():
            for kind in SUFFIXES:
                found[f"blocks.{layer}.{ours}.{kind}"] = Found(tensors[f"blocks.{layer}.{timm}.{kind}"])
    for kind in SUFFIXES:
        found[f"norm.{expert_of('image', model)}.{kind}"] = Found(tensors[f"norm.{kind}"])
    notes += depth_notes("image", depth, len(model.blocks))
    head_width = width_of(model) // num_heads_of(model)
    if head_width != 64:
        notes.append(f"the image checkpoint does not say its heads; those of ViTs are 64 wide, the model's {head_width}")
    return found


def _timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names; query, key and value become one."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = re.sub(r"^(module\.|model\.|vit\.)+", "", name)
        for pattern, replacement in HUGGING_FACE_TO_TIMM:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    for name in [name for name in renamed if ".attention.attention.query." in name]:
        parts = [name, name.replace(".query.", ".key."), name.replace(".query.", ".value.")]
        if all(part in renamed for part in parts):
            renamed[name.replace("attention.attention.query", "attn.qkv")] = joined(
                [renamed.pop(part) for part in parts], IMAGE
            )
    return renamed


def _embedding(model: MixedModel, tensors: Mapping[str, Tensor]) -> dict[str, Found]:
    """Patch projection, positions and summary token, fitted to our patch size and grid."""
    filters, position = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    num_prefix = _num_prefix(position)
    summary = tensors.get("cls_token", position)
    if filters.ndim != 4 or num_prefix is None or {position.shape[-1], summary.shape[-1]} != {width_of(model)}:
        raise ConfigError(
            f"{IMAGE}: patch_embed.proj.weight is {shape_of(filters)} and pos_embed {shape_of(position)}, expected "
            f"{width_of(model)} x colours x p x p, and 1 x (a square number, or one more) x {width_of(model)}; take a plain ViT"
        )
    size, side = model.patch_size, math.isqrt(model.num_patches)
    grey = resample_patch_embed(filters.sum(dim=1, keepdim=True), [size, size]).flatten(1)
    places = resample_abs_pos_embed(position, [side, side], num_prefix_tokens=num_prefix)[0]
    found = {
        "embed_image.project.weight": Found(grey, None if filters.shape[-1] == size else tuple(filters.shape)),
        "embed_image.project.bias": Found(tensors["patch_embed.proj.bias"]),
        "embed_image.position.weight": Found(
            places[num_prefix:], None if position.shape[1] - num_prefix == model.num_patches else tuple(position.shape[1:])
        ),
    }
    if "cls_token" in tensors:
        summary_D = summary.flatten()[: width_of(model)] + (places[0] if num_prefix else 0.0)
        # A ViT has no "this is an image" tag: zero, so that the trunk sees what the ViT saw.
        found["embed_image.tags.weight"] = Found(torch.stack([torch.zeros_like(summary_D), summary_D]))
    return found


def _num_prefix(position: Tensor) -> int | None:
    """Rows of a position table [1, rows, D] before its grid: one for a class token or none; None if it is neither."""
    if position.ndim != 3 or len(position) != 1:
        return None
    rows = position.shape[1]
    return next((prefix for prefix in (1, 0) if rows > prefix and math.isqrt(rows - prefix) ** 2 == rows - prefix), None)
