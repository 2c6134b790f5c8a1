"""What a site keeps of its secure sums: the secrets of the attempt that goes on, and of what it has helped to unmask.

The secrets are readable by their owner alone and are gone with the attempt. What was unmasked outlives the run, for a site
trains to the same change whenever it is given the same parameters: see ``client/secure.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, ValidationError

from fedmix.disk import reason_of, write_whole
from fedmix.errors import RunError
from fedmix.federation import secure_keys
from fedmix.federation.secure_keys import Statement
from fedmix.federation.update import Tower

# In a site's state folder; no run's folder there can have a name with a dot.
ATTEMPT, UNMASKED, IDENTITY = "secure_sum.json", "secure_sums.json", "identity.key"

Shares = dict[Tower, tuple[str, str]]  # of a site's seed and of its key, in hexadecimal digits
Kept = TypeVar("Kept", bound=BaseModel)


class Attempt(BaseModel):
    """An attempt at a round's sum as this site keeps it; keys, seeds and shares are in hexadecimal digits.

    ``roster``: statements by site, and ``signers`` their keys; ``sites``: those whose masks are in the upload. ``shares``: what
    each site, this one too, gave to this one to keep. ``base``: the parameters that the upload was trained from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round_number: int
    attempt: str
    phase: Literal["keys", "shares", "masked"]
    letters: str
    masks: dict[Tower, str]
    seeds: dict[Tower, str]
    roster: dict[str, str]
    signers: dict[str, str] = {}
    sites: tuple[str, ...] = ()
    shares: dict[str, Shares] = {}
    base: str = ""

    def statement(self, site: str) -> Statement:
        """A site's keys."""
        return Statement.read(self.roster[site].encode())


class Unmasked(BaseModel):
    """By the parameters that a round began with, a hash of which sum this site has helped to unmask."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sums: dict[str, str] = {}


class SecureState:
    """The files of one site's secure sums."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._attempt = folder, folder / run / ATTEMPT

    def attempt(self) -> Attempt | None:
        """The attempt that goes on in this run, if one does."""
        return _read(self._attempt, Attempt)

    def keep(self, attempt: Attempt) -> None:
        """Write an attempt down in the place of the one before it."""
        _write(self._attempt, attempt)

    def unmasked(self, base: str) -> str | None:
        """Which sum from these parameters this site has helped to unmask, in whatever run."""
        kept = _read(self._folder / UNMASKED, Unmasked)
        return kept.sums.get(base) if kept else None

    def finish(self, base: str, meaning: str | None) -> None:
        """Write down what is about to be unmasked, if anything is, and forget the attempt's secrets."""
        kept = _read(self._folder / UNMASKED, Unmasked) or Unmasked()
        if meaning is not None:
            _write(self._folder / UNMASKED, Unmasked(sums=kept.sums | {base: meaning}))
        try:
            self._attempt.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"this site's state cannot be kept: {reason_of(error)}; see to its state folder") from None


def signing_key(registered: Path | None, state: Path) -> ec.EllipticCurvePrivateKey:
    """The key that a site signs with: the registered one, or one that a simulated place makes when it is first asked for."""
    path = registered or state / IDENTITY
    try:
        if registered is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = ec.generate_private_key(secure_keys.CURVE)
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
            write_whole(path, made.private_bytes(*form), mode=0o600)
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise RunError(f"this site's key cannot be read ({type(error).__name__}); see to its home") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError("this site's key is of another kind than `fedmix site init` makes; see to its home")
    return key


def _read(path: Path, kind: type[Kept]) -> Kept | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunError(f"what this site keeps of its secure sums cannot be read ({type(error).__name__})") from None


def _write(path: Path, kept: BaseModel) -> None:
    """Write a file readable by its owner alone, there whole or not at all, even if the power fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, kept.model_dump_json(), mode=0o600)
    except OSError as error:
        raise RunError(f"this site's state cannot be kept: {reason_of(error)}; see to its state folder") from None
