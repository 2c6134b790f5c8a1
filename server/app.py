"""The ServerApp: rounds over whatever Grid it is given, and quick central evaluations along the way.

The same app runs over the in-process Grid, Flower's Ray backend and a SuperLink.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.evaluation import suite
from fedmix.evaluation.features import HeldOut
from server import held_out as central
from server.rounds import RoundLoop, Watch
from server.store import Parameters, RunStore, row_of


def build_app(experiment: config.Experiment, store: RunStore, *, watch: Watch, held_out: HeldOut | None = None) -> ServerApp:
    """A ServerApp that trains the experiment and commits every round to the store.

    ``held_out`` is what quick evaluations every ``evaluation.every`` rounds run on; without it there are none.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        tokenizer = Tokenizer.load(experiment.data.tokenizer)
        model = central.initial_model(experiment, tokenizer)
        evaluate = quick_evaluation(experiment, store, watch, held_out) if held_out is not None else None
        RoundLoop(grid, experiment, store, watch=watch, on_committed=evaluate).run(central.parameters_of(model))

    return app


def quick_evaluation(
    experiment: config.Experiment, store: RunStore, watch: Watch, held_out: HeldOut
) -> Callable[[int, str, Parameters], None]:
    """What adds a learning curve's point every few rounds, once a round; its time is the evaluation's, not the rounds'."""

    def evaluate(round_number: int, stage: str, parameters: Parameters) -> None:
        every = experiment.evaluation.every
        if not every or (round_number % every and round_number != experiment.num_rounds):
            return
        if store.has_row("evaluation", round_number):
            return
        started = time.time()
        tokenizer = Tokenizer.load(experiment.data.tokenizer)
        model = central.set_parameters(central.initial_model(experiment, tokenizer), parameters)
        numbers: Mapping[str, Any] = suite.quick(model, held_out, tokenizer=tokenizer, seed=experiment.seed)
        values = {**numbers, "time/evaluate_s": time.time() - started}
        row = row_of("evaluation", stage=stage, round_number=round_number, site=None, values=values)
        store.append([row])
        watch(row)

    return evaluate
