"""What a run travels as, and how a hospital tells it from anything else."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

import client.app
import server.deploy
from fedmix.deployment import bundle

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: Mapping[str, bytes], *, lists_them: bool = True) -> bytes:
    """An archive of files, with Flower's list of them."""
    packed, written = io.BytesIO(), dict(files)
    if lists_them:
        lines = [f"{name},{hashlib.sha256(data).hexdigest()},{8 * len(data)}" for name, data in files.items()]
        written[bundle.MANIFEST] = "\n".join(lines).encode()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in written.items():
            archive.writestr(name, data)
    return packed.getvalue()


def test_a_bundle_holds_no_code_and_names_the_installed_apps(tmp_path: Path) -> None:
    folder = bundle.write(tmp_path / "fedmix")
    settings, warnings = load_and_validate(folder / "pyproject.toml")
    assert warnings == []
    assert settings["tool"]["flwr"]["app"]["components"] == {"serverapp": "server.deploy:app", "clientapp": "client.app:app"}
    assert server.deploy.app is not None
    assert client.app.app is not None
    built = build_fab_from_disk(folder)
    assert sorted(members(built)) == [".info/CONTENT", "pyproject.toml"]
    assert bundle.is_ours(built)


def test_a_bundle_with_code_of_its_own_is_told_apart(tmp_path: Path) -> None:
    folder = bundle.write(tmp_path / "fedmix")
    (folder / "fedmix").mkdir()
    (folder / "fedmix" / "__init__.py").write_text("print('not what this hospital installed')")
    built = build_fab_from_disk(folder)
    assert "fedmix/__init__.py" in members(built)  # Flower would put it first on the path
    assert not bundle.is_ours(built)


def test_whatever_else_arrives_is_not_ours(tmp_path: Path) -> None:
    text = (bundle.write(tmp_path / "fedmix") / "pyproject.toml").read_bytes()
    assert bundle.is_ours(zipped({"pyproject.toml": text}))
    others = [
        b"",
        b"PK",
        zipped({}),
        zipped({"pyproject.toml": text}, lists_them=False),
        zipped({"pyproject.toml": text, "client/app.py": b""}),
        zipped({"pyproject.toml": text.replace(b"client.app:app", b"other.app:app")}),
        zipped({"pyproject.toml": text + b"\n[tool.other]\nkey = 1\n"}),
        zipped({"pyproject.toml": b"["}),
        zipped({"pyproject.toml": b"\xff"}),
        zipped({"pyproject.toml": b"#" * (10 << 20) + text}),
        zipped({"pyproject.toml": text, bundle.MANIFEST: b"other"}, lists_them=False),
    ]
    assert [bundle.is_ours(each) for each in others] == [False] * len(others)
    whole = zipped({"pyproject.toml": text})
    assert not any(bundle.is_ours(whole[:size]) for size in range(0, len(whole), 7))
