"""The coordinator's home folder: where its keys, settings, plans and runs are, and who is registered.

A person sets it up once with ``fedmix server init``; server/README.md says what each file is for.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmix.config.reading import read_yaml
from fedmix.deployment.environment import LOOPBACK
from fedmix.disk import reason_of, write_whole
from fedmix.errors import ConfigError

SITE = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")  # as in data.sites
HOST = r"^([A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?|::1)$"
MAX_KEY_BYTES = 4096

# Environment variables of flower-superexec, for the ServerApps that it starts:
RUNS = "FEDMIX_RUNS"  # the folder of run folders
LEDGER = "FEDMIX_LEDGER"  # the coordinator's ledger

# Files of a run folder beside those that a simulation has:
PLAN = "plan.yaml"  # the plan that its sites approved


class Settings(BaseModel):
    """server.yaml. ``host`` is the name that sites dial; ``listen`` the address of this machine that takes their calls.

    ``control_port`` and ``health_port`` are opened on the loopback address and nowhere else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(pattern=HOST)
    listen: str
    port: int = Field(ge=1, le=65535)
    control_port: int = Field(ge=1, le=65535)
    health_port: int = Field(ge=1, le=65535)

    @property
    def address(self) -> str:
        """What sites dial."""
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def control_address(self) -> str:
        """Where the coordinator's own programs meet."""
        return f"{LOOPBACK}:{self.control_port}"

    @property
    def health_address(self) -> str:
        """Where grpc.health.v1 answers."""
        return f"{LOOPBACK}:{self.health_port}"


@dataclass(frozen=True)
class Home:
    """The folder, and the names within it."""

    folder: Path

    @property
    def ca_certificate(self) -> Path:
        """What sites trust; hand it to them."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """What signs server certificates; it never leaves this machine."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """What the server shows to sites."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The key of the server's certificate."""
        return self.folder / "server.key"

    @property
    def secret(self) -> Path:
        """What flower-superexec shows to the SuperLink."""
        return self.folder / "superexec.secret"

    @property
    def sites(self) -> Path:
        """NAME.pub of every registered site: this folder decides who may connect."""
        return self.folder / "sites"

    @property
    def plans(self) -> Path:
        """DIGEST.yaml as sites approve it, DIGEST.experiment.yaml with this machine's own paths."""
        return self.folder / "plans"

    @property
    def runs(self) -> Path:
        """A run folder for every plan that was run, by its name."""
        return self.folder / "runs"

    @property
    def database(self) -> Path:
        """Flower's own state: nodes, and messages on their way."""
        return self.folder / "state.db"

    @property
    def ledger(self) -> Path:
        """What was sent and what came."""
        return self.folder / "ledger.jsonl"

    @property
    def logs(self) -> Path:
        """What each program says."""
        return self.folder / "logs"

    @property
    def lock(self) -> Path:
        """Held, and holding its process id, while ``fedmix server start`` runs."""
        return self.folder / ".lock"

    def flower(self, program: str) -> Path:
        """FLWR_HOME of one of Flower's programs."""
        return self.folder / "flower" / program

    def settings(self) -> Settings:
        """What server.yaml says. Raises ConfigError where there is none, or it is not one."""
        path = self.folder / "server.yaml"
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            raise ConfigError(
                f"{self.folder} is no coordinator's home; make one with: fedmix server init --host HOST"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {reason_of(error)}") from None
        try:
            return Settings.model_validate(read_yaml(text, str(path)))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None

    def write_settings(self, settings: Settings) -> None:
        """Write server.yaml."""
        (self.folder / "server.yaml").write_text(yaml.safe_dump(settings.model_dump(), sort_keys=False))

    def registered(self) -> dict[str, bytes]:
        """The public key of every registered site, in OpenSSH's form."""
        return {path.stem: public_key(path) for path in sorted(self.sites.glob("*.pub"))}

    def register(self, site: str, key: Path) -> bool:
        """Keep a site's public key; False if it is kept already. Raises ConfigError for an unfit name or key."""
        if not SITE.fullmatch(site):
            raise ConfigError(f"{site!r} is no name of a site; use small letters, digits, - and _, as in data.sites")
        given, registered = public_key(key), self.registered()
        if registered.get(site) == given:
            return False
        if site in registered:
            raise ConfigError(
                f"site {site} is registered with another key; if the site has made a new one, remove "
                f"{self.sites / f'{site}.pub'} and register it again"
            )
        if other := next((name for name, kept in registered.items() if kept == given), None):
            raise ConfigError(f"this is the key of site {other}; every site has a key of its own")
        self.sites.mkdir(exist_ok=True)
        write_whole(self.sites / f"{site}.pub", given + b"\n")
        return True


def public_key(path: Path) -> bytes:
    """A site's public key in OpenSSH's form without its comment. Raises ConfigError unless it is ECDSA over P-384."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 1)
        key = serialization.load_ssh_public_key(content[:MAX_KEY_BYTES])
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {reason_of(error)}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is no public key in OpenSSH's form; a site's is key.pub of its fedmix-site folder") from None
    if len(content) > MAX_KEY_BYTES or not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ConfigError(f"{path} is no ECDSA key over P-384 (ecdsa-sha2-nistp384), which is what sites use; ask for key.pub")
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def is_loopback(host: str) -> bool:
    """Whether a host's name means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
