"""The first candidates in the order of a head that reads both sides, against heads that know the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from evaluation_toys import ConstantEncoder, DivergedEncoder, OracleEncoder, ToyVocabulary, codes, draw, held_out, write
from numpy.typing import NDArray
from torch import Tensor

from fedmix.evaluation import suite
from fedmix.evaluation.features import EvaluationSettings, NotEvaluableError
from fedmix.evaluation.reranking import first_ones, match_logits, reordered
from fedmix.evaluation.retrieval import expected_hits

NUM, TOP = 40, 7


def scores_of(seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(NUM, NUM)) + np.eye(NUM)


def first_of(scores: NDArray[np.float64], top: int = TOP, seed: int = 0) -> NDArray[np.bool_]:
    return first_ones(scores, top, np.random.default_rng(seed))


class Shortsighted(OracleEncoder):
    """Its embeddings know four of the eight findings; its match head knows all."""

    def encode_image(self, image_BSS: Tensor) -> Tensor:
        return self.scale * torch.nn.functional.normalize(self.code_of_image(image_BSS)[:, :4], dim=-1)

    def encode_text(self, words_BL: Tensor) -> Tensor:
        return self.scale * torch.nn.functional.normalize(self.code_of_text(words_BL)[:, :4], dim=-1)


def evaluated(
    encoder: OracleEncoder, top: int, *, trained_on: tuple[str, ...] | None = ("contrast", "match"), **changes: Any
) -> Any:
    settings = EvaluationSettings(num_bootstrap=20, num_few_train=40, rerank_top=top, trained_on=trained_on, batch_size=16)
    return suite.evaluate(encoder, held_out(**changes), tokenizer=ToyVocabulary(), settings=settings).as_report()


# ---- the new order


@pytest.mark.parametrize("top", [1, 7, NUM])
def test_a_head_that_knows_the_truth_puts_first_whatever_is_among_the_first(top: int) -> None:
    scores = scores_of()
    after = reordered(scores, np.eye(NUM), first_of(scores, top))
    np.testing.assert_array_equal(expected_hits(after, 1), expected_hits(scores, top))
    for depth in (top, top + 5):
        np.testing.assert_array_equal(expected_hits(after, depth), expected_hits(scores, depth))


def test_the_first_are_in_the_heads_order_and_all_others_stay_where_they_are() -> None:
    scores, logits = scores_of(), scores_of(seed=1)
    order = np.argsort(-reordered(scores, logits, first_of(scores)), axis=1)
    plain = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(order[:, TOP:], plain[:, TOP:])
    for row in range(NUM):
        expected = sorted(plain[row, :TOP], key=lambda column, row=row: -logits[row, column])
        assert order[row, :TOP].tolist() == expected


def test_equal_scores_at_the_edge_are_drawn_and_not_taken_by_their_place() -> None:
    is_first = first_of(np.zeros((NUM, NUM)))
    assert (is_first.sum(axis=1) == TOP).all()
    assert is_first.any(axis=0).mean() > 0.9
    np.testing.assert_array_equal(is_first, first_of(np.zeros((NUM, NUM))))
    edge = np.tile([2.0, 1.0, 1.0 + 1e-8, 0.0], (4, 1))
    assert first_of(edge, 3).tolist() == [[True, True, True, False]] * 4


# ---- what the head is asked


def pairs() -> tuple[NDArray[np.uint8], list[NDArray[np.int64]]]:
    images = (tiny.images(6) * 255).round().to(torch.uint8).numpy()
    words = [row[row > 0].numpy() for row in tiny.words(6, lengths=[4, 9, 5, 7, 3, 8])]
    return images, [*words[:5], words[1].copy()]  # the last report is the second's, word for word


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_logits_are_those_of_one_pair_at_a_time_whatever_the_chunk(batch_size: int) -> None:
    net, (images, words) = tiny.model(), pairs()
    wanted = np.random.default_rng(0).random((6, 6)) < 0.6
    found = match_logits(net, images, words, wanted, batch_size=batch_size)
    assert np.isnan(found[~wanted]).all()
    with torch.no_grad():
        for row, column in zip(*np.nonzero(wanted), strict=True):
            one = net.match_logits(torch.from_numpy(images[row : row + 1]) / 255, torch.from_numpy(words[column])[None])
            assert found[row, column] == pytest.approx(one.item(), abs=1e-5)


def test_a_report_that_occurs_twice_is_read_once_and_ties_to_the_bit() -> None:
    sizes: list[int] = []

    class Counting(OracleEncoder):
        def match_logits(self, image_BSS: Tensor, words_BL: Tensor) -> Tensor:
            sizes.append(len(image_BSS))
            return super().match_logits(image_BSS, words_BL)

    code = codes(6)
    code[5] = code[1]
    found = match_logits(Counting(), draw(code), write(code), np.ones((6, 6), bool), batch_size=4)
    assert sum(sizes) == 6 * 5
    assert max(sizes) == 4
    np.testing.assert_array_equal(found[:, 5], found[:, 1])
    np.testing.assert_array_equal(found > 0, (code[:, None] == code).all(axis=2))


def test_logits_that_are_not_finite_are_no_order() -> None:
    with pytest.raises(NotEvaluableError, match="match head's values are not finite"):
        match_logits(DivergedEncoder(), draw(codes(3)), write(codes(3)), np.ones((3, 3), bool))


# ---- in the report


def test_a_head_that_knows_the_truth_lifts_recall_to_it_beside_numbers_that_stay() -> None:
    plain, again = evaluated(Shortsighted(), 0), evaluated(Shortsighted(), 80)
    reranked = again["retrieval"].pop("reranked")
    assert again["retrieval"] == plain["retrieval"]
    assert reranked["top"] == 80
    for direction in ("image_to_text", "text_to_image"):
        before = plain["retrieval"][direction]["r@1"]
        assert before < 0.4
        assert reranked[direction]["r@1"] == 1.0
        assert reranked[direction]["gain_r@1"] == pytest.approx(1.0 - before)
        low, high = reranked[direction]["gain_r@1_ci95"]
        assert low <= 1.0 - before <= high
        assert set(reranked[direction]) >= {"r@5", "r@10", "label_precision@10", "r@1_ci95"}
    assert "note" not in reranked


def test_only_what_is_among_the_first_can_be_lifted() -> None:
    """Four findings in common are shared by a few studies: five candidates hold some of the right ones, not all."""
    few = evaluated(Shortsighted(), 3)["retrieval"]["reranked"]["image_to_text"]["r@1"]
    many = evaluated(Shortsighted(), 80)["retrieval"]["reranked"]["image_to_text"]["r@1"]
    assert evaluated(Shortsighted(), 0)["retrieval"]["image_to_text"]["r@1"] < few < many == 1.0


def test_a_head_that_says_the_same_of_all_lifts_nothing() -> None:
    found = evaluated(ConstantEncoder(), 80)["retrieval"]["reranked"]["text_to_image"]
    assert found["r@1"] == pytest.approx(1 / 80)
    assert found["gain_r@1"] == pytest.approx(0.0)


def test_re_ranking_is_off_unless_asked_for() -> None:
    report = evaluated(OracleEncoder(), 0, trained_on=())
    assert "reranked" not in report["retrieval"]
    assert report["skipped"] == {}


def test_it_is_said_where_the_model_never_trained_on_matching_or_nobody_knows() -> None:
    report = evaluated(OracleEncoder(), 5, trained_on=("mvm", "mlm", "contrast"))
    assert "never trained on matching" in report["skipped"]["retrieval/reranked"]
    assert "reranked" not in report["retrieval"]
    assert "does not say" in evaluated(OracleEncoder(), 5, trained_on=None)["retrieval"]["reranked"]["note"]


def test_a_small_gallery_is_ordered_whole() -> None:
    assert evaluated(OracleEncoder(), 1000)["retrieval"]["reranked"]["top"] == 80
