"""Five findings apart: pairs of which each has one of them and nothing else, as many of each (GLoRIA's CheXpert-5x200).

Where exactly one finding is said, a report of the same finding is a right answer whoever's it is, and an image has one right
class. So retrieval is scored by findings, P@k the share of the first k that have the query's finding and H@k whether any of
them has, and zero-shot by accuracy: the class is that of the nearest mean of positive prompts.

GLoRIA (Huang et al. 2021, ICCV) draws 200 of each from CheXpert's training set; here only test studies are taken, so a small
test split gives fewer, and the report says how many. A finding that is not mentioned counts as absent, as there; shards do not
tell it from one that is doubted, so a study with a doubted finding, which GLoRIA leaves out, may be among them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmix.evaluation import metrics
from fedmix.evaluation.classification import prompts_for
from fedmix.evaluation.features import (
    EvaluationContext,
    Findings,
    Report,
    encode_texts,
    random_for,
)
from fedmix.evaluation.retrieval import DEPTHS, cosines, expected_hits_of_set, expected_label_precision

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
NO_FINDING = "No Finding"
MOST_EACH = 200
MIN_EACH = 10  # pairs of each finding; below it one study moves a class by more than ten points


def evaluate_exclusive(context: EvaluationContext) -> Findings:
    """Retrieval and zero-shot classification among test pairs with one of the five findings alone, which are all labels."""
    names = context.held_out.label_names
    studies = context.test_studies(image=True, text=True, label=True)
    finding = sole_finding(context.held_out.labels_of(studies), names)
    available = {name: int((finding == k).sum()) for k, name in enumerate(FINDINGS)}
    num_each = min(MOST_EACH, *available.values())
    report: Report = {"num_each": num_each, "available": available}
    if num_each < MIN_EACH:
        fewest = min(available, key=available.__getitem__)
        reason = f"not enough data: {available[fewest]} test pairs have {fewest} alone, at least {MIN_EACH} are needed"
        return Findings(report | {"reason": reason})
    rng = random_for(context.settings.seed, "exclusive studies")
    drawn = np.concatenate([rng.permutation(np.flatnonzero(finding == k))[:num_each] for k in range(len(FINDINGS))])
    return Findings(report | _scores(context, studies[np.sort(drawn)], finding[np.sort(drawn)]))


def sole_finding(labels: NDArray[np.int8], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Which of FINDINGS [N] is the only label of a row of ``labels`` [N, K] that is 1, "No Finding" apart; -1 where none is."""
    is_present = labels == 1
    counted = [column for column, name in enumerate(names) if name != NO_FINDING]
    is_sole = is_present[:, counted].sum(axis=1) == 1
    five = is_present[:, [names.index(name) for name in FINDINGS]]
    return np.where(is_sole & five.any(axis=1), five.argmax(axis=1), -1).astype(np.int64)


def _scores(context: EvaluationContext, studies: NDArray[np.int64], finding: NDArray[np.int64]) -> Report:
    held_out, settings = context.held_out, context.settings
    image = context.image_embeddings(studies)
    text = encode_texts(context.encoder, held_out.words_of(studies), batch_size=settings.batch_size)
    rng = random_for(settings.seed, "exclusive bootstrap")
    weights = metrics.patient_weights(held_out.patient[studies], settings.num_bootstrap, rng)
    scores = cosines(image, text)
    return {
        "gallery": len(studies),
        "image_to_text": rank_by_finding(scores, finding, weights),
        "text_to_image": rank_by_finding(scores.T, finding, weights),
        "zero_shot": _zero_shot(context, image, finding, weights),
    }


def rank_by_finding(scores: NDArray[np.float64], finding: NDArray[np.int64], weights: NDArray[np.float64]) -> Report:
    """P@k and H@k of queries by candidates, ``scores`` [G, G], with 95 % intervals; equal scores stand in random order.

    ``finding`` [G]: of each query and of the candidate in the same place. ``weights`` [R, G]: of the bootstrap.
    """
    report: Report = {}
    chance: Report = {}
    for letter, measure in (("p", expected_label_precision), ("h", expected_hits_of_set)):
        for depth in DEPTHS:
            name = f"{letter}@{depth}"
            found = measure(scores, finding, depth)
            report[name] = float(found.mean())
            report |= metrics.interval(metrics.resampled_mean(found, weights), f"{name}_ci95")
            chance[name] = float(measure(np.zeros_like(scores), finding, depth).mean())
    return report | {"chance": chance}


def _zero_shot(
    context: EvaluationContext, image: NDArray[np.float32], finding: NDArray[np.int64], weights: NDArray[np.float64]
) -> Report:
    """Accuracy of the nearest class, over all and within each finding."""
    classes = []
    for positive, _ in prompts_for(FINDINGS, context.prompts).values():
        words = context.vocabulary.encode(positive, context.settings.max_prompt_words)
        mean = encode_texts(context.encoder, [np.asarray(ids, np.int64) for ids in words]).astype(np.float64).mean(axis=0)
        classes.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    is_right = (cosines(image, np.stack(classes)).argmax(axis=1) == finding).astype(np.float64)
    return {
        "accuracy": float(is_right.mean()),
        **metrics.interval(metrics.resampled_mean(is_right, weights)),
        "per_label": {name: float(is_right[finding == k].mean()) for k, name in enumerate(FINDINGS)},
        "chance": 1 / len(FINDINGS),
    }
