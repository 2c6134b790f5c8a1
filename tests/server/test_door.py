"""The SuperLink's door for sites: the Fleet API and nothing else, and no body without end."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from server import superlink
from server.superlink import FleetOnly

SITES, CONTROL = 9443, 9444


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads its request and answers with its length."""
    length, more = 0, True
    while more:
        event = await receive()
        length, more = length + len(event.get("body", b"")), event.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def asked(path: str, port: int, *, bodies: tuple[bytes, ...] = (b"",), kind: str = "http") -> list[MutableMapping[str, Any]]:
    """What is sent in answer to a request on a port."""
    waiting = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    waiting[-1]["more_body"] = False
    answered: list[MutableMapping[str, Any]] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(event: MutableMapping[str, Any]) -> None:
        answered.append(event)

    scope = {"type": kind, "path": path, "server": ("10.0.0.1", port)}
    asyncio.run(FleetOnly(echo, CONTROL)(scope, receive, send))
    return answered


@pytest.mark.parametrize(
    "path", ["/v1/control/list-runs", "/v1/runtime/get-nodes", "/docs", "/", "", "/V1/fleet/x", "//v1/fleet/x", "/v1/fleet"]
)
def test_sites_reach_nothing_but_the_fleet_api(path: str) -> None:
    assert asked(path, SITES)[0]["status"] == 404
    assert asked(path, CONTROL)[0]["status"] == 200


def test_sites_reach_the_fleet_api() -> None:
    start, body = asked("/v1/fleet/pull-messages", SITES, bodies=(b"ab", b"c"))
    assert (start["status"], body["body"]) == (200, b"3")


def test_a_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "MAX_BODY_BYTES", 10)
    assert asked("/v1/fleet/push-object", SITES, bodies=(b"12345",) * 3)[0]["status"] == 413
    assert asked("/v1/fleet/push-object", SITES, bodies=(b"12345",) * 2)[0]["status"] == 200
    assert asked("/v1/runtime/push-object", CONTROL, bodies=(b"12345",) * 3)[0]["status"] == 200


def test_sites_open_no_websocket() -> None:
    assert asked("/v1/fleet/x", SITES, kind="websocket") == [{"type": "websocket.close"}]
