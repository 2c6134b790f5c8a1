"""How updates are added up, sent, refused and asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmix.config.base import Count, Fraction, Positive, Section


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
