"""How well an attacker's score tells members of the training data from others: AUC, TPR at small FPR, a bound of epsilon.

An average over everybody hides harm to a few, so next to the AUC stands the share of members that are found while almost no
other is accused (Carlini et al. 2022, 2112.03570). That share is the one at the best threshold whose false positive rate is
not above the stated one, without interpolation. Intervals are bootstraps over patients (metrics.py).

Shapes: N rows (studies or patients), R resamples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from fedmix.evaluation import metrics
from fedmix.evaluation.features import Report, random_for

FALSE_POSITIVE_RATES = (0.01, 0.001)
MIN_PATIENTS = 20  # on either side; below it an interval of the AUC spans a third of its range and more
CONFIDENCE = 0.95


def resampled_tpr(
    is_member: NDArray[np.bool_], scores: NDArray[np.floating], weights: NDArray[np.float64], max_fpr: float
) -> NDArray[np.float64]:
    """The largest true positive rate [R] of any threshold whose false positive rate is at most ``max_fpr``.

    ``weights`` [R, N]: how often each row counts. NaN where a resample lacks members or others.
    """
    order = np.argsort(-scores, kind="stable")
    member, other = weights[:, order] * is_member[order], weights[:, order] * ~is_member[order]
    last_of_tie = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found, accused = (np.cumsum(part, axis=1)[:, last_of_tie] for part in (member, other))
    num_member, num_other = member.sum(axis=1, keepdims=True), other.sum(axis=1, keepdims=True)
    allowed = accused <= max_fpr * num_other * (1 + 1e-12)  # a whole number of rows is not lost to rounding
    best = np.where(allowed, found, 0).max(axis=1)
    undefined = np.full(len(weights), np.nan)
    is_defined = (num_member[:, 0] > 0) & (num_other[:, 0] > 0)
    rates: NDArray[np.float64] = np.divide(best, num_member[:, 0], out=undefined, where=is_defined)
    return rates


def attack_report(
    is_member: NDArray[np.bool_],
    scores: NDArray[np.floating],
    patient: NDArray[Any],
    *,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> Report:
    """AUC and TPR at 1 % and 0.1 % FPR of scores [N] that are higher for members, with intervals and sample sizes.

    Where there is not enough data for a number it is None with a reason.
    """
    sizes: Report = {
        "num_members": int(is_member.sum()),
        "num_non_members": int((~is_member).sum()),
        "num_member_patients": len(np.unique(patient[is_member])),
        "num_non_member_patients": len(np.unique(patient[~is_member])),
    }
    names = {f"tpr@fpr_{rate:g}": rate for rate in FALSE_POSITIVE_RATES}
    fewest = min(sizes["num_member_patients"], sizes["num_non_member_patients"])
    if fewest < MIN_PATIENTS:
        reason = f"not enough data: {fewest} patients on the smaller side, at least {MIN_PATIENTS} are needed"
        return {"auc": None, "auc_ci95": None, **dict.fromkeys(names), "reason": reason} | sizes
    weights = metrics.patient_weights(patient, num_bootstrap, random_for(seed, "attack bootstrap"))
    once, labels = np.ones((1, len(scores))), is_member.astype(np.int8)
    report: Report = {"auc": float(metrics.resampled_auroc(labels, scores, once)[0])}
    report |= metrics.interval(metrics.resampled_auroc(labels, scores, weights), "auc_ci95")
    for name, rate in names.items():
        report |= _tpr(name, rate, is_member, scores, np.concatenate([once, weights]))
    return report | sizes


def _tpr(
    name: str, rate: float, is_member: NDArray[np.bool_], scores: NDArray[np.floating], weights: NDArray[np.float64]
) -> Report:
    """One rate with its interval; the first row of ``weights`` is everybody once."""
    needed = math.ceil(1 / rate)
    if (~is_member).sum() < needed:
        reason = f"not enough data: {(~is_member).sum()} non-members, a false positive rate of {rate:g} needs {needed}"
        return {name: None, f"{name}_reason": reason}
    rates = resampled_tpr(is_member, scores, weights, rate)
    return {name: float(rates[0])} | metrics.interval(rates[1:], f"{name}_ci95")


def clopper_pearson(
    num_right: NDArray[np.integer], num: int, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exact interval of a share, from how many of ``num`` were counted (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = np.where(num_right > 0, beta.ppf(tail, np.maximum(num_right, 1), num - num_right + 1), 0.0)
    high = np.where(num_right < num, beta.ppf(1 - tail, num_right + 1, np.maximum(num - num_right, 1)), 1.0)
    return low, high


def least_epsilon(
    num_found: NDArray[np.integer], num_members: int, num_accused: NDArray[np.integer], num_others: int, delta: float
) -> NDArray[np.float64]:
    """The epsilon that true and false positives contradict anything below of, at 95 %; 0 where they contradict nothing.

    Differential privacy with (epsilon, delta) allows TPR <= e^epsilon FPR + delta, and the same with the two groups
    exchanged (Jagielski et al. 2020, 2006.07709). The least TPR and the largest FPR of Clopper and Pearson stand in.
    """
    least_tpr, _ = clopper_pearson(num_found, num_members)
    _, largest_fpr = clopper_pearson(num_accused, num_others)
    sides = ((least_tpr - delta, largest_fpr), (1 - largest_fpr - delta, 1 - least_tpr))
    bounds = [np.log(np.maximum(above, 1e-300) / np.maximum(below, 1e-300)) for above, below in sides]
    bound: NDArray[np.float64] = np.maximum(np.maximum(*bounds), 0.0)
    return bound


def epsilon_report(is_member: NDArray[np.bool_], scores: NDArray[np.floating], *, delta: float, seed: int = 0) -> Report:
    """An empirical lower bound of epsilon from one row for each patient.

    One half of the patients, drawn by the seed, chooses the threshold and the other half is counted at it: a threshold
    chosen where it is counted would prove too much. ``largest_possible`` is what a faultless attack would have proved with as
    many patients.

    Clopper and Pearson take the patients for independent. They were trained into one model, so they are not quite, and the
    confidence is that of an audit with one run (Steinke et al. 2023, 2305.08846, say what a strict one takes).
    """
    num_smaller = int(min(is_member.sum(), (~is_member).sum()))
    if num_smaller < 2 * MIN_PATIENTS:
        reason = f"not enough data: {num_smaller} patients on the smaller side, at least {2 * MIN_PATIENTS} are needed"
        return {"lower_bound": None, "reason": reason, "delta": delta, "confidence": CONFIDENCE}
    chooses = choosing_half(is_member, seed)
    thresholds = np.unique(scores[chooses])
    tried = [_counts(is_member[chooses], scores[chooses], threshold) for threshold in thresholds]
    found, accused = (np.array(part) for part in zip(*tried, strict=True))
    sizes = int((is_member & chooses).sum()), int((~is_member & chooses).sum())
    best = thresholds[int(np.argmax(least_epsilon(found, sizes[0], accused, sizes[1], delta)))]
    found, accused = map(np.array, _counts(is_member[~chooses], scores[~chooses], best))
    num_members, num_others = int((is_member & ~chooses).sum()), int((~is_member & ~chooses).sum())
    faultless = least_epsilon(np.array(num_members), num_members, np.array(0), num_others, delta)
    return {
        "lower_bound": float(least_epsilon(found, num_members, accused, num_others, delta)),
        "largest_possible": float(faultless),
        "delta": delta,
        "confidence": CONFIDENCE,
        "true_positives": int(found),
        "num_members": num_members,
        "false_positives": int(accused),
        "num_non_members": num_others,
    }


def choosing_half(is_member: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """The half [N] of the members and of the others that an attack may be fitted on; the rest is counted."""
    rng = random_for(seed, "epsilon halves")
    chooses = np.zeros(len(is_member), bool)
    for side in (is_member, ~is_member):
        rows = rng.permutation(np.flatnonzero(side))
        chooses[rows[: len(rows) // 2]] = True
    return chooses


def _counts(is_member: NDArray[np.bool_], scores: NDArray[np.floating], threshold: float) -> tuple[int, int]:
    """Members and others with a score of at least the threshold."""
    is_above = scores >= threshold
    return int((is_above & is_member).sum()), int((is_above & ~is_member).sum())
