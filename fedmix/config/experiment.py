"""A whole experiment, and what of it decides its weights (the fingerprint).

The JSON Schema is made from these models, so that editors complete and check the YAML.
Defaults are sizes and schedules that learnt something in minutes on two cores, unless a comment says otherwise.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

import yaml
from pydantic import Field, JsonValue, model_validator

from fedmix.config.base import Name, Section
from fedmix.config.checks import (
    check_attack,
    check_narrowed,
    check_private,
    check_scores,
    check_secure_sum,
    check_stage,
    check_whole_updates,
)
from fedmix.config.data import Data
from fedmix.config.evaluating import Attack, Evaluation, Study
from fedmix.config.federating import Aggregation, Federation, Screening, Wire
from fedmix.config.model import Model
from fedmix.config.protecting import Privacy, SecureSum
from fedmix.config.training import COMPARING, Stage, sites_of
from fedmix.errors import ConfigError


class Experiment(Section):
    """Everything that decides a run's weights and report."""

    name: Name
    seed: int = Field(default=0, ge=0)
    data: Data
    model: Model = Model()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    aggregation: Aggregation = Aggregation()
    wire: Wire = Wire()
    screening: Screening = Screening()
    federation: Federation = Federation()
    privacy: Privacy = Privacy()
    attack: Attack | None = Field(default=None, description="a site that lies; no plan for real sites may hold one")
    secure_sum: SecureSum | None = Field(default=None, description="null sends each site's update as it is")
    evaluation: Evaluation = Evaluation()
    baselines: dict[Name, dict[str, JsonValue]] = Field(
        default={},
        description="name -> overrides of this experiment; random_init evaluates the untrained model, public_init what "
        "warm_start names",
    )
    study: Study | None = Field(default=None, description="repeats over seeds and regimes; null is one run")

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        size, patch = self.data.image_size, self.model.patch_size
        if size % patch or size < 2 * patch:
            raise ValueError(f"data.image_size = {size} must be twice model.patch_size = {patch}, or a larger multiple of it")
        for stage in self.stages:
            check_stage(stage, self)
        if self.privacy.mode == "dp":
            check_private(self)
        if self.privacy.mode in ("noisy_updates", "central_noise"):
            check_whole_updates(self)
        if self.privacy.trainable != "all":
            check_narrowed(self)
        if self.evaluation.at_sites:
            check_scores(self)
        if self.attack is not None:
            check_attack(self.attack, self)
        if self.secure_sum is not None:
            check_secure_sum(self, self.secure_sum)
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stage names must differ from each other")
        return self

    @property
    def num_rounds(self) -> int:
        """Rounds of all stages together."""
        return sum(stage.rounds for stage in self.stages)

    def stage_of(self, round_number: int) -> tuple[Stage, int]:
        """The stage that a round (counted from 1) belongs to, and the number of the stage's rounds before it."""
        if round_number < 1:
            raise ConfigError(f"round {round_number} does not exist; rounds count from 1")
        before = 0
        for stage in self.stages:
            if round_number <= before + stage.rounds:
                return stage, round_number - before - 1
            before += stage.rounds
        raise ConfigError(f"round {round_number} is past the last stage; the stages have {self.num_rounds} rounds")

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The objectives that some site of some stage trains, by name."""
        reach = {"mvm": {"image", "paired"}, "mlm": {"text", "paired"}}
        reach |= {name: {"paired"} for name in COMPARING}
        found = set()
        for stage in self.stages:
            streams = {site.stream for site in sites_of(stage, self.data.sites)}
            found |= {name for name, reached in reach.items() if getattr(stage.objectives, name) and streams & reached}
        return tuple(name for name in reach if name in found)

    def to_yaml(self) -> str:
        """The resolved experiment, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def fingerprint(self) -> str:
        """SHA-256 of the resolved values that decide the weights.

        Where a file lies and how many workers compute on it changes nothing, so shard paths, the cache and the number
        of workers are left out: a hospital's path differs from the server's. Processes that share a batch, micro-batches and
        threads add the same numbers in another order, which changes the last bits: they are in.
        """
        values = self.model_dump(mode="json", exclude={"baselines": True, "evaluation": True, "name": True, "study": True})
        if self.privacy.mode == "none":  # as before there was a choice
            values.pop("privacy")
            if self.privacy.trainable != "all":
                values["privacy"] = self.privacy.model_dump(mode="json", include={"trainable", "adapter_rank"})
        if self.attack is None:
            values.pop("attack")
        if self.secure_sum is None:
            values.pop("secure_sum")
        values["model"].pop("size")  # the sizes it stands for are there
        values["model"].pop("warm_start")  # manifest.json has the files' hashes instead (server/store.py)
        values["data"].pop("cache")
        values["data"].pop("held_out")
        for site in values["data"]["sites"]:
            site.pop("shard")
            site.pop("test_studies")
        for stage in values["stages"]:  # as before there were these
            for name in ("semantic", "local"):
                if not stage["objectives"][name]:
                    stage["objectives"].pop(name)
        for key in (
            "workers",
            "device",
            "deadline_s",
            "slowest_link_mbit_s",
            "max_failed_rounds",
            "min_sites",
            "min_sites_of_stream",
            "checkpoint_activations",
        ):
            values["federation"].pop(key)
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
