"""A trained model as a folder: what is written is what is read, and nothing else is taken for a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from little import World, values

from fedmix.errors import RunError
from fedmix.federation.update import digest
from fedmix.model.folder import load_model
from server import held_out as central
from server.model_folder import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    world = World(tmp_path, values(tmp_path))
    save_model(tmp_path / "model", world.experiment, world.initial(), world.tokenizer)
    return tmp_path / "model"


def test_a_model_comes_back_to_the_bit_with_its_sizes_and_vocabulary(folder: Path, tmp_path: Path) -> None:
    world = World(tmp_path / "other", values(tmp_path))
    model, sizes, tokenizer = load_model(folder)
    assert digest(central.parameters_of(model)) == digest(world.initial())
    assert (sizes.image_size, sizes.max_words) == (48, 24)
    assert sizes.model == world.experiment.model
    assert sizes.trained_on == ("mvm", "mlm", "contrast")
    assert tokenizer.fingerprint == world.tokenizer.fingerprint
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_folder_can_be_moved_and_needs_nothing_else(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "elsewhere")
    model, _, tokenizer = load_model(moved)
    words = torch.tensor(tokenizer.encode(["no effusion"], 24))
    assert model.encode_text(words).shape == (1, 8)


def test_a_tokenizer_of_ones_own_travels_with_the_model(tmp_path: Path) -> None:
    shipped = World(tmp_path, values(tmp_path)).tokenizer
    own = tmp_path / "tokenizer"
    own.mkdir()
    definition = json.loads((Path(central.__file__).parents[1] / "fedmix/data/tokenizer.json").read_text())
    (own / "tokenizer.json").write_text(json.dumps(definition, indent=1))
    wanted = values(tmp_path / "b")
    wanted["data"]["tokenizer"] = str(own)
    world = World(tmp_path / "b", wanted)
    save_model(tmp_path / "model", world.experiment, world.initial(), world.tokenizer)
    (own / "tokenizer.json").unlink()
    assert load_model(tmp_path / "model")[2].fingerprint == world.tokenizer.fingerprint != shipped.fingerprint


def test_a_tokenizer_that_changed_meanwhile_is_not_saved_with_the_model(tmp_path: Path) -> None:
    shipped = Path(central.__file__).parents[1] / "fedmix/data/tokenizer.json"
    own = tmp_path / "tokenizer.json"
    own.write_bytes(shipped.read_bytes())
    wanted = values(tmp_path)
    wanted["data"]["tokenizer"] = str(own)
    world = World(tmp_path, wanted)
    own.write_text(own.read_text() + "\n")
    with pytest.raises(RunError, match=r"data\.tokenizer has changed since the run began"):
        save_model(tmp_path / "model", world.experiment, world.initial(), world.tokenizer)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def unknown_key(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "import os"}))


def another_width(path: Path) -> None:
    sizes = json.loads(path.read_text())
    sizes["model"]["width"] = 32
    path.write_text(json.dumps(sizes))


def newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))


def of_another_kind(path: Path) -> None:
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95garbage")


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("config.json", Path.unlink, r"no model folder: config\.json is missing; name RUN/model"),
        ("model.safetensors", Path.unlink, r"no model folder: model\.safetensors is missing"),
        ("tokenizer.json", Path.unlink, "tokenizer"),
        ("config.json", garbage, "cannot be read as a model"),
        ("config.json", unknown_key, r"cannot be read as a model \(ValidationError\)"),
        ("config.json", newer, "its format is 2 and this fedmix reads 1; use the fedmix version that wrote it"),
        ("config.json", of_another_kind, "of a model of type 'bert', expected 'fedmix'"),
        ("config.json", another_width, "weights and config.json are of different models"),
        ("model.safetensors", cut_short, r"cannot be read as a model \(SafetensorError\)"),
        ("model.safetensors", garbage, "cannot be read as a model"),
        ("tokenizer.json", garbage, "tokenizer"),
    ],
)
def test_what_is_wrong_with_a_model_folder_is_said(folder: Path, name: str, damage: Callable[[Path], None], why: str) -> None:
    damage(folder / name)
    with pytest.raises(RunError, match=why):
        load_model(folder)


def test_loading_leaves_the_callers_random_numbers_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_folder_is_not_a_model_folder(folder: Path) -> None:
    with pytest.raises(RunError, match="name RUN/model"):
        load_model(folder.parent)
