from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor

from fedmix import config
from fedmix.batch import Batch
from fedmix.errors import ConfigError, RunError, UpdateError
from fedmix.federation.local import Assignment, arithmetic, device_named, pull, seed_of, train
from fedmix.federation.optimisers import Optimisers, OptimiserState, cosine
from fedmix.federation.update import REACHED_BY, Update, group_of, tower_of
from fedmix.objectives.mixture import Learner

EVERYTHING = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5}
BOTH_KINDS = pytest.mark.parametrize("kind", ["muon", "adamw"])


@dataclass(frozen=True)
class Fresh:
    """Another batch of the same streams at every step."""

    kinds: str

    def batch(self, step: int) -> Batch:
        return tiny.batch(self.kinds, seed=step)


@dataclass(frozen=True)
class Same:
    """The same batch at every step."""

    kinds: str

    def batch(self, step: int) -> Batch:
        return tiny.batch(self.kinds)


def stage(*, rounds: int = 1, steps: int = 4, **optimiser: object) -> config.Stage:
    return config.Stage(name="joint", rounds=rounds, local_steps=steps, optimiser=config.Optimiser(**optimiser))


def order(plan: config.Stage, *, first_step: int = 0, seed: int = 0, site: str = "west") -> Assignment:
    return Assignment(site, plan, first_step, seed)


def run(
    kinds: str, plan: config.Stage, *, seed: int = 0, site: str = "west", precision: str = "float32"
) -> tuple[Learner, Update, OptimiserState]:
    learner = tiny.learner(**EVERYTHING)
    update, state = train(learner, Fresh(kinds), order(plan, seed=seed, site=site), precision=precision)
    return learner, update, state


# ---- what an update holds


def test_deltas_are_the_difference_between_after_and_before() -> None:
    learner, update, _ = run("pppp", stage())
    before, after = tiny.parameters_of(tiny.learner(**EVERYTHING).model), tiny.parameters_of(learner.model)
    assert set(update.deltas) == set(before)
    assert all(torch.equal(update.deltas[name], after[name] - before[name]) for name in before)
    assert all(update.deltas[name].any() for name in before if "position" not in name)


@BOTH_KINDS
@pytest.mark.parametrize(("kinds", "stream"), [("iii", "image"), ("ttt", "text")])
def test_untouched_parameters_keep_their_bits_and_are_not_sent(kinds: str, stream: str, kind: str) -> None:
    learner, update, state = run(kinds, stage(kind=kind, weight_decay=0.5))
    before = tiny.parameters_of(tiny.learner(**EVERYTHING).model)
    expected = {name for name in before if stream in REACHED_BY[tower_of(group_of(name))]}
    assert set(update.deltas) == expected
    assert {key.split("/")[1] for key in state} == expected
    for name, value in learner.model.named_parameters():
        assert name in expected or torch.equal(value, before[name])


@BOTH_KINDS
def test_untouched_parameters_keep_their_bits_even_with_moments_from_earlier(kind: str) -> None:
    """Stale momentum moved them by 7.8 % in 60 steps where gradients were zeroed and not dropped."""
    learner, _, state = run("pppp", stage(kind=kind))
    between = tiny.parameters_of(learner.model)
    update, _ = train(learner, Fresh("iii"), order(stage(kind=kind)), optimiser_state=state)
    for name, value in learner.model.named_parameters():
        assert (name in update.deltas) == ("image" in REACHED_BY[tower_of(group_of(name))])
        assert name in update.deltas or torch.equal(value, between[name])


def test_update_counts_studies_steps_and_losses_as_sums() -> None:
    learner, update, _ = run("iitp", stage(steps=3))
    assert update.examples == {"image": 6, "text": 3, "paired": 3}
    assert (update.site, update.steps) == ("west", 3)
    assert set(update.metrics) == {"mvm/loss", "mlm/loss", "contrast/loss"}
    assert update.metrics["mvm/loss"][1] == 3 * (2 * 11 + 6)
    shapes = {name: value.shape for name, value in learner.model.named_parameters()}
    assert {name: delta.shape for name, delta in update.deltas.items()} == {name: shapes[name] for name in update.deltas}


def test_reported_loss_is_the_sum_over_the_steps() -> None:
    """With a vanishing learning rate the model stays, so the losses can be computed apart."""
    plan = stage(steps=3, kind="adamw", lr=1e-12)
    _, update, _ = run("iii", plan)
    learner, total = tiny.learner(**EVERYTHING), 0.0
    for step in range(3):
        chance = torch.Generator().manual_seed(seed_of(0, "west", "joint", step, "masks"))
        total += learner.terms(tiny.batch("iii", seed=step), chance)["mvm"].total.item()
    assert update.metrics["mvm/loss"][0] == pytest.approx(total, rel=1e-4)


def test_every_step_is_announced() -> None:
    seen: list[int] = []
    train(tiny.learner(**EVERYTHING), Fresh("i"), order(stage(rounds=3), first_step=4), on_step=seen.append)
    assert seen == [4, 5, 6, 7]


# ---- same inputs, same bits


def test_same_seed_gives_the_same_bits() -> None:
    one, again = run("itpp", stage())[1], run("itpp", stage())[1]
    assert all(torch.equal(one.deltas[name], again.deltas[name]) for name in one.deltas)
    assert one.metrics == again.metrics


@pytest.mark.parametrize("changed", [{"seed": 1}, {"site": "east"}])
def test_another_seed_or_site_hides_other_things(changed: dict[str, object]) -> None:
    assert run("itpp", stage(), **changed)[1].metrics != run("itpp", stage())[1].metrics


def test_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    learner = tiny.learner(**EVERYTHING)
    one, _ = train(learner, Fresh("itpp"), order(stage()))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again, _ = train(tiny.learner(**EVERYTHING), Fresh("itpp"), order(stage()))
    assert one.metrics == again.metrics


@BOTH_KINDS
def test_two_rounds_with_kept_moments_are_one_round_of_twice_the_steps(kind: str) -> None:
    whole, _, _ = run("itpp", stage(rounds=1, steps=6, kind=kind))
    halves, plan = tiny.learner(**EVERYTHING), stage(rounds=2, steps=3, kind=kind)
    _, state = train(halves, Fresh("itpp"), order(plan))
    kept = {name: value.clone() for name, value in state.items()}  # as if written to the site's disk and read again
    train(halves, Fresh("itpp"), order(plan, first_step=3), optimiser_state=kept)
    for (name, one), other in zip(whole.model.named_parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_forgotten_moments_do_make_a_difference() -> None:
    """Else the test above would show nothing."""
    whole, _, _ = run("itpp", stage(rounds=1, steps=6))
    halves, plan = tiny.learner(**EVERYTHING), stage(rounds=2, steps=3)
    train(halves, Fresh("itpp"), order(plan))
    train(halves, Fresh("itpp"), order(plan, first_step=3))
    name = "blocks.0.attention.qkv.weight"
    assert not torch.equal(dict(whole.model.named_parameters())[name], dict(halves.model.named_parameters())[name])


# ---- optimisers


def reference_steps(net: torch.nn.Module, plan: config.Optimiser, num_steps: int) -> None:
    """Clip, AdamW with decay on matrices and tables only, the cosine of the stage: written with torch alone."""
    free = ("position", "tag", "temperature")
    groups = [
        {"params": [p for n, p in net.named_parameters() if p.ndim > 1 and not any(part in n for part in free)]},
        {
            "params": [p for n, p in net.named_parameters() if p.ndim == 1 or any(part in n for part in free)],
            "weight_decay": 0.0,
        },
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    for step in range(num_steps):
        gradients(net, step)
        torch.nn.utils.clip_grad_norm_(net.parameters(), plan.clip_norm)
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * cosine((step + 1) / num_steps, warmup=plan.warmup, final=plan.final_lr)
        optimiser.step()
        optimiser.zero_grad()


def gradients(net: torch.nn.Module, step: int) -> None:
    chance = tiny.generator(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=chance)


def test_adamw_equals_torch_with_clipping_and_no_decay_on_vectors_and_tags() -> None:
    ours, theirs, plan = tiny.model(), tiny.model(), config.Optimiser(kind="adamw", weight_decay=0.3)
    optimisers = Optimisers(ours, plan)
    for step in range(4):
        gradients(ours, step)
        optimisers.step((step + 1) / 4)
    reference_steps(theirs, plan, 4)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    _, _, state = run("pppp", stage(kind="muon"))
    taken = {kind: {key.split("/")[1] for key in state if key.startswith(kind)} for kind in ("muon", "adamw")}
    shapes = {name: parameter.ndim for name, parameter in tiny.model().named_parameters()}
    assert taken["muon"] == {name for name, ndim in shapes.items() if ndim == 2 and "blocks." in name}
    assert taken["adamw"] == set(shapes) - taken["muon"]
    assert {name.split(".")[-2] for name in taken["muon"]} == {"qkv", "proj", "fc1", "fc2"}


def test_adamw_alone_takes_everything() -> None:
    _, _, state = run("pppp", stage(kind="adamw"))
    assert {key.split("/")[0] for key in state} == {"adamw"}


def test_gradients_are_dropped_after_a_step() -> None:
    """A zeroed gradient would let decay and momentum move what no loss reached in the next step."""
    learner, _, _ = run("pppp", stage())
    assert tiny.touched(learner.model) == set()


@pytest.mark.parametrize(
    "state",
    [
        {"sgd/word_head.logits.bias/exp_avg": torch.zeros(50)},
        {"adamw/no.such.parameter/exp_avg": torch.zeros(50)},
        {"adamw/word_head.logits.bias/exp_avg": torch.zeros(51)},
        {"muon/blocks.0.attention.qkv.weight/momentum_buffer": torch.zeros(1, 32)},
        {"nonsense": torch.zeros(1)},
    ],
)
def test_moments_of_another_experiment_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(RunError, match="belongs to another experiment; start the run anew"):
        Optimisers(tiny.model(), config.Optimiser()).load(state)


def test_moments_survive_saving_and_loading() -> None:
    learner, _, state = run("pppp", stage())
    again = Optimisers(learner.model, config.Optimiser())
    again.load(state)
    assert set(again.state()) == set(state)
    assert all(torch.equal(again.state()[key], state[key]) for key in state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_stops_training_before_the_model_moves(poison: float) -> None:
    learner = tiny.learner(**EVERYTHING)
    with torch.no_grad():
        learner.model.patch_decoder.values.bias[0] = poison
    before = tiny.parameters_of(learner.model)
    with pytest.raises(UpdateError, match=r"the gradient is not finite; lower optimiser.lr or optimiser.muon_lr"):
        train(learner, Fresh("iii"), order(stage()))
    for name, value in learner.model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_on_a_gpu_a_gradient_that_is_not_finite_is_found_at_the_rounds_end() -> None:
    """There the steps are not checked one by one; the sum of their norms remembers."""
    optimisers = Optimisers(tiny.model(), config.Optimiser())
    optimisers.check()
    for norm in (torch.tensor(2.0), torch.tensor(float("inf")), torch.tensor(1.0)):
        optimisers.remember(norm)
    with pytest.raises(UpdateError, match="the gradient is not finite"):
        optimisers.check()


# ---- devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a card")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch finds no CUDA device here; set it to cpu"):
        device_named("cuda")


@pytest.mark.gpu
@BOTH_KINDS
def test_a_gpu_trains_as_the_cpu_does_and_hands_back_tensors_of_the_cpu(kind: str) -> None:
    updates = []
    for device in ("cpu", "cuda"):
        learner = tiny.learner(**EVERYTHING)
        learner.model.to(device)
        update, state = train(learner, Fresh("itpp"), order(stage(kind=kind)))
        again, _ = train(learner, Fresh("itpp"), order(stage(kind=kind)), optimiser_state=state)
        updates.append(again)
        assert {value.device.type for value in (*update.deltas.values(), *state.values())} == {"cpu"}
    for name, (total, _) in updates[0].metrics.items():
        assert updates[1].metrics[name][0] == pytest.approx(total, rel=1e-3)


# ---- FedProx


def test_proximal_gradient_is_autograds_of_the_proximal_term() -> None:
    net, chance = tiny.model(), tiny.generator(4)
    start = {name: value + 0.1 * torch.randn(value.shape, generator=chance) for name, value in tiny.parameters_of(net).items()}
    tiny.image_pass(net).backward()
    tiny_loss = {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}
    pull(net, start, 0.3)
    found = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert set(found) == set(tiny_loss) < set(start)
    proximal = sum(0.15 * (parameter - start[name]).square().sum() for name, parameter in net.named_parameters())
    for parameter, expected in zip(net.parameters(), torch.autograd.grad(proximal, list(net.parameters())), strict=True):
        name = next(one for one, other in net.named_parameters() if other is parameter)
        if name in found:
            torch.testing.assert_close(found[name], tiny_loss[name] + expected)


def test_proximal_term_keeps_a_site_nearer_to_the_start() -> None:
    lengths = []
    for strength in (0.0, 10.0):
        update, _ = train(tiny.learner(**EVERYTHING), Same("pppp"), order(stage(steps=15, kind="adamw", proximal=strength)))
        lengths.append(sum(float(delta.square().sum()) for delta in update.deltas.values()))
    assert lengths[1] < 0.7 * lengths[0]


def test_proximal_term_comes_before_clipping() -> None:
    """However strong it is, no step's gradient is longer than the clip norm, and so neither is their running mean."""
    _, _, state = run("pppp", stage(steps=3, kind="adamw", proximal=1e6, clip_norm=0.5))
    means = [value for key, value in state.items() if key.endswith("/exp_avg")]
    assert math.sqrt(sum(float(value.square().sum()) for value in means)) <= 0.5


def test_proximal_term_of_the_first_step_is_zero() -> None:
    """At the round's start there is nothing to pull back from, so one step is the same to the bit."""
    one, other = (run("itpp", stage(steps=1, proximal=strength))[1] for strength in (0.0, 5.0))
    assert all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)


@BOTH_KINDS
def test_proximal_term_leaves_untouched_parameters_alone(kind: str) -> None:
    _, update, state = run("iii", stage(kind=kind, proximal=1.0))
    assert {group_of(name) for name in update.deltas}.isdisjoint({"text.embedding", "block0.text", "pair.projection"})
    assert {key.split("/")[1] for key in state} == set(update.deltas)


# ---- aggregated second moments


def test_update_tells_the_bias_corrected_mean_of_its_second_moments() -> None:
    """After one step v is (1 - beta2) g^2, and corrected g^2; g here is as it was after clipping."""
    plan = stage(steps=1, kind="adamw", second_moment="aggregated")
    _, update, state = run("iii", plan)
    assert set(update.second_moments) == set(update.deltas)
    for name, mean in update.second_moments.items():
        assert mean == pytest.approx(state[f"adamw/{name}/exp_avg_sq"].double().mean().item() / 0.02, rel=1e-6)
        gradient = state[f"adamw/{name}/exp_avg"].double() / 0.1
        assert mean == pytest.approx(gradient.square().mean().item(), rel=1e-4)


def test_second_moments_stay_at_home_unless_the_stage_aggregates_them() -> None:
    assert run("iii", stage())[1].second_moments == {}


def test_muons_matrices_have_no_second_moment_to_tell() -> None:
    _, update, state = run("iii", stage(second_moment="aggregated"))
    assert set(update.second_moments) == {key.split("/")[1] for key in state if key.startswith("adamw/")}


def test_second_moments_of_parameters_not_trained_this_round_are_not_told() -> None:
    plan = stage(steps=2, kind="adamw", second_moment="aggregated")
    learner, _, state = run("pppp", plan)
    update, _ = train(learner, Fresh("iii"), order(plan), optimiser_state=state)
    assert set(update.second_moments) == set(update.deltas)


def test_adamw_starting_from_a_second_moment_divides_by_it_uncorrected() -> None:
    """One step from mean v, no m: v' = .98 v + .02 g^2 and m' = .1 g, so the step is lr .1 g / root v'."""
    net, plan = tiny.model(), config.Optimiser(kind="adamw", lr=1e-3, weight_decay=0.0, warmup=0.0, clip_norm=1e9)
    before = tiny.parameters_of(net)
    optimisers = Optimisers(net, plan)
    optimisers.start_from(dict.fromkeys(before, 4.0))
    gradients(net, 0)
    expected = {}
    for name, parameter in net.named_parameters():
        gradient = parameter.grad
        expected[name] = before[name] - 1e-3 * 0.1 * gradient / (0.98 * 4.0 + 0.02 * gradient.square()).sqrt()
    optimisers.step(0.0)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)


def test_kept_first_moments_go_on_as_large_as_they_were() -> None:
    """After two steps m is biased by 1 - .9^2; started anew, its corrected value must be the same."""
    net, plan = tiny.model(), config.Optimiser(kind="adamw", clip_norm=1e9)
    first = Optimisers(net, plan)
    for step in range(2):
        gradients(net, step)
        first.step(0.1)
    kept = {name: value.clone() for name, value in first.state().items()}
    second = Optimisers(net, plan)
    second.load(kept)
    second.start_from(dict.fromkeys(tiny.parameters_of(net), 1.0))
    gradients(net, 2)
    gradient = net.word_head.logits.bias.grad.clone()
    second.step(0.2)
    corrected = kept["adamw/word_head.logits.bias/exp_avg"] / (1 - 0.9**2)
    found = second.state()["adamw/word_head.logits.bias/exp_avg"]
    torch.testing.assert_close(found, 0.9 * corrected + 0.1 * gradient)


def test_starting_from_second_moments_neither_shrinks_nor_blows_up_the_round() -> None:
    """A second round that starts from the sites' mean moves about as far as one that starts from its own moments."""
    plan = stage(rounds=2, steps=20, kind="adamw", second_moment="aggregated")
    lengths = {}
    for kind in ("own", "aggregated"):
        learner = tiny.learner(**EVERYTHING)
        update, state = train(learner, Fresh("itpp"), order(plan))
        means = update.second_moments if kind == "aggregated" else None
        update, _ = train(learner, Fresh("itpp"), order(plan, first_step=20), optimiser_state=state, second_moments=means)
        lengths[kind] = math.sqrt(sum(float(delta.square().sum()) for delta in update.deltas.values()))
    assert 0.5 < lengths["aggregated"] / lengths["own"] < 2.0


def test_second_moments_of_what_no_loss_reaches_make_no_moments() -> None:
    """A state for it would let decay move it in a later round."""
    learner, plan = tiny.learner(**EVERYTHING), stage(kind="adamw", second_moment="aggregated")
    before = tiny.parameters_of(learner.model)
    update, state = train(learner, Fresh("iii"), order(plan), second_moments=dict.fromkeys(before, 1e-6))
    assert {key.split("/")[1] for key in state} == set(update.deltas) < set(before)
    assert all(
        torch.equal(value, before[name]) for name, value in learner.model.named_parameters() if name not in update.deltas
    )


def test_second_moment_of_zero_is_not_started_from() -> None:
    names = tiny.parameters_of(tiny.model())
    plan = stage(kind="adamw", second_moment="aggregated")
    zero, _ = train(tiny.learner(**EVERYTHING), Fresh("iii"), order(plan), second_moments=dict.fromkeys(names, 0.0))
    none, _ = train(tiny.learner(**EVERYTHING), Fresh("iii"), order(plan))
    assert all(torch.equal(zero.deltas[name], none.deltas[name]) for name in none.deltas)


@pytest.mark.parametrize(
    "moments",
    [
        {"no.such.parameter": 1.0},
        {"blocks.0.attention.qkv.weight": 1.0},  # Muon's
        {"word_head.logits.bias": -1.0},
        {"word_head.logits.bias": float("nan")},
        {"word_head.logits.bias": float("inf")},
    ],
)
def test_second_moments_that_do_not_fit_are_refused(moments: dict[str, float]) -> None:
    with pytest.raises(RunError, match="should be positive numbers of parameters that AdamW trains here"):
        Optimisers(tiny.model(), config.Optimiser()).start_from(moments)


# ---- the learning rate


@pytest.mark.parametrize(
    ("progress", "share"),
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (0.325, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))],
)
def test_learning_rate_rises_and_falls_as_calculated_by_hand(progress: float, share: float) -> None:
    """A tenth of warm-up, then a cosine from 1 down to .2."""
    assert cosine(progress, warmup=0.1, final=0.2) == pytest.approx(share)


@pytest.mark.parametrize(("warmup", "progress", "share"), [(0.0, 0.0, 1.0), (1.0, 0.5, 0.5), (1.0, 1.0, 1.0)])
def test_no_warm_up_and_nothing_but_warm_up_are_defined(warmup: float, progress: float, share: float) -> None:
    assert cosine(progress, warmup=warmup, final=0.0) == pytest.approx(share)


def test_rounds_of_a_stage_follow_one_cosine() -> None:
    assert order(stage(rounds=3, steps=5)).num_stage_steps == 15


# ---- seeds


def test_seeds_are_known_numbers() -> None:
    """The same in every process, whatever its hash salt, and in every version: published runs hang on them."""
    assert seed_of(0) == 3456079177858693020
    assert seed_of(1, "west", "paired", 3, "masks") == 1947963890459290515


def test_seeds_differ_by_every_part_of_their_purpose() -> None:
    purposes = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, 1, "a")]
    seeds = {seed_of(*purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- precision


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 arithmetic; torch would emulate it, which says nothing about training with it",
)
def test_bfloat16_learns_like_float32() -> None:
    """After 60 steps on eight pairs each loss, read in float32, has fallen clearly and as far, within 3 % of its fall."""
    losses = {}
    for precision in ("untrained", "float32", "bfloat16"):
        learner = tiny.learner(mvm=1.0, mlm=0.3, contrast=1.0)
        if precision != "untrained":
            train(learner, Same("pppppppp"), order(stage(steps=60)), precision=precision)
        with torch.no_grad():
            terms = [learner.terms(tiny.batch("pppppppp"), tiny.generator(seed)) for seed in range(10)]
        losses[precision] = {name: sum(found[name].mean().item() for found in terms) / 10 for name in terms[0]}
    for name in ("mvm", "mlm", "contrast"):
        fall = losses["untrained"][name] - losses["float32"][name]  # a share of the loss itself would mean nothing near zero
        assert losses["bfloat16"][name] == pytest.approx(losses["float32"][name], abs=0.03 * fall)
        assert losses["bfloat16"][name] < 0.85 * losses["untrained"][name]


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_trunk_runs_in_the_precision_asked_for_and_losses_in_float32(precision: str, dtype: torch.dtype) -> None:
    learner = tiny.learner(**EVERYTHING)
    with arithmetic(precision):
        logits = learner.model.word_head(learner.model.encode(words_BL=tiny.words(2)).tokens["text"])
        terms = learner.terms(tiny.batch("itpppp"), tiny.generator())
    assert logits.dtype == dtype
    assert {term.total.dtype for term in terms.values()} == {torch.float32}


def test_parameters_deltas_and_moments_stay_float32_under_bfloat16() -> None:
    learner, update, state = run("itpp", stage(), precision="bfloat16")
    tensors = [*learner.model.parameters(), *update.deltas.values(), *state.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


# ---- what looks back to the round's start


LOOKS_BACK: dict[str, object] = EVERYTHING | {
    "anchor": 0.5,
    "soft_targets": 0.2,
    "same_patient": "left_out",
    "queue": 8,
    "match_negatives": "hard",
    "joint_masking": "one_at_a_time",
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_round_that_looks_back_is_repeatable_and_leaves_nothing_behind(precision: str) -> None:
    """The same round from the same learner twice gives the same bits: no copy and no queue of the first is left."""
    learner = tiny.learner(**LOOKS_BACK)
    start = tiny.parameters_of(learner.model)
    found = []
    for _ in range(2):
        learner.model.load_state_dict(start)
        update, _ = train(learner, Fresh("itpppp"), order(stage()), precision=precision)
        found.append(update)
        assert learner.start is None
        assert learner.past is None
    assert all(torch.equal(delta, found[1].deltas[name]) for name, delta in found[0].deltas.items())
    assert found[0].metrics == found[1].metrics
    assert found[0].metrics["anchor/loss"][0] > 0


def test_round_that_looks_back_learns_in_bfloat16_as_in_float32() -> None:
    """Casts of the round-start model's weights must not stand in for the model's own (autocast keeps casts)."""
    metrics = []
    for precision in ("float32", "bfloat16"):
        update, _ = train(tiny.learner(**LOOKS_BACK), Same("pppppp"), order(stage(steps=20)), precision=precision)
        metrics.append(update.metrics)
    for name in ("mvm/loss", "mlm/loss", "contrast/loss"):
        assert metrics[0][name][0] == pytest.approx(metrics[1][name][0], rel=0.05)
