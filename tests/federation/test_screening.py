"""What the server refuses, and that it refuses no honest site."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedmix import config
from fedmix.batch import Batch, Stream
from fedmix.errors import ConfigError, UpdateError
from fedmix.federation import screening
from fedmix.federation.compression import decode_rows, encode
from fedmix.federation.local import Assignment, train
from fedmix.federation.optimisers import Optimisers, cosine
from fedmix.federation.screening import (
    Asked,
    Screen,
    check_arrays,
    check_names,
    check_second_moments,
    check_work,
    norms_of,
    reach,
)
from fedmix.federation.update import REACHED_BY, Update, group_of, rows_of, tower_of

PLAIN = config.Wire()
EVERYTHING = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5}
KINDS: dict[Stream, str] = {"image": "iii", "text": "ttt", "paired": "pppp"}
ASKED = Asked("paired", steps=3, batch_size=8, studies=20)


@dataclass(frozen=True)
class Fresh:
    """Another batch of the same streams at every step."""

    kinds: str

    def batch(self, step: int) -> Batch:
        return tiny.batch(self.kinds, seed=step)


def stage(name: str = "one", *, steps: int = 3, rounds: int = 1, **optimiser: Any) -> config.Stage:
    return config.Stage(name=name, rounds=rounds, local_steps=steps, optimiser=config.Optimiser(**optimiser))


# ---- counts


def test_work_as_it_was_asked_for_counts_up_to_the_studies_that_the_site_registered() -> None:
    done = {"image": 0, "text": 0, "paired": 24}
    assert check_work(done, 3, {"mvm/loss": (5.0, 2.0)}, ASKED) == {"image": 0, "text": 0, "paired": 20}
    assert check_work({"paired": 7}, 3, {}, ASKED) == {"image": 0, "text": 0, "paired": 7}
    assert check_work({"paired": 48}, 3, {}, ASKED)["paired"] == 20


@pytest.mark.parametrize(
    ("examples", "steps", "metrics", "why"),
    [
        ({"paired": 49}, 3, {}, "counts more than 48 studies, which its steps cannot have seen"),
        ({"paired": 10**12}, 3, {}, "cannot have seen"),
        ({"paired": 0}, 3, {}, "at least one step on at least one study"),
        ({}, 3, {}, "at least one study"),
        ({"paired": -9}, 3, {}, "at least one study"),
        ({"paired": 10, "image": -9}, 3, {}, "at least one study"),
        ({"paired": 10, "image": 9}, 3, {}, r"counts 9 studies of a stream that is not its own \(paired\)"),
        ({"image": 10}, 3, {}, "not its own"),
        ({"paired": 10, "video": 1}, 3, {}, "image, text, paired and nothing else"),
        ({"paired": 10}, 4, {}, "took 4 steps, it was asked for 3"),
        ({"paired": 10}, 0, {}, "at least one step"),
        ({"paired": 10}, -3, {}, "at least one step"),
        ({"paired": 10}, 3, {"mvm/loss": (math.nan, 1.0)}, "not finite"),
        ({"paired": 10}, 3, {"mvm/loss": (1.0, math.inf)}, "not finite"),
        ({"paired": 10}, 3, {"mvm/loss": (1.0, -1.0)}, "negative weight"),
    ],
)
def test_work_that_cannot_be_true_is_refused(
    examples: dict[Stream, int], steps: int, metrics: dict[str, tuple[float, float]], why: str
) -> None:
    with pytest.raises(UpdateError, match=why):
        check_work(examples, steps, metrics, ASKED)


AGGREGATED = config.Optimiser(second_moment="aggregated", clip_norm=2.0)


def test_second_moments_are_refused_unless_clipped_gradients_can_have_left_them() -> None:
    shapes = {"a": (4, 5)}
    check_second_moments({}, shapes, config.Optimiser())
    check_second_moments({"a": 0.0}, shapes, AGGREGATED)
    check_second_moments({"a": 0.2}, shapes, AGGREGATED)  # 2^2 over 20 entries
    with pytest.raises(UpdateError, match="which this stage does not aggregate"):
        check_second_moments({"a": 0.1}, shapes, config.Optimiser())
    for value in (0.21, -1e-9, math.nan, math.inf, 1e30):
        with pytest.raises(UpdateError, match=r"a: mean second moment is .* leave at most 0.202"):
            check_second_moments({"a": value}, shapes, AGGREGATED)
    with pytest.raises(UpdateError, match="Muon trains it and has none"):
        check_second_moments({"blocks.0.a": 0.0}, {"blocks.0.a": (2, 2)}, AGGREGATED)
    with pytest.raises(UpdateError, match=r"^1 second moments are of parameters that the site was not to train$"):
        check_second_moments({"Jane Doe": 0.1}, shapes, AGGREGATED)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_second_moments_of_an_honest_site_pass_round_after_round(kind: str) -> None:
    plan = stage(steps=4, rounds=3, kind=kind, second_moment="aggregated", clip_norm=0.1)
    learner, state, moments = tiny.learner(**EVERYTHING), None, None
    shapes = {name: value.shape for name, value in learner.model.named_parameters()}
    for number in range(3):
        order = Assignment("west", plan, 4 * number, 0)
        update, state = train(learner, Fresh("pppp"), order, optimiser_state=state, second_moments=moments)
        moments = dict(update.second_moments)
        assert moments
        check_second_moments(moments, shapes, plan.optimiser)


# ---- arrays

SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.attention.qkv.weight": (6, 4),
    "blocks.0.attention.qkv.bias": (6,),
    "blocks.0.mlp.text.fc1.weight": (3, 5),
    "blocks.0.mlp_norm.text.weight": (4,),
    "word_head.logits.weight": (7, 4),
    "word_head.logits.bias": (7,),
    "projection.temperature": (),
    "patch_decoder.weight": (4, 4),
}
CODINGS = [
    PLAIN,
    config.Wire(coding="float16"),
    config.Wire(coding="int8"),
    config.Wire(coding="int4"),
    config.Wire(coding="int4", keep=0.4),
    config.Wire(keep=0.4),
]


def arrays(wire: config.Wire = PLAIN, *, only: str = "") -> dict[str, NDArray[Any]]:
    """An honest update as it travels."""
    generator = torch.Generator().manual_seed(1)
    deltas = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if only in name}
    coded, _ = encode(deltas, {}, wire, generator)
    return {name + part: array for name, parts in coded.items() for part, array in parts.items()}


@pytest.mark.parametrize("wire", CODINGS, ids=lambda wire: f"{wire.coding}-{wire.keep}")
def test_an_honest_update_is_taken_apart_whatever_its_coding(wire: config.Wire) -> None:
    sent = arrays(wire)
    coded = check_arrays(sent, SHAPES, "paired", wire)
    assert set(coded) == set(SHAPES)
    assert {name + part for name, parts in coded.items() for part in parts} == set(sent)
    for name, parts in coded.items():
        assert decode_rows(parts, rows_of(SHAPES[name])[1], wire).shape == rows_of(SHAPES[name])


LOGITS = "word_head.logits.weight"  # [7, 4]


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros(1, np.float32), r"logits.weight: update is \(1,\) float32, the model has \(7, 4\) float32"),
        (np.zeros((1, 4), np.float32), r"update is \(1, 4\) float32"),
        (np.zeros((8, 4), np.float32), r"update is \(8, 4\)"),
        (np.zeros((7, 5), np.float32), r"update is \(7, 5\)"),
        (np.zeros(28, np.float32), r"update is \(28,\)"),
        (np.zeros((7, 4, 1), np.float32), r"update is \(7, 4, 1\)"),
        (np.zeros((4, 7), np.float32), r"update is \(4, 7\)"),
        (np.zeros((0, 4), np.float32), r"update is \(0, 4\)"),
        (np.zeros((7, 4), np.float64), "float64, the model has"),
        (np.zeros((7, 4), np.float16), "float16, the model has"),
        (np.zeros((7, 4), np.int8), "int8, the model has"),
        (np.zeros((7, 4), np.complex64), "complex64"),
        (np.zeros((7, 4), ">f4"), ">f4, the model has"),
        (np.full((7, 4), np.nan, np.float32), "logits.weight: coded rows hold values that are not finite"),
        (np.array([[0.0] * 4] * 6 + [[0.0, 0.0, 0.0, -np.inf]], np.float32), "not finite"),
    ],
)
def test_an_array_of_another_shape_type_or_without_finite_values_is_refused(array: NDArray[Any], why: str) -> None:
    with pytest.raises(UpdateError, match=why):
        check_arrays({**arrays(), LOGITS: array}, SHAPES, "paired", PLAIN)


@pytest.mark.parametrize(
    ("part", "array", "why"),
    [
        (":scale", np.full(7, np.nan, np.float32), "logits.weight: coded rows hold a scale"),
        (":scale", np.full(7, -1.0, np.float32), "scale"),
        (":scale", np.full(6, 1.0, np.float32), r"scale: update is \(6,\)"),
        (":scale", np.full(7, 1.0, np.float64), "float64"),
        (":index", np.full((7, 2), 4, np.uint16), "index that is not one of a row's 4 places"),
        (":index", np.full((7, 2), 1, np.uint16), "repeat"),
        (":index", np.zeros((7, 3), np.uint16), r"index: update is \(7, 3\)"),
        (":index", np.zeros((7, 2), np.int64), "int64"),
        ("", np.zeros((7, 2), np.uint8), r"update is \(7, 2\) uint8, the model has \(7, 1\)"),
    ],
)
def test_a_coded_part_that_cannot_be_decoded_is_refused(part: str, array: NDArray[Any], why: str) -> None:
    wire = config.Wire(coding="int4", keep=0.4)
    with pytest.raises(UpdateError, match=why):
        check_arrays({**arrays(wire), LOGITS + part: array}, SHAPES, "paired", wire)


def test_unknown_names_are_counted_and_not_repeated() -> None:
    for name in ("Jane Doe", f"{LOGITS}:scale", f"{LOGITS}:", ""):
        with pytest.raises(UpdateError, match=r"^1 tensors in the update are not among those that the site was to train$"):
            check_arrays({**arrays(), name: np.zeros(1, np.float32)}, SHAPES, "paired", PLAIN)


def test_a_site_sends_only_towers_that_its_stream_reaches() -> None:
    with pytest.raises(UpdateError, match=r"^5 tensors in the update are not among"):  # text and pair
        check_names(SHAPES.keys(), SHAPES, "image", PLAIN)
    check_names([name for name in SHAPES if "attention" in name or "patch_decoder" in name], SHAPES, "image", PLAIN)


def test_an_update_without_a_tensor_is_refused() -> None:
    with pytest.raises(UpdateError, match="the update is empty"):
        check_arrays({}, SHAPES, "paired", PLAIN)


@pytest.mark.parametrize("left_out", ["word_head.logits.bias", LOGITS, "blocks.0.attention.qkv.bias"])
def test_a_part_of_a_group_alone_is_refused(left_out: str) -> None:
    sent = arrays()
    del sent[left_out]
    with pytest.raises(UpdateError, match=f"without {left_out}; a site sends all of it or nothing"):
        check_arrays(sent, SHAPES, "paired", PLAIN)


@pytest.mark.parametrize("part", ["", ":scale", ":index"])
def test_a_parameter_without_one_of_its_parts_is_refused(part: str) -> None:
    wire = config.Wire(coding="int8", keep=0.4)
    sent = arrays(wire)
    del sent[LOGITS + part]
    with pytest.raises(UpdateError, match=f"without {LOGITS}{part}; a site sends all of it or nothing"):
        check_arrays(sent, SHAPES, "paired", wire)


def test_whole_groups_may_be_left_out() -> None:
    check_arrays(arrays(only="word_head"), SHAPES, "text", PLAIN)
    check_arrays(arrays(only="blocks.0.mlp"), SHAPES, "text", PLAIN)


@pytest.mark.parametrize(
    "sizes", [{}, {"modality_experts": False}, {"pair_experts": 1}], ids=["experts", "shared", "pair_experts"]
)
def test_what_an_honest_site_trains_is_whole_whatever_the_objectives(sizes: dict[str, object]) -> None:
    shapes = {name: value.shape for name, value in tiny.model(**sizes).named_parameters()}
    num_tried = 0
    for mvm, mlm, contrast, match, joint in itertools.product((0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 0.5)):
        if mvm + mlm + contrast + match == 0 or (match and not joint):
            continue
        objectives = {"mvm": mvm, "mlm": mlm, "contrast": contrast, "match": match, "joint_share": joint}
        for stream, kinds in {**KINDS, "paired": "pp"}.items():
            learner = tiny.learner(**objectives, sizes=sizes)
            try:
                update, _ = train(learner, Fresh(kinds), Assignment("west", stage(steps=1), 0, 0))
            except ConfigError:  # nothing to learn from such studies
                continue
            check_names(update.names(), shapes, stream, PLAIN)
            num_tried += 1
    assert num_tried > 30


# ---- values


def test_norms_are_lengths_by_group() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = norms_of(Update("west", deltas, {"paired": 4}, 3), SHAPES)
    assert set(found) == {group_of(name) for name in SHAPES}
    for group, length in found.items():
        values = torch.cat([delta.flatten() for name, delta in deltas.items() if group_of(name) == group]).double()
        assert length == pytest.approx(float(values.norm()), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 27])
def test_one_value_that_is_not_finite_is_refused(value: float, place: int) -> None:
    delta = torch.zeros(7, 4)
    delta.view(-1)[place] = value
    with pytest.raises(UpdateError, match=r"text\.head: update holds values that are not finite"):
        norms_of(Update("west", {LOGITS: delta}, {"paired": 4}, 3), SHAPES)


def test_the_largest_float32_values_have_a_finite_norm() -> None:
    update = Update("west", {LOGITS: torch.full((7, 4), 3e38)}, {"paired": 4}, 3)
    assert norms_of(update, SHAPES)["text.head"] == pytest.approx(3e38 * 28**0.5)


# ---- how far steps can lead


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_no_gradient_moves_a_parameter_further_than_its_reach(kind: str) -> None:
    """Gradients of one sign that grow by 0.98 / 0.9 a step drive AdamW's ratio as far up as it goes; others less far."""
    plan = stage(steps=40, kind=kind, lr=1e-2, muon_lr=2e-2, weight_decay=0.05, warmup=0.0, clip_norm=1e9)
    most = reach(tiny.parameters_of(tiny.model()), [plan], PLAIN)
    shares = {}
    for growth, is_random in ((1.0, False), (1.089, False), (1.2, False), (1.089, True)):
        net, chance = tiny.model(), tiny.generator()
        before = tiny.parameters_of(net)
        optimisers = Optimisers(net, plan.optimiser)
        for step in range(40):
            for value in net.parameters():
                direction = torch.randn(value.shape, generator=chance) if is_random else torch.ones(value.shape)
                value.grad = 1e-3 * growth**step * direction
            optimisers.step(1e-9)
        deltas = {name: value - before[name] for name, value in tiny.parameters_of(net).items()}
        moved = norms_of(Update("west", deltas, {"paired": 4}, 40), {name: delta.shape for name, delta in deltas.items()})
        shares[growth, is_random] = max(moved[group] / most[group] for group in most)
    assert max(shares.values()) <= 1.0
    assert kind == "muon" or shares[1.089, False] > 0.6  # no far-fetched bound


def test_the_constants_are_those_of_the_optimisers_in_use() -> None:
    adamw = Optimisers(tiny.model(), config.Optimiser(kind="adamw"))._parts["adamw"][0]
    first, second = adamw.param_groups[0]["betas"]
    assert math.sqrt((1 - first) ** 2 / (1 - second) / (1 - first**2 / second)) <= screening.ADAMW_STEP < 1.71
    muon = Optimisers(tiny.model(), config.Optimiser())._parts["muon"][0].param_groups[0]
    a, b, c = muon["ns_coefficients"]
    assert muon["adjust_lr_fn"] is None
    x = torch.linspace(0, 1.203, 100_001, dtype=torch.float64)
    largest = float((a * x + b * x**3 + c * x**5).max())
    assert 1.2 < largest <= 1.203  # so the interval is mapped into itself
    assert 1.05 * largest < screening.MUON_STEP
    assert cosine(0.1, warmup=0.1, final=0.0) == 1.0


def test_decay_alone_stays_within_reach_and_counts_by_the_length_of_the_parameter() -> None:
    plan = stage(steps=10, kind="adamw", lr=1e-3, weight_decay=10.0)
    value = torch.full((30, 40), 5.0)
    length = float(value.norm())
    shrunk = length * (1 - (1 - 1e-3 * 10.0) ** 10)
    most = reach({LOGITS: value}, [plan], PLAIN)["text.head"]
    assert shrunk < most < 1.2 * shrunk


def test_reach_is_that_of_the_farthest_of_the_stages_and_grows_with_steps() -> None:
    parameters = tiny.parameters_of(tiny.model())
    near, far = stage(lr=1e-4, muon_lr=1e-4), stage(lr=1e-2, muon_lr=1e-2)
    assert reach(parameters, [near, far], PLAIN) == reach(parameters, [far, near], PLAIN) == reach(parameters, [far], PLAIN)
    more = reach(parameters, [stage(lr=1e-4, muon_lr=1e-4, steps=6)], PLAIN)
    assert all(2.0 <= more[group] / norm < 2.01 for group, norm in reach(parameters, [near], PLAIN).items())


# ---- honest sites pass, others do not


def trained(stream: Stream, plans: list[config.Stage]) -> list[tuple[config.Stage, dict[str, Tensor], dict[str, Tensor]]]:
    """Rounds of one site: stage, parameters before, and what it learned."""
    learner, found = tiny.learner(**EVERYTHING), []
    for plan in plans:
        state: Mapping[str, Tensor] | None = None
        for number in range(plan.rounds):
            before = tiny.parameters_of(learner.model)
            order = Assignment("west", plan, number * plan.local_steps, 0)
            update, state = train(learner, Fresh(KINDS[stream]), order, optimiser_state=state)
            found.append((plan, before, dict(update.deltas)))
    return found


def sent(deltas: Mapping[str, Tensor], residual: dict[str, Tensor], wire: config.Wire) -> tuple[Update, dict[str, Tensor]]:
    """What arrives of an update, and what stays at the site."""
    coded, residual = encode(deltas, residual, wire, tiny.generator())
    arrived = {name: decode_rows(parts, rows_of(deltas[name].shape)[1], wire) for name, parts in coded.items()}
    return Update("west", {name: value.reshape(deltas[name].shape) for name, value in arrived.items()}, {}, 3), residual


@pytest.mark.parametrize("wire", [PLAIN, config.Wire(coding="int4", keep=0.1)], ids=["plain", "coarse"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("stream", ["image", "paired"])
def test_honest_updates_pass_over_warm_up_decay_and_stages_and_scaled_ones_never_do(
    stream: Stream, kind: str, wire: config.Wire
) -> None:
    """Learning rates a hundred times apart; a short warm-up, so that rounds differ as much as they can."""
    plans = [
        stage("high", steps=2, rounds=4, kind=kind, lr=1e-2, muon_lr=3e-2, warmup=0.5),
        stage("low", steps=2, rounds=3, kind=kind, lr=1e-4, muon_lr=3e-4, final_lr=0.0),
        stage("middle", steps=2, rounds=3, kind=kind, lr=3e-3, muon_lr=1e-2),
    ]
    kept: dict[str, Any] = {}
    residual: dict[str, Tensor] = {}
    highest = 0.0
    for plan, before, deltas in trained(stream, plans):
        so_far = plans[: plans.index(plan) + 1]
        shapes = {name: value.shape for name, value in before.items()}
        most = reach(before, so_far, wire)
        screen = Screen.from_dict(kept, config.Screening(), plan)
        update, residual = sent(deltas, residual, wire)
        norms = norms_of(update, shapes)
        for group in norms:
            with pytest.raises(UpdateError, match=f"{group}: update is .* long, at most .* is taken from {stream} sites"):
                screen.take("west", stream, {**norms, group: norms[group] * 1e6}, most)
        screen.take("west", stream, norms, most)
        highest = max(highest, *(norms[group] / screen.bound(group, stream, most[group]) for group in norms))
        screen.keep()
        kept = json.loads(json.dumps(screen.to_dict()))
    assert highest < 0.5


@pytest.mark.parametrize(
    ("wire", "least"),
    [(config.Wire(keep=0.1), 2.5), (config.Wire(coding="int4", error_feedback=False), 1.1)],
    ids=["top", "int4"],
)
def test_what_coding_adds_to_the_length_of_an_update_is_within_reach(wire: config.Wire, least: float) -> None:
    """Of equal values a tenth is sent, later with all that was not; small values beside a large one are rounded up."""
    delta = torch.ones(1, 100) if wire.keep < 1 else torch.full((1, 3000), 0.01).index_fill(1, torch.tensor([0]), 1.0)
    name, residual, longest = LOGITS, {}, 0.0
    for _ in range(30):
        update, residual = sent({name: delta}, residual, wire)
        longest = max(longest, norms_of(update, {name: delta.shape})["text.head"])
    plain, coded = (reach({name: delta}, [stage()], each)["text.head"] for each in (PLAIN, wire))
    assert least < longest / float(delta.norm()) <= coded / plain


def test_reach_holds_even_against_a_site_that_grows_by_what_the_median_allows() -> None:
    screen, most = Screen.from_dict({}, config.Screening(norm_bound=10.0, window=1), stage()), {"text.head": 2.0}
    for norm in (0.01, 0.09, 0.8):
        screen.take("south", "text", {"text.head": norm}, most)
        screen.keep()
    with pytest.raises(UpdateError, match="at most 2 is taken"):
        screen.take("south", "text", {"text.head": 2.1}, most)


# ---- what is remembered


def test_the_bound_is_the_running_median_of_the_last_norms_of_the_stream() -> None:
    screen = Screen.from_dict({}, config.Screening(norm_bound=2.0, window=3), stage())
    most = {"text.head": 1e9}
    assert screen.bound("text.head", "text", 1e9) == 1e9
    for norm, median in ((1.0, 1.0), (2.0, 1.5), (3.0, 2.0), (4.0, 3.0), (6.0, 4.0)):
        screen.take("south", "text", {"text.head": norm}, most)
        screen.keep()
        assert screen.bound("text.head", "text", 1e9) == 2.0 * median
    assert screen.bound("text.head", "paired", 1e9) == 1e9
    assert screen.bound("text.norm", "text", 1e9) == 1e9


def test_norms_of_zero_bound_nothing() -> None:
    screen = Screen.from_dict({}, config.Screening(), stage())
    screen.take("south", "text", {"text.head": 0.0}, {"text.head": 5.0})
    screen.keep()
    assert screen.bound("text.head", "text", 5.0) == 5.0


def test_norms_of_a_round_count_from_the_next_and_only_if_it_is_kept() -> None:
    screen, most = Screen.from_dict({}, config.Screening(norm_bound=2.0), stage()), {"text.head": 1e9}
    screen.take("south", "text", {"text.head": 1.0}, most)
    screen.take("north", "text", {"text.head": 1e8}, most)  # no bound yet, whoever came first
    assert screen.to_dict()["norms"] == {}


@given(st.permutations(range(5)))
@settings(max_examples=30, deadline=None)
def test_the_order_in_which_sites_answer_is_not_remembered(order: list[int]) -> None:
    screens = [Screen.from_dict({}, config.Screening(window=3), stage()) for _ in range(2)]
    for screen, sequence in zip(screens, (range(5), order), strict=True):
        for number in sequence:
            screen.take(f"site-{number}", "text", {"text.head": 1.0 + number}, {"text.head": 1e9})
        screen.keep()
    assert screens[0].to_dict() == screens[1].to_dict()
    assert screens[0].to_dict()["norms"] == {"text.head/text": [3.0, 4.0, 5.0]}


def test_another_stage_forgets_norms_and_keeps_strikes() -> None:
    screen = Screen.from_dict({}, config.Screening(), stage("one"))
    screen.take("south", "text", {"text.head": 1.0}, {"text.head": 1e9})
    screen.keep()
    screen.strike("west")
    kept = screen.to_dict()
    assert Screen.from_dict(kept, config.Screening(), stage("one")).to_dict() == kept
    assert Screen.from_dict(kept, config.Screening(), stage("two")).to_dict() == {
        "stage": "two",
        "strikes": {"west": 1},
        "norms": {},
    }


def test_a_site_is_not_asked_again_after_its_last_strike() -> None:
    kept: dict[str, Any] = {}
    for number in (1, 2, 3):
        screen = Screen.from_dict(kept, config.Screening(max_strikes=3), stage(str(number)))
        assert not screen.struck_out()
        assert screen.strike("west") == number
        kept = json.loads(json.dumps(screen.to_dict()))
    assert screen.struck_out() == {"west"}
    assert Screen.from_dict(kept, config.Screening(max_strikes=3), stage()).struck_out() == {"west"}


def test_what_was_told_does_not_change_with_the_screen() -> None:
    screen = Screen.from_dict({}, config.Screening(), stage())
    before = screen.to_dict()
    screen.strike("west")
    screen.take("south", "text", {"text.head": 1.0}, {"text.head": 1e9})
    screen.keep()
    assert before == {"stage": "one", "strikes": {}, "norms": {}}


def test_every_tower_is_reached_by_a_stream_of_the_test() -> None:
    assert {tower_of(group_of(name)) for name in SHAPES} == set(REACHED_BY)
