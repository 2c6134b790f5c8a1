"""Programs that are kept running: restarted with patience, and ended with the supervisor however it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from little import ROOT, is_running, waited_until

from fedmix.deployment import supervisor
from fedmix.deployment.environment import flower_environment
from fedmix.deployment.supervisor import Program, Supervisor

PYTHON = Path(sys.executable).name


def program(name: str, code: str, folder: Path) -> Program:
    return Program(name, [PYTHON, "-c", code], os.environ, folder / "logs" / f"{name}.log")


class Watched:
    """A supervisor in a thread, and what it told."""

    def __init__(self, *programs: Program) -> None:
        self.events: list[tuple[str, str]] = []
        self.supervisor = Supervisor(programs, on_event=lambda name, what: self.events.append((name, what)))
        self.thread = threading.Thread(target=self.supervisor.run)

    def until(self, condition: Callable[[], object]) -> None:
        self.thread.start()
        try:
            waited_until(condition, 20.0)
        finally:
            self.supervisor.stop()
            self.thread.join(30.0)
        assert not self.thread.is_alive()

    def told(self, what: str) -> list[str]:
        return [sentence for _, sentence in self.events if what in sentence]


def test_a_program_that_ends_is_started_again_after_pauses_that_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    brief, steady = program("brief", "print('said')", tmp_path), program("steady", "import time; time.sleep(600)", tmp_path)
    watched = Watched(brief, steady)
    watched.until(lambda: len(watched.told("ended with code 0")) == 3)
    assert [what for name, what in watched.events if name == "steady"][1:] == ["stopped"]
    assert brief.log.read_text().count("said") >= 3


def test_what_a_program_started_ends_with_it_so_that_the_next_finds_its_ports_free(tmp_path: Path) -> None:
    child = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    one = program("one", child, tmp_path)
    watched = Watched(one)
    watched.until(lambda: watched.told("ended with code 0"))
    assert not is_running(int(one.log.read_text().split()[0]))


def test_a_program_that_works_for_another_is_started_anew_when_that_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    brief = program("brief", "import time; time.sleep(0.5)", tmp_path)
    child = "import subprocess; subprocess.Popen(['sleep', '600']).wait()"
    helper = dataclasses.replace(program("helper", child, tmp_path), works_for="brief")
    watched = Watched(helper, brief, program("other", child, tmp_path))
    watched.until(lambda: len(watched.told("ended with code 0")) == 2)
    pids = [int(what.split()[-1]) for name, what in watched.events if name == "helper" and "started" in what]
    assert len(pids) >= 2
    assert not any(map(is_running, pids))
    assert len([name for name, what in watched.events if name == "other" and "started" in what]) == 1


def test_a_program_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    one = program("one", deaf, tmp_path)
    watched = Watched(one)
    watched.until(lambda: one.log.exists() and "deaf" in one.log.read_text())
    assert not is_running(int(watched.told("started")[0].split()[-1]))


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 10)
    one = program("one", "import time; print('new', flush=True); time.sleep(600)", tmp_path)
    one.log.parent.mkdir()
    one.log.write_text("old, and long")
    Watched(one).until(lambda: one.log.exists() and "new" in one.log.read_text())
    assert (one.log.parent / "one.log.1").read_text() == "old, and long"


PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from fedmix.deployment.supervisor import Program, Supervisor
one = Program("one", [{python!r}, "-c", "import time; time.sleep(600)"], os.environ, Path({log!r}))
Supervisor([one], on_event=lambda name, what: print(what, flush=True)).run()
print("returned", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_programs_end_with_the_supervisor_however_it_ends(how: signal.Signals, tmp_path: Path) -> None:
    source = PROGRAM.format(root=str(ROOT), python=PYTHON, log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline().split()[-1])
        assert is_running(pid)
        os.kill(run.pid, how)
        rest = run.stdout.read()
    waited_until(lambda: not is_running(pid))
    assert rest == ("" if how == signal.SIGKILL else "stopped\nreturned\n")


def test_flowers_environment_calls_nobody_and_reaches_this_machine_without_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("no_proxy", raising=False)
    given = flower_environment(tmp_path / "flower")
    assert given["FLWR_TELEMETRY_ENABLED"] == "0"
    assert given["FLWR_HOME"] == str(tmp_path / "flower")
    assert given["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert given["no_proxy"] == "127.0.0.1,localhost"
    assert given["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
