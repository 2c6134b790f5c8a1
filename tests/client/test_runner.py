"""What answers a message: the installed ClientApp, whatever the bundle that arrived holds."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus
from flwr.supercore.task_identity import TaskIdentity
from hospitals import approved, hospital, query, written_plan
from little import World, values, wired

from client import app, runner
from client.home import Home
from fedmix.deployment import bundle
from server import messages as server_messages

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's


@pytest.fixture
def world(tmp_path: Path) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    return World(tmp_path, values(tmp_path))


def hostile(folder: Path) -> bytes:
    """A bundle whose own fedmix leaves a mark when it is imported."""
    made = bundle.write(folder / "fedmix")
    (made / "fedmix").mkdir()
    (made / "fedmix" / "__init__.py").write_text(f"open({str(folder / 'mark')!r}, 'w')\n")
    return build_fab_from_disk(made)


def asked(made: Home, content: bytes, message: Message) -> Message:
    """What a bundle's app answers."""
    message.metadata.__dict__["_message_id"] = "1"
    node_config: Any = {"site": "west", "home": str(made.folder)}
    context = Context(run_id=7, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    return wired(runner.app_for(content)(wired(message), context))


def test_with_fedmixs_own_bundle_the_installed_app_answers(tmp_path: Path) -> None:
    assert runner.app_for(build_fab_from_disk(bundle.write(tmp_path / "fedmix"))) is app.app


def test_a_bundle_with_code_is_refused_in_words_and_in_the_ledger(tmp_path: Path, world: World) -> None:
    made = hospital(tmp_path / "west", world)
    plan = approved(made, written_plan(tmp_path, world))
    said = asked(made, hostile(tmp_path), query(plan, world))
    assert said.has_error()
    assert server_messages.reason(said) == runner.OTHER_BUNDLE
    entries = [json.loads(line) for line in made.ledger_file.read_text().splitlines()]
    assert [entry["event"] for entry in entries[-2:]] == ["received", "refused"]
    assert not (tmp_path / "mark").exists()


def test_flower_keeps_a_bundle_that_arrives_off_the_disk_and_off_the_path(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own program, with its own order of steps, given what a SuperNode would give it."""
    made = hospital(tmp_path / "west", world)
    message = query(approved(made, written_plan(tmp_path, world)), world)
    message.metadata.__dict__["_message_id"] = "1"
    node_config: Any = {"site": "west", "home": str(made.folder)}
    context = Context(run_id=7, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    flow = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    run, fab = flow.Run.create_empty(7), flow.Fab("0" * 64, hostile(tmp_path), {})
    run.fab_id, run.fab_version = "fedmix/fedmix", "0.1.0"
    answers: list[Message] = []
    monkeypatch.setattr(flow, "pull_task_input", lambda client: (wired(message), context, run, fab))
    monkeypatch.setattr(flow, "push_message", lambda client, reply, context: answers.append(reply))
    monkeypatch.setattr(flow, "push_task_output", lambda **options: None)
    monkeypatch.setattr(flow, "HeartbeatSender", Silent)
    monkeypatch.setattr(flow, "register_signal_handlers", lambda **options: None)
    monkeypatch.setattr(flow, "flwr_exit", lambda **options: None)
    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(flow, name, getattr(flow, name))  # put back afterwards
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.setattr(sys, "argv", ["clientapp", "--insecure", "--runtime-api-address", "127.0.0.1:1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("token\n"))
    before = list(sys.path)
    runner.answer()
    assert [server_messages.reason(answer) for answer in answers] == [runner.OTHER_BUNDLE]
    assert sys.path == before
    assert not (tmp_path / "flower" / "apps").exists()
    assert not (tmp_path / "mark").exists()


class Silent:
    """A heartbeat to nobody."""

    is_running = False

    def __init__(self, beat: object) -> None:
        """Take what Flower gives."""

    def start(self) -> None:
        """Nobody listens."""


def test_nothing_but_the_client_app_is_started() -> None:
    executor = runner.InstalledExecutor()
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    for kind in set(TaskType) - {TaskType.CLIENT_APP}:
        spec = ExecutionSpec(kind, "127.0.0.1:1", "token", True, None, False, 1, False, 1)
        assert executor.launch(spec).status is LaunchResultStatus.FAILED


def test_a_supernode_that_has_given_up_its_connection_ends_so_that_it_is_started_again() -> None:
    """Flower's returns from its work then, but leaves a thread behind that serves on."""
    given_up = "threading.Thread(target=threading.Event().wait).start()"
    script = f"import threading; from client import runner; runner.flower_supernode = lambda: {given_up}; runner.connect()"
    assert subprocess.run([sys.executable, "-c", script], timeout=100, check=False).returncode == 1


def test_a_flower_without_the_functions_is_noticed() -> None:
    with pytest.raises(AttributeError):
        runner._replace(runner, "no_such_function", lambda: None)
