"""A run that begins with a checkpoint: what the server starts from, what it writes down, and when it refuses to go on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from little import World, everyone, values
from safetensors.torch import save_file
from timm.models import VisionTransformer

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, RunError
from fedmix.model.folder import load_model
from server import held_out as central
from server.model_folder import save_model
from server.store import RunStore


def vit_file(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit = VisionTransformer(img_size=96, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=0)
        tensors = {name: value + 0.1 * torch.randn_like(value) for name, value in vit.state_dict().items()}
    save_file(tensors, folder / "vit.safetensors")
    return folder / "vit.safetensors"


def started_from(file: Path | None, wanted: dict[str, Any]) -> dict[str, Any]:
    return wanted | {"model": wanted["model"] | {"warm_start": {"image": str(file)} if file else None}}


def experiment(folder: Path, file: Path | None) -> config.Experiment:
    return config.build(started_from(file, values(folder)))


def test_initial_model_is_the_seeds_with_the_checkpoint_over_it(tmp_path: Path) -> None:
    wanted = experiment(tmp_path, vit_file(tmp_path))
    random = central.parameters_of(central.random_model(wanted, Tokenizer.load()))
    initial = central.parameters_of(central.initial_model(wanted, Tokenizer.load()))
    _, report = central.warm_started(wanted, Tokenizer.load())
    assert report is not None
    new = {entry.name for entry in report.entries if entry.state == "new"}
    assert {name for name in random if torch.equal(random[name], initial[name])} == new
    assert "blocks.0.attention.qkv.weight" not in new
    plain = central.parameters_of(central.initial_model(experiment(tmp_path, None), Tokenizer.load()))
    assert all(torch.equal(plain[name], random[name]) for name in random)


def test_manifest_has_the_contents_hash_and_no_path(tmp_path: Path) -> None:
    file = vit_file(tmp_path / "models")
    RunStore(tmp_path / "run", experiment(tmp_path, file), resume=False)
    text = (tmp_path / "run" / "manifest.json").read_text()
    assert json.loads(text)["warm_start"] == {"image": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert str(file) not in text


def test_run_is_taken_up_with_the_same_content_elsewhere_and_refused_with_another(tmp_path: Path) -> None:
    file = vit_file(tmp_path / "here")
    store = RunStore(tmp_path / "run", experiment(tmp_path, file), resume=False)
    with store.lent():
        RunStore(tmp_path / "run", experiment(tmp_path, vit_file(tmp_path / "there")), resume=True)._unlock()
        for other in (vit_file(tmp_path / "other", seed=1), None):
            with pytest.raises(RunError, match=r"the files of model.warm_start are not those .* \(hashes differ\)"):
                RunStore(tmp_path / "run", experiment(tmp_path, other), resume=True)


def test_run_that_began_before_there_were_warm_starts_is_taken_up(tmp_path: Path) -> None:
    begun = RunStore(tmp_path / "run", experiment(tmp_path, None), resume=False)
    begun._unlock()
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(
        json.dumps({name: value for name, value in json.loads(manifest.read_text()).items() if name != "warm_start"})
    )
    assert RunStore(tmp_path / "run", experiment(tmp_path, None), resume=True).run_id == begun.run_id


def test_missing_file_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.warm_start.image cannot be read: No such file"):
        RunStore(tmp_path / "run", experiment(tmp_path, tmp_path / "none.safetensors"), resume=False)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_rounds_train_on_from_the_checkpoint_and_the_model_leaves_without_its_path(tmp_path: Path) -> None:
    file = vit_file(tmp_path)
    world = World(tmp_path, started_from(file, everyone(tmp_path)))
    begun, ended = world.initial(), world.run().parameters
    name = "blocks.0.attention.qkv.weight"
    fresh = central.parameters_of(central.random_model(world.experiment, world.tokenizer))[name]
    assert 0 < (ended[name] - begun[name]).norm() < 0.5 * (ended[name] - fresh).norm()
    save_model(tmp_path / "model", world.experiment, ended, world.tokenizer)
    assert "warm_start" not in (tmp_path / "model" / "config.json").read_text()
    file.unlink()
    model, _, _ = load_model(tmp_path / "model")
    assert torch.equal(model.get_parameter(name), ended[name])


def continued(folder: Path, **changes: Any) -> config.Experiment:
    """An experiment that goes on from the model in ``folder``/public."""
    wanted = values(folder) | changes
    return config.build(wanted | {"model": wanted["model"] | {"warm_start": {"model": str(folder / "public")}}})


def test_a_model_folder_is_taken_whole_and_known_by_its_hashes(tmp_path: Path) -> None:
    other = config.build(values(tmp_path, seed=99))
    parameters = central.parameters_of(central.random_model(other, Tokenizer.load()))
    save_model(tmp_path / "public", other, parameters, Tokenizer.load())
    model, report = central.warm_started(continued(tmp_path), Tokenizer.load())
    assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters())
    assert report is not None
    assert {entry.state for entry in report.entries} == {"loaded"}
    RunStore(tmp_path / "run", continued(tmp_path), resume=False)
    hashes = json.loads((tmp_path / "run" / "manifest.json").read_text())["warm_start"]
    assert hashes["model/model.safetensors"] == hashlib.sha256((tmp_path / "public/model.safetensors").read_bytes()).hexdigest()


def test_what_a_model_had_learnt_before_it_went_on_still_counts_as_learnt(tmp_path: Path) -> None:
    """Else a run without contrast would have no zero-shot number after a start that can answer."""
    other = config.build(values(tmp_path))
    save_model(
        tmp_path / "public", other, central.parameters_of(central.random_model(other, Tokenizer.load())), Tokenizer.load()
    )
    masked = continued(tmp_path, stages=values(tmp_path)["stages"][:1])
    assert masked.trained_on == ("mvm", "mlm")
    assert set(central.settings_of(masked).trained_on or ()) == {"mvm", "mlm", "contrast"}
    said = tmp_path / "public/config.json"
    said.write_text(json.dumps({name: value for name, value in json.loads(said.read_text()).items() if name != "trained_on"}))
    assert central.settings_of(masked).trained_on is None


def test_a_model_folder_of_other_sizes_or_none_is_refused_without_its_path(tmp_path: Path) -> None:
    other = config.build(values(tmp_path))
    parameters = central.parameters_of(central.random_model(other, Tokenizer.load()))
    save_model(tmp_path / "public", other, parameters, Tokenizer.load())
    wider = values(tmp_path)["model"] | {"depth": 2}
    with pytest.raises(ConfigError, match="of other sizes than the model of this experiment"):
        central.initial_model(continued(tmp_path, model=wider), Tokenizer.load())
    (tmp_path / "public/config.json").unlink()
    with pytest.raises(ConfigError, match="warm_start") as found:
        central.initial_model(continued(tmp_path), Tokenizer.load())
    assert str(tmp_path) not in str(found.value)


def test_a_model_folder_stands_alone(tmp_path: Path) -> None:
    wanted = values(tmp_path)
    with pytest.raises(ConfigError, match="replaces every parameter"):
        config.build(wanted | {"model": wanted["model"] | {"warm_start": {"model": "m", "image": "i"}}})
