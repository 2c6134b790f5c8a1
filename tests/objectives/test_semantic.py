from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from fedmix.batch import Batch
from fedmix.errors import DataError
from fedmix.objectives.semantic import Known, joined, known, likeness, semantic_term

ONE = torch.tensor(1.0)
NOTHING, EFFUSION, BOTH = [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]
UNKNOWN = [-1.0, -1.0]


def with_findings(kinds: str, rows: list[list[float]]) -> Batch:
    return replace(tiny.batch(kinds), findings=torch.tensor(rows))


def test_likeness_by_hand() -> None:
    """Two normal studies are alike, a normal and a sick one are not, one finding of two is a cosine of root one half."""
    found = likeness(torch.tensor([NOTHING, EFFUSION]), torch.tensor([NOTHING, EFFUSION, BOTH]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, math.sqrt(0.5)]]))


def test_term_equals_a_loop_over_both_directions() -> None:
    chance = tiny.generator(3)
    images = Known(F.normalize(torch.randn(3, 4, generator=chance), dim=1), torch.tensor([NOTHING, EFFUSION, BOTH]))
    texts = Known(F.normalize(torch.randn(2, 4, generator=chance), dim=1), torch.tensor([EFFUSION, BOTH]))
    alike, total = likeness(images.findings_NF, texts.findings_NF), 0.0
    logits = images.embedded_NE @ texts.embedded_NE.T / 0.2
    for scores, own in ((logits, alike), (logits.T, alike.T)):
        for row, targets in zip(scores.tolist(), (own / 0.5).softmax(dim=1).tolist(), strict=True):
            log_sum = math.log(sum(math.exp(score) for score in row))
            total -= sum(target * (score - log_sum) for score, target in zip(row, targets, strict=True))
    term = semantic_term(images, texts, torch.tensor(0.2), likeness_temperature=0.5)
    assert term.total.item() == pytest.approx(total, rel=1e-5)
    assert term.weight.item() == 5


def test_least_where_embeddings_are_as_alike_as_findings() -> None:
    same = torch.tensor([EFFUSION, EFFUSION, NOTHING])
    right = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    terms = [
        semantic_term(Known(right, same), Known(other, same), ONE, likeness_temperature=1.0).total
        for other in (right, right.flip(0), -right)
    ]
    assert terms[0] == min(terms)


def test_studies_of_which_nothing_is_known_are_left_out() -> None:
    embedded = torch.eye(3)
    kept = known(embedded, torch.tensor([EFFUSION, UNKNOWN, NOTHING]))
    assert torch.equal(kept.embedded_NE, embedded[[0, 2]])
    assert joined([known(embedded, torch.tensor([UNKNOWN] * 3))]) is None
    assert joined([]) is None


def test_images_and_reports_alone_count_beside_pairs() -> None:
    learner = tiny.learner(semantic=1.0)
    rows = [EFFUSION, UNKNOWN, NOTHING, BOTH, EFFUSION]
    terms = learner.terms(with_findings("iitpp", rows), tiny.generator())
    assert set(terms) == {"semantic"}
    assert terms["semantic"].weight.item() == (1 + 2) + (1 + 2)  # images known, reports known
    learner.loss(terms).backward()
    assert {"embed_image", "embed_text", "projection"} <= {name.split(".")[0] for name in tiny.touched(learner.model)}


def test_the_order_of_studies_goes_with_their_findings() -> None:
    """Findings are told study by study, images and reports kind by kind."""
    learner = tiny.learner(semantic=1.0, hide_image_alone=0.01, hide_text_alone=0.01)
    batch = with_findings("itit", [EFFUSION, NOTHING, NOTHING, EFFUSION])
    assert batch.image is not None
    swapped = replace(batch, image=batch.image.flip(0), findings=torch.tensor([NOTHING, NOTHING, EFFUSION, EFFUSION]))
    found = [learner.terms(one, tiny.generator(1))["semantic"].total for one in (batch, swapped)]
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)  # chance hides another patch of each


@pytest.mark.parametrize("kinds", ["ii", "tt"])
def test_one_kind_alone_has_nothing_to_be_compared_with(kinds: str) -> None:
    learner = tiny.learner(semantic=1.0, mvm=1.0, mlm=1.0)
    terms = learner.terms(with_findings(kinds, [EFFUSION, NOTHING]), tiny.generator())
    assert set(terms) == {"mvm" if kinds == "ii" else "mlm"}


def test_a_batch_that_says_no_findings_is_refused() -> None:
    with pytest.raises(DataError, match="does not say any"):
        tiny.learner(semantic=1.0).terms(tiny.batch("pp"), tiny.generator())
