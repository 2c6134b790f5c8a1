"""The bench of private steps on a tiny one: both do the same work, and each is measured in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from little import values

from fedmix import config
from simulations.bench import privacy
from simulations.bench.cases import BENCHES
from simulations.bench.contest import Work, prepared


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return privacy.without_contrast(Work(config.build(values(tmp_path)), "image", 1), "float32")


def test_private_steps_read_the_plain_ones_batches_with_a_patient_a_study(work: Work) -> None:
    with prepared(work) as (plain, _):
        everyone = privacy.Everyone(plain.batches, work.stage.batch_size)
        drawn, same = everyone.draw(torch.arange(4), torch.Generator()), plain.batches.batch(1)
        assert drawn.image is not None
        assert same.image is not None
        assert torch.equal(drawn.image, same.image)
        assert drawn.patient is not None
        assert drawn.patient.tolist() == [0, 1, 2, 3]
        seconds = privacy.PrivateStep(plain, "image")()
    assert len(seconds) == work.num_steps - 1
    assert all(one > 0 for one in seconds)


def test_cases_have_their_names() -> None:
    assert list(BENCHES["privacy"]) == ["dp_step", "dp_step_float32", "dp_step_text"]


@pytest.mark.slow
def test_a_line_holds_time_and_memory_of_both(work: Work) -> None:
    line = privacy.dp_step("dp_step", work)
    assert json.loads(json.dumps(line)) == line
    assert list(line) == ["bench", "case", "value", "unit", "against", "ratio", "peak_bytes", "plain_peak_bytes"]
    assert all(isinstance(line[name], int) and line[name] > 2**26 for name in ("peak_bytes", "plain_peak_bytes"))
