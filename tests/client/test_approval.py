"""A person's yes or no to a plan's exact bytes."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity
from hospitals import answer, hospital, query, refused, set_policy, written_plan
from little import World, values

from client import approval
from client.home import Home
from fedmix.deployment import plan as plans
from fedmix.errors import ConfigError, PolicyError

YESTERDAY = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    return World(tmp_path, values(tmp_path))


@pytest.fixture
def made(world: World, tmp_path: Path) -> Home:
    return hospital(tmp_path / "west", world)


def events(made: Home) -> list[str]:
    return [json.loads(line)["event"] for line in made.ledger_file.read_text().splitlines()]


def test_a_review_says_what_would_leave(made: Home, world: World, tmp_path: Path) -> None:
    path = written_plan(tmp_path, world)
    found = approval.review(made, path)
    assert found.digest == plans.digest(path)
    assert (found.stream, found.rounds) == ("paired", 2)
    assert (found.is_same_code, found.is_same_lock, found.hindrances) == (True, True, ())
    assert {"image.embedding", "text.head", "pair.projection"} <= set(found.groups)
    sizes = sum(value.numel() * 4 for value in world.initial().values())
    assert found.bytes_a_round == sizes  # a paired site trains everything, in float32


def test_an_image_site_sends_no_words(world: World, tmp_path: Path) -> None:
    found = approval.review(hospital(tmp_path / "north", world, "north"), written_plan(tmp_path, world))
    assert not [group for group in found.groups if "text" in group or "pair" in group]
    assert found.rounds == 1


def test_an_approved_plan_is_kept_byte_for_byte_and_written_down(made: Home, world: World, tmp_path: Path) -> None:
    path = written_plan(tmp_path, world)
    digest = approval.approve(made, path)
    assert made.approved(digest).read_bytes() == path.read_bytes()
    assert approval.approve(made, path) == digest
    assert events(made) == ["created", "approved", "approved"]
    assert [file.name for file in made.plans.iterdir()] == [f"{digest}.yaml"]


@pytest.mark.parametrize(
    ("changes", "policy", "cause"),
    [
        ({"code": "0" * 64}, {}, "another fedmix than the one that is installed at this site; install the version"),
        ({"valid_until": YESTERDAY}, {}, f"was valid until {YESTERDAY}"),
        ({"coordinator": "elsewhere.example:9092"}, {}, "the plan is of coordinator elsewhere.example:9092"),
        ({}, {"max_rounds": 2}, "the plan has 3 rounds, this site's policy gives 2"),
        ({}, {"privacy": {"secure_sum": True}}, "asks for secure sums, which the plan does not have"),
        ({}, {"privacy": {"epsilon": 3.0}}, "asks for differential privacy, which the plan does not have"),
        ({}, {"groups": ["image.*"]}, "this site's policy does not let"),
        ({}, {"metrics": []}, "does not let 3 of the reply's metrics leave"),
        ({}, {"min_studies": 5000}, "this site takes part with 5000 training studies or more, and has fewer"),
    ],
)
def test_a_plan_that_could_not_run_here_is_not_approved(
    changes: dict[str, Any], policy: dict[str, Any], cause: str, made: Home, world: World, tmp_path: Path
) -> None:
    path = written_plan(tmp_path, world, **changes)
    set_policy(made, **policy)
    assert cause in approval.review(made, path).hindrances[0]
    with pytest.raises(PolicyError, match=cause.replace(".", r"\.")):
        approval.approve(made, path)
    assert list(made.plans.iterdir()) == []


def test_a_plan_is_not_approved_without_the_shard(made: Home, world: World, tmp_path: Path) -> None:
    path, settings = written_plan(tmp_path, world), made.settings_file.read_text()
    made.settings_file.write_text(settings.replace(str(made.settings().shard), str(tmp_path / "moved")))
    with pytest.raises(PolicyError, match="shard"):
        approval.approve(made, path)


def test_a_plan_of_other_sites_is_not_approved(made: Home, world: World, tmp_path: Path) -> None:
    plan = plans.Plan.of(world.experiment, ["north", "south", "west"], coordinator="fedmix.example:9092", valid_days=3)
    path = tmp_path / "others.yaml"
    plans.write(plan, path)
    other = hospital(tmp_path / "east", world)
    other.settings_file.write_text(other.settings_file.read_text().replace("name: west", "name: east"))
    assert approval.review(other, path).rounds == 0
    with pytest.raises(PolicyError, match="does not name site east"):
        approval.approve(other, path)


def test_a_file_that_is_no_plan_is_not_approved(made: Home, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("name: demo")
    with pytest.raises(ConfigError, match="not a plan"):
        approval.approve(made, path)
    with pytest.raises(ConfigError, match="cannot read the plan"):
        approval.approve(made, tmp_path / "none.yaml")
    assert list(made.plans.iterdir()) == []


def test_a_denied_plan_ends_and_stays_denied(made: Home, world: World, tmp_path: Path) -> None:
    path = written_plan(tmp_path, world)
    digest = approval.approve(made, path)
    assert not answer(made, query(digest, world)).has_error()
    assert approval.deny(made, digest) == digest
    assert refused(made, query(digest, world)) == f"this site has denied plan {digest[:12]}"
    with pytest.raises(PolicyError, match="the plan was denied here"):
        approval.approve(made, path)
    assert approval.deny(made, str(path)) == digest
    assert made.denied_file.read_text() == f"{digest}\n"
