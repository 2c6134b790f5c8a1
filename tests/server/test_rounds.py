"""The round loop over the sites' real apps: what a bad reply does, and what it does not."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from little import SITES, Change, DirectGrid, World, everyone, failing, values

from client import messages as site_messages
from fedmix.errors import RunError
from fedmix.federation.update import REACHED_BY, digest, group_of, tower_of
from server import gathering, messages, roster
from server.store import RunStore


def content(reply: Message, change: Callable[[RecordDict], None]) -> Message:
    """The reply with its records changed in place."""
    change(reply.content)
    return reply


def receipt(**fields: Any) -> Change:
    """Fields of the receipt replaced, or removed where the value is None."""

    def change(records: RecordDict) -> None:
        said = records.config_records["receipt"]
        for key, value in fields.items():
            if value is None:
                del said[key]
            else:
                said[key] = value

    return lambda reply: content(reply, change)


def examples(**counts: Any) -> Change:
    return lambda reply: content(reply, lambda records: records.metric_records["examples"].update(counts))


def without(record: str) -> Change:
    return lambda reply: content(reply, lambda records: records.pop(record))


def with_delta(name: str, array: Array) -> Change:
    return lambda reply: content(reply, lambda records: records.array_records["deltas"].update({name: array}))


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


WEIGHT = "projection.image.weight"  # only a site with pairs trains it


def deltas(change: Callable[[np.ndarray[Any, Any]], Any]) -> Change:
    """One tensor of the update replaced by what ``change`` makes of it."""

    def alter(records: RecordDict) -> None:
        record = records.array_records["deltas"]
        name = sorted(record)[0]
        record[name] = Array(np.asarray(change(record[name].numpy().copy())))

    return lambda reply: content(reply, alter)


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (1,), stype: str = "numpy.ndarray") -> Change:
    """One tensor of the update replaced by bytes that claim to be one."""

    def alter(records: RecordDict) -> None:
        record = records.array_records["deltas"]
        record[sorted(record)[0]] = Array(dtype=dtype, shape=shape, stype=stype, data=data)

    return lambda reply: content(reply, alter)


def boast(shape: tuple[int, ...]) -> bytes:
    """Bytes of an array whose header promises more than there is."""
    header = npy(np.zeros((1,), np.float32))
    return header.replace(b"(1,), }".ljust(len(f"{shape}, }}")), f"{shape}, }}".encode(), 1)


HOSTILE: dict[str, tuple[Change, str]] = {
    "no receipt": (without("receipt"), "not of the form"),
    "no examples": (without("examples"), "not of the form"),
    "no metrics": (without("metrics"), "not of the form"),
    "no deltas": (without("deltas"), "not of the form"),
    "nothing": (lambda reply: content(reply, lambda records: records.clear()), "not of the form"),
    "no run": (receipt(run=None), "'run'"),
    "no round": (receipt(round=None), "'round'"),
    "no site": (receipt(site=None), "'site'"),
    "no base": (receipt(base=None), "'base'"),
    "no fingerprint": (receipt(fingerprint=None), "'fingerprint'"),
    "no steps": (receipt(steps=None), "'steps'"),
    "no start": (receipt(train_start=None), "'train_start'"),
    "other run": (receipt(run="another-run"), "another order: run differ"),
    "other round": (receipt(round=9), "another order: round differ"),
    "round before": (receipt(round=0), "another order: round differ"),
    "other site": (receipt(site="north"), "another order: site differ"),
    "other base": (receipt(base="0" * 64), "another order: base differ"),
    "other experiment": (receipt(fingerprint="0" * 64), "another order: fingerprint differ"),
    "round as text": (receipt(round="1"), "'round' of a message should be int"),
    "round as float": (receipt(round=1.0), "'round' of a message should be int"),
    "round as truth": (receipt(round=True), "'round' of a message should be int"),
    "steps as float": (receipt(steps=1.0), "'steps' of a message should be int"),
    "no step": (receipt(steps=0), "at least one step"),
    "fewer steps": (receipt(steps=-1), "at least one step"),
    "more steps": (receipt(steps=1000), "1000 steps, it was asked for 1"),
    "start is no time": (receipt(train_start=math.nan), "should be a time"),
    "end is no time": (receipt(train_end=math.inf), "should be a time"),
    "no count": (lambda reply: content(reply, lambda records: records.metric_records["examples"].pop("paired")), "'paired'"),
    "count as float": (examples(paired=4.0), "'paired' of a message should be int"),
    "negative count": (examples(paired=-4), "at least one step on at least one study"),
    "zero counts": (examples(paired=0), "at least one step on at least one study"),
    "a million million": (examples(paired=10**12), "cannot have seen"),
    "another's stream": (examples(paired=0, image=4), "not its own (paired)"),
    "a second stream": (examples(text=4), "not its own"),
    "a shape of one": (deltas(lambda array: array.reshape(-1)[:1]), "the model has"),
    "another shape": (deltas(lambda array: np.zeros((*array.shape, 1), np.float32)), "the model has"),
    "another type": (deltas(lambda array: array.astype(np.float16)), "the model has"),
    "whole numbers": (deltas(lambda array: np.zeros(array.shape, np.int32)), "the model has"),
    "not a number": (deltas(lambda array: np.full_like(array, np.nan)), "not finite"),
    "infinity": (deltas(lambda array: np.full_like(array, np.inf)), "not finite"),
    "unknown tensor": (with_delta("back.door", Array(np.zeros(3, np.float32))), "1 tensors in the update are not among"),
    "no tensor": (lambda reply: content(reply, lambda records: records.array_records["deltas"].clear()), "empty"),
    "too large": (deltas(lambda array: np.zeros(10**6, np.float32)), "the model has"),
    "double": (deltas(lambda array: np.repeat(array.astype(np.float64), 40, axis=0)), "the model has"),
    "no bytes": (raw(b""), "cannot be decoded"),
    "not an array": (raw(b"\x80\x04K\x01."), "cannot be decoded"),
    "cut short": (raw(npy(np.zeros(4, np.float32))[:-3], shape=(4,)), "cannot be decoded"),
    "objects": (raw(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128)), "decoded"),
    "a header that boasts": (raw(boast((10**12,))), "cannot be decoded"),
    "a header that runs code": (raw(b"\x93NUMPY\x01\x00v\x00__import__('os').abort()".ljust(128)), "cannot be decoded"),
    "another coding": (raw(b"abc", stype="pickle"), "cannot be decoded"),
    "metric alone": (lambda reply: content(reply, lambda r: r.metric_records["metrics"].update({"mvm/loss": 3.0})), "pair"),
    "metric of three": (
        lambda reply: content(reply, lambda r: r.metric_records["metrics"].update({"mvm/loss": [1.0, 2.0, 3.0]})),
        "pair",
    ),
    "metric not finite": (
        lambda reply: content(reply, lambda r: r.metric_records["metrics"].update({"mvm/loss": [math.nan, 1.0]})),
        "not finite",
    ),
    "a report as a metric": (
        lambda reply: content(reply, lambda r: r.metric_records["metrics"].update({"No pleural effusion.": [1.0, 1.0]})),
        "at most 32 metrics, named like",
    ),
    "many metrics": (
        lambda reply: content(
            reply, lambda r: r.metric_records["metrics"].update({f"metric{number}": [1.0, 1.0] for number in range(99)})
        ),
        "at most 32 metrics",
    ),
    "swapped records": (
        lambda reply: content(reply, lambda records: records.update({"receipt": MetricRecord({"round": 1})})),
        "not of the form",
    ),
    "an error": (failing, "on purpose"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One round of all sites; tests run it afresh."""
    folder = tmp_path_factory.mktemp("world")
    return World(folder, everyone(folder))


@pytest.fixture(scope="module")
def without_west(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the model after a round that the third site had no part in."""
    run = world.afresh(tmp_path_factory.mktemp("honest"))
    return digest(run.run(run.grid({"west": failing})).parameters)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_reply_drops_its_site_and_leaves_the_others_sum_as_if_it_had_not_been(
    name: str, world: World, tmp_path: Path, without_west: str
) -> None:
    change, why = HOSTILE[name]
    run = world.afresh(tmp_path)
    committed = run.run(run.grid({"west": change}))
    assert run.taken() == [(1, "north"), (1, "south")]
    assert list(run.dropped()) == ["west"]
    assert why in run.dropped()["west"]
    assert digest(committed.parameters) == without_west
    assert committed.totals["examples/north"] == 4
    assert "examples/west" not in committed.totals
    row = next(row for row in run.seen if row["event"] == "round")
    assert (row["values"]["num_sites"], row["values"]["num_failed"]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda records: records.update({"report": ConfigRecord({"text": "Mrs Jones"})}), "1 records that nobody asked for"),
        (lambda records: records.config_records["receipt"].update({"patient": "Mrs Jones"}), "1 fields that nobody asked for"),
        (lambda records: records.metric_records["examples"].update({"jones": 4}), "1 fields that nobody asked for"),
        (
            lambda records: records.metric_records["second_moments"].update({"jones": 4.0}),
            "second moments, which this stage does not aggregate",
        ),
    ],
)
def test_what_nobody_asked_for_is_refused_and_never_repeated(
    change: Callable[[RecordDict], None], why: str, world: World, tmp_path: Path, without_west: str
) -> None:
    run = world.afresh(tmp_path)
    committed = run.run(run.grid({"west": lambda reply: content(reply, change)}))
    assert why in run.dropped()["west"]
    assert digest(committed.parameters) == without_west
    assert "jones" not in json.dumps(run.seen).lower()


def test_a_replayed_reply_of_an_earlier_round_is_refused(tmp_path: Path) -> None:
    kept: list[RecordDict] = []

    def replay(reply: Message) -> Message:
        kept.append(reply.content)
        reply.content = kept[0]
        return reply

    world = World(tmp_path, everyone(tmp_path, rounds=2))
    world.run(world.grid({"west": replay}))
    assert world.dropped() == {"west": "reply answers another order: round, base, nonce differ (strike 1)"}
    assert world.taken() == [(1, "north"), (1, "south"), (1, "west"), (2, "north"), (2, "south")]


def test_a_round_without_enough_sites_fails_and_the_run_stops_with_the_causes(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, federation={"min_sites": 2, "max_failed_rounds": 2}))
    with pytest.raises(RunError, match=r"round 1 failed 2 times in a row: 1 of 3 sites sent an update, 2 are needed") as caught:
        world.run(world.grid({"west": failing, "north": receipt(round=7)}))
    assert "north: reply answers another order: round differ (strike 2); west: on purpose" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert world.store.latest() is None
    assert not world.store._metrics.exists()  # rows of a round that never was
    assert [row["event"] for row in world.seen].count("failed") == 2


def test_all_sites_failing_is_a_failure_and_never_an_empty_round(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    with pytest.raises(RunError, match="0 of 3 sites sent an update"):
        world.run(world.grid(dict.fromkeys(SITES, failing)))
    assert world.store.latest() is None


def test_a_round_that_failed_is_tried_again_and_its_rows_are_written_once(tmp_path: Path) -> None:
    orders = iter(range(9))

    def fails_once(reply: Message) -> Message:
        return failing(reply) if next(orders) == 0 else reply

    world = World(tmp_path, everyone(tmp_path, federation={"min_sites": 3, "max_failed_rounds": 2}))
    committed = world.run(world.grid({"west": fails_once}))
    whole = World(tmp_path / "whole", everyone(tmp_path))
    assert digest(committed.parameters) == digest(whole.run().parameters)
    rows = [json.loads(line) for line in world.store._metrics.read_text().splitlines()]
    assert sorted((row["event"], row["site"] or "") for row in rows) == [
        ("aggregate", ""),
        ("round", ""),
        ("site", "north"),
        ("site", "south"),
        ("site", "west"),
    ]


def test_an_outer_step_that_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    wanted = everyone(tmp_path)
    wanted["stages"][0]["outer"] = {"lr": 1e300}
    world = World(tmp_path, wanted)
    with pytest.raises(RunError, match="the aggregated model holds values that are not finite"):
        world.run()
    assert world.store.latest() is None


class Late(DirectGrid):
    """Holds one site's first reply back, and delivers it later though nobody asks for it any more."""

    late_node = 2
    held: Message | None = None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        is_first = self.held is None and messages[0].metadata.message_type == "train"
        if is_first and messages[0].metadata.dst_node_id == self.late_node:
            self.held = self.replies.pop(ids[0])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if self.held is not None and replies and replies[0].content.config_records.get("receipt", {}).get("round") == 2:
            return [self.held, *replies]
        return replies


def test_a_reply_after_the_deadline_is_dropped_and_not_taken_in_the_next_round(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, rounds=2, federation={"deadline_s": 0.4, "slowest_link_mbit_s": 1e6}))
    started = time.monotonic()
    world.run(Late(world.places, {}))
    assert world.dropped() == {"north": "no reply before the deadline"}
    assert world.taken() == [(1, "south"), (1, "west"), (2, "north"), (2, "south"), (2, "west")]
    assert time.monotonic() - started < 10


def test_the_deadline_travels_with_the_order_and_grows_with_what_a_slow_link_must_carry(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, federation={"deadline_s": 20.0, "slowest_link_mbit_s": 2.0}))
    ttls = []

    class Noting(DirectGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            ttls.extend(message.metadata.ttl for message in messages if message.metadata.message_type == "train")
            return super().push_messages(messages)

    world.run(Noting(world.places, {}))
    num_bytes = [
        2 * sum(4 * value.numel() for value in gathering.for_stream(world.initial(), site.stream).values())
        for site in world.experiment.data.sites
    ]
    assert ttls == pytest.approx([20.0 + 8 * size / 2e6 for size in num_bytes], abs=0.05)  # arrays have headers
    assert min(num_bytes) > 20_000


def test_the_same_seed_gives_the_same_weights_and_the_rows_tell_bytes_and_examples(tmp_path: Path) -> None:
    worlds = [World(tmp_path / name, values(tmp_path)) for name in ("a", "b")]
    first, second = (world.run() for world in worlds)
    assert digest(first.parameters) == digest(second.parameters)
    assert digest(first.parameters) != digest(worlds[0].initial())
    assert worlds[0].taken() == [(1, "north"), (1, "south"), (2, "west"), (3, "west")]
    assert first.totals["examples/west"] == 16
    assert first.totals["bytes_up/west"] == sum(
        row["values"]["comm/bytes_up"] for row in worlds[0].seen if row["site"] == "west"
    )
    assert 0 < first.totals["local_train_s"] <= first.totals["rounds_s"]
    assert first.totals["bytes_full_fp32"] == 4 * 4 * sum(value.numel() for value in first.parameters.values())


@pytest.mark.parametrize("node", [2, 3])
def test_a_site_gets_only_what_its_stream_trains(node: int, tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    sent: set[str] = set()

    class Noting(DirectGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            for message in messages:
                if message.metadata.dst_node_id == node and message.metadata.message_type == "train":
                    sent.update(message.content.array_records["parameters"])
            return super().push_messages(messages)

    world.run(Noting(world.places, {}))
    stream = {2: "image", 3: "text"}[node]
    other = {2: "text", 3: "image"}[node]
    assert sent
    assert {tower_of(group_of(name)) for name in sent} == {"shared", stream}
    assert not any(f".{other}." in f".{name}." or name.startswith(f"embed_{other}") for name in sent)
    assert sent == {name for name in world.initial() if stream in REACHED_BY[tower_of(group_of(name))]}


def test_the_pair_tower_goes_to_sites_with_pairs_only(tmp_path: Path) -> None:
    initial = World(tmp_path).initial()
    pair = {name for name in initial if tower_of(group_of(name)) == "pair"}
    assert pair
    assert not pair & set(gathering.for_stream(initial, "image"))
    assert not pair & set(gathering.for_stream(initial, "text"))
    assert set(gathering.for_stream(initial, "paired")) == set(initial)


def test_a_site_whose_clock_is_a_year_off_does_not_change_the_run_s_times(world: World, tmp_path: Path) -> None:
    run = world.afresh(tmp_path)
    committed = run.run(run.grid({"west": receipt(train_start=3e7, train_end=9e9)}))
    assert not run.dropped()
    assert 0 < committed.totals["local_train_s"] <= committed.totals["rounds_s"] < 60


@pytest.mark.parametrize("told", [[None], []])
def test_a_site_whose_order_cannot_be_sent_is_dropped_for_the_round(told: list[None], world: World, tmp_path: Path) -> None:
    class Lossy(DirectGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            is_lost = messages[0].metadata.dst_node_id == 2 and messages[0].metadata.message_type == "train"
            return told if is_lost else super().push_messages(messages)  # type: ignore[return-value]

    run = world.afresh(tmp_path)
    run.run(Lossy(run.places, {}))
    assert run.dropped() == {"north": "its order could not be sent"}
    assert run.taken() == [(1, "south"), (1, "west")]


# ---- who is there


def test_a_site_that_refuses_to_greet_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.shards["south"] / "tokens.npy").write_bytes(b"")
    with pytest.raises(RunError, match=r"site south: shard member tokens\.npy has 0 bytes"):
        world.run()


def test_two_nodes_of_one_name_stop_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(RunError, match="two nodes answer as site north"):
        world.run(DirectGrid([*world.places, world.places[0]], {}))


def test_a_site_with_another_experiment_stops_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    other = World(tmp_path / "other", values(tmp_path, seed=4))
    with pytest.raises(RunError, match="site west was given another experiment"):
        world.run(DirectGrid([*world.places[:2], other.places[2]], {}))


def test_a_missing_site_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "GREETING_DEADLINE_S", 0.2)
    world = World(tmp_path)
    with pytest.raises(RunError, match="2 of 3 nodes came within"):
        world.run(DirectGrid(world.places[:2], {}))


def test_a_node_that_is_silent_is_named(tmp_path: Path) -> None:
    class Silent(DirectGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return list(super().send_and_receive(messages, timeout=timeout))[:-1]

    world = World(tmp_path)
    with pytest.raises(RunError, match="no node answered for west"):
        world.run(Silent(world.places, {}))


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (RecordDict(), "no greeting"),
        (RecordDict({"greeting": MetricRecord({"site": 3})}), "no greeting"),
        (RecordDict({"greeting": ConfigRecord({"site": 3})}), "'site' of a message should be str, it is int"),
        (RecordDict({"greeting": ConfigRecord({"site": "west", "stream": "paired"})}), "'fingerprint'"),
        (RecordDict({"greeting": ArrayRecord()}), "no greeting"),
    ],
)
def test_an_odd_greeting_is_refused_with_a_reason(greeting: RecordDict, why: str, tmp_path: Path) -> None:
    class Odd(DirectGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            replies = list(super().send_and_receive(messages, timeout=timeout))
            replies[-1].content = greeting
            return replies

    world = World(tmp_path)
    with pytest.raises(RunError, match=why):
        world.run(Odd(world.places, {}))


# ---- what a reason may show


def reason(code: int, text: str) -> str:
    DirectGrid([], {})
    order = Message(RecordDict(), 2, "train")
    return messages.reason(Message(Error(code=code, reason=text), reply_to=order))


def test_flowers_own_errors_are_told_by_number_because_their_text_quotes_paths() -> None:
    assert reason(2, "<class 'OSError'>:<'/data/jones/shard'>") == "Flower error 2; the node's own log has the details"


def test_what_a_failing_machine_or_line_brings_about_is_told_in_words() -> None:
    assert reason(5, "Error: Node Unavailable") == "its agent went offline"
    assert reason(8, "ClientApp stopped responding.").startswith("the program that answers for it stopped")


def test_a_reason_is_one_short_line_without_control_signs() -> None:
    assert reason(site_messages.REFUSED, "no\nroom\x1b[31m\u202e") == "no room [31m "
    assert len(reason(site_messages.REFUSED, "x" * 10_000)) < 310


# ---- resuming in one process; tests/simulations/test_resume.py kills real ones


def test_a_run_taken_up_after_any_round_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = World(tmp_path / "whole", values(tmp_path)).run()

    class Stops(DirectGrid):
        """Ctrl-C after some orders."""

        left = 3

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            if messages[0].metadata.message_type == "train":
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            return super().push_messages(messages)

    for orders in (1, 2, 3):
        world = World(tmp_path / f"after-{orders}", values(tmp_path))
        grid = Stops(world.places, {})
        grid.left = orders
        with pytest.raises(KeyboardInterrupt):
            world.run(grid)
        taken_up = World(tmp_path / f"after-{orders}", values(tmp_path), resume=True)
        committed = taken_up.run()
        assert digest(committed.parameters) == digest(whole.parameters)
        assert taken_up.store.run_id == world.store.run_id
        lines = taken_up.store._metrics.read_text().splitlines()
        told = [(row["event"], row["round"], row["site"]) for row in map(json.loads, lines)]
        assert len(told) == len(set(told)) == 10
        # A run that is taken up does not know what the sites hold, and sends everything once more.
        apart = {key for key in whole.totals if committed.totals[key] != whole.totals[key] and not key.endswith("_s")}
        assert apart <= {"bytes_down/west"}


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    world = World(tmp_path, values(tmp_path))
    world.run(on_committed=lambda number, stage, parameters: told.append((number, stage)))
    assert told == [(1, "unpaired"), (2, "paired"), (3, "paired")]
    again = World(tmp_path, values(tmp_path), resume=True)
    again.run(on_committed=lambda number, stage, parameters: told.append((number, stage)))
    assert told[3:] == [(3, "paired")]
    assert again.taken() == []
    assert isinstance(again.store, RunStore)


class Orders(DirectGrid):
    """Notes which groups every order carries."""

    def __init__(self, places: Iterable[Any], changes: Any) -> None:
        super().__init__(places, changes)
        self.carried: list[tuple[int, set[str]]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                names = message.content.array_records["parameters"]
                self.carried.append((message.metadata.dst_node_id, {group_of(name) for name in names}))
        return super().push_messages(messages)


def naive(folder: Path) -> dict[str, Any]:
    """Two rounds of everybody in which only the paired site counts, so what it does not train does not change."""
    wanted = everyone(folder, rounds=2, aggregation={"rule": "paired_only"})
    wanted["stages"][0]["objectives"] = {"contrast": 1.0, "mlm": 0.0, "mvm": 1.0}
    wanted["stages"][0]["streams"] = ["image", "paired"]
    return wanted


def test_an_order_leaves_out_what_has_not_changed_since_the_site_received_it(tmp_path: Path) -> None:
    world = World(tmp_path, naive(tmp_path))
    grid = Orders(world.places, {})
    committed = world.run(grid)
    first, second = ([groups for node, groups in grid.carried if node == 4][number] for number in (0, 1))
    assert first == {group_of(name) for name in world.initial()}
    assert first - second == {"text.head", "pair.match_head"}  # sent to the paired site, but in no loss here
    whole = World(tmp_path / "whole", naive(tmp_path))

    class Forgetful(Orders):
        """Its sites lose their state folders after every order."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = super().push_messages(messages)
            for place in whole.places:
                for path in place.state.glob("*/received.safetensors"):
                    path.unlink()
            return ids

    again = whole.run(forgetful := Forgetful(whole.places, {}))
    assert not whole.dropped()
    assert [len(groups) for node, groups in forgetful.carried if node == 4] == [len(first), len(second), len(first)]
    assert digest(again.parameters) == digest(committed.parameters)
    assert again.totals["bytes_down/west"] > committed.totals["bytes_down/west"]


def test_a_site_is_not_asked_again_after_too_many_strikes_even_if_the_run_is_taken_up(tmp_path: Path) -> None:
    wanted = everyone(tmp_path, rounds=3, screening={"max_strikes": 2})
    world = World(tmp_path, wanted)
    committed = world.run(world.grid({"west": deltas(lambda array: np.full_like(array, np.nan))}))
    assert [row["round"] for row in world.seen if row["event"] == "dropped"] == [1, 2]
    assert "(strike 2; it is not asked again)" in world.dropped()["west"]
    assert committed.screening["strikes"] == {"west": 2}
    assert [site for number, site in world.taken() if number == 3] == ["north", "south"]


def test_a_site_s_own_errors_are_no_strikes(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path, rounds=3, screening={"max_strikes": 1}))
    committed = world.run(world.grid({"west": failing}))
    assert [row["round"] for row in world.seen if row["event"] == "dropped"] == [1, 2, 3]
    assert committed.screening["strikes"] == {}


def test_a_round_without_enough_sites_of_a_stream_fails(tmp_path: Path) -> None:
    limits = {"min_sites_of_stream": {"paired": 1}, "max_failed_rounds": 1}
    world = World(tmp_path, everyone(tmp_path, federation=limits))
    with pytest.raises(RunError, match="0 sites with paired studies sent an update, 1 are needed"):
        world.run(world.grid({"west": failing}))


def test_the_order_in_which_sites_answer_changes_no_bit(world: World, tmp_path: Path) -> None:
    class Turned(DirectGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return list(super().pull_messages(message_ids))[::-1]

    runs = [world.afresh(tmp_path / name) for name in ("a", "b")]
    results = [run.run(kind(run.places, {})) for run, kind in zip(runs, (DirectGrid, Turned), strict=True)]
    assert runs[0].taken() == runs[1].taken()[::-1]
    assert digest(results[0].parameters) == digest(results[1].parameters)


@pytest.mark.parametrize("coding", ["float16", "int8", "int4"])
def test_coded_updates_travel_in_fewer_bytes_and_move_the_model_alike(coding: str, tmp_path: Path) -> None:
    plain = World(tmp_path / "plain", values(tmp_path))
    coded = World(tmp_path / coding, values(tmp_path, wire={"coding": coding}))
    ours, whole = coded.run(), plain.run()
    share = {"float16": 0.52, "int8": 0.34, "int4": 0.22}[coding]  # rows of 16 values: headers and scales weigh here
    assert ours.totals["bytes_up/west"] < share * whole.totals["bytes_up/west"]
    start = plain.initial()
    moved = {name: whole.parameters[name] - start[name] for name in start}
    apart = sum(float((ours.parameters[name] - whole.parameters[name]).square().sum()) for name in start) ** 0.5
    length = sum(float(delta.square().sum()) for delta in moved.values()) ** 0.5
    assert 0 < apart < {"float16": 0.03, "int8": 0.2, "int4": 0.7}[coding] * length
