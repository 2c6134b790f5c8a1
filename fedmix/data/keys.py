"""The site key: the secret under which a hospital's identifiers are hashed.

One key a site, for all its shards, so that a patient is the same in each and stands in one split. It is made once, readable
by its owner only, and never lies in a shard. Whoever has it can test guesses of identifiers against a shard; without it
neither fedmix nor the federation can tell whom a hash belongs to.

To rotate it (a copy may have left the site, somebody with access has left it): end the runs, move the old key away, prepare
*every* shard of the site anew with the new one, delete the old shards, then the old key. Splits are drawn anew with it, so
patients who were trained on may be tested on: a model that saw the old shards must not be evaluated on the new ones, and old
and new shards must not be used together. `fedmix shard check` tells shards of different keys apart by a mark that does not
reveal them.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path

from fedmix.errors import DataError

KEY_BYTES = 32


def site_key(path: Path) -> bytes:
    """The site's secret for hashing identifiers: read from ``path``, or made there (32 random bytes, owner only).

    Keep it out of the shard and out of backups that leave the site: with it, identifiers can be guessed and compared.
    """
    if any((folder / "shard.json").exists() for folder in (path.parent, *path.absolute().parents)):
        raise DataError("the site key must not lie in a shard; choose another place")
    if not path.exists():
        _make_key(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != KEY_BYTES:
        raise DataError(f"the site key is not a file of {KEY_BYTES} bytes; restore it, or name a place where none is yet")
    if status.st_mode & 0o077:
        raise DataError("the site key can be read by others; chmod 600 it")
    return path.read_bytes()


def hash_of(key: bytes, purpose: str, value: str) -> str:
    """32 hex digits of a value under the site key, other ones for each purpose."""
    # 128 bits are plenty against chance, and half the bytes.
    return hmac.digest(key, f"{purpose}\0{value}".encode(errors="surrogatepass"), "sha256")[:16].hex()


def mark_of(key: bytes) -> str:
    """16 hex digits that are alike for shards of one key; 256 random bits cannot be guessed back from them."""
    return hmac.digest(key, b"key mark", "sha256")[:8].hex()


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # whole or not at all; whoever comes second reads the first one's
    except FileExistsError:
        pass
    finally:
        draft.unlink()
