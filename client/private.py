"""A round under differential privacy at this site: what it spends is in the site's ledger before its first step.

The ledger lies in the site's state folder, beside the folders of the runs, so it outlives them. All that is given away is in
the update (fedmix/federation/private.py) and in ``facts``, which follow from the plan and the number of patients alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client.spending import Spent, Turn
from fedmix import config
from fedmix.data.loading import PatientSampler
from fedmix.data.shard import Shard
from fedmix.errors import DataError
from fedmix.federation.private import Protection
from fedmix.privacy.accountant import Ledger, noise_for
from fedmix.privacy.dpsgd import secret_chance

LEDGER = "privacy.jsonl"  # in a site's state folder


@dataclass(frozen=True)
class SpentSteps(Spent):
    """A round whose steps are noised: its patients, and how they are protected."""

    patients: PatientSampler
    protection: Protection


def spend(turn: Turn) -> SpentSteps:
    """Write a round down in the ledger. Raises RunError where the budget, or the disk, does not allow it."""
    experiment, stage, settings = turn.experiment, turn.stage, turn.experiment.privacy
    people = {one.name: _patients(turn.shard, turn.site.stream, one, settings) for one in experiment.stages}
    patients = people[stage.name]
    if settings.delta >= 1.0 / patients.num_patients:
        raise DataError(
            f"privacy.delta = {settings.delta:g} should be below 1 over this site's patients, or it allows that one of them is "
            "given away whole; lower it"
        )
    noise = settings.noise_multiplier
    if noise is None:
        assert settings.epsilon is not None  # the config has seen to it
        stages = [one for one in experiment.stages if turn.site in config.sites_of(one, experiment.data.sites)]
        planned = tuple((people[one.name].rate, one.rounds * one.local_steps) for one in stages)
        noise = _noise(planned, settings.epsilon, settings.delta)
    ledger = Ledger(turn.state / LEDGER)
    account = turn.spend(ledger, noise_multiplier=noise, sample_rate=patients.rate, steps=stage.local_steps)
    protection = Protection(settings, noise, secret_chance(), experiment.federation.micro_batch)
    return SpentSteps(account, noise, patients.rate, patients, protection)


# Processes that serve several rounds open and look for things once.


@lru_cache(maxsize=32)
def _patients(shard_path: Path, stream: config.StreamName, stage: config.Stage, settings: config.Privacy) -> PatientSampler:
    shard = Shard.open(shard_path, verify=False)
    return PatientSampler(
        shard,
        shard.select("train", stream),
        expected=stage.batch_size,
        most_studies=settings.studies_per_patient,
        augment=stage.augment,
    )


@lru_cache(maxsize=8)
def _noise(planned: tuple[tuple[float, int], ...], epsilon: float, delta: float) -> float:
    return noise_for(planned, epsilon=epsilon, delta=delta)
