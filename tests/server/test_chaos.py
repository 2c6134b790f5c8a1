"""What goes wrong between real hospitals: broken lines, killed programs, a pause, a full disk. Nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from federations import START_S, Federation, federation, processes_with
from links import link
from little import SITES, World, everyone, values, waited_until

from fedmix.federation.update import digest
from server.store import RunStore
from simulations.superlink import free_ports

pytestmark = pytest.mark.timeout(1800)
ENDURING = {"deadline_s": 600.0, "min_sites": len(SITES), "max_failed_rounds": 20}  # a round counts with every site in it
SMALL_FILES = 64 << 10  # bytes; a ledger fits, the weights that a site keeps do not


def trained(folder: Path, world: World) -> str:
    """The digest of the weights that a run folder ends with."""
    committed = RunStore(folder, world.experiment, resume=True).latest()
    assert committed is not None
    assert committed.round_number == world.experiment.num_rounds
    return digest(committed.parameters)


@pytest.mark.slow
def test_a_slow_line_that_breaks_three_times_carries_a_round_and_the_ledgers_tell_its_bytes(tmp_path: Path) -> None:
    wanted = everyone(tmp_path, federation={"deadline_s": 600.0}, wire={"coding": "float32"})
    wanted["model"] |= {"width": 192, "depth": 2, "num_heads": 4}
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    size = sum(4 * value.numel() for value in world.initial().values())
    with federation(tmp_path / "there", world, wanted) as made:
        port = free_ports(1)[0]
        plan = made.found(port)
        made.serve()
        with link(made.address, port=port, bytes_per_s=1e6, cuts=[size // 4, size // 2, size], outage_s=8.0) as line:
            for name in SITES:
                made.join(name)
            waited_until(lambda: made.online() == set(SITES), START_S)
            before = line.up + line.down
            assert made.start("run.log", "server", "run", plan, "--home", made.hub).ended() == 0
            carried = line.up + line.down - before
            assert line.num_cuts == 3
        assert trained(made.hub / "runs/little", world) == expected
        written = sum(entry.get("bytes", 0) for name in SITES for entry in made.entries(name))
        assert written <= carried
        # What a cut lost was sent again, at most two objects of 5 MiB in flight a time.
        assert carried <= 1.01 * written + 3 * 2 * (5 << 20)


@pytest.mark.slow
def test_an_unbroken_line_carries_what_the_ledgers_say_within_a_hundredth(tmp_path: Path) -> None:
    wanted = everyone(tmp_path, federation={"deadline_s": 600.0}, wire={"coding": "float32"})
    wanted["model"] |= {"width": 384, "depth": 2, "num_heads": 4}
    world = World(tmp_path / "here", wanted)
    with federation(tmp_path / "there", world, wanted) as made:
        port = free_ports(1)[0]
        plan = made.found(port)
        made.serve()
        with link(made.address, port=port) as line:
            for name in SITES:
                made.join(name)
            waited_until(lambda: made.online() == set(SITES), START_S)
            before = line.up + line.down
            assert made.start("run.log", "server", "run", plan, "--home", made.hub).ended() == 0
            carried = line.up + line.down - before
        written = sum(entry.get("bytes", 0) for name in SITES for entry in made.entries(name))
        assert carried == pytest.approx(written, rel=0.01)


def kill(text: str, home: Path) -> None:
    """SIGKILL to the first program of a home with this in its command line, if one runs."""
    for pid in processes_with(text, home)[:1]:
        os.kill(pid, signal.SIGKILL)


def orders(made: Federation, name: str) -> int:
    """How many orders to train a hospital has let in."""
    return sum(entry["event"] == "received" and entry["kind"] == "train" for entry in made.entries(name))


def rows(run: Path, event: str, site: str | None) -> list[dict[str, Any]]:
    """What a run has told of a site, or of its rounds, so far."""
    path = run / "events.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in told if (row["event"], row["site"]) == (event, site)]


def begun(made: Federation) -> Path:
    """A federation whose sites are all online; returns its plan."""
    plan = made.found()
    made.serve()
    for name in SITES:
        made.join(name)
    waited_until(lambda: made.online() == set(SITES), START_S)
    return plan


def agree(made: Federation) -> None:
    """See that every hospital's ledger is whole, and that nothing is missing that the coordinator was told of."""
    for name in SITES:
        made.site(name, "audit", "verify", "--peer", made.hub / "ledger.jsonl")


@pytest.mark.slow
def test_a_killed_serverapp_and_a_pause_before_the_run_end_it_with_words_and_resume_goes_on_to_the_bit(tmp_path: Path) -> None:
    wanted = values(tmp_path, federation={"deadline_s": 600.0, "max_failed_rounds": 20})
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    with federation(tmp_path / "there", world, wanted) as made:
        plan = begun(made)
        run = made.hub / "runs/little"
        first = made.start("run.log", "server", "run", plan, "--home", made.hub)
        waited_until(lambda: (run / "checkpoints/round-00001").is_dir(), START_S)
        killed = time.monotonic()
        kill("flwr-serverapp", made.hub)
        assert first.ended() == 1
        assert time.monotonic() - killed < 30.0
        assert "the ServerApp ended without a word (killed, or out of memory?); go on with --resume" in first.said()
        made.site("west", "pause")
        second = made.start("again.log", "server", "run", plan, "--resume", "--home", made.hub)
        assert second.ended() == 1
        assert "site west: this site is paused" in second.said()
        made.site("west", "resume")
        assert made.start("last.log", "server", "run", plan, "--resume", "--home", made.hub).ended() == 0
        assert trained(run, world) == expected
        agree(made)


@pytest.mark.slow
def test_a_superlink_that_is_killed_while_sites_train_is_back_before_the_run_misses_it(tmp_path: Path) -> None:
    wanted = everyone(tmp_path, rounds=3, federation=ENDURING)
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    with federation(tmp_path / "there", world, wanted) as made:
        plan = begun(made)
        ran = made.start("run.log", "server", "run", plan, "--home", made.hub)
        for number in (1, 2):
            waited_until(lambda number=number: orders(made, "west") >= number, START_S)
            kill("server.superlink", made.hub)
        assert ran.ended() == 0
        assert "the SuperLink does not answer" in ran.said()
        assert trained(made.hub / "runs/little", world) == expected
        agree(made)


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.e2e), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_agents_killed_at_five_moments_of_a_round_come_back_and_it_ends_with_the_same_weights(
    seed: int, tmp_path: Path
) -> None:
    wanted = everyone(tmp_path, rounds=2, federation=ENDURING)
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0.0, 15.0) for _ in range(5))
    victims = [(chance.choice(SITES), chance.choice(["flower-supernode", "client.runner\0clientapp"])) for _ in moments]
    with federation(tmp_path / "there", world, wanted) as made:
        plan = begun(made)
        ran = made.start("run.log", "server", "run", plan, "--home", made.hub)
        waited_until(lambda: any(orders(made, name) for name in SITES), START_S)
        first_order = time.monotonic()
        for moment, (site, program) in zip(moments, victims, strict=True):
            time.sleep(max(0.0, first_order + moment - time.monotonic()))
            kill(program, made.folder / site)
        assert ran.ended() == 0
        run = made.hub / "runs/little"
        assert trained(run, world) == expected
        assert [row["values"]["num_sites"] for row in rows(run, "round", None)] == [3.0, 3.0]
        agree(made)


@pytest.mark.slow
def test_a_run_goes_on_without_a_site_that_is_paused_or_whose_disk_is_full_and_with_it_when_it_is_back(tmp_path: Path) -> None:
    wanted = everyone(tmp_path, rounds=9, federation={"deadline_s": 600.0, "min_sites": 2})
    world = World(tmp_path / "here", wanted)
    with federation(tmp_path / "there", world, wanted) as made:
        plan = begun(made)
        run = made.hub / "runs/little"
        ran = made.start("run.log", "server", "run", plan, "--home", made.hub)
        waited_until(lambda: rows(run, "round", None), START_S)
        made.site("west", "pause")
        waited_until(lambda: rows(run, "dropped", "west"), START_S)
        made.site("west", "resume")
        (executor,) = processes_with("client.runner\0execute", made.folder / "south")
        resource.prlimit(executor, resource.RLIMIT_FSIZE, (SMALL_FILES, resource.RLIM_INFINITY))
        waited_until(lambda: rows(run, "dropped", "south"), START_S)
        resource.prlimit(executor, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert ran.ended() == 0
        for site, why in (("west", "this site is paused; `fedmix site resume` there ends that"), ("south", "File too large")):
            away = rows(run, "dropped", site)
            assert all(why in row["why"] for row in away)
            assert why in ran.said()
            assert rows(run, "site", site)[-1]["round"] > away[-1]["round"]
        assert trained(run, world)
        assert not list(made.folder.glob("*/state/**/*.partial"))
        agree(made)
