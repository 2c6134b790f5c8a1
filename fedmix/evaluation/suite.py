"""The whole evaluation of one encoder on the central held-out set, and a quick one for learning curves.

A task is a function from an EvaluationContext to Findings; TASKS names its place in the report. A task that this
held-out set or encoder cannot answer is left out, with the reason under "skipped". A new task is one file and one line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmix.data.phantom import PROMPTS
from fedmix.evaluation import (
    calibration,
    classification,
    exclusive,
    fine_tuning,
    label_shares,
    language,
    mined_prompts,
    prompt_tuning,
    regeneration,
    reranking,
    retrieval,
    subgroups,
    triggers,
)
from fedmix.evaluation.features import (
    Encoder,
    EvaluationContext,
    EvaluationSettings,
    Findings,
    NotEvaluableError,
    Prompts,
    Report,
    Vocabulary,
    random_for,
)
from fedmix.evaluation.held_out import HeldOut

__all__ = ["TASKS", "Evaluation", "EvaluationSettings", "HeldOut", "evaluate", "quick"]

Task = Callable[[EvaluationContext], Findings]

EXCLUSIVE = "exclusive"
TASKS: dict[str, Task] = {  # place in report.json -> evaluator
    "classification/linear_probe": classification.evaluate_linear_probe,
    "classification/few_label_probe": classification.evaluate_few_label_probe,
    "classification/label_shares": label_shares.evaluate_label_shares,
    "classification/fine_tune": fine_tuning.evaluate_fine_tuning,
    "classification/prompt_tune": prompt_tuning.evaluate_prompt_tuning,
    "classification/subgroups": subgroups.evaluate_subgroups,
    "classification/calibration": calibration.evaluate_calibration,
    "classification/raw_pixels": classification.evaluate_raw_pixels,
    "classification/few_label_raw_pixels": classification.evaluate_few_label_raw_pixels,
    "classification/zero_shot": classification.evaluate_zero_shot,
    "classification/mined_prompts": mined_prompts.evaluate_mined_prompts,
    "classification/triggers": triggers.evaluate_triggers,
    "classification/text_probe": classification.evaluate_text_probe,
    "retrieval": retrieval.evaluate_retrieval,
    "retrieval/reranked": reranking.evaluate_reranking,
    EXCLUSIVE: exclusive.evaluate_exclusive,
    "regeneration": regeneration.evaluate_regeneration,
    "language": language.evaluate_language,
}

# What runs only where there is a question: what takes longer than all the rest where a setting asks for it (re-ranking reads
# thousands of joint sequences), and findings one at a time where the set has their labels.
ASKED: dict[str, Callable[[EvaluationContext], bool]] = {
    "retrieval/reranked": lambda context: context.settings.rerank_top > 0,
    "classification/fine_tune": lambda context: context.settings.fine_tune_steps > 0,
    "classification/prompt_tune": lambda context: context.settings.prompt_tune_steps > 0,
    EXCLUSIVE: lambda context: set(exclusive.FINDINGS) <= set(context.held_out.label_names),
}

# What a task asks of a model: to have learnt one of these. A model that learnt others gets no number for it; one that learnt
# nothing at all gets one, as a floor.
ALIGNING = ("contrast", "semantic", "local")
NEEDS: dict[str, tuple[str, ...]] = {
    "classification/zero_shot": ALIGNING,
    "classification/mined_prompts": ALIGNING,
    "classification/prompt_tune": ALIGNING,
    "classification/triggers": ALIGNING,
    "retrieval": ALIGNING,
    EXCLUSIVE: ALIGNING,
    "regeneration": ("mvm",),
    "language": ("mlm",),
}


QUICK: dict[str, Callable[[EvaluationContext], float | None]] = {  # name in metrics.jsonl -> one number
    "zero_shot/macro_auroc": lambda context: classification.evaluate_zero_shot(context).values["macro_auroc"],
    "retrieval/r@10": retrieval.mean_recall_at_10,
    "regeneration/psnr_db": regeneration.mean_psnr_db,
    "language/bits_per_token": language.bits_per_token,
}


@dataclass(frozen=True)
class Evaluation:
    """What every task found, by its place in the report; ``seconds`` is the wall time of each task."""

    values: Mapping[str, Report]
    examples: Mapping[str, Any]
    skipped: Mapping[str, str]
    seconds: Mapping[str, float] = field(compare=False)

    def as_report(self) -> Report:
        """The "evaluation" branch of report.json: finite numbers, or None and a reason."""
        report: Report = {}
        for place, values in self.values.items():
            branch = report
            *above, name = place.split("/")
            for part in above:
                branch = branch.setdefault(part, {})
            branch[name] = _without_nan(values)
        return report | {"skipped": dict(self.skipped)}


def evaluate(
    encoder: Encoder,
    held_out: HeldOut,
    *,
    tokenizer: Vocabulary,
    settings: EvaluationSettings | None = None,
    prompts: Prompts = PROMPTS,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Run every task. ``prompts`` word the labels for zero-shot; a label without any is asked for by its own name.

    ``on_progress`` hears the task about to start, how many are done and how many there are, and ("done", n, n) at the end.
    """
    context = EvaluationContext(encoder, held_out, tokenizer, prompts, settings or EvaluationSettings())
    say = on_progress or (lambda task, num_done, num_tasks: None)
    values: dict[str, Report] = {}
    examples: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    seconds: dict[str, float] = {}
    tasks = {place: task for place, task in TASKS.items() if place not in ASKED or ASKED[place](context)}
    for num_done, (place, task) in enumerate(tasks.items()):
        say(place, num_done, len(tasks))
        started = time.perf_counter()
        try:
            _check_learnt(place, context.settings.trained_on)
            findings = task(context)
        except NotEvaluableError as reason:
            skipped[place] = str(reason)
            continue
        seconds[place] = time.perf_counter() - started
        values[place] = findings.values
        skipped |= {f"{place}/{part}": reason for part, reason in findings.skipped.items()}
        if findings.examples is not None:
            examples[place] = findings.examples
    say("done", len(tasks), len(tasks))
    return Evaluation(values=values, examples=examples, skipped=skipped, seconds=seconds)


def quick(
    encoder: Encoder,
    held_out: HeldOut,
    *,
    tokenizer: Vocabulary,
    prompts: Prompts = PROMPTS,
    num_studies: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """A few numbers on a fixed subset of the test studies, for learning curves; what cannot be computed is left out."""
    test = np.flatnonzero(~held_out.is_probe_train)
    chosen = np.sort(random_for(seed, "quick studies").permutation(test)[:num_studies])
    settings = EvaluationSettings(
        gallery=num_studies, num_bootstrap=0, max_images_regeneration=200, max_texts_language=300, num_examples=0, seed=seed
    )
    context = EvaluationContext(encoder, held_out.take(chosen), tokenizer, prompts, settings)
    numbers = {}
    for name, measure in QUICK.items():
        try:
            value = measure(context)
        except NotEvaluableError:
            continue
        if value is not None:
            numbers[name] = value
    return numbers


def _check_learnt(place: str, trained_on: tuple[str, ...] | None) -> None:
    """Raise NotEvaluableError for a task whose part of the model was left as it began while others were trained."""
    needed = NEEDS.get(place)
    if trained_on and needed and not set(needed) & set(trained_on):
        raise NotEvaluableError(f"the model learnt {', '.join(trained_on)}, and this needs {' or '.join(needed)}")


def _without_nan(value: Any) -> Any:
    """The same tree with None, and a reason beside it, for every number that JSON has no word for."""
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, dict):
        return value
    tree = {name: _without_nan(item) for name, item in value.items()}
    undefined = [name for name, item in value.items() if isinstance(item, float) and not math.isfinite(item)]
    return tree | {f"{name}_reason": "not a finite number" for name in undefined}
