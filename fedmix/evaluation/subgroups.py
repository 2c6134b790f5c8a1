"""Whom a model serves less well: the linear probe's AUROC in each subgroup of the test patients, beside all others.

Groups are those that the held-out set knows: view and site, and sex and age band where its shards keep them. A group is
compared with the rest over the labels that both can be scored on: the mean over other labels would be another task. Few
patients are "not enough data" and no number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmix.evaluation import metrics
from fedmix.evaluation.classification import LabelledRows, image_probe, image_rows
from fedmix.evaluation.features import EvaluationContext, Findings, NotEvaluableError, Report, random_for

MIN_PATIENTS = 20
MIN_CASES = 5  # studies with and without a finding, for its AUROC in a group


def evaluate_subgroups(context: EvaluationContext) -> Findings:
    """The full linear probe by subgroup: {what they are told apart by: {group: {...}}}."""
    _, test = image_rows(context)
    groups = context.held_out.groups
    if not groups:
        raise NotEvaluableError("the held-out set does not say which view, site or other group a study belongs to")
    studies, settings = context.test_studies(image=True, label=True), context.settings
    scores = image_probe(context).scores
    rng = random_for(settings.seed, "classification bootstrap")
    weights = metrics.patient_weights(test.patient, settings.num_bootstrap, rng)
    report: Report = {}
    skipped: dict[str, str] = {}
    for kind, names in groups.items():
        own = names[studies]
        known = [name for name in np.unique(own) if name not in ("", "unknown")]
        if known:
            report[kind] = {str(name): group_report(test, scores, own == name, weights) for name in known}
        else:
            skipped[kind] = f"the held-out set says the {kind.replace('_', ' ')} of no test study"
    return Findings(report, skipped=skipped)


def group_report(
    test: LabelledRows, scores: NDArray[np.float64], is_inside: NDArray[np.bool_], weights: NDArray[np.float64]
) -> Report:
    """Macro AUROC inside a group and outside it, and the difference with its interval over patients."""
    sizes: Report = {"num_test": int(is_inside.sum()), "num_patients": len(np.unique(test.patient[is_inside]))}
    nothing: Report = {"macro_auroc": None, "ci95": None, "difference": None, "difference_ci95": None}
    if sizes["num_patients"] < MIN_PATIENTS:
        reason = f"not enough data: {sizes['num_patients']} patients, at least {MIN_PATIENTS} are needed"
        return nothing | {"reason": reason} | sizes
    labels = _scorable(test.labels, scores, is_inside)
    if not len(labels):
        reason = f"not enough data: no finding has {MIN_CASES} studies with and {MIN_CASES} without it"
        return nothing | {"reason": reason} | sizes
    inside, samples = _macro(test, scores, is_inside, labels, weights)
    report: Report = {"macro_auroc": inside, **metrics.interval(samples), "num_labels_scored": len(labels)}
    shared = np.intersect1d(labels, _scorable(test.labels, scores, ~is_inside))
    if not len(shared):
        reason = "not enough data: no finding can be scored on the other studies as well"
        return report | {"difference": None, "difference_ci95": None, "difference_reason": reason} | sizes
    sides = [_macro(test, scores, side, shared, weights) for side in (is_inside, ~is_inside)]
    report |= {"difference": sides[0][0] - sides[1][0], "num_labels_compared": len(shared)}
    return report | metrics.interval(sides[0][1] - sides[1][1], "difference_ci95") | sizes


def _scorable(labels: NDArray[np.int8], scores: NDArray[np.float64], is_chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Labels with enough studies of both classes among the chosen, and a fitted probe."""
    counts = [(labels[is_chosen] == value).sum(axis=0) for value in (0, 1)]
    return np.flatnonzero((np.minimum(*counts) >= MIN_CASES) & np.isfinite(scores).all(axis=0))


def _macro(
    test: LabelledRows,
    scores: NDArray[np.float64],
    is_chosen: NDArray[np.bool_],
    labels: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """Macro AUROC over these labels and studies: of everybody, and of each resample."""
    rows = np.flatnonzero(is_chosen)
    all_weights = np.concatenate([np.ones((1, len(rows))), weights[:, rows]])
    values = metrics.resampled_macro_auroc(test.labels[np.ix_(rows, labels)], scores[np.ix_(rows, labels)], all_weights)
    return float(values[0]), values[1:]
