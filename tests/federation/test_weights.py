"""Rules by name against numbers done by hand."""

from __future__ import annotations

import pytest
import sites
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import ATTENTION, DECODER, HEAD, PROJECTION, group, site

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation.update import Update
from fedmix.federation.weights import MULTIMODAL_WEIGHT, RULES, rule_weights, step_factors, weights_of

AWARE = config.Aggregation()
RULE = {name: config.Aggregation(rule=name) for name in RULES}
FIVE = (site("a", image=30), site("b", image=10), site("c", text=7), site("d", paired=2), site("e", paired=6))


def test_every_rule_that_the_config_allows_exists() -> None:
    schema = config.Aggregation.model_json_schema()
    assert set(RULES) == set(schema["properties"]["rule"]["enum"])


# ---- modality_aware


def test_shared_weights_by_hand() -> None:
    """Mix .35 .25 .40 over image, text and pairs; two image sites share theirs by examples, 3 to 1, and so do the pairs."""
    found = rule_weights(group(ATTENTION, *FIVE), AWARE)
    assert found == pytest.approx({"a": 0.35 * 0.75, "b": 0.35 * 0.25, "c": 0.25, "d": 0.40 * 0.25, "e": 0.40 * 0.75})


def test_mix_is_renormalised_over_the_streams_present() -> None:
    found = rule_weights(group(ATTENTION, site("a", image=30), site("c", text=1)), AWARE)
    assert found == pytest.approx({"a": 0.35 / 0.60, "c": 0.25 / 0.60})


def test_image_tower_is_half_image_sites_and_half_pairs() -> None:
    found = rule_weights(group(DECODER, site("a", image=900), site("d", paired=100)), AWARE)
    assert found == pytest.approx({"a": 0.5, "d": 0.5})


def test_site_with_two_streams_counts_for_both() -> None:
    """Image: e has 10 of 40 images and all the pairs."""
    found = rule_weights(group(DECODER, site("a", image=30), site("e", image=10, paired=5)), AWARE)
    assert found == pytest.approx({"a": 0.5 * 0.75, "e": 0.5 * 0.25 + 0.5})


@pytest.mark.parametrize(("exponent", "larger"), [(1.0, 0.9), (0.5, 0.75), (0.0, 0.5)])
def test_count_exponent_by_hand(exponent: float, larger: float) -> None:
    """Ninety and ten examples: 9 to 1, then 3 to 1, then alike."""
    rule = config.Aggregation(count_exponent=exponent)
    found = rule_weights(group(DECODER, site("a", image=90), site("b", image=10), site("c", text=5)), rule)
    assert found == pytest.approx({"a": larger, "b": 1 - larger})


@settings(max_examples=60, deadline=None)
@given(all_counts=sites.ALL_COUNTS, exponent=st.floats(0.0, 1.0))
def test_weights_of_a_group_sum_to_one(all_counts: list[dict[str, int]], exponent: float) -> None:
    updates = sites.drawn(all_counts, 0)
    for held in weights_of(updates, config.Aggregation(count_exponent=exponent, normalise_steps=False)).values():
        assert sum(held.values()) == pytest.approx(1.0)
        assert min(held.values()) >= 0


# ---- the others


def test_fedavg_all_divides_by_every_site() -> None:
    found = weights_of(FIVE, RULE["fedavg_all"])
    assert found[HEAD] == pytest.approx({"c": 7 / 55, "d": 2 / 55, "e": 6 / 55})
    assert found[ATTENTION] == pytest.approx({"a": 30 / 55, "b": 10 / 55, "c": 7 / 55, "d": 2 / 55, "e": 6 / 55})


def test_paired_only_counts_pairs_and_nothing_else() -> None:
    found = weights_of(FIVE, RULE["paired_only"])
    assert found[ATTENTION] == pytest.approx({"a": 0, "b": 0, "c": 0, "d": 0.25, "e": 0.75})
    assert found[PROJECTION] == pytest.approx({"d": 0.25, "e": 0.75})


def test_modality_exact_averages_over_the_holders_of_a_modality_with_pairs_counted_more() -> None:
    """Images: 30 and 10, and 2 and 6 pairs that count a hundred times."""
    found = weights_of(FIVE, RULE["modality_exact"])
    total = 40 + 8 * MULTIMODAL_WEIGHT
    assert found[DECODER] == pytest.approx({"a": 30 / total, "b": 10 / total, "d": 200 / total, "e": 600 / total})
    assert found[PROJECTION] == pytest.approx({"d": 0.25, "e": 0.75})


def test_modality_exact_gives_the_trunk_the_mean_of_what_either_modality_makes_of_it() -> None:
    found = weights_of(FIVE, RULE["modality_exact"])[ATTENTION]
    image, text = 40 + 8 * MULTIMODAL_WEIGHT, 7 + 8 * MULTIMODAL_WEIGHT
    assert found["b"] == pytest.approx(0.5 * 10 / image)
    assert found["c"] == pytest.approx(0.5 * 7 / text)
    assert found["d"] == pytest.approx(0.5 * 200 / image + 0.5 * 200 / text)
    assert sum(found.values()) == pytest.approx(1.0)


def test_modality_exact_without_a_modality_takes_the_other() -> None:
    found = weights_of(FIVE[:2], RULE["modality_exact"])
    assert found == {ATTENTION: pytest.approx({"a": 0.75, "b": 0.25}), DECODER: pytest.approx({"a": 0.75, "b": 0.25})}


def test_fedcola_shares_attention_among_all_and_the_rest_among_pairs_with_a_smaller_step() -> None:
    """The decoder follows the 8 pairs of 48 studies with an image: a sixth of the step."""
    found = weights_of(FIVE, RULE["fedcola"])
    assert found[ATTENTION] == pytest.approx({"a": 30 / 55, "b": 10 / 55, "c": 7 / 55, "d": 2 / 55, "e": 6 / 55})
    assert found[DECODER] == pytest.approx({"a": 0, "b": 0, "d": 2 / 48, "e": 6 / 48})
    assert found[HEAD] == pytest.approx({"c": 0, "d": 2 / 15, "e": 6 / 15})
    assert found[PROJECTION] == pytest.approx({"d": 0.25, "e": 0.75})


def test_fedcola_without_pairs_follows_the_unpaired_sites() -> None:
    found = weights_of(FIVE[:3], RULE["fedcola"])
    assert found[DECODER] == pytest.approx({"a": 0.75, "b": 0.25})
    assert found[HEAD] == pytest.approx({"c": 1.0})


@settings(max_examples=60, deadline=None)
@given(all_counts=sites.ALL_COUNTS, rule=st.sampled_from(sorted(set(RULES) - {"paired_only"})))
def test_no_rule_gives_a_group_more_than_one_or_a_site_less_than_nothing(all_counts: list[dict[str, int]], rule: str) -> None:
    settings_ = config.Aggregation(rule=rule, normalise_steps=False)
    for held in weights_of(sites.drawn(all_counts, 0), settings_).values():
        assert sum(held.values()) <= 1 + 1e-12
        assert min(held.values()) >= 0


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("stream", ["image", "text", "paired"])
def test_one_stream_at_all_sites_is_fedavg(stream: str, rule: str) -> None:
    counts = (17, 400, 3, 96)
    updates = [site(f"s{number}", **{stream: count}) for number, count in enumerate(counts)]
    if rule == "paired_only" and stream != "paired":
        return
    for held in weights_of(updates, RULE[rule]).values():
        assert held == pytest.approx({f"s{number}": count / sum(counts) for number, count in enumerate(counts)})


# ---- refusals


def test_paired_only_without_pairs_is_refused() -> None:
    with pytest.raises(UpdateError, match="paired_only got no update from a site with pairs; give the stage a paired site"):
        weights_of([site("a", image=3), site("c", text=3)], RULE["paired_only"])


@pytest.mark.parametrize("rule", ["modality_aware", "modality_exact"])
def test_tower_that_no_counted_stream_reaches_is_refused(rule: str) -> None:
    liar = Update("a", {sites.TEXT: site("c", text=1).deltas[sites.TEXT]}, {"image": 5}, 1)
    with pytest.raises(UpdateError, match="sites sent text parameters, but none of them trained on a stream that reaches them"):
        weights_of([liar], RULE[rule])


# ---- steps


def test_steps_are_normalised_by_hand() -> None:
    """Weights .5 and .5, steps 10 and 30: the mean is 20, so the changes count 2 and 2/3 times."""
    two = group(DECODER, site("a", image=5, steps=10), site("b", image=5, steps=30))
    assert step_factors(two, {"a": 0.5, "b": 0.5}, AWARE) == pytest.approx({"a": 2.0, "b": 2 / 3})
    assert weights_of([*two.senders], AWARE)[DECODER] == pytest.approx({"a": 1.0, "b": 1 / 3})


def test_sites_that_move_alike_per_step_are_followed_at_the_mean_number_of_steps() -> None:
    """Each step moves by .1, weights .75 and .25: 22.5 steps of it, whoever took how many."""
    updates = [site("a", 0.1 * 20, image=30, steps=20), site("b", 0.1 * 30, image=10, steps=30)]
    assert sites.first(sites.added(updates, AWARE), sites.IMAGE) == pytest.approx(2.25)


@pytest.mark.parametrize(("steps", "factor"), [((100, 120), 1.0), ((100, 121), 110.5 / 100)])
def test_steps_within_a_fifth_are_left_alone(steps: tuple[int, int], factor: float) -> None:
    two = group(DECODER, site("a", image=5, steps=steps[0]), site("b", image=5, steps=steps[1]))
    assert step_factors(two, {"a": 0.5, "b": 0.5}, AWARE)["a"] == pytest.approx(factor)


def test_steps_are_left_alone_where_the_config_says_so() -> None:
    two = group(DECODER, site("a", image=5, steps=1), site("b", image=5, steps=9))
    assert step_factors(two, {"a": 0.5, "b": 0.5}, config.Aggregation(normalise_steps=False)) == {"a": 1.0, "b": 1.0}


def test_steps_of_a_site_of_weight_zero_do_not_count() -> None:
    three = group(ATTENTION, site("a", paired=5, steps=10), site("b", paired=5, steps=10), site("c", image=9, steps=1000))
    assert step_factors(three, {"a": 0.5, "b": 0.5, "c": 0.0}, AWARE) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_step_factors_of_weights_below_one_keep_their_sum_of_progress() -> None:
    """A rule that shrinks a group must not shrink it twice."""
    two = group(DECODER, site("a", image=5, steps=10), site("b", image=5, steps=30))
    assert step_factors(two, {"a": 0.1, "b": 0.1}, AWARE) == pytest.approx({"a": 2.0, "b": 2 / 3})
