"""The SuperNode, and the two programs between it and the ClientApp, in the place of Flower's own.

Flower unpacks the bundle that arrives, puts it first on ``sys.path`` and imports the app from there. Here nothing of it is
unpacked: the executor starts no other kind of program than this site's ClientApp, and that is the installed one. A bundle that
is not fedmix's own is refused all the same, for whoever sent it meant something else to run.

Flower 1.41.0 has no setting for this, so some of its functions are replaced by name; ``pyproject.toml`` pins the version, and
a test sends a bundle with code in it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp
from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supernode.cli import flower_supernode, flwr_clientapp

from fedmix.deployment import bundle

OTHER_BUNDLE = (
    "what the coordinator sent to be run here is not the bundle of this site's fedmix; nothing of it was unpacked. Are both of "
    "one version?"
)


class InstalledExecutor(SubprocessExecutor):
    """Starts the program below for a message to the ClientApp, and nothing else."""

    def get_eligible_capacity(self, supported_task_types: set[TaskType], **options: Any) -> tuple[set[TaskType], set[str]]:
        """The one kind of task that is taken."""
        return supported_task_types & {TaskType.CLIENT_APP}, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the ClientApp's process; it is told its token where no process list shows it."""
        if spec.task_type is not TaskType.CLIENT_APP or not spec.insecure:
            return LaunchResult.failed("only the ClientApp is started here, over the loopback interface")
        command = [*program("clientapp"), "--insecure", "--runtime-api-address", spec.runtime_api_address]
        child = subprocess.Popen([*command, "--parent-pid", str(spec.parent_pid)], stdin=subprocess.PIPE)
        assert child.stdin is not None
        with child.stdin:
            child.stdin.write(f"{spec.token}\n".encode())
        return LaunchResult.accepted()


def program(name: str) -> list[str]:
    """The command line of one of the programs. The working folder is kept off the path (-P): it may hold anything."""
    return [sys.executable, "-P", "-m", "client.runner", name]


def connect() -> None:
    """Dial the coordinator: Flower's own SuperNode, made fit for the line and for being killed."""
    from client import line, presence

    connection = importlib.import_module("flwr.supernode.fleet_http_connection")
    _replace(connection, "make_simple_http_retry_invoker", line.lasting_invoker)
    _replace(connection, "FleetHttpClient", presence.PresentClient)
    work = importlib.import_module("flwr.supernode.start_client_internal")
    _replace(work, "push_object_contents_from_iterable", line.push)
    _replace(work, "pull_objects", line.pull)
    flower_supernode()
    os._exit(1)  # the connection was given up; Flower's threads would keep the process, and nobody would start it again


def execute() -> None:
    """Wait at the SuperNode for messages to answer."""
    flow = importlib.import_module("flwr.supercore.superexec.run_superexec")
    _replace(flow, "get_executor", lambda *arguments, **options: InstalledExecutor())
    flower_superexec()


def answer() -> None:
    """Answer one message with the installed ClientApp, or refuse it if it came with another bundle than fedmix's own."""
    sys.argv += ["--token", sys.stdin.readline().strip()]  # the process list shows what a program was started with, not this
    flow = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    arrived: list[bytes] = []
    _replace(flow, "install_from_fab", lambda content, **options: arrived.append(content))
    _replace(flow, "get_load_client_app_fn", lambda **options: lambda *identity: app_for(arrived[-1]))
    flwr_clientapp()


def app_for(content: bytes) -> ClientApp:
    """The installed ClientApp, or one that refuses in words and in the ledger, by the bundle that arrived."""
    from client import app

    return app.app if bundle.is_ours(content) else app.build_refusal(OTHER_BUNDLE, app.from_node_config)


def _replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of Flower's; raises AttributeError where this Flower has none of the name."""
    getattr(module, name)
    setattr(module, name, function)


if __name__ == "__main__":
    chosen = {"flower-supernode": connect, "execute": execute, "clientapp": answer}[sys.argv.pop(1)]
    chosen()
