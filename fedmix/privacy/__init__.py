"""Differential privacy; auditable alone, so it imports only batch and config. What every report of an epsilon says with it:"""

from __future__ import annotations

from typing import NamedTuple


class Promise(NamedTuple):
    """What an epsilon of a mode covers: whom, when two data sets are neighbours, and what it does not cover."""

    unit: str
    relation: str
    limits: str


ACCOUNTANT = "prv"  # of Opacus; its RDP accountant checks it
PROMISES = {
    "dp": Promise(
        "patient",  # with all its studies in the site's shard
        "add or remove one patient",
        "Epsilon is the largest site's, by the sites' own word and with the number of their patients taken as known; a patient "
        "of several sites bears the sum of theirs. No site told its losses, and examples are those expected.",
    ),
    "noisy_updates": Promise(
        "site",
        "replace all that the site holds by anything else",
        "Each site cut and noised its whole updates before they left, by its own word; the coordinator need not be trusted. "
        "The number of studies that a site registered is not covered. With few sites the noise is as long as what they say, or "
        "longer.",
    ),
    "central_noise": Promise(
        "site",
        "replace all that one site holds by anything else",
        "The coordinator saw every update as it was and is trusted with them; the noise covers the model alone, not the "
        "losses, lengths, counts and refusals in the run folder. With few sites it is as long as what they say, or longer.",
    ),
}
