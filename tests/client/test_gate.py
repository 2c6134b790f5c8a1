"""The gate: what a hospital's policy does not allow is neither begun nor sent, and the ledger tells of every message."""

from __future__ import annotations

import datetime
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smuggling
from flwr.app import Array, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hospitals import COORDINATOR, answer, approved, hospital, query, refused, set_policy, written_plan
from little import World, values
from test_app import ask, order, sent_by

from client import app as client_app
from client import gate, messages
from client.home import Home
from fedmix.deployment import plan as plans
from fedmix.deployment.ledger import verify
from fedmix.errors import FedmixError, PolicyError
from fedmix.federation.update import group_of
from server import messages as server_messages

HEAD = "1" * 64


@pytest.fixture
def world(tmp_path: Path) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    return World(tmp_path, values(tmp_path))


@pytest.fixture
def made(world: World, tmp_path: Path) -> Home:
    """West's home, before any plan."""
    return hospital(tmp_path / "west", world)


def told(world: World, plan: str, **changes: Any) -> Message:
    """An order to west under a plan."""
    return order(world, "paired", plan=plan, ledger=HEAD, round=2, **changes)


def entries(made: Home) -> list[dict[str, Any]]:
    verify(made.ledger_file)
    return [json.loads(line) for line in made.ledger_file.read_text().splitlines()]


def hostile(monkeypatch: pytest.MonkeyPatch, change: Callable[[Message], Any]) -> None:
    """Have the job's reply changed before the gate sees it."""
    reply = messages.reply

    def changed(*args: Any, **options: Any) -> Message:
        said = reply(*args, **options)
        change(said)
        return said

    monkeypatch.setattr(client_app.messages, "reply", changed)


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app.local, "train", lambda *args, **options: pytest.fail("trained for nothing"))


# ---- what is answered


def test_an_approved_plan_is_answered_and_each_message_is_in_the_ledger(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    greeting = answer(made, query(plan, world))
    assert server_messages.read_greeting(greeting).site == "west"
    reply = answer(made, told(world, plan))
    assert not reply.has_error(), reply.error.reason
    created, approval, asked, greeted, received, sent = entries(made)
    assert [created["event"], approval["event"], asked["event"], greeted["event"]] == [
        "created",
        "approved",
        "received",
        "sent",
    ]
    assert greeting.content.config_records["greeting"]["ledger"] == greeted["hash"]
    assert reply.content.config_records["receipt"]["ledger"] == sent["hash"]
    assert (received["kind"], received["round"], received["peer_head"]) == ("train", 2, HEAD)
    arrays = reply.content.array_records["deltas"]
    assert sum(sent["groups"].values()) == len(arrays)
    assert set(sent["metrics"]) == set(reply.content.metric_records["metrics"])
    norm = np.sqrt(sum(float(np.square(array.numpy(), dtype=np.float64).sum()) for array in arrays.values()))
    assert sent["norm"] == pytest.approx(norm)
    payload = sum(len(array.data) for array in arrays.values())
    assert payload < sent["bytes"] < payload + 600 * sent["objects"]
    assert (sent["plan"], sent["run"], sent["direction"], sent["epsilon"]) == (plan, "little-000000000000", "out", None)


def test_the_update_is_the_one_that_a_simulated_place_sends(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    assert sent_by(answer(made, told(world, plan))) == sent_by(ask(world.places[2], order(world, "paired", round=2)))


# ---- what is not begun


def test_without_a_plan_nothing_is_answered(made: Home, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    no_work(monkeypatch)
    assert "names no plan" in refused(made, query("", world))
    assert "names no plan" in refused(made, order(world, "paired", round=2))
    assert "names no plan" in refused(made, query("../../etc/passwd", world))


def test_an_unapproved_plan_is_refused_and_the_refusal_is_in_the_ledger(made: Home, world: World) -> None:
    why = refused(made, told(world, "a" * 64))
    assert why == f"plan {'a' * 12} is not approved at this site; send it there for `fedmix site review`"
    received, said = entries(made)[-2:]
    assert (received["event"], said["event"], said["why"]) == ("received", "refused", why)


def test_one_byte_changed_in_an_approved_plan_is_refused(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    path = made.approved(plan)
    path.write_bytes(path.read_bytes() + b"\n")
    assert "was changed at this site after it was approved" in refused(made, told(world, plan))


def test_a_plan_of_other_sites_is_refused_even_where_it_lies_among_the_approved(world: World, tmp_path: Path) -> None:
    south = hospital(tmp_path / "south", world, "south")
    others = plans.Plan.of(world.experiment, ["north", "west"], coordinator=COORDINATOR, valid_days=3)
    plan = plans.write(others, tmp_path / "others.yaml")
    shutil.copy(tmp_path / "others.yaml", south.approved(plan))
    why = refused(south, order(world, "text", plan=plan, ledger=HEAD))
    assert why == "the plan does not name site south; it is for others"
    assert entries(south)[-1]["why"] == why


def test_an_expired_plan_is_refused(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    late = datetime.datetime.now().astimezone() + datetime.timedelta(days=40)
    with pytest.raises(PolicyError, match="was valid until"):
        gate.admit(made, told(world, plan), now=late)
    assert gate.admit(made, told(world, plan)).plan == plan


def test_a_plan_of_other_code_is_refused(made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    monkeypatch.setattr(gate.plans, "code_hash", lambda: "0" * 64)
    assert "another fedmix than the one that is installed" in refused(made, told(world, plan))


def test_another_experiment_under_an_approved_plan_is_refused(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    assert "fingerprints differ" in refused(made, told(world, plan, fingerprint="0" * 64))


def test_outside_the_hours_nothing_begins(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    set_policy(made, hours={"begin": 20, "end": 6})
    noon, night = (datetime.datetime.now().astimezone().replace(hour=hour) for hour in (12, 23))
    with pytest.raises(PolicyError, match=r"takes part from 20 to 6 o'clock of its local time, it is 12 there"):
        gate.admit(made, told(world, plan), now=noon)
    assert gate.admit(made, told(world, plan), now=night).plan == plan


def test_privacy_that_the_plan_lacks_refuses_it(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    for privacy, what in (
        ({"mode": "dp"}, "differential privacy"),
        ({"epsilon": 3.0}, "differential privacy"),
        ({"secure_sum": True}, "secure sums"),
    ):
        set_policy(made, privacy=privacy)
        assert f"asks for {what}, which the plan does not have" in refused(made, told(world, plan))


def test_a_private_plan_within_the_budget_is_answered_and_the_ledger_holds_its_epsilon(tmp_path: Path) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    stage = {"name": "all", "rounds": 2, "streams": ["paired"], "local_steps": 2, "batch_size": 4}
    world = World(tmp_path, values(tmp_path, stages=[stage], privacy={"mode": "dp", "epsilon": 8.0, "noise_multiplier": 4.0}))
    made = hospital(tmp_path / "west", world, privacy={"mode": "dp", "epsilon": 8.0})
    plan = approved(made, written_plan(tmp_path, world))
    reply = answer(made, order(world, "paired", plan=plan, ledger=HEAD, round=1))
    assert not reply.has_error()
    spent = reply.content["privacy"]["epsilon"]
    assert entries(made)[-1]["epsilon"] == spent
    assert 0.0 < spent < 8.0
    set_policy(made, privacy={"mode": "dp", "epsilon": 3.0})
    why = refused(made, order(world, "paired", plan=plan, ledger=HEAD, round=2))
    assert why == "this site's policy gives an epsilon of 3 at most, the plan asks for 8"
    set_policy(made, privacy={"mode": "dp", "epsilon": 8.0, "delta": 1e-6})  # the same steps look cheaper with a larger delta
    why = refused(made, order(world, "paired", plan=plan, ledger=HEAD, round=2))
    assert why == "this site's policy counts privacy loss with a delta of 1e-06 at most, the plan with 1e-05"
    set_policy(made, privacy={"mode": "dp", "epsilon": 8.0})
    (made.state / "privacy.jsonl").unlink()
    why = refused(made, order(world, "paired", plan=plan, ledger=HEAD, round=2))
    assert why.startswith("this site's privacy ledger lacks rounds that its ledger of messages says were sent")
    assert not (made.state / "privacy.jsonl").exists()


def test_too_few_studies_are_refused_without_their_number(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    set_policy(made, min_studies=1000)
    assert refused(made, query(plan, world)) == "this site takes part with 1000 training studies or more, and has fewer"


@pytest.mark.parametrize("text", [None, "hours: 3", "max_norms: 3", "max_norm: .inf", "- a", "groups: ['; rm']", "\x00"])
def test_a_policy_that_is_not_understood_refuses_everything(text: str | None, made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    made.policy_file.unlink() if text is None else made.policy_file.write_text(text)
    why = refused(made, query(plan, world))
    assert "policy" in why
    assert str(tmp_path) not in why


# ---- what does not leave


def test_a_pause_is_heeded_before_a_round_and_in_the_middle_of_one(
    made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    with monkeypatch.context() as patch:
        hostile(patch, lambda reply: made.paused_file.touch())  # as somebody pauses while the site trains
        assert "this site is paused" in refused(made, told(world, plan))
    no_work(monkeypatch)
    assert "this site is paused" in refused(made, told(world, plan))
    assert "sent" not in {entry["event"] for entry in entries(made)}


def test_a_reply_with_anything_more_or_less_than_an_update_does_not_leave(
    made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    for change in smuggling.CHANGES:
        with monkeypatch.context() as patch:
            hostile(patch, change)
            why = refused(made, told(world, plan))
        assert "repl" in why or "metrics leave" in why, change.__name__
        assert "effusion" not in why
        assert "19480401" not in why
        assert entries(made)[-1]["why"] == why
    assert "effusion" not in made.ledger_file.read_text()
    assert not answer(made, told(world, plan)).has_error()  # the honest one leaves


def test_a_tensor_that_sites_of_other_data_train_does_not_leave(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = hospital(tmp_path / "north", world, "north")
    plan = approved(north, written_plan(tmp_path, world))
    name, value = next((name, value) for name, value in world.initial().items() if group_of(name) == "text.head")

    def add(reply: Message) -> None:
        reply.content.array_records["deltas"][name] = Array(value.numpy())

    asked = order(world, "image", plan=plan, ledger=HEAD)
    assert not answer(north, asked).has_error()
    hostile(monkeypatch, add)
    why = refused(north, asked)
    assert "the reply is not what the plan has this site send" in why
    assert entries(north)[-1]["why"] == why


def test_an_update_beyond_the_norm_does_not_leave(
    made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    set_policy(made, max_norm=0.001)
    why = refused(made, told(world, plan))
    assert "long, this site's policy lets 0.001 leave" in why


@pytest.mark.parametrize(
    ("policy", "cause"),
    [
        ({"groups": ["block*"]}, "does not let image.decoder, image.embedding"),
        ({"metrics": []}, "of the reply's metrics leave"),
        ({"records": ["greeting", "receipt"]}, "does not let 4 of the reply's records leave"),
        ({"max_bytes": 1000}, "more than the 1000 bytes"),
    ],
)
def test_what_the_policy_holds_back_does_not_leave(
    policy: dict[str, Any], cause: str, made: Home, world: World, tmp_path: Path
) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    set_policy(made, **policy)
    assert cause in refused(made, told(world, plan))


def test_no_more_updates_leave_under_one_plan_than_the_policy_gives(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    set_policy(made, max_rounds=2)
    for _ in range(2):
        assert not answer(made, told(world, plan)).has_error()
    assert refused(made, told(world, plan)) == "this site has sent the 2 updates that its policy gives to one plan"


def test_a_greeting_with_anything_more_does_not_leave(
    made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    greeting = messages.greeting

    def changed(*args: Any, **options: Any) -> Message:
        said = greeting(*args, **options)
        said.content.config_records["greeting"]["note"] = "No pleural effusion."
        return said

    monkeypatch.setattr(client_app.messages, "greeting", changed)
    assert "holds fields that nobody asked for" in refused(made, query(plan, world))


# ---- when nothing can be written down


def test_with_a_full_disk_nothing_leaves(made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = made.ledger_file.stat().st_size

    def fill(reply: Message) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, hard))

    hostile(monkeypatch, fill)
    try:
        why = refused(made, told(world, plan))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert why == "the ledger cannot be kept: File too large; see to its folder and its disk"
    assert "sent" not in {entry["event"] for entry in entries(made)}


def test_with_a_broken_ledger_nothing_is_begun(
    made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    no_work(monkeypatch)
    made.ledger_file.write_bytes(made.ledger_file.read_bytes()[:-5])
    assert "the ledger's last entry is not the one that was written last" in refused(made, told(world, plan))


def test_an_older_entry_that_was_changed_stops_what_would_leave(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, written_plan(tmp_path, world))
    made.ledger_file.write_bytes(made.ledger_file.read_bytes().replace(b'"site":"west"', b'"site":"east"'))
    assert "line 1 of the ledger was changed" in refused(made, told(world, plan))


def test_a_node_config_of_another_site_is_refused(made: Home) -> None:
    config: Any = {"site": "north", "home": str(made.folder)}
    context = Context(run_id=7, node_id=2, node_config=config, state=RecordDict(), run_config={})
    with pytest.raises(FedmixError, match="names another site"):
        client_app.from_node_config(context)
