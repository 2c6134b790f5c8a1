"""Secure sums where a process is started for every message: the same weights as in one process, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from federations import START_S, federation
from little import SITES, World, everyone, waited_until

from fedmix.federation.update import digest
from server.store import RunStore
from simulations.superlink import run_on_superlink

PHASES = ["query", "query.keys", "query.shares", "train", "query.unmask"]


def wanted(folder: Path) -> dict[str, Any]:
    """One round, of which the pair tower has but one site and stays as it is."""
    patient = {"federation": {"deadline_s": 300.0}}
    return everyone(folder, aggregation={"clip": None}, secure_sum={"threshold": 2, "clip": 0.1}, **patient)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_superlink_of_this_machine_gives_the_sum_of_one_process(tmp_path: Path) -> None:
    world = World(tmp_path / "here", wanted(tmp_path))
    expected = digest(world.run().parameters)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text(world.experiment.to_yaml())
    places = [replace(place, experiment=folder / "config.yaml", state=folder / "sites" / place.site) for place in world.places]
    rows: list[Any] = []
    run_on_superlink(folder, places, threads_per_site=1, watch=rows.append)
    committed = RunStore(folder, world.experiment, resume=True).latest()
    assert committed is not None
    assert digest(committed.parameters) == expected
    assert [row["values"]["secure_sum/sites/shared"] for row in rows if row["event"] == "round"] == [3.0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hospitals_with_registered_keys_sum_in_secret(tmp_path: Path) -> None:
    world = World(tmp_path / "here", wanted(tmp_path))
    expected = digest(world.run().parameters)
    with federation(tmp_path / "there", world, wanted(tmp_path / "there")) as made:
        plan = made.found()
        assert all(f"{name}: ecdsa-sha2-nistp384 " in plan.read_text() for name in SITES)
        made.serve()
        for name in SITES:
            made.join(name)
        waited_until(lambda: made.online() == set(SITES), START_S)
        made.server("run", plan)
        committed = RunStore(made.hub / "runs" / "little", world.experiment, resume=True).latest()
        assert committed is not None
        assert digest(committed.parameters) == expected
        for name in SITES:
            sent = [entry["kind"] for entry in made.entries(name) if entry["event"] == "sent"]
            assert sent == PHASES
