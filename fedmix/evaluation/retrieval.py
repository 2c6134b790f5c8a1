"""Retrieval between images and reports in galleries of a fixed size, both ways.

Ties: the recall reported is the expected one if studies with equal scores were put in random order. Cosines count as
equal within 1e-6, the resolution of float32, so a collapsed encoder gets exactly chance, and a report that occurs twice
word for word costs what a coin toss costs.

Reports recur ("no acute disease"): another patient's identical report is no error of the model. So beside exact pairs
there is ``label_precision@10``, the share of the first ten that carry the same labels as the query (the pair itself
counts), ``duplicate_aware`` recall, for which any report of the same words counts as the pair's own, and the number of
different texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from fedmix.evaluation import metrics
from fedmix.evaluation.features import EvaluationContext, Findings, Report, encode_texts, random_for

DEPTHS = (1, 5, 10)
SAME_SCORE = 1e-6
UNKNOWN_SET = -1


@dataclass(frozen=True)
class Gallery:
    """Paired studies of one gallery: unit-norm embeddings [G, E] of both sides, patients, and label sets [G] as numbers.

    Equal numbers mean equal labels; UNKNOWN_SET marks a study with an unknown label; None: there are no labels.
    ``text_set`` [G]: equal numbers mean reports of the same words; None: that is not known.
    """

    image: NDArray[np.floating]
    text: NDArray[np.floating]
    patient: NDArray[Any]
    label_set: NDArray[np.int64] | None
    text_set: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class RetrievalExample:
    """One image, its own report's words, and its three best reports; studies are indices into the held-out set."""

    study: int
    image: NDArray[np.uint8]
    words: NDArray[np.int64]
    top_studies: tuple[int, ...]
    top_words: tuple[NDArray[np.int64], ...]
    is_right: tuple[bool, ...]


def expected_hits(scores: NDArray[np.floating], depth: int) -> NDArray[np.float64]:
    """Chance [G] that query i finds candidate i among the first ``depth``, equal scores being in random order.

    ``scores`` [G, G]: row i holds the scores of query i.
    """
    own = np.diagonal(scores)[:, None]
    num_above = (scores > own + SAME_SCORE).sum(axis=1)
    num_tied = (np.abs(scores - own) <= SAME_SCORE).sum(axis=1)  # with candidate i itself, so never 0
    hits: NDArray[np.float64] = np.clip((depth - num_above) / num_tied, 0.0, 1.0)
    return hits


def expected_hits_of_set(scores: NDArray[np.floating], members: NDArray[np.int64], depth: int) -> NDArray[np.float64]:
    """Chance [G] that query i finds any candidate of its own set among the first ``depth``, equal scores in random order.

    ``members`` [G]: equal numbers are one set, of which candidate i itself is one.
    """
    is_own = members[:, None] == members
    best = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
    num_above = (scores > best + SAME_SCORE).sum(axis=1)
    is_tied = np.abs(scores - best) <= SAME_SCORE
    num_tied, num_right = is_tied.sum(axis=1), (is_tied & is_own).sum(axis=1)
    places = np.clip(depth - num_above, 0, num_tied)
    hits: NDArray[np.float64] = 1 - hypergeom.pmf(0, num_tied, num_right, places)
    return hits


def expected_label_precision(scores: NDArray[np.floating], label_set: NDArray[np.int64], depth: int) -> NDArray[np.float64]:
    """Expected share [G] of the first ``depth`` candidates with the query's label set; NaN for an unknown query.

    A candidate with an unknown label counts as different.
    """
    depth = min(depth, scores.shape[1])
    last = np.partition(scores, -depth, axis=1)[:, -depth, None]
    is_above = scores > last + SAME_SCORE
    is_tied = np.abs(scores - last) <= SAME_SCORE
    places_left = depth - is_above.sum(axis=1, keepdims=True)
    share = is_above + is_tied * (places_left / is_tied.sum(axis=1, keepdims=True))
    precision = (share * (label_set[:, None] == label_set)).sum(axis=1) / depth
    return np.where(label_set == UNKNOWN_SET, np.nan, precision)


def split_galleries(num_studies: int, size: int, seed: int) -> list[NDArray[np.int64]]:
    """Disjoint galleries of exactly ``size`` studies, drawn at random; one of all studies if there are fewer."""
    if num_studies <= size:
        return [np.arange(num_studies, dtype=np.int64)]
    order = random_for(seed, "galleries").permutation(num_studies).astype(np.int64)
    return [np.sort(order[start : start + size]) for start in range(0, num_studies - size + 1, size)]


def label_sets(labels: NDArray[np.int8]) -> NDArray[np.int64]:
    """A number [N] for each distinct row of labels [N, K]; UNKNOWN_SET where a label is unknown."""
    _, number = np.unique(labels, axis=0, return_inverse=True)
    return np.where((labels >= 0).all(axis=1), number.reshape(-1), UNKNOWN_SET)


def retrieve(galleries: list[Gallery], *, num_bootstrap: int = 200, seed: int = 0) -> Report:
    """Both directions over galleries of equal size: {"image_to_text": {...}, "text_to_image": {...}}."""
    image_to_text = [cosines(gallery.image, gallery.text) for gallery in galleries]
    directions = {"image_to_text": image_to_text, "text_to_image": [scores.T for scores in image_to_text]}
    return {name: _direction(scores, galleries, num_bootstrap, seed) for name, scores in directions.items()}


def cosines(queries: NDArray[np.floating], candidates: NDArray[np.floating]) -> NDArray[np.float64]:
    """Similarity [G, G] of each query with each candidate, from unit-norm embeddings [G, E]."""
    # In float64: the order of summation differs between equal columns of a matrix product, and ties must stay ties.
    return queries.astype(np.float64) @ candidates.astype(np.float64).T


def _direction(scores: list[NDArray[np.float64]], galleries: list[Gallery], num_bootstrap: int, seed: int) -> Report:
    size = scores[0].shape[0]
    hits = {depth: np.concatenate([expected_hits(part, depth) for part in scores]) for depth in DEPTHS}
    patient = np.concatenate([gallery.patient for gallery in galleries])
    # The galleries stay as they are; only the queries are drawn again.
    weights = metrics.patient_weights(patient, num_bootstrap, random_for(seed, "retrieval bootstrap"))
    report: Report = {f"r@{depth}": float(hits[depth].mean()) for depth in DEPTHS}
    report |= metrics.interval(metrics.resampled_mean(hits[10], weights), "r@10_ci95")
    report |= {"gallery": size, "num_galleries": len(scores), "num_queries": len(patient)}
    chance: Report = {f"r@{depth}": min(1.0, depth / size) for depth in DEPTHS}
    report |= _duplicate_aware(scores, galleries)
    precision, precision_by_chance = label_precision(scores, galleries)
    report |= precision
    return report | {"chance": chance | precision_by_chance}


def _duplicate_aware(scores: list[NDArray[np.float64]], galleries: list[Gallery]) -> Report:
    """Recall where any report of the same words counts; nothing where reports are not compared."""
    report: Report = {}
    for depth in DEPTHS:
        parts = [
            expected_hits_of_set(part, gallery.text_set, depth)
            for part, gallery in zip(scores, galleries, strict=True)
            if gallery.text_set is not None
        ]
        report |= {f"r@{depth}": float(np.concatenate(parts).mean())} if parts else {}
    return {"duplicate_aware": report} if report else {}


def label_precision(scores: list[NDArray[np.float64]], galleries: list[Gallery]) -> tuple[Report, Report]:
    """The report's entries of label precision at the largest depth: as found, and by chance."""
    name = f"label_precision@{max(DEPTHS)}"
    found, by_chance = [], []
    for part, gallery in zip(scores, galleries, strict=True):
        if gallery.label_set is not None:
            found.append(expected_label_precision(part, gallery.label_set, max(DEPTHS)))
            by_chance.append(expected_label_precision(np.zeros_like(part), gallery.label_set, max(DEPTHS)))
    values = np.concatenate(found) if found else np.zeros(0)
    is_known = np.isfinite(values)
    if not is_known.any():
        return {name: None, f"{name}_reason": "no paired test study has all its labels known"}, {name: None}
    return {name: float(values[is_known].mean())}, {name: float(np.concatenate(by_chance)[is_known].mean())}


def mean_recall_at_10(context: EvaluationContext) -> float:
    """R@10, the mean of both directions, for learning curves."""
    report = evaluate_retrieval(context).values
    return float(np.mean([report[direction]["r@10"] for direction in ("image_to_text", "text_to_image")]))


def galleries_of(context: EvaluationContext) -> tuple[list[Gallery], list[NDArray[np.int64]]]:
    """Galleries of the paired test studies, and the studies that each of them holds."""
    held_out, settings = context.held_out, context.settings
    studies = context.test_studies(image=True, text=True)
    image = context.image_embeddings(studies)
    text = encode_texts(context.encoder, held_out.words_of(studies), batch_size=settings.batch_size)
    sets = None if held_out.labels is None else label_sets(held_out.labels_of(studies))
    _, texts = np.unique([ids.tobytes() for ids in held_out.words_of(studies)], return_inverse=True)
    parts = split_galleries(len(studies), settings.gallery, settings.seed)
    patient = held_out.patient[studies]
    galleries = [
        Gallery(image[rows], text[rows], patient[rows], None if sets is None else sets[rows], texts[rows]) for rows in parts
    ]
    return galleries, [studies[rows] for rows in parts]


def evaluate_retrieval(context: EvaluationContext) -> Findings:
    """Retrieval among the paired test studies."""
    settings = context.settings
    galleries, members = galleries_of(context)
    report = retrieve(galleries, num_bootstrap=settings.num_bootstrap, seed=settings.seed)
    report["num_unique_texts"] = len({ids.tobytes() for ids in context.held_out.words_of(np.concatenate(members))})
    examples = _examples(context, members[0], cosines(galleries[0].image, galleries[0].text))
    return Findings(report, examples=examples)


def _examples(
    context: EvaluationContext, studies: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[RetrievalExample, ...]:
    best = np.argsort(-scores, axis=1, kind="stable")[: context.settings.num_examples, :3]
    return tuple(
        RetrievalExample(
            study=int(studies[query]),
            image=context.held_out.images_of(studies[query : query + 1])[0],
            words=context.held_out.words_of(studies[query : query + 1])[0],
            top_studies=tuple(int(study) for study in studies[top]),
            top_words=tuple(context.held_out.words_of(studies[top])),
            is_right=tuple(bool(row == query) for row in top),
        )
        for query, top in enumerate(best)
    )
