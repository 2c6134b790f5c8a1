"""The linear probe with 1, 10 and 100 % of the labelled studies: how soon a representation needs no more labels.

Few studies are a matter of luck, so a small share is drawn several times and the mean of the draws is reported, with an
interval over test patients and the draws beside it. A label that a draw holds no case of counts as guessed, at 0.5: left out,
it would flatter the share that could not learn it.

What else learns from labels (fine_tuning.py, prompt_tuning.py) has the same draws, and says what it gains over this probe on
the same studies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmix.evaluation import metrics
from fedmix.evaluation.classification import LabelledRows, drawn_rows, fit_probe, image_probe, image_rows
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, Findings, Report, random_for

SHARES = {"1_percent": 0.01, "10_percent": 0.1, "100_percent": 1.0}
NUM_DRAWS = 3  # of each share but the whole
MIN_TRAIN = 10  # studies; below it a draw says nothing of the representation

Drawn = list[NDArray[np.float64]]  # scores [n, K] of what was trained on each draw, NaN where a label has not both classes


class Scored(NamedTuple):
    """Macro AUROC of each draw, its mean over draws in each resample [R], and how many labels were guessed on average."""

    draws: list[float]
    resampled: NDArray[np.float64]
    num_guessed: float


def scored(scores: Drawn, test: LabelledRows, weights: NDArray[np.float64]) -> Scored:
    """Macro AUROC of each draw's scores; a column of NaN counts as guessed."""
    guessed = [np.isnan(drawn).any(axis=0) for drawn in scores]
    filled = [np.where(np.isnan(drawn), 0.0, drawn) for drawn in scores]
    once = np.ones((1, len(test)))
    draws = [float(metrics.resampled_macro_auroc(test.labels, drawn, once)[0]) for drawn in filled]
    resampled = np.mean([metrics.resampled_macro_auroc(test.labels, drawn, weights) for drawn in filled], axis=0)
    return Scored(draws, resampled, float(np.mean([one.sum() for one in guessed])))


def share_report(scores: Drawn, test: LabelledRows, weights: NDArray[np.float64], probe: Drawn | None = None) -> Report:
    """Macro AUROC over the draws: mean, interval, each draw's own; with a ``probe`` of the same draws the gain over it."""
    found = scored(scores, test, weights)
    if not np.isfinite(found.draws).all():
        return {"macro_auroc": None, "ci95": None, "reason": "no label has both classes among the test rows"}
    report: Report = {"macro_auroc": float(np.mean(found.draws)), **metrics.interval(found.resampled), "draws": found.draws}
    if probe is not None:
        other = scored(probe, test, weights)
        report["gain_over_probe"] = float(np.mean(found.draws) - np.mean(other.draws))
        report |= metrics.interval(found.resampled - other.resampled, "gain_over_probe_ci95")
    return report | {"mean_labels_guessed": found.num_guessed}


def draws_of(num_labelled: int, settings: EvaluationSettings) -> dict[str, list[NDArray[np.int64]]]:
    """For each share the labelled studies of each of its draws; the whole is what the linear probe has."""
    num_whole = min(num_labelled, settings.num_probe_train)
    draws = {}
    for name, share in SHARES.items():
        purposes = [f"probe rows {name} {draw}" for draw in range(NUM_DRAWS)] if share < 1 else ["probe rows"]
        num_train = round(share * num_whole)
        draws[name] = [drawn_rows(num_labelled, num_train, seed=settings.seed, purpose=purpose) for purpose in purposes]
    return draws


def scores_by_share(
    context: EvaluationContext, num_labelled: int, train: Callable[[NDArray[np.int64]], NDArray[np.float64]]
) -> dict[str, Drawn]:
    """Scores [n, K] of what ``train`` makes of each draw's rows; none for a share of too few studies."""
    draws = draws_of(num_labelled, context.settings)
    return {name: [train(rows) for rows in drawn if len(rows) >= MIN_TRAIN] for name, drawn in draws.items()}


def probe_by_share(context: EvaluationContext) -> dict[str, Drawn]:
    """Scores of the linear probe on each draw, fitted once for all tasks; the whole is the linear probe's own fit."""
    train, test = image_rows(context)
    whole, seed = image_probe(context), context.settings.seed

    def fit(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        if len(rows) == whole.num_train:
            return whole.scores
        return fit_probe(train.take(rows), test.features, num_train=len(rows), seed=seed).scores

    return context.once("probe by share", lambda: scores_by_share(context, len(train), fit))


def shares_report(context: EvaluationContext, scores: Mapping[str, Drawn], probe: Mapping[str, Drawn] | None = None) -> Report:
    """The report of every share, over the test studies with an image and a label."""
    train, test = image_rows(context)
    settings = context.settings
    rng = random_for(settings.seed, "classification bootstrap")
    weights = metrics.patient_weights(test.patient, settings.num_bootstrap, rng)
    report: Report = {}
    for name, drawn in draws_of(len(train), settings).items():
        sizes = {"num_train": len(drawn[0]), "num_test": len(test), "chance": 0.5}
        if not scores[name]:
            reason = f"not enough data: {len(drawn[0])} labelled studies, at least {MIN_TRAIN} are needed"
            report[name] = {"macro_auroc": None, "ci95": None, "reason": reason} | sizes
        else:
            beside = None if probe is None else probe[name]
            report[name] = share_report(scores[name], test, weights, beside) | sizes
    return report


def evaluate_label_shares(context: EvaluationContext) -> Findings:
    """The probe on frozen image features with growing shares of its labels."""
    return Findings(shares_report(context, probe_by_share(context)))
