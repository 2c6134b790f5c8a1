"""Writes the model that a run ends with as a folder, which fedmix/model/folder.py reads back."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from safetensors.torch import save_file

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import RunError
from fedmix.model.folder import Sizes
from server.held_out import learnt
from server.store import Parameters


def save_model(folder: Path, experiment: config.Experiment, parameters: Parameters, tokenizer: Tokenizer) -> None:
    """Write model.safetensors, config.json and tokenizer.json."""
    definition = _tokenizer_bytes(experiment.data.tokenizer)
    if hashlib.sha256(definition).hexdigest() != tokenizer.fingerprint:
        raise RunError("data.tokenizer has changed since the run began; put back what it was, then go on with --resume")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(parameters, folder / "model.safetensors")
    model = experiment.model.model_copy(update={"warm_start": None})  # paths of the server's, of no use to who reads this
    sizes = Sizes(
        image_size=experiment.data.image_size,
        max_words=experiment.data.max_words,
        model=model,
        trained_on=learnt(experiment),
    )
    (folder / "config.json").write_text(sizes.as_json())
    (folder / "tokenizer.json").write_bytes(definition)


def _tokenizer_bytes(path: Path | None) -> bytes:
    if path is None:
        return resources.files("fedmix.data").joinpath("tokenizer.json").read_bytes()
    return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
