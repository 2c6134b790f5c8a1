"""What a stage trains: its losses, its changes to images, its optimisers at the site and at the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmix.config.base import BelowOne, Count, Fraction, Name, OpenFraction, Positive, Section, StreamName
from fedmix.config.data import Site

COMPARING = ("contrast", "match", "semantic", "local")  # losses that compare studies with each other
WEIGHTS = ("mvm", "mlm", "anchor", *COMPARING)  # all losses that a stage may add up


class Objectives(Section):
    """Which losses a stage uses, at what weight, and how much they hide. A weight of 0 turns a loss off."""

    mvm: float = Field(default=1.0, ge=0.0, description="weight of masked vision modelling")
    mlm: float = Field(default=0.3, ge=0.0, description="weight of masked language modelling")
    contrast: float = Field(default=0.0, ge=0.0, description="weight of image-text contrast on pairs")
    match: float = Field(default=0.0, ge=0.0, description="weight of image-text matching on pairs")
    anchor: float = Field(
        default=0.0, ge=0.0, description="weight of the cosine distance to the features of the round's start; .1 to 1"
    )
    semantic: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of contrast by findings: any image of the batch with any report of it (MedCLIP, 2210.10163)",
    )
    local: float = Field(
        default=0.0, ge=0.0, description="weight of contrast between sentences and patches (GLoRIA; LoVT, 2112.02889)"
    )
    joint_share: Fraction = Field(default=0.0, description="share of the pairs of a batch also read as one joint sequence")
    hide_image_alone: OpenFraction = 0.70
    hide_image_paired: OpenFraction = 0.40
    hide_image_joint: OpenFraction = 0.75
    hide_text_alone: OpenFraction = 0.25
    hide_text_paired: OpenFraction = 0.15
    hide_text_joint: OpenFraction = 0.50
    joint_masking: Literal["both", "one_at_a_time"] = Field(
        default="both",
        description="both sides of a joint sequence partly hidden, or half of the pairs with whole reports and half with whole "
        "images (MaskVLM, 2208.02131)",
    )
    match_negatives: Literal["shifted", "hard"] = Field(
        default="shifted",
        description="mismatched reports of matching: the neighbour's, or one of the batch drawn by how well contrast thinks it "
        "fits (ALBEF, 2107.07651)",
    )
    label_smoothing: Fraction = Field(default=0.0, description="of the contrastive targets, over all reports alike")
    soft_targets: Fraction = Field(
        default=0.0,
        description="share of the contrastive targets that reports alike to the round-start model have among them; .1 to .3",
    )
    soft_temperature: Positive = Field(
        default=0.1, description="of the likeness of reports, and of findings in semantic; lower is more selective"
    )
    same_patient: Literal["negative", "left_out"] = Field(
        default="negative", description="whether another study of the same patient is a negative of contrast or not compared"
    )
    queue: int = Field(
        default=0, ge=0, description="pairs of the round's earlier steps kept as further negatives of contrast; 0 is none"
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Objectives:
        if not any(getattr(self, name) for name in WEIGHTS if name != "anchor"):
            raise ValueError("every objective has weight 0; give at least one a positive weight")
        if self.match > 0 and self.joint_share == 0:
            raise ValueError("match reads image and report as one sequence: set joint_share above 0")
        if self.match > 0 and self.match_negatives == "hard" and self.contrast == 0:
            raise ValueError("match_negatives = hard draws reports by contrast's similarity: give contrast a positive weight")
        if self.queue and self.same_patient == "negative":
            raise ValueError("a queue may hold an earlier reading of the same pair: set same_patient = left_out beside it")
        if self.label_smoothing and (self.soft_targets or self.same_patient == "left_out"):
            raise ValueError("label_smoothing gives every report a share, also those left out or unlike; set it to 0 here")
        return self


class Augment(Section):
    """How a stage's training images are changed at random (fedmix/data/augmentation.py); by default not at all."""

    smallest_crop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="smallest share of an image's area that a random square crop keeps; 1 never crops"
    )
    rotation_deg: float = Field(default=0.0, ge=0.0, le=45.0, description="largest angle, either way")
    gamma: float = Field(default=0.0, ge=0.0, le=4.0, description="exponents of grey values from 1 / (1 + gamma) to 1 + gamma")
    gain: BelowOne = Field(default=0.0, description="grey values are multiplied by 1 - gain to 1 + gain")
    offset: BelowOne = Field(default=0.0, description="grey values of 0..1 are moved by up to this, either way")
    mirror: Fraction = Field(
        default=0.0,
        description="chance of left and right being swapped; leave it 0 where sides matter: the heart is on the left, and "
        "reports say left and right",
    )

    @property
    def moves(self) -> bool:
        """Whether pixels change places."""
        return self.smallest_crop < 1.0 or self.rotation_deg > 0.0 or self.mirror > 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self.moves or max(self.gamma, self.gain, self.offset) > 0.0


class Optimiser(Section):
    """A site's optimiser during one stage."""

    kind: Literal["muon", "adamw"] = Field(
        default="muon", description="Muon on the block matrices and AdamW elsewhere, or AdamW alone"
    )
    lr: Positive = Field(default=2e-3, description="AdamW's learning rate at its peak")
    muon_lr: Positive = Field(default=1e-2, description="Muon's learning rate at its peak")
    weight_decay: float = Field(default=0.05, ge=0.0)
    clip_norm: Positive = Field(default=1.0, description="of the whole gradient, before the step")
    warmup: Fraction = Field(default=0.05, description="share of the stage's steps")
    final_lr: Fraction = Field(default=0.05, description="share of the peak left at the end of the cosine")
    keep_state: bool = Field(default=True, description="moments survive from round to round within a stage")
    second_moment: Literal["own", "aggregated"] = Field(
        default="own",
        description="AdamW's v at the start of a round: as this site left it, or the sites' mean, one number a parameter "
        "(FedAdamW, 2510.27486)",
    )
    proximal: float = Field(
        default=0.0, ge=0.0, description="mu of FedProx (1812.06127): pull towards the round's start; 0 is none"
    )


class Outer(Section):
    """The server's optimiser of a stage; sgd with lr 1 and momentum 0 is plain averaging.

    sgd: theta <- theta - lr (D + momentum v) with Nesterov (DiLoCo, 2311.08105). adam: FedAdam (2003.00295, algorithm 2).
    """

    kind: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.0, description="of sgd; beta 1 of adam")
    nesterov: bool = True
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.99, description="of adam's second moment")
    epsilon: Positive = Field(default=1e-3, description="tau of adam; small changes are not blown up beyond lr D / tau")


class Stage(Section):
    """Some rounds in which some streams train on some objectives."""

    name: Name
    rounds: Count
    streams: Annotated[tuple[StreamName, ...], Field(min_length=1)] = ("image", "text", "paired")
    sites: tuple[Name, ...] | None = Field(default=None, description="names; null takes every site of the streams")
    local_steps: Count = Field(default=60, description="optimiser steps a site takes in a round (H)")
    batch_size: Count = 24
    objectives: Objectives = Objectives()
    augment: Augment = Augment()
    optimiser: Optimiser = Optimiser()
    outer: Outer = Outer()


def sites_of(stage: Stage, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that take part in a stage: of its streams and, if it names some, among those."""
    return tuple(site for site in sites if site.stream in stage.streams and (stage.sites is None or site.name in stage.sites))
