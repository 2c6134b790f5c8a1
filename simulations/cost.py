"""What an optimiser step costs: CPU seconds in one thread, measured alone, so that methods can be set side by side.

The seconds that sites take during a study say little: other work shares the machine. A step's CPU time moves far less.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch

from fedmix import config
from fedmix.data.loading import Sampler, sampler_of
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.federation import local
from fedmix.federation.microbatch import parts_of
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner
from fedmix.report.study import step_key
from server import held_out as central
from simulations.partition import prepare_sites

NUM_STEPS, NUM_WARM = 12, 3  # the first steps allocate


def step_costs(experiments: Iterable[config.Experiment]) -> dict[str, float]:
    """Median CPU seconds of a step for every kind of step that the experiments' sites take, by ``step_key``."""
    found: dict[str, float] = {}
    for experiment in experiments:
        for stage in experiment.stages:
            for site in config.sites_of(stage, experiment.data.sites):
                key = step_key(experiment, stage, site.stream)
                if key not in found:
                    found[key] = _measure(experiment, stage, site)
    return found


def _measure(experiment: config.Experiment, stage: config.Stage, site: config.Site) -> float:
    """Train a few steps on a few of the site's studies."""
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    short = stage.model_copy(update={"rounds": 1, "local_steps": NUM_STEPS})
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fedmix-cost-") as folder:
            marks: list[float] = []
            local.train(
                learner(experiment, stage, tokenizer),
                batches(experiment, stage, site, tokenizer, Path(folder)),
                local.Assignment(site.name, short, 0, experiment.seed),
                precision=experiment.federation.precision,
                parts=parts_of(experiment.federation),
                on_step=lambda step: marks.append(time.process_time()),
            )
    finally:
        torch.set_num_threads(num_threads)
    return median(after - before for before, after in zip(marks[NUM_WARM:], marks[NUM_WARM + 1 :], strict=False))


def learner(experiment: config.Experiment, stage: config.Stage, tokenizer: Tokenizer) -> Learner:
    """The untrained model of an experiment with a stage's objectives."""
    word_ids = WordIds.of(tokenizer)
    return Learner(central.random_model(experiment, tokenizer), stage.objectives, word_ids)


def batches(
    experiment: config.Experiment, stage: config.Stage, site: config.Site, tokenizer: Tokenizer, folder: Path
) -> Sampler:
    """Batches of the stage's size; of a phantom site a few studies, drawn apart from the study's own."""
    phantom = site.phantom
    if phantom is not None:
        phantom = phantom.model_copy(update={"studies": min(phantom.studies, 4 * stage.batch_size)})
    few = site.model_copy(update={"phantom": phantom})
    data = experiment.data.model_copy(update={"sites": (few,), "cache": folder})
    shard = Shard.open(prepare_sites(data, tokenizer)[site.name])
    rows = shard.select("train", site.stream)
    return sampler_of(stage, shard, rows, seed=0, tokenizer=tokenizer)
