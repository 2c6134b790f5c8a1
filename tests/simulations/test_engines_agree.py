"""The same ServerApp and ClientApp end in the same weights, to the bit, whatever engine runs under Flower's Grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from little import World, everyone, fedmix, processes_of, waited_until, write_config

from fedmix.federation.update import digest
from server.app import build_app
from server.store import RunStore
from simulations import engine
from simulations.superlink import run_on_superlink

Engine = Callable[[World, Path], None]


def wanted(folder: Path) -> dict[str, Any]:
    """Two rounds in which everything that a site keeps or that travels takes part: moments, caches, residuals, coded arrays."""
    values = everyone(folder, rounds=2, wire={"coding": "int8", "keep": 0.5}, federation={"deadline_s": 150.0})
    values["stages"][0] |= {"optimiser": {"second_moment": "aggregated"}, "outer": {"kind": "adam"}}
    return values


def in_process(num_workers: int) -> Engine:
    def run(world: World, folder: Path) -> None:
        store = RunStore(folder, world.experiment, resume=False)
        app = build_app(world.experiment, store, watch=lambda row: None)
        engine.run_in_process(app, in_folder(world, folder), num_workers=num_workers)

    return run


def on_ray(world: World, folder: Path) -> None:
    """As a user starts it, for Ray's own processes and announcements are none of a test's business."""
    folder.parent.mkdir()
    path = write_config(folder.parent, wanted(folder.parents[1]))
    run = fedmix("simulate", path, "--engine", "ray", "--out", folder)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "Flower" not in run.stdout
    waited_until(lambda: not processes_of(folder, r"raylet|gcs_server|ray::"))


def on_superlink(world: World, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(world.experiment.to_yaml())
    rows: list[Any] = []
    run_on_superlink(folder, in_folder(world, folder), threads_per_site=1, watch=rows.append)
    rounds = [row["round"] for row in rows if row["event"] == "round"]
    assert rounds[:1] == [1]  # the last lines may be missing: Flower sends a log for three more seconds and no longer
    assert processes_of(folder, "flower|flwr") == []


ENGINES: dict[str, Engine] = {
    "sequential": in_process(0),
    "one worker": in_process(1),
    "two workers": in_process(2),
    "ray": on_ray,
    "superlink": on_superlink,
}


def in_folder(world: World, folder: Path) -> list[Any]:
    """The world's sites, with what they keep in another run folder."""
    return [replace(place, experiment=folder / "config.yaml", state=folder / "sites" / place.site) for place in world.places]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("engines")
    return World(folder, wanted(folder))


@pytest.fixture(scope="module")
def weights(world: World) -> str:
    """What the sites' apps make of it when each is called like a function."""
    committed = world.run()
    assert sorted(world.taken()) == [(number, site) for number in (1, 2) for site in ("north", "south", "west")]
    return digest(committed.parameters)


@pytest.mark.e2e
@pytest.mark.timeout(600)  # Flower imports torch anew for every message
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_gives_the_same_weights(name: str, world: World, weights: str) -> None:
    folder = world.store.folder.parent / name.replace(" ", "-") / "run"
    ENGINES[name](world, folder)
    committed = RunStore(folder, world.experiment, resume=True).latest()
    assert committed is not None
    assert committed.round_number == 2
    assert digest(committed.parameters) == weights
