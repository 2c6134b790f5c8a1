"""A tiny model with weights that are far from their start, as a run leaves it and as it is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from little import values

from fedmix import config
from fedmix.data import phantom
from fedmix.data.tokenizer import Tokenizer
from fedmix.trained.export import export
from fedmix.trained.model import FedmixModel, load_trained
from server import held_out as central
from server.model_folder import save_model


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as far as an export looks: its model, its config and its manifest."""
    folder = tmp_path_factory.mktemp("run")
    experiment, tokenizer = config.build(values(folder)), Tokenizer.load()
    chance = torch.Generator().manual_seed(5)
    start = central.parameters_of(central.initial_model(experiment, tokenizer))
    moved = {name: value + 0.1 * torch.randn(value.shape, generator=chance) for name, value in start.items()}
    save_model(folder / "model", experiment, moved, tokenizer)
    (folder / "config.yaml").write_text(yaml.safe_dump(values(folder)))
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "name": "little"}))
    return folder


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "exported"
    export(run / "model", folder)
    return folder


@pytest.fixture(scope="session")
def model(exported: Path) -> FedmixModel:
    return load_trained(exported)


@pytest.fixture(scope="session")
def phantoms() -> phantom.Phantoms:
    return phantom.generate(12, look="west", seed=7, size=48)
