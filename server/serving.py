"""Keeping the SuperLink and the SuperExec running, letting registered sites in, and ending it all."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedmix.deployment.environment import LOOPBACK, flower_environment
from fedmix.deployment.supervisor import GRACE_S, Program, Supervisor
from fedmix.disk import reason_of
from fedmix.errors import ConfigError, RunError
from server import certificates
from server.control import connected, is_healthy
from server.coordinator import held, listening, running
from server.home import LEDGER, RUNS, Home, Settings

POLL_S = 0.5
START_S = 120.0  # so long may a busy machine take to import Flower

Say = Callable[[str], None]


def start(home: Home, *, say: Say) -> None:
    """Run the SuperLink and the SuperExec until SIGTERM, SIGINT or ``stop``. Raises RunError if they cannot be started."""
    settings = home.settings()
    with held(home):
        for host, port in ((settings.listen, settings.port), (LOOPBACK, settings.control_port)):
            _check_free(host, port)
        _check_free(LOOPBACK, settings.health_port)
        if certificates.renew(home, settings.host, now=datetime.datetime.now(datetime.UTC)):
            say(f"server.crt is new, and good until {certificates.expires(home.certificate):%Y-%m-%d}")
        supervisor = Supervisor(_programs(home, settings), on_event=lambda name, what: say(f"{name}: {what}"))
        threading.Thread(target=_announce, args=(home, say), daemon=True).start()
        supervisor.run()
    say("stopped")


def register_pending(home: Home) -> list[str]:
    """Have the running SuperLink know the registered sites and no others; what was changed, in words."""
    with connected(home) as control:
        return control.synchronise(home.registered())


def stop(home: Home, *, say: Say) -> None:
    """Stop what runs, then the coordinator; runs are taken up later with --resume. Raises RunError if it does not run."""
    pid = running(home)
    if pid is None:
        raise RunError(f"no coordinator runs in {home.folder}")
    with contextlib.suppress(RunError):
        _stop_runs(home, say)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S + 10.0
    while running(home) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"the coordinator, process {pid}, does not end; logs/ in {home.folder} may say why")
        time.sleep(POLL_S)


def _stop_runs(home: Home, say: Say) -> None:
    with connected(home) as control:
        for run in control.runs():
            if not run.is_over:
                control.stop(run.run_id)
                say(f"run {run.name} is stopped; it goes on with --resume")


def _check_free(host: str, port: int) -> None:
    try:
        listening(host, port).close()
    except OSError as error:
        raise RunError(f"cannot listen on {host}:{port}: {reason_of(error)}; set another in server.yaml") from None


def _programs(home: Home, settings: Settings) -> list[Program]:
    """The SuperLink, and the process that starts ServerApps for it: apart, for then the one may be restarted alone."""
    folder = home.folder.absolute()
    at = Home(folder)
    superlink = [Path(sys.executable).name, "-m", "server.superlink", str(folder)]
    superexec = ["flower-superexec", "--runtime-api-address", settings.control_address]
    superexec += ["--root-certificates", str(at.ca_certificate), "--superexec-auth-secret-file", str(at.secret)]
    own = {RUNS: str(at.runs), LEDGER: str(at.ledger)}
    return [
        Program("superlink", superlink, flower_environment(at.flower("superlink")), at.logs / "superlink.log"),
        Program("superexec", superexec, flower_environment(at.flower("superexec")) | own, at.logs / "superexec.log"),
    ]


def _announce(home: Home, say: Say) -> None:
    """Once the SuperLink serves, register who is to be, and say where sites find it.

    Runs that have not ended belong to a coordinator that was killed; their ServerApps ended with it, as all that it started.
    """
    settings, deadline = home.settings(), time.monotonic() + START_S
    while not is_healthy(home):
        if time.monotonic() > deadline:
            say(f"the SuperLink does not serve after {START_S:.0f} s; logs/superlink.log in {home.folder} says why")
            return
        time.sleep(POLL_S)
    try:
        _stop_runs(home, say)
        for change in register_pending(home):
            say(change)
    except (RunError, ConfigError) as error:
        say(str(error))
        return
    say(f"sites connect to {settings.address} (listening on {settings.listen}:{settings.port}) with ca.crt of {home.folder}")
