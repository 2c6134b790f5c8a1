"""Zero-shot in the words of reports: the sentences that say or deny a finding are taken from reports, not made up.

Which sentence says what, a rule labeller decides (fedmix/data/reports/labeller.py), so no label is used but to score. Sides are
contrasted as in CheXzero (Tiu et al. 2022), whose softmax over "effusion" and "no effusion" ranks images as the difference of
the two cosines does. Sentences come from the reports of studies that may train a probe; none of them is in what is reported.

A label is asked for if the labeller knows a finding by its name. Where the name holds a side, sentences must be about that
side. A sentence that a report leaves unfinished, cut at the model's length, is not taken: its end may have denied all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmix.data.reports import labeller
from fedmix.evaluation import metrics
from fedmix.evaluation.classification import prompts_for, score_report, zero_shot_scores
from fedmix.evaluation.features import EvaluationContext, Findings, NotEvaluableError, Prompts, Report, random_for

MIN_SENTENCES = 5  # of either side of a label
MAX_SENTENCES = 200  # of either side, drawn at random: the mean of more is the same

_SENTENCE = re.compile(r"[^.;!?]+[.;!?]")
_BOTH = re.compile(r"\b(?:bilateral|both)\b")
_SIDES = {"left": re.compile(r"\bleft\b"), "right": re.compile(r"\bright\b")}


def sentences_of(reports: Sequence[str]) -> list[str]:
    """Every finished sentence, in the reports' order; one that occurs often is in the list as often."""
    return [sentence.strip() for report in reports for sentence in _SENTENCE.findall(report)]


def mined(label_names: Sequence[str], sentences: Sequence[str]) -> Prompts:
    """For each label that the labeller knows, the sentences that say it and those that deny it."""
    read = {sentence: (labeller.read(sentence), labeller.denied(sentence)) for sentence in dict.fromkeys(sentences)}
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for label in label_names:
        name = label.replace("_", " ").lower()
        said_by_name = zip(labeller.FINDINGS, labeller.read(name), strict=True)
        places = [place for place, (finding, said) in enumerate(said_by_name) if said or finding == name]
        if len(places) != 1:  # a name of two findings, or of none
            continue
        side = next((one for one, pattern in _SIDES.items() if pattern.search(name)), None)
        said = [text for text in sentences if read[text][0][places[0]] == labeller.SAID and _is_of(side, text, says=True)]
        denied = [text for text in sentences if read[text][1][places[0]] and _is_of(side, text, says=False)]
        found[label] = tuple(said), tuple(denied)
    return found


def _is_of(side: str | None, sentence: str, *, says: bool) -> bool:
    """Whether a sentence on a finding is one on this side of it: to deny a finding is to deny both its sides."""
    if side is None:
        return True
    named = {one for one, pattern in _SIDES.items() if pattern.search(sentence.lower())}
    return side in named or (bool(_BOTH.search(sentence.lower())) if says else not named)


def evaluate_mined_prompts(context: EvaluationContext) -> Findings:
    """Zero-shot with sentences of reports, beside the fixed prompts on the same labels."""
    held_out, settings = context.held_out, context.settings
    studies = context.test_studies(image=True, label=True)
    mining = np.flatnonzero(held_out.is_probe_train & held_out.has_text)
    texts = [context.vocabulary.decode(ids.tolist()) for ids in held_out.words_of(mining)] if len(mining) else []
    prompts = mined(held_out.label_names, sentences_of(texts))
    enough = {label: pair for label, pair in prompts.items() if min(map(len, pair)) >= MIN_SENTENCES}
    if not enough:
        raise NotEvaluableError(
            f"not enough data: no label has {MIN_SENTENCES} sentences that say it and {MIN_SENTENCES} that deny it in the "
            f"{len(mining)} reports that may be read"
        )
    labels = held_out.labels_of(studies)
    scores, fixed = (
        _scores(context, studies, wanted)
        for wanted in (_some(enough, settings.seed), prompts_for(list(enough), context.prompts))
    )
    report = score_report(
        labels,
        scores,
        held_out.patient[studies],
        label_names=held_out.label_names,
        seed=settings.seed,
        num_bootstrap=settings.num_bootstrap,
    )
    report |= _gain(labels, scores, fixed, _weights(context, studies))
    return Findings(
        report
        | {
            "num_train": 0,
            "num_reports": len(mining),
            "num_sentences": {name: {"positive": len(said), "negative": len(no)} for name, (said, no) in prompts.items()},
            "not_asked": {name: _reason(name, prompts) for name in held_out.label_names if name not in enough},
        }
    )


def _some(prompts: Prompts, seed: int) -> Prompts:
    """At most MAX_SENTENCES a side."""
    return {
        label: (_drawn(said, random_for(seed, f"says {label}")), _drawn(denied, random_for(seed, f"denies {label}")))
        for label, (said, denied) in prompts.items()
    }


def _drawn(sentences: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(sentences[place] for place in rng.permutation(len(sentences))[:MAX_SENTENCES])


def _scores(context: EvaluationContext, studies: NDArray[np.int64], prompts: Prompts) -> NDArray[np.float64]:
    """Scores [n, K] of all labels, NaN in the columns of those without prompts."""
    most, names = context.settings.max_prompt_words, context.held_out.label_names
    found = zero_shot_scores(context.encoder, context.image_embeddings(studies), prompts, context.vocabulary, max_words=most)
    scores = np.full((len(studies), len(names)), np.nan)
    scores[:, [names.index(label) for label in prompts]] = found
    return scores


def _weights(context: EvaluationContext, studies: NDArray[np.int64]) -> NDArray[np.float64]:
    rng = random_for(context.settings.seed, "classification bootstrap")
    return metrics.patient_weights(context.held_out.patient[studies], context.settings.num_bootstrap, rng)


def _gain(
    labels: NDArray[np.int8], scores: NDArray[np.float64], fixed: NDArray[np.float64], weights: NDArray[np.float64]
) -> Report:
    """What the fixed prompts reach on the same labels, and what mined ones gain over them."""
    ours, theirs = metrics.auroc(labels, scores).macro, metrics.auroc(labels, fixed).macro
    if ours is None or theirs is None:
        return {"fixed_prompts": None, "gain_over_fixed": None, "gain_over_fixed_ci95": None}
    resampled = [metrics.resampled_macro_auroc(labels, of, weights) for of in (scores, fixed)]
    gain: Report = {"fixed_prompts": theirs, "gain_over_fixed": ours - theirs}
    return gain | metrics.interval(resampled[0] - resampled[1], "gain_over_fixed_ci95")


def _reason(label: str, prompts: Prompts) -> str:
    if label not in prompts:
        return "the rule labeller knows no finding, or more than one, by this name"
    said, denied = map(len, prompts[label])
    return f"not enough data: {said} sentences say it and {denied} deny it, at least {MIN_SENTENCES} of each are needed"
