"""The SuperLink, with a door for sites that leads to nothing but what sites need.

Flower 1.41 serves its Fleet, Control and Runtime APIs on one port, and the Control API asks nobody who they are: whoever can
reach it can submit code and list or stop runs. So this program serves Flower's own application on two sockets. The one that
sites reach takes calls to the Fleet API and to nothing else; everything is answered on the loopback address alone.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TRANSPORT_TYPE_GRPC_RERE
from flwr.server.superlink.linkstate import linkstate_factory
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.supercore.corestate import sql_corestate
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app

from fedmix.deployment.environment import LOOPBACK
from server.coordinator import AWAY_S, bound
from server.home import Home
from server.replies import ReplyState

FLEET = "/v1/fleet/"
MAX_BODY_BYTES = 64 << 20  # a model is sent in objects of 1 MiB; the rest of a message is smaller still
DATABASE_S = 20  # that a request waits for the database; under the 30 after which whoever asked asks again
PATIENCE_S = 10  # that a request which is being answered has to end when the SuperLink stops

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class TooLargeError(Exception):
    """A request's body is longer than any that a site sends."""


class FleetOnly:
    """An ASGI application that lets calls over any other port than the control port reach the Fleet API alone."""

    def __init__(self, app: Application, control_port: int) -> None:
        self._app, self._control_port = app, control_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, or answer that there is nothing here."""
        send = _retried(send)
        if scope["type"] == "lifespan" or scope["server"][1] == self._control_port:
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith(FLEET):
            try:
                await self._app(scope, _bounded(receive), send)
            except TooLargeError:
                await _answer(send, 413)
        elif scope["type"] == "http":
            await _answer(send, 404)
        else:
            await send({"type": "websocket.close"})


def _bounded(receive: Receive) -> Receive:
    """What a site sends, as long as it is not longer than anything a site has to send."""
    taken = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal taken
        event = await receive()
        taken += len(event.get("body", b""))
        if taken > MAX_BODY_BYTES:
            raise TooLargeError
        return event

    return bounded


def _retried(send: Send) -> Send:
    """Call a failure here unavailable: Flower's programs repeat a request that got 503, and give up, some for good, at 500."""

    async def retried(event: MutableMapping[str, Any]) -> None:
        if event["type"] == "http.response.start" and event["status"] == 500:
            event = {**event, "status": 503}
        await send(event)

    return retried


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def flower_settings(home: Home) -> SuperLinkLifespanConfig:
    """What ``flower-superlink`` would be told: TLS, registered nodes only, a database, ServerApps in a process apart."""
    settings = home.settings()
    files = (home.ca_certificate, home.certificate, home.key)
    return SuperLinkLifespanConfig(
        control_address=settings.control_address,
        health_server_address=settings.health_address,
        host=LOOPBACK,
        port=settings.control_port,
        insecure=False,
        certificates=(files[0].read_bytes(), files[1].read_bytes(), files[2].read_bytes()),
        superexec_auth_secret=home.secret.read_bytes(),
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(home.ca_certificate),
        ssl_certfile=str(home.certificate),
        ssl_keyfile=str(home.key),
        database=str(home.database),
        isolation="process",
        runtime_dependency_install=False,
    )


def be_patient() -> None:
    """Wait longer than Flower does, for two things.

    A request waits for a busy database: with several models arriving, five seconds are too few. And a ServerApp that could
    not be heard while the SuperLink itself was away is still running: Flower fails its run after a minute, of which a
    SuperLink's start on a busy machine and the pauses between heartbeats may take all. Whether a ServerApp has died is seen
    by its lock on the run folder (server/running.py).
    """
    kept = [(name, value) for name, value in SQLITE_PRAGMAS if name != "busy_timeout"]
    vars(sql_mixin)["SQLITE_PRAGMAS"] = (("busy_timeout", str(DATABASE_S * 1000)), *kept)
    vars(sql_corestate)["HEARTBEAT_PATIENCE"] = AWAY_S / HEARTBEAT_DEFAULT_INTERVAL


def serve(home: Home) -> None:
    """Serve until SIGTERM."""
    be_patient()
    vars(linkstate_factory)["SqlLinkState"] = ReplyState
    settings = home.settings()
    app = FleetOnly(create_app(flower_settings(home), SuperLinkLifespan), settings.control_port)
    # Until it serves, calls are refused: Flower repeats those, but takes a TLS handshake that hangs for an error for good.
    sockets = [bound(settings.listen, settings.port), bound(LOOPBACK, settings.control_port)]
    options = uvicorn.Config(
        app,
        ssl_keyfile=home.key,
        ssl_certfile=home.certificate,
        access_log=False,  # every site asks for work every few seconds
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=PATIENCE_S,
    )
    uvicorn.Server(options).run(sockets)


if __name__ == "__main__":
    serve(Home(Path(sys.argv[1])))
