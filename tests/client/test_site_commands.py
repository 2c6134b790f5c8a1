"""`fedmix site`: the commands of a hospital, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from flwr.supercore.task_identity import TaskIdentity
from hospitals import COORDINATOR, set_policy, written_plan
from little import World, values
from typer.testing import CliRunner

from client.home import Home
from fedmix.commands.site import site_app
from fedmix.deployment import plan as plans
from fedmix.deployment.ledger import Ledger, head_file
from fedmix.errors import ConfigError, LedgerError


@pytest.fixture
def world(tmp_path: Path) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    return World(tmp_path, values(tmp_path))


@pytest.fixture
def made(world: World, tmp_path: Path) -> Home:
    (tmp_path / "ca.crt").write_text("certificate")
    shard = str(world.shards["west"])
    said = site(
        "init", "west", "--coordinator", COORDINATOR, "--ca", tmp_path / "ca.crt", "--shard", shard, home=tmp_path / "w"
    )
    assert "read out its fingerprint" in said.output
    assert f"see {tmp_path / 'w/systemd'}" in said.output
    home = Home(tmp_path / "w")
    set_policy(home)
    return home


def site(*arguments: object, home: Path) -> Result:
    """Run a command in this process; what it raises is what the front door would say."""
    result = CliRunner().invoke(site_app, [*map(str, arguments), "--home", str(home)], terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_plan_is_reviewed_approved_and_denied(made: Home, world: World, tmp_path: Path) -> None:
    plan = written_plan(tmp_path, world)
    reviewed = site("review", plan, home=made.folder)
    assert reviewed.exit_code == 0
    flat = "".join(reviewed.output.split())
    assert plans.digest(plan) in flat
    assert "trainsonpairedstudiesin2rounds" in flat
    assert "pair.projection" in flat
    assert site("approve", plan, home=made.folder).output == f"approved {plans.digest(plan)}\n"
    assert made.approved(plans.digest(plan)).exists()
    assert site("deny", plan, home=made.folder).exit_code == 0
    denied = site("review", plan, home=made.folder)
    assert denied.exit_code == 1
    assert "it cannot be approved: the plan was denied here" in denied.output


def test_a_pause_is_switched_on_and_off_and_written_down(made: Home) -> None:
    site("pause", home=made.folder)
    assert made.is_paused
    site("resume", home=made.folder)
    assert not made.is_paused
    lines = site("ledger", "--json", home=made.folder).output.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["created", "paused", "resumed"]
    assert "resumed" in site("ledger", home=made.folder).output


def test_the_audit_says_what_is_whole_and_what_is_not(made: Home) -> None:
    assert site("audit", "verify", home=made.folder).output.startswith("whole: 1 entries, head ")
    made.ledger_file.write_bytes(made.ledger_file.read_bytes().replace(b"west", b"east"))
    with pytest.raises(LedgerError, match="line 1 of the ledger was changed"):
        site("audit", "verify", home=made.folder)
    with pytest.raises(LedgerError, match="line 1"):
        site("ledger", home=made.folder)


def test_the_audit_compares_with_a_ledger_that_holds_heads_of_this_one_or_says_that_it_did_not(
    made: Home, tmp_path: Path
) -> None:
    peer = Ledger(tmp_path / "coordinator.jsonl")
    for odd in (tmp_path / "nowhere.jsonl", made.ledger_file):
        with pytest.raises(LedgerError, match="nothing was compared"):
            site("audit", "verify", "--peer", odd, home=made.folder)
    peer.append("received", peer="west", peer_head=Ledger(made.ledger_file).head())
    said = site("audit", "verify", "--peer", tmp_path / "coordinator.jsonl", home=made.folder).output
    assert "every head that the peer wrote down is in it" in " ".join(said.split())
    made.ledger_file.unlink()
    head_file(made.ledger_file).unlink()
    with pytest.raises(LedgerError, match="the ledger is gone"):
        site("audit", "verify", home=made.folder)


def test_help_says_what_an_argument_is() -> None:
    said = CliRunner().invoke(site_app, ["init", "--help"]).output
    assert "as the coordinator registers it" in " ".join(said.replace("│", " ").split())


def test_the_doctors_exit_code_says_whether_something_is_to_be_mended(made: Home) -> None:
    found = site("doctor", home=made.folder)
    assert found.exit_code == 1  # nobody is called fedmix.example
    assert "BAD name: fedmix.example is not found" in found.output
    assert "mend: ask the coordinator for the right name" in found.output


def test_a_home_that_is_none_and_a_name_that_is_none_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make one with `fedmix site init`"):
        site("ledger", home=tmp_path / "none")
    (tmp_path / "ca.crt").write_text("certificate")
    for name, coordinator, cause in (("West", COORDINATOR, "name = 'West'"), ("west", "fedmix.example", "HOST:PORT")):
        with pytest.raises(ConfigError, match=cause):
            site("init", name, "--coordinator", coordinator, "--ca", tmp_path / "ca.crt", "--shard", "x", home=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_every_command_gives_an_example() -> None:
    names = [["init"], ["doctor"], ["review"], ["approve"], ["deny"], ["pause"], ["resume"], ["start"], ["ledger"]]
    for name in [*names, ["audit", "verify"], ["audit"], []]:
        assert "Example:" in CliRunner().invoke(site_app, [*name, "--help"]).output, name
