"""How often 95 % intervals hold the truth: data are drawn many times from a law whose true value is known.

Measured with 200 resamples (600 to 4,000 draws each): where there are a hundred patients and more, 92 to 95 % for AUROC, PSNR,
its paired difference and recall; with 20 patients 89 % for AUROC and 91 % for PSNR, with 10 patients 90 % for PSNR. One point
of what is missing is due to 200 resamples: 94.2 % for the mean of 1,000 normal numbers. Recall near 1 is worst: in a gallery of
20 studies, where R@10 is .986, most draws have no miss to resample and an interval without width, which covers in 24 %.
Student's t over three seeds covers 95 % of normal numbers, 93 % of uniform and 84 % of lognormal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm

from fedmix.evaluation import metrics
from fedmix.evaluation.classification import score_report
from fedmix.evaluation.regeneration import Quality, _gain_over_best, hidden_psnr, quality_report
from fedmix.evaluation.retrieval import Gallery, retrieve
from fedmix.report.study import MAIN, Cell, Cost, Result, Study, estimate

Interval = list[float] | tuple[float, float]
AUROC = float(norm.cdf(1 / np.sqrt(2)))  # of scores with a deviation of 1 that differ by 1
# Of 40,000 simulated images with `pictures`; their standard errors are .024 and .012 dB.
PSNR_DB, GAIN_DB = 26.243, 1.564


def share_covered(interval: Callable[[np.random.Generator], Any], truth: Any, num: int) -> Any:
    """Of one interval and its truth, or of several and theirs: how many of ``num`` draws hold it."""
    low, high = np.moveaxis([interval(np.random.default_rng([1, number])) for number in range(num)], -1, 0)
    return ((low <= truth) & (truth <= high)).mean(axis=0)


def could_be_95_percent(share: float, num: int) -> bool:
    """Whether so many of ``num`` intervals that each cover with 95 % would do so in all but 2 of 1,000 trials."""
    low, high = binom.ppf([0.001, 0.999], num, 0.95)
    return bool(low <= share * num <= high)


def auroc_interval(
    rng: np.random.Generator, num_patients: int, num_each: int = 2, *, as_if_independent: bool = False
) -> Interval:
    """Some studies of each patient, alike in label and for the most part in score."""
    patient = np.repeat(np.arange(num_patients), num_each)
    label = (rng.random(num_patients) < 0.3).astype(np.int8)[patient]
    scores = label + 0.8 * rng.normal(size=num_patients)[patient] + 0.6 * rng.normal(size=len(patient))
    drawn = np.arange(len(patient)) if as_if_independent else patient
    found = score_report(label[:, None], scores[:, None], drawn, label_names=("a",), seed=int(rng.integers(2**31)))
    return found["ci95"]


def pictures(rng: np.random.Generator, num_patients: int) -> tuple[NDArray, NDArray, NDArray]:
    """Patients of two images each, and the PSNR of two methods, of which the second draws with more noise."""
    patient = np.repeat(np.arange(num_patients), 2)
    noise = np.exp(rng.normal(-3, 0.5, num_patients))[patient] * np.exp(rng.normal(0, 0.2, len(patient)))
    more = noise * 1.2 * np.exp(rng.normal(0, 0.2, num_patients))[patient]
    truth = rng.uniform(0.3, 0.7, (len(patient), 8, 8)).astype(np.float32)
    hidden = rng.random(truth.shape) < 0.5
    drawn = [(truth + each[:, None, None] * rng.normal(size=truth.shape)).astype(np.float32) for each in (noise, more)]
    ours, theirs = (hidden_psnr(truth, one, hidden) for one in drawn)
    return patient, ours, theirs


def psnr_intervals(rng: np.random.Generator, num_patients: int) -> tuple[Interval, Interval]:
    """Of the first method, and of what it gains over the second on the same images."""
    patient, ours, theirs = pictures(rng, num_patients)
    weights = metrics.patient_weights(patient, 200, rng)
    gain = _gain_over_best(Quality(ours, ours), {"theirs": Quality(theirs, theirs)}, weights)
    own = quality_report(Quality(ours, ours), weights)
    return own["psnr_db_ci95"], gain["gain_over_best_baseline_db_ci95"]


def pairs(rng: np.random.Generator, num_patients: int, first: int) -> Gallery:
    """Two pairs of each patient, which resemble each other."""
    patient = np.repeat(np.arange(num_patients), 2)
    image = 0.7 * rng.normal(size=(num_patients, 8))[patient] + rng.normal(size=(len(patient), 8))
    text = image + 1.2 * rng.normal(size=image.shape)
    image, text = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (image, text))
    return Gallery(image, text, patient + first, None)


def recalls(num: int, num_patients: int, num_galleries: int) -> list[tuple[float, Interval]]:
    """R@10 of so many draws of galleries, and its interval."""
    found = []
    for number in range(num):
        rng = np.random.default_rng([2, number])
        galleries = [pairs(rng, num_patients, first) for first in range(0, num_galleries * num_patients, num_patients)]
        report = retrieve(galleries, seed=number)["image_to_text"]
        found.append((report["r@10"], report["r@10_ci95"]))
    return found


def share_of_recalls(found: list[tuple[float, Interval]]) -> float:
    """How many intervals hold the mean of all draws, which no formula gives."""
    truth = np.mean([recall for recall, _ in found])
    return float(np.mean([low <= truth <= high for _, (low, high) in found]))


def study_of(ours: NDArray, theirs: NDArray) -> Study:
    """A study of one regime whose cells have these numbers, one a seed."""
    methods = ((MAIN, ours), ("other", theirs))
    cells = tuple(
        Cell("all", seed, "completed", None, {name: Result({"psnr_db": float(each[seed])}, Cost()) for name, each in methods})
        for seed in range(len(ours))
    )
    return Study("s", tuple(range(len(ours))), ("all",), (MAIN, "other"), cells)


def test_auroc_of_150_patients_is_covered_and_not_where_studies_are_drawn_instead_of_patients() -> None:
    assert could_be_95_percent(share_covered(lambda rng: auroc_interval(rng, 150, 4), AUROC, 200), 200)
    wrong = share_covered(lambda rng: auroc_interval(rng, 150, 4, as_if_independent=True), AUROC, 60)
    assert not could_be_95_percent(wrong, 60)


def test_recall_is_covered_in_two_galleries_of_200() -> None:
    found = recalls(250, num_patients=100, num_galleries=2)
    assert could_be_95_percent(share_of_recalls(found), 250)


def test_psnr_and_the_paired_gain_of_100_patients_are_covered() -> None:
    shares = share_covered(lambda rng: psnr_intervals(rng, 100), (PSNR_DB, GAIN_DB), 200)
    assert all(could_be_95_percent(share, 200) for share in shares)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_student_s_t_over_few_seeds_covers_what_is_normal(num_seeds: int) -> None:
    def interval(rng: np.random.Generator) -> Interval:
        return estimate(dict(enumerate(rng.normal(3, 2, num_seeds).tolist()))).interval

    assert could_be_95_percent(share_covered(interval, 3.0, 2000), 2000)


def test_the_difference_between_methods_is_covered_and_as_narrow_as_what_seeds_do_not_share() -> None:
    def drawn(rng: np.random.Generator) -> Study:
        shared = rng.normal(0, 5, 3)
        return study_of(shared + rng.normal(1.5, 0.5, 3), shared + rng.normal(0, 0.5, 3))

    def interval(rng: np.random.Generator) -> Interval:
        return drawn(rng).difference("all", "other", "psnr_db").interval

    assert could_be_95_percent(share_covered(interval, 1.5, 2000), 2000)
    studies = [drawn(np.random.default_rng([3, number])) for number in range(100)]
    less, own = ([np.ptp(one.interval) for one in each] for each in (
        [study.difference("all", "other", "psnr_db") for study in studies],
        [study.estimate("all", MAIN, "psnr_db") for study in studies],
    ))  # fmt: skip
    assert np.median(less) < np.median(own) / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interval", "num_patients", "truth", "measured"),
    [
        (auroc_interval, 20, AUROC, 0.893),
        (auroc_interval, 50, AUROC, 0.934),
        (auroc_interval, 100, AUROC, 0.925),
        (psnr_intervals, 10, (PSNR_DB, GAIN_DB), (0.897, 0.893)),
        (psnr_intervals, 20, (PSNR_DB, GAIN_DB), (0.907, 0.917)),
    ],
)
def test_few_patients_are_covered_as_often_as_was_measured(
    interval: Callable[[np.random.Generator, int], Any], num_patients: int, truth: Any, measured: Any
) -> None:
    """Less than 95 %; what would bring it nearer, or take it farther away, changes the number and what is said of it."""
    share = share_covered(lambda rng: interval(rng, num_patients), truth, 1000)
    assert share == pytest.approx(measured, abs=0.03)


@pytest.mark.slow
def test_recall_near_one_in_a_small_gallery_is_seldom_covered() -> None:
    found = recalls(600, num_patients=10, num_galleries=1)
    assert np.mean([recall for recall, _ in found]) > 0.98
    assert share_of_recalls(found) == pytest.approx(0.24, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "truth", "measured"),
    [
        (lambda rng: rng.random(3), 0.5, 0.925),
        (lambda rng: np.exp(rng.normal(size=3)), float(np.exp(0.5)), 0.844),
        (lambda rng: rng.standard_t(3, 3), 0.0, 0.96),
    ],
    ids=["uniform", "lognormal", "heavy tails"],
)
def test_student_s_t_over_three_seeds_covers_other_laws_as_often_as_was_measured(
    draw: Callable[[np.random.Generator], NDArray], truth: float, measured: float
) -> None:
    share = share_covered(lambda rng: estimate(dict(enumerate(draw(rng).tolist()))).interval, truth, 4000)
    assert share == pytest.approx(measured, abs=0.02)
