"""A report as a site stores it -> one line of plain text.

Nothing is rewritten, translated or split into sections here (``sections.py`` does that); what a reader could not see
(control, bidirectional and zero-width characters, terminal escapes) is dropped, because it would reach tokens, logs and
terminals unseen.
"""

from __future__ import annotations

import re
import unicodedata

from fedmix.data.quarantine import RefusedError

MAX_BYTES = 64 * 1024  # of cleaned UTF-8; the longest radiology reports are near 10 KiB, and the model reads some hundred words

_TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# C0 and C1 without the white space among them, soft hyphen, zero width, bidirectional, interlinear, tags, lone surrogates.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


def decode(data: bytes, *, fallback: str | None = None) -> str:
    """Bytes -> text: UTF-8, then the encoding the site declared (cp1252, latin-1); nothing is guessed or replaced."""
    for encoding in ("utf-8-sig", fallback):
        if encoding is None:
            continue
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise RefusedError("text_encoding")


def clean(text: str) -> str:
    """NFC, one line, single spaces, nothing invisible, at most ``MAX_BYTES`` of UTF-8 (the rest is cut off).

    Cleaning twice changes nothing. Raises ``RefusedError`` on NUL: a text that holds it is not text.
    """
    if "\x00" in text:
        raise RefusedError("text_nul")
    visible = _INVISIBLE.sub("", _TERMINAL_ESCAPE.sub("", text))
    line = " ".join(unicodedata.normalize("NFC", visible).split())
    if len(line) * 4 <= MAX_BYTES:  # no character needs more than four bytes
        return line
    return line.encode()[:MAX_BYTES].decode(errors="ignore").rstrip()


def has_words(text: str) -> bool:
    """Whether there is a letter or a digit to learn from."""
    return any(character.isalnum() for character in text)
