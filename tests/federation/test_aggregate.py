"""The server's arithmetic against plain loops, torch's optimiser and numbers done by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation.aggregate import RULES, aggregate, modality_aware, outer_step
from fedmix.federation.update import Tower, Update

# One parameter of each tower, by its real name.
SHARED, IMAGE, TEXT, PAIR = (
    "blocks.0.attention.qkv.weight",
    "patch_decoder.values.bias",
    "word_head.logits.bias",
    "projection.image.bias",
)
TRAINS = {"image": (SHARED, IMAGE), "text": (SHARED, TEXT), "paired": (SHARED, IMAGE, TEXT, PAIR)}
AWARE = config.Aggregation()
NAIVE = config.Aggregation(rule="fedavg_all")
PAIRED_ONLY = config.Aggregation(rule="paired_only")


def site(name: str, value: float | Tensor = 1.0, **examples: int) -> Update:
    """A site that trained what its streams reach; its whole change is ``value``."""
    names = sorted({parameter for stream, count in examples.items() if count for parameter in TRAINS[stream]})
    return Update(name, {one: torch.as_tensor(value) * torch.ones(4) for one in names}, examples, 1)


def first(deltas: Mapping[str, Tensor], name: str) -> float:
    return deltas[name][0].item()


# ---- the finding that decided the rule


def test_naive_averaging_shrinks_what_few_sites_train_and_modality_aware_does_not() -> None:
    """Two image sites of 100,000 and a text site of 10,000: the text side moves at 10 / 210 of what was learned."""
    updates = [site("a", image=100_000), site("b", image=100_000), site("c", text=10_000)]
    naive, aware = aggregate(updates, NAIVE), aggregate(updates, AWARE)
    assert first(naive, TEXT) == pytest.approx(0.0476, abs=5e-5)
    assert first(naive, IMAGE) == pytest.approx(200 / 210)
    assert first(aware, TEXT) == 1.0
    assert first(aware, IMAGE) == 1.0


# ---- weights by hand


def test_shared_weights_by_hand() -> None:
    """Mix .35 .25 .40 over image, text and pairs; two image sites share theirs by examples, 3 to 1."""
    updates = [site("a", image=30), site("b", image=10), site("c", text=7), site("d", paired=2)]
    weights = modality_aware(updates, "shared", AWARE)
    assert weights == pytest.approx({"a": 0.35 * 0.75, "b": 0.35 * 0.25, "c": 0.25, "d": 0.40})


def test_mix_is_renormalised_over_the_streams_present() -> None:
    weights = modality_aware([site("a", image=30), site("c", text=1)], "shared", AWARE)
    assert weights == pytest.approx({"a": 0.35 / 0.60, "c": 0.25 / 0.60})


def test_image_tower_is_half_image_sites_and_half_pairs() -> None:
    weights = modality_aware([site("a", image=900), site("d", paired=100)], "image", AWARE)
    assert weights == pytest.approx({"a": 0.5, "d": 0.5})


def test_site_with_two_streams_counts_for_both() -> None:
    """Image: e has 10 of 40 images and all the pairs."""
    weights = modality_aware([site("a", image=30), site("e", image=10, paired=5)], "image", AWARE)
    assert weights == pytest.approx({"a": 0.5 * 0.75, "e": 0.5 * 0.25 + 0.5})


@pytest.mark.parametrize(("exponent", "larger"), [(1.0, 0.9), (0.5, 0.75), (0.0, 0.5)])
def test_count_exponent_by_hand(exponent: float, larger: float) -> None:
    """Ninety and ten examples: 9 to 1, then 3 to 1, then alike."""
    rule = config.Aggregation(count_exponent=exponent)
    weights = modality_aware([site("a", image=90), site("b", image=10), site("c", text=5)], "image", rule)
    assert weights == pytest.approx({"a": larger, "b": 1 - larger, "c": 0.0})


def test_aggregate_by_hand() -> None:
    """Deltas 1 and 3 of image sites with 30 and 10 examples, 8 of a paired site: .5 (.75 + .75) + .5 x 8 = 4.75."""
    deltas = aggregate([site("a", 1.0, image=30), site("b", 3.0, image=10), site("d", 8.0, paired=2)], AWARE)
    assert first(deltas, IMAGE) == pytest.approx(4.75)
    assert first(deltas, SHARED) == pytest.approx((0.35 * 1.5 + 0.40 * 8) / 0.75)
    assert first(deltas, TEXT) == pytest.approx(8.0)
    assert first(deltas, PAIR) == pytest.approx(8.0)


def test_paired_only_counts_pairs_and_nothing_else() -> None:
    deltas = aggregate([site("a", 100.0, image=1000), site("d", 1.0, paired=30), site("e", 5.0, paired=10)], PAIRED_ONLY)
    assert first(deltas, IMAGE) == first(deltas, SHARED) == first(deltas, TEXT) == pytest.approx(2.0)


def test_paired_only_without_pairs_is_refused() -> None:
    with pytest.raises(UpdateError, match="paired_only got no update from a site with pairs; give the stage a paired site"):
        aggregate([site("a", image=3), site("c", text=3)], PAIRED_ONLY)


def test_tower_that_no_counted_stream_reaches_is_refused() -> None:
    liar = Update("a", {TEXT: torch.ones(4)}, {"image": 5}, 1)
    with pytest.raises(UpdateError, match="sites sent text parameters, but none of them trained on a stream that reaches them"):
        aggregate([liar], AWARE)


# ---- invariants

COUNTS = st.integers(0, 5000)
SITES = st.lists(
    st.fixed_dictionaries({"image": COUNTS, "text": COUNTS, "paired": COUNTS}).filter(lambda counts: any(counts.values())),
    min_size=1,
    max_size=5,
)
RULE = st.builds(
    config.Aggregation, rule=st.sampled_from(["modality_aware", "fedavg_all"]), count_exponent=st.sampled_from([0.0, 0.5, 1.0])
)


def drawn(all_counts: Sequence[Mapping[str, int]], seed: int) -> list[Update]:
    """Sites with random changes."""
    chance = tiny.generator(seed)
    return [site(f"site{k}", torch.randn(4, generator=chance), **counts) for k, counts in enumerate(all_counts)]


@settings(max_examples=60, deadline=None)
@given(all_counts=SITES, rule=RULE, seed=st.integers(0, 1000), data=st.data())
def test_order_of_the_sites_changes_nothing_to_the_bit(
    all_counts: list[dict[str, int]], rule: config.Aggregation, seed: int, data: st.DataObject
) -> None:
    updates = drawn(all_counts, seed)
    expected = aggregate(updates, rule)
    found = aggregate(data.draw(st.permutations(updates)), rule)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_order_of_the_sites_changes_nothing_even_where_float64_rounds() -> None:
    """(2^60 + 1) - 2^60 is 0 to a float64 and (2^60 - 2^60) + 1 is 1."""
    updates = [site("a", 2.0**60, image=1), site("b", 1.0, image=1), site("c", -(2.0**60), image=1)]
    assert len({first(aggregate(order, AWARE), IMAGE) for order in permutations(updates)}) == 1


@settings(max_examples=60, deadline=None)
@given(all_counts=SITES, exponent=st.floats(0.0, 1.0), tower=st.sampled_from(["shared", "image", "text", "pair"]))
def test_weights_of_a_group_sum_to_one(all_counts: list[dict[str, int]], exponent: float, tower: Tower) -> None:
    updates = drawn(all_counts, 0)
    name = {"shared": SHARED, "image": IMAGE, "text": TEXT, "pair": PAIR}[tower]
    contributors = [update for update in updates if name in update.deltas]
    if contributors:
        weights = modality_aware(contributors, tower, config.Aggregation(count_exponent=exponent))
        assert sum(weights.values()) == pytest.approx(1.0)
        assert min(weights.values()) >= 0


@settings(max_examples=40, deadline=None)
@given(all_counts=SITES, rule=RULE, value=st.floats(-3, 3, width=32))
def test_sites_that_agree_are_followed(all_counts: list[dict[str, int]], rule: config.Aggregation, value: float) -> None:
    """Where every site trained a parameter and learned the same, that is the result, whatever the rule and the counts."""
    deltas = aggregate([site(f"site{k}", value, **counts) for k, counts in enumerate(all_counts)], rule)
    assert first(deltas, SHARED) == pytest.approx(value, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), -float("inf"), 1e38])
@pytest.mark.parametrize(
    ("rule", "honest", "silent"),
    [
        pytest.param(PAIRED_ONLY, {"paired": 5}, {"image": 5}, id="paired_only"),
        pytest.param(config.Aggregation(shared_mix={"image": 0, "text": 0}), {"paired": 5}, {"image": 5}, id="mix of zero"),
    ],
)
def test_site_of_weight_zero_is_invisible_whatever_it_sent(
    rule: config.Aggregation, honest: dict[str, int], silent: dict[str, int], poison: float
) -> None:
    updates = [site("a", 1.5, **honest), site("b", 2.5, **honest)]
    ghost = Update("ghost", {SHARED: torch.full((4,), poison)}, silent, 1)
    with_ghost, without = aggregate([*updates, ghost], rule), aggregate(updates, rule)
    assert torch.equal(with_ghost[SHARED], without[SHARED])


def test_what_only_sites_of_weight_zero_sent_is_absent() -> None:
    """A zero in its place would let the server's momentum move parameters that nobody trained."""
    deltas = aggregate([site("a", image=5), Update("d", {SHARED: torch.ones(4)}, {"paired": 5}, 1)], PAIRED_ONLY)
    assert set(deltas) == {SHARED}


@pytest.mark.parametrize("stream", ["image", "text", "paired"])
def test_one_stream_at_all_sites_is_fedavg_to_the_bit(stream: str) -> None:
    counts, chance = (17, 400, 3, 96), tiny.generator(3)
    updates = [site(f"s{k}", torch.randn(4, generator=chance), **{stream: count}) for k, count in enumerate(counts)]
    for rule in (AWARE, NAIVE):
        deltas = aggregate(updates, rule)
        for name in TRAINS[stream]:
            total = torch.zeros(4, dtype=torch.float64)
            for update, count in zip(updates, counts, strict=True):
                total += count / sum(counts) * update.deltas[name].double()
            assert torch.equal(deltas[name], total.float())


def test_fedavg_all_equals_averaging_whole_models() -> None:
    """The textbook: every site sends all its parameters, those it did not train unchanged."""
    start, chance = torch.randn(4), tiny.generator(4)
    updates = [site("a", torch.randn(4, generator=chance), image=30), site("c", torch.randn(4, generator=chance), text=10)]
    deltas = aggregate(updates, NAIVE)
    for name in (SHARED, IMAGE, TEXT):
        models = [start + update.deltas.get(name, torch.zeros(4)) for update in updates]
        torch.testing.assert_close(start + deltas[name], 0.75 * models[0] + 0.25 * models[1])


def test_parameters_that_nobody_trained_are_absent() -> None:
    assert set(aggregate([site("a", image=3)], AWARE)) == {SHARED, IMAGE}


def test_sum_is_exact_where_float32_would_lose_it() -> None:
    """A large change and its opposite cancel, and the small one between them stays."""
    updates = [site("a", 1e8, image=1), site("b", 1.0, image=1), site("c", -1e8, image=1)]
    assert first(aggregate(updates, AWARE), IMAGE) == pytest.approx(1 / 3)


def test_duplicate_site_names_are_refused() -> None:
    with pytest.raises(UpdateError, match="two updates carry the same site's name"):
        aggregate([site("a", image=3), site("a", image=4)], AWARE)


def test_no_update_gives_no_change() -> None:
    assert aggregate([], AWARE) == {}


def test_updates_are_not_changed_by_adding_them_up() -> None:
    """An in-place sum made another system's average depend on the order of the sites."""
    updates = [site("a", 1.0, image=1), site("b", 2.0, image=1)]
    for order in permutations(updates):
        assert first(aggregate(order, AWARE), IMAGE) == 1.5
    assert [first(update.deltas, IMAGE) for update in updates] == [1.0, 2.0]


def test_every_rule_that_the_config_allows_exists() -> None:
    schema = config.Aggregation.model_json_schema()
    assert set(RULES) == set(schema["properties"]["rule"]["enum"])


# ---- the outer optimiser


@pytest.mark.parametrize(
    ("momentum", "nesterov"),
    [(0.0, False), (0.0, True), (0.9, False), (0.9, True)],
    ids=["plain", "plain+", "heavy", "nesterov"],
)
def test_outer_step_equals_torch_sgd_over_several_rounds(momentum: float, nesterov: bool) -> None:
    settings = config.Outer(lr=0.7, momentum=momentum, nesterov=nesterov)
    chance = tiny.generator(5)
    start = torch.randn(4, generator=chance)
    reference = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.SGD([reference], lr=0.7, momentum=momentum, nesterov=nesterov and momentum > 0)
    parameters, velocity = {SHARED: start}, {}
    for _ in range(5):
        delta = torch.randn(4, generator=chance)
        parameters, velocity = outer_step(parameters, {SHARED: delta}, velocity, settings)
        reference.grad = -delta  # torch walks against a gradient, the server along a change
        optimiser.step()
        torch.testing.assert_close(parameters[SHARED], reference.detach())


def test_outer_step_of_one_and_zero_is_plain_averaging() -> None:
    parameters, velocity = outer_step({SHARED: torch.tensor([1.0])}, {SHARED: torch.tensor([0.5])}, {}, config.Outer())
    assert parameters[SHARED].tolist() == [1.5]
    assert velocity == {}


def test_parameters_and_velocity_without_a_change_stay_to_the_bit() -> None:
    settings = config.Outer(lr=0.7, momentum=0.9)
    parameters = {SHARED: torch.randn(4), TEXT: torch.randn(4)}
    velocity = {SHARED: torch.randn(4), TEXT: torch.randn(4)}
    moved, carried = outer_step(parameters, {SHARED: torch.randn(4)}, velocity, settings)
    assert torch.equal(moved[TEXT], parameters[TEXT])
    assert torch.equal(carried[TEXT], velocity[TEXT])
    assert not torch.equal(moved[SHARED], parameters[SHARED])


def test_outer_step_leaves_what_it_was_given_alone() -> None:
    parameters, velocity = {SHARED: torch.ones(4)}, {SHARED: torch.ones(4)}
    outer_step(parameters, {SHARED: torch.ones(4)}, velocity, config.Outer(momentum=0.9))
    assert parameters[SHARED].tolist() == velocity[SHARED].tolist() == [1.0] * 4
