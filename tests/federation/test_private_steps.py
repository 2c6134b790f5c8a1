"""Private steps against a plain loop over patients: what each adds, how far it reaches, and how much noise there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch, Term
from fedmix.errors import ConfigError
from fedmix.federation import local, private
from fedmix.federation.private import Protection
from fedmix.federation.trainable import HEADS, narrowed
from fedmix.federation.update import group_of
from fedmix.model.adapters import learns
from fedmix.objectives.mixture import Learner
from fedmix.privacy import dpsgd
from fedmix.privacy.dpsgd import ClippedSum, learning_modules

Gradients = dict[str, Tensor]
NO_CLIP = 1e6


class People:
    """Patients with studies of given kinds, all of whom are always drawn."""

    rate = 1.0

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = list(kinds)
        patients = [number for number, own in enumerate(kinds) for _ in own]
        self.batch = tiny.batch("".join(kinds), patients=patients)

    @property
    def num_patients(self) -> int:
        return len(self.kinds)

    @property
    def expected(self) -> int:
        return len(self.kinds)

    def draw(self, drawn: Tensor, chance: Generator) -> Batch | None:
        rows = [row for row, patient in enumerate(self.batch.patient.tolist()) if patient in drawn.tolist()]
        return part(self.batch, rows, renumbered=True) if rows else None


def part(batch: Batch, rows: Sequence[int], *, renumbered: bool = False) -> Batch:
    """Some studies of a batch."""
    chosen = torch.zeros(len(batch), dtype=torch.bool)
    chosen[list(rows)] = True
    assert batch.patient is not None
    patient = batch.patient[chosen]
    return Batch(
        image=None if batch.image is None or not bool(batch.has_image[chosen].any()) else batch.image[chosen[batch.has_image]],
        text=None if batch.text is None or not bool(batch.has_text[chosen].any()) else batch.text[chosen[batch.has_text]],
        has_image=batch.has_image[chosen],
        has_text=batch.has_text[chosen],
        patient=patient.unique(return_inverse=True)[1] if renumbered else patient,
    )


def loop(learner: Learner, batch: Batch, chance: Generator) -> list[Gradients]:
    """The gradient of each patient's loss by autograd alone, study by study: the mean over the patient's studies of what
    ``Learner.loss`` says of the terms that ``Learner.ask`` finds for that study.
    """
    readings = learner.plan_each(batch, chance)
    found: list[Gradients] = []
    assert batch.patient is not None
    for patient in batch.patient.unique().tolist():
        studies = [study for study, whose in enumerate(batch.patient.tolist()) if whose == patient]
        learner.model.zero_grad(set_to_none=True)
        losses = []
        for study in studies:
            terms: dict[str, Term] = {}
            for reading, study_N in readings:
                for row in (study_N == study).nonzero().flatten().tolist():
                    one = reading.part(slice(row, row + 1))
                    for name, term in learner.ask(one, learner.encode(one)):
                        terms[name] = terms[name] + term if name in terms else term
            losses.append(learner.loss(terms))
        torch.stack(losses).mean().backward()
        found.append({name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None})
    learner.model.zero_grad(set_to_none=True)
    return found


def length(gradients: Gradients) -> float:
    return float(torch.stack([value.double().square().sum() for value in gradients.values()]).sum().sqrt())


def added(gradients: Sequence[Gradients], factors: Sequence[float]) -> Gradients:
    total: Gradients = {}
    for one, factor in zip(gradients, factors, strict=True):
        for name, value in one.items():
            total[name] = total.get(name, torch.zeros_like(value)) + factor * value
    return total


def steps_of(
    learner: Learner, people: People, guard: Protection, stream: str = "paired", *, precision: str = "float32"
) -> private.PrivateSteps:
    return private.PrivateSteps(learner, people, stream, guard, lambda: local.arithmetic(precision))  # type: ignore[arg-type]


def protection(*, noise: float = 0.0, clip: float = NO_CLIP, seed: int = 5, **settings: object) -> Protection:
    wanted = config.Privacy(mode="dp", noise_multiplier=1.0, clip=clip, **settings)  # type: ignore[arg-type]
    return Protection(wanted, noise, tiny.generator(seed))


def clipped_sum(learner: Learner, batch: Batch, clip: float) -> tuple[Gradients, Tensor]:
    """What the book-keeping finds for a batch whose patients are numbered from 0, and each patient's norm."""
    steps = ClippedSum(learning_modules(learner.model, lambda name: True), clip)
    with private.no_gradients_of(learner.model), steps.watching():
        norm_U = private.add(learner, steps, batch, tiny.generator(5))
    return steps.totals, norm_U


people = st.lists(st.text("itp", min_size=1, max_size=3), min_size=1, max_size=4)


@given(people, st.sampled_from([{}, {"modality_experts": False}, {"pair_experts": 1}]))
@settings(max_examples=20, deadline=None)
def test_clipped_patient_gradients_equal_a_loop_over_patients(kinds: list[str], sizes: dict[str, object]) -> None:
    learner = tiny.learner(sizes=dict(sizes), mvm=1.0, mlm=0.3, joint_share=0.5)
    learner.model.train()
    batch = People(kinds).batch
    each = loop(learner, batch, tiny.generator(5))
    lengths = [length(gradients) for gradients in each]
    clip = sorted(lengths)[len(lengths) // 2] * 0.9  # some are clipped
    expected = added(each, [min(1.0, clip / one) for one in lengths])
    found, norm_U = clipped_sum(learner, batch, clip)
    torch.testing.assert_close(norm_U, torch.tensor(lengths, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    assert set(found) == set(expected)
    scale = length(expected)
    for name, value in expected.items():
        assert length({name: found[name] - value}) <= 1e-4 * scale, name


def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = People(["i", "pp", "t", "ip"]).batch
    found = []
    for piece_bytes in (dpsgd.PIECE_BYTES, 2**13, 1):
        monkeypatch.setattr(dpsgd, "PIECE_BYTES", piece_bytes)
        found.append(clipped_sum(tiny.learner(mvm=1.0, mlm=0.3, joint_share=0.5), batch, 0.3))
    (whole, norm_U), *others = found
    for totals, norms in others:
        torch.testing.assert_close(norms, norm_U)
        for name, value in whole.items():
            torch.testing.assert_close(totals[name], value, rtol=1e-4, atol=1e-6)


@given(people, st.floats(0.01, 10.0))
@settings(max_examples=15, deadline=None)
def test_no_patient_reaches_farther_than_the_clip(kinds: list[str], clip: float) -> None:
    learner = tiny.learner(mvm=1.0, mlm=0.3, joint_share=0.5)
    batch = People(kinds).batch
    for patient in range(len(kinds)):
        rows = [row for row, whose in enumerate(batch.patient.tolist()) if whose == patient]
        found, norm_U = clipped_sum(learner, part(batch, rows, renumbered=True), clip)
        assert length(found) <= clip * (1 + 1e-5)
        assert length(found) >= min(clip, float(norm_U[0])) * (1 - 1e-4)


def test_no_patient_reaches_farther_than_the_clip_when_the_model_computes_in_bfloat16() -> None:
    learner = tiny.learner(mvm=1.0, mlm=0.3)
    found = ClippedSum(learning_modules(learner.model, lambda name: True), 0.05)
    with private.no_gradients_of(learner.model), found.watching():
        batch = part(People(["ppp"]).batch, range(3), renumbered=True)
        private.add(learner, found, batch, tiny.generator(), within=lambda: local.arithmetic("bfloat16"))
    assert length(found.totals) == pytest.approx(0.05, rel=1e-5)
    assert all(total.dtype == torch.float32 for total in found.totals.values())


def test_bfloat16_patient_gradients_are_those_of_a_loop_but_for_the_model_s_own_rounding() -> None:
    learner, batch = tiny.learner(mvm=1.0, mlm=0.3, joint_share=0.5), People(["i", "pp", "t", "ip"]).batch
    learner.model.train()
    with local.arithmetic("bfloat16"):
        each = loop(learner, batch, tiny.generator(5))
    lengths = [length(gradients) for gradients in each]
    clip = sorted(lengths)[1] * 0.9
    expected = added(each, [min(1.0, clip / one) for one in lengths])
    found = ClippedSum(learning_modules(learner.model, lambda name: True), clip)
    with private.no_gradients_of(learner.model), found.watching():
        norm_U = private.add(learner, found, batch, tiny.generator(5), within=lambda: local.arithmetic("bfloat16"))
    torch.testing.assert_close(norm_U, torch.tensor(lengths, dtype=torch.float64), rtol=0.02, atol=0)
    assert found.totals.keys() == expected.keys()
    assert length({name: found.totals[name] - value for name, value in expected.items()}) <= 0.02 * length(expected)


def test_one_patient_more_moves_the_sum_by_no_more_than_the_clip() -> None:
    learner, kinds = tiny.learner(mvm=1.0, mlm=0.3), ["i", "pp", "t", "ip"]
    batch, clip = People(kinds).batch, 0.3
    sums = [clipped_sum(learner, batch, clip)[0]]
    alone = loop(learner, batch, tiny.generator(5))  # the same masks, whoever else is there
    for left_out in range(len(kinds)):
        factors = [0.0 if patient == left_out else min(1.0, clip / length(one)) for patient, one in enumerate(alone)]
        without = added(alone, factors)
        assert length({name: sums[0][name] - without[name] for name in without}) <= clip * (1 + 1e-4)


def test_micro_batches_hold_few_studies_cut_no_patient_and_keep_the_reach() -> None:
    learner = tiny.learner(mvm=1.0)
    drawn: list[int] = []

    class Counted(People):
        def draw(self, numbers: Tensor, chance: Generator) -> Batch | None:
            drawn.append(len(numbers))
            return super().draw(numbers, chance)

    for micro_batch, sizes in ((None, [5]), (4, [2, 2, 1]), (1, [1] * 5)):
        drawn.clear()
        guard = replace(protection(clip=0.2, studies_per_patient=2), micro_batch=micro_batch)
        with private.no_gradients_of(learner.model):
            steps_of(learner, Counted(["i", "ii", "i", "ii", "i"]), guard, "image").descend()
        assert drawn == sizes
        total = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
        assert 0.1 < length(total) <= 0.2 * (1 + 1e-5)  # five patients of at most 0.2 over five expected


def test_gradients_that_are_not_finite_add_nothing() -> None:
    learner = tiny.learner(mvm=1.0)
    batch = People(["i", "i"]).batch
    assert batch.image is not None
    alone, _ = clipped_sum(learner, batch, 0.1)
    broken = replace(batch, image=batch.image.index_fill(0, torch.tensor([1]), float("inf")))
    found, norm_U = clipped_sum(learner, broken, 0.1)
    assert not bool(norm_U[1].isfinite())
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert 0 < length(found) <= 0.1 * (1 + 1e-5) < length(alone)


def test_noise_has_the_stated_scale_and_is_there_when_nobody_came() -> None:
    class Nobody(People):
        rate = 0.0

    learner = tiny.learner(mvm=1.0)
    steps = steps_of(learner, Nobody(["i"] * 8), protection(noise=1.5, clip=0.4), "image")
    with private.no_gradients_of(learner.model):
        steps.descend()
    noise = torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])
    scale = 1.5 * 0.4 / 8  # sigma C / expected patients
    num = len(noise)
    assert num > 10_000
    assert abs(float(noise.mean())) < 4 * scale / num**0.5
    assert float(noise.std()) == pytest.approx(scale, rel=4 / (2 * num) ** 0.5)
    within = float((noise.abs() < scale).float().mean())
    assert within == pytest.approx(0.6827, abs=4 * (0.6827 * 0.3173 / num) ** 0.5)  # a normal's share within one deviation


def test_two_steps_never_repeat_their_noise() -> None:
    learner = tiny.learner(mvm=1.0)
    steps = steps_of(learner, People(["i"] * 2), protection(noise=1.0), "image")
    seen = []
    for _ in range(2):
        with private.no_gradients_of(learner.model):
            steps.descend()
        seen.append(learner.model.embed_image.project.weight.grad)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("stream", ["image", "text", "paired"])
def test_what_moves_depends_on_the_stream_and_never_on_who_was_drawn(stream: str) -> None:
    kind = stream[0]

    class Nobody(People):
        rate = 0.0

    moved = []
    for people in (Nobody([kind] * 3), People([kind] * 3)):
        learner = tiny.learner(sizes={"pair_experts": 1}, mvm=1.0, mlm=0.3, joint_share=0.5)
        stage = config.Stage(name="s", rounds=1, local_steps=2, batch_size=3, objectives=learner.objectives)
        update, _ = private.train(
            learner,
            people,
            local.Assignment("x", stage, 0, 0),
            stream,  # type: ignore[arg-type]
            protection(noise=1.0, clip=1.0),
            start=local.Start({}, {}),
        )
        moved.append({name for name, delta in update.deltas.items() if bool(delta.any())})
        assert update.metrics == {}
        assert update.examples == {one: 6 if one == stream else 0 for one in ("image", "text", "paired")}
        assert all(parameter.requires_grad for parameter in learner.model.parameters())
    assert moved[0] == moved[1]
    assert any("pair" in name for name in moved[0]) == (stream == "paired")


def test_heads_alone_are_trained_where_the_config_says_so() -> None:
    learner = tiny.learner(mvm=1.0, mlm=0.3)
    stage = config.Stage(name="s", rounds=1, local_steps=1, batch_size=2, objectives=learner.objectives)
    update, _ = private.train(
        learner,
        People(["p", "p"]),
        local.Assignment("x", stage, 0, 0),
        "paired",
        protection(noise=1.0, trainable="heads"),
        start=local.Start({}, {}),
    )
    assert {group_of(name) for name in update.deltas} == HEADS - {"shared.norm"}


@pytest.mark.parametrize("asked", [{"contrast": 1.0}, {"match": 0.1, "joint_share": 0.5}, {"joint_masking": "one_at_a_time"}])
def test_losses_that_compare_patients_are_refused(asked: dict[str, object]) -> None:
    learner = tiny.learner(**({"mvm": 1.0} | asked))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="different patients"):
        steps_of(learner, People(["p", "p"]), protection())


def test_clipped_gradients_of_adapters_equal_a_loop_over_patients() -> None:
    learner = tiny.learner(mvm=1.0, mlm=0.3, joint_share=0.5)
    learner.model.train()
    batch = People(["ip", "t", "pp"]).batch
    with narrowed(learner.model, config.Privacy(mode="none", trainable="adapters", adapter_rank=3), 1, "s"):
        for name, parameter in learner.model.named_parameters():
            if learns(name):  # from zero, what lies below would get no gradient through it
                torch.nn.init.normal_(parameter, std=0.1, generator=tiny.generator(3))
        each = loop(learner, batch, tiny.generator(5))
        clip = sorted(length(one) for one in each)[1]
        steps = ClippedSum(learning_modules(learner.model, learns), clip)
        with private.no_gradients_of(learner.model), steps.watching():
            norm_U = private.add(learner, steps, batch, tiny.generator(5))
    assert all(learns(name) for name in steps.totals)
    torch.testing.assert_close(norm_U.double(), torch.tensor([length(one) for one in each]).double(), rtol=1e-4, atol=1e-6)
    expected = added(each, [min(1.0, clip / length(one)) for one in each])
    assert steps.totals.keys() == expected.keys()
    for name, total in steps.totals.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-3, atol=1e-5)
