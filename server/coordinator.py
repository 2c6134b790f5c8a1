"""The coordinator's machine: setting up its home, keeping the SuperLink and the SuperExec running, and ending them."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedmix.deployment.environment import LOOPBACK, flower_environment
from fedmix.deployment.supervisor import GRACE_S, Program, Supervisor
from fedmix.disk import reason_of
from fedmix.errors import ConfigError, RunError
from server import certificates, deploy
from server.control import connected, is_healthy
from server.home import Home, Settings
from server.services import write_services
from server.superlink import listening

SECRET_BYTES = 32
POLL_S = 0.5
START_S = 120.0  # so long may a busy machine take to import Flower

Say = Callable[[str], None]


def init(home: Home, settings: Settings) -> None:
    """Make a coordinator's home: authority, certificate, settings, service files. Raises ConfigError if there is one."""
    if (home.folder / "server.yaml").exists() or home.ca_key.exists():
        raise ConfigError(f"{home.folder} is a coordinator's home already; sites trust its keys, so they are not replaced")
    ports = (settings.port, settings.control_port, settings.health_port)
    if len(set(ports)) < len(ports):
        raise ConfigError(f"the ports {', '.join(map(str, ports))} should differ; set --port, --control-port, --health-port")
    try:
        home.folder.mkdir(parents=True, exist_ok=True)
        home.folder.chmod(0o700)
        for folder in (home.sites, home.plans, home.runs, home.logs):
            folder.mkdir(exist_ok=True)
        certificates.make_authority(home, settings.host)
        certificates.issue(home, settings.host)
        certificates.write_private(home.secret, secrets.token_bytes(SECRET_BYTES))
        write_services(home, settings)
        home.write_settings(settings)  # last: a folder with settings is a home
    except OSError as error:
        raise ConfigError(f"cannot write {home.folder}: {reason_of(error)}") from None


def start(home: Home, *, say: Say) -> None:
    """Run the SuperLink and the SuperExec until SIGTERM, SIGINT or ``stop``. Raises RunError if they cannot be started."""
    settings = home.settings()
    with _held(home):
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
    with contextlib.suppress(RunError), connected(home) as control:
        for run in control.runs():
            if not run.is_over:
                control.stop(run.run_id)
                say(f"run {run.name} is stopped; it goes on with --resume")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S + 10.0
    while running(home) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"the coordinator, process {pid}, does not end; logs/ in {home.folder} may say why")
        time.sleep(POLL_S)


def running(home: Home) -> int | None:
    """The process id of the coordinator that runs in this home, or None."""
    try:
        with home.lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return int(file.read() or 0) or None
    except (FileNotFoundError, ValueError):
        pass
    return None


@contextlib.contextmanager
def _held(home: Home) -> Iterator[None]:
    """Keep the home to this process; the kernel lets go of it however the process ends."""
    with open(os.open(home.lock, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(f"a coordinator runs in {home.folder} already; end it with: fedmix server stop") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


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
    own = {deploy.RUNS: str(at.runs), deploy.LEDGER: str(at.ledger)}
    return [
        Program("superlink", superlink, flower_environment(at.flower("superlink")), at.logs / "superlink.log"),
        Program("superexec", superexec, flower_environment(at.flower("superexec")) | own, at.logs / "superexec.log"),
    ]


def _announce(home: Home, say: Say) -> None:
    """Once the SuperLink serves, register who is to be, and say where sites find it."""
    settings, deadline = home.settings(), time.monotonic() + START_S
    while not is_healthy(home):
        if time.monotonic() > deadline:
            say(f"the SuperLink does not serve after {START_S:.0f} s; logs/superlink.log in {home.folder} says why")
            return
        time.sleep(POLL_S)
    try:
        for change in register_pending(home):
            say(change)
    except (RunError, ConfigError) as error:
        say(str(error))
        return
    say(f"sites connect to {settings.address} (listening on {settings.listen}:{settings.port}) with ca.crt of {home.folder}")
