"""What goes wrong between real hospitals: broken lines, killed programs, a pause, a full disk. Nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from federations import START_S, Federation, Program, federation, processes_with
from links import link
from little import SITES, World, everyone, waited_until

from fedmix.deployment.environment import OBJECT_BYTES
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
        # What a cut lost was sent again, at most two objects in flight a time.
        assert carried <= 1.01 * written + 3 * 2 * OBJECT_BYTES


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif("FEDMIX_LONG_LINE" not in os.environ, reason="takes an hour; set FEDMIX_LONG_LINE=1 to run it")
def test_750_mb_over_two_megabits_a_second_with_three_cuts_are_taken_to_the_bit(tmp_path: Path) -> None:
    wanted = everyone(tmp_path, federation={"deadline_s": 1200.0, "slowest_link_mbit_s": 2.0}, wire={"coding": "float32"})
    wanted["model"] |= {"width": 1048, "depth": 8, "num_heads": 8}
    wanted["data"]["sites"] = [site for site in wanted["data"]["sites"] if site["name"] == "west"]
    world = World(tmp_path / "here", wanted)
    size = sum(4 * value.numel() for value in world.initial().values())
    assert size >= 750e6
    with federation(tmp_path / "there", world, wanted) as made:
        port = free_ports(1)[0]
        plan = made.found(port, sites=("west",))
        made.serve()
        cuts = [int(share * size) for share in (0.2, 0.5, 0.8)]
        with link(made.address, port=port, bytes_per_s=2.5e5, is_down_free=True, cuts=cuts, outage_s=25.0) as line:
            made.join("west")
            waited_until(lambda: made.online() == {"west"}, START_S)
            assert made.start("run.log", "server", "run", plan, "--home", made.hub).ended(7000) == 0
            assert line.num_cuts == 3
            assert line.up <= 1.01 * size + 3 * 2 * OBJECT_BYTES
        found = trained(made.hub / "runs/little", world)
    assert found == digest(world.run().parameters)


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


def kill(text: str, home: Path) -> bool:
    """SIGKILL to the first program of a home with this in its command line; whether there is one."""
    for pid in processes_with(text, home)[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def orders(made: Federation, name: str) -> int:
    """How many orders to train a hospital has let in."""
    return sum(entry["event"] == "received" and entry["kind"] == "train" for entry in made.entries(name))


def rows(run: Path, event: str, site: str | None) -> list[dict[str, Any]]:
    """What a run has told of a site, or of its rounds, so far."""
    path = run / "events.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in told if (row["event"], row["site"]) == (event, site)]


def told_why(run: Path, site: str, why: str) -> bool:
    """Whether a run has told that a site was dropped for this reason."""
    return any(why in row["why"] for row in rows(run, "dropped", site))


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


def superlink_dies(made: Federation, ran: Program) -> None:
    """Kill the SuperLink while hospitals train; whoever watches says so, and that it waits."""
    before = orders(made, "west")
    waited_until(lambda: orders(made, "west") > before, START_S)
    kill("server.superlink", made.hub)
    waited_until(lambda: "the SuperLink does not answer" in ran.said(), START_S)


@contextmanager
def full_disk(home: Path) -> Iterator[None]:
    """Nothing that trains at a hospital can write a file beyond a limit, which stands for a disk without room."""
    (executor,) = processes_with("client.runner\0execute", home)
    resource.prlimit(executor, resource.RLIMIT_FSIZE, (SMALL_FILES, resource.RLIM_INFINITY))
    yield
    resource.prlimit(executor, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def serverapp_dies(made: Federation, ran: Program) -> None:
    """Kill the ServerApp; half a minute later whoever watches has said so, and how to go on."""
    killed = time.monotonic()
    kill("flwr-serverapp", made.hub)
    assert ran.ended() == 1
    assert time.monotonic() - killed < 30.0
    assert "the ServerApp ended without a word (killed, or out of memory?); go on with --resume" in ran.said()


@pytest.mark.slow
def test_a_run_outlives_its_superlink_its_serverapp_a_pause_and_a_full_disk_and_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    wanted = everyone(tmp_path, rounds=3, federation=ENDURING)
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    with federation(tmp_path / "there", world, wanted) as made:
        plan, run = begun(made), made.hub / "runs/little"
        first = made.start("run.log", "server", "run", plan, "--home", made.hub)
        superlink_dies(made, first)
        waited_until(lambda: rows(run, "round", None), START_S)
        with full_disk(made.folder / "south"):
            waited_until(lambda: told_why(run, "south", "cannot be kept at this site: File too large"), START_S)
            made.site("west", "pause")
            waited_until(lambda: told_why(run, "west", "this site is paused; `fedmix site resume` there ends that"), START_S)
        serverapp_dies(made, first)
        made.site("west", "resume")
        assert made.start("again.log", "server", "run", plan, "--resume", "--home", made.hub).ended() == 0
        assert trained(run, world) == expected
        assert not list(made.folder.glob("*/state/**/*.partial"))
        agree(made)


def agents_die(made: Federation, moments: Sequence[float], victims: Sequence[tuple[str, str]]) -> None:
    """Kill a hospital's program at each of some moments, in seconds since the next order reached a hospital.

    Where nothing trains at that moment it is the SuperNode, and where that is just being started again, the next one.
    """
    before = {name: orders(made, name) for name in SITES}
    waited_until(lambda: any(orders(made, name) > before[name] for name in SITES), START_S)
    came = time.monotonic()
    for moment, (site, program) in zip(moments, victims, strict=True):
        time.sleep(max(0.0, came + moment - time.monotonic()))
        home = made.folder / site
        waited_until(lambda home=home, program=program: kill(program, home) or kill("flower-supernode", home), START_S)


def five_deaths(seed: int) -> tuple[list[float], list[tuple[str, str]]]:
    """Moments, and who dies at each: a hospital's SuperNode, or only the program that trains."""
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0.0, 15.0) for _ in range(5))
    return moments, [(chance.choice(SITES), chance.choice(["flower-supernode", "client.runner\0clientapp"])) for _ in moments]


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.e2e), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_agents_killed_at_five_moments_of_a_round_come_back_and_it_ends_with_the_same_weights(
    seed: int, tmp_path: Path
) -> None:
    wanted = everyone(tmp_path, federation=ENDURING)
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    with federation(tmp_path / "there", world, wanted) as made:
        plan = begun(made)
        ran = made.start("run.log", "server", "run", plan, "--home", made.hub)
        agents_die(made, *five_deaths(seed))
        assert ran.ended() == 0
        run = made.hub / "runs/little"
        assert trained(run, world) == expected
        assert [row["values"]["num_sites"] for row in rows(run, "round", None)] == [3.0]
        agree(made)
