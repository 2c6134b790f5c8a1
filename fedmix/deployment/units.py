"""A systemd unit for a program of fedmix that writes below its home and nowhere else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

UNIT = """\
# Starts the {role} with the machine, and again when it ends. As root:
#   useradd --system fedmix; chown -R fedmix {folder}
#   install -m 644 {source} /etc/systemd/system/
#   systemctl daemon-reload && systemctl enable --now {name}
[Unit]
Description=fedmix {role}
Wants=network-online.target
After=network-online.target

[Service]
{notes}
User=fedmix
ExecStart={command}
Restart=always
RestartSec=5
# Programs get SIGTERM, and 20 s to end.
KillMode=mixed
TimeoutStopSec=60
# It writes below its home alone, has a /tmp of its own, and may become nobody else. PrivateDevices would hide a GPU.
ReadWritePaths={home}
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
ProtectProc=invisible
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
# Netlink tells which interface is the loopback one.
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def write_unit(home: Path, name: str, *, role: str, notes: Sequence[str], words: Sequence[str]) -> Path:
    """Write ``home``/systemd/NAME.service, which runs ``fedmix WORDS --home HOME`` with the fedmix beside this Python.

    ``notes``: what a person should know of its user, ports and paths, one sentence a line.
    """
    folder = home.absolute() / "systemd"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.service"
    program, place = _word(Path(sys.executable).with_name("fedmix")), _word(home.absolute())
    text = UNIT.format(
        name=name,
        role=role,
        folder=shlex.quote(str(home.absolute())),
        source=shlex.quote(str(path)),
        notes="\n".join(f"# {note}" for note in notes),
        command=" ".join([program, *words, "--home", place]).replace("$", "$$"),  # a dollar would begin a variable
        home=place,
    )
    path.write_text(text)
    return path


def _word(path: Path) -> str:
    """A path as systemd reads one word: in quotes where it holds more than plain characters, its percent signs doubled."""
    text = str(path).replace("%", "%%")
    if text.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
