"""The gate in a secure sum: nothing leaves that is not exactly what a phase has a site send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.fernet import Fernet
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hospitals import answer, approved, hospital, refused
from little import World, everyone
from torch import Size

from client import approval, messages
from client.home import Home
from client.secure import letter_bytes
from client.secure_gate import check_masked
from fedmix.deployment import plan as plans
from fedmix.errors import PolicyError
from server import messages as server_messages

ATTEMPT = "a" * 32


@pytest.fixture
def world(tmp_path: Path) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    return World(tmp_path, everyone(tmp_path, aggregation={"clip": None}, secure_sum={"threshold": 2}))


@pytest.fixture
def made(world: World, tmp_path: Path) -> Home:
    return hospital(tmp_path / "west", world)


def key_of(made: Home) -> str:
    return " ".join(made.public_key.read_text().split()[:2])


def planned(folder: Path, world: World, **keys: str) -> Path:
    """A plan that names these keys."""
    sites = [site.name for site in world.experiment.data.sites]
    plan = plans.Plan.of(world.experiment, sites, coordinator="fedmix.example:9092", valid_days=3, keys=keys)
    plans.write(plan, folder / "plan.yaml")
    return folder / "plan.yaml"


def asked(world: World, plan: str, phase: str = "keys", **changes: Any) -> Message:
    """A message of a phase."""
    summing = server_messages.Summing("run", 1, world.experiment.fingerprint(), plan, ATTEMPT)
    return server_messages.phase_message(2, phase, summing, ConfigRecord({"attempt": ATTEMPT} | changes), deadline_s=9.0)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, "does not name the registered key of each site"),
        ({"north": "n", "south": "s"}, "does not name the registered key of each site"),
        ({"north": "n", "south": "s", "west": "ecdsa-sha2-nistp384 other"}, "another key for this site than its own"),
    ],
)
def test_a_plan_without_this_site_s_key_is_not_approved(
    made: Home, world: World, tmp_path: Path, keys: dict[str, str], why: str
) -> None:
    with pytest.raises(PolicyError, match=why):
        approval.approve(made, planned(tmp_path, world, **keys))


def test_a_policy_that_asks_for_secure_sums_admits_a_plan_that_has_them(made: Home, world: World, tmp_path: Path) -> None:
    made.policy_file.write_text("{min_studies: 5, privacy: {secure_sum: true}}\n")
    plan = approved(made, planned(tmp_path, world, north="n", south="s", west=key_of(made)))
    said = answer(made, asked(world, plan))
    assert not said.has_error()
    assert said.content.config_records["keys"]["signer"] == key_of(made)
    sent = next(entry for entry in made.ledger().entries() if entry["event"] == "sent")
    assert sent["hash"] == said.content.config_records["receipt"]["ledger"]


def content(**values: Any) -> Callable[[Message], None]:
    return lambda said: said.content.config_records["keys"].update(values)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (content(note="a report's text"), "fields that nobody asked for"),
        (content(signature=b"0" * 105), "another size than signatures"),
        (content(signature=b"0" * 90), "not that of its key"),
        (content(content=b"{}"), "not in the form"),
        (lambda said: said.content.update({"more": ConfigRecord({})}), "none of a secure sum's"),
        (lambda said: said.content.config_records["receipt"].update({"site": "north"}), "not of the message"),
        (lambda said: said.content.config_records["receipt"].update({"attempt": "text"}), "not of the message"),
    ],
)
def test_keys_leave_in_their_exact_form_only(
    made: Home, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Message], None], why: str
) -> None:
    reply = messages.phase_reply

    def changed(*arguments: Any) -> Message:
        said = reply(*arguments)
        change(said)
        return said

    monkeypatch.setattr(messages, "phase_reply", changed)
    plan = approved(made, planned(tmp_path, world, north="n", south="s", west=key_of(made)))
    assert why in refused(made, asked(world, plan))


def test_keys_that_are_passed_on_unsigned_by_the_plan_s_key_are_refused(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, planned(tmp_path, world, north="n", south="s", west=key_of(made)))
    own = answer(made, asked(world, plan)).content.config_records["keys"]
    other = hospital(tmp_path / "north", world, "north")
    named = tmp_path / "other"
    named.mkdir()
    elsewhere = approved(other, planned(named, world, north=key_of(other), south="s", west=key_of(made)))
    theirs = answer(other, asked(world, elsewhere)).content.config_records["keys"]
    roster = {f"{name}s": [own[name], theirs[name]] for name in ("content", "signature", "signer")}
    assert "site north are not signed by the key that the plan names" in refused(made, asked(world, plan, "shares", **roster))


def test_an_unknown_phase_is_not_answered(made: Home, world: World, tmp_path: Path) -> None:
    plan = approved(made, planned(tmp_path, world, north="n", south="s", west=key_of(made)))
    with pytest.raises(ValueError, match="No query function registered"):
        answer(made, asked(world, plan, "everything"))
    assert "another attempt" in refused(made, asked(world, plan, "unmask", sites=["west"], signatures=[b""]))


def test_a_letter_has_the_size_that_its_towers_give_it() -> None:
    fernet = Fernet(Fernet.generate_key())
    for number in range(5):
        assert len(fernet.encrypt(bytes(20 + 120 * number))) == letter_bytes(number)


class Stub:
    """What ``check_masked`` asks of an admitted message."""

    stream = "image"

    def __init__(self, world: World) -> None:
        self.experiment = world.experiment


@pytest.mark.parametrize(
    ("masked", "seal", "why"),
    [
        ({"image": np.zeros(6, np.float32)}, {}, "not 6 words"),
        ({"image": np.zeros(7, np.uint32)}, {}, "not 6 words"),
        ({"image": np.zeros((2, 3), np.uint32)}, {}, "not 6 words"),
        ({"text": np.zeros(6, np.uint32)}, {}, "none of this site's towers"),
        ({}, {}, "not of the order"),
        ({"image": np.zeros(6, np.uint32)}, {"attempt": "other"}, "not of the order"),
        ({"image": np.zeros(6, np.uint32)}, {"clipped": 7}, "not of the order"),
        ({"image": np.zeros(6, np.uint32)}, {"clipped": "text"}, "fields that nobody asked for"),
        ({"image": np.zeros(6, np.uint32)}, {"note": "text"}, "fields that nobody asked for"),
    ],
)
def test_a_masked_update_is_words_of_its_towers_and_nothing_else(
    world: World, masked: dict[str, Any], seal: dict[str, Any], why: str
) -> None:
    said = {"attempt": ATTEMPT, "clipped": 0, "signature": b"s"} | seal
    message = asked(world, "")
    message.metadata.__dict__["_message_id"] = "1"
    records: dict[str, Any] = {name: MetricRecord({}) for name in ("examples", "metrics", "second_moments")}
    records |= {"receipt": ConfigRecord({}), "sum": ConfigRecord(said)}
    records["masked"] = ArrayRecord({name: Array(words) for name, words in masked.items()})
    stub: Any = Stub(world)
    reply = Message(RecordDict(records), reply_to=message)
    with pytest.raises(PolicyError, match=why):
        check_masked(stub, message, reply, {"patch_decoder.weight": Size((6,))})
