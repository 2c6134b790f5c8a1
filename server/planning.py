"""Making the plan that sites approve, and reading it back when it is to be run."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmix import config
from fedmix.deployment import plan as plans
from fedmix.deployment.plan import Plan
from fedmix.errors import ConfigError
from server.home import Home


@dataclass(frozen=True)
class Agreed:
    """A plan of this coordinator's, its digest, and the experiment with this machine's own paths."""

    plan: Plan
    digest: str
    experiment: config.Experiment


def make_plan(home: Home, experiment: config.Experiment, sites: Sequence[str], *, out: Path, valid_days: int) -> Agreed:
    """Write a plan for the sites to approve, and keep what running it needs. Raises ConfigError."""
    keys = {} if experiment.secure_sum is None else _keys(home, sites)
    plan = Plan.of(experiment, sites, coordinator=home.settings().address, valid_days=valid_days, keys=keys)
    own = config.build(_with_whole_paths(plans.restrict(experiment, sites)), source="the experiment")
    digest = plans.write(plan, out)
    home.plans.mkdir(exist_ok=True)
    shutil.copyfile(out, home.plans / f"{digest}.yaml")
    _experiment_file(home, digest).write_text(own.to_yaml())
    return Agreed(plan, digest, own)


def read_plan(home: Home, path: Path) -> Agreed:
    """A plan that may be run now. Raises ConfigError if it has ended, is not of this coordinator, or of other code."""
    plan, digest = plans.read(path), plans.digest(path)
    if not plan.is_valid_on(datetime.datetime.now(datetime.UTC).date()):
        raise ConfigError(f"the plan was valid until {plan.valid_until}; make a new one, which the sites approve anew")
    if plan.code != plans.code_hash():
        raise ConfigError("the plan was made with another version of fedmix; make a new one for the sites to approve")
    if plan.lock != plans.lock_hash():
        raise ConfigError("the libraries installed here have changed since the plan was made; make a new one to approve")
    if not _experiment_file(home, digest).exists():
        raise ConfigError(f"the plan was not made in {home.folder}, or was changed since; run what `server plan` wrote")
    experiment = config.load(_experiment_file(home, digest))
    if experiment.fingerprint() != plan.fingerprint:
        raise ConfigError(f"{_experiment_file(home, digest)} is not the plan's experiment; make a new plan")
    return Agreed(plan, digest, experiment)


def _keys(home: Home, sites: Sequence[str]) -> dict[str, str]:
    """The sites' registered keys, by which they know each other in a secure sum. Raises ConfigError if one is missing."""
    registered = home.registered()
    if missing := sorted(set(sites) - set(registered)):
        raise ConfigError(
            f"the plan of a secure sum names each site's key, and {', '.join(missing)} is not registered; ask for key.pub, "
            "then: fedmix server register SITE --key key.pub"
        )
    return {site: registered[site].decode() for site in sites}


def _experiment_file(home: Home, digest: str) -> Path:
    return home.plans / f"{digest}.experiment.yaml"


def _with_whole_paths(experiment: config.Experiment) -> dict[str, Any]:
    """The experiment's values with the coordinator's own paths from the root: the ServerApp starts in another folder."""
    values, data = experiment.model_dump(mode="json"), experiment.data
    values["data"]["cache"] = str(data.cache.absolute())
    held_out = values["data"]["held_out"]
    held_out["shards"] = [str(path.absolute()) for path in data.held_out.shards]
    for name, studies in data.held_out.also.items():
        held_out["also"][name]["shards"] = [str(path.absolute()) for path in studies.shards]
    if experiment.model.warm_start is not None:
        files = experiment.model.warm_start.model_dump()
        values["model"]["warm_start"] = {role: path and str(path.absolute()) for role, path in files.items()}
    return values
