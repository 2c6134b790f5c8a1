"""Whether the linear probe's probabilities can be taken at their word: Brier score, expected calibration error, reliability.

Both errors are means over findings. The calibration error takes ten bins of equal width: the distance between the mean
probability of a bin and the share of its studies with the finding, weighed by the bin's studies (Guo et al. 2017, 1706.04599).
It is never zero on few studies, and resampling them only adds to it; so instead of an interval the range stands beside it that
perfectly calibrated probabilities would give on as many studies (Broecker and Smith 2007), with labels drawn from them. The
Brier score's companion is that of always saying a finding's share among the training studies: what a probe has to beat.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from fedmix.evaluation import metrics
from fedmix.evaluation.classification import LabelledRows, image_probe, image_rows
from fedmix.evaluation.features import EvaluationContext, Findings, NotEvaluableError, Report, random_for

NUM_BINS = 10


def bins_of(probabilities: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each probability, counted from 0; a probability of 1 belongs to the last."""
    return np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def calibration_errors(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    """Expected calibration error [R] of one finding's probabilities [n] under each row of labels [R, n], 0 or 1."""
    members = np.eye(NUM_BINS)[bins_of(probabilities)]
    errors: NDArray[np.float64] = np.abs((probabilities - labels) @ members).sum(axis=1) / len(probabilities)
    return errors


def brier_scores(
    labels: NDArray[np.int8], probabilities: NDArray[np.floating], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean squared error [R] of one finding's probabilities under each row of weights; unknown labels are left out."""
    known = (labels >= 0).astype(np.float64)
    return metrics.resampled_ratio(known * (probabilities - labels) ** 2, known, weights)


def calibration_report(
    test: LabelledRows,
    probabilities: NDArray[np.float64],
    prevalence: NDArray[np.float64],
    *,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> Report:
    """Both errors with what they are to be compared with, and the reliability bins over all findings together.

    ``probabilities`` [n, K], ``prevalence`` [K]: share of the training studies with each finding; columns that hold NaN were
    not fitted and are left out.
    """
    fitted = np.flatnonzero(np.isfinite(probabilities).all(axis=0) & (test.labels >= 0).any(axis=0))
    if not len(fitted):
        raise NotEvaluableError("the probe could be fitted for no finding, so there is no probability to judge")
    labels, probabilities = test.labels[:, fitted], probabilities[:, fitted]
    rng = random_for(seed, "calibrated labels")
    errors = np.mean([_errors(*column, num_bootstrap, rng) for column in zip(labels.T, probabilities.T, strict=True)], axis=0)
    report: Report = {"ece": float(errors[0]), **metrics.interval(errors[1:], "ece_if_calibrated")}
    patients = metrics.patient_weights(test.patient, num_bootstrap, random_for(seed, "classification bootstrap"))
    weights = np.concatenate([np.ones((1, len(test))), patients])
    scores = _macro_brier(labels, probabilities, weights)
    report |= {"brier": float(scores[0]), **metrics.interval(scores[1:], "brier_ci95")}
    guess = np.broadcast_to(prevalence[fitted], labels.shape)
    report["brier_of_prevalence"] = float(_macro_brier(labels, guess, weights[:1])[0])
    return report | {"bins": _reliability(labels, probabilities), "num_labels_scored": len(fitted), "num_test": len(test)}


def _errors(
    labels: NDArray[np.int8], probabilities: NDArray[np.float64], num_draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The error of one finding, then those of labels drawn from the probabilities themselves: [1 + draws]."""
    known = labels >= 0
    drawn = rng.random((num_draws, int(known.sum()))) < probabilities[known]
    return calibration_errors(np.concatenate([labels[None, known], drawn]), probabilities[known])


def _macro_brier(
    labels: NDArray[np.int8], probabilities: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    columns = zip(labels.T, probabilities.T, strict=True)
    means: NDArray[np.float64] = np.mean([brier_scores(*column, weights) for column in columns], axis=0)
    return means


def _reliability(labels: NDArray[np.int8], probabilities: NDArray[np.float64]) -> list[Report]:
    """Of each bin that holds anything: mean probability, share present, and how many judgements."""
    known = labels >= 0
    present, said = labels[known], probabilities[known]
    bins = bins_of(said)
    return [
        {
            "mean_probability": float(said[bins == number].mean()),
            "share_present": float(present[bins == number].mean()),
            "count": int((bins == number).sum()),
        }
        for number in np.unique(bins)
    ]


def evaluate_calibration(context: EvaluationContext) -> Findings:
    """The full linear probe's probabilities on the test studies."""
    train, test = image_rows(context)
    settings, probe = context.settings, image_probe(context)
    known = train.labels >= 0
    prevalence = np.where(known, train.labels, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    report = calibration_report(test, expit(probe.scores), prevalence, num_bootstrap=settings.num_bootstrap, seed=settings.seed)
    return Findings(report)
