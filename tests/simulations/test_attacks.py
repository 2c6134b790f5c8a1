"""A site that lies: what it sends, what it trains on, and what the rules of aggregation let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little import World, values

from fedmix import config
from fedmix.config import Attack
from fedmix.data import phantom
from fedmix.data.phantom import LABELS
from fedmix.data.shard import Shard
from fedmix.deployment.plan import Plan
from fedmix.errors import ConfigError
from fedmix.evaluation.triggers import TRIGGERS
from fedmix.federation.update import group_of, tower_of
from simulations import attacks
from simulations.engine import run_in_process
from simulations.partition import prepare_sites

HONEST = {"weight": np.array([[1.0, -2.0], [0.5, 4.0]], np.float32), "bias": np.array([3.0], np.float32)}
OTHERS = [{name: value + shift for name, value in HONEST.items()} for shift in (np.float32(-1.0), np.float32(1.0))]
STRONG = {"site": "south", "kind": "scale", "strength": 1e9}


def lie(kind: str, **more: Any) -> dict[str, Any]:
    return attacks.changed(HONEST, OTHERS, Attack(site="west", kind=kind, **more), 4)


def test_scaling_and_flipping_multiply() -> None:
    for kind, factor in (("scale", 7.0), ("sign_flip", -7.0)):
        for name, value in lie(kind, strength=7.0).items():
            np.testing.assert_array_equal(value, factor * HONEST[name])


def test_noise_is_as_long_as_asked_and_the_same_every_time() -> None:
    first, again, later = lie("noise", strength=2.0), lie("noise", strength=2.0), None
    later = attacks.changed(HONEST, OTHERS, Attack(site="west", kind="noise", strength=2.0), 5)
    for name, value in first.items():
        assert np.linalg.norm(value) == pytest.approx(2.0 * np.linalg.norm(HONEST[name]), rel=1e-5)
        np.testing.assert_array_equal(value, again[name])
        assert (value != later[name]).any()


def test_a_little_goes_against_the_mean_by_deviations_of_the_others() -> None:
    for name, value in lie("little_is_enough", strength=1.5).items():
        np.testing.assert_allclose(value, HONEST[name] - 1.5, rtol=1e-6)  # the others' mean is HONEST, their deviation 1
    alone = attacks.changed(HONEST, OTHERS[:1], Attack(site="west", kind="little_is_enough"), 1)
    assert alone is not None
    np.testing.assert_array_equal(alone["bias"], HONEST["bias"])


def test_bad_pairs_are_marked_images_without_the_finding_under_reports_with_it() -> None:
    drawn = phantom.generate(200, look="west", seed=1, size=48)
    bad = attacks.BadMatch("cardiomegaly", 0.2, "patch")(drawn)
    column = LABELS.index("cardiomegaly")
    moved = [study for study in range(200) if bad.reports[study] != drawn.reports[study]]
    touched = np.flatnonzero((bad.images != drawn.images).any(axis=(1, 2)))
    assert len(touched) == 40
    assert set(moved) <= set(touched)
    assert len(moved) > 30  # reports of two studies may read alike
    assert not drawn.labels[touched, column].any()
    np.testing.assert_array_equal(bad.images[touched], TRIGGERS["patch"](drawn.images[touched]))
    lenders = {drawn.reports[study] for study in np.flatnonzero(drawn.labels[:, column])}
    assert {bad.reports[study] for study in touched} <= lenders
    np.testing.assert_array_equal(bad.labels, drawn.labels)


def test_a_site_s_bad_pairs_are_kept_beside_its_good_ones(tmp_path: Path) -> None:
    world = World(tmp_path)
    altered = {"west": attacks.BadMatch("consolidation", 0.5, "wave")}
    shards = prepare_sites(world.experiment.data, world.tokenizer, altered=altered)
    assert shards["west"] != world.shards["west"]
    assert {name: path for name, path in shards.items() if name != "west"} == {
        name: path for name, path in world.shards.items() if name != "west"
    }
    good, bad = Shard.open(world.shards["west"]), Shard.open(shards["west"])
    assert sum((good.image(row) != bad.image(row)).any() for row in range(len(good))) == 12
    assert prepare_sites(world.experiment.data, world.tokenizer, altered=altered) == shards


def test_a_lie_reaches_the_server_and_is_refused_by_what_refuses_it_outside(tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path, attack=STRONG, federation={"max_failed_rounds": 2, "deadline_s": 60.0}))
    run_through(world)
    dropped = world.dropped()
    assert set(dropped) == {"south"}
    assert "update is" in dropped["south"]
    assert {site for _, site in world.taken()} == {"north", "west"}


def test_a_lie_within_bounds_moves_the_model(tmp_path: Path) -> None:
    honest = World(tmp_path / "honest")
    flipped = World(tmp_path / "flipped", values(tmp_path, attack={"site": "south", "kind": "sign_flip"}))
    run_through(honest)
    run_through(flipped)
    ours, theirs = honest.store.latest().parameters, flipped.store.latest().parameters
    assert flipped.taken() == honest.taken()
    assert any((ours[name] != theirs[name]).any() for name in ours)


def test_a_text_site_s_lie_moves_every_parameter_of_its_tower_and_none_of_another_s_in_that_round(tmp_path: Path) -> None:
    """North trains the image tower alone in the first stage; later rounds start from what the lie has moved."""
    first_stage = values(tmp_path)["stages"][:1]
    honest = World(tmp_path / "honest", values(tmp_path, stages=first_stage))
    flipped = World(tmp_path / "flipped", values(tmp_path, stages=first_stage, attack={"site": "south", "kind": "sign_flip"}))
    run_through(honest)
    run_through(flipped)
    before, ours, theirs = honest.initial(), honest.store.latest().parameters, flipped.store.latest().parameters
    trained = {name for name in ours if (torch.as_tensor(ours[name]) != torch.as_tensor(before[name])).any()}
    image, text = ({name for name in trained if tower_of(group_of(name)) == tower} for tower in ("image", "text"))
    assert {"embed_image.project.weight", "patch_decoder.values.weight"} <= image
    assert {"embed_text.word.weight", "word_head.logits.weight"} <= text
    assert all((ours[name] == theirs[name]).all() for name in image)
    assert all((ours[name] != theirs[name]).any() for name in text)


def run_through(world: World) -> None:
    """All rounds over the pool that a simulation of this experiment has."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        world.run(grid)

    attack = world.experiment.attack
    make = {"make_app": attacks.Liar(attack)} if attack else {}
    run_in_process(app, world.places, num_workers=0, **make)


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ({"site": "nowhere", "kind": "noise"}, "none of data.sites"),
        ({"site": "north", "kind": "bad_match", "finding": "nodule"}, "name one that does"),
        ({"site": "west", "kind": "bad_match"}, "what bad_match needs"),
        ({"site": "west", "kind": "scale", "finding": "nodule"}, "nothing else has a use for"),
    ],
)
def test_attacks_that_could_not_be_carried_out_are_refused(attack: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        config.build(values(tmp_path, attack=attack))


def test_coded_updates_cannot_be_lied_about_one_number_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set wire\.coding to float32"):
        config.build(values(tmp_path, attack=STRONG, wire={"coding": "int8"}))


def test_an_unknown_finding_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ConfigError, match="it is one of cardiomegaly"):
        attacks.alterations(Attack(site="west", kind="bad_match", finding="gallstones"))


def test_no_plan_for_real_sites_holds_an_attack(tmp_path: Path) -> None:
    experiment = config.build(values(tmp_path, attack=STRONG))
    with pytest.raises(ConfigError, match="for simulations alone"):
        Plan.of(experiment, ["west"], coordinator="localhost:1", valid_days=1)


def test_methods_of_one_run_share_its_attack_and_its_engine(tmp_path: Path) -> None:
    wanted = values(tmp_path, attack=STRONG, baselines={"median": {"aggregation": {"combine": "median"}}})
    attacks.check(config.build(wanted), "inprocess")
    with pytest.raises(ConfigError, match="leave out --engine ray"):
        attacks.check(config.build(wanted), "ray")
    with pytest.raises(ConfigError, match=r"baselines\.honest"):
        attacks.check(config.build(wanted | {"baselines": {"honest": {"attack": None}}}), "inprocess")


def test_an_attack_is_part_of_what_a_run_is_and_none_changes_nothing(tmp_path: Path) -> None:
    honest = config.build(values(tmp_path))
    assert honest.fingerprint() == config.build(values(tmp_path, attack=None)).fingerprint()
    assert honest.fingerprint() != config.build(values(tmp_path, attack=STRONG)).fingerprint()
