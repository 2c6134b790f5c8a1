"""A real SuperLink that is killed under a run, and stays away longer than Flower waits for a ServerApp's heartbeat."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid
from little import waited_until

from fedmix.deployment import bundle
from fedmix.deployment.environment import flower_environment
from server import coordinator, serving
from server.control import connected, is_healthy
from server.home import Home, Settings
from server.link import LinkGrid
from simulations.superlink import free_ports

START_S = 240.0  # so long may a busy machine take to start a SuperLink
FLOWERS_S = 60.0  # after which Flower itself takes a ServerApp that it has not heard for dead


@contextmanager
def superlink(home: Home) -> Iterator[None]:
    """A SuperLink that serves, and is killed."""
    with (home.logs / "superlink.log").open("ab") as log:
        words = [sys.executable, "-m", "server.superlink", str(home.folder)]
        process = subprocess.Popen(words, env=flower_environment(home.flower("superlink")), stdout=log, stderr=log)
    try:
        waited_until(lambda: is_healthy(home), START_S)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def token(home: Home) -> str:
    """What the SuperLink gives to the one who starts the ServerApp of the run that waits."""
    client = RuntimeHttpClient.from_server_address(
        home.settings().control_address,
        insecure=False,
        root_certificates=home.ca_certificate.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=home.secret.read_bytes(), protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            ),
        ],
    )
    with closing(client):
        return str(client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token)


def status(home: Home) -> str:
    """How the SuperLink says that the one run stands."""
    with connected(home) as control:
        (run,) = control.runs()
    return run.status


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's, when it packs a bundle
def test_a_run_goes_on_over_a_superlink_that_was_killed_and_away_longer_than_flower_waits(tmp_path: Path) -> None:
    home, ports = Home(tmp_path / "hub"), free_ports(3)
    names = dict(zip(("port", "control_port", "health_port"), ports, strict=True))
    coordinator.init(home, Settings(host="localhost", listen="127.0.0.1", **names))
    with superlink(home):
        with connected(home) as control:
            control.start(bundle.write(home.flower("user") / "bundle"), "little")
        given = home.settings().control_address, False, home.ca_certificate.read_bytes()
        grid = HttpGrid(*given, token=token(home))
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        heartbeat.start()
        grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        assert list(LinkGrid(grid).get_nodes()) == []
        assert status(home) == "running"
    time.sleep(FLOWERS_S)
    with superlink(home):
        assert list(LinkGrid(grid).get_nodes()) == []  # Flower asks again until it is answered; a run that is over raises
        assert status(home) == "running"
        heartbeat.stop()
        grid.close()
        told: list[str] = []
        serving._announce(home, told.append)  # as a coordinator does that was started anew
        assert told[0] == "run little is stopped; it goes on with --resume"
        assert status(home) == "finished:stopped"
