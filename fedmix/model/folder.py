"""A model folder: weights, sizes, vocabulary. Nothing in it is code, and reading it runs none.

A run writes one (server/model_folder.py) and ``fedmix export`` writes one for others, with more files around the same three.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, RunError
from fedmix.model.checkpoints import MODEL
from fedmix.model.encoder import MixedModel
from fedmix.model.pretrained import Entry, LoadReport
from fedmix.model.resizing import check_size, resized

SCHEMA = 1
MODEL_TYPE = "fedmix"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


class Sizes(BaseModel):
    """config.json of a model folder; the keys below ``trained_on`` are written by ``fedmix export`` alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    schema_number: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)] = SCHEMA
    image_size: int
    max_words: int
    model: config.Model
    trained_on: tuple[str, ...] | None = None  # objectives by name; None is not known, and older folders do not say
    model_type: str | None = None
    architectures: tuple[str, ...] | None = None
    fedmix_version: str | None = None
    # Of the vocabulary that shards were prepared with: an exported tokenizer.json says more, and so has other bytes.
    tokenizer_fingerprint: str | None = None

    def as_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.model_dump(by_alias=True, exclude_none=True), indent=2) + "\n"


def load_model(folder: Path, *, image_size: int | None = None) -> tuple[MixedModel, Sizes, Tokenizer]:
    """Read a model folder back; raises RunError that names what is missing or wrong.

    ``image_size``: pixels a side of the pictures to come, None for those it was trained on. Patch positions are resampled to
    another size (fedmix/model/resizing.py); ConfigError for one that its patches do not fill.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise RunError(f"{folder} is no model folder: {name} is missing; name RUN/model")
    try:
        sizes = _read_sizes(folder)
        parameters = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.load(folder)
    except ConfigError as error:
        raise RunError(f"{folder} cannot be read as a model: {error}") from None
    except (ValueError, SafetensorError, OSError) as error:
        raise RunError(f"{folder} cannot be read as a model ({type(error).__name__}); export it again") from None
    tokenizer.fingerprint = sizes.tokenizer_fingerprint or tokenizer.fingerprint
    if image_size is not None:
        check_size(image_size, sizes.model)
    model = _empty(sizes, tokenizer)
    own = dict(model.named_parameters())
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in parameters.items()}:
        raise RunError(f"{folder}: weights and config.json are of different models; export it again")
    if image_size is None or image_size == sizes.image_size:
        model.load_state_dict(parameters)
        return model, sizes, tokenizer
    sizes = sizes.model_copy(update={"image_size": image_size})
    model = _empty(sizes, tokenizer)
    model.load_state_dict(resized(parameters, model.num_patches))
    return model, sizes, tokenizer


def continue_from(model: MixedModel, folder: Path, tokenizer: Tokenizer) -> LoadReport:
    """Copy every parameter of a model folder, such as one of public data, into a model of the same sizes and vocabulary.

    Raises ConfigError for a folder that is none, or is of other sizes or another vocabulary; then the model is as it was.
    """
    try:
        other, _, theirs = load_model(folder)
    except RunError as error:
        raise ConfigError(f"{MODEL}: {error}".replace(str(folder), "the folder")) from None
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"{MODEL} reads another vocabulary than data.tokenizer names; take the same for both")
    own, found = dict(model.named_parameters()), other.state_dict()
    wrong = [name for name, value in own.items() if name not in found or found[name].shape != value.shape]
    if wrong or len(own) != len(found):
        raise ConfigError(
            f"{MODEL} is of other sizes than the model of this experiment ({len(wrong)} of {len(own)} parameters do not fit); "
            "copy the section model, data.image_size and data.max_words from its config.json"
        )
    model.load_state_dict(found)
    return LoadReport(tuple(Entry(name, "loaded", tuple(value.shape), None, 0) for name, value in own.items()), ())


def trained_on(folder: Path) -> tuple[str, ...] | None:
    """The objectives that a folder's model has learnt, None where it does not say. Raises ConfigError for no such folder."""
    try:
        return _read_sizes(folder).trained_on
    except (ValueError, OSError) as error:
        raise ConfigError(f"{MODEL}: its config.json cannot be read ({type(error).__name__})") from None


def _empty(sizes: Sizes, tokenizer: Tokenizer) -> MixedModel:
    """A model of these sizes that waits for its weights."""
    with torch.random.fork_rng(devices=[]):  # whoever loads a model keeps their own random numbers
        return MixedModel(sizes.model, image_size=sizes.image_size, max_words=sizes.max_words, vocabulary=tokenizer.vocab_size)


def _read_sizes(folder: Path) -> Sizes:
    """config.json, with a sentence of its own for a model of another kind or of another fedmix."""
    values: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(values, dict):
        kind, number = values.get("model_type", MODEL_TYPE), values.get("schema")
        if kind != MODEL_TYPE:
            raise ConfigError(f"its config.json is of a model of type {kind!r}, expected {MODEL_TYPE!r}")
        if isinstance(number, int) and number != SCHEMA:
            written = values.get("fedmix_version", "version that wrote it")
            raise ConfigError(f"its format is {number} and this fedmix reads {SCHEMA}; use the fedmix {written}")
    return Sizes.model_validate(values)
