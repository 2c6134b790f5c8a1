"""What an evaluation found, as typed values: the block ``evaluation`` of report.json.

Every block may carry more keys than the ones named here. A number that could not be computed is null, its reason beside it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Interval = tuple[float, float]


class Open(BaseModel):
    """A block that may carry more than is named here."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)


class Block(Open):
    """A part of the evaluation; for a value that is null, ``NAME_reason`` or ``reason`` says why."""

    reason: str | None = None

    def reason_for(self, name: str) -> str | None:
        """Why the value ``name`` is null, if the block says so."""
        found = (self.model_extra or {}).get(f"{name}_reason")
        return str(found) if found else self.reason


class Cases(Open):
    """Test studies with a finding, and those known to lack it."""

    positive: Count
    negative: Count


class Classifier(Block):
    """AUROC over findings: the mean over labels, its interval over patients, each label and what it rests on."""

    macro_auroc: Fraction | None = None
    ci95: Interval | None = None
    per_label: dict[str, Fraction | None] = {}
    num_per_label: dict[str, Cases] = {}
    num_train: Count | None = None
    num_test: Count | None = None


class ShareOfLabels(Classifier):
    """What learns from a share of the labels: the mean over ``draws``, each of other studies, and for all but the linear
    probe what it gains over that on the same studies.
    """

    draws: tuple[Fraction, ...] = ()
    gain_over_probe: float | None = None
    gain_over_probe_ci95: Interval | None = None


class MinedPrompts(Classifier):
    """Zero-shot in the words of reports, and what it gains over fixed prompts on the same findings."""

    num_labels_scored: Count | None = None
    num_reports: Count | None = None
    fixed_prompts: Fraction | None = None
    gain_over_fixed: float | None = None
    gain_over_fixed_ci95: Interval | None = None


class Subgroup(Classifier):
    """The probe on some of the test studies, and how far it is above (or below) the rest of them on findings of both."""

    difference: float | None = None
    difference_ci95: Interval | None = None
    num_patients: Count | None = None
    num_labels_scored: Count | None = None
    num_labels_compared: Count | None = None


class Calibration(Block):
    """Whether the probe's probabilities can be taken at their word, beside what calibrated ones and prevalence would give."""

    ece: Fraction | None = None
    ece_if_calibrated: Interval | None = None
    brier: Fraction | None = None
    brier_ci95: Interval | None = None
    brier_of_prevalence: Fraction | None = None
    num_labels_scored: Count | None = None
    num_test: Count | None = None


class Trigger(Block):
    """A mark on images that lack a finding: how many of them pass for positive then, at worst and of each finding.

    The interval of the worst allows for its having been chosen among the findings.
    """

    worst: Fraction | None = None
    worst_ci95: Interval | None = None
    worst_label: str | None = None
    rate: dict[str, Fraction | None] = {}


class Triggers(Block):
    """Marks that somebody may have planted; of unmarked images ``clean_rate`` pass."""

    clean_rate: Fraction | None = None
    patch: Trigger | None = None
    wave: Trigger | None = None


class Classification(Open):
    """Readings of the same features, and the probe on plain pixels that they have to beat."""

    linear_probe: Classifier | None = None
    label_shares: dict[str, ShareOfLabels] = {}
    subgroups: dict[str, dict[str, Subgroup]] = {}
    calibration: Calibration | None = None
    few_label_probe: Classifier | None = None
    fine_tune: dict[str, ShareOfLabels] = {}
    prompt_tune: dict[str, ShareOfLabels] = {}
    zero_shot: Classifier | None = None
    mined_prompts: MinedPrompts | None = None
    raw_pixels: Classifier | None = None
    triggers: Triggers | None = None


class Ranking(Block):
    """One direction of retrieval; recalls are fractions of the queries whose own partner is among the first k."""

    recall_1: Fraction | None = Field(default=None, alias="r@1")
    recall_5: Fraction | None = Field(default=None, alias="r@5")
    recall_10: Fraction | None = Field(default=None, alias="r@10")
    recall_10_ci95: Interval | None = Field(default=None, alias="r@10_ci95")
    gallery: Count | None = None
    num_queries: Count | None = None
    label_precision_10: Fraction | None = Field(default=None, alias="label_precision@10")
    duplicate_aware: dict[str, Fraction] = {}
    chance: dict[str, Fraction | None] = {}


class Reranked(Block):
    """One direction with the first candidates in the match head's order, and what that gains at the first place."""

    recall_1: Fraction | None = Field(default=None, alias="r@1")
    recall_5: Fraction | None = Field(default=None, alias="r@5")
    recall_10: Fraction | None = Field(default=None, alias="r@10")
    gain_1: float | None = Field(default=None, alias="gain_r@1")
    gain_1_ci95: Interval | None = Field(default=None, alias="gain_r@1_ci95")


class Reranking(Block):
    """Retrieval both ways once more: the first ``top`` candidates of each query in the match head's order."""

    image_to_text: Reranked | None = None
    text_to_image: Reranked | None = None
    top: Count | None = None
    note: str | None = None


class Retrieval(Open):
    """Retrieval both ways."""

    image_to_text: Ranking | None = None
    text_to_image: Ranking | None = None
    reranked: Reranking | None = None


class RankingByFinding(Block):
    """One direction of retrieval where a candidate of the query's finding is right: shares of the first k, and hits."""

    precision_1: Fraction | None = Field(default=None, alias="p@1")
    precision_5: Fraction | None = Field(default=None, alias="p@5")
    precision_10: Fraction | None = Field(default=None, alias="p@10")
    hits_1: Fraction | None = Field(default=None, alias="h@1")
    hits_5: Fraction | None = Field(default=None, alias="h@5")
    hits_10: Fraction | None = Field(default=None, alias="h@10")
    chance: dict[str, Fraction] = {}


class ClassAccuracy(Block):
    """How often the nearest class is the right one: over all, and within each class."""

    accuracy: Fraction | None = None
    ci95: Interval | None = None
    per_label: dict[str, Fraction] = {}
    chance: Fraction | None = None


class Exclusive(Block):
    """Pairs with one of five findings alone, ``num_each`` of each where there were as many as ``available`` says."""

    num_each: Count | None = None
    available: dict[str, Count] = {}
    image_to_text: RankingByFinding | None = None
    text_to_image: RankingByFinding | None = None
    zero_shot: ClassAccuracy | None = None


class Fidelity(Block):
    """How close a drawn image comes to the real one on the hidden patches."""

    psnr_db: float | None = None
    psnr_db_ci95: Interval | None = None
    ssim: float | None = None
    num_images: Count | None = None


class ToldFidelity(Fidelity):
    """The same with the report in view, and what the report gained on the same images and masks."""

    gain_psnr_db: float | None = None
    gain_psnr_db_ci95: Interval | None = None


class Regeneration(Fidelity):
    """Regenerated images, alone and with the report in view, beside guesses that need no model."""

    mask_ratio: Fraction | None = None
    with_report: ToldFidelity | None = None
    baselines: dict[str, Fidelity] = {}


class Words(Block):
    """How well hidden words are told: ``num_tokens`` of them in ``num_texts`` reports."""

    bits_per_token: float | None = None
    ci95: Interval | None = None
    top1: Fraction | None = None
    num_texts: Count | None = None
    num_tokens: Count | None = None


class SeeingWords(Words):
    """The same with the image in view, and the bits that it saved on the same hidden words."""

    bits_saved: float | None = None
    bits_saved_ci95: Interval | None = None


class Language(Words):
    """Hidden words, from the report alone and with the image in view, beside guesses that need no model."""

    mask_ratio: Fraction | None = None
    with_image: SeeingWords | None = None
    baselines: dict[str, Words] = {}


class Membership(Block):
    """The attack on whole patients: AUC of telling those trained on from others; half is chance."""

    auc: float | None = None
    auc_ci95: Interval | None = None
    num_members: int | None = None
    num_non_members: int | None = None


class Evaluation(Open):
    """What the central evaluation found; ``skipped`` maps the place of a part that is absent to the reason.

    ``also``: the same of further held-out sets, by their names.
    """

    classification: Classification | None = None
    retrieval: Retrieval | None = None
    exclusive: Exclusive | None = None
    regeneration: Regeneration | None = None
    language: Language | None = None
    membership: Membership | None = None
    also: dict[str, Evaluation] = {}
    skipped: dict[str, str] = {}
