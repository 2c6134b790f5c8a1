"""Ledgers: what was tampered with is found, and what a kill or a full disk leaves is mended or refused."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmix.deployment import ledger as module
from fedmix.deployment.ledger import NO_HEAD, Ledger, head_file, verify
from fedmix.errors import LedgerError

Tamper = Callable[[list[bytes], random.Random], bytes]


def written(path: Path, count: int = 6) -> Ledger:
    ledger = Ledger(path)
    for number in range(count):
        ledger.append("sent", round=number, groups={"text.head": number}, norm=0.5, epsilon=None)
    return ledger


def test_entries_are_chained_and_numbered(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert Ledger(path).head() == NO_HEAD
    heads = [Ledger(path).append("sent", round=number) for number in range(3)]
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["hash"] for entry in entries] == heads
    assert [entry["previous"] for entry in entries] == [NO_HEAD, *heads[:-1]]
    assert [entry["index"] for entry in entries] == [0, 1, 2]
    assert Ledger(path).head() == heads[-1]
    assert list(Ledger(path).entries()) == entries
    found = verify(path)
    assert (found.entries, found.head) == (3, heads[-1])
    assert path.stat().st_mode & 0o077 == 0


def test_an_empty_ledger_is_whole(tmp_path: Path) -> None:
    assert verify(tmp_path / "ledger.jsonl").entries == 0


def edited(lines: list[bytes], chance: random.Random) -> bytes:
    raw = bytearray(b"".join(lines))
    place = chance.randrange(len(raw))
    raw[place] = chance.choice([value for value in range(256) if value != raw[place]])
    return bytes(raw)


def deleted(lines: list[bytes], chance: random.Random) -> bytes:
    start = chance.randrange(len(lines))
    stop = chance.randrange(start + 1, len(lines) + 1)
    return b"".join(lines[:start] + lines[stop:])


def reordered(lines: list[bytes], chance: random.Random) -> bytes:
    one, other = chance.sample(range(len(lines)), 2)
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def truncated(lines: list[bytes], chance: random.Random) -> bytes:
    raw = b"".join(lines)
    return raw[: chance.randrange(len(raw))]


def rehashed(lines: list[bytes], chance: random.Random) -> bytes:
    """One entry changed with a hash that fits it again, as somebody would who knows how a ledger is made."""
    place = chance.randrange(len(lines))
    entry = json.loads(lines[place])
    del entry["hash"]
    lines[place], _ = module._line_of(entry | {"round": 99}, {})
    return b"".join(lines)


def test_a_thousand_random_tamperings_are_all_found(tmp_path: Path) -> None:
    path, chance = tmp_path / "ledger.jsonl", random.Random(0)
    written(path)
    whole = path.read_bytes()
    for number in range(1000):
        tamper: Tamper = (edited, deleted, reordered, truncated, rehashed)[number % 5]
        path.write_bytes(tamper(whole.splitlines(keepends=True), chance))
        assert path.read_bytes() != whole
        with pytest.raises(LedgerError):
            verify(path)
    path.write_bytes(whole)
    assert verify(path).entries == 6


def test_the_first_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    path.write_bytes(path.read_bytes().replace(b'"round":3', b'"round":4'))
    with pytest.raises(LedgerError, match="line 4 of the ledger was changed"):
        verify(path)


def test_a_tail_cut_together_with_the_head_file_shows_in_the_peers_ledger(tmp_path: Path) -> None:
    own, coordinator, early = Ledger(tmp_path / "own.jsonl"), Ledger(tmp_path / "coordinator.jsonl"), tmp_path / "early"
    early.mkdir()
    for number in range(4):
        head = own.append("sent", round=number)
        coordinator.append("received", peer="west", peer_head=head)
        coordinator.append("received", peer="north", peer_head="0" * 64)
        if number == 1:
            for file in (tmp_path / "own.jsonl", tmp_path / "own.head"):
                shutil.copy(file, early)
    peer = tmp_path / "coordinator.jsonl"
    assert verify(tmp_path / "own.jsonl", peer=peer, name="west").entries == 4
    assert verify(early / "own.jsonl").entries == 2  # alone it looks whole
    with pytest.raises(LedgerError, match=r"the peer wrote down a head .* \(its line 5\)"):
        verify(early / "own.jsonl", peer=peer, name="west")


def test_a_peers_ledger_that_is_not_whole_proves_nothing(tmp_path: Path) -> None:
    written(tmp_path / "own.jsonl")
    written(tmp_path / "peer.jsonl")
    (tmp_path / "peer.jsonl").write_bytes(b"{}\n")
    with pytest.raises(LedgerError, match="line 1"):
        verify(tmp_path / "own.jsonl", peer=tmp_path / "peer.jsonl")


def test_a_torn_line_that_was_never_acknowledged_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    head = written(path).head()
    whole = path.read_bytes()
    for torn in (b"{", whole.splitlines()[0][:50]):
        path.write_bytes(whole + torn)
        assert Ledger(path).head() == head
        assert path.read_bytes() == whole
    Ledger(path).append("sent")
    assert verify(path).entries == 7


def test_a_whole_entry_whose_head_was_not_yet_written_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    before = head_file(path).read_bytes()
    head = Ledger(path).append("sent", round=6)
    head_file(path).write_bytes(before)
    assert Ledger(path).head() == head
    assert verify(path).entries == 7


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-40], lambda raw: b"", lambda raw: raw + b"{}\n"])
def test_it_does_not_go_on_from_a_broken_tail(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    path.write_bytes(damage(path.read_bytes()))
    broken = path.read_bytes()
    with pytest.raises(LedgerError):
        Ledger(path).append("sent")
    assert path.read_bytes() == broken


@pytest.mark.parametrize("head", [b"", b"[]", b'{"entries": "6", "hash": "", "size": 0}'])
def test_a_head_file_that_is_none_is_refused(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    head_file(path).write_bytes(head)
    with pytest.raises(LedgerError, match="head file is not readable"):
        Ledger(path).append("sent")
    with pytest.raises(LedgerError):
        verify(path)


def test_a_missing_head_file_is_a_broken_tail(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    head_file(path).unlink()
    with pytest.raises(LedgerError):
        Ledger(path).append("sent")
    with pytest.raises(LedgerError, match="its head file says 0"):
        verify(path)


def test_a_disk_that_takes_no_more_leaves_the_ledger_whole_and_is_said_without_a_path(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
    try:
        with pytest.raises(LedgerError) as caught:
            Ledger(path).append("sent")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == "the ledger cannot be kept: File too large; see to its folder and its disk"
    assert path.read_bytes() == whole
    Ledger(path).append("sent")
    assert verify(path).entries == 7


@pytest.mark.parametrize("facts", [{"hash": "x"}, {"index": 1}, {"norm": float("nan")}, {"text": "x" * 70_000}, {"what": b"x"}])
def test_an_entry_that_could_not_be_verified_is_not_written(facts: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(LedgerError):
        Ledger(path).append("sent", **facts)
    assert verify(path).entries == 0


def append_often(path: Path) -> None:
    for number in range(20):
        Ledger(path).append("sent", round=number)


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_often, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert verify(path).entries == 40
