"""What a round spends of a privacy budget, whatever is noised: written down before it is computed, and told with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fedmix import config
from fedmix.data.shard import Shard
from fedmix.federation.update import Update
from fedmix.privacy.accountant import Account, Entry, Ledger


@dataclass(frozen=True)
class Turn:
    """A site's part in a round of a stage, and where its shard and its ledgers lie."""

    experiment: config.Experiment
    site: config.Site
    stage: config.Stage
    shard: Path
    state: Path
    run: str
    round_number: int

    def spend(self, ledger: Ledger, *, noise_multiplier: float, sample_rate: float, steps: int) -> Account:
        """Write the round down, and return what the ledger then holds.

        Raises RunError where the budget, or the disk, does not allow it.
        """
        settings = self.experiment.privacy
        entry = Entry(
            at=time.time(),
            run=self.run,
            round=self.round_number,
            stage=self.stage.name,
            population=Shard.open(self.shard, verify=False).manifest.key_mark,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
        )
        return ledger.spend(entry, delta=settings.delta, budget=settings.epsilon)


@dataclass(frozen=True)
class Spent:
    """A round that may begin, and what the ledger holds with it."""

    account: Account
    noise_multiplier: float
    sample_rate: float

    def facts(self) -> dict[str, float]:
        """What the server is told."""
        return {
            "epsilon": self.account.epsilon,
            "epsilon_rdp": self.account.epsilon_rdp,
            "steps": float(self.account.steps),
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
        }

    def cover(self, update: Update) -> Update:
        """The update as it may leave; as it is, where its steps were noised."""
        return update
