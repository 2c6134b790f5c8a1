"""The linear probe with 1, 10 and 100 % of the labelled studies: how soon a representation needs no more labels.

Few studies are a matter of luck, so a small share is drawn several times and the mean of the draws is reported, with an
interval over test patients and the draws beside it. A label that a draw holds no case of counts as guessed, at 0.5: left out,
it would flatter the share that could not learn it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmix.evaluation import metrics
from fedmix.evaluation.classification import LabelledRows, fit_probe, image_probe, image_rows
from fedmix.evaluation.features import EvaluationContext, Findings, Report, random_for

SHARES = {"1_percent": 0.01, "10_percent": 0.1, "100_percent": 1.0}
NUM_DRAWS = 3  # of each share but the whole
MIN_TRAIN = 10  # studies; below it a draw says nothing of the representation


def share_report(scores: list[NDArray[np.float64]], test: LabelledRows, weights: NDArray[np.float64]) -> Report:
    """Macro AUROC of probes [n, K] fitted on different draws: mean, interval, and each draw's own."""
    guessed = [np.isnan(drawn).any(axis=0) for drawn in scores]
    filled = [np.where(np.isnan(drawn), 0.0, drawn) for drawn in scores]
    once = np.ones((1, len(test)))
    draws = [float(metrics.resampled_macro_auroc(test.labels, drawn, once)[0]) for drawn in filled]
    if not np.isfinite(draws).all():
        return {"macro_auroc": None, "ci95": None, "reason": "no label has both classes among the test rows"}
    resampled = np.mean([metrics.resampled_macro_auroc(test.labels, drawn, weights) for drawn in filled], axis=0)
    report: Report = {"macro_auroc": float(np.mean(draws)), **metrics.interval(resampled), "draws": draws}
    return report | {"mean_labels_guessed": float(np.mean([one.sum() for one in guessed]))}


def evaluate_label_shares(context: EvaluationContext) -> Findings:
    """The probe on frozen image features with growing shares of its labels; the whole is the linear probe's own fit."""
    train, test = image_rows(context)
    settings, whole = context.settings, image_probe(context)
    rng = random_for(settings.seed, "classification bootstrap")
    weights = metrics.patient_weights(test.patient, settings.num_bootstrap, rng)
    report: Report = {}
    for name, share in SHARES.items():
        num_train = round(share * whole.num_train)
        sizes = {"num_train": num_train, "num_test": len(test), "chance": 0.5}
        if num_train < MIN_TRAIN:
            reason = f"not enough data: {num_train} labelled studies, at least {MIN_TRAIN} are needed"
            report[name] = {"macro_auroc": None, "ci95": None, "reason": reason} | sizes
            continue
        scores = [whole.scores]
        if share < 1:
            scores = [
                fit_probe(
                    train, test.features, num_train=num_train, seed=settings.seed, purpose=f"probe rows {name} {draw}"
                ).scores
                for draw in range(NUM_DRAWS)
            ]
        report[name] = share_report(scores, test, weights) | sizes
    return Findings(report)
