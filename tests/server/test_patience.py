"""A SuperLink under load: what it cannot do at once is waited for, and what failed is asked again."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import MutableMapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore import sql_mixin
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from server import superlink
from server.coordinator import AWAY_S, bound


def answered(status: int, path: str) -> int:
    """What a caller sees of an application's status."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(event: MutableMapping[str, Any]) -> None:
        sent.append(event)

    scope = {"type": "http", "path": path, "server": ("127.0.0.1", 9443)}
    asyncio.run(superlink.FleetOnly(app, control_port=9444)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(("status", "seen"), [(500, 503), (200, 200), (401, 401), (403, 403), (503, 503)])
def test_a_failure_is_one_that_flowers_programs_ask_again_after(status: int, seen: int) -> None:
    assert answered(status, "/v1/fleet/push-object") == seen


@pytest.mark.filterwarnings("ignore:No path_separator found")  # Flower's database, of Alembic
def test_a_serverapp_that_could_not_be_heard_for_minutes_is_still_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_PATIENCE", sql_corestate.HEARTBEAT_PATIENCE)
    superlink.be_patient()
    state = LinkStateFactory(str(tmp_path / "state.db"), NoOpFederationManager(), ObjectStoreFactory()).state()
    run = state.create_run("app", "1", "hash", {}, "", None, None, TaskType.SIMULATION)
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert state.claim_task(task)
    assert state.activate_task(task)
    begun = sql_corestate.now()
    for seconds, is_running in ((AWAY_S - 10, True), (2 * AWAY_S, False)):
        monkeypatch.setattr(sql_corestate, "now", lambda seconds=seconds: begun + timedelta(seconds=seconds))
        assert state.acknowledge_task_heartbeat(task) is is_running


def test_until_it_serves_a_port_refuses_calls() -> None:
    with closing(bound("127.0.0.1", 0)) as own:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(own.getsockname(), timeout=5.0)
        own.listen()
        socket.create_connection(own.getsockname(), timeout=5.0).close()


def test_a_connection_waits_long_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_PATIENCE", sql_corestate.HEARTBEAT_PATIENCE)
    superlink.be_patient()
    with sqlite3.connect(":memory:") as connection:
        sql_mixin._set_sqlite_pragmas(connection, None)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (superlink.DATABASE_S * 1000,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
