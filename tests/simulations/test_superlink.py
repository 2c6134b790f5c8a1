"""The SuperLink engine's processes: what they are told, how a run that fails ends, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from federations import processes_with
from little import World, everyone, processes_of, scoring

from fedmix.errors import RunError
from fedmix.federation.update import digest
from server import site_scores
from server.store import RunStore
from simulations import superlink
from simulations.superlink import run_on_superlink


def test_paths_with_blanks_and_quotes_reach_a_site_whole(tmp_path: Path) -> None:
    odd = {"site": "north", "shard": '/data/St. Mary\'s "new" ward/shard\\1', "state": "/Zürich\t病院"}
    superlink._write_toml(tmp_path / "node.toml", odd)
    assert tomllib.loads((tmp_path / "node.toml").read_text()) == odd


def test_rows_are_told_from_whatever_else_is_printed(tmp_path: Path) -> None:
    row = {"event": "round", "round": 1}
    lines = [b"Traceback\n", json.dumps(row).encode() + b"\n", b'{"other": 1}\n', b"[1]\n", b"\xff\n"]
    assert list(superlink._rows(lines, tmp_path / "app.log")) == [row]
    assert (tmp_path / "app.log").read_bytes() == b'Traceback\n{"other": 1}\n[1]\n\xff\n'


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"runs": []}', b"no json"])
def test_a_link_that_cannot_tell_how_a_run_ended_is_not_believed_to_have_completed_it(answer: bytes) -> None:
    listed = superlink._read_list([answer])
    assert (listed.state, listed.is_going_on) == ("unknown", False)


def test_free_ports_differ() -> None:
    ports = superlink.free_ports(20)
    assert len(set(ports)) == 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_stream_breaks_off_is_followed_to_its_end(tmp_path: Path) -> None:
    """A busy SuperLink ends `flwr run --stream` with an error while the run goes on."""
    world = World(tmp_path / "here", everyone(tmp_path, rounds=2, federation={"deadline_s": 300.0}))
    expected = digest(world.run().parameters)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text(world.experiment.to_yaml())
    places = [replace(place, experiment=folder / "config.yaml", state=folder / "sites" / place.site) for place in world.places]
    seen: list[tuple[str, int]] = []

    def watch(row: Mapping[str, Any]) -> None:
        if not seen:
            (following,) = processes_with("flwr\0run\0", folder.parent)
            os.kill(following, signal.SIGKILL)
        seen.append((row["event"], row["round"]))

    run_on_superlink(folder, places, threads_per_site=1, watch=watch)
    committed = RunStore(folder, world.experiment, resume=True).latest()
    assert committed is not None
    assert digest(committed.parameters) == expected
    assert [number for event, number in seen if event == "round"] == [1, 2]
    assert len([one for one in seen if one[0] == "site"]) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_that_refuses_ends_the_run_with_its_reason_and_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "here", everyone(tmp_path))
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text(world.experiment.to_yaml())
    north, south, west = (replace(place, experiment=folder / "config.yaml") for place in world.places)
    places = [replace(north, shard=south.shard), south, west]
    with pytest.raises(
        RunError, match=r"site north: it is to train on image studies, but its shard's training split holds none"
    ):
        run_on_superlink(folder, places, threads_per_site=1, watch=lambda row: None)
    assert processes_of(folder, "flower|flwr") == []
    assert json.loads((folder / "manifest.json").read_text())["state"] == "failed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sites_score_the_model_over_a_superlink_as_they_do_here(tmp_path: Path) -> None:
    world = World(tmp_path / "here", scoring(tmp_path, federation={"deadline_s": 300.0}))
    world.run()
    expected = site_scores.kept(world.experiment, world.store.folder)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text(world.experiment.to_yaml())
    places = [replace(place, experiment=folder / "config.yaml", state=folder / "sites" / place.site) for place in world.places]
    run_on_superlink(folder, places, threads_per_site=1, watch=lambda row: None)
    assert expected is not None
    assert all(one["scores"] for one in expected.values())
    assert site_scores.kept(world.experiment, folder) == expected
