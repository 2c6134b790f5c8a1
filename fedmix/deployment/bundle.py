"""The bundle of files that a run travels as through Flower: one pyproject.toml that names the apps, and no code.

Flower puts a bundle first on ``sys.path`` at the server and at every site, so what it carried would stand before the
installed package, and a hospital would run what was sent to it instead of what it installed. With this bundle every machine
runs its own fedmix, and a hospital can tell any other bundle from it.
"""

from __future__ import annotations

import hashlib
import io
import tomllib
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

PYPROJECT, MANIFEST = "pyproject.toml", ".info/CONTENT"
MAX_FILE_BYTES = 1 << 16

TEXT = """\
[project]
name = "fedmix"
version = "{version}"
description = "Names the ServerApp and ClientApp of the installed fedmix."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmix"

[tool.flwr.app.components]
serverapp = "server.deploy:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run = ""
"""


def write(folder: Path) -> Path:
    """A folder that ``flwr run`` and ``flwr build`` take."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PYPROJECT).write_text(_text())
    return folder


def is_ours(content: bytes) -> bool:
    """Whether a bundle as it arrived (a ZIP archive) holds what ``write`` wrote in this version, and nothing else.

    Flower writes the TOML anew, so its values are compared; its list of the files has to be the list of just that one.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sorted(archive.namelist()) != [MANIFEST, PYPROJECT]:
                return False
            written, listed = _read(archive, PYPROJECT), _read(archive, MANIFEST)
        values: dict[str, Any] = tomllib.loads(written.decode())
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, OSError, zlib.error):
        return False
    manifest = f"{PYPROJECT},{hashlib.sha256(written).hexdigest()},{8 * len(written)}"
    return values == tomllib.loads(_text()) and listed.decode(errors="replace") == manifest


def _text() -> str:
    return TEXT.format(version=metadata.version("fedmix"))


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of a bundle, without unfolding a bomb."""
    with archive.open(name) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(name)
    return content
