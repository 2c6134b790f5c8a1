"""A round whose whole update is cut and noised here before it leaves (fedmix/privacy/updates.py), and what that spends.

The ledger lies beside that of patients (client/private.py) and counts something else: rounds in which the site as a whole was
heard. A round is written down before it is computed, so a repeated one counts again, as its noise is another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from client.spending import Spent, Turn
from fedmix import config
from fedmix.federation.noisy import noise_multiplier
from fedmix.federation.update import Update, group_of
from fedmix.privacy.accountant import Ledger
from fedmix.privacy.dpsgd import secret_chance
from fedmix.privacy.updates import covered

LEDGER = "updates.jsonl"  # in a site's state folder


@dataclass(frozen=True)
class SpentUpdate(Spent):
    """A round whose update is noised as a whole."""

    settings: config.Privacy

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


def spend(turn: Turn) -> SpentUpdate:
    """Write a round down in the ledger. Raises RunError where the budget, or the disk, does not allow it."""
    noise = noise_multiplier(turn.experiment, turn.site)
    ledger = Ledger(turn.state / LEDGER, whose="this site")
    account = turn.spend(ledger, noise_multiplier=noise, sample_rate=1.0, steps=1)
    return SpentUpdate(account, noise, 1.0, turn.experiment.privacy)
