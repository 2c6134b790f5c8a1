"""A warm start from local files: a ViT for the image side and attention, a BERT for the text side. Nothing is downloaded.

Image: safetensors with the names of timm and of MAE's own repository (they agree), or of Hugging Face's ViT and ViTMAE.
Colour filters are summed to one, for a grey image repeated in three channels meets their sum; patches and positions of
other sizes are resampled (FlexiViT, 2212.08013; bicubic). The class token and its position become our summary token.
What stays different: LayerNorm's epsilon 1e-5, and grey scaled by (x - .5) / .25 whatever the file's own mean and deviation
were.

Text: a folder with config.json, model.safetensors and tokenizer.json of BERT's kind. BERT normalises after each residual
sum, our blocks before each sublayer. So each LayerNorm goes where its output is read: the embeddings' before the first
attention, a layer's attention LayerNorm before its FFN, its output LayerNorm before the next layer's attention. Attention
and FFN then see inputs of the kind they were trained on; but BERT's residual stream is normalised and ours is not, so the
first attention agrees with BERT's and deeper features only resemble them. It is a start to train from, not BERT itself.

Where both are given, the image checkpoint decides what both hold: attention, and the experts if they are shared. Experts of
joint sequences, which no file has, start as copies of the image expert, or without an image file of the text expert: most
tokens of a joint sequence are patches, and the image side is the one that computes what its checkpoint does. Decoder and
heads are always new. Shapes: B, P, L, V, D as in encoder.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError
from fedmix.model.checkpoints import (
    IMAGE,
    MODEL,
    TEXT,
    TEXT_FILES,
    Found,
    check_heads,
    image_file,
    sha256,
    shape_of,
    text_file,
)
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import PAIR
from fedmix.model.pretrained_image import image_parameters
from fedmix.model.pretrained_text import text_parameters, text_sizes

BLOCK_MLP = re.compile(r"blocks\.\d+\.mlp")  # an FFN or the norm before it

State = Literal["loaded", "resampled", "new"]


@dataclass(frozen=True)
class Entry:
    """Where the start of one parameter comes from."""

    name: str
    state: State
    shape: tuple[int, ...]
    resampled_from: tuple[int, ...] | None
    num_new: int  # of its numbers, those that no file has

    @property
    def num_taken(self) -> int:
        """Numbers that come from a file."""
        return math.prod(self.shape) - self.num_new


@dataclass(frozen=True)
class LoadReport:
    """Every parameter of a model once, and what a reader of the table should know beside it."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def count(self, state: State) -> tuple[int, int]:
        """How many parameters are in a state, and how many numbers; a new row of a word table counts as new numbers."""
        chosen = [entry for entry in self.entries if entry.state == state]
        if state == "new":
            return len(chosen), sum(entry.num_new for entry in self.entries)
        return len(chosen), sum(entry.num_taken for entry in chosen)


def warm_start(model: MixedModel, *, image: Path | None, text: Path | None, tokenizer: Tokenizer) -> LoadReport:
    """Copy what the files hold into a model. ``tokenizer`` is the experiment's own, whose ids the model reads.

    Raises ConfigError for files that are missing, partial, of another width, or not what they should be; then the model
    is as it was.
    """
    found: dict[str, Found] = {}
    notes: list[str] = []
    if text is not None:
        found |= text_parameters(model, text, tokenizer, notes)
        if image is None:
            check_heads(model, text_sizes(text_file(text, "config.json"))["num_attention_heads"])
    if image is not None:
        found = {name: one for name, one in found.items() if not _is_common(name)}
        if text is not None and "shared" in model.norm:
            notes.append("experts are shared: FFN and norms come from the image checkpoint, only words from the text one")
        found |= image_parameters(model, image, notes)
    found |= _pair_parameters(model, found, "image" if image is not None else "text", notes)
    return _put(model, found, notes)


def hashes(image: Path | None, text: Path | None, model: Path | None = None) -> dict[str, str]:
    """SHA-256 of each file that a warm start reads, by role: a run says by content, not by path, what it began with."""
    files = {} if image is None else {"image": (image_file(image), IMAGE)}
    if text is not None:
        files |= {f"text/{name}": (text_file(text, name), TEXT) for name in TEXT_FILES}
    if model is not None:  # a fedmix model folder (folder.py) has the same three names
        files |= {f"model/{name}": (model / name, MODEL) for name in TEXT_FILES}
    return {role: sha256(path, key) for role, (path, key) in files.items()}


def _is_common(name: str) -> bool:
    """Whether image and text read this parameter of the trunk alike."""
    return ".attention." in name or "shared" in name.split(".")


def _pair_parameters(model: MixedModel, found: Mapping[str, Found], modality: str, notes: list[str]) -> dict[str, Found]:
    """The experts of joint sequences as copies of an expert that a file has; where it has none of their block, none."""
    own = dict(model.named_parameters())
    renamed = {name.replace(f".{modality}.", f".{PAIR}."): one for name, one in found.items() if BLOCK_MLP.match(name)}
    copies = {name: one for name, one in renamed.items() if name in own and name not in found}
    if copies:
        notes.append(f"the experts of joint sequences start as copies of the {modality} experts of their blocks")
    return copies


def _put(model: MixedModel, found: Mapping[str, Found], notes: Iterable[str]) -> LoadReport:
    own = dict(model.named_parameters())
    for name, one in found.items():
        if one.value.shape != own[name].shape:
            raise ConfigError(
                f"model.warm_start: the checkpoint's {name} is {shape_of(one.value)}, the model's is {shape_of(own[name])}; "
                "set model.mlp_ratio as the checkpoint has it, or take another"
            )
        if not bool(one.value.isfinite().all()):
            raise ConfigError(f"model.warm_start: the checkpoint's {name} holds numbers that are not finite; fetch it again")
    entries = []
    with torch.no_grad():
        for name, parameter in own.items():
            shape, source = tuple(parameter.shape), found.get(name)
            if source is None:
                entries.append(Entry(name, "new", shape, None, parameter.numel()))
                continue
            parameter.copy_(source.value)
            state: State = "resampled" if source.resampled_from else "loaded"
            entries.append(Entry(name, state, shape, source.resampled_from, source.num_new))
    return LoadReport(tuple(entries), tuple(notes))
