"""Clipping and coordinate-wise rules against numpy, scipy and numbers by hand, and what is promised."""

from __future__ import annotations

import numpy as np
import pytest
import sites
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sites import IMAGE, SHARED, added, first, site

from fedmix import config
from fedmix.federation.robust import clip_factors, middle, num_cut, num_sites_of_tower, promises
from fedmix.federation.update import Update

MEDIAN = config.Aggregation(combine="median", clip=None)
TRIMMED = config.Aggregation(combine="trimmed_mean", clip=None)


# ---- clipping


def test_clip_factors_by_hand() -> None:
    """Lengths 1, 2, 3, 40: the median is 2.5 and the limit 7.5."""
    lengths = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 40.0}
    assert clip_factors(lengths, config.Aggregation()) == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 7.5 / 40}


@pytest.mark.parametrize(("lengths", "clip"), [({"a": 1.0, "b": 1e9}, 3.0), ({"a": 1.0, "b": 1.0, "c": 1e9}, None), ({}, 3.0)])
def test_two_sites_or_no_limit_clip_nothing(lengths: dict[str, float], clip: float | None) -> None:
    assert set(clip_factors(lengths, config.Aggregation(clip=clip)).values()) <= {1.0}


def test_where_most_sites_do_not_move_nobody_does() -> None:
    assert clip_factors({"a": 0.0, "b": 0.0, "c": 5.0}, config.Aggregation()) == {"a": 1.0, "b": 1.0, "c": 0.0}


def test_a_site_counts_at_most_its_weight_times_three_medians() -> None:
    """Three of weight a third: 1 and 1, and 1e6 that is shortened to 3."""
    updates = [site("a", 1.0, image=5), site("b", 1.0, image=5), site("c", -1e6, image=5)]
    assert first(added(updates, config.Aggregation()), IMAGE) == pytest.approx((1 + 1 - 3) / 3)
    assert first(added(updates, config.Aggregation(clip=None)), IMAGE) == pytest.approx((2 - 1e6) / 3)


def test_clipping_is_by_group_and_over_all_its_parameters() -> None:
    """Lengths of (3, 4) over two tensors are 5; the third site's 50 is cut to 15, each tensor alike."""
    other = "blocks.0.attention.proj.weight"
    updates = [Update(name, {SHARED: torch.tensor([[3.0]]) * k, other: torch.tensor([[4.0]]) * k}, {"image": 1}, 1)
               for name, k in (("a", 1), ("b", 1), ("c", 10))]  # fmt: skip
    shapes = {SHARED: torch.Size([1, 1]), other: torch.Size([1, 1])}
    found = dict(sites.aggregate(updates, shapes, config.Aggregation()))
    assert found[SHARED].item() == pytest.approx((3 + 3 + 9) / 3)
    assert found[other].item() == pytest.approx((4 + 4 + 12) / 3)


def test_lengths_are_compared_after_steps_are_made_alike() -> None:
    """A site with ten times the steps may move ten times as far without being cut."""
    updates = [site("a", 1.0, image=5, steps=10), site("b", 1.0, image=5, steps=10), site("c", 10.0, image=5, steps=100)]
    assert first(added(updates, config.Aggregation()), IMAGE) == pytest.approx(0.1 * 40)


# ---- coordinate-wise rules


@pytest.mark.parametrize("num_sites", [3, 4, 5, 8, 9])
def test_median_is_numpys(num_sites: int) -> None:
    chance = tiny.generator(num_sites)
    updates = [site(f"s{k}", torch.randn(4, generator=chance), image=k + 1) for k in range(num_sites)]
    expected = np.median([update.deltas[IMAGE].double().numpy() for update in updates], axis=0)
    np.testing.assert_allclose(added(updates, MEDIAN)[IMAGE], expected, rtol=1e-6)


@pytest.mark.parametrize(("num_sites", "trim"), [(5, 0.2), (9, 0.2), (10, 0.1), (10, 0.3), (7, 0.45), (20, 0.15)])
def test_trimmed_mean_is_scipys(num_sites: int, trim: float) -> None:
    chance = tiny.generator(num_sites)
    updates = [site(f"s{k:02}", torch.randn(4, generator=chance), image=k + 1) for k in range(num_sites)]
    expected = stats.trim_mean([update.deltas[IMAGE].double().numpy() for update in updates], trim, axis=0)
    found = added(updates, config.Aggregation(combine="trimmed_mean", trim=trim, clip=None))
    np.testing.assert_allclose(found[IMAGE], expected, rtol=1e-6)


@pytest.mark.parametrize("rule", [MEDIAN, TRIMMED], ids=["median", "trimmed_mean"])
@pytest.mark.parametrize("wrong", [1e6, -1e6, -1.0, 0.0], ids=["scaled", "flipped and scaled", "flipped", "silent"])
def test_one_wrong_site_of_five_stays_within_what_the_right_ones_say(rule: config.Aggregation, wrong: float) -> None:
    chance = tiny.generator(7)
    right = [1.0 + 0.1 * torch.randn(4, generator=chance) for _ in range(4)]
    updates = [site(f"s{k}", value, image=5) for k, value in enumerate(right)]
    liar = site("liar", wrong * (1.0 + 0.1 * torch.randn(4, generator=chance)), image=5)
    found, low, high = added([*updates, liar], rule)[IMAGE], torch.stack(right).amin(0), torch.stack(right).amax(0)
    assert bool(((low - 1e-6 <= found) & (found <= high + 1e-6)).all())


def test_the_same_wrong_site_does_move_the_plain_mean() -> None:
    """Else the test above would show nothing."""
    updates = [*(site(f"s{k}", 1.0, image=5) for k in range(4)), site("liar", -1e6, image=5)]
    assert first(added(updates, config.Aggregation(clip=None)), IMAGE) < -1e5


@settings(max_examples=60, deadline=None)
@given(num_sites=st.integers(3, 12), data=st.data(), seed=st.integers(0, 1000))
def test_as_many_wrong_sites_as_promised_stay_in_range_and_one_more_need_not(
    num_sites: int, data: st.DataObject, seed: int
) -> None:
    rule = data.draw(st.sampled_from([MEDIAN, TRIMMED]))
    cut = num_cut(num_sites, rule)
    if cut is None:
        return
    values = torch.randn(num_sites, 1, 4, generator=tiny.generator(seed), dtype=torch.float64)
    wrong = data.draw(st.lists(st.floats(-1e30, 1e30), min_size=cut, max_size=cut))
    right = values[cut:]
    low, high = right.amin(dim=0), right.amax(dim=0)
    for number, value in enumerate(wrong):
        values[number] = value
    found = middle(values, cut)
    assert bool(((found >= low - 1e-12) & (found <= high + 1e-12)).all())


def test_promise_is_tight() -> None:
    """Two wrong sites of five get through a trimmed mean that leaves out one at either end."""
    updates = [*(site(f"s{k}", 1.0, image=5) for k in range(3)), *(site(f"liar{k}", 1e6, image=5) for k in range(2))]
    assert first(added(updates, TRIMMED), IMAGE) > 1e5
    assert first(added(updates, MEDIAN), IMAGE) == 1.0


@pytest.mark.parametrize(
    ("combine", "trim", "num_sites", "cut"),
    [
        ("mean", 0.2, 9, None),
        ("median", 0.2, 2, None),
        ("median", 0.2, 3, 1),
        ("median", 0.2, 4, 1),
        ("median", 0.2, 5, 2),
        ("trimmed_mean", 0.2, 4, None),
        ("trimmed_mean", 0.2, 5, 1),
        ("trimmed_mean", 0.1, 9, None),
        ("trimmed_mean", 0.1, 10, 1),
        ("trimmed_mean", 0.29, 100, 29),
        ("trimmed_mean", 0.4999999999, 10, 4),
    ],
)
def test_number_cut_off_by_hand(combine: str, trim: float, num_sites: int, cut: int | None) -> None:
    assert num_cut(num_sites, config.Aggregation(combine=combine, trim=trim)) == cut


@pytest.mark.parametrize("combine", ["median", "trimmed_mean"])
def test_too_few_sites_fall_back_to_the_weighted_mean(combine: str) -> None:
    """A site that drops out must not end the run."""
    updates = [site("a", 1.0, image=30), site("b", 3.0, image=10)]
    assert first(added(updates, config.Aggregation(combine=combine)), IMAGE) == pytest.approx(1.5)


def test_rule_holds_in_a_tower_among_the_sites_that_trained_it() -> None:
    """Four text sites left the decoder alone; they are no majority for "do not move"."""
    updates = [
        *(site(f"i{k}", value, image=5) for k, value in enumerate((1.0, 2.0, 3.0))),
        *(site(f"t{k}", text=5) for k in range(4)),
    ]
    assert first(added(updates, MEDIAN), IMAGE) == 2.0


def test_rule_that_shrinks_a_group_shrinks_its_median() -> None:
    """Three image sites of 10 beside a text site of 30: half the examples, half the step."""
    updates = [*(site(f"i{k}", 2.0, image=10) for k in range(3)), site("t", text=30)]
    found = added(updates, config.Aggregation(rule="fedavg_all", combine="median"))
    assert first(found, IMAGE) == pytest.approx(1.0)


def test_median_is_of_changes_made_alike_in_steps_and_shortened() -> None:
    """Steps 10, 10, 30 have mean 50 / 3, so 1, 2, 9 count as 5/3, 10/3, 5; without that the median would be 2."""
    updates = [site("a", 1.0, image=5, steps=10), site("b", 2.0, image=5, steps=10), site("c", 9.0, image=5, steps=30)]
    assert first(added(updates, MEDIAN), IMAGE) == pytest.approx(10 / 3)
    # All three are cut to a tenth of the middle one.
    assert first(added(updates, config.Aggregation(combine="median", clip=0.1)), IMAGE) == pytest.approx(1 / 3)


# ---- what is promised

TOWERS = {"shared": 5, "image": 4, "text": 3, "pair": 2}


def test_promises_of_the_trimmed_mean_by_tower() -> None:
    shared, image, text, pair = promises(TOWERS, config.Aggregation(combine="trimmed_mean"))
    assert shared.startswith("shared tower, 5 sites: the trimmed mean keeps every coordinate between")
    assert "as long as at most 1 site of the 5 is wrong" in shared
    assert "image tower, 4 sites: the trimmed mean needs 5 sites and is not used here; bounded influence and no more" in image
    assert "its weight times 3 median lengths" in image
    assert "its weight times 3 median lengths" in text
    assert "its weight times its own length, which screening alone bounds" in pair


def test_promises_of_the_median_hold_for_less_than_half() -> None:
    found = promises({"shared": 7, "image": 4, "text": 2, "pair": 1}, config.Aggregation(combine="median"))
    assert "at most 3 sites of the 7 are wrong" in found[0]
    assert "at most 1 site of the 4 is wrong" in found[1]
    assert "the median needs 3 sites and is not used here" in found[2]
    assert found[3] == (
        "pair tower, 1 site: nothing outvotes the only site; what screening lets through is taken as it is."
    )  # fmt: skip


def test_promises_of_the_mean_say_bounded_influence_and_towers_without_sites_nothing() -> None:
    (one,) = promises({"shared": 0, "text": 6}, config.Aggregation())
    assert one == (
        "text tower, 6 sites: bounded influence and no more: one wrong site moves the weighted mean by at most its weight "
        "times 3 median lengths of the round's updates, in any direction."
    )


def test_towers_with_as_many_sites_share_a_sentence() -> None:
    found = promises({"shared": 1, "image": 2, "text": 1, "pair": 1}, config.Aggregation())
    assert [sentence.split(":")[0] for sentence in found] == ["shared, text and pair towers, 1 site", "image tower, 2 sites"]


def test_promises_say_where_trim_leaves_out_nobody_and_where_nothing_is_clipped() -> None:
    (one,) = promises({"shared": 9}, config.Aggregation(combine="trimmed_mean", trim=0.1, clip=None))
    assert "aggregation.trim = 0.1 leaves out none of 9 sites, so the trimmed mean is not used here" in one
    assert "its own length, which screening alone bounds" in one


def test_a_tower_is_trained_by_the_sites_whose_streams_reach_it() -> None:
    sites = [config.Site(name=name, stream=stream, shard=f"/{name}") for name, stream in
             (("a", "image"), ("b", "image"), ("c", "text"), ("d", "paired"))]  # fmt: skip
    stage = config.Stage(name="s", rounds=1)
    assert num_sites_of_tower(stage, sites) == {"shared": 4, "image": 3, "text": 2, "pair": 0}
    aligning = config.Stage(name="s", rounds=1, streams=("paired", "text"), objectives={"contrast": 1.0})
    assert num_sites_of_tower(aligning, sites) == {"shared": 2, "image": 1, "text": 2, "pair": 1}
