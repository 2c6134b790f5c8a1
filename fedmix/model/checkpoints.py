"""Reading the files of a warm start, and refusing what does not fit the model. Shapes as in encoder.py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedmix.disk import reason_of
from fedmix.errors import ConfigError
from fedmix.model.encoder import MixedModel

# Errors name the key and not the path behind it: a path may name a person.
IMAGE, TEXT, MODEL = "model.warm_start.image", "model.warm_start.text", "model.warm_start.model"
TEXT_FILES = ("config.json", "model.safetensors", "tokenizer.json")
OTHER_INPUTS = ("reg_token", "dist_token", "norm_pre.weight")  # registers, distillation, CLIP's norm before the blocks
SUFFIXES = ("weight", "bias")


class Found(NamedTuple):
    """What a checkpoint holds for one of our parameters, the shape it had in the file if it had to be fitted, and how many
    of the numbers it does not have, so that they stay as they were drawn.
    """

    value: Tensor
    resampled_from: tuple[int, ...] | None = None
    num_new: int = 0


def image_file(path: Path) -> Path:
    """The file itself, or the one that its folder holds."""
    return path / "model.safetensors" if path.is_dir() else path


def text_file(folder: Path, name: str) -> Path:
    """A file of a BERT's folder. Raises ConfigError where it is missing."""
    if not (folder / name).is_file():
        raise ConfigError(f"{TEXT} has no {name}; name a folder that holds {', '.join(TEXT_FILES)}")
    return folder / name


def read(file: Path, key: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file as float32."""
    if not file.is_file():
        raise ConfigError(f"{key}: there is no such file; name a .safetensors file of this machine, nothing is downloaded")
    try:
        return {name: value.float() for name, value in load_file(file).items()}
    except SafetensorError:
        raise ConfigError(
            f"{key} is not a whole safetensors file; fetch it again, or convert a .pth or .bin file elsewhere, for those "
            "can run code"
        ) from None
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {reason_of(error)}") from None


def sha256(file: Path, key: str) -> str:
    """A file's hash. Raises ConfigError where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {reason_of(error)}; name a file of this machine") from None


def require(tensors: Mapping[str, Tensor], names: list[str], key: str) -> None:
    """Raise ConfigError where a file lacks some of its tensors."""
    missing = [name for name in names if name not in tensors]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(f"{key} lacks {len(missing)} of the {len(names)} tensors expected of it: {some}; take a whole file")


def refuse_others(tensors: Mapping[str, Tensor], prefix: str, known: set[str], key: str) -> None:
    """A part that our block has not (layer scale, norms of query and key) would be left out, and the rest mean less."""
    unknown = [name for name in tensors if name in OTHER_INPUTS or (name.startswith(prefix) and name not in known)]
    others = sorted({re.sub(r"\d+", "N", name, count=1) for name in unknown})
    if others:
        raise ConfigError(f"{key} has parts that our trunk has not: {', '.join(others[:3])}; take a plain ViT or BERT")


def depth_of(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Layers that a file speaks of, at least one."""
    found = [re.match(re.escape(prefix) + r"(\d{1,4})\.", name) for name in tensors]
    return max([int(one[1]) for one in found if one], default=0) + 1


def depth_notes(what: str, theirs: int, ours: int) -> list[str]:
    """What becomes of layers that only one side has."""
    if theirs == ours:
        return []
    rest = "the others are left out" if theirs > ours else f"the model's last {ours - theirs} are new"
    return [f"the first {min(theirs, ours)} of the {what} checkpoint's {theirs} layers were taken, {rest}"]


def check_width(model: MixedModel, width: int, key: str) -> None:
    """Raise ConfigError where a file is of another width."""
    if width != width_of(model):
        raise ConfigError(
            f"{key} is {width} wide and model.width is {width_of(model)}; set model.width = {width}, or take another checkpoint"
        )


def check_heads(model: MixedModel, num_heads: int) -> None:
    """The same matrix cut into other heads is another attention; it matters where attention comes from the text."""
    if num_heads != num_heads_of(model):
        raise ConfigError(f"{TEXT} has {num_heads} heads and model.num_heads is {num_heads_of(model)}; set it to {num_heads}")


def width_of(model: MixedModel) -> int:
    """Numbers a token."""
    return model.embed_text.tag.embedding_dim


def num_heads_of(model: MixedModel) -> int:
    """Heads of attention."""
    return int(model.get_submodule("blocks.0.attention").num_heads)  # type: ignore[arg-type]


def expert_of(modality: str, model: MixedModel) -> str:
    """The expert that reads a modality: its own, or the shared one."""
    return modality if modality in model.norm else "shared"


def named(ours: str, modality: str, model: MixedModel) -> str:
    """A parameter's name with the expert of a modality in it."""
    return ours.format(expert=expert_of(modality, model))


def shape_of(tensor: Tensor) -> str:
    """Sizes for a message."""
    return "x".join(str(size) for size in tensor.shape)


def joined(parts: list[Tensor], key: str) -> Tensor:
    """Query, key and value as the one matrix, or bias, that our attention has."""
    if len({part.shape for part in parts}) > 1:
        raise ConfigError(f"{key}: query, key and value differ in shape; take a plain checkpoint")
    return torch.cat(parts)
