"""The ServerApp: rounds over whatever Grid it is given, and quick central evaluations along the way.

The same app runs over the in-process Grid, Flower's Ray backend and a SuperLink.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.evaluation import suite
from fedmix.evaluation.held_out import HeldOut
from server import held_out as central
from server.books import Books
from server.gathering import Watch
from server.rounds import RoundLoop
from server.store import Parameters, RunStore, row_of

Evaluate = Callable[[int, str, Parameters], None]


def build_app(
    experiment: config.Experiment,
    store: RunStore,
    *,
    watch: Watch,
    held_out: HeldOut | None = None,
    evaluates_beside: bool = False,
    books: Books | None = None,
) -> ServerApp:
    """A ServerApp that trains the experiment and commits every round to the store.

    ``held_out`` is what quick evaluations every ``evaluation.every`` rounds run on; without it there are none.
    ``evaluates_beside`` runs them while the sites train the next round; right where this machine has a core to spare.
    ``books`` are those of a run over real sites.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        tokenizer = Tokenizer.load(experiment.data.tokenizer)
        evaluate = quick_evaluation(experiment, store, watch, held_out) if held_out is not None else None

        def initial() -> Parameters:
            return central.parameters_of(central.initial_model(experiment, tokenizer))

        loop = partial(RoundLoop, grid, experiment, store, watch=watch, books=books)
        if evaluate is None or not evaluates_beside:
            loop(on_committed=evaluate).run(initial())
            return
        with Beside(evaluate) as beside:
            loop(on_committed=beside.start, before_commit=beside.wait).run(initial())

    return app


class Beside:
    """Runs one evaluation at a time in a thread. A round is not committed before the evaluation of the round before it has
    ended: so a run that is killed takes up at a round whose evaluation can be repeated.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
        self._running: Future[None] | None = None

    def start(self, round_number: int, stage: str, parameters: Parameters) -> None:
        """Evaluate a committed round in the background."""
        self.wait()
        self._running = self._thread.submit(self._evaluate, round_number, stage, parameters)

    def wait(self) -> None:
        """Wait for the evaluation that is going on; raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=error is None, cancel_futures=True)


def quick_evaluation(experiment: config.Experiment, store: RunStore, watch: Watch, held_out: HeldOut) -> Evaluate:
    """What adds a learning curve's point every few rounds, once a round; its time is the evaluation's, not the rounds'."""

    def evaluate(round_number: int, stage: str, parameters: Parameters) -> None:
        every = experiment.evaluation.every
        if not every or (round_number % every and round_number != experiment.num_rounds):
            return
        if store.has_row("evaluation", round_number):
            return
        started = time.time()
        tokenizer = Tokenizer.load(experiment.data.tokenizer)
        model = central.set_parameters(central.random_model(experiment, tokenizer), parameters)
        numbers: Mapping[str, Any] = suite.quick(model, held_out, tokenizer=tokenizer, seed=experiment.seed)
        values = {**numbers, "time/evaluate_s": time.time() - started}
        row = row_of("evaluation", stage=stage, round_number=round_number, site=None, values=values)
        store.append([row])
        watch(row)

    return evaluate
