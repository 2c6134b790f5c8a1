"""The server's sum against plain loops and numbers done by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import ALL_COUNTS, IMAGE, PAIR, SHAPES, SHARED, TEXT, TRAINS, added, drawn, first, site

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation.aggregate import aggregate, aggregate_second_moments
from fedmix.federation.update import Update
from fedmix.federation.weights import RULES

AWARE = config.Aggregation()
NAIVE = config.Aggregation(rule="fedavg_all")
PAIRED_ONLY = config.Aggregation(rule="paired_only")

EVERY_RULE = st.builds(
    config.Aggregation,
    rule=st.sampled_from(sorted(set(RULES) - {"paired_only"})),
    count_exponent=st.sampled_from([0.0, 0.5, 1.0]),
    combine=st.sampled_from(["mean", "median", "trimmed_mean"]),
    clip=st.sampled_from([None, 1.0, 3.0]),
    normalise_steps=st.booleans(),
)


# ---- the finding that decided the rule


def test_naive_averaging_shrinks_what_few_sites_train_and_modality_aware_does_not() -> None:
    """Two image sites of 100,000 and a text site of 10,000: the text side moves at 10 / 210 of what was learned."""
    updates = [site("a", image=100_000), site("b", image=100_000), site("c", text=10_000)]
    naive, aware = added(updates, NAIVE), added(updates, AWARE)
    assert first(naive, TEXT) == pytest.approx(0.0476, abs=5e-5)
    assert first(naive, IMAGE) == pytest.approx(200 / 210)
    assert first(aware, TEXT) == 1.0
    assert first(aware, IMAGE) == 1.0


# ---- numbers by hand


def test_sum_by_hand() -> None:
    """Changes 1 and 3 of image sites with 30 and 10 examples, 8 of a paired site: .5 (.75 + .75) + .5 x 8 = 4.75."""
    updates = [site("a", 1.0, image=30), site("b", 3.0, image=10), site("d", 8.0, paired=2)]
    deltas = added(updates, config.Aggregation(clip=None))
    assert first(deltas, IMAGE) == pytest.approx(4.75)
    assert first(deltas, SHARED) == pytest.approx((0.35 * 1.5 + 0.40 * 8) / 0.75)
    assert first(deltas, TEXT) == pytest.approx(8.0)
    assert first(deltas, PAIR) == pytest.approx(8.0)


def test_what_is_yielded_has_the_parameters_shape_and_comes_in_name_order() -> None:
    found = [*aggregate([site("d", 2.0, paired=2), site("c", 1.0, text=2)], SHAPES, AWARE)]
    assert [name for name, _ in found] == sorted(SHAPES)
    assert all(delta.shape == SHAPES[name] and delta.dtype == torch.float32 for name, delta in found)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (3, 1), (2, 3, 4), (0,), (0, 4)])
def test_every_shape_comes_back_as_it_was(shape: tuple[int, ...]) -> None:
    values = [torch.randn(shape, generator=tiny.generator(seed)) for seed in (1, 2)]
    updates = [Update(f"s{number}", {IMAGE: value}, {"image": 1}, 1) for number, value in enumerate(values)]
    ((_, delta),) = aggregate(updates, {IMAGE: torch.Size(shape)}, AWARE)
    assert delta.shape == shape
    torch.testing.assert_close(delta, (values[0] + values[1]) / 2)


# ---- invariants


@settings(max_examples=100, deadline=None)
@given(all_counts=ALL_COUNTS, rule=EVERY_RULE, seed=st.integers(0, 1000), data=st.data())
def test_order_of_the_sites_changes_nothing_to_the_bit(
    all_counts: list[dict[str, int]], rule: config.Aggregation, seed: int, data: st.DataObject
) -> None:
    updates = drawn(all_counts, seed)
    expected = added(updates, rule)
    found = added(data.draw(st.permutations(updates)), rule)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_order_of_the_sites_changes_nothing_even_where_float64_rounds() -> None:
    """(2^60 + 1) - 2^60 is 0 to a float64 and (2^60 - 2^60) + 1 is 1."""
    updates = [site("a", 2.0**60, image=1), site("b", 1.0, image=1), site("c", -(2.0**60), image=1)]
    rule = config.Aggregation(clip=None)
    assert len({first(added(order, rule), IMAGE) for order in permutations(updates)}) == 1


@settings(max_examples=60, deadline=None)
@given(all_counts=ALL_COUNTS, rule=EVERY_RULE, value=st.floats(-3, 3, width=32))
def test_sites_that_agree_are_followed(all_counts: list[dict[str, int]], rule: config.Aggregation, value: float) -> None:
    """Where every site trained a parameter and learned the same, that is the result, whatever the rule and the counts."""
    deltas = added([site(f"site{k}", value, **counts) for k, counts in enumerate(all_counts)], rule)
    assert first(deltas, SHARED) == pytest.approx(value, rel=1e-6, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    all_counts=ALL_COUNTS,
    silent=st.lists(st.fixed_dictionaries({"image": st.integers(0, 9), "text": st.integers(1, 9)}), min_size=1, max_size=3),
    poison=st.sampled_from([float("inf"), float("nan"), -float("inf"), 1e38]),
    steps=st.integers(1, 10_000),
    combine=st.sampled_from(["mean", "median", "trimmed_mean"]),
)
def test_sites_of_weight_zero_are_invisible_whatever_they_sent(
    all_counts: list[dict[str, int]], silent: list[dict[str, int]], poison: float, steps: int, combine: str
) -> None:
    """The rule counts pairs alone, so sites without a pair may send what they like."""
    rule = config.Aggregation(rule="paired_only", combine=combine)
    honest = drawn([counts | {"paired": counts["paired"] + 1} for counts in all_counts], 3)
    ghosts = [site(f"ghost{k}", poison, steps=steps, **counts) for k, counts in enumerate(silent)]
    found, expected = added([*ghosts, *honest], rule), added(honest, rule)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_stream_of_mix_zero_is_invisible_in_the_trunk(poison: float) -> None:
    rule = config.Aggregation(shared_mix={"image": 0, "text": 0})
    updates = [site("a", 1.5, paired=5), site("b", 2.5, paired=5)]
    ghost = Update("ghost", {SHARED: torch.full((2, 2), poison)}, {"image": 5}, 1)
    assert torch.equal(added([*updates, ghost], rule)[SHARED], added(updates, rule)[SHARED])


def test_what_only_sites_of_weight_zero_sent_is_absent() -> None:
    """A zero in its place would let the server's momentum move parameters that nobody trained."""
    deltas = added([site("a", image=5), Update("d", {SHARED: torch.ones(2, 2)}, {"paired": 5}, 1)], PAIRED_ONLY)
    assert set(deltas) == {SHARED}


def test_parameters_that_nobody_trained_are_absent() -> None:
    assert set(added([site("a", image=3)], AWARE)) == {SHARED, IMAGE}


@pytest.mark.parametrize("stream", ["image", "text", "paired"])
def test_one_stream_at_all_sites_is_fedavg_to_the_bit(stream: str) -> None:
    counts, chance = (17, 400, 3, 96), tiny.generator(3)
    updates = [site(f"s{k}", torch.randn(4, generator=chance), **{stream: count}) for k, count in enumerate(counts)]
    for rule in ("modality_aware", "fedavg_all", "modality_exact", "fedcola"):
        deltas = added(updates, config.Aggregation(rule=rule))
        for name in TRAINS[stream]:
            total = torch.zeros(SHAPES[name], dtype=torch.float64)
            for update, count in zip(updates, counts, strict=True):
                total += count / sum(counts) * update.deltas[name].double()
            assert torch.equal(deltas[name], total.float()), rule


def test_fedavg_all_equals_averaging_whole_models() -> None:
    """The textbook: every site sends all its parameters, those it did not train unchanged."""
    start, chance = torch.randn(4), tiny.generator(4)
    updates = [site("a", torch.randn(4, generator=chance), image=30), site("c", torch.randn(4, generator=chance), text=10)]
    deltas = added(updates, NAIVE)
    for name in (SHARED, IMAGE, TEXT):
        models = [start + update.deltas[name].flatten() if name in update.deltas else start for update in updates]
        torch.testing.assert_close(start + deltas[name].flatten(), 0.75 * models[0] + 0.25 * models[1])


def test_fedcolas_average_does_not_depend_on_the_order_of_its_sites() -> None:
    """Adding (local - global) to a global that moves inside the loop gave 1.25 or 1.0 where the mean is 1.5."""
    updates = [site("a", 1.0, paired=1), site("b", 2.0, paired=1)]
    for order in permutations(updates):
        assert first(added(order, config.Aggregation(rule="fedcola")), SHARED) == 1.5
    assert [first(dict(update.deltas), SHARED) for update in updates] == [1.0, 2.0]


def test_sum_is_exact_where_float32_would_lose_it() -> None:
    """A large change and its opposite cancel, and the small one between them stays."""
    updates = [site("a", 1e8, image=1), site("b", 1.0, image=1), site("c", -1e8, image=1)]
    assert first(added(updates, AWARE), IMAGE) == pytest.approx(1 / 3)


# ---- refusals


def test_duplicate_site_names_are_refused() -> None:
    with pytest.raises(UpdateError, match="two updates carry the same site's name"):
        aggregate([site("a", image=3), site("a", image=4)], SHAPES, AWARE)


def test_tensors_that_the_model_does_not_have_are_refused_before_anything_is_yielded() -> None:
    with pytest.raises(UpdateError, match="1 tensors in the updates are not in the model"):
        aggregate([site("a", image=3)], {SHARED: SHAPES[SHARED]}, AWARE)


def test_a_rule_that_finds_nobody_to_count_is_refused_before_anything_is_yielded() -> None:
    with pytest.raises(UpdateError, match="paired_only got no update from a site with pairs"):
        aggregate([site("a", image=3)], SHAPES, PAIRED_ONLY)


def test_no_update_gives_no_change() -> None:
    assert added([], AWARE) == {}


# ---- second moments


def with_moments(name: str, moments: dict[str, float], **examples: int) -> Update:
    one = site(name, **examples)
    return Update(name, one.deltas, examples, 1, second_moments=moments)


def test_second_moments_are_the_weighted_mean_over_the_sites_that_have_one() -> None:
    updates = [with_moments("a", {IMAGE: 1.0}, image=30), with_moments("b", {IMAGE: 5.0}, image=10), site("c", image=60)]
    assert aggregate_second_moments(updates, AWARE) == {IMAGE: pytest.approx(2.0)}


def test_second_moments_are_not_shrunk_by_a_rule_that_shrinks_changes() -> None:
    updates = [with_moments("a", {IMAGE: 4.0}, image=1), site("c", text=99)]
    assert aggregate_second_moments(updates, NAIVE) == {IMAGE: pytest.approx(4.0)}


def test_second_moments_of_sites_of_weight_zero_are_invisible() -> None:
    updates = [with_moments("a", {SHARED: 1e30, IMAGE: 1e30}, image=1), with_moments("d", {SHARED: 2.0}, paired=1)]
    assert aggregate_second_moments(updates, PAIRED_ONLY) == {SHARED: 2.0}


@pytest.mark.parametrize(("combine", "expected"), [("mean", (1 + 2 + 3 + 4 + 9) / 5), ("median", 3.0), ("trimmed_mean", 3.0)])
def test_one_huge_second_moment_does_not_stop_the_others(combine: str, expected: float) -> None:
    """The mean counts it as three medians, 9."""
    updates = [with_moments(f"s{value}", {IMAGE: value}, image=1) for value in (4.0, 1.0, 1e30, 3.0, 2.0)]
    assert aggregate_second_moments(updates, config.Aggregation(combine=combine)) == {IMAGE: pytest.approx(expected)}


def test_second_moments_do_not_depend_on_the_order_of_the_sites() -> None:
    updates = [with_moments(f"s{k}", {IMAGE: 10.0**k, SHARED: 0.1 * k}, image=k + 1) for k in range(4)]
    assert len({tuple(aggregate_second_moments(order, AWARE).items()) for order in permutations(updates)}) == 1
