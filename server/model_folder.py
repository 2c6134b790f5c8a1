"""A trained model as a folder: weights, sizes, vocabulary. Nothing in it is code, and reading it runs none."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, RunError
from fedmix.model.encoder import MixedModel
from server.held_out import set_parameters
from server.store import Parameters

FILES = ("config.json", "model.safetensors", "tokenizer.json")


class Sizes(BaseModel):
    """config.json of a model folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_number: Annotated[int, Field(alias="schema", ge=1, le=1)]
    image_size: int
    max_words: int
    model: config.Model


def save_model(folder: Path, experiment: config.Experiment, parameters: Parameters, tokenizer: Tokenizer) -> None:
    """Write model.safetensors, config.json and tokenizer.json."""
    definition = _tokenizer_bytes(experiment.data.tokenizer)
    if hashlib.sha256(definition).hexdigest() != tokenizer.fingerprint:
        raise RunError("data.tokenizer has changed since the run began; put back what it was, then go on with --resume")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(parameters, folder / "model.safetensors")
    sizes = {
        "schema": 1,
        "image_size": experiment.data.image_size,
        "max_words": experiment.data.max_words,
        "model": experiment.model.model_dump(),
    }
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(definition)


def load_model(folder: Path) -> tuple[MixedModel, Sizes, Tokenizer]:
    """Read a model folder back; raises RunError that names what is missing or wrong."""
    for name in FILES:
        if not (folder / name).is_file():
            raise RunError(f"{folder} is no model folder: {name} is missing; name RUN/model")
    try:
        sizes = Sizes.model_validate_json((folder / "config.json").read_text())
        parameters = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.load(folder)
    except ConfigError as error:
        raise RunError(f"{folder} cannot be read as a model: {error}") from None
    except (ValueError, SafetensorError, OSError) as error:
        raise RunError(f"{folder} cannot be read as a model ({type(error).__name__}); export it again") from None
    model = MixedModel(sizes.model, image_size=sizes.image_size, max_words=sizes.max_words, vocabulary=tokenizer.vocab_size)
    own = dict(model.named_parameters())
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in parameters.items()}:
        raise RunError(f"{folder}: weights and config.json are of different models; export it again")
    return set_parameters(model, parameters), sizes, tokenizer


def _tokenizer_bytes(path: Path | None) -> bytes:
    if path is None:
        return resources.files("fedmix.data").joinpath("tokenizer.json").read_bytes()
    return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
