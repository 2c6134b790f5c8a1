"""The agent: what it starts, what it is told, and what it says when the coordinator turns it away."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path

import pytest
from little import waited_until

from client import agent, home, runner
from client.home import Home, Settings
from fedmix.errors import ConfigError, RunError


@pytest.fixture
def made(tmp_path: Path) -> Home:
    settings = Settings(name="west", coordinator="link.example:9092", shard=tmp_path / 'a "quoted" shard')
    return home.create(tmp_path / 'st. "mary"', settings, b"certificate")


def test_it_listens_on_loopback_alone_and_dials_with_tls_and_its_key(made: Home) -> None:
    supernode, executor = agent.programs_of(made)
    line = list(supernode.command)
    option = {name: line[line.index(name) + 1] for name in line if name.startswith("--")}
    assert option["--host"] == "127.0.0.1"
    assert option["--superlink"] == "link.example:9092"
    assert (option["--root-certificates"], option["--auth-supernode-private-key"]) == (str(made.ca), str(made.key))
    assert option["--isolation"] == "process"
    assert option["--superexec-auth-secret-file"] == str(made.secret)
    assert "--insecure" not in line
    assert tomllib.loads(Path(option["--node-config"]).read_text()) == {"site": "west", "home": str(made.folder)}
    assert f"127.0.0.1:{option['--port']}" in executor.command
    for program in (supernode, executor):
        assert program.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert program.environment["FLWR_HOME"] == str(made.flower)


def test_two_agents_of_different_homes_take_different_ports(made: Home, tmp_path: Path) -> None:
    other = home.create(tmp_path / "other", made.settings(), b"certificate")
    first, second = agent.programs_of(made)[0].command, agent.programs_of(other)[0].command
    assert first[first.index("--port") + 1] != second[second.index("--port") + 1]


def test_an_agent_without_its_key_does_not_start_and_says_why(made: Home) -> None:
    made.key.unlink()
    with pytest.raises(ConfigError, match="this site's home lacks key, so no agent can start"):
        agent.run(made, print)


def test_one_home_has_one_agent(made: Home) -> None:
    assert not agent.is_running(made)
    assert not (made.folder / "agent.lock").exists()  # who asks may be another user, whose file the agent could not hold
    with agent._alone(made):
        assert agent.is_running(made)
        with pytest.raises(RunError, match="an agent runs on this home already"):
            agent.run(made, print)


def test_what_is_new_in_the_log_is_told_in_words_once(made: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, told = tmp_path / "supernode.log", list[str]()
    monkeypatch.setattr(agent, "LISTEN_S", 0.01)
    log.write_text("SuperNode ID: 1\n")  # of an earlier life
    assert agent.standing(made) is None
    with agent._alone(made) as file:
        telling = agent._Telling(told.append, file, lambda: False)
        assert str(agent.standing(made)) == "runs, and has not heard of the coordinator yet"
        with agent._listening(log, telling.hear):
            for text, number in (("Connection refused\nFailed to activate SuperNode.\n", 1), ("SuperNode ID: 2\n", 2)):
                with log.open("a") as added:
                    added.write(text)
                waited_until(lambda number=number: len(told) == number)
            log.write_text("Sent successfully\n")  # the old one was put aside
            waited_until(lambda: len(told) == 3)
        assert agent.standing(made) == agent.MEANINGS["Sent successfully"]
    assert agent.standing(made) is None
    assert "send it key.pub" in told[0]
    assert told[1:] == ["supernode: connected to the coordinator", "supernode: answered"]
    assert agent.known_words("all is well\n") is None


ENDED = "ERROR :     Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n"
REFUSED = f"{ENDED}[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "


@pytest.mark.parametrize(
    ("log", "said", "mend"),
    [
        (f"{REFUSED}unable to get local issuer certificate (_ssl.c:1006)\n", "not signed by ca.crt", "for its ca.crt"),
        (f"{REFUSED}self-signed certificate in certificate chain\n", "not signed by ca.crt", "breaks TLS open"),
        (f"{REFUSED}Hostname mismatch, certificate is not valid for '127.1'.\n", "not of the name", "dial the name"),
        (f"{REFUSED}certificate has expired (_ssl.c:1006)\n", "has expired", "renews it by a new start"),
        (f"{ENDED}[code: 2004] Failed to activate SuperNode.\n", "does not know this site's key", "send it key.pub and wait"),
        ("INFO :      SuperNode terminated gracefully.\nINFO:     Shutting down\n", "a clock is wrong", "site doctor"),
        ("ERROR:    [Errno 98] error while attempting to bind: address already in use\n", "port in site.yaml", "set it to 0"),
    ],
)
def test_what_flower_writes_is_a_cause_in_words(log: str, said: str, mend: str) -> None:
    """As a SuperNode of flwr 1.41.0 writes it; the cause of a refused certificate is in OpenSSL's words."""
    meaning = agent.MEANINGS[agent.known_words(log) or ""]
    assert said in meaning.said
    assert mend in meaning.mend


def test_a_supernode_that_ends_unasked_was_turned_down(made: Home) -> None:
    """So ends one whose clock is wrong: with code 0 and no other word than when it is asked to."""
    told: list[str] = []
    for is_asked in (True, False):
        with agent._alone(made) as file:
            agent._Telling(told.append, file, lambda asked=is_asked: asked).hear(agent.TURNED_DOWN)
    assert len(told) == 1
    assert told[0].startswith("supernode: the coordinator does not take this site's signature")


def test_a_taken_port_is_said_before_anything_starts(made: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made.settings_file.write_text(made.settings_file.read_text().replace("port: 0", f"port: {port}"))
        with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; set port to 0"):
            agent.run(made, print)
    assert "started" not in made.ledger_file.read_text()


def test_the_programs_are_found_whatever_the_working_folder_holds() -> None:
    assert runner.program("clientapp")[1:] == ["-P", "-m", "client.runner", "clientapp"]
