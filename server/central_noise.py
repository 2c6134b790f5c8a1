"""Noise on the mean of the sites' updates, added by a server that the sites trust (``privacy.mode: central_noise``).

Each site's update is cut group by group to length C before it is weighed. The weights follow from counts, which are not
hidden. Where all that one site holds is replaced, the mean of group g moves by at most 2 C p_g, p_g the largest weight in it;
noise of deviation sigma 2 C p_g sqrt(G) on every number of the G groups is one Gaussian of noise multiplier sigma. Every site
is charged every round. The ledger, ``privacy.jsonl`` of the run folder, is written before the round is committed: a kill
between the two counts too much and never too little.

What it does not cover: weights and noise follow from whose updates were taken, so the model shows how many a round had, and
screening, which looks at data, is part of that. A site whose data have it refused is seen to be missing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Stream
from fedmix.federation.aggregate import aggregate
from fedmix.federation.noisy import of_rounds
from fedmix.federation.screening import norms_of
from fedmix.federation.slabs import Shapes, groups_of
from fedmix.federation.update import Contribution, group_of
from fedmix.federation.weights import weights_of
from fedmix.privacy.accountant import Entry, Ledger
from fedmix.privacy.dpsgd import noised, secret_chance
from fedmix.privacy.updates import deviation, factors
from server.store import RunStore

LEDGER = "privacy.jsonl"  # in the run folder


@dataclass(frozen=True)
class Cut:
    """A contribution whose groups are at most so long; what is read of it is multiplied by its group's factor."""

    whole: Contribution
    factor: Mapping[str, float]

    @property
    def site(self) -> str:
        """The site's name."""
        return self.whole.site

    @property
    def examples(self) -> Mapping[Stream, int]:
        """Studies by stream."""
        return self.whole.examples

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.whole.steps

    @property
    def second_moments(self) -> Mapping[str, float]:
        """None: they would leave without noise, and the config asks for none."""
        return {}

    def names(self) -> Collection[str]:
        """Parameters whose change was sent."""
        return self.whole.names()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter's change, cut."""
        return self.whole.rows(name, start, stop) * self.factor[group_of(name)]


def spend(experiment: config.Experiment, store: RunStore, round_number: int) -> dict[str, float]:
    """Write a round down in the run's ledger and say what it holds. Raises RunError where budget or disk do not allow it."""
    settings = experiment.privacy
    entry = Entry(
        at=time.time(),
        run=store.run_id,
        round=round_number,
        stage=experiment.stage_of(round_number)[0].name,
        population="sites",
        noise_multiplier=of_rounds(settings, experiment.num_rounds),
        sample_rate=1.0,
        steps=1,
    )
    ledger = Ledger(store.folder / LEDGER, whose="this run's sites")
    account = ledger.spend(entry, delta=settings.delta, budget=settings.epsilon)
    return {"epsilon": account.epsilon, "epsilon_rdp": account.epsilon_rdp, "steps": float(account.steps)}


def aggregate_noised(
    contributions: Sequence[Contribution], shapes: Shapes, experiment: config.Experiment, chance: Generator | None = None
) -> Iterator[tuple[str, Tensor]]:
    """``aggregate`` of cut contributions, with noise on every parameter's change; ``chance`` is secret, None draws one."""
    settings, chance = experiment.privacy, chance or secret_chance()
    cut = [Cut(one, factors(norms_of(one, shapes), settings.clip)) for one in contributions]
    groups, weights = groups_of(cut), weights_of(cut, experiment.aggregation)
    sigma = of_rounds(settings, experiment.num_rounds)
    std = {
        name: deviation(sigma, settings.clip, len(groups)) * max(weights[label].values(), default=0.0)
        for label, group in groups.items()
        for name in group.parameters
    }
    for name, change in aggregate(cut, shapes, experiment.aggregation):
        yield name, noised(change, noise_multiplier=std[name], clip=1.0, expected=1.0, chance=chance)
