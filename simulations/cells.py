"""The cells of a study: one regime with one seed each, as an ordinary experiment in a run folder of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmix import config
from fedmix.errors import ConfigError
from fedmix.federation.local import seed_of
from server.store import warm_start_hashes
from simulations import baselines


@dataclass(frozen=True)
class Cell:
    """One regime with one seed, and the run folder it has."""

    regime: str
    seed: int
    folder: Path
    experiment: config.Experiment

    @property
    def name(self) -> str:
        """How people are told of it."""
        return f"{self.regime}/seed-{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether its folder holds a completed run of exactly this experiment."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            state, warm_start = manifest["state"], manifest.get("warm_start", {})
            held = config.load(self.folder / "config.yaml")
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            return False
        same = _asked(held) == _asked(self.experiment) and warm_start == warm_start_hashes(self.experiment)
        return bool(state == "completed") and same and (self.folder / "report.json").exists()


def _asked(experiment: config.Experiment) -> dict[str, Any]:
    """What a cell's results depend on: not where its folder and a warm start's files lie, nor the number of workers."""
    apart = {"data": {"cache"}, "model": {"warm_start"}, "federation": {"workers", "deadline_s", "slowest_link_mbit_s"}}
    return experiment.model_dump(mode="json", exclude=apart)


def cells_of(experiment: config.Experiment, out: Path) -> list[Cell]:
    """Every cell of a study, all regimes of a seed before the next seed: whoever stops early has whole comparisons.

    Raises ConfigError for an override that does not fit, before anything is drawn.
    """
    assert experiment.study is not None
    return [
        Cell(regime, seed, folder := out / regime / f"seed-{seed}", _experiment_of(experiment, regime, seed, folder))
        for seed in experiment.study.seeds
        for regime in experiment.study.regimes
    ]


def _experiment_of(experiment: config.Experiment, regime: str, seed: int, folder: Path) -> config.Experiment:
    """The experiment of a cell: the regime's overrides, this seed, and sites that no other seed has drawn."""
    values = config.regime(experiment, regime).model_dump(mode="json")
    values |= {"name": f"{experiment.name}-{regime}"[:40].rstrip("-_"), "seed": seed, "study": None}
    values["data"]["cache"] = str(folder / ".phantoms")
    for site in values["data"]["sites"]:
        if site["phantom"] is not None:  # hashed, so that no sum of seeds meets the held-out set's
            site["phantom"]["seed"] = seed_of(seed, "phantoms", site["phantom"]["seed"]) % 2**31
    cell = config.build(values, source=f"study.regimes.{regime}")
    baselines.check(cell)
    return cell
