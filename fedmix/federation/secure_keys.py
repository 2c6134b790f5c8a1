"""What sites say of their keys before a secure sum, and how another site knows that it is their word.

A site makes fresh keys for every attempt at a round: one for the letters that it exchanges with other sites, one for the masks
of each of its towers. It signs them, and what they are for, with the key that it registered (ECDSA P-384, client/home.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmix.errors import UpdateError
from fedmix.federation.update import REACHED_BY, typed

CURVE = ec.SECP384R1()
SCALAR_BYTES = 48
HASH = re.compile(r"[0-9a-f]{64}")
POINT = re.compile(r"0[23][0-9a-f]{96}")  # a compressed point of P-384
MAX_STATEMENT_BYTES = 4096
KEYS, ROSTER = b"fedmix secure sum keys\0", b"fedmix secure sum roster\0"  # what a signature is for
MASKS = b"fedmix secure sum masks"


@dataclass(frozen=True)
class Statement:
    """A site's keys in one attempt at a round, in hexadecimal digits, and what its weight counts.

    ``letters``: public key that others encrypt to; ``masks`` and ``seeds``: by tower, the public key of the masks that it
    shares and the commitment to the seed of its own.
    """

    run: str
    round_number: int
    attempt: str
    site: str
    studies: int
    letters: str
    masks: Mapping[str, str]
    seeds: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """The only form in which it is signed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def read(cls, content: bytes) -> Statement:
        """A statement that was received. Raises UpdateError unless it is one, in the only form that it has."""
        try:
            values = json.loads(content) if len(content) <= MAX_STATEMENT_BYTES else None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or values.keys() != cls.__annotations__.keys():
            raise UpdateError("a site's keys are not in the form that this version understands")
        text = {name: typed(values, name, str) for name in ("run", "attempt", "site", "letters")}
        counts = {name: typed(values, name, int) for name in ("round_number", "studies")}
        made = cls(**text, **counts, masks=typed(values, "masks", dict), seeds=typed(values, "seeds", dict))  # type: ignore[arg-type]
        made._check()
        if made.to_bytes() != content:
            raise UpdateError("a site's keys are not in the form that this version understands")
        return made

    def _check(self) -> None:
        points = [self.letters, *self.masks.values()]
        is_fit = (
            self.studies > 0
            and self.masks.keys() == self.seeds.keys()
            and self.masks.keys() <= REACHED_BY.keys()
            and all(isinstance(point, str) and POINT.fullmatch(point) for point in points)
            and all(isinstance(seed, str) and HASH.fullmatch(seed) for seed in self.seeds.values())
            and len(set(points)) == len(points)
        )
        if not is_fit:
            raise UpdateError("a site's keys are of other sizes than keys have")


@dataclass(frozen=True)
class Signed:
    """A statement's bytes, the signature over them, and the public key, in OpenSSH's form, that it is said to be of."""

    content: bytes
    signature: bytes
    signer: str

    def opened(self, *, run: str, round_number: int, attempt: str) -> Statement:
        """The statement, once its signature and what it is for are found right. Raises UpdateError otherwise."""
        statement = Statement.read(self.content)
        verify(self.signer, self.signature, KEYS, self.content)
        if (statement.run, statement.round_number, statement.attempt) != (run, round_number, attempt):
            raise UpdateError("a site's keys were made for another round, or for another attempt at it")
        return statement


def roster_digest(statements: Collection[Statement], sites: Collection[str]) -> bytes:
    """What a site signs with its upload: whose masks are in it, by their statements. All must have meant the same."""
    total = hashlib.sha256()
    for one in sorted((one for one in statements if one.site in sites), key=lambda one: one.site):
        total.update(hashlib.sha256(one.to_bytes()).digest())
    return total.digest()


# ---- keys


def public_point(key: ec.EllipticCurvePrivateKey) -> str:
    """A key's public half in hexadecimal digits."""
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint).hex()


def public_key(point: str) -> ec.EllipticCurvePublicKey:
    """A received public half. Raises UpdateError where it is no point of the curve."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(CURVE, bytes.fromhex(point))
    except ValueError:
        raise UpdateError("a site's key is no point of its curve") from None


def scalar(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A key's private half."""
    return key.private_numbers().private_value.to_bytes(SCALAR_BYTES, "big")


def private_key(content: bytes) -> ec.EllipticCurvePrivateKey:
    """The key of a private half. Raises UpdateError where there is none."""
    try:
        return ec.derive_private_key(int.from_bytes(content, "big"), CURVE)
    except ValueError:
        raise UpdateError("the shares of a site's key do not make a key") from None


def shared_seed(key: ec.EllipticCurvePrivateKey, point: str) -> bytes:
    """The seed of the masks that two sites share: one's private and the other's public half give the same, either way."""
    derived = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=MASKS)
    return derived.derive(key.exchange(ec.ECDH(), public_key(point)))


# ---- signatures


def sign(key: ec.EllipticCurvePrivateKey, purpose: bytes, content: bytes) -> bytes:
    """A signature that is good for one purpose."""
    return key.sign(purpose + content, ec.ECDSA(hashes.SHA384()))


def verify(signer: str, signature: bytes, purpose: bytes, content: bytes) -> None:
    """Raise UpdateError unless a public key in OpenSSH's form has signed this content for this purpose."""
    try:
        key = serialization.load_ssh_public_key(signer.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise UpdateError("a site's keys are signed with another kind of key than sites have")
        key.verify(signature, purpose + content, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        raise UpdateError("a site's signature is not that of its key") from None


def signer_of(key: ec.EllipticCurvePrivateKey) -> str:
    """A key's public half in OpenSSH's form, as it is registered."""
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
