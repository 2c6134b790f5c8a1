"""A step on another device than the batch's. The meta device stands in for a GPU: it computes nothing, refuses to add to what
lies on the CPU, and cannot answer a question, as for a number, that a program would have to wait for on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from fedmix.batch import placed
from fedmix.objectives.mixture import Learner

EVERYTHING: dict[str, Any] = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5}
LOOKS_BACK: dict[str, Any] = {
    "anchor": 0.5,
    "soft_targets": 0.2,
    "same_patient": "left_out",
    "queue": 8,
    "joint_masking": "one_at_a_time",
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch, "autocast", lambda *options, **more: nullcontext())  # torch's own knows no meta device
    return torch.device("meta")


def on(device: torch.device, *, contrast_form: str = "softmax", **objectives: float | str) -> Learner:
    learner = tiny.learner(sizes={"contrast_form": contrast_form}, **EVERYTHING, **objectives)
    learner.model.to(device)
    learner.model.skips_padding = True
    return learner.at_round_start()


@pytest.mark.parametrize(
    "objectives",
    [{}, LOOKS_BACK, {"contrast_form": "sigmoid"}, {"contrast_form": "margin"}, {"semantic": 1.0, "local": 1.0}],
    ids=["plain", "looks_back", "sigmoid", "margin", "findings_and_parts"],
)
def test_a_step_sends_what_it_needs_to_the_models_device_and_never_asks_it(
    objectives: dict[str, Any], elsewhere: torch.device
) -> None:
    learner = on(elsewhere, **objectives)
    for step in range(2):  # the second has a past to compare with
        batch = replace(tiny.batch("iittpppp", seed=step), findings=torch.eye(8))
        terms = learner.terms(batch, tiny.generator())
        assert {term.total.device for term in terms.values()} == {elsewhere}
        loss = learner.loss(terms)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        assert norm.device == elsewhere


def test_hard_negatives_do_ask_for_they_decide_what_is_read(elsewhere: torch.device) -> None:
    """Else the test above would show nothing."""
    learner = on(elsewhere, match_negatives="hard")
    with pytest.raises(NotImplementedError, match="no data"):
        learner.terms(tiny.batch("pppp"), tiny.generator())


def test_what_is_there_already_is_not_copied() -> None:
    tensor = torch.ones(2)
    assert placed(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
def test_a_gpu_hides_the_same_and_finds_the_same_losses() -> None:
    found = []
    for device in ("cpu", "cuda"):
        terms = on(torch.device(device)).terms(tiny.batch("iittpppp"), tiny.generator())
        found.append({name: float(term.mean()) for name, term in terms.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4)
