"""Baselines that are no federation: all data in one place, and each site for itself.

What differs only by a rule or a schedule is a baseline in YAML (``baselines:`` in an experiment); these need code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmix import config
from fedmix.batch import Batch
from fedmix.data.loading import Sampler
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.federation import local
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner
from server import held_out as central
from server.store import Parameters


@dataclass(frozen=True)
class Interleaved:
    """The batches of several sites in turn, one a step: all data in one place."""

    samplers: Sequence[Sampler]

    def batch(self, step: int) -> Batch:
        """Site ``step mod number of sites``'s next batch."""
        turn, site = divmod(step, len(self.samplers))
        return self.samplers[site].batch(turn)


def centralised(experiment: config.Experiment, shards: Mapping[str, Path], tokenizer: Tokenizer) -> Parameters:
    """Pooled training on the same examples: every batch that a federation's sites would see, one after the other.

    Equal samples, but as many sequential steps as all sites together take; its lead is not the cost of federation alone.
    """
    model = central.initial_model(experiment, tokenizer)
    for stage in experiment.stages:
        sites = config.sites_of(stage, experiment.data.sites)
        samplers = [_sampler(shards[site.name], site, stage, experiment.seed) for site in sites]
        pooled = stage.model_copy(update={"rounds": 1, "local_steps": stage.rounds * stage.local_steps * len(sites)})
        local.train(
            Learner(model, stage.objectives, WordIds(tokenizer.mask_id, tuple(sorted(tokenizer.special_ids)))),
            Interleaved(samplers),
            local.Assignment("pooled", pooled, 0, experiment.seed),
            precision=experiment.federation.precision,
        )
    return central.parameters_of(model)


def _sampler(path: Path, site: config.Site, stage: config.Stage, seed: int) -> Sampler:
    shard = Shard.open(path)
    rows = shard.select("train", site.stream)
    if not len(rows):
        raise DataError(f"site {site.name} has no {site.stream} study in its training split")
    return Sampler(shard, rows, batch_size=stage.batch_size, seed=local.seed_of(seed, site.name, stage.name, "batches"))


SPECIAL: dict[str, Callable[[config.Experiment, Mapping[str, Path], Tokenizer], Parameters]] = {"centralised": centralised}
