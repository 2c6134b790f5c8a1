"""A SuperNode that comes back after it was killed, against Flower's own record of who is online."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.error import FlowerError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

from client.presence import PresentClient

KEY = b"the site's public key"
ONLINE = ActivateNodeRequest(public_key=KEY, heartbeat_interval=30)


class SuperLink:
    """Flower's record of nodes with one of them registered."""

    def __init__(self) -> None:
        store = InMemoryObjectStore()
        self.state = InMemoryLinkState(NoOpFederationManager(), store)
        self.node = self.state.create_node("owner", "owner", KEY, 30)

    @property
    def status(self) -> str:
        (info,) = self.state.get_node_info(node_ids=[self.node])
        return info.status

    def answer(self, request: Any) -> Any:
        handler = fleet_handlers.activate_node if isinstance(request, ActivateNodeRequest) else fleet_handlers.deactivate_node
        try:
            return handler(request, self.state)
        except FlowerError as error:
            call = httpx.Request("POST", "https://link.example")
            raise httpx.HTTPStatusError(str(error), request=call, response=httpx.Response(400, request=call)) from None


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    """What every client of this test calls, without a line in between."""
    made = SuperLink()
    monkeypatch.setattr(PresentClient, "_unary_unary", lambda self, *, request, **options: made.answer(request))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return made


def life() -> PresentClient:
    return PresentClient("https://link.example", interceptors=[])


def test_one_that_was_killed_takes_its_own_place(link: SuperLink) -> None:
    life().ActivateNode(ONLINE)
    assert life().ActivateNode(ONLINE).node_id == link.node
    assert link.status == "online"


def test_another_with_its_key_is_kept_out(link: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life().ActivateNode(ONLINE)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(httpx.HTTPStatusError):
        life().ActivateNode(ONLINE)


def test_one_that_signed_off_signs_off_for_nobody(link: SuperLink, tmp_path: Path) -> None:
    client = life()
    client.ActivateNode(ONLINE)
    client.DeactivateNode(DeactivateNodeRequest(node_id=link.node))
    assert link.status == "offline"
    assert not list(tmp_path.iterdir())
    life().ActivateNode(ONLINE)
    assert link.status == "online"


@pytest.mark.parametrize("note", ["1", "no number"])
def test_a_note_of_another_coordinator_is_replaced(link: SuperLink, tmp_path: Path, note: str) -> None:
    (tmp_path / "online-as").write_text(note)
    life().ActivateNode(ONLINE)
    assert (tmp_path / "online-as").read_text() == str(link.node)
