"""What goes wrong between real hospitals: broken lines, killed programs, a hospital that pauses. Nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from federations import START_S, federation, processes_with
from links import link
from little import SITES, World, everyone, values, waited_until

from fedmix.federation.update import digest
from server.store import RunStore
from simulations.superlink import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def trained(folder: Path, world: World) -> str:
    """The digest of the weights that a run folder ends with."""
    committed = RunStore(folder, world.experiment, resume=True).latest()
    assert committed is not None
    assert committed.round_number == world.experiment.num_rounds
    return digest(committed.parameters)


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


def test_killed_programs_and_a_pause_cost_a_round_at_most(tmp_path: Path) -> None:
    wanted = values(tmp_path, federation={"deadline_s": 600.0, "max_failed_rounds": 20})
    world = World(tmp_path / "here", wanted)
    expected = digest(world.run().parameters)
    with federation(tmp_path / "there", world, wanted) as made:
        plan = made.found()
        made.serve()
        for name in SITES:
            made.join(name)
        waited_until(lambda: made.online() == set(SITES), START_S)
        run = made.hub / "runs/little"
        first = made.start("run.log", "server", "run", plan, "--home", made.hub)
        waited_until(lambda: (run / "checkpoints/round-00001").is_dir(), START_S)
        os.kill(processes_with("flwr-serverapp", made.hub)[0], signal.SIGKILL)
        assert first.ended() == 1
        assert "go on with --resume" in first.said()
        os.kill(processes_with("flower-supernode", made.folder / "west")[0], signal.SIGKILL)
        made.site("west", "pause")
        second = made.start("again.log", "server", "run", plan, "--resume", "--home", made.hub)
        waited_until(lambda: "this site is paused" in second.said() or second.process.poll() is not None, START_S)
        made.site("west", "resume")
        if second.ended() != 0:  # west was still away when the run asked who is there: it says so, and is taken up
            assert "west" in second.said()
            waited_until(lambda: made.online() == set(SITES), START_S)
            assert made.start("last.log", "server", "run", plan, "--resume", "--home", made.hub).ended() == 0
        assert trained(run, world) == expected
        for name in SITES:
            made.site(name, "audit", "verify", "--peer", made.hub / "ledger.jsonl")
