"""What is measured: the evaluators, an attack to measure under, and a study over seeds and regimes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from fedmix.config.base import Count, Name, OpenFraction, Positive, Section

MIN_PATIENTS = 20  # fewest held-out patients of whom a site's score leaves, unless the site's policy says otherwise


class Evaluation(Section):
    """Central evaluation on the held-out set, and the sites' own on theirs."""

    every: int = Field(default=0, ge=0, description="rounds between quick evaluations for the learning curve; 0 is none")
    gallery: Count = 500
    mask_ratio: OpenFraction = 0.75
    num_bootstrap: int = Field(default=200, ge=20)
    regeneration_images: Count = 500
    membership_patients: int = Field(
        default=0,
        ge=0,
        description="patients on either side of the membership attack that a simulation makes on every model; 0 is none, 1000 "
        "is a start. Only a simulation has the sites' patients; elsewhere `fedmix audit` at a site attacks",
    )
    rerank_top: int = Field(
        default=0,
        ge=0,
        description="candidates of each retrieval query that the match head puts in order anew, beside the plain numbers; 0 is "
        "none, 20 is a start",
    )
    fine_tune_steps: int = Field(
        default=0,
        ge=0,
        description="most steps in which the image encoder is trained end to end on each share of the probe's labels, beside "
        "the linear probe; 0 is none, 300 is a start. Seven trainings, which take minutes or on large models hours",
    )
    prompt_tune_steps: int = Field(
        default=0,
        ge=0,
        description="steps in which a few vectors before each finding's name are learnt on each share of the probe's labels, "
        "the model frozen; 0 is none, 200 is a start",
    )
    at_sites: bool = Field(
        default=False,
        description="after the last round each site scores the model on patients of its own that it never trained on, and "
        "sends sums; baselines.local_only then trains every site alone, so that the report shows what each one got",
    )


class Attack(Section):
    """One site that lies, to see what the rules of aggregation let through; in simulations alone (simulations/attacks.py)."""

    site: Name
    kind: Literal["scale", "sign_flip", "noise", "little_is_enough", "bad_match"] = Field(
        description="what becomes of the site's updates, or under bad_match of its pairs"
    )
    strength: Positive = Field(
        default=1.0,
        description="scale and sign_flip: the factor; noise: its length over the update's; little_is_enough: how many standard "
        "deviations of the others' updates it goes against their mean",
    )
    finding: Name | None = Field(default=None, description="bad_match: which the marked images are paired with reports of")
    share: OpenFraction = Field(default=0.2, description="bad_match: share of the site's studies that are marked")
    trigger: Literal["patch", "wave"] = Field(default="patch", description="bad_match: the mark")

    @model_validator(mode="after")
    def _finding_is_known(self) -> Attack:
        if (self.kind == "bad_match") != (self.finding is not None):
            raise ValueError("attack.finding is what bad_match needs, and nothing else has a use for")
        return self


class Study(Section):
    """The same experiment repeated, so that differences come with intervals: every regime with every seed."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        description="a seed moves initial weights, batches and the draws of the sites' phantoms; the held-out set stays"
    )
    regimes: Annotated[dict[Name, dict[str, JsonValue]], Field(min_length=1)] = Field(
        default={"main": {}}, description="name -> overrides of this experiment, such as fewer pairs a site"
    )
