"""A SuperLink under load: what it cannot do at once is waited for, and what failed is asked again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.corestate import sql_corestate
from superlinks import Awaited

from server import superlink

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's way to Alembic


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


def test_a_connection_waits_long_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_PATIENCE", sql_corestate.HEARTBEAT_PATIENCE)
    superlink.be_patient()
    with sqlite3.connect(":memory:") as connection:
        sql_mixin._set_sqlite_pragmas(connection, None)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (superlink.DATABASE_S * 1000,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_a_run_outlives_minutes_in_which_its_server_app_cannot_be_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_PATIENCE", sql_corestate.HEARTBEAT_PATIENCE)
    superlink.be_patient()
    going = Awaited(tmp_path / "state.db", 1000)
    for seconds, status in ((200, "running"), (400, "finished")):
        later = sql_corestate.now() + timedelta(seconds=seconds)
        with monkeypatch.context() as clock:
            clock.setattr(sql_corestate, "now", lambda later=later: later)
            assert going.state.get_run_status({going.run})[going.run].status == status
