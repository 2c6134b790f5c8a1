"""Systemd units: what systemd itself says of them, and that an odd folder's name stays one word."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from client import home as sites
from fedmix.deployment.units import write_unit
from server import coordinator
from server.home import Home, Settings

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def site(folder: Path) -> Path:
    made = sites.create(folder, sites.settings_of("west", "hub.example.org:9443", Path("/data/shard"), 0), b"certificate")
    return made.folder / "systemd/fedmix-site-west.service"


def server(folder: Path) -> Path:
    settings = Settings(host="hub.example.org", listen="0.0.0.0", port=9443, control_port=9444, health_port=9445)
    coordinator.init(Home(folder), settings)
    return folder / "systemd/fedmix-server.service"


def service(unit: Path) -> dict[str, str]:
    """What a unit says of its service; read literally."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys as they are written
    parser.read_string(unit.read_text())
    return dict(parser["Service"])


@needs_systemd
@pytest.mark.parametrize("made", [site, server])
def test_systemd_understands_every_line_and_finds_little_exposed(made: object, tmp_path: Path) -> None:
    unit = made(tmp_path / "a home")  # type: ignore[operator]
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=yes", "--threshold=40", unit]  # of 100, which is a service without walls
    exposed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert exposed.returncode == 0, exposed.stdout


def test_a_sites_unit_writes_its_home_alone_and_becomes_nobody_else(tmp_path: Path) -> None:
    unit = site(tmp_path / "home")
    said = service(unit)
    assert said["ReadWritePaths"] == str(tmp_path / "home")
    assert said["User"] == "fedmix"
    assert said["ExecStart"].endswith(f"fedmix site start --home {tmp_path / 'home'}")
    walls = {"ProtectSystem": "strict", "PrivateTmp": "yes", "NoNewPrivileges": "yes", "CapabilityBoundingSet": ""}
    assert {name: said[name] for name in walls} == walls
    assert "It dials hub.example.org:9443" in unit.read_text()


@pytest.mark.parametrize("name", ["St. Mary's ward", 'a "home"', "100%", "$HOME", "back\\slash", "Zürich"])
def test_a_folder_of_any_name_is_one_word(name: str, tmp_path: Path) -> None:
    home = tmp_path / name
    home.mkdir()
    said = service(write_unit(home, "fedmix-some", role="some", notes=["A note."], words=["site", "start"]))
    words = shlex.split(said["ExecStart"].replace("$$", "$").replace("%%", "%"))
    assert words[1:] == ["site", "start", "--home", str(home)]
    assert shlex.split(said["ReadWritePaths"].replace("%%", "%")) == [str(home)]
