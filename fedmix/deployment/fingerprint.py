"""What two people compare over the telephone, so that a key is the one that was meant."""

from __future__ import annotations

import hashlib


def fingerprint(public_key: str) -> str:
    """SHA-256 of an OpenSSH public key, in hexadecimal digits; its comment does not count."""
    return hashlib.sha256(public_key.split()[1].encode()).hexdigest()
