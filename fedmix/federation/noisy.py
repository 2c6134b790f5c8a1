"""Noise on whole updates in a plan: how much of it, so that the rounds that are planned fit into the budget.

Site and server find the same from the plan alone, for the server has to know how long a noised update may be.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from fedmix import config
from fedmix.federation.update import group_of
from fedmix.privacy.updates import deviation


def noise_multiplier(experiment: config.Experiment, site: config.Site) -> float:
    """Sigma of a site's updates: the plan's, or the least with which the rounds that ask this site spend its epsilon."""
    rounds = sum(one.rounds for one in experiment.stages if site in config.sites_of(one, experiment.data.sites))
    return of_rounds(experiment.privacy, rounds)


def of_rounds(settings: config.Privacy, rounds: int) -> float:
    """Sigma of so many rounds, none of which draws by chance whom it hears."""
    if settings.noise_multiplier is not None:
        return settings.noise_multiplier
    assert settings.epsilon is not None  # the config has seen to it
    return _least(rounds, settings.epsilon, settings.delta)


@lru_cache(maxsize=8)
def _least(rounds: int, epsilon: float, delta: float) -> float:
    from fedmix.privacy.accountant import noise_for  # Opacus takes seconds to import, and most experiments need none of it

    return noise_for([(1.0, rounds)], epsilon=epsilon, delta=delta)


def largest_deviation(experiment: config.Experiment, parameters: Iterable[str]) -> float:
    """The most that a number of an update is noised by at any site; 0 where the sites add none to whole updates."""
    if experiment.privacy.mode != "noisy_updates":
        return 0.0
    num_groups = len({group_of(name) for name in parameters})
    asked = {site.name: site for stage in experiment.stages for site in config.sites_of(stage, experiment.data.sites)}
    sigma = max(noise_multiplier(experiment, site) for site in asked.values())
    return deviation(sigma, experiment.privacy.clip, num_groups)
