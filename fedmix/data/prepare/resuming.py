"""What has to be the same for an interrupted preparation to be gone on with; as hashes under the site key, since they are kept.

Settings that change no byte of the shard (workers, the share of bad rows that is borne) are not among it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fedmix.data.keys import hash_of
from fedmix.data.layouts.paths import path_parts
from fedmix.data.layouts.records import Record, Refusal, Source
from fedmix.data.prepare.options import PrepareOptions
from fedmix.data.quarantine import RefusedError

if TYPE_CHECKING:
    from fedmix.data.tokenizer import Tokenizer

_CHANGES_NOTHING = ("max_bad_share", "replace", "fresh")


def mark_of_settings(source: Source, options: PrepareOptions, *, tokenizer: Tokenizer, key: bytes) -> str:
    """Of what holds for all rows: options, tokenizer, key, the table that is joined to the files, the release of fedmix."""
    settings = {
        "release": metadata.version("fedmix"),
        "options": {name: value for name, value in asdict(options).items() if name not in _CHANGES_NOTHING},
        "tokenizer": tokenizer.fingerprint,
        "labels": source.label_names,
        "frontal_only": source.frontal_only,
        "encoding": source.fallback_encoding,
        "joined": None if source.joined is None else _digest(source.joined),
    }
    return hash_of(key, "settings", json.dumps(settings, sort_keys=True))


def mark_of_row(source: Source, row: Record | Refusal, key: bytes) -> str:
    """Of one row as its reader hands it on, and of size and time of the files it names."""
    if isinstance(row, Refusal):
        return hash_of(key, "row", repr(row))
    files = [_state(source.root, picture.places) for picture in row.pictures]
    if row.report is not None:
        files.append(_state(source.reports_root or source.root, row.report.places))
    return hash_of(key, "row", repr((row, files)))


def _state(root: Path, places: Sequence[str]) -> tuple[int, int] | None:
    """Bytes and time of change of the first that is there; nothing is opened."""
    for place in places:
        try:
            status = os.stat(root.joinpath(*path_parts(place)))
        except (RefusedError, OSError):
            continue
        return status.st_size, status.st_mtime_ns
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
