"""The agent: a SuperNode that dials the coordinator, and the program that answers its messages, both kept running.

It opens no port but one of the loopback interface, between its own two programs, which know each other by a secret of this
home. What ends is started again, so an agent that is not registered yet, or whose coordinator is away, waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from client import runner
from client.home import Home
from client.line import ON_THE_LINE
from fedmix.deployment.environment import LOOPBACK, flower_environment
from fedmix.deployment.supervisor import Program, Supervisor
from fedmix.errors import RunError

SUPERNODE, EXECUTOR = "supernode", "executor"
LISTEN_S = 1.0

# What a SuperNode's log says, and what that means for the person who watches.
MEANINGS = {
    "SuperNode ID:": "connected to the coordinator",
    "Connection attempt failed": "the coordinator does not answer; trying again",
    "Connection successful": "the coordinator answers again",
    "Received successfully": "a message arrived; working on it",
    "Sent successfully": "answered",
    "Failed to receive message": "the message did not come through; this round goes on without this site",
    "Failed to send message": "the answer did not get through in time; this round goes on without it",
    "Invalid SuperNode authentication": (
        "the coordinator does not take this site's signature: this machine's clock may be wrong, see `fedmix site doctor`"
    ),
    "Failed to activate SuperNode": (
        "the coordinator does not know this site's key yet, or has another agent with it online; send it key.pub and wait"
    ),
    "CERTIFICATE_VERIFY_FAILED": "the coordinator's certificate does not fit ca.crt, see `fedmix site doctor`",
    "Connection refused": "nobody listens at the coordinator's address; it may be down for a moment",
    "Name or service not known": "the coordinator's name is not found, see `fedmix site doctor`",
    "address already in use": "the port in site.yaml is taken; set it to 0 for any that is free",
}


def run(home: Home, say: Callable[[str], None]) -> None:
    """Keep this site's agent running until it is told to stop. ``say`` takes sentences for the person who watches.

    Raises RunError if one runs already, and ConfigError where the home is not whole.
    """
    home.policy()  # what it would refuse at every message it refuses now
    with _alone(home):
        programs, ledger = programs_of(home), home.ledger()
        ledger.append("started")
        say(f"dialling {home.settings().coordinator} as {home.settings().name}; logs are in {home.logs}")
        with _listening(programs[0].log, lambda what: say(f"{SUPERNODE}: {what}")):
            Supervisor(programs, on_event=lambda name, what: say(f"{name}: {what}")).run()
        ledger.append("stopped")


def programs_of(home: Home) -> list[Program]:
    """The agent's two programs."""
    settings = home.settings()
    port = settings.port or _free_port()
    node_config = home.flower / "node.toml"
    home.flower.mkdir(parents=True, exist_ok=True)
    # By a file: on a command line Flower takes no path with a quote in it. TOML's strings are JSON's.
    values = {"site": settings.name, "home": str(home.folder.absolute())}
    node_config.write_text("".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()))
    environment = flower_environment(home.flower)
    own = ["--superexec-auth-secret-file", str(home.secret)]
    python, *supernode = runner.program("flower-supernode")
    supernode += ["--superlink", settings.coordinator, "--root-certificates", str(home.ca)]
    supernode += ["--auth-supernode-private-key", str(home.key), "--node-config", str(node_config)]
    supernode += ["--host", LOOPBACK, "--port", str(port), "--isolation", "process", *own]
    executor = runner.program("execute")[1:]
    executor += ["--insecure", "--runtime-api-address", f"{LOOPBACK}:{port}", *own]
    return [
        Program(SUPERNODE, [Path(python).name, *supernode], environment, home.logs / f"{SUPERNODE}.log"),
        Program(EXECUTOR, [Path(python).name, *executor], environment, home.logs / f"{EXECUTOR}.log"),
    ]


def meaning_of(text: str) -> str | None:
    """What the newest line that is known in a piece of a SuperNode's log means; none if none is known."""
    found = {text.rfind(said): meaning for said, meaning in MEANINGS.items() if said in text}
    if ON_THE_LINE in text:
        newest = text.rfind(ON_THE_LINE)
        found[newest] = text[newest + len(ON_THE_LINE) :].partition("\n")[0]
    return found[max(found)] if found else None


@contextlib.contextmanager
def _listening(log: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Tell in words what is new in a log, for as long as this lasts."""
    is_over = threading.Event()
    place = log.stat().st_size if log.exists() else 0
    listener = threading.Thread(target=_listen, args=(log, place, say, is_over), daemon=True)
    listener.start()
    try:
        yield
    finally:
        is_over.set()
        listener.join()


def _listen(log: Path, place: int, say: Callable[[str], None], is_over: threading.Event) -> None:
    last = None
    while not is_over.wait(LISTEN_S):
        with contextlib.suppress(OSError), log.open("rb") as file:
            if log.stat().st_size < place:
                place = 0  # the supervisor has put the old log aside
            file.seek(place)
            text = file.read().decode(errors="replace")
            place = file.tell()
            if (meaning := meaning_of(text)) not in (None, last):
                say(str(meaning))
                last = meaning


def is_running(home: Home) -> bool:
    """Whether an agent holds this home."""
    try:
        with _alone(home):
            return False
    except RunError:
        return True


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Hold the home: two agents of one site would answer one another's messages."""
    with (home.folder / "agent.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError("an agent runs on this home already; stop it first") from None
        yield


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])
