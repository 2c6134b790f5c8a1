from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
import ranked
from evaluation_toys import ConstantEncoder, OracleEncoder, ToyVocabulary, codes, draw, held_out, write
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import top_k_accuracy_score

from fedmix.evaluation.features import EvaluationContext, EvaluationSettings
from fedmix.evaluation.retrieval import (
    UNKNOWN_SET,
    Gallery,
    evaluate_retrieval,
    expected_hits,
    expected_hits_of_set,
    expected_label_precision,
    label_sets,
    mean_recall_at_10,
    retrieve,
    score_blocks,
    split_galleries,
)


def gallery(image: NDArray, text: NDArray, label_set: NDArray | None = None) -> Gallery:
    return Gallery(image, text, np.arange(len(image)), label_set)


def noisy_pairs(num: int = 60, seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(num, 8))
    text = image + rng.normal(size=(num, 8))
    return tuple(side / np.linalg.norm(side, axis=1, keepdims=True) for side in (image, text))


def evaluate(encoder, **changes):
    settings = EvaluationSettings(**({"num_bootstrap": 20} | changes.pop("settings", {})))
    return evaluate_retrieval(EvaluationContext(encoder, held_out(**changes), ToyVocabulary(), {}, settings))


def test_hits_of_four_by_hand():
    scores = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # first
            [0.8, 0.5, 0.1, 0.0],  # second
            [0.7, 0.7, 0.7, 0.1],  # one of three first places
            [0.9, 0.5, 0.5, 0.5],  # one of the three places after the first
        ]
    )
    assert expected_hits(scores, 1) == pytest.approx([1, 0, 1 / 3, 0])
    assert expected_hits(scores, 2) == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert expected_hits(scores, 4) == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_expected_values_are_means_over_every_order_of_the_ties(depth):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 3, (5, 5)) / 2
    label_set = np.array([0, 1, 0, 1, 1])
    hits, hits_of_set, precisions = [], [], []
    for order in permutations(range(5)):
        ranked = np.array(order)[np.argsort(-scores[:, list(order)], axis=1, kind="stable")][:, :depth]
        hits.append((ranked == np.arange(5)[:, None]).any(axis=1))
        is_same = label_set[ranked] == label_set[:, None]
        hits_of_set.append(is_same.any(axis=1))
        precisions.append(is_same.mean(axis=1))
    np.testing.assert_allclose(expected_hits(scores, depth), np.mean(hits, axis=0))
    np.testing.assert_allclose(expected_hits_of_set(scores, label_set, depth), np.mean(hits_of_set, axis=0))
    np.testing.assert_allclose(expected_label_precision(scores, label_set, depth), np.mean(precisions, axis=0))


def test_recall_equals_a_loop_over_sorted_candidates_both_ways():
    image, text = noisy_pairs()
    report = retrieve([gallery(image, text)], num_bootstrap=20)
    for name, queries, candidates in (("image_to_text", image, text), ("text_to_image", text, image)):
        for depth in (1, 5, 10):
            found = [i in sorted(range(60), key=lambda j, i=i: -(queries[i] @ candidates[j]))[:depth] for i in range(60)]
            assert report[name][f"r@{depth}"] == pytest.approx(np.mean(found))


def test_differences_below_float32_resolution_are_ties():
    rng = np.random.default_rng(0)
    image = np.tile([1.0, 0.0], (20, 1)) + 1e-8 * rng.normal(size=(20, 2))
    report = retrieve([gallery(image, image)], num_bootstrap=20)
    assert report["image_to_text"]["r@1"] == pytest.approx(1 / 20)


def test_an_exact_encoder_finds_every_pair_and_a_constant_one_exactly_chance():
    exact, constant = evaluate(OracleEncoder()).values, evaluate(ConstantEncoder()).values
    for direction in ("image_to_text", "text_to_image"):
        assert exact[direction]["r@1"] == 1.0
        for depth in (1, 5, 10):
            assert constant[direction][f"r@{depth}"] == pytest.approx(depth / 80)
            assert constant[direction]["chance"][f"r@{depth}"] == depth / 80
        assert constant[direction]["label_precision@10"] == pytest.approx(constant[direction]["chance"]["label_precision@10"])


def test_label_precision_counts_duplicates_where_recall_tosses_a_coin():
    code = np.repeat(codes(16), 10, axis=0)  # every study occurs ten times; 80 of them, of eight kinds, are the test
    values = evaluate(OracleEncoder(), words=write(code), labels=code, images=draw(code)).values
    assert values["num_unique_texts"] == 8
    report = values["image_to_text"]
    assert report["r@1"] == pytest.approx(0.1)
    assert report["r@10"] == pytest.approx(1.0)
    assert report["label_precision@10"] == pytest.approx(1.0)
    assert report["chance"]["label_precision@10"] == pytest.approx(1 / 8)


def test_studies_with_unknown_labels_are_no_queries_for_precision_and_match_nobody():
    labels = np.array([[0, 1], [0, 1], [-1, 1], [1, 1]], np.int8)
    sets = label_sets(labels)
    assert sets[0] == sets[1] != sets[3]
    assert sets[2] == UNKNOWN_SET
    precision = expected_label_precision(np.eye(4), sets, 1)
    assert precision[[0, 1, 3]] == pytest.approx([1, 1, 1])
    assert np.isnan(precision[2])


def test_without_labels_precision_is_none_with_a_reason():
    image, text = noisy_pairs()
    report = retrieve([gallery(image, text)], num_bootstrap=20)["image_to_text"]
    assert report["label_precision@10"] is None
    assert "labels" in report["label_precision@10_reason"]


def test_the_order_of_studies_in_a_gallery_changes_nothing():
    image, text = noisy_pairs()
    order = np.random.default_rng(0).permutation(60)
    sets = np.arange(60) % 4
    one = retrieve([gallery(image, text, sets)], num_bootstrap=0)
    other = retrieve([gallery(image[order], text[order], sets[order])], num_bootstrap=0)
    for direction in one:
        for name in ("r@1", "r@5", "r@10", "label_precision@10"):
            assert other[direction][name] == pytest.approx(one[direction][name])


def test_galleries_are_disjoint_and_of_one_size():
    parts = split_galleries(1234, 500, seed=0)
    assert [len(part) for part in parts] == [500, 500]
    assert len(np.unique(np.concatenate(parts))) == 1000
    np.testing.assert_array_equal(split_galleries(80, 500, seed=0)[0], np.arange(80))


def test_recall_is_the_mean_over_galleries():
    first, second = gallery(*noisy_pairs(seed=0)), gallery(*noisy_pairs(seed=1))
    both = retrieve([first, second], num_bootstrap=20)["image_to_text"]
    each = [retrieve([one], num_bootstrap=20)["image_to_text"]["r@5"] for one in (first, second)]
    assert both["r@5"] == pytest.approx(np.mean(each))
    assert both["num_queries"] == 120
    assert both["gallery"] == 60


def test_a_smaller_gallery_is_reported_as_such():
    report = evaluate(OracleEncoder(), settings={"gallery": 30}).values
    assert report["image_to_text"]["gallery"] == 30
    assert report["image_to_text"]["num_galleries"] == 2


def test_only_studies_with_both_sides_are_in_the_gallery():
    words = write(codes(160))
    words[100:120] = [None] * 20
    assert evaluate(OracleEncoder(), words=words).values["image_to_text"]["gallery"] == 60


def test_examples_show_the_best_three_and_which_is_right():
    findings = evaluate(OracleEncoder(), settings={"num_examples": 2})
    data = held_out()
    assert len(findings.examples) == 2
    for example in findings.examples:
        assert example.is_right == (True, False, False)
        assert example.top_studies[0] == example.study
        np.testing.assert_array_equal(example.image, data.images[example.study])
        np.testing.assert_array_equal(example.words, data.words[example.study])
        np.testing.assert_array_equal(example.top_words[1], data.words[example.top_studies[1]])


def test_the_learning_curve_number_is_the_mean_of_both_ways():
    context = EvaluationContext(ConstantEncoder(), held_out(), ToyVocabulary(), {}, EvaluationSettings())
    assert mean_recall_at_10(context) == pytest.approx(10 / 80)


def test_another_patients_report_of_the_same_words_counts_where_recall_is_aware_of_duplicates():
    words = write(codes(160))
    words[100:104] = [words[100]] * 4
    image = draw(codes(160))
    image[100:104] = image[100]
    report = evaluate(OracleEncoder(), words=words, images=image).values["image_to_text"]
    assert report["r@1"] == pytest.approx((76 + 4 / 4) / 80)  # a coin toss among four
    assert report["duplicate_aware"] == {"r@1": 1.0, "r@5": 1.0, "r@10": 1.0}


def test_without_duplicates_both_recalls_are_the_same_and_without_words_only_one_is_given():
    image, text = noisy_pairs()
    aware = Gallery(image, text, np.arange(60), None, np.arange(60))
    report = retrieve([aware])["text_to_image"]
    assert report["duplicate_aware"] == pytest.approx({name: report[name] for name in ("r@1", "r@5", "r@10")})
    assert "duplicate_aware" not in retrieve([gallery(image, text)])["text_to_image"]


def coarse_gallery(num: int, seed: int) -> Gallery:
    """Embeddings of a few corners of a cube, so that most scores are tied (and all exact), texts and labels that recur."""
    rng = np.random.default_rng(seed)
    image, text = rng.choice([-0.5, 0.5], size=(2, num, 4))
    return Gallery(image, text, np.arange(num) // 2, rng.integers(UNKNOWN_SET, 3, num), rng.integers(0, max(1, num // 2), num))


def by_loop(one: Gallery, queries: NDArray, candidates: NDArray) -> dict[str, float | None]:
    """The figures of a direction, each a mean over queries."""
    scores = [[float(sum(q * c)) for c in candidates] for q in queries]
    known = [i for i in range(len(scores)) if one.label_set[i] != UNKNOWN_SET]
    figures: dict[str, float | None] = {}
    for depth in (1, 5, 10):
        figures[f"r@{depth}"] = float(np.mean([ranked.hit(row, {i}, depth) for i, row in enumerate(scores)]))
        aware = [ranked.hit(row, ranked.alike(one.text_set, i), depth) for i, row in enumerate(scores)]
        figures[f"duplicate_aware r@{depth}"] = float(np.mean(aware))
    for name, rows in (("label_precision@10", scores), ("chance", [[0.0] * len(scores)] * len(scores))):
        found = [ranked.share(rows[i], ranked.alike(one.label_set, i), 10) for i in known]
        figures[name] = float(np.mean(found)) if known else None
    return figures


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 24), st.sampled_from([1, 2, 3, 7, 24, 512]))
def test_every_figure_is_a_plain_loops_in_blocks_of_any_size(seed, num, num_at_once):
    one = coarse_gallery(num, seed)
    report = retrieve([one], num_bootstrap=0, num_at_once=num_at_once)
    for name, sides in (("image_to_text", (one.image, one.text)), ("text_to_image", (one.text, one.image))):
        found = report[name]
        figures = {depth: found[depth] for depth in ("r@1", "r@5", "r@10")}
        figures |= {f"duplicate_aware {depth}": value for depth, value in found["duplicate_aware"].items()}
        figures |= {"label_precision@10": found["label_precision@10"], "chance": found["chance"]["label_precision@10"]}
        assert figures == pytest.approx(by_loop(one, *sides))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 60), st.booleans())
def test_the_size_of_a_block_moves_no_bit(seed, num, num_at_once, is_coarse):
    image, text = noisy_pairs(num, seed)
    fine = Gallery(image, text, np.arange(num), np.arange(num) % 3, np.arange(num) // 2)
    galleries = [coarse_gallery(num, seed) if is_coarse else fine] * 2
    whole, parts = (retrieve(galleries, num_bootstrap=20, num_at_once=each) for each in (num, num_at_once))
    assert parts == whole


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(12, 60))
def test_without_ties_recall_is_scikit_learns_both_ways(seed, num):
    image, text = noisy_pairs(num, seed)
    report = retrieve([gallery(image, text)], num_bootstrap=0)
    for name, scores in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
        for depth in (1, 5, 10):
            expected = top_k_accuracy_score(np.arange(num), scores, k=depth)
            assert report[name][f"r@{depth}"] == pytest.approx(expected)


@pytest.mark.parametrize(("num", "most"), [(7, 3), (8, 4), (5, 9), (1, 1)])
def test_blocks_hold_every_query_once_and_no_more_than_asked_for(num, most):
    image, text = noisy_pairs(num)
    blocks = list(score_blocks(image, text, most))
    assert max(len(rows) for rows, _ in blocks) <= most
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in blocks]), np.arange(num))
    np.testing.assert_allclose(np.concatenate([scores for _, scores in blocks]), image @ text.T)


def test_memory_grows_with_the_gallery_and_not_with_its_square():
    def peak(num: int) -> int:
        image, text = noisy_pairs(num)
        whole = Gallery(image, text, np.arange(num), np.arange(num) % 4, np.arange(num) // 2)
        tracemalloc.start()
        retrieve([whole], num_bootstrap=0, num_at_once=40)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(400), peak(1200)
    assert large < 4 * small  # three times; it would be nine
    assert large < 12 * 40 * 1200 * 8  # as many copies of a block at once; one whole matrix is two and a half times as much
