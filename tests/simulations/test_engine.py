"""Worker processes under the Grid: what they may do to a round, and that the engine leaves the weights alone."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import odd_apps
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from little import ROOT, DirectGrid, World, everyone, is_running, waited_until

from client.place import Place
from fedmix.deployment.environment import FLOWER_ENVIRONMENT
from fedmix.errors import RunError
from fedmix.federation.update import digest
from simulations import engine, pipe
from simulations.engine import InProcessGrid, WorkerPool


@contextmanager
def grid_over(world: World, **options: Any) -> Iterator[InProcessGrid]:
    grid = InProcessGrid(world.places, **({"num_workers": 2} | options))
    try:
        yield grid
    finally:
        grid.close()


@contextmanager
def many_small_sites(number: int, **options: Any) -> Iterator[InProcessGrid]:
    """Nodes whose app needs no files."""
    nowhere = Path("nowhere")
    grid = InProcessGrid([Place(f"site{n}", nowhere, nowhere, nowhere) for n in range(number)], **options)
    try:
        yield grid
    finally:
        grid.close()


def through_a_pipe(message: Message) -> Message:
    """The message as a worker reads it."""
    ours, theirs = Pipe()
    writer = threading.Thread(target=engine.send, args=(ours, message))
    writer.start()
    received = pipe.receive(theirs)
    writer.join()
    ours.close()
    theirs.close()
    return received


def test_messages_arrive_at_workers_as_flowers_own_protobuf_would_carry_them() -> None:
    DirectGrid([], {})
    arrays = ArrayRecord({"a": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "b": Array(np.array(3.0))})
    records = {"arrays": arrays, "plan": ConfigRecord({"round": 3}), "sums": MetricRecord({"loss": [1.0, 2.0]})}
    message = Message(RecordDict(records | {"none": ArrayRecord({})}), 2, "train", ttl=5.0, group_id="3")
    ours = through_a_pipe(message)
    flowers = message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))
    assert dict(ours.content) == dict(flowers.content)
    assert ours.metadata.__dict__ == flowers.metadata.__dict__
    assert through_a_pipe(Message(RecordDict(), 2, "query")).has_content()
    error = Message(Error(code=1001, reason="no"), reply_to=message)
    assert through_a_pipe(error).error == Error(code=1001, reason="no")


def test_array_data_arrive_whole_whatever_their_length_beside_a_piece() -> None:
    DirectGrid([], {})
    lengths = [0, 1, pipe.PIECE_BYTES - 1, pipe.PIECE_BYTES, pipe.PIECE_BYTES + 1, 2 * pipe.PIECE_BYTES, 3]
    arrays = {f"a{length}": Array("uint8", (length,), "odd", os.urandom(length)) for length in lengths}
    received = through_a_pipe(Message(RecordDict({"arrays": ArrayRecord(arrays)}), 2, "train"))
    assert dict(received.content.array_records["arrays"]) == arrays


def test_sending_copies_no_array_and_receiving_never_holds_two() -> None:
    DirectGrid([], {})
    megabytes, num_arrays = 8, 6
    arrays = {f"a{number}": Array("uint8", (1,), "odd", bytes(megabytes << 20)) for number in range(num_arrays)}
    message = Message(RecordDict({"arrays": ArrayRecord(arrays)}), 2, "train")
    tracemalloc.start()
    try:
        received = through_a_pipe(message)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received.content.array_records["arrays"].keys() == arrays.keys()
    assert num_arrays * megabytes <= held / 2**20 < num_arrays * megabytes + 2
    assert (peak - held) / 2**20 < megabytes + 3  # the pieces of the last array beside it, and one on its way out


def test_workers_are_as_many_as_the_cores_carry_and_never_more_than_sites() -> None:
    cores = len(os.sched_getaffinity(0))
    assert engine.default_workers(1, 1) == 1
    assert engine.default_workers(1000, 1) == cores
    assert engine.default_workers(1000, 2 * cores) == 1


def test_an_engine_without_flowers_announcements_is_what_its_environment_asks_for() -> None:
    assert {key: os.environ[key] for key in FLOWER_ENVIRONMENT} == FLOWER_ENVIRONMENT


def test_sites_one_after_the_other_in_this_process_give_the_same_weights_and_leave_its_threads_alone(tmp_path: Path) -> None:
    here = World(tmp_path / "here", everyone(tmp_path)).run()
    world = World(tmp_path / "there", everyone(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with grid_over(world, num_workers=0) as grid:
            there = world.run(grid)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert digest(there.parameters) == digest(here.parameters)


def test_in_this_process_a_job_that_took_too_long_is_late_and_so_is_one_that_waited_too_long() -> None:
    with many_small_sites(3, num_workers=0, make_app=odd_apps.slow) as grid:
        orders = [Message(RecordDict(), node, "train", ttl=1.0) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(orders))
    assert [reply.error.code if reply.has_error() else None for reply in replies] == [None, engine.LATE, engine.LATE]


# ---- real workers


@pytest.mark.e2e
def test_a_round_of_a_thousand_sites_runs_in_constant_memory() -> None:
    """Orders of 256 KiB share one content; replies of 256 KiB, a quarter of a GB together, are let go one by one."""
    order = RecordDict({"parameters": ArrayRecord({"w": Array(np.zeros(1 << 16, np.float32))})})
    with many_small_sites(1000, num_workers=2, make_app=odd_apps.echoing) as grid:
        gc.disable()  # a cycle that holds a message would keep it for as long as Python likes
        tracemalloc.start()
        try:
            waiting = set(grid.push_messages(Message(order, node, "train") for node in grid.get_node_ids()))
            queued, _ = tracemalloc.get_traced_memory()
            num_bytes = 0
            while waiting:
                for reply in grid.pull_messages(waiting):
                    waiting.remove(reply.metadata.reply_to_message_id)
                    deltas = reply.content["deltas"]
                    assert isinstance(deltas, ArrayRecord)
                    num_bytes += len(deltas["w"].data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert num_bytes >= 1000 << 18
    assert queued / 2**20 < 16
    assert peak / 2**20 < 24


@pytest.mark.e2e
def test_replies_are_taken_in_one_by_one_however_many_workers_are_ready() -> None:
    with many_small_sites(2, num_workers=2, make_app=odd_apps.echoing) as grid:
        order = RecordDict({"parameters": ArrayRecord({"w": Array(np.zeros(4, np.float32))})})
        waiting = list(grid.push_messages(Message(order, node, "train") for node in grid.get_node_ids()))
        pool = grid._pool
        assert isinstance(pool, WorkerPool)
        waited_until(lambda: len(wait(list(pool._busy), timeout=0.0)) == 2)
        assert [len(list(grid.pull_messages(waiting))) for _ in range(2)] == [1, 1]


@pytest.mark.e2e
def test_a_worker_that_dies_drops_its_site_and_the_next_round_has_a_new_one(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, rounds=2))
    with grid_over(world, make_app=odd_apps.crashing_once) as grid:
        world.run(grid)
        assert len(workers_of(grid)) == 2
    assert world.dropped() == {"south": "the worker process of site south died"}
    assert world.taken().count((1, "south")) == 0
    assert (2, "south") in world.taken()


@pytest.mark.e2e
def test_a_site_whose_worker_always_dies_never_ends_the_run(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, rounds=2))
    with grid_over(world, make_app=odd_apps.crashing, num_workers=1) as grid:
        world.run(grid)
    assert sorted(world.taken()) == [(1, "north"), (1, "west"), (2, "north"), (2, "west")]


@pytest.mark.e2e
def test_an_exception_in_a_job_travels_by_its_kind_alone(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    with grid_over(world, make_app=odd_apps.raising) as grid:
        world.run(grid)
    assert world.dropped() == {"north": "the job of site north failed with LookupError"}


@pytest.mark.e2e
def test_a_job_past_the_deadline_is_stopped_and_does_not_starve_the_next_round(tmp_path: Path) -> None:
    # Long enough for a new worker to start in on a busy machine, or no round would ever be whole.
    world = World(tmp_path, everyone(tmp_path, rounds=2, federation={"deadline_s": 25.0}))
    with grid_over(world, make_app=odd_apps.hanging_once, num_workers=1) as grid:
        started = time.monotonic()
        world.run(grid)
        assert time.monotonic() - started < 120
    assert world.dropped()["west"] == "no reply before the deadline"
    assert [site for number, site in sorted(world.taken()) if number == 2] == ["north", "south", "west"]
    assert not any(number == 1 and site == "west" for number, site in world.taken())


@pytest.mark.e2e
def test_workers_that_cannot_start_end_the_run_and_not_the_machine(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    with (
        pytest.raises(RunError, match=r"the worker process of site \w+ died"),
        grid_over(world, make_app=odd_apps.stillborn) as grid,
    ):
        world.run(grid)


@pytest.mark.e2e
def test_a_worker_killed_while_it_is_free_costs_one_reply(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, rounds=2))

    def kill_one(number: int, stage: str, parameters: object) -> None:
        if number == 1:
            victim = next(iter(workers_of(grid).values()))
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()

    with grid_over(world, num_workers=1) as grid:
        world.run(grid, on_committed=kill_one)
    assert len(world.dropped()) == 1
    assert len(world.taken()) == 5


@pytest.mark.e2e
def test_closing_leaves_no_worker_behind_whatever_it_does(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    with grid_over(world, make_app=odd_apps.hanging_once) as grid:
        processes = list(workers_of(grid).values())
        grid.push_messages([Message(RecordDict(), 4, "train")])
        waited_until((world.places[2].state / "asked").exists)
    assert all(process.exitcode is not None for process in processes)


@pytest.mark.e2e
def test_workers_end_with_the_run_that_is_killed(tmp_path: Path) -> None:
    """A worker that trained on would write the killed run's moments into the resumed one's state."""
    World(tmp_path / "first", everyone(tmp_path))  # what is killed below is not to draw phantoms
    program = (
        "import sys, time\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(ROOT / 'tests/simulations')!r}]\n"
        "from pathlib import Path\n"
        "import odd_apps, little\n"
        "from simulations.engine import InProcessGrid\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    world = little.World(folder, little.everyone(folder))\n"
        "    grid = InProcessGrid(world.places, num_workers=2, make_app=odd_apps.hanging_once)\n"
        "    print(*[process.pid for process in grid._pool._processes.values()], flush=True)\n"
        "    world.run(grid)\n"
    )
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen([sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        waited_until(lambda: (tmp_path / "run/sites/west/asked").exists())
        run.kill()
        run.wait()
        waited_until(lambda: not any(is_running(pid) for pid in pids))


def workers_of(grid: InProcessGrid) -> dict[Any, Any]:
    """The worker processes, by the connection to each."""
    assert isinstance(grid._pool, WorkerPool)
    return grid._pool._processes
