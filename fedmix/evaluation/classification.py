"""Classification of findings: a linear probe on frozen features, the same probe on raw pixels and on reports, zero-shot.

The probe is scikit-learn's logistic regression on standardised features. Its one strength of regularisation is chosen
for all labels together by cross-validation inside the training rows, with folds that keep a patient whole: choosing it
on the test rows, or per label on a few positives, would flatter whoever has more noise to fit.
Unknown labels (-1) are left out of fits and scores, label by label.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.transform import downscale_local_mean
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from fedmix.evaluation import metrics
from fedmix.evaluation.features import (
    Encoder,
    EvaluationContext,
    Findings,
    NotEvaluableError,
    Prompts,
    Report,
    Vocabulary,
    encode_texts,
    random_for,
    text_features,
)

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # strongest first; on phantoms the choice falls inside, with 100 or 1,000 rows
NUM_FOLDS = 3
# Fewer say nothing of a penalty: with 10 phantoms in all it moves the AUROC by .003 at most, and trying takes most of the time.
MIN_PATIENTS_A_FOLD = 10
# On phantoms of 48 pixels this baseline is stronger at 12 or 16 a side (AUROC .83) than at 24 (.82) or 48 (.815).
MAX_PIXELS_A_SIDE = 16

# Labels of MIMIC-CXR and NIH ChestX-ray14 whose names no report would say.
WORDED: Prompts = {
    "Effusion": (("pleural effusion .",), ("no pleural effusion .",)),
    "Infiltration": (("infiltrate .",), ("no infiltrate .",)),
    "No Finding": (("no acute cardiopulmonary abnormality .", "normal chest ."), ("abnormal chest .",)),
    "Support Devices": (("support device in place .",), ("no support device .",)),
}


@dataclass(frozen=True)
class LabelledRows:
    """Features [N, F], labels int8 [N, K] (-1 unknown) and the patient of each row."""

    features: NDArray[np.float32]
    labels: NDArray[np.int8]
    patient: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> LabelledRows:
        """Only these rows."""
        return LabelledRows(self.features[rows], self.labels[rows], self.patient[rows])


@dataclass(frozen=True)
class Linear:
    """Logistic regressions on standardised features, one a label; None for a label without both classes in training."""

    scaler: StandardScaler
    models: tuple[LogisticRegression | None, ...]

    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores [n, K] of features [n, F], NaN in the columns of labels without a regression."""
        features = self.scaler.transform(features)
        scores = np.full((len(features), len(self.models)), np.nan)
        for k, model in enumerate(self.models):
            if model is not None:
                scores[:, k] = model.decision_function(features)
        return scores


@dataclass(frozen=True)
class Probe:
    """Scores [n, K] of a fitted probe, NaN in the columns of labels it could not fit, and what it was fitted on and with."""

    scores: NDArray[np.float64]
    num_train: int
    inverse_penalty: float
    linear: Linear


def drawn_rows(num_rows: int, most: int, *, seed: int, purpose: str = "probe rows") -> NDArray[np.int64]:
    """At most ``most`` of so many rows, in their order; drawn by seed and purpose."""
    return np.sort(random_for(seed, purpose).permutation(num_rows)[:most])


def fit_probe(
    train: LabelledRows, features: NDArray[np.float32], *, num_train: int = 1000, seed: int = 0, purpose: str = "probe rows"
) -> Probe:
    """A probe that saw at most ``num_train`` training rows, drawn by seed and purpose, on features [n, F]."""
    train = train.take(drawn_rows(len(train), num_train, seed=seed, purpose=purpose))
    # The matrices are so small that a second BLAS thread makes a probe six times slower.
    with threadpool_limits(limits=1, user_api="blas"):
        inverse_penalty = _choose_inverse_penalty(train, seed)
        linear = _fit(train, inverse_penalty)
        return Probe(linear.scores(features), len(train), inverse_penalty, linear)


def linear_probe(
    train: LabelledRows,
    test: LabelledRows,
    *,
    label_names: Sequence[str],
    num_train: int = 1000,
    seed: int = 0,
    num_bootstrap: int = 200,
) -> Report:
    """Macro AUROC on the test rows of a probe that saw at most ``num_train`` training rows, with its 95 % interval."""
    probe = fit_probe(train, test.features, num_train=num_train, seed=seed)
    return _probe_report(probe, test, label_names=label_names, seed=seed, num_bootstrap=num_bootstrap)


def _probe_report(probe: Probe, test: LabelledRows, **settings: Any) -> Report:
    report = score_report(test.labels, probe.scores, test.patient, **settings)
    return report | {"num_train": probe.num_train, "inverse_penalty": probe.inverse_penalty}


def score_report(
    labels: NDArray[np.int8],
    scores: NDArray[np.floating],
    patient: NDArray[Any],
    *,
    label_names: Sequence[str],
    seed: int = 0,
    num_bootstrap: int = 200,
) -> Report:
    """The report of scores [N, K] against labels [N, K]: macro AUROC, interval, every label and what it was scored on."""
    result = metrics.auroc(labels, scores)
    weights = metrics.patient_weights(patient, num_bootstrap, random_for(seed, "classification bootstrap"))
    report: Report = {"macro_auroc": result.macro, **metrics.interval(metrics.resampled_macro_auroc(labels, scores, weights))}
    if result.macro is None:
        report["reason"] = "no label has both classes among the test rows and, for a probe, among the training rows"
    return report | {
        "per_label": dict(zip(label_names, result.per_label, strict=True)),
        "num_per_label": {
            name: {"positive": int((labels[:, k] == 1).sum()), "negative": int((labels[:, k] == 0).sum())}
            for k, name in enumerate(label_names)
        },
        "num_labels_scored": result.num_scored,
        "num_test": len(labels),
        "chance": 0.5,
    }


def _choose_inverse_penalty(train: LabelledRows, seed: int) -> float:
    """The penalty with the best mean AUROC over folds and labels; the strongest one where nothing can be compared."""
    if len(np.unique(train.patient)) < NUM_FOLDS * MIN_PATIENTS_A_FOLD:
        return INVERSE_PENALTIES[0]
    folds = list(GroupKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(train.features, groups=train.patient))
    means = np.zeros(len(INVERSE_PENALTIES))
    for c, inverse_penalty in enumerate(INVERSE_PENALTIES):
        for inner, outer in folds:
            scores = _fit(train.take(inner), inverse_penalty).scores(train.features[outer])
            # One resample of every row once is the plain AUROC, without scikit-learn's millisecond of checks a label.
            macro = metrics.resampled_macro_auroc(train.labels[outer], scores, np.ones((1, len(outer))))
            means[c] += np.nan_to_num(macro[0]) / NUM_FOLDS
    return INVERSE_PENALTIES[int(np.argmax(means))]


def _fit(train: LabelledRows, inverse_penalty: float) -> Linear:
    scaler = StandardScaler().fit(train.features)
    features = scaler.transform(train.features)
    models: list[LogisticRegression | None] = []
    for k in range(train.labels.shape[1]):
        known = train.labels[:, k] >= 0
        if len(np.unique(train.labels[known, k])) < 2:
            models.append(None)
            continue
        model = LogisticRegression(C=inverse_penalty, max_iter=200)
        with warnings.catch_warnings():
            # Stopping early is one more regulariser and the same for every method; it is no news to a user.
            warnings.simplefilter("ignore", ConvergenceWarning)
            models.append(model.fit(features[known], train.labels[known, k]))
    return Linear(scaler, tuple(models))


def raw_pixel_features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The baseline's features: the pixels of images uint8 [N, S, S] in 0..1, averaged down to at most 16 a side."""
    factor = -(-images.shape[1] // MAX_PIXELS_A_SIDE)
    small = images if factor == 1 else np.stack([downscale_local_mean(image, (factor, factor)) for image in images])
    return (small.reshape(len(images), -1) / 255).astype(np.float32)


def prompts_for(label_names: Sequence[str], known: Prompts) -> Prompts:
    """Prompts of each label: the known ones, else WORDED, else the label's own name with and without "no"."""

    def plain(label: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        finding = label.replace("_", " ").lower()
        return (f"{finding} .",), (f"no {finding} .",)

    return {label: known.get(label) or WORDED.get(label) or plain(label) for label in label_names}


def zero_shot_scores(
    encoder: Encoder,
    image_embeddings: NDArray[np.float32],
    prompts: Prompts,
    vocabulary: Vocabulary,
    *,
    max_words: int = 64,
) -> NDArray[np.float64]:
    """Scores [N, K], labels in the prompts' order: cosine to the positive prompts' mean less that to the negative's."""
    row = {text: number for number, text in enumerate(dict.fromkeys(chain(*chain(*prompts.values()))))}
    words = [np.asarray(ids, np.int64) for ids in vocabulary.encode(list(row), max_words)]
    embeddings = encode_texts(encoder, words).astype(np.float64)
    directions = []
    for pair in prompts.values():
        means = [embeddings[[row[text] for text in side]].mean(axis=0) for side in pair]
        positive, negative = (mean / max(float(np.linalg.norm(mean)), 1e-12) for mean in means)
        directions.append(positive - negative)
    scores: NDArray[np.float64] = image_embeddings.astype(np.float64) @ np.stack(directions, axis=1)
    return scores


def evaluate_zero_shot(context: EvaluationContext) -> Findings:
    """Findings named by sentences alone, without training on a label."""
    _require_labels(context)
    studies = context.test_studies(image=True, label=True)
    held_out, settings = context.held_out, context.settings
    prompts = prompts_for(held_out.label_names, context.prompts)
    embeddings = context.image_embeddings(studies)
    scores = zero_shot_scores(context.encoder, embeddings, prompts, context.vocabulary, max_words=settings.max_prompt_words)
    report = score_report(
        held_out.labels_of(studies),
        scores,
        held_out.patient[studies],
        label_names=held_out.label_names,
        seed=settings.seed,
        num_bootstrap=settings.num_bootstrap,
    )
    return Findings(report | {"num_train": 0})


def image_rows(context: EvaluationContext) -> tuple[LabelledRows, LabelledRows]:
    """The labelled studies with an image, by their frozen features: those that may train a probe, and the test studies."""
    _require_labels(context)
    parts = context.probe_studies(image=True), context.test_studies(image=True, label=True)
    train, test = (_rows(context, part, context.image_features(part)) for part in parts)
    return train, test


def image_probe(context: EvaluationContext) -> Probe:
    """The probe on frozen image features with the full number of labelled studies, fitted once for all tasks."""
    train, test = image_rows(context)
    settings = context.settings

    def fit() -> Probe:
        return fit_probe(train, test.features, num_train=settings.num_probe_train, seed=settings.seed)

    return context.once("image probe", fit)


def evaluate_linear_probe(context: EvaluationContext) -> Findings:
    """A probe on frozen image features, with the full number of labelled studies."""
    _, test = image_rows(context)
    settings, names = context.settings, context.held_out.label_names
    report = _probe_report(
        image_probe(context), test, label_names=names, seed=settings.seed, num_bootstrap=settings.num_bootstrap
    )
    return Findings(report)


def evaluate_few_label_probe(context: EvaluationContext) -> Findings:
    """The same probe with few labelled studies, where a good representation should tell most."""
    train, test = image_rows(context)
    return _probe(context, train, test, context.settings.num_few_train)


def evaluate_raw_pixels(context: EvaluationContext) -> Findings:
    """The probe on pixels: what a representation has to beat."""
    return _probe_pixels(context, context.settings.num_probe_train)


def evaluate_few_label_raw_pixels(context: EvaluationContext) -> Findings:
    """The probe on pixels with few labelled studies."""
    return _probe_pixels(context, context.settings.num_few_train)


def _probe_pixels(context: EvaluationContext, num_train: int) -> Findings:
    _require_labels(context)
    train, test = context.probe_studies(image=True), context.test_studies(image=True, label=True)
    rows = [_rows(context, part, raw_pixel_features(context.held_out.images_of(part))) for part in (train, test)]
    return _probe(context, rows[0], rows[1], num_train)


def evaluate_text_probe(context: EvaluationContext) -> Findings:
    """A probe on frozen report features."""
    _require_labels(context)
    train, test = context.probe_studies(text=True), context.test_studies(text=True, label=True)
    encoder, words_of, size = context.encoder, context.held_out.words_of, context.settings.batch_size
    rows = [_rows(context, part, text_features(encoder, words_of(part), batch_size=size)) for part in (train, test)]
    return _probe(context, rows[0], rows[1], context.settings.num_probe_train)


def _rows(context: EvaluationContext, studies: NDArray[np.int64], features: NDArray[np.float32]) -> LabelledRows:
    return LabelledRows(features, context.held_out.labels_of(studies), context.held_out.patient[studies])


def _probe(context: EvaluationContext, train: LabelledRows, test: LabelledRows, num_train: int) -> Findings:
    settings = context.settings
    report = linear_probe(
        train,
        test,
        label_names=context.held_out.label_names,
        num_train=num_train,
        seed=settings.seed,
        num_bootstrap=settings.num_bootstrap,
    )
    return Findings(report)


def _require_labels(context: EvaluationContext) -> None:
    if not context.held_out.has_label.any():
        raise NotEvaluableError("the held-out set has no labels")
