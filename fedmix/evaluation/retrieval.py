"""Retrieval between images and reports in galleries of a fixed size, both ways.

Ties: the recall reported is the expected one if studies with equal scores were put in random order. Cosines count as
equal within 1e-6, the resolution of float32, so a collapsed encoder gets exactly chance, and a report that occurs twice
word for word costs what a coin toss costs.

Reports recur ("no acute disease"): another patient's identical report is no error of the model. So beside exact pairs
there is ``label_precision@10``, the share of the first ten that carry the same labels as the query (the pair itself
counts), ``duplicate_aware`` recall, for which any report of the same words counts as the pair's own, and the number of
different texts.

Queries are scored in blocks, so memory grows with the gallery and not with its square; their number in a block moves no figure.

Shapes: B queries of a block, G studies of a gallery, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
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
QUERIES_AT_ONCE = 512  # no fewer than the default gallery's; six float64 arrays of so many rows are 150 MB for 6,000 studies
LABEL_PRECISION = f"label_precision@{max(DEPTHS)}"

Measured = dict[str, NDArray[np.float64]]  # a measure of each query, by name


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


def expected_hits(scores: NDArray[np.floating], depth: int, own: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Chance [B] that a query finds its own candidate among the first ``depth``, equal scores being in random order.

    ``scores`` [B, G]: row i holds the scores of query i. ``own`` [B]: the candidate of each; None: query i's is candidate i.
    """
    partner = np.take_along_axis(scores, _own(scores, own)[:, None], axis=1)
    num_above = (scores > partner + SAME_SCORE).sum(axis=1)
    num_tied = (np.abs(scores - partner) <= SAME_SCORE).sum(axis=1)  # with the partner itself, so never 0
    hits: NDArray[np.float64] = np.clip((depth - num_above) / num_tied, 0.0, 1.0)
    return hits


def expected_hits_of_set(
    scores: NDArray[np.floating], members: NDArray[np.int64], depth: int, own: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Chance [B] that a query finds any candidate of its own set among the first ``depth``, equal scores in random order.

    ``members`` [G]: equal numbers are one set, of which the query's own candidate is one.
    """
    is_own = members[_own(scores, own), None] == members
    best = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
    num_above = (scores > best + SAME_SCORE).sum(axis=1)
    is_tied = np.abs(scores - best) <= SAME_SCORE
    num_tied, num_right = is_tied.sum(axis=1), (is_tied & is_own).sum(axis=1)
    places = np.clip(depth - num_above, 0, num_tied)
    hits: NDArray[np.float64] = 1 - hypergeom.pmf(0, num_tied, num_right, places)
    return hits


def expected_label_precision(
    scores: NDArray[np.floating], label_set: NDArray[np.int64], depth: int, own: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Expected share [B] of the first ``depth`` candidates with the query's label set; NaN for an unknown query.

    ``label_set`` [G]; a candidate with an unknown label counts as different.
    """
    depth = min(depth, scores.shape[1])
    last = np.partition(scores, -depth, axis=1)[:, -depth, None]
    is_above = scores > last + SAME_SCORE
    is_tied = np.abs(scores - last) <= SAME_SCORE
    places_left = depth - is_above.sum(axis=1, keepdims=True)
    share = is_above + is_tied * (places_left / is_tied.sum(axis=1, keepdims=True))
    wanted = label_set[_own(scores, own)]
    precision = (share * (wanted[:, None] == label_set)).sum(axis=1) / depth
    return np.where(wanted == UNKNOWN_SET, np.nan, precision)


def _own(scores: NDArray[np.floating], own: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.arange(len(scores)) if own is None else own


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


def retrieve(
    galleries: list[Gallery], *, num_bootstrap: int = 200, seed: int = 0, num_at_once: int = QUERIES_AT_ONCE
) -> Report:
    """Both directions over galleries of equal size: {"image_to_text": {...}, "text_to_image": {...}}."""
    directions = {
        "image_to_text": [(gallery.image, gallery.text) for gallery in galleries],
        "text_to_image": [(gallery.text, gallery.image) for gallery in galleries],
    }
    report: Report = {}
    for name, sides in directions.items():
        parts = [
            _measured(scores, gallery, own)
            for (queries, candidates), gallery in zip(sides, galleries, strict=True)
            for own, scores in score_blocks(queries, candidates, num_at_once)
        ]
        report[name] = _direction(parts, galleries, num_bootstrap, seed)
    return report


def cosines(queries: NDArray[np.floating], candidates: NDArray[np.floating]) -> NDArray[np.float64]:
    """Similarity [B, G] of each query [B, E] with each candidate [G, E], from unit-norm embeddings."""
    # In float64: the order of summation differs between equal columns of a matrix product, and ties must stay ties.
    return queries.astype(np.float64) @ candidates.astype(np.float64).T


def score_blocks(
    queries: NDArray[np.floating], candidates: NDArray[np.floating], num_at_once: int = QUERIES_AT_ONCE
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Some queries' numbers [B] and their cosines [B, G], until all [G, E] have had their turn; at most ``num_at_once``."""
    for rows in np.array_split(np.arange(len(queries), dtype=np.int64), -(-len(queries) // num_at_once)):
        yield rows, cosines(queries[rows], candidates)


def _measured(scores: NDArray[np.float64], gallery: Gallery, own: NDArray[np.int64]) -> Measured:
    """Every measure of a block's queries, as far as the gallery knows texts and labels."""
    found = {f"r@{depth}": expected_hits(scores, depth, own) for depth in DEPTHS}
    if gallery.text_set is not None:
        texts = gallery.text_set
        found |= {f"duplicate_aware/r@{depth}": expected_hits_of_set(scores, texts, depth, own) for depth in DEPTHS}
    return found | label_precisions(scores, gallery, own)


def _direction(parts: list[Measured], galleries: list[Gallery], num_bootstrap: int, seed: int) -> Report:
    size = len(galleries[0].patient)
    found = joined(parts)
    patient = np.concatenate([gallery.patient for gallery in galleries])
    # The galleries stay as they are; only the queries are drawn again.
    weights = metrics.patient_weights(patient, num_bootstrap, random_for(seed, "retrieval bootstrap"))
    report: Report = {f"r@{depth}": float(found[f"r@{depth}"].mean()) for depth in DEPTHS}
    report |= metrics.interval(metrics.resampled_mean(found["r@10"], weights), "r@10_ci95")
    report |= {"gallery": size, "num_galleries": len(galleries), "num_queries": len(patient)}
    chance: Report = {f"r@{depth}": min(1.0, depth / size) for depth in DEPTHS}
    # Recall where any report of the same words counts; nothing where reports are not compared.
    aware = {name: float(found[f"duplicate_aware/{name}"].mean()) for name in chance if f"duplicate_aware/{name}" in found}
    report |= {"duplicate_aware": aware} if aware else {}
    precision, precision_by_chance = label_precision(found)
    report |= precision
    return report | {"chance": chance | precision_by_chance}


def joined(parts: list[Measured]) -> Measured:
    """The measures of all queries, from those of some each; a measure that a part lacks is of the others' queries."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}


def label_precisions(scores: NDArray[np.float64], gallery: Gallery, own: NDArray[np.int64] | None = None) -> Measured:
    """Label precision of queries at the largest depth, as found and by chance; nothing where there are no labels."""
    if gallery.label_set is None:
        return {}
    kinds = {LABEL_PRECISION: scores, f"chance/{LABEL_PRECISION}": np.zeros_like(scores)}
    return {name: expected_label_precision(kind, gallery.label_set, max(DEPTHS), own) for name, kind in kinds.items()}


def label_precision(found: Measured) -> tuple[Report, Report]:
    """The report's entries of label precision at the largest depth: as found, and by chance."""
    values = found.get(LABEL_PRECISION, np.zeros(0))
    is_known = np.isfinite(values)
    if not is_known.any():
        reason = "no paired test study has all its labels known"
        return {LABEL_PRECISION: None, f"{LABEL_PRECISION}_reason": reason}, {LABEL_PRECISION: None}
    by_chance = found[f"chance/{LABEL_PRECISION}"]
    return {LABEL_PRECISION: float(values[is_known].mean())}, {LABEL_PRECISION: float(by_chance[is_known].mean())}


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
    _, scores = next(score_blocks(galleries[0].image, galleries[0].text))
    examples = _examples(context, members[0], scores)
    return Findings(report, examples=examples)


def _examples(
    context: EvaluationContext, studies: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[RetrievalExample, ...]:
    """The first queries' best candidates; ``scores`` [B, G] are of the first studies."""
    best = np.argsort(-scores[: context.settings.num_examples], axis=1, kind="stable")[:, :3]
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
