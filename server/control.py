"""What the coordinator's commands ask of a running SuperLink: nodes, registrations and runs over Flower's Control API."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedmix.errors import RunError
from server import certificates
from server.home import Home

HEALTH_S = 3.0
ONLINE = "online"
FAILED = "ServerApp failed with exception: "  # how Flower begins what it keeps of an exception


@dataclass(frozen=True)
class Node:
    """A registered site as the SuperLink sees it. ``seen``: when it last came online, ISO 8601, empty if it never did."""

    node_id: int
    site: str
    key: bytes
    is_online: bool
    seen: str


@dataclass(frozen=True)
class FlowerRun:
    """A run's record: ``status`` is pending, starting, running or finished:completed, finished:failed, finished:stopped."""

    run_id: int
    name: str
    status: str
    details: str

    @property
    def is_over(self) -> bool:
        """Whether it will go no further."""
        return self.status.startswith("finished")


class Control:
    """The Control API of the coordinator's own SuperLink."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> list[Node]:
        """Every site that is registered now."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Node(one.node_id, one.name, one.public_key, one.status == ONLINE, one.last_activated_at)
            for one in found
            if one.status != "unregistered"
        ]

    def synchronise(self, registered: Mapping[str, bytes]) -> list[str]:
        """Make the SuperLink know just the sites with these keys, by name; returns what was changed in words."""
        wanted = {site: _as_flower_keeps_it(key) for site, key in registered.items()}
        known = {(node.site, node.key): node for node in self.nodes()}
        changes = []
        for (site, key), node in known.items():
            if wanted.get(site) != key:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                changes.append(
                    f"{site} is no longer registered under its old key" if site in wanted else f"{site} is taken off"
                )
        for site, key in wanted.items():
            if (site, key) not in known:
                self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=site))
                changes.append(f"{site} is registered")
        return changes

    def start(self, bundle: Path, run: str) -> int:
        """Hand a run in; returns Flower's number of it."""
        content = build_fab_from_disk(bundle)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        answer = self._client.StartRun(
            StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto({"run": run}))
        )
        return int(answer.run_id)

    def runs(self) -> list[FlowerRun]:
        """Every run, the newest last."""
        found = self._client.ListRuns(ListRunsRequest()).run_dict
        return [
            FlowerRun(
                number,
                one.override_config["run"].string if "run" in one.override_config else "",
                ":".join(filter(None, [one.status.status, one.status.sub_status])),
                one.status.details.removeprefix(FAILED),
            )
            for number, one in sorted(found.items(), key=lambda item: item[1].pending_at)
        ]

    def stop(self, run_id: int) -> None:
        """End a run; what is committed stays."""
        self._client.StopRun(StopRunRequest(run_id=run_id))


@contextmanager
def connected(home: Home) -> Iterator[Control]:
    """The Control API of a running coordinator; raises RunError if it does not answer."""
    client = ControlHttpClient.from_server_address(
        server_address=home.settings().control_address,
        insecure=False,
        root_certificates=home.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Control(client)
    except httpx.HTTPStatusError as error:
        raise RunError(
            f"the SuperLink refused a request ({error.response.status_code}); logs/superlink.log in {home.folder} says why"
        ) from None
    except httpx.TransportError as error:
        if (ends := certificates.expires(home.certificate)) < datetime.datetime.now(datetime.UTC):
            raise RunError(
                f"server.crt has ended on {ends:%Y-%m-%d}, so neither sites nor commands are answered; stop the coordinator "
                "and start it again, which issues it anew"
            ) from None
        raise RunError(
            f"the SuperLink does not answer ({type(error).__name__}); is `fedmix server start --home {home.folder}` running?"
        ) from None
    finally:
        client.close()


def is_healthy(home: Home) -> bool:
    """Whether the SuperLink's health server says that it serves (grpc.health.v1)."""
    with grpc.insecure_channel(home.settings().health_address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _as_flower_keeps_it(key: bytes) -> bytes:
    return public_key_to_bytes(load_ssh_public_key(key))  # type: ignore[arg-type]  # Home.register lets no other kind in
