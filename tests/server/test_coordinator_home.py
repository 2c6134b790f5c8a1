"""A coordinator's home: what it holds, who is registered, what its certificates are good for."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedmix.errors import ConfigError, RunError
from server import certificates, control, coordinator, serving, standing
from server.home import Home, Settings

PORTS = {"port": 9443, "control_port": 9444, "health_port": 9445}


def settings(host: str = "hub.example.org", **changes: object) -> Settings:
    return Settings.model_validate({"host": host, "listen": "127.0.0.1", **PORTS} | changes)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    coordinator.init(made, settings())
    return made


def key(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> Path:
    public = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return written(folder / f"{name}.pub", public)


def written(path: Path, public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> Path:
    content = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.write_bytes(content + b" dr.jones@ward-7\n")
    return path


def test_what_init_writes_is_for_its_owner_alone_and_is_not_replaced(home: Home) -> None:
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    for private in (home.ca_key, home.key, home.secret):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert home.settings() == settings()
    with pytest.raises(ConfigError, match="sites trust its keys"):
        coordinator.init(home, settings("other.example.org"))
    with pytest.raises(ConfigError, match="should differ"):
        coordinator.init(Home(home.folder / "second"), settings(port=9444))


def test_service_files_name_the_ports_and_open_only_one(home: Home) -> None:
    unit = (home.folder / "systemd/fedmix-server.service").read_text()
    assert "127.0.0.1:9443" in unit
    assert f"--home {home.folder}" in unit
    compose = yaml.safe_load((home.folder / "compose.yaml").read_text())
    assert compose["services"]["coordinator"]["ports"] == ["9443:9443"]


@pytest.mark.parametrize(("text", "words"), [("host: [", "is not YAML"), ("host: a b", "host"), ("nonsense: 1", "host|listen")])
def test_settings_that_cannot_be_used_are_named(home: Home, text: str, words: str) -> None:
    (home.folder / "server.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        home.settings()
    with pytest.raises(ConfigError, match="fedmix server init"):
        Home(home.folder / "nowhere").settings()


def test_a_site_is_registered_once_and_without_what_its_key_says_of_a_person(home: Home, tmp_path: Path) -> None:
    north = key(tmp_path, "north")
    assert home.register("north", north)
    assert not home.register("north", north)
    assert b"jones" not in (home.sites / "north.pub").read_bytes()
    with pytest.raises(ConfigError, match="registered with another key"):
        home.register("north", key(tmp_path, "another"))
    with pytest.raises(ConfigError, match="key of site north"):
        home.register("south", north)
    assert list(home.registered()) == ["north"]


@pytest.mark.parametrize("name", ["", "North", "../north", "a" * 41, "no rth", "-x"])
def test_a_site_is_named_as_experiments_name_it(home: Home, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a site"):
        home.register(name, key(tmp_path, "north"))


def test_other_keys_than_ecdsa_over_p384_are_refused(home: Home, tmp_path: Path) -> None:
    for path in (
        key(tmp_path, "p256", ec.SECP256R1()),
        written(tmp_path / "ed.pub", ed25519.Ed25519PrivateKey.generate().public_key()),
    ):
        with pytest.raises(ConfigError, match="no ECDSA key over P-384"):
            home.register("north", path)
    (tmp_path / "text.pub").write_text("-----BEGIN PUBLIC KEY-----")
    with pytest.raises(ConfigError, match="no public key in OpenSSH's form"):
        home.register("north", tmp_path / "text.pub")
    with pytest.raises(ConfigError, match="cannot read the key"):
        home.register("north", tmp_path / "none.pub")
    assert home.registered() == {}


def shaken(home: Home, ca: Path, host: str) -> None:
    """A TLS handshake with the home's certificate as a site makes it; raises ssl.SSLError."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(home.certificate, home.key)
    trusting = ssl.create_default_context(cafile=str(ca))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_site = ssl.MemoryBIO(), ssl.MemoryBIO()
    site = trusting.wrap_bio(to_site, to_server, server_hostname=host)
    server = serving.wrap_bio(to_server, to_site, server_side=True)
    for _ in range(4):
        for end in (site, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert site.version() == "TLSv1.3"


@pytest.mark.parametrize("host", ["hub.example.org", "localhost", "127.0.0.1"])
def test_a_site_trusts_the_server_under_its_names(home: Home, host: str) -> None:
    shaken(home, home.ca_certificate, host)


def test_a_site_refuses_another_name_and_another_authority(home: Home, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shaken(home, home.ca_certificate, "evil.example.org")
    other = Home(tmp_path / "other")
    coordinator.init(other, settings())
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(home, other.ca_certificate, "hub.example.org")


def test_a_certificate_is_renewed_before_it_ends_and_when_the_host_changes(home: Home) -> None:
    now, before = datetime.datetime.now(datetime.UTC), home.certificate.read_bytes()
    assert not certificates.renew(home, "hub.example.org", now=now)
    assert home.certificate.read_bytes() == before
    assert certificates.renew(home, "hub.example.org", now=now + datetime.timedelta(days=certificates.SERVER_DAYS - 20))
    assert certificates.renew(home, "10.1.2.3", now=now)
    shaken(home, home.ca_certificate, "10.1.2.3")
    home.ca_key.write_bytes(home.key.read_bytes())
    with pytest.raises(ConfigError, match="put them back from your copy"):
        certificates.issue(home, "hub.example.org")


def test_a_certificate_that_has_ended_is_the_cause_that_commands_name(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        with control.connected(home) as link:
            link.nodes()

    with pytest.raises(RunError, match=r"does not answer \(ConnectError\)"):
        asked()
    monkeypatch.setattr(certificates, "SERVER_DAYS", -0.5)
    certificates.issue(home, "hub.example.org")
    with pytest.raises(RunError, match=r"server.crt has ended on .* start it again, which issues it anew"):
        asked()


@pytest.mark.parametrize(("days", "is_told"), [(31, False), (29, True)])
def test_a_certificate_that_ends_soon_is_told_with_the_coordinators_standing(days: int, is_told: bool, home: Home) -> None:
    ends = certificates.expires(home.certificate)
    said = standing._ending(ends, ends - datetime.timedelta(days=days))
    assert said.startswith(f"{ends:%Y-%m-%d}")
    assert ("start it again before then" in said) == is_told


def test_a_home_serves_one_coordinator_and_says_which_port_is_taken(tmp_path: Path) -> None:
    taken = coordinator.listening("127.0.0.1", 0)
    port = taken.getsockname()[1]
    home = Home(tmp_path / "home")
    coordinator.init(home, settings(port=port))
    with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        serving.start(home, say=lambda sentence: None)
    taken.close()
    assert coordinator.running(home) is None
    with coordinator.held(home):
        assert coordinator.running(home) is not None
        with pytest.raises(RunError, match=r"runs in .* already"):
            serving.start(home, say=lambda sentence: None)
    with pytest.raises(RunError, match="no coordinator runs"):
        serving.stop(home, say=lambda sentence: None)
