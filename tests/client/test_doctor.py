"""What the doctor finds, against a coordinator's certificate and clock that are really served."""

from __future__ import annotations

import email.utils
import http.server
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from little import World, values

import server.home
from client import agent, doctor, home
from client.doctor import Finding
from client.home import Home, Settings
from server import certificates


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, values(tmp_path))


class Hub:
    """A coordinator's certificates, made for one host."""

    def __init__(self, folder: Path, host: str = "localhost") -> None:
        folder.mkdir()
        self.home = server.home.Home(folder)
        certificates.make_authority(self.home, host)
        certificates.issue(self.home, host)

    @contextmanager
    def serving(self, *, clock_ahead_s: float = 0.0) -> Iterator[int]:
        """Serve HTTPS on a free port of the loopback interface, and give the port."""

        class Answer(http.server.BaseHTTPRequestHandler):
            def date_time_string(self, timestamp: float | None = None) -> str:
                return email.utils.formatdate(time.time() + clock_ahead_s, usegmt=True)

            def do_HEAD(self) -> None:  # the library's name
                self.send_error(404)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.home.certificate, self.home.key)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as served:
            served.handle_error = lambda request, address: None  # type: ignore[method-assign]  # a handshake that was refused
            served.socket = context.wrap_socket(served.socket, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield served.server_address[1]
            finally:
                served.shutdown()
                thread.join()


def west(folder: Path, world: World, hub: Hub, port: int, host: str = "localhost") -> Home:
    settings = Settings(name="west", coordinator=f"{host}:{port}", shard=world.shards["west"].absolute())
    made = home.create(folder / "west", settings, hub.home.ca_certificate.read_bytes())
    made.policy_file.write_text("min_studies: 5\n")
    return made


def found(made: Home) -> dict[str, Finding]:
    return {finding.what: finding for finding in doctor.examine(made)}


def bad(made: Home) -> dict[str, Finding]:
    """What is to be mended, but for what a small machine lacks."""
    return {what: one for what, one in found(made).items() if not one.is_fine and what not in ("disk", "memory")}


def test_a_site_that_can_take_part_has_nothing_to_mend(tmp_path: Path, world: World) -> None:
    hub = Hub(tmp_path / "hub")
    with hub.serving() as port:
        made = west(tmp_path, world, hub, port)
        findings = found(made)
        assert bad(made) == {}
    assert {"settings", "policy", "ledger", "key", "shard", "proxy", "connection", "certificate", "clock"} <= set(findings)
    assert "24 paired studies" in findings["shard"].said


def test_certificates_that_are_not_taken_are_told_apart(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, other = Hub(tmp_path / "hub"), Hub(tmp_path / "other")
    with hub.serving() as port:
        made = west(tmp_path, world, other, port)
        assert bad(made)["certificate"].said == "unable to get local issuer certificate"
        assert "ask the coordinator for its ca.crt" in bad(made)["certificate"].mend
        made.ca.write_text("nothing")
        assert "ca.crt is no certificate" in bad(made)["certificate"].said
        made = west(tmp_path / "named", world, hub, port, host="127.1")  # the same address under a name it is not known by
        assert "Hostname mismatch, certificate is not valid for '127.1'" in bad(made)["certificate"].said
        assert "dial the name that it is of" in bad(made)["certificate"].mend
    for days, cause in ((20.0, "tell the coordinator to renew it soon"), (-0.5, "certificate has expired")):
        monkeypatch.setattr(certificates, "SERVER_DAYS", days)
        certificates.issue(hub.home, "localhost")
        with hub.serving() as port:
            finding = found(west(tmp_path / str(days), world, hub, port))["certificate"]
        assert cause in finding.said
        assert finding.is_fine == (days > 0.0)
    assert "the coordinator, which renews it by a new start" in finding.mend
    assert "ca.crt" in doctor._meaning(ssl.SSLCertVerificationError("a cause that nobody knows")).mend


@pytest.mark.parametrize(("ahead", "word"), [(60.0, "behind"), (-60.0, None), (-400.0, "ahead")])
def test_a_coordinator_of_another_time_is_found(ahead: float, word: str | None, tmp_path: Path, world: World) -> None:
    hub = Hub(tmp_path / "hub")
    with hub.serving(clock_ahead_s=ahead) as port:
        finding = found(west(tmp_path, world, hub, port))["clock"]
    assert f"{abs(ahead):.0f} s" in finding.said or f"{abs(ahead) - 1:.0f} s" in finding.said
    assert word is None or word in finding.said


def at(ahead: float) -> tuple[float, str]:
    """A time of this machine so far ahead of a coordinator's header."""
    now = 1_800_000_000.0
    return now + 0.5 + ahead, email.utils.formatdate(now, usegmt=True)


def test_the_clock_that_is_wrong_is_named() -> None:
    for ahead, is_fine in ((0.0, True), (3.0, True), (10.0, False), (-120.0, True), (-290.0, True), (-400.0, False)):
        assert doctor.clock(*at(ahead), is_kept=True).is_fine is is_fine, ahead
    ours, theirs = doctor.clock(*at(10.0), is_kept=False), doctor.clock(*at(10.0), is_kept=True)
    assert ours.said.startswith("10 s ahead of the coordinator's")
    assert "it is probably the wrong one: switch on NTP" in ours.mend
    assert "the coordinator's is probably the wrong one" in theirs.mend
    assert not doctor.clock(0.0, None).is_fine
    assert isinstance(doctor._is_kept(), bool)


def test_what_is_wrong_on_this_machine_is_said_with_what_mends_it(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    made = west(tmp_path, world, hub, 1)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    made.key.chmod(0o644)
    made.policy_file.write_text("min_studies: 1000\n")
    made.ledger_file.write_bytes(made.ledger_file.read_bytes()[:-3])
    (made.plans / f"{'a' * 64}.yaml").write_text("name: demo")
    wrong = bad(made)
    assert set(wrong) == {"key", "ledger", "shard", f"plan {'a' * 12}", "proxy", "connection"}
    assert wrong["key"].mend.startswith("chmod 600")
    assert "add localhost to NO_PROXY" in wrong["proxy"].mend
    assert "in your firewall" in wrong["connection"].mend
    assert "the policy asks for 1000" in wrong["shard"].mend
    made.policy_file.write_text("a: [")
    assert "until then nothing leaves" in bad(made)["policy"].mend
    assert all(one.mend for one in bad(made).values())


def test_a_name_that_nobody_knows_and_a_missing_home_file_end_the_search(tmp_path: Path, world: World) -> None:
    made = west(tmp_path, world, Hub(tmp_path / "hub"), 1, host="nowhere.invalid")
    wrong = bad(made)
    assert wrong["name"].said == "nowhere.invalid is not found"
    assert "connection" not in found(made)
    made.settings_file.unlink()
    assert "shard" not in found(made)


def test_a_taken_port_is_found_unless_the_agent_has_it(tmp_path: Path, world: World) -> None:
    hub = Hub(tmp_path / "hub")
    with hub.serving() as port:
        made = west(tmp_path, world, hub, port)
        made.settings_file.write_text(made.settings_file.read_text().replace("port: 0", f"port: {port}"))
        assert "set port to 0" in bad(made)["port"].mend
        with agent._alone(made):
            assert found(made)["port"].is_fine


def test_what_a_running_agent_was_told_is_a_finding(tmp_path: Path, world: World) -> None:
    hub = Hub(tmp_path / "hub")
    with hub.serving() as port:
        made = west(tmp_path, world, hub, port)
        assert found(made)["agent"].said == "does not run; `fedmix site start` starts it"
        with agent._alone(made) as file:
            telling = agent._Telling(lambda sentence: None, file, lambda: False)
            telling.hear("Failed to activate SuperNode")
            assert "send it key.pub and wait" in bad(made)["agent"].mend
            telling.hear("SuperNode ID:")
            assert bad(made) == {}
            assert found(made)["agent"].said == "connected to the coordinator"
