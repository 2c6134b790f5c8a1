"""The gate in a federated evaluation: sums of known measures over enough patients leave, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hospitals import answer, approved, hospital, refused, set_policy, written_plan
from little import World, scoring
from test_app import order

from client import approval, messages, scored
from client.home import Home
from fedmix.data.shard import Shard
from fedmix.deployment.ledger import Ledger
from fedmix.errors import PolicyError, RunError

ALLOWED = ["*/loss", "score/*"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    folder = tmp_path_factory.mktemp("scoring")
    return World(folder, scoring(folder))


@pytest.fixture
def made(world: World, tmp_path: Path) -> Home:
    return hospital(tmp_path / "west", world, metrics=ALLOWED)


@pytest.fixture
def plan(made: Home, world: World, tmp_path: Path) -> str:
    return approved(made, written_plan(tmp_path, world))


def question(world: World, plan: str, **changes: Any) -> Message:
    """The server's question how good its last model is."""
    trained = order(world, "paired", parameters=world.initial(), plan=plan, ledger="1" * 64, **changes)
    return Message(trained.content, 2, "evaluate")


def hostile(monkeypatch: pytest.MonkeyPatch, change: Callable[[RecordDict], object]) -> None:
    """Have the job's answer changed before the gate sees it."""
    honest = messages.scores_reply

    def changed(*args: Any) -> Message:
        said = honest(*args)
        change(said.content)
        return said

    monkeypatch.setattr(messages, "scores_reply", changed)


def test_what_leaves_is_a_receipt_and_sums_and_the_ledger_names_them(made: Home, world: World, plan: str) -> None:
    reply = answer(made, question(world, plan))
    assert not reply.has_error(), reply.error.reason
    assert set(reply.content) == {"receipt", "scores"}
    scores = reply.content.metric_records["scores"]
    assert set(scores) == {"score/psnr_db", "score/bits_per_token", "score/r1_of_32"}
    assert all([type(value) for value in pair] == [float, float] for pair in scores.values())  # type: ignore[union-attr]
    entry = list(Ledger(made.ledger_file).entries())[-1]
    assert (entry["event"], entry["kind"], entry["metrics"]) == ("sent", "evaluate", sorted(scores))
    assert reply.content.config_records["receipt"]["ledger"] == entry["hash"]


def test_a_policy_that_does_not_name_scores_lets_none_leave(made: Home, world: World, plan: str) -> None:
    set_policy(made)
    assert refused(made, question(world, plan)) == "this site's policy does not let 3 of the reply's metrics leave"
    set_policy(made, metrics=ALLOWED, records=["greeting", "receipt", "metrics", "deltas"])
    assert "1 of the reply's records" in refused(made, question(world, plan))


def test_a_review_names_the_scores_and_whether_the_policy_lets_them_leave(made: Home, world: World, tmp_path: Path) -> None:
    path = written_plan(tmp_path, world)
    found = approval.review(made, path)
    assert (found.scores, found.keeps_scores) == (("score/psnr_db", "score/bits_per_token", "score/r1_of_32"), False)
    set_policy(made)
    assert approval.review(made, path).keeps_scores


def test_scores_of_fewer_patients_than_the_policy_says_do_not_leave(
    made: Home, world: World, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_policy(made, metrics=ALLOWED, min_patients=60)
    reply = answer(made, question(world, plan))
    assert dict(reply.content.metric_records["scores"]) == {}
    hostile(monkeypatch, lambda content: content["scores"].update({"score/psnr_db": [1.0, 1.0]}))
    assert "scores of fewer patients" in refused(made, question(world, plan))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update({"reports": ConfigRecord({"text": "No pleural effusion."})}),
        lambda content: content["receipt"].update({"note": "No pleural effusion."}),
        lambda content: content["receipt"].update({"nonce": "No pleural effusion."}),
        lambda content: content["scores"].update({"score/patients": [19480401.0, 1.0]}),
        lambda content: content["scores"].update({"score/psnr_db": [1.0, 1.0, 19480401.0]}),
        lambda content: content["scores"].update({"score/psnr_db": [1.0, 0.0]}),
        lambda content: content["scores"].update({"score/psnr_db": [float("inf"), 1.0]}),
        lambda content: content["scores"].update({"score/psnr_db": 19480401.0}),
        lambda content: content.update({"scores": ConfigRecord({"score/psnr_db": "No pleural effusion."})}),
    ],
)
def test_nothing_is_smuggled_out_with_scores(
    made: Home, world: World, plan: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[RecordDict], object]
) -> None:
    hostile(monkeypatch, change)
    assert refused(made, question(world, plan)).startswith("the reply")


def test_only_the_last_model_of_the_plan_is_scored_and_only_a_few_times(made: Home, world: World, plan: str) -> None:
    assert "another experiment" in refused(made, question(world, plan, fingerprint="0" * 64))
    assert "the last round's model at most" in refused(made, question(world, plan, round=2))
    for _ in range(3):
        assert not answer(made, question(world, plan)).has_error()
    assert refused(made, question(world, plan)) == "this site has scored 3 models under the plan, and scores no more"


def test_a_plan_that_asks_for_no_scores_gets_none(made: Home, world: World, tmp_path: Path) -> None:
    values = world.experiment.model_dump(mode="json") | {"evaluation": {}}
    plain = World(tmp_path / "plain", values)
    plan = approved(made, written_plan(tmp_path, plain, name="plain.yaml"))
    assert "has it score the last round's model at most" in refused(made, question(plain, plan))


def test_a_model_that_was_damaged_on_its_way_is_not_scored(made: Home, world: World, plan: str) -> None:
    asked = question(world, plan)
    asked.content["parameters"].popitem()
    assert "server" in refused(made, asked)
    assert "hash differs" in refused(made, question(world, plan, base="0" * 64))


# ---- sums over nearly the same patients


def of(numbers: Iterable[int]) -> frozenset[str]:
    return frozenset(f"{number:064x}" for number in numbers)


def test_patients_who_are_scored_again_are_the_same_or_so_many_others_that_none_stands_alone(made: Home) -> None:
    scored.check_apart(made, of(range(50)), 20)
    scored.check_apart(made, of(range(50)), 20)
    for few in (range(51), range(49), range(1, 51), range(69)):
        with pytest.raises(PolicyError, match="but for a few"):
            scored.check_apart(made, of(few), 20)
    scored.check_apart(made, of(range(70)), 20)
    with pytest.raises(PolicyError, match="but for a few"):
        scored.check_apart(made, of(range(55)), 20)  # of the first set
    assert made.scored_file.stat().st_mode & 0o777 == 0o600
    made.scored_file.write_text("[")
    with pytest.raises(RunError, match="restore scored"):
        scored.check_apart(made, of(range(50)), 20)


def test_a_site_whose_held_out_patients_changed_a_little_since_it_scored_them_scores_no_more(
    made: Home, world: World, plan: str
) -> None:
    assert not answer(made, question(world, plan)).has_error()
    (known,) = json.loads(made.scored_file.read_text())
    shard = Shard.open(made.settings().shard)
    assert len(known) == len(set(shard.patient[[*shard.select("val", "paired"), *shard.select("test", "paired")]]))
    made.scored_file.write_text(json.dumps([["0" * 64, *known[1:]]]))  # one patient was another one then
    assert "but for a few" in refused(made, question(world, plan))
