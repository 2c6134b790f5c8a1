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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from client import runner
from client.home import Home
from client.line import ON_THE_LINE
from fedmix.deployment.environment import LOOPBACK, flower_environment
from fedmix.deployment.supervisor import Program, Supervisor
from fedmix.disk import reason_of
from fedmix.errors import ConfigError, RunError

SUPERNODE, EXECUTOR = "supernode", "executor"
LISTEN_S = 1.0
TURNED_DOWN = "SuperNode terminated gracefully"


@dataclass(frozen=True)
class Meaning:
    """What words of a SuperNode's log mean to the person who watches; ``mend`` where somebody has to act."""

    said: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.said}: {self.mend}" if self.mend else self.said


OTHER_AUTHORITY = Meaning(
    "the coordinator's certificate is not signed by ca.crt",
    "ask the coordinator for its ca.crt, and whether something in between breaks TLS open",
)
OTHER_NAME = Meaning(
    "the coordinator's certificate is not of the name that site.yaml dials",
    "dial the name that it is of, or have the coordinator make one of this name",
)
# Words that Flower, Python and OpenSSL write. Where several stand in one line the last of them counts.
MEANINGS = {
    "SuperNode ID:": Meaning("connected to the coordinator"),
    "Received successfully": Meaning("a message arrived; working on it"),
    "Sent successfully": Meaning("answered"),
    "Connection successful": Meaning("the coordinator answers again"),
    "Failed to receive message": Meaning("the message did not come through; this round goes on without this site"),
    "Failed to send message": Meaning("the answer did not get through in time; this round goes on without it"),
    "Connection attempt failed": Meaning(
        "the coordinator does not answer; trying again, and `fedmix site doctor` says how far a call gets"
    ),
    "Connection refused": Meaning("nobody listens at the coordinator's address; it may be down for a moment"),
    "Name or service not known": Meaning(
        "the coordinator's name is not found", "ask for the right name, or have your DNS or /etc/hosts know it"
    ),
    "Failed to activate SuperNode": Meaning(
        "the coordinator does not know this site's key, or has another agent with it online",
        "send it key.pub and wait; the agent asks again by itself",
    ),
    "CERTIFICATE_VERIFY_FAILED": OTHER_AUTHORITY,
    "unable to get local issuer certificate": OTHER_AUTHORITY,
    "Hostname mismatch": OTHER_NAME,
    "IP address mismatch": OTHER_NAME,
    "certificate has expired": Meaning(
        "the coordinator's certificate has expired, or this machine's clock is ahead",
        "tell the coordinator, which renews it by a new start; the agent asks again by itself",
    ),
    "certificate is not yet valid": Meaning(
        "the coordinator's certificate is not valid yet, so this machine's clock is behind", "set it right: switch on NTP"
    ),
    "address already in use": Meaning(
        "another program has taken the port in site.yaml", "set it to 0 for any that is free, and start the agent again"
    ),
    # All that a SuperNode says whose signature is turned down: it ends as if somebody had asked it to.
    TURNED_DOWN: Meaning(
        "the coordinator does not take this site's signature: a clock is wrong, or the site was taken off",
        "`fedmix site doctor` says which; the agent asks again by itself",
    ),
}


def run(home: Home, say: Callable[[str], None]) -> None:
    """Keep this site's agent running until it is told to stop. ``say`` takes sentences for the person who watches.

    Raises RunError if one runs already or its port is taken, and ConfigError where the home is not whole.
    """
    home.policy()  # what it would refuse at every message it refuses now
    if missing := [path.name for path in (home.key, home.public_key, home.ca, home.secret) if not path.is_file()]:
        raise ConfigError(f"this site's home lacks {', '.join(missing)}, so no agent can start; restore it from your backup")
    with _alone(home) as file:
        _check_free(home.settings().port)
        programs, ledger = programs_of(home), home.ledger()
        supervisor = Supervisor(programs, on_event=lambda name, what: say(f"{name}: {what}"))
        telling = _Telling(say, file, lambda: supervisor.is_stopping)
        ledger.append("started")
        say(f"dialling {home.settings().coordinator} as {home.settings().name}; logs are in {home.logs}")
        with _listening(programs[0].log, telling.hear):
            supervisor.run()
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
        # With a SuperNode goes what it was answering; nothing trains on for nobody while the same round is asked again.
        Program(EXECUTOR, [Path(python).name, *executor], environment, home.logs / f"{EXECUTOR}.log", works_for=SUPERNODE),
    ]


def known_words(text: str) -> str | None:
    """The last words in a text that have a meaning, or tell of the line; none if none has."""
    found = {text.rfind(words): words for words in MEANINGS if words in text}
    if ON_THE_LINE in text:
        newest = text.rfind(ON_THE_LINE)
        found[newest] = text[newest:].partition("\n")[0]
    return found[max(found)] if found else None


def _meaning_of(words: str) -> Meaning:
    """Of known words; those of the line speak for themselves."""
    return MEANINGS.get(words) or Meaning(words.removeprefix(ON_THE_LINE))


class _Telling:
    """Says what the words of a SuperNode mean; the newest stand in a file as well, for whoever asks how the agent stands."""

    def __init__(self, say: Callable[[str], None], file: IO[str], is_stopping: Callable[[], bool]) -> None:
        self._say, self._file, self._is_stopping, self._last = say, file, is_stopping, ""
        file.truncate(0)

    def hear(self, words: str) -> None:
        """Tell known words, unless they are those that were told last, or say of an end that it was asked for."""
        if words == self._last or (words == TURNED_DOWN and self._is_stopping()):
            return
        self._last = words
        self._file.truncate(0)
        self._file.write(words)
        self._file.flush()
        self._say(f"{SUPERNODE}: {_meaning_of(words)}")


@contextlib.contextmanager
def _listening(log: Path, hear: Callable[[str], None]) -> Iterator[None]:
    """Pass on the known words that are new in a log, for as long as this lasts."""
    is_over = threading.Event()
    place = log.stat().st_size if log.exists() else 0
    listener = threading.Thread(target=_listen, args=(log, place, hear, is_over), daemon=True)
    listener.start()
    try:
        yield
    finally:
        is_over.set()
        listener.join()


def _listen(log: Path, place: int, hear: Callable[[str], None], is_over: threading.Event) -> None:
    while not is_over.wait(LISTEN_S):
        with contextlib.suppress(OSError), log.open("rb") as file:
            if log.stat().st_size < place:
                place = 0  # the supervisor has put the old log aside
            file.seek(place)
            text = file.read().decode(errors="replace")
            place = file.tell()
            if words := known_words(text):
                hear(words)


def is_running(home: Home) -> bool:
    """Whether an agent holds this home. Nothing is written: who asks may be another user than the agent's."""
    try:
        with _lock(home).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def standing(home: Home) -> Meaning | None:
    """How the running agent stands with the coordinator, as far as its SuperNode has said; none if no agent runs."""
    if not is_running(home):
        return None
    words = _lock(home).read_text()
    return _meaning_of(words) if words else Meaning("runs, and has not heard of the coordinator yet")


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[IO[str]]:
    """Hold the home: two agents of one site would answer one another's messages."""
    with _lock(home).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError("an agent runs on this home already; stop it first") from None
        yield file


def _lock(home: Home) -> Path:
    """Held while an agent runs; in it, the words by which it stands."""
    return home.folder / "agent.lock"


def _check_free(port: int) -> None:
    """Raises RunError for a port that another program has; 0 means any, and is always free."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError as error:
        raise RunError(
            f"cannot listen on {LOOPBACK}:{port}: {reason_of(error)}; set port to 0 in site.yaml for any that is free"
        ) from None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])
