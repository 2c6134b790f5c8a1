"""Retrieval in two steps: what similarity ranks first is put in order anew by the match head (as ALBEF does, 2107.07651).

Embeddings compare an image with every report of a gallery for one product each; the match head reads both as one joint
sequence, which sees more and costs a pass of the trunk for each two. So only the first ``rerank_top`` of each query change
places among each other, and all others stay where they are. Image and report are read whole, though training hid parts.

Candidates are ordered by the head's logit, which is the order of its probability and does not saturate. Where similarity
is equal (retrieval.py says within what) at the edge of the first, the seed draws who is in.

Shapes: G studies of a gallery.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmix.evaluation import metrics
from fedmix.evaluation.features import (
    Encoder,
    EvaluationContext,
    Findings,
    NotEvaluableError,
    Report,
    batches_by_length,
    device_of,
    evaluating,
    padded,
    pixels,
    random_for,
)
from fedmix.evaluation.retrieval import (
    DEPTHS,
    SAME_SCORE,
    Gallery,
    cosines,
    expected_hits,
    galleries_of,
    joined,
    label_precision,
    label_precisions,
)

NEVER_TRAINED = (
    "the model was never trained on matching, so its match head knows no order; give a stage with pairs objectives.match"
)
NOT_KNOWN = "the model folder does not say whether matching was trained"


def first_ones(scores: NDArray[np.floating], top: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Bool [G, G], True for the ``top`` best candidates of each query (row); ``rng`` decides among equal scores."""
    rounded = np.round(scores / SAME_SCORE)
    order = np.lexsort((rng.random(scores.shape), -rounded), axis=1)
    is_first = np.zeros(scores.shape, bool)
    np.put_along_axis(is_first, order[:, :top], values=True, axis=1)
    return is_first


def match_logits(
    encoder: Encoder,
    images: NDArray[np.uint8],
    words: Sequence[NDArray[np.int64]],
    wanted: NDArray[np.bool_],
    *,
    batch_size: int = 256,
) -> NDArray[np.float64]:
    """The match head's logit [G, G] that image i and report j belong together, NaN where it is not ``wanted``.

    At most ``batch_size`` joint sequences are in memory. A report that occurs twice word for word is read once an image,
    so that a tie stays a tie to the bit.
    """
    numbers: dict[bytes, int] = {}
    same = np.array([numbers.setdefault(ids.tobytes(), len(numbers)) for ids in words])
    texts = [np.frombuffer(raw, np.int64) for raw in numbers]
    image_of, report_of = np.nonzero(wanted)
    image_N, text_N = np.unique(np.stack([image_of, same[report_of]]), axis=1)
    found = np.full((len(images), len(texts)), np.nan)
    device = device_of(encoder)
    with evaluating(encoder):
        for rows in batches_by_length([texts[number] for number in text_N], batch_size):
            ids_BL = padded([texts[number] for number in text_N[rows]], device)
            logit_B = encoder.match_logits(pixels(images[image_N[rows]], device), ids_BL)
            found[image_N[rows], text_N[rows]] = logit_B.double().cpu().numpy()
    if not np.isfinite(found[image_N, text_N]).all():
        raise NotEvaluableError("the match head's values are not finite; training has probably diverged")
    return np.where(wanted, found[:, same], np.nan)


def reordered(scores: NDArray[np.float64], logits: NDArray[np.float64], is_first: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores [G, G] that rank as ``scores`` do, but for the first ones, which keep their places in the order of ``logits``."""
    lowest_first = np.where(is_first, logits, np.inf).min(axis=1, keepdims=True)
    highest_other = np.where(is_first, -np.inf, scores).max(axis=1, keepdims=True)
    floor = np.where(np.isfinite(highest_other), highest_other, 0.0) + 1.0
    return np.where(is_first, logits - lowest_first + floor, scores)


def evaluate_reranking(context: EvaluationContext) -> Findings:
    """Retrieval among the paired test studies with the first ones put in order by the match head, both ways."""
    settings = context.settings
    if settings.trained_on is not None and "match" not in settings.trained_on:
        raise NotEvaluableError(NEVER_TRAINED)
    galleries, members = galleries_of(context)
    top = min(settings.rerank_top, len(members[0]))
    before, after = [], []
    for gallery, studies in zip(galleries, members, strict=True):
        before.append(cosines(gallery.image, gallery.text))
        after.append(_both_ways(context, before[-1], studies, top))
    report: Report = {
        "image_to_text": _direction(before, [to_text for to_text, _ in after], galleries, context),
        "text_to_image": _direction([scores.T for scores in before], [to_image for _, to_image in after], galleries, context),
        "top": top,
    }
    return Findings(report if settings.trained_on is not None else report | {"note": NOT_KNOWN})


def _both_ways(
    context: EvaluationContext, scores: NDArray[np.float64], studies: NDArray[np.int64], top: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """New scores of a gallery's queries, images' and reports'; what both directions ask for is read once."""
    held_out, settings = context.held_out, context.settings
    rng = random_for(settings.seed, "equal scores")
    to_text, to_image = first_ones(scores, top, rng), first_ones(scores.T, top, rng)
    images, words = held_out.images_of(studies), held_out.words_of(studies)
    logits = match_logits(context.encoder, images, words, to_text | to_image.T, batch_size=settings.batch_size)
    return reordered(scores, logits, to_text), reordered(scores.T, logits.T, to_image)


def _direction(
    before: list[NDArray[np.float64]],
    after: list[NDArray[np.float64]],
    galleries: list[Gallery],
    context: EvaluationContext,
) -> Report:
    """Recalls in the new order, and what it gains at the first place over the old one on the same queries."""
    settings = context.settings
    hits = {depth: np.concatenate([expected_hits(scores, depth) for scores in after]) for depth in DEPTHS}
    gain = hits[1] - np.concatenate([expected_hits(scores, 1) for scores in before])
    patient = np.concatenate([gallery.patient for gallery in galleries])
    weights = metrics.patient_weights(patient, settings.num_bootstrap, random_for(settings.seed, "retrieval bootstrap"))
    report: Report = {f"r@{depth}": float(hits[depth].mean()) for depth in DEPTHS}
    report |= metrics.interval(metrics.resampled_mean(hits[1], weights), "r@1_ci95")
    report |= {"gain_r@1": float(gain.mean())} | metrics.interval(metrics.resampled_mean(gain, weights), "gain_r@1_ci95")
    found = joined([label_precisions(scores, gallery) for scores, gallery in zip(after, galleries, strict=True)])
    return report | label_precision(found)[0]
