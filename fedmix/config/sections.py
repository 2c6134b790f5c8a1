"""Which keys an experiment has, what each may hold, and what decides its weights (the fingerprint).

The JSON Schema is made from these models, so that editors complete and check the YAML.
Defaults are sizes and schedules that learnt something in minutes on two cores, unless a comment says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from fedmix.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
StreamName = Literal["image", "text", "paired"]


class Section(BaseModel):
    """A part of an experiment: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class PhantomData(Section):
    """Studies drawn from the phantom generator (fedmix/data/phantom.py)."""

    studies: Count
    look: Name = Field(description="appearance, phrasing and prevalence habits; `fedmix phantom --looks` lists them")
    seed: int = Field(default=0, ge=0, description="draws of different seeds share no study")
    difficulty: float = Field(default=1.0, gt=0.0, le=3.0, description="more anatomical variation, fainter findings")
    contrast: float = Field(default=1.0, gt=0.0, le=3.0, description="how strongly findings show")


class Site(Section):
    """One institute and the kind of data it holds."""

    name: Name
    stream: StreamName
    phantom: PhantomData | None = None
    shard: Path | None = Field(default=None, description="folder written by `fedmix prepare`")

    @model_validator(mode="after")
    def _one_source(self) -> Site:
        if (self.phantom is None) == (self.shard is None):
            raise ValueError("give a site either phantom or shard, not both and not neither")
        return self


class HeldOut(Section):
    """The central evaluation set, which no site ever holds."""

    phantom: PhantomData | None = None
    shards: tuple[Path, ...] = ()
    public: bool = Field(
        default=False, description="pictures and report texts of the held-out studies may be shown in the report"
    )
    probe_studies: Count = Field(default=1000, description="studies that train the linear probe; the rest are the test set")

    @model_validator(mode="after")
    def _one_source(self) -> HeldOut:
        if (self.phantom is None) == (not self.shards):
            raise ValueError("give held_out either phantom or shards, not both and not neither")
        return self


class Data(Section):
    """Sites, held-out set, and how a study becomes numbers."""

    image_size: Count = Field(default=48, description="pixels a side")
    max_words: int = Field(default=64, ge=4, le=512, description="token ids a report, the summary token included")
    tokenizer: Path | None = Field(default=None, description="a Hugging Face tokenizer folder; null is the shipped WordPiece")
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    held_out: HeldOut
    cache: Path = Field(default=Path("runs/.phantoms"), description="where drawn phantoms are kept between runs")

    @model_validator(mode="after")
    def _unique_names(self) -> Data:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("site names must differ from each other")
        return self


# ViT-Ti, S and B (2012.12877, table 1) at patch 16, for 224 px and up. Decoders stay light, at four of MAE's eight blocks and
# at most its 512 wide (2111.06377, table 1); CLIP's ViT-B embeds in 512.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "patch_size": 16, "width": 192, "depth": 12, "num_heads": 3,
        "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4, "embedding": 128,
    },
    "small": {
        "patch_size": 16, "width": 384, "depth": 12, "num_heads": 6,
        "decoder_width": 256, "decoder_depth": 4, "decoder_heads": 8, "embedding": 256,
    },
    "base": {
        "patch_size": 16, "width": 768, "depth": 12, "num_heads": 12,
        "decoder_width": 512, "decoder_depth": 4, "decoder_heads": 16, "embedding": 512,
    },
}  # fmt: skip


class WarmStart(Section):
    """Local files that the server's initial model starts from (fedmix/model/pretrained.py); sites read none of them."""

    image: Path | None = Field(
        default=None, description="a ViT or MAE as .safetensors, or a folder that holds it as model.safetensors"
    )
    text: Path | None = Field(
        default=None, description="a BERT's folder with config.json, model.safetensors and tokenizer.json"
    )
    model: Path | None = Field(
        default=None, description="a fedmix model folder such as runs/demo/model, of these sizes and vocabulary; taken whole"
    )

    @model_validator(mode="after")
    def _something_to_read(self) -> WarmStart:
        if self.model is None and self.image is None and self.text is None:
            raise ValueError(
                "give warm_start an image file, a text folder, or both, or else a model folder; null starts at random"
            )
        if self.model is not None and (self.image is not None or self.text is not None):
            raise ValueError("warm_start.model replaces every parameter; give it alone, or image and text without it")
        return self


class Model(Section):
    """Sizes of the shared transformer (fedmix/model/encoder.py)."""

    size: Literal["tiny", "small", "base"] | None = Field(
        default=None, description="ViT-Ti, S or B with patch 16; keys given beside it override. Null takes the defaults below"
    )
    patch_size: Annotated[int, Field(ge=4, multiple_of=4)] = Field(
        default=8, description="pixels a side; the coarsest scale averages 4"
    )
    vision_target: Literal["multi_scale", "single_scale", "norm_pix"] = Field(
        default="multi_scale",
        description="what hidden patches are predicted as: Laplacian pyramid, raw pixels, or MAE's normalised pixels",
    )
    width: Count = 96
    depth: Count = 4
    num_heads: Count = 4
    mlp_ratio: Positive = 4.0
    modality_experts: bool = Field(
        default=True, description="separate FFN and LayerNorm for image and text (VLMo); false shares them"
    )
    pair_experts: int = Field(
        default=0,
        ge=0,
        description="last blocks with an FFN and LayerNorm of their own for joint sequences of pairs (VLMo, 2111.02358); only "
        "sites with pairs train and receive them",
    )
    decoder_width: Count = 64
    decoder_depth: Count = 1
    decoder_heads: Count = 4
    embedding: Count = Field(default=64, description="size of the contrastive embedding")
    contrast_form: Literal["softmax", "sigmoid", "margin"] = Field(
        default="softmax",
        description="contrast as one choice among the batch (CLIP), a yes or no for each two with a learned bias (SigLIP), or "
        "cosines that differ by a margin (multi-margin loss)",
    )
    warm_start: WarmStart | None = Field(
        default=None, description="null starts at random; not in the fingerprint, manifest.json has the files' hashes"
    )

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        """Fill what ``size`` stands for in under the keys that are given."""
        size = values.get("size") if isinstance(values, dict) else None
        return SIZES[size] | values if isinstance(size, str) and size in SIZES else values

    @model_validator(mode="after")
    def _pair_experts_fit(self) -> Model:
        if self.pair_experts > self.depth:
            raise ValueError(f"pair_experts = {self.pair_experts} is more than the {self.depth} blocks of depth")
        if self.pair_experts and not self.modality_experts:
            raise ValueError(
                "pair_experts stand beside those of image and text: set modality_experts to true, or pair_experts to 0"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        for width, heads, name in (
            (self.width, self.num_heads, "width"),
            (self.decoder_width, self.decoder_heads, "decoder_width"),
        ):
            if width % heads or width % 4:
                raise ValueError(f"{name} = {width} must be a multiple of its number of heads ({heads}) and of 4")
        return self


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


class StreamMix(Section):
    """Fixed weights of the streams on the shared part of the trunk, renormalised over the streams present."""

    image: Fraction = 0.35
    text: Fraction = 0.25
    paired: Fraction = 0.40


class Aggregation(Section):
    """How the server adds the sites' updates up (fedmix/federation/aggregate.py)."""

    rule: Literal["modality_aware", "fedavg_all", "paired_only", "modality_exact", "fedcola"] = Field(
        default="modality_aware", description="whose update weighs how much in a parameter group"
    )
    shared_mix: StreamMix = StreamMix()
    count_exponent: Fraction = Field(default=1.0, description="a in n^a: 1 weighs by examples, 0 counts sites alike")
    combine: Literal["mean", "median", "trimmed_mean"] = Field(
        default="mean", description="weighted mean, or a coordinate-wise rule that a wrong site sways less"
    )
    trim: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        default=0.2, description="share of the sites that trimmed_mean leaves out at either end; it needs five sites"
    )
    clip: Positive | None = Field(
        default=3.0, description="longest update of a group, in medians of the round's; needs three sites, null never clips"
    )
    normalise_steps: bool = Field(
        default=True, description="divide by the steps taken where sites' steps differ by over a fifth (FedNova, 2007.07481)"
    )


class StreamCounts(Section):
    """A number of sites for each stream."""

    image: int = Field(default=0, ge=0)
    text: int = Field(default=0, ge=0)
    paired: int = Field(default=0, ge=0)


class Wire(Section):
    """How updates travel from a site to the server (fedmix/federation/compression.py)."""

    coding: Literal["float32", "float16", "int8", "int4"] = Field(
        default="float32", description="int8 and int4 have one scale a row and round stochastically"
    )
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="share of each row that is sent, its largest entries (top-k); 1 sends all"
    )
    error_feedback: bool = Field(
        default=True, description="what coding lost is added to the site's next update (1901.09847); it stays at the site"
    )


class Screening(Section):
    """What the server refuses (fedmix/federation/screening.py)."""

    norm_bound: Positive = Field(
        default=10.0, description="longest update of a group, in running medians of those taken before"
    )
    window: Count = Field(default=20, description="norms that a running median remembers")
    max_strikes: Count = Field(default=3, description="refused updates after which a site is not asked again in this run")


class Federation(Section):
    """Rounds on the wire and on this machine."""

    threads_per_site: Count = Field(
        default=1, description="torch threads of a site's job; part of the result, so a value and not a guess"
    )
    processes_per_site: Count = Field(
        default=1,
        description="processes that share each of a site's batches, with threads_per_site each; the order of sums changes, so "
        "the last bits of the result do",
    )
    micro_batch: Count | None = Field(
        default=None,
        description="sequences that a step computes at a time, for less memory; the gradient is the whole batch's up to the "
        "order of sums. Null is all at once",
    )
    checkpoint_activations: bool = Field(
        default=False, description="blocks are computed again in the backward pass: less memory, more work, the same bits"
    )
    workers: int = Field(default=0, ge=0, description="worker processes of the in-process engine; 0 is one per core")
    deadline_s: Positive = Field(default=3600.0, description="a site that has not replied by then is dropped for the round")
    slowest_link_mbit_s: Positive = Field(
        default=2.0, description="of a site's link; the deadline grows by the time that its order and update may take over it"
    )
    participation: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="share of each stream's sites asked in a round, at least one; drawn by the seed"
    )
    min_sites: Count = Field(default=1, description="replies without which a round is a failure")
    min_sites_of_stream: StreamCounts = Field(
        default=StreamCounts(), description="the same for a stream that takes part in the stage"
    )
    max_failed_rounds: Count = Field(default=3, description="failed rounds in a row after which the run stops")
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="where a site trains; not in the fingerprint, so that each site may set its own"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="autocast of the trunk; losses stay float32"
    )


class Privacy(Section):
    """Differential privacy (fedmix/privacy/): of patients (limits: dpsgd.py), or of whole sites (limits: updates.py)."""

    mode: Literal["none", "dp", "noisy_updates", "central_noise"] = Field(
        default="none",
        description="dp is DP-SGD at the sites with patients as the unit. With a whole site as the unit, noisy_updates cuts "
        "and noises an update before it leaves, and central_noise noises the mean of cut updates at a server that sites trust",
    )
    epsilon: Positive | None = Field(
        default=None,
        description="most that a site's ledger may reach, over all rounds and runs that it holds (of central_noise the run's "
        "own); a round that would pass it is refused. Null sets no limit",
    )
    delta: OpenFraction = Field(default=1e-5, description="must be below 1 over a site's patients")
    noise_multiplier: Positive | None = Field(
        default=None, description="sigma, noise over clip; null takes the least with which all planned rounds fit into epsilon"
    )
    clip: Positive = Field(
        default=1.0,
        description="longest gradient of one patient in one step; where sites are the unit, longest update of a group",
    )
    studies_per_patient: Count = Field(
        default=4, description="at most so many of a patient's studies, drawn at random, make its gradient in one step"
    )
    trainable: Literal["all", "heads", "adapters"] = Field(
        default="all",
        description="what is trained, in every mode: everything; decoder, word head and last norms on a trunk that stays; or "
        "low-rank adapters of the trunk alone (fedmix/model/adapters.py)",
    )
    adapter_rank: Count = Field(default=4, description="rank of the adapters' change of each matrix, where these are trained")

    @model_validator(mode="after")
    def _noise_is_known(self) -> Privacy:
        if self.mode != "none" and self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(f"mode = {self.mode} needs a budget epsilon, a noise_multiplier, or both")
        if self.model_fields_set and "mode" not in self.model_fields_set:  # said outright, none may stand beside values
            raise ValueError("privacy is described without its mode, and nothing would be protected; set mode to dp")
        return self

    @property
    def is_counted_by_sites(self) -> bool:
        """Whether each site keeps a ledger of what is spent and tells it with its update."""
        return self.mode in ("dp", "noisy_updates")


class SecureSum(Section):
    """The server learns sums of the sites' updates and no site's own (fedmix/federation/secure_sum.py).

    A site's update cannot be screened then: its clip, and the policy of the hospital it leaves, are what bounds it.
    """

    threshold: Annotated[int, Field(ge=2)] = Field(
        description="sites without which a tower's sum is not revealed; more than half of a stage's sites"
    )
    clip: Positive = Field(default=1.0, description="largest change of one parameter in a round; larger ones are cut to it")
    bits: Annotated[int, Field(ge=8, le=24)] = Field(
        default=24, description="of a change from -clip to clip; it travels in 32, so that sums do not overflow"
    )


class Evaluation(Section):
    """Central evaluation on the held-out set."""

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


class Experiment(Section):
    """Everything that decides a run's weights and report."""

    name: Name
    seed: int = Field(default=0, ge=0)
    data: Data
    model: Model = Model()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    aggregation: Aggregation = Aggregation()
    wire: Wire = Wire()
    screening: Screening = Screening()
    federation: Federation = Federation()
    privacy: Privacy = Privacy()
    attack: Attack | None = Field(default=None, description="a site that lies; no plan for real sites may hold one")
    secure_sum: SecureSum | None = Field(default=None, description="null sends each site's update as it is")
    evaluation: Evaluation = Evaluation()
    baselines: dict[Name, dict[str, JsonValue]] = Field(
        default={},
        description="name -> overrides of this experiment; random_init evaluates the untrained model, public_init what "
        "warm_start names",
    )
    study: Study | None = Field(default=None, description="repeats over seeds and regimes; null is one run")

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        size, patch = self.data.image_size, self.model.patch_size
        if size % patch or size < 2 * patch:
            raise ValueError(f"data.image_size = {size} must be twice model.patch_size = {patch}, or a larger multiple of it")
        for stage in self.stages:
            _check_stage(stage, self)
        if self.privacy.mode == "dp":
            _check_private(self)
        if self.privacy.mode in ("noisy_updates", "central_noise"):
            _check_whole_updates(self)
        if self.privacy.trainable != "all":
            _check_narrowed(self)
        if self.attack is not None:
            _check_attack(self.attack, self)
        if self.secure_sum is not None:
            _check_secure_sum(self, self.secure_sum)
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stage names must differ from each other")
        return self

    @property
    def num_rounds(self) -> int:
        """Rounds of all stages together."""
        return sum(stage.rounds for stage in self.stages)

    def stage_of(self, round_number: int) -> tuple[Stage, int]:
        """The stage that a round (counted from 1) belongs to, and the number of the stage's rounds before it."""
        if round_number < 1:
            raise ConfigError(f"round {round_number} does not exist; rounds count from 1")
        before = 0
        for stage in self.stages:
            if round_number <= before + stage.rounds:
                return stage, round_number - before - 1
            before += stage.rounds
        raise ConfigError(f"round {round_number} is past the last stage; the stages have {self.num_rounds} rounds")

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The objectives that some site of some stage trains, by name."""
        reach = {"mvm": {"image", "paired"}, "mlm": {"text", "paired"}}
        reach |= {name: {"paired"} for name in COMPARING}
        found = set()
        for stage in self.stages:
            streams = {site.stream for site in sites_of(stage, self.data.sites)}
            found |= {name for name, reached in reach.items() if getattr(stage.objectives, name) and streams & reached}
        return tuple(name for name in reach if name in found)

    def to_yaml(self) -> str:
        """The resolved experiment, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def fingerprint(self) -> str:
        """SHA-256 of the resolved values that decide the weights.

        Where a file lies and how many workers compute on it changes nothing, so shard paths, the cache and the number
        of workers are left out: a hospital's path differs from the server's. Processes that share a batch, micro-batches and
        threads add the same numbers in another order, which changes the last bits: they are in.
        """
        values = self.model_dump(mode="json", exclude={"baselines": True, "evaluation": True, "name": True, "study": True})
        if self.privacy.mode == "none":  # as before there was a choice
            values.pop("privacy")
            if self.privacy.trainable != "all":
                values["privacy"] = self.privacy.model_dump(mode="json", include={"trainable", "adapter_rank"})
        if self.attack is None:
            values.pop("attack")
        if self.secure_sum is None:
            values.pop("secure_sum")
        values["model"].pop("size")  # the sizes it stands for are there
        values["model"].pop("warm_start")  # manifest.json has the files' hashes instead (server/store.py)
        values["data"].pop("cache")
        values["data"].pop("held_out")
        for site in values["data"]["sites"]:
            site.pop("shard")
        for stage in values["stages"]:  # as before there were these
            for name in ("semantic", "local"):
                if not stage["objectives"][name]:
                    stage["objectives"].pop(name)
        for key in (
            "workers",
            "device",
            "deadline_s",
            "slowest_link_mbit_s",
            "max_failed_rounds",
            "min_sites",
            "min_sites_of_stream",
            "checkpoint_activations",
        ):
            values["federation"].pop(key)
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sites_of(stage: Stage, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that take part in a stage: of its streams and, if it names some, among those."""
    return tuple(site for site in sites if site.stream in stage.streams and (stage.sites is None or site.name in stage.sites))


def _check_stage(stage: Stage, experiment: Experiment) -> None:
    """Raise ValueError where a stage would fail only after the run has begun: nobody to train, nothing to learn or count."""
    unknown = set(stage.sites or ()) - {site.name for site in experiment.data.sites}
    if unknown:
        raise ValueError(f"stage {stage.name!r} names sites that data.sites does not hold: {sorted(unknown)}")
    sites = sites_of(stage, experiment.data.sites)
    if not sites:
        raise ValueError(f"stage {stage.name!r} has no site: none of data.sites holds one of its streams {list(stage.streams)}")
    streams = {site.stream for site in sites}
    for stream, weight in (("image", "mvm"), ("text", "mlm")):
        if stream in streams and not getattr(stage.objectives, weight):
            raise ValueError(
                f"stage {stage.name!r}: its {stream} sites have nothing to learn; give objectives.{weight} a positive weight, "
                f"or take {stream!r} out of its streams"
            )
    if stage.batch_size < experiment.federation.processes_per_site:
        raise ValueError(
            f"stage {stage.name!r}: a batch of {stage.batch_size} leaves some of federation.processes_per_site = "
            f"{experiment.federation.processes_per_site} with nothing to do; raise batch_size or lower the number of processes"
        )
    objectives, form = stage.objectives, experiment.model.contrast_form
    if form != "softmax" and objectives.queue:
        raise ValueError(
            f"stage {stage.name!r}: a queue adds to softmax's denominator, and model.contrast_form = {form} has none; "
            "set queue to 0"
        )
    if form != "softmax" and (objectives.soft_targets or objectives.label_smoothing):
        raise ValueError(
            f"stage {stage.name!r}: soft_targets and label_smoothing share one choice out among reports, and "
            f"model.contrast_form = {form} makes none; set them to 0"
        )
    federation = experiment.federation
    if (objectives.semantic or objectives.local) and (federation.micro_batch or federation.processes_per_site > 1):
        raise ValueError(
            f"stage {stage.name!r}: semantic and local compare a whole batch at once; set federation.micro_batch to null and "
            "processes_per_site to 1"
        )
    aggregation = experiment.aggregation
    if aggregation.rule == "paired_only" and "paired" not in streams:
        raise ValueError(f"stage {stage.name!r} has no paired site, and aggregation.rule = paired_only counts no other")
    if aggregation.rule == "modality_aware" and not any(getattr(aggregation.shared_mix, stream) for stream in streams):
        raise ValueError(f"stage {stage.name!r}: aggregation.shared_mix is 0 for all of its streams {sorted(streams)}")


def _check_narrowed(experiment: Experiment) -> None:
    """Raise ValueError where a part of the model cannot be trained for itself."""
    if experiment.federation.processes_per_site > 1:
        raise ValueError("processes that share a batch train the whole model; set federation.processes_per_site to 1")
    if experiment.privacy.trainable == "adapters" and any(
        stage.optimiser.second_moment == "aggregated" for stage in experiment.stages
    ):
        raise ValueError("adapters stay at their site, and so do their moments; set optimiser.second_moment to own")


def _check_whole_updates(experiment: Experiment) -> None:
    """Raise ValueError where something would leave, or sway the sum, that noise on whole updates does not cover."""
    mode, aggregation = experiment.privacy.mode, experiment.aggregation
    if any(stage.optimiser.second_moment == "aggregated" for stage in experiment.stages):
        raise ValueError(f"privacy.mode = {mode} noises updates and not second moments; set optimiser.second_moment to own")
    if mode == "central_noise" and (aggregation.combine != "mean" or aggregation.clip is not None):
        raise ValueError(
            "privacy.mode = central_noise knows how far one site can move a mean of updates that it cut itself; set "
            "aggregation.combine to mean and aggregation.clip to null"
        )


def _check_attack(attack: Attack, experiment: Experiment) -> None:
    """Raise ValueError for an attack that could not be carried out."""
    site = next((site for site in experiment.data.sites if site.name == attack.site), None)
    if site is None:
        raise ValueError(f"attack.site = {attack.site!r} is none of data.sites")
    if attack.kind == "bad_match" and (site.stream != "paired" or site.phantom is None):
        raise ValueError(f"attack.kind = bad_match marks drawn pairs, and site {site.name!r} has none; name one that does")
    if attack.kind != "bad_match" and (experiment.wire.coding != "float32" or experiment.wire.keep < 1.0):
        raise ValueError(f"attack.kind = {attack.kind} changes updates as they are; set wire.coding to float32 and keep to 1")


def _check_private(experiment: Experiment) -> None:
    """Raise ValueError where differential privacy of patients was asked for together with what it cannot cover."""
    for stage in experiment.stages:
        objectives = stage.objectives
        if any(getattr(objectives, name) for name in COMPARING):
            raise ValueError(
                f"stage {stage.name!r}: {', '.join(COMPARING)} compare studies of different patients, so no patient has a "
                "gradient of its own to clip; under privacy.mode = dp set all of them to 0"
            )
        if objectives.joint_masking != "both":
            raise ValueError(
                f"stage {stage.name!r}: joint_masking = one_at_a_time shares a batch's pairs out between two ways, so what one "
                "patient teaches depends on the others; under privacy.mode = dp set it to both"
            )
    if experiment.federation.processes_per_site > 1 or experiment.federation.checkpoint_activations:
        raise ValueError(
            "privacy.mode = dp computes a site's step in one process and with its activations; set "
            "federation.processes_per_site to 1 and checkpoint_activations to false, and micro_batch where memory is short"
        )


def _check_secure_sum(experiment: Experiment, settings: SecureSum) -> None:
    """Raise ValueError where a secure sum was asked for together with what needs to see each site's update."""
    aggregation, wire = experiment.aggregation, experiment.wire
    wanted = [
        ("wire.coding", wire.coding, "float32", "the sum has a coding of its own"),
        ("wire.keep", wire.keep, 1.0, "all sites add up the same parameters"),
        ("aggregation.combine", aggregation.combine, "mean", "only a sum is revealed"),
        ("aggregation.clip", aggregation.clip, None, "the server sees no site's update that it could shorten"),
    ]
    wrong = [(name, value, needed, why) for name, value, needed, why in wanted if value != needed]
    if wrong:
        name, value, needed, why = wrong[0]
        raise ValueError(
            f"secure_sum does not go with {name} = {value}, for {why}; set it to {'null' if needed is None else needed}"
        )
    if aggregation.rule in ("paired_only", "fedcola"):
        raise ValueError(
            f"secure_sum does not go with aggregation.rule = {aggregation.rule}, which gives sites of a sum no weight, and "
            "a sum of fewer sites than the threshold would be revealed; choose modality_aware, modality_exact or fedavg_all"
        )
    if experiment.privacy.mode not in ("none", "dp"):
        raise ValueError(
            f"secure_sum does not go with privacy.mode = {experiment.privacy.mode}, which treats each site's update by itself; "
            "set it to none or dp"
        )
    for stage in experiment.stages:
        _check_summed_stage(stage, experiment, settings)


def _check_summed_stage(stage: Stage, experiment: Experiment, settings: SecureSum) -> None:
    sites = sites_of(stage, experiment.data.sites)
    of_streams = Counter(site.stream for site in sites)
    asked = sum(math.ceil(experiment.federation.participation * number) for number in of_streams.values())
    if not len(sites) / 2 < settings.threshold <= asked:
        raise ValueError(
            f"stage {stage.name!r} has {len(sites)} sites, {asked} of which a round asks, so secure_sum.threshold should be "
            f"from {len(sites) // 2 + 1} to {asked}, it is {settings.threshold}: with half of the sites or fewer, one "
            "site's update could be unmasked"
        )
    if stage.optimiser.second_moment == "aggregated":
        raise ValueError(
            f"stage {stage.name!r}: secure_sum does not go with optimiser.second_moment = aggregated, which sends numbers "
            "of each site's own; set it to own"
        )
    mix, rule = experiment.aggregation.shared_mix, experiment.aggregation.rule
    silent = sorted({site.stream for site in sites if not getattr(mix, site.stream)})
    if rule == "modality_aware" and silent:
        raise ValueError(
            f"stage {stage.name!r}: aggregation.shared_mix gives {', '.join(silent)} sites no weight, and secure_sum would "
            "reveal a sum of the others alone; give them one, or leave them out of the stage"
        )
