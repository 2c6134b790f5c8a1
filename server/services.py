"""Files for those who run the coordinator as a service: a systemd unit and a compose file, every port and path explained."""

from __future__ import annotations

from fedmix.deployment.units import write_unit
from server.home import Home, Settings

NOTES = """\
A user of its own, that owns {home} and nothing else.
Ports: {listen}:{port} takes calls from sites (TLS, registered keys only); open it in the firewall, and no other.
       127.0.0.1:{control_port} is for this coordinator's own commands, 127.0.0.1:{health_port} answers health checks.
Files: all it writes is below its home: keys, settings, plans, runs, the ledger, Flower's database, logs."""

COMPOSE = """\
# The same in a container. Build an image in which fedmix is installed, name it in FEDMIX_IMAGE, and in this folder:
#   docker compose up --detach
services:
  coordinator:
    image: ${{FEDMIX_IMAGE:?an image in which fedmix is installed}}
    command: ["fedmix", "server", "start", "--home", "/home/fedmix/fedmix-server"]
    restart: always
    init: true
    stop_grace_period: 60s
    read_only: true
    security_opt: ["no-new-privileges:true"]
    cap_drop: [ALL]
    tmpfs: [/tmp]
    ports:
      # From sites: TLS, registered keys only. server.yaml has to say listen: 0.0.0.0, for a container's loopback is its own.
      # The ports {control_port} (commands) and {health_port} (health) stay inside.
      - "{port}:{port}"
    volumes:
      # Keys, settings, plans, runs, the ledger, Flower's database and logs.
      - .:/home/fedmix/fedmix-server
    healthcheck:
      test: ["CMD", "fedmix", "server", "status", "--home", "/home/fedmix/fedmix-server"]
      interval: 60s
      timeout: 30s
"""


def write_services(home: Home, settings: Settings) -> None:
    """Write systemd/fedmix-server.service and compose.yaml."""
    notes = NOTES.format(home=home.folder.absolute(), **settings.model_dump()).splitlines()
    write_unit(home.folder, "fedmix-server", role="coordinator", notes=notes, words=["server", "start"])
    (home.folder / "compose.yaml").write_text(COMPOSE.format_map(settings.model_dump()))
