"""The bench of training steps on tiny ones: what it measures is what it says, whatever the clock says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from little import values

from fedmix import config
from simulations.bench import Line, step
from simulations.bench.contest import Work, in_turns, prepared
from simulations.bench.plain import PlainStep
from simulations.bench.products import Products


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(config.build(values(tmp_path)), "image", 1)


def checked(line: Line, case: str) -> Line:
    assert json.loads(json.dumps(line)) == line
    assert list(line)[:6] == ["bench", "case", "value", "unit", "against", "ratio"]
    assert (line["bench"], line["case"]) == ("step", case)
    return line


def learner() -> Any:
    return tiny.learner(mvm=1.0)


def test_floor_counts_the_products_of_a_block_done_by_hand() -> None:
    """Two blocks of width 32 and one of the decoder's, forward; backward is twice that, but for the pixels' gradient."""
    products = Products.of(learner(), tiny.batch("iii"), "bfloat16")
    batch, visible, patches = 3, 5, 16

    def block(tokens: int, width: int = 32) -> int:
        return tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width

    pixels, targets = 64, 64 + 16 + 4
    first = visible * pixels * 32
    rest = 2 * block(1 + visible) + (1 + visible) * 32 * 32 + block(1 + patches) + patches * 32 * targets
    scales = patches * pixels * targets  # the targets are one product of the patches, without a gradient
    assert products.flops == 2 * batch * (3 * rest + 2 * first + scales)


def test_floor_does_the_same_operators_again_and_leaves_no_gradient() -> None:
    pupil = learner()
    products = Products.of(pupil, tiny.batch("iii"), "bfloat16")
    assert tiny.touched(pupil.model) == set()
    before = tiny.parameters_of(pupil.model)
    with torch.profiler.profile() as seen:
        products()
    counts = {row.key: row.count for row in seen.key_averages()}
    assert counts["aten::_softmax"] == counts["aten::_softmax_backward_data"] == 3
    assert counts["aten::addmm"] == 2 * 4 + 4 + 3  # each linear layer once: pixels in, blocks, narrow and values
    assert all(torch.equal(parameter, before[name]) for name, parameter in pupil.model.named_parameters())


def test_plain_step_learns_from_hidden_patches_only() -> None:
    model, image_BSS = tiny.model(), tiny.images(8)
    plain = PlainStep(model, image_BSS, hide=0.5)
    losses = []
    for _ in range(30):
        plain()
        losses.append(float(plain._loss().detach()))
    assert losses[-1] < 0.8 * losses[0]
    hidden_BP = torch.zeros(8, 16, dtype=torch.bool)
    hidden_BP[:, 3] = True
    changed = image_BSS.clone()
    changed[:, 0:8, 24:32] = 0.0  # patch 3
    torch.testing.assert_close(plain.predict(image_BSS, hidden_BP), plain.predict(changed, hidden_BP))
    hidden_BP[:, 3] = False
    assert not torch.allclose(plain.predict(image_BSS, hidden_BP), plain.predict(changed, hidden_BP))


def test_a_turn_is_a_round_of_training_whose_first_step_is_not_counted(work: Work) -> None:
    with prepared(work) as (ours, batch):
        before = tiny.parameters_of(ours.learner.model)
        assert len(ours()) == work.num_steps - 1
        assert any(not torch.equal(value, before[name]) for name, value in ours.learner.model.named_parameters())
        assert batch.image is not None
        assert batch.text is None


def test_sides_take_turns_and_the_median_is_taken() -> None:
    seen: list[str] = []

    def side(name: str, times: list[float]) -> Any:
        return lambda: (seen.append(name), times)[1]

    assert in_turns({"one": side("one", [1.0, 9.0, 2.0]), "two": side("two", [4.0])}, turns=2) == {"one": 2.0, "two": 4.0}
    assert seen == ["one", "two", "one", "two"]


def test_lines_say_what_was_held_against_what(work: Work) -> None:
    floor = checked(step.floor("floor", work), "floor")
    assert str(floor["against"]).endswith("alone, muon in the step: width 16, 4 images of 48 px, float32, 1 thread")
    assert isinstance(floor["ratio"], float)
    assert floor["ratio"] > 1
    plain = checked(step.plain("plain", work), "plain")
    assert isinstance(plain["ratio"], float)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a card to measure")
def test_without_a_card_the_case_says_so() -> None:
    line = checked(step.gpu_mfu(), "gpu_mfu")
    assert (line["ratio"], line["skipped"]) == (None, "torch finds no CUDA device on this machine")


def test_named_sizes_are_what_the_config_calls_them() -> None:
    work = step.small("paired")
    assert work.experiment.model == config.Model(size="small")
    assert (work.site.name, work.stage.batch_size) == ("west", 64)
    assert step.demo("paired").stage.name == "paired"
