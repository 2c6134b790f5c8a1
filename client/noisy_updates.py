"""A round whose whole update is cut and noised here before it leaves (fedmix/privacy/updates.py), and what that spends.

The ledger lies beside that of patients (client/private.py) and counts something else: rounds in which the site as a whole was
heard. A round is written down before it is computed, so a repeated one counts again, as its noise is another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from fedmix import config
from fedmix.data.shard import Shard
from fedmix.federation.noisy import noise_multiplier
from fedmix.federation.update import Update, group_of
from fedmix.privacy.accountant import Account, Entry, Ledger
from fedmix.privacy.dpsgd import secret_chance
from fedmix.privacy.updates import covered

LEDGER = "updates.jsonl"  # in a site's state folder


@dataclass(frozen=True)
class SpentUpdate:
    """A round that may begin, and what the ledger holds with it."""

    settings: config.Privacy
    noise_multiplier: float
    account: Account

    def facts(self) -> dict[str, float]:
        """What the server is told."""
        return {
            "epsilon": self.account.epsilon,
            "epsilon_rdp": self.account.epsilon_rdp,
            "steps": float(self.account.steps),
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": 1.0,
        }

    def cover(self, update: Update) -> Update:
        """The update as it may leave: cut, noised, and without its losses, which are exact facts about the site's data."""
        deltas = covered(
            update.deltas,
            group_of,
            clip=self.settings.clip,
            noise_multiplier=self.noise_multiplier,
            chance=secret_chance(),
        )
        return replace(update, deltas=deltas, metrics={})


def spend(
    experiment: config.Experiment,
    site: config.Site,
    stage: config.Stage,
    *,
    shard: Path,
    state: Path,
    run: str,
    round_number: int,
) -> SpentUpdate:
    """Write a round of a stage down in the ledger. Raises RunError where the budget, or the disk, does not allow it."""
    settings = experiment.privacy
    noise = noise_multiplier(experiment, site)
    entry = Entry(
        at=time.time(),
        run=run,
        round=round_number,
        stage=stage.name,
        population=Shard.open(shard, verify=False).manifest.key_mark,
        noise_multiplier=noise,
        sample_rate=1.0,
        steps=1,
    )
    ledger = Ledger(state / LEDGER, whose="this site")
    return SpentUpdate(settings, noise, ledger.spend(entry, delta=settings.delta, budget=settings.epsilon))
