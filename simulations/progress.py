"""How far a study is: which method of which cell, and when the rest will be done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmix import config
from simulations import baselines
from simulations.cells import Cell
from simulations.run import MAIN, View

EVALUATION_COST = 1500  # of one method, in training examples: 13 s against 9 ms an example on one core


@dataclass
class Progress:
    """What is done, by the examples it takes, and when the rest will be."""

    cells: list[Cell]
    waiting: list[Cell]
    view: View
    causes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._costs = {cell.name: costs_of(cell.experiment) for cell in self.waiting}
        self._methods: dict[str, list[str]] = {cell.name: [] for cell in self.waiting}  # begun, in order
        self._ended: set[str] = set()

    def hear(self, cell: Cell, said: Mapping[str, Any]) -> None:
        """Take what a cell tells."""
        if "failed" in said:
            self.causes[cell.name] = said["failed"]
        elif "method" in said:
            self._methods[cell.name].append(said["method"])
            number, of = len(self._methods[cell.name]), len(self._costs[cell.name])
            self.view.say(f"{self._overall()}  {cell.name}: {said['method']} ({number} of {of} methods)")
        elif "row" in said and said["row"]["event"] != "round":
            row = said["row"]
            self.view.say(f"{cell.name}, {self._methods[cell.name][-1]}: round {row['round']} {row['event']}, {row['why']}")

    def end(self, cell: Cell) -> None:
        """A cell's process has ended, well or not."""
        self._ended.add(cell.name)
        how = "failed" if cell.name in self.causes else "completed" if cell.is_done else "stopped"
        self.view.say(f"{self._overall()}  {cell.name}: {how}")

    def _overall(self) -> str:
        done = sum(self._done_in(cell.name) for cell in self.waiting)
        planned = sum(sum(costs.values()) for costs in self._costs.values())
        cells_done = len(self.cells) - len(self.waiting) + len(self._ended)
        text = f"[{cells_done} of {len(self.cells)} cells"
        if 0 < done < planned:
            left = (time.monotonic() - self._started) * (planned - done) / done
            text += f", about {left / 60:.0f} min left"
        return text + "]"

    def _done_in(self, name: str) -> float:
        costs, begun = self._costs[name], self._methods[name]
        return sum(costs.values()) if name in self._ended else sum(costs.get(method, 0.0) for method in begun[:-1])


def costs_of(experiment: config.Experiment) -> dict[str, float]:
    """Examples that each method trains on, and its evaluation, by name: what an estimate of the time left counts."""
    costs = {MAIN: _examples(experiment) + EVALUATION_COST}
    for name in experiment.baselines:
        if name in baselines.UNTRAINED:
            costs[name] = EVALUATION_COST
        elif name in baselines.SPECIAL:
            costs[name] = _examples(config.variant(experiment, name)) + EVALUATION_COST
        else:
            costs[name] = sum(_examples(one) + EVALUATION_COST for one in baselines.federated(experiment, name).values())
    return costs


def _examples(experiment: config.Experiment) -> float:
    """Studies that all sites see in all stages; a pair counts as three, which is about what it costs."""
    return sum(
        stage.rounds * stage.local_steps * stage.batch_size * (3 if site.stream == "paired" else 1)
        for stage in experiment.stages
        for site in config.sites_of(stage, experiment.data.sites)
    )
