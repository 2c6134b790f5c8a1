"""The coordinator's machine: setting up its home, and whose process serves it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator

from fedmix.disk import reason_of
from fedmix.errors import ConfigError, RunError
from server import certificates
from server.home import Home, Settings
from server.services import write_services

SECRET_BYTES = 32
AWAY_S = 300.0  # so long may the SuperLink be away before a run over it is given up


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
def held(home: Home) -> Iterator[None]:
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


def bound(host: str, port: int) -> socket.socket:
    """A socket that has a port, and refuses calls until it is told to listen; raises OSError if the port is taken."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; raises OSError if the port is taken."""
    made = bound(host, port)
    made.listen()
    return made
