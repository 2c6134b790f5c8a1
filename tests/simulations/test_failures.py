"""Real commands that fail: one sentence on stderr, the right exit code, no traceback from any process, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import odd_apps
import pytest
import yaml
from deaths import ended, fill, forked
from flwr.app import Message
from little import ROOT, DirectGrid, World, command, everyone, fedmix, values, write_config

from fedmix import config
from fedmix.data.shard import MEMBERS
from fedmix.errors import RunError
from fedmix.federation.update import digest
from server.app import build_app as build_server_app
from server.store import RunStore
from simulations.engine import run_in_process

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


@pytest.mark.parametrize("engine", ["inprocess", pytest.param("ray", marks=pytest.mark.slow)])
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


@pytest.mark.slow  # the members one by one are in tests/data/test_shard.py
def test_any_corrupt_member_is_one_sentence(tmp_path: Path) -> None:
    path, shards = with_own_shards(tmp_path)
    for member in ("shard.json", *MEMBERS):
        file = shards["south"] / member
        whole = file.read_bytes()
        file.write_bytes(whole + b"x")
        said = sentence(fedmix("simulate", path, "--out", tmp_path / member))
        assert said.startswith(f"site south: shard member {member} ")
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


# ---- a run that has committed rounds, and then something breaks


def stopped(folder: Path, wanted: dict[str, Any], rounds: int = 2) -> Path:
    """The run folder of a run that was stopped after some rounds."""

    def stop(number: int, stage: str, parameters: object) -> None:
        if number == rounds:
            raise KeyboardInterrupt

    world = World(folder, wanted)
    with pytest.raises(KeyboardInterrupt):
        world.run(on_committed=stop)
    return world.store.folder


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoints."""
    files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class FillsUp(DirectGrid):
    """A disk that is full once the sites have answered."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = super().pull_messages(message_ids)
        if any(reply.metadata.message_type == "train" for reply in replies):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return replies


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("", "cannot keep a round's updates: File too large; make room for them and go on with --resume"),
        ("metrics.jsonl, a", "metrics.jsonl: File too large; make room and go on with --resume, no committed round is lost"),
        (
            "checkpoints/.round-00002.partial",
            "File too large.*; the round before it is kept, make room and go on with --resume",
        ),
    ],
    ids=["updates", "metrics", "checkpoint"],
)
def test_a_disk_that_fills_up_at_any_write_of_the_server_costs_the_round_and_no_more(
    call: str, what: str, tmp_path: Path
) -> None:
    run = stopped(tmp_path, values(tmp_path), rounds=1)
    last_good = hashes(run)
    assert last_good

    def job() -> None:
        world, said = World(tmp_path, values(tmp_path), resume=True), ""
        grid = world.grid() if call else FillsUp(world.places, {})
        if call:
            fill(call)
        try:
            world.run(grid)
        except RunError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (tmp_path / "said.txt").write_text(said)

    assert ended(forked(job, tmp_path)) == 0
    assert re.search(what, (tmp_path / "said.txt").read_text())
    assert hashes(run) == last_good
    committed = World(tmp_path, values(tmp_path), resume=True).run()
    whole = World(tmp_path / "whole", values(tmp_path)).run()
    assert digest(committed.parameters) == digest(whole.parameters)


def without_privilege() -> list[str]:
    """What makes a command respect the modes of files even if root runs it."""
    if os.getuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root writes into any folder, and there is no setpriv to stop it")
    return [setpriv, "--bounding-set=-dac_override,-dac_read_search"]


def test_a_run_folder_that_cannot_be_written_is_one_sentence_and_stays_as_it_is(tmp_path: Path) -> None:
    path, run = write_config(tmp_path), stopped(tmp_path, values(tmp_path))
    last_good = hashes(run)
    everything = [run, *run.rglob("*")]
    modes = {one: one.stat().st_mode for one in everything}
    for one in everything:
        one.chmod(modes[one] & ~0o222)
    try:
        arguments = [*without_privilege(), *command("simulate", path, "--out", run, "--resume")]
        answer = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    finally:
        for one in everything:
            one.chmod(modes[one])
    assert sentence(answer) == f"cannot write the run folder {run}: Permission denied; choose another with --out"
    assert hashes(run) == last_good


def test_a_config_that_has_changed_since_is_one_sentence_and_the_run_stays_as_it_is(tmp_path: Path) -> None:
    path, run = write_config(tmp_path), stopped(tmp_path, values(tmp_path))
    before = hashes(run), (run / "manifest.json").read_bytes(), (run / "config.yaml").read_bytes()
    said = sentence(fedmix("simulate", path, "--out", run, "--resume", "--set", "stages.1.local_steps=3"))
    assert said.startswith(f"the experiment has changed since the run in {run} began (fingerprints differ)")
    assert "restore the config, or start anew in another folder with --out" in said
    assert before == (hashes(run), (run / "manifest.json").read_bytes(), (run / "config.yaml").read_bytes())


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def test_a_flipped_bit_in_every_checkpoint_is_one_sentence_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path, run = write_config(tmp_path), stopped(tmp_path, values(tmp_path))
    for folder, member in (("round-00001", "round.json"), ("round-00002", "outer.safetensors")):
        flip(run / "checkpoints" / folder / member)
    before = hashes(run)
    said = sentence(fedmix("simulate", path, "--out", run, "--resume"))
    assert said == f"every checkpoint in {run / 'checkpoints'} is damaged; start anew in another folder with --out"
    assert hashes(run) == before


# ---- a run that cannot go on


def test_a_run_whose_rounds_fail_in_a_row_ends_in_state_failed_with_cause_and_next_step(tmp_path: Path) -> None:
    """Within 30 s of the last failure (FLIP's runs were stuck for hours)."""
    path = write_config(tmp_path, values(tmp_path, federation={"min_sites": 3, "max_failed_rounds": 2}))
    arguments = command("simulate", path, "--out", tmp_path / "run")
    failed: list[float] = []
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        for line in run.stdout:
            if "failed: 2 of 2 sites sent an update, 3 are needed" in " ".join(line.split()):
                failed.append(time.monotonic())
        err = run.stderr.read()
    took = time.monotonic() - failed[-1]
    assert len(failed) == 2
    assert took < 30
    said = sentence(subprocess.CompletedProcess(arguments, run.returncode, "", err))
    assert said.startswith("round 1 failed 2 times in a row: 2 of 2 sites sent an update, 3 are needed")
    assert said.endswith("mend the cause and go on with --resume")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["state"], manifest["cause"]) == ("failed", said)


def test_a_run_stops_in_time_although_a_site_hangs(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, federation={"deadline_s": 2.0, "min_sites": 3, "max_failed_rounds": 2}))
    failed: list[float] = []

    def watch(row: Mapping[str, Any]) -> None:
        if row["event"] == "failed":
            failed.append(time.monotonic())

    app = build_server_app(world.experiment, world.store, watch=watch)
    with pytest.raises(RunError, match=r"failed 2 times in a row: . of 3 sites sent an update, 3 are needed \(.*west: "):
        run_in_process(app, world.places, num_workers=1, make_app=odd_apps.hanging)
    assert time.monotonic() - failed[-1] < 30
    assert len(failed) == 2


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


@pytest.mark.parametrize("engine", ["inprocess", pytest.param("ray", marks=pytest.mark.slow)])
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
