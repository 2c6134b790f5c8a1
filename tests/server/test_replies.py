"""Replies that come over slow and broken lines, in Flower's own database: handed over when whole, and not thrown away."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from flwr.supercore.corestate import sql_corestate
from superlinks import Awaited, Sending

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's way to Alembic


@pytest.fixture
def west(tmp_path: Path) -> Sending:
    return Sending(tmp_path / "state.db")


def test_a_reply_is_handed_over_when_the_last_of_its_objects_has_come(west: Sending) -> None:
    for name in west.objects:
        assert west.replies() == []
        assert west.push(name)
    (reply,) = west.replies()
    assert not reply.has_error()
    assert reply.metadata.reply_to_message_id == west.order


def test_a_site_that_is_away_while_it_sends_is_not_given_up_before_flowers_session_ends(
    west: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert west.push(next(iter(west.objects)))
    west.lose_its_line()
    assert west.replies() == []
    later = sql_corestate.now() + timedelta(seconds=200)
    monkeypatch.setattr("server.replies.now", lambda: later)
    (reply,) = west.replies()
    assert reply.has_error()


def test_a_whole_reply_is_not_lost_with_the_line_of_the_site_that_sent_it(west: Sending) -> None:
    for name in west.objects:
        assert west.push(name)
    assert west.state.deactivate_node(west.node)
    (reply,) = west.replies()
    assert not reply.has_error()
    assert west.replies()[0].has_error(), "it is given once"


def test_a_site_that_is_offline_before_it_answers_is_told_of_at_once(tmp_path: Path) -> None:
    west = Awaited(tmp_path / "state.db", 1000)
    assert west.replies() == []
    assert west.state.deactivate_node(west.node)
    assert west.replies()[0].has_error()


def test_what_a_site_was_sending_or_working_on_when_it_went_is_told_of_at_once_even_if_it_is_back(west: Sending) -> None:
    first, *others = west.objects
    assert west.push(first)
    assert west.state.deactivate_node(west.node)
    assert west.state.activate_node(west.node, 30.0)
    assert not west.push(others[0]), "what a process still sends that is going"
    (reply,) = west.replies()
    assert reply.has_error()


def test_an_order_that_a_site_had_fetched_when_it_went_is_lost_and_one_that_waits_is_not(tmp_path: Path) -> None:
    west = Awaited(tmp_path / "state.db", 1000)
    assert west.state.deactivate_node(west.node)
    assert west.state.activate_node(west.node, 30.0)
    assert west.replies() == []
    assert [one.metadata.message_id for one in west.state.get_message_ins(west.node, 1)] == [west.order]
    assert west.state.deactivate_node(west.node)
    assert west.state.activate_node(west.node, 30.0)
    assert west.replies()[0].has_error()


def test_an_object_that_is_sent_again_because_the_word_of_it_was_lost_is_taken(west: Sending) -> None:
    first, *others = west.objects
    assert west.push(first)
    assert west.push(first)
    assert not west.state.store_object(west.run, west.session, first, b"something else")
    for name in others:
        assert west.push(name)
    assert west.push(others[-1]), "and when it was the last one"
    assert len(west.replies()) == 1
