"""The file that hospitals approve: its digest is its bytes', and what disagrees within it is refused."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from little import values

from fedmix import config
from fedmix.deployment import plan as plans
from fedmix.deployment.plan import Plan
from fedmix.errors import ConfigError


def experiment(**changes: Any) -> config.Experiment:
    return config.build(values(Path("/srv/alice"), **changes))


def made(sites: tuple[str, ...] = ("north", "south", "west"), wanted: config.Experiment | None = None) -> Plan:
    return Plan.of(wanted or experiment(), sites, coordinator="hub.example:9443", valid_days=30)


def changed(path: Path, **changes: Any) -> Path:
    """The plan with some of its values replaced."""
    held = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(held | changes))
    return path


def test_a_plan_is_read_as_it_was_written_and_named_by_its_bytes(tmp_path: Path) -> None:
    plan = made()
    said = plans.write(plan, tmp_path / "plan.yaml")
    assert plans.read(tmp_path / "plan.yaml") == plan
    assert said == plans.digest(tmp_path / "plan.yaml") == hashlib.sha256((tmp_path / "plan.yaml").read_bytes()).hexdigest()
    assert plan.resolved().fingerprint() == plan.fingerprint == experiment().fingerprint()


def test_a_plan_over_some_sites_is_another_experiment_than_over_all() -> None:
    wanted = experiment(stages=[{"name": "all", "rounds": 1, "local_steps": 1, "batch_size": 4}])
    some = made(("west", "north"), wanted)
    assert some.sites == ("north", "west")
    assert [site["name"] for site in some.experiment["data"]["sites"]] == ["north", "west"]
    assert some.fingerprint != made(wanted=wanted).fingerprint
    assert some.fingerprint == plans.restrict(wanted, ["north", "west"]).fingerprint()


def test_a_site_that_the_experiment_does_not_know_and_a_stage_left_empty_are_refused() -> None:
    with pytest.raises(ConfigError, match="no site east; it has north, south, west"):
        made(("north", "east"))
    with pytest.raises(ConfigError, match="paired"):
        made(("north", "south"))


def test_the_coordinators_own_paths_do_not_travel(tmp_path: Path) -> None:
    wanted = values(Path("/srv/alice"))
    wanted["data"]["sites"][0] = {"name": "north", "stream": "image", "shard": "/srv/alice/shard"}
    wanted["data"]["held_out"] = {"shards": ["/srv/alice/held-out"]}
    wanted["model"]["warm_start"] = {"image": "/srv/alice/vit.safetensors"}
    plan = made(wanted=config.build(wanted))
    plans.write(plan, tmp_path / "plan.yaml")
    assert "alice" not in (tmp_path / "plan.yaml").read_text()
    assert plan.fingerprint == config.build(wanted).fingerprint()


def test_a_plan_that_sites_may_have_approved_is_not_overwritten(tmp_path: Path) -> None:
    plans.write(made(), tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match="choose another name"):
        plans.write(made(), tmp_path / "plan.yaml")


def test_what_disagrees_within_a_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plans.write(made(), path)
    whole = path.read_bytes()
    longer = yaml.safe_load(whole)["experiment"]
    longer["stages"][0]["rounds"] += 1
    for changes, words in [
        ({"experiment": longer}, "fingerprint is not its experiment's"),
        ({"sites": ["north", "south", "west", "east"]}, "sites are not its experiment's"),
        ({"name": "harmless"}, "name or sites"),
        ({"code": "0"}, "not a plan of this version"),
        ({"also": "this"}, r"also: extra inputs are not permitted"),
    ]:
        path.write_bytes(whole)
        with pytest.raises(ConfigError, match=words):
            plans.read(changed(path, **changes))


@pytest.mark.parametrize(
    "text", ["", "[]", "a: b", "!!python/object/apply:os.system [ls]", "a: &a [*a]", "\0", "x" * (2 << 20)]
)
def test_what_is_no_plan_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError):
        plans.read(tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match="cannot read the plan: No such file"):
        plans.read(tmp_path / "none.yaml")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(min_value=0), value=st.integers(min_value=1, max_value=255))
def test_one_changed_byte_is_another_plan(place: int, value: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    if not path.exists():
        plans.write(made(), path)
    before, content = plans.digest(path), bytearray(path.read_bytes())
    content[place % len(content)] ^= value
    (tmp_path / "other.yaml").write_bytes(content)
    assert plans.digest(tmp_path / "other.yaml") != before


def test_a_plan_ends_with_its_last_day() -> None:
    plan = made()
    assert (plan.valid_until - plan.created.date()).days == 30
    assert plan.is_valid_on(plan.valid_until)
    assert not plan.is_valid_on(plan.valid_until + datetime.timedelta(days=1))


def test_the_code_hash_follows_the_installed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in plans.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(package)
    monkeypatch.setattr(plans, "find_spec", lambda name: Found([str(tmp_path / name)]))
    before = plans.code_hash()
    (tmp_path / "client" / "notes.txt").write_text("not code")
    assert plans.code_hash() == before
    (tmp_path / "client" / "tokens.json").write_text("{}")
    after = plans.code_hash()
    assert after != before
    (tmp_path / "client" / "tokens.json").rename(tmp_path / "server" / "tokens.json")
    assert plans.code_hash() not in (before, after)


class Found:
    def __init__(self, places: list[str]) -> None:
        self.submodule_search_locations = places


def test_hashes_of_this_installation_are_the_same_twice() -> None:
    assert plans.code_hash() == plans.code_hash()
    assert plans.lock_hash() == plans.lock_hash()
