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

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from fedmix.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from fedmix.disk import reason_of
from fedmix.errors import ConfigError
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import PAIR

# Errors name the key and not the path behind it: a path may name a person.
IMAGE, TEXT, MODEL = "model.warm_start.image", "model.warm_start.text", "model.warm_start.model"
TEXT_FILES = ("config.json", "model.safetensors", "tokenizer.json")
TEXT_KINDS = ("bert", "cxr-bert")  # RoBERTa's kind counts positions from 2 and cuts words in another way
TEXT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

BLOCK_MLP = re.compile(r"blocks\.\d+\.mlp")  # an FFN or the norm before it

State = Literal["loaded", "resampled", "new"]


class Found(NamedTuple):
    """What a checkpoint holds for one of our parameters, the shape it had in the file if it had to be fitted, and how many
    of the numbers it does not have, so that they stay as they were drawn.
    """

    value: Tensor
    resampled_from: tuple[int, ...] | None = None
    num_new: int = 0


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
        found |= _text_parameters(model, text, tokenizer, notes)
        if image is None:
            _check_heads(model, _text_sizes(_text_file(text, "config.json"))["num_attention_heads"])
    if image is not None:
        found = {name: one for name, one in found.items() if not _is_common(name)}
        if text is not None and "shared" in model.norm:
            notes.append("experts are shared: FFN and norms come from the image checkpoint, only words from the text one")
        found |= _image_parameters(model, image, notes)
    found |= _pair_parameters(model, found, "image" if image is not None else "text", notes)
    return _put(model, found, notes)


def hashes(image: Path | None, text: Path | None, model: Path | None = None) -> dict[str, str]:
    """SHA-256 of each file that a warm start reads, by role: a run says by content, not by path, what it began with."""
    files = {} if image is None else {"image": (_image_file(image), IMAGE)}
    if text is not None:
        files |= {f"text/{name}": (_text_file(text, name), TEXT) for name in TEXT_FILES}
    if model is not None:  # a fedmix model folder (folder.py) has the same three names
        files |= {f"model/{name}": (model / name, MODEL) for name in TEXT_FILES}
    return {role: _sha256(path, key) for role, (path, key) in files.items()}


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
                f"model.warm_start: the checkpoint's {name} is {_shape(one.value)}, the model's is {_shape(own[name])}; "
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


# ---- image


IMAGE_BLOCK = {  # ours -> timm's, inside a block
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "attention_norm.{expert}": "norm1",
    "mlp_norm.{expert}": "norm2",
    "mlp.{expert}.fc1": "mlp.fc1",
    "mlp.{expert}.fc2": "mlp.fc2",
}
OTHER_INPUTS = ("reg_token", "dist_token", "norm_pre.weight")  # registers, distillation, CLIP's norm before the blocks
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


def _image_parameters(model: MixedModel, path: Path, notes: list[str]) -> dict[str, Found]:
    """Patches, positions, summary, blocks and last norm of a ViT, under our names."""
    tensors = _timm_names(_read(_image_file(path), IMAGE))
    depth = _depth(tensors, "blocks.")
    blocks = {_named(ours, "image", model): timm for ours, timm in IMAGE_BLOCK.items()}
    wanted = [f"blocks.{layer}.{timm}.{kind}" for layer in range(depth) for timm in blocks.values() for kind in _KINDS]
    ends = ["pos_embed", *(f"{name}.{kind}" for name in ("patch_embed.proj", "norm") for kind in _KINDS)]
    _require(tensors, [*ends, *wanted], IMAGE)
    _refuse_others(tensors, "blocks.", set(wanted), IMAGE)
    _check_width(model, tensors["norm.weight"].numel(), IMAGE)
    found = _embedding(model, tensors)
    for layer in range(min(depth, len(model.blocks))):
        for ours, timm in blocks.items():
            for kind in _KINDS:
                found[f"blocks.{layer}.{ours}.{kind}"] = Found(tensors[f"blocks.{layer}.{timm}.{kind}"])
    for kind in _KINDS:
        found[f"norm.{_expert('image', model)}.{kind}"] = Found(tensors[f"norm.{kind}"])
    notes += _depth_notes("image", depth, len(model.blocks))
    head_width = _width(model) // _num_heads(model)
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
            renamed[name.replace("attention.attention.query", "attn.qkv")] = _joined(
                [renamed.pop(part) for part in parts], IMAGE
            )
    return renamed


def _embedding(model: MixedModel, tensors: Mapping[str, Tensor]) -> dict[str, Found]:
    """Patch projection, positions and summary token, fitted to our patch size and grid."""
    filters, position = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    num_prefix = _num_prefix(position)
    summary = tensors.get("cls_token", position)
    if filters.ndim != 4 or num_prefix is None or {position.shape[-1], summary.shape[-1]} != {_width(model)}:
        raise ConfigError(
            f"{IMAGE}: patch_embed.proj.weight is {_shape(filters)} and pos_embed {_shape(position)}, expected "
            f"{_width(model)} x colours x p x p, and 1 x (a square number, or one more) x {_width(model)}; take a plain ViT"
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
        summary_D = summary.flatten()[: _width(model)] + (places[0] if num_prefix else 0.0)
        # A ViT has no "this is an image" tag: zero, so that the trunk sees what the ViT saw.
        found["embed_image.tags.weight"] = Found(torch.stack([torch.zeros_like(summary_D), summary_D]))
    return found


def _num_prefix(position: Tensor) -> int | None:
    """Rows of a position table [1, rows, D] before its grid: one for a class token or none; None if it is neither."""
    if position.ndim != 3 or len(position) != 1:
        return None
    rows = position.shape[1]
    return next((prefix for prefix in (1, 0) if rows > prefix and math.isqrt(rows - prefix) ** 2 == rows - prefix), None)


# ---- text


def _text_parameters(model: MixedModel, folder: Path, tokenizer: Tokenizer, notes: list[str]) -> dict[str, Found]:
    """Words, positions, blocks and last norm of a BERT, under our names."""
    sizes = _text_sizes(_text_file(folder, "config.json"))
    tensors = _bert_names(_read(_text_file(folder, "model.safetensors"), TEXT))
    depth, expert = sizes["num_hidden_layers"], _expert("text", model)
    tables = [f"embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")]
    wanted = [f"{part}.{kind}" for part in ("embeddings.LayerNorm", *_bert_parts(depth)) for kind in _KINDS]
    _require(tensors, [*tables, *wanted], TEXT)
    _refuse_others(tensors, "encoder.layer.", set(wanted), TEXT)
    _check_width(model, sizes["hidden_size"], TEXT)
    if any(tensors[table].ndim != 2 or tensors[table].shape[1] != sizes["hidden_size"] for table in tables):
        raise ConfigError(f"{TEXT}: model.safetensors and config.json are of different models; save them together")
    found = _words(model, tensors[tables[0]], _their_tokenizer(folder), tokenizer, notes)
    found["embed_text.position.weight"] = _first_rows(model.embed_text.position.weight, tensors[tables[1]])
    found["embed_text.tag.weight"] = Found(tensors[tables[2]][:1])
    taken = min(depth, len(model.blocks))
    for kind in _KINDS:
        for layer in range(taken):
            for ours, value in _bert_layer(tensors, layer, expert, kind).items():
                found[f"blocks.{layer}.{ours}.{kind}"] = Found(value)
        found[f"norm.{expert}.{kind}"] = Found(tensors[f"encoder.layer.{taken - 1}.output.LayerNorm.{kind}"])
    notes += _depth_notes("text", depth, len(model.blocks))
    return found


def _text_sizes(file: Path) -> dict[str, int]:
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
        "attention.qkv": _joined(attention, TEXT),
        "attention.proj": tensors[f"{own}.attention.output.dense.{kind}"],
        f"attention_norm.{expert}": tensors[f"{before}.{kind}"],
        f"mlp_norm.{expert}": tensors[f"{own}.attention.output.LayerNorm.{kind}"],
        f"mlp.{expert}.fc1": tensors[f"{own}.intermediate.dense.{kind}"],
        f"mlp.{expert}.fc2": tensors[f"{own}.output.dense.{kind}"],
    }


def _their_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(_text_file(folder, "tokenizer.json"))
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


def _joined(parts: list[Tensor], key: str) -> Tensor:
    """Query, key and value as the one matrix, or bias, that our attention has."""
    if len({part.shape for part in parts}) > 1:
        raise ConfigError(f"{key}: query, key and value differ in shape; take a plain checkpoint")
    return torch.cat(parts)


def _first_rows(own_LD: Tensor, theirs_LD: Tensor) -> Found:
    """The first positions; where theirs end, ours stay new."""
    rows_LD, num_rows = own_LD.detach().clone(), min(len(own_LD), len(theirs_LD))
    rows_LD[:num_rows] = theirs_LD[:num_rows]
    num_new = rows_LD[num_rows:].numel()
    return Found(rows_LD, None if theirs_LD.shape == rows_LD.shape else tuple(theirs_LD.shape), num_new)


# ---- files


_KINDS = ("weight", "bias")


def _image_file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _text_file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ConfigError(f"{TEXT} has no {name}; name a folder that holds {', '.join(TEXT_FILES)}")
    return folder / name


def _read(file: Path, key: str) -> dict[str, Tensor]:
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


def _sha256(file: Path, key: str) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {reason_of(error)}; name a file of this machine") from None


def _require(tensors: Mapping[str, Tensor], names: list[str], key: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(f"{key} lacks {len(missing)} of the {len(names)} tensors expected of it: {some}; take a whole file")


def _refuse_others(tensors: Mapping[str, Tensor], prefix: str, known: set[str], key: str) -> None:
    """A part that our block has not (layer scale, norms of query and key) would be left out, and the rest mean less."""
    unknown = [name for name in tensors if name in OTHER_INPUTS or (name.startswith(prefix) and name not in known)]
    others = sorted({re.sub(r"\d+", "N", name, count=1) for name in unknown})
    if others:
        raise ConfigError(f"{key} has parts that our trunk has not: {', '.join(others[:3])}; take a plain ViT or BERT")


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Layers that a file speaks of, at least one."""
    found = [re.match(re.escape(prefix) + r"(\d{1,4})\.", name) for name in tensors]
    return max([int(one[1]) for one in found if one], default=0) + 1


def _depth_notes(what: str, theirs: int, ours: int) -> list[str]:
    if theirs == ours:
        return []
    rest = "the others are left out" if theirs > ours else f"the model's last {ours - theirs} are new"
    return [f"the first {min(theirs, ours)} of the {what} checkpoint's {theirs} layers were taken, {rest}"]


def _check_width(model: MixedModel, width: int, key: str) -> None:
    if width != _width(model):
        raise ConfigError(
            f"{key} is {width} wide and model.width is {_width(model)}; set model.width = {width}, or take another checkpoint"
        )


def _check_heads(model: MixedModel, num_heads: int) -> None:
    """The same matrix cut into other heads is another attention; it matters where attention comes from the text."""
    if num_heads != _num_heads(model):
        raise ConfigError(f"{TEXT} has {num_heads} heads and model.num_heads is {_num_heads(model)}; set it to {num_heads}")


def _width(model: MixedModel) -> int:
    return model.embed_text.tag.embedding_dim


def _num_heads(model: MixedModel) -> int:
    return int(model.get_submodule("blocks.0.attention").num_heads)  # type: ignore[arg-type]


def _expert(modality: str, model: MixedModel) -> str:
    return modality if modality in model.norm else "shared"


def _named(ours: str, modality: str, model: MixedModel) -> str:
    return ours.format(expert=_expert(modality, model))


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)
