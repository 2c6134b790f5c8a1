"""What does not go together in an experiment: each check raises ValueError with a sentence that says what to change."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from fedmix.config.evaluating import Attack
from fedmix.config.protecting import SecureSum
from fedmix.config.training import COMPARING, Stage, sites_of

if TYPE_CHECKING:
    from fedmix.config.experiment import Experiment


def check_stage(stage: Stage, experiment: Experiment) -> None:
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


def check_narrowed(experiment: Experiment) -> None:
    """Raise ValueError where a part of the model cannot be trained for itself."""
    if experiment.federation.processes_per_site > 1:
        raise ValueError("processes that share a batch train the whole model; set federation.processes_per_site to 1")
    if experiment.privacy.trainable == "adapters" and any(
        stage.optimiser.second_moment == "aggregated" for stage in experiment.stages
    ):
        raise ValueError("adapters stay at their site, and so do their moments; set optimiser.second_moment to own")


def check_whole_updates(experiment: Experiment) -> None:
    """Raise ValueError where something would leave, or sway the sum, that noise on whole updates does not cover."""
    mode, aggregation = experiment.privacy.mode, experiment.aggregation
    if any(stage.optimiser.second_moment == "aggregated" for stage in experiment.stages):
        raise ValueError(f"privacy.mode = {mode} noises updates and not second moments; set optimiser.second_moment to own")
    if mode == "central_noise" and (aggregation.combine != "mean" or aggregation.clip is not None):
        raise ValueError(
            "privacy.mode = central_noise knows how far one site can move a mean of updates that it cut itself; set "
            "aggregation.combine to mean and aggregation.clip to null"
        )


def check_scores(experiment: Experiment) -> None:
    """Raise ValueError where sites were asked for exact sums over patients beside updates whose noise covers none of it."""
    if experiment.privacy.mode != "none":
        raise ValueError(
            f"evaluation.at_sites has sites send exact sums over their patients, which no noise of privacy.mode = "
            f"{experiment.privacy.mode} covers; set at_sites to false"
        )


def check_attack(attack: Attack, experiment: Experiment) -> None:
    """Raise ValueError for an attack that could not be carried out."""
    site = next((site for site in experiment.data.sites if site.name == attack.site), None)
    if site is None:
        raise ValueError(f"attack.site = {attack.site!r} is none of data.sites")
    if attack.kind == "bad_match" and (site.stream != "paired" or site.phantom is None):
        raise ValueError(f"attack.kind = bad_match marks drawn pairs, and site {site.name!r} has none; name one that does")
    if attack.kind != "bad_match" and (experiment.wire.coding != "float32" or experiment.wire.keep < 1.0):
        raise ValueError(f"attack.kind = {attack.kind} changes updates as they are; set wire.coding to float32 and keep to 1")


def check_private(experiment: Experiment) -> None:
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


def check_secure_sum(experiment: Experiment, settings: SecureSum) -> None:
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
