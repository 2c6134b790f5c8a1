"""What is reported about a round, against plain vectors."""

from __future__ import annotations

import math
import time

import pytest
import sites
import tiny
import torch
from sites import ATTENTION, DECODER, HEAD, IMAGE, SHAPES, SHARED, TEXT, drawn, site

from fedmix import config
from fedmix.federation.diagnostics import MAX_COMPARED, diagnose
from fedmix.federation.update import Update
from fedmix.federation.weights import weights_of

AWARE = config.Aggregation(normalise_steps=False)


def facts(updates: list[Update], rule: config.Aggregation = AWARE) -> dict[str, float]:
    return diagnose(updates, SHAPES, weights_of(updates, rule))


def vector(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def test_norms_weights_and_cosines_by_hand() -> None:
    """(3, 4, 0, 0) and (4, 3, 0, 0): lengths 5 and 5, cosine 24 / 25."""
    found = facts([site("b", vector([4, 3, 0, 0]), image=10), site("a", vector([3, 4, 0, 0]), image=30)])
    assert found["norm/image.decoder/a"] == pytest.approx(5.0)
    assert found["cosine/image.decoder/a:b"] == pytest.approx(24 / 25)
    assert found["cosine/shared/a:b"] == pytest.approx(24 / 25)
    assert found["weight/block0.attention/a"] == pytest.approx(0.75)
    assert {path.split("/")[0] for path in found} == {"norm", "cosine", "weight"}


def test_streams_are_compared_by_their_weighted_sums() -> None:
    """Images: .75 of (1, 0) and .25 of (0, 3), which is along (1, 1); pairs along (1, 0): 1 / root 2."""
    updates = [
        site("a", vector([1, 0, 0, 0]), image=30),
        site("b", vector([0, 3, 0, 0]), image=10),
        site("d", vector([2, 0, 0, 0]), paired=4),
        site("t", vector([0, 0, -1, 0]), text=4),
    ]
    found = facts(updates)
    assert found["cosine/image.decoder/image:paired"] == pytest.approx(1 / math.sqrt(2))
    assert found["cosine/shared/image:paired"] == pytest.approx(1 / math.sqrt(2))
    assert found["cosine/shared/image:text"] == pytest.approx(0.0)
    assert "cosine/image.decoder/image:text" not in found


def test_the_trunk_is_all_shared_groups_together() -> None:
    """Two attention groups, (1, 0) and (0, 2) against (1, 0) and (0, -1): (1 - 2) / (root 5 x root 2)."""
    second = "blocks.1.attention.qkv.weight"
    shapes = {SHARED: torch.Size([1, 2]), second: torch.Size([1, 2])}
    updates = [
        Update("a", {SHARED: vector([[1.0, 0.0]]), second: vector([[0.0, 2.0]])}, {"image": 1}, 1),
        Update("b", {SHARED: vector([[1.0, 0.0]]), second: vector([[0.0, -1.0]])}, {"image": 1}, 1),
    ]
    found = diagnose(updates, shapes, weights_of(updates, AWARE))
    assert found["cosine/shared/a:b"] == pytest.approx(-1 / math.sqrt(10))
    assert found["cosine/block0.attention/a:b"] == pytest.approx(1.0)
    assert found["cosine/block1.attention/a:b"] == pytest.approx(-1.0)


def test_sites_of_weight_zero_have_their_weight_and_nothing_else() -> None:
    updates = [site("a", float("inf"), image=5), site("d", 1.0, paired=5), site("e", 2.0, paired=5)]
    found = facts(updates, config.Aggregation(rule="paired_only"))
    assert {path: value for path, value in found.items() if path.endswith("/a") or "a:" in path} == {
        "weight/block0.attention/a": 0.0,
        "weight/image.decoder/a": 0.0,
    }
    assert all(math.isfinite(value) for value in found.values())


def test_a_change_of_zero_has_a_length_and_no_direction() -> None:
    found = facts([site("a", 0.0, image=1), site("b", 1.0, image=1)])
    assert found["norm/image.decoder/a"] == 0.0
    assert not [path for path in found if path.startswith("cosine")]


def test_site_that_mixes_streams_is_in_none_of_their_sums() -> None:
    across, up = vector([1, 0, 0, 0]), vector([0, 1, 0, 0])
    found = facts([site("a", across, image=1), site("b", up, image=1, text=1), site("c", -across, text=1)])
    assert found["cosine/shared/image:text"] == pytest.approx(-1.0)
    assert "cosine/image.decoder/image:text" not in found
    assert "cosine/image.decoder/a:b" in found


def test_many_sites_are_not_compared_in_pairs_but_their_streams_are() -> None:
    """The same lengths and streams as plain vectors give, where the sites are read one at a time."""
    counts = [{"image": k + 1} for k in range(5)] + [{"text": k + 1} for k in range(2)] + [{"paired": 3}] * (MAX_COMPARED - 5)
    updates = drawn(counts, 8)
    weights = weights_of(updates, AWARE)
    found = diagnose(updates, SHAPES, weights)
    assert not [path for path in found if "site" in path.rpartition(":")[2] and path.startswith(f"cosine/{ATTENTION}/")]
    sums = {
        stream: sum(weights[ATTENTION][one.site] * one.deltas[SHARED].flatten() for one in updates if one.examples.get(stream))
        for stream in ("image", "text", "paired")
    }
    for one, other in (("image", "text"), ("image", "paired"), ("text", "paired")):
        expected = torch.nn.functional.cosine_similarity(sums[one], sums[other], dim=0).item()
        assert found[f"cosine/{ATTENTION}/{one}:{other}"] == pytest.approx(expected, abs=1e-6)
    for one in updates:
        assert found[f"norm/{ATTENTION}/{one.site}"] == pytest.approx(one.deltas[SHARED].norm().item(), rel=1e-6)
    assert f"cosine/{HEAD}/site5:site6" in found  # five sites trained the head, which are few


@pytest.mark.parametrize("name", [IMAGE, TEXT, SHARED])
def test_few_and_many_agree_about_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = drawn([{"image": 3}, {"image": 5}, {"text": 2}, {"paired": 7}, {"paired": 2}], 9)
    few = facts(updates)
    monkeypatch.setattr("fedmix.federation.diagnostics.MAX_COMPARED", 1)
    many = facts(updates)
    assert many == pytest.approx({path: value for path, value in few.items() if path in many})
    assert {path for path in few if path not in many} == {
        path for path in few if "site" in path.partition(":")[0] and ":" in path
    }


def test_a_round_of_the_demos_size_is_diagnosed_well_within_a_second() -> None:
    """1.3 million parameters and five sites took about 10 ms; the bound leaves room for a busy machine."""
    shapes = {f"blocks.{k}.attention.qkv.weight": torch.Size([288, 1128]) for k in range(4)}
    chance = tiny.generator(3)
    updates = [
        Update(f"s{k}", {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}, {"image": 1}, 1)
        for k in range(5)
    ]
    weights = weights_of(updates, AWARE)
    started = time.process_time()
    diagnose(updates, shapes, weights)
    assert time.process_time() - started < 0.5


def test_groups_of_the_report_are_those_of_the_round() -> None:
    found = facts([site("a", image=1), site("c", text=1)])
    assert {path.split("/")[1] for path in found if path.startswith("norm")} == {ATTENTION, DECODER, HEAD}
    assert sites.PROJECTION not in {path.split("/")[1] for path in found}
