"""Real commands that fail: one sentence on stderr, the right exit code, no traceback from any process, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from little import ROOT, World, command, fedmix, values, write_config

from fedmix import config
from fedmix.data.shard import MEMBERS
from fedmix.federation.update import digest
from server.store import RunStore

pytestmark = pytest.mark.e2e


def sentence(answer: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one sentence that a failed command leaves on stderr."""
    assert answer.returncode == code, answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout
    assert answer.stderr.startswith("fedmix: ")
    assert answer.stderr.count("\n") == 1, answer.stderr
    return answer.stderr.removeprefix("fedmix: ").rstrip("\n")


def with_own_shards(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The little federation with its shards given by path instead of drawn; the config and the shards."""
    drawn = World(folder / "drawn", values(folder)).shards
    shards = {name: shutil.copytree(path, folder / "shards" / name) for name, path in drawn.items()}
    wanted = values(folder)
    wanted["data"]["sites"] = [
        {"name": site["name"], "stream": site["stream"], "shard": str(shards[site["name"]])} for site in wanted["data"]["sites"]
    ]
    return write_config(folder, wanted), shards


@pytest.mark.parametrize("engine", ["inprocess", "ray"])
def test_a_corrupt_shard_is_found_before_training_and_the_run_goes_on_once_it_is_mended(engine: str, tmp_path: Path) -> None:
    path, shards = with_own_shards(tmp_path)
    member = shards["west"] / "images.npy"
    whole = member.read_bytes()
    member.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = sentence(fedmix("simulate", path, "--out", tmp_path / "run", "--engine", engine))
    assert said == (
        "site west: shard member images.npy does not have the hash it was written with: changed or damaged; "
        "prepare the shard again"
    )
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["state"], manifest["cause"]) == ("failed", said)
    member.write_bytes(whole)
    assert fedmix("simulate", path, "--out", tmp_path / "run", "--engine", engine).returncode == 0


def test_any_corrupt_member_is_one_sentence(tmp_path: Path) -> None:
    path, shards = with_own_shards(tmp_path)
    for member in ("shard.json", *MEMBERS):
        file = shards["south"] / member
        whole = file.read_bytes()
        file.write_bytes(whole + b"x")
        assert sentence(fedmix("simulate", path, "--out", tmp_path / member)).startswith(f"site south: shard member {member} ")
        file.write_bytes(whole)


def test_sites_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    path, _ = with_own_shards(tmp_path)
    wanted = yaml.safe_load(path.read_text())
    wanted["data"]["sites"][0]["stream"] = "paired"
    path.write_text(yaml.safe_dump(wanted))
    said = sentence(fedmix("simulate", path, "--out", tmp_path / "stream"))
    assert said.startswith("site north: it is to train on paired studies, but its shard's training split holds none (24 image")
    path, _ = with_own_shards(tmp_path / "size")
    said = sentence(fedmix("simulate", path, "--set", "data.image_size=60", "--out", tmp_path / "size/run"))
    assert "its shard holds images of 48 px, the experiment wants 60; prepare it again with --size 60" in said
    own = tmp_path / "tokenizer.json"
    own.write_text((ROOT / "fedmix/data/tokenizer.json").read_text() + "\n")
    said = sentence(fedmix("simulate", path, "--set", f"data.tokenizer={own}", "--out", tmp_path / "words"))
    assert "its shard was prepared with another tokenizer than the experiment's" in said


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A file size limit stands for a full disk; the phantoms are drawn before it applies."""
    path = write_config(tmp_path)
    World(tmp_path / "drawn", values(tmp_path))
    limited = subprocess.run(
        ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "bash", *command("simulate", path, "--out", tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        check=False,
    )
    said = sentence(limited)
    assert "File too large" in said
    assert fedmix("simulate", path, "--out", tmp_path / "run").returncode == 0


# ---- Ctrl-C


def interrupted(arguments: list[str], when: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """A command whose terminal sends Ctrl-C to all of its processes once something has happened."""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as run:
        deadline = time.monotonic() + 200
        while not when() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.poll() is None, "it ended before it was stopped"
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=100)
    return subprocess.CompletedProcess(arguments, run.returncode, out, err)


def long(folder: Path) -> Path:
    """A run of ten rounds, long enough to be stopped within."""
    wanted = values(folder, evaluation={"every": 2, "gallery": 40, "num_bootstrap": 20, "regeneration_images": 20})
    wanted["stages"][0]["rounds"] = wanted["stages"][1]["rounds"] = 5
    for stage in wanted["stages"]:
        stage["local_steps"] = 20
    return write_config(folder, wanted)


def rounds_told(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"event": "round"') if path.exists() else 0


@pytest.mark.parametrize("engine", ["inprocess", "ray"])
def test_ctrl_c_is_one_sentence_and_code_130_and_resume_goes_on_to_the_bit(engine: str, tmp_path: Path) -> None:
    path, folder = long(tmp_path), tmp_path / "run"
    arguments = command("simulate", path, "--out", folder, "--engine", engine)
    early = interrupted(arguments, lambda: (folder / "manifest.json").exists())
    assert sentence(early, code=130) == "stopped; a run goes on with --resume"
    later = interrupted([*arguments, "--resume"], lambda: rounds_told(folder) >= 3)
    assert sentence(later, code=130) == "stopped; a run goes on with --resume"
    assert json.loads((folder / "manifest.json").read_text())["state"] == "running"
    assert fedmix("simulate", path, "--out", folder, "--engine", engine, "--resume").returncode == 0
    whole = World(tmp_path / "whole", config.load(path).model_dump(mode="json")).run()
    committed = RunStore(folder, config.load(path), resume=True).latest()
    assert committed is not None
    assert digest(committed.parameters) == digest(whole.parameters)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5, 2.5, 4.0])
def test_ctrl_c_while_everything_is_still_being_imported_is_one_sentence(seconds: float, tmp_path: Path) -> None:
    path = long(tmp_path)
    begun = time.monotonic()
    answer = interrupted(command("simulate", path, "--out", tmp_path / "run"), lambda: time.monotonic() > begun + seconds)
    assert sentence(answer, code=130) == "stopped; a run goes on with --resume"
