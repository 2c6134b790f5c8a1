from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from fedmix import config
from fedmix.batch import Batch
from fedmix.federation.local import Assignment, train
from fedmix.objectives.anchor import anchor_term
from fedmix.objectives.masking import hide_patches, hide_words
from fedmix.objectives.mixture import Learner


def drifted(objectives: config.Objectives) -> Learner:
    """A learner in whose round the model has moved."""
    learner = Learner(tiny.model(), objectives, tiny.IDS).at_round_start()
    for parameter in learner.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=tiny.generator(1))
    return learner


def test_anchor_by_hand() -> None:
    """The same direction costs nothing, a right angle 1, the opposite 2; length does not count."""
    now = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    term = anchor_term(now, torch.tensor([[1.0, 0.0]]).expand(3, 2))
    assert term.total.item() == pytest.approx(3.0)
    assert term.weight.item() == 3


def test_anchor_moves_the_features_of_now_and_not_those_of_the_start() -> None:
    now, start = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    anchor_term(now, start).total.backward()
    assert now.grad is not None
    assert now.grad.any()
    assert start.grad is None


def features(tokens_BTD: Tensor) -> Tensor:
    return torch.cat([tokens_BTD[:, 1:].mean(dim=1), tokens_BTD[:, 1:].amax(dim=1)], dim=-1)


def test_anchor_compares_two_readings_of_what_was_shown_done_by_hand() -> None:
    learner, batch = drifted(config.Objectives(mvm=1.0, mlm=1.0, anchor=0.5)), tiny.batch("it")
    found = learner.terms(batch, tiny.generator())["anchor"]
    chance, total = tiny.generator(), 0.0
    shown = hide_patches(1, 16, 0.70, chance).visible_BK
    read = hide_words(batch.text, 0.25, tiny.IDS, chance).words_BL
    for name, seen in (("image", {"image_BSS": batch.image, "visible_BK": shown}), ("text", {"words_BL": read})):
        now, then = (features(net.encode(**seen).tokens[name]) for net in (learner.model, tiny.model()))
        total += 1 - torch.nn.functional.cosine_similarity(now, then).item()
    assert found.total.item() == pytest.approx(total, abs=1e-5)
    assert found.weight.item() == 2
    assert total > 0.01


def test_anchor_of_a_report_does_not_depend_on_padding() -> None:
    learner, batch = drifted(config.Objectives(mlm=1.0, anchor=0.5)), tiny.batch("ttt")
    wider = Batch(None, torch.nn.functional.pad(batch.text, (0, 2)), batch.has_image, batch.has_text)
    totals = []
    for one in (batch, wider):
        encoded = [net.encode(words_BL=one.text) for net in (learner.model, learner.start)]
        totals.append(
            anchor_term(*(net.pool("text", e) for net, e in zip((learner.model, learner.start), encoded, strict=True)))
        )
    torch.testing.assert_close(totals[0].total, totals[1].total, atol=1e-5, rtol=1e-5)


def test_anchor_is_zero_at_the_start_of_a_round_and_absent_outside_one() -> None:
    objectives = config.Objectives(mvm=1.0, mlm=1.0, contrast=1.0, anchor=1.0)
    learner = Learner(tiny.model(), objectives, tiny.IDS)
    assert "anchor" not in learner.terms(tiny.batch("itpp"), tiny.generator())
    term = learner.at_round_start().terms(tiny.batch("itpp"), tiny.generator())["anchor"]
    assert term.total.item() == pytest.approx(0.0, abs=1e-5)
    assert term.weight.item() == 6  # an image, a report, and both sides of two pairs


@pytest.mark.parametrize(("kinds", "absent"), [("iii", "text"), ("ttt", "image")])
def test_anchor_sends_no_gradient_to_an_absent_modality(kinds: str, absent: str) -> None:
    learner = drifted(config.Objectives(mvm=1e-9, mlm=1e-9, anchor=1.0))
    learner.loss(learner.terms(tiny.batch(kinds), tiny.generator())).backward()
    touched = tiny.touched(learner.model)
    assert touched
    assert not [name for name in touched if f".{absent}." in name or name.startswith((f"embed_{absent}", "projection"))]
    assert not tiny.touched(learner.start)


def test_anchor_alone_leads_the_features_back() -> None:
    """Overfit: from a model that has drifted, the distance falls to a hundredth."""
    learner, batch = drifted(config.Objectives(mvm=1e-9, mlm=1e-9, anchor=1.0)), tiny.batch("iiiitttt")
    optimiser = torch.optim.AdamW(learner.model.parameters(), lr=3e-3, weight_decay=0.0)
    distances = []
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 155)
        terms = learner.terms(batch, tiny.generator())
        distances.append(terms["anchor"].mean().item())
        learner.loss(terms).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert distances[0] > 0.05
    assert distances[-1] < 0.01 * distances[0]


class Pairs:
    def batch(self, step: int) -> Batch:
        return tiny.batch("pppp", seed=step)


def test_round_with_an_anchor_drifts_less_and_each_round_has_its_own_start() -> None:
    """What ``train`` reports is the drift from the model it was given, so the first step of any round reports none."""
    drift = {}
    for weight in (1e-6, 30.0):
        objectives = config.Objectives(mvm=1.0, mlm=0.3, contrast=1.0, anchor=weight)
        plan = config.Stage(name="joint", rounds=2, local_steps=6, objectives=objectives)
        learner = Learner(tiny.model(), objectives, tiny.IDS)
        for first_step in (0, 6):
            update, _ = train(learner, Pairs(), Assignment("west", plan, first_step, 0))
        total, count = update.metrics["anchor/loss"]
        drift[weight] = total / count
        assert learner.start is None
        one_step = plan.model_copy(update={"local_steps": 1})
        first, _ = train(learner, Pairs(), Assignment("west", one_step, 12, 0))
        assert first.metrics["anchor/loss"][0] == pytest.approx(0.0, abs=1e-5)
    assert drift[30.0] < 0.5 * drift[1e-6]
