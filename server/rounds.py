"""The round loop over a Flower Grid: order, wait with a deadline, screen, write down, add up, commit.

Flower's own Strategy.start has no deadline a site, no checkpoint, no early stop, and ends the run on one odd reply. Here
a site that errs, is late or sends something unusable is dropped for the round; a round without enough sites is a failure
and never a success; and after some failed rounds in a row the run stops and says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from flwr.serverapp import Grid
from torch import Size, Tensor

from fedmix import config, heap
from fedmix.errors import RunError, UpdateError
from fedmix.federation import aggregate, diagnostics, screening
from fedmix.federation.noisy import largest_deviation
from fedmix.federation.outer import outer_step
from fedmix.federation.screening import Screen
from fedmix.federation.update import digests, mean_metrics, num_bytes
from fedmix.federation.weights import weights_of
from server import site_scores
from server.accounts import add, covered
from server.books import Books
from server.gathering import Gathering, Round, Watch
from server.roster import Roster
from server.secure import SecureRound
from server.spool import Coded, Spool
from server.store import Committed, Parameters, RunStore

MAX_DIAGNOSED = 32  # sites


class RoundLoop:
    """Runs the stages of an experiment over a Grid, from the newest checkpoint to the last round."""

    def __init__(
        self,
        grid: Grid,
        experiment: config.Experiment,
        store: RunStore,
        *,
        watch: Watch,
        on_committed: Callable[[int, str, Parameters], None] | None = None,
        before_commit: Callable[[], None] | None = None,
        books: Books | None = None,
    ) -> None:
        """``on_committed`` is told each round; if it goes on beside the next one, ``before_commit`` waits for it.

        ``books`` are those of a run over real sites: every message is written down, and sites are known by their keys.
        """
        self._grid, self._experiment, self._store, self._watch = grid, experiment, store, watch
        self._on_committed, self._before_commit = on_committed, before_commit
        self._books = books
        self._roster = Roster(grid, experiment, run=store.run_id, books=books)
        self._gathering = Gathering(grid, experiment, self._roster, run=store.run_id, books=books)

    def run(self, initial: Parameters) -> Committed:
        """Train every round that is not yet committed; returns where the run stands at the end."""
        heap.give_back()
        committed = self._store.latest() or Committed(0, initial, {}, {})
        del initial  # a whole model, needed no longer than the first round
        if committed.round_number:
            self._tell(committed)  # a kill may have come between the commit and what follows it
        if committed.round_number < self._experiment.num_rounds:
            self._roster.greet(is_taken_up=committed.round_number > 0)
        failed_in_a_row = 0
        while committed.round_number < self._experiment.num_rounds:
            done = self._round(committed, failed_in_a_row)
            failed_in_a_row = failed_in_a_row + 1 if done.round_number == committed.round_number else 0
            committed = done
        if site_scores.is_due(self._experiment, self._store.folder):
            site_scores.gather(self._grid, self._experiment, self._store, self._roster, committed, self._books)
        return committed

    def _round(self, committed: Committed, failed_in_a_row: int) -> Committed:
        """One attempt at the next round; what stands after it is the same round where it failed."""
        stage, round_in_stage = self._experiment.stage_of(committed.round_number + 1)
        begun = committed if round_in_stage else replace(committed, outer={}, second_moments={})  # a stage starts afresh
        screen = Screen.from_dict(committed.screening, self._experiment.screening, stage)
        stages = self._experiment.stages[: self._experiment.stages.index(stage) + 1]
        current = Round(
            committed.round_number + 1,
            stage,
            time.time(),
            digests(committed.parameters),
            screening.reach(
                committed.parameters,
                stages,
                self._experiment.wire,
                noise_std=largest_deviation(self._experiment, committed.parameters),
            ),
            self._secure_round(committed.round_number + 1),
            self._watch,
        )
        spool = Spool(self._store.spool_folder)
        try:
            self._gathering.gather(current, begun, screen, spool)
            done = self._commit(current, begun, screen)
        except UpdateError as error:
            self._give_up_after(failed_in_a_row + 1, current, str(error))
            return replace(committed, screening=screen.to_dict())
        finally:
            spool.close()
        self._tell(done)
        return done

    def _secure_round(self, number: int) -> SecureRound | None:
        settings = self._experiment.secure_sum
        if settings is None:
            return None
        run, roster = self._store.run_id, self._roster
        return SecureRound(self._grid, self._experiment, settings, roster, run=run, round_number=number, books=self._books)

    def _tell(self, committed: Committed) -> None:
        if self._on_committed is not None:
            stage, _ = self._experiment.stage_of(committed.round_number)
            self._on_committed(committed.round_number, stage.name, committed.parameters)

    def _commit(self, current: Round, committed: Committed, screen: Screen) -> Committed:
        """Aggregate, step, and make the round last; raises UpdateError where the replies make no round."""
        self._check_quorum(current)
        gathered = time.time()
        parameters, outer, norm = self._step(current, committed)
        updates = [taken.update for taken in current.taken]
        moments = aggregate.aggregate_second_moments(updates, self._experiment.aggregation)
        aggregate_s, busy_s = time.time() - gathered, covered([(one.train_start, one.train_end) for one in current.taken])
        values = {f"train/{name}": value for name, value in mean_metrics(update.metrics for update in updates).items()}
        values |= _facts_of_round(current, busy_s=busy_s, aggregate_s=aggregate_s) | {"aggregate/update_norm": norm}
        values |= current.secure.facts() if current.secure is not None else {}
        current.say("round", None, values)
        self._diagnose(current, updates)
        waited = time.time()
        if self._before_commit is not None:
            self._before_commit()
        waited = time.time() - waited
        totals = self._totals(current, committed, aggregate_s=aggregate_s, busy_s=busy_s)
        add(totals, "rounds_s", time.time() - current.started - waited)
        written = time.time()
        screen.keep()
        done = Committed(current.number, parameters, outer, totals, screen.to_dict(), moments)
        # Rows first: of a round that a kill left uncommitted they are dropped on resume, and a committed round has its own.
        self._store.append(current.rows)
        self._store.commit(done)
        # What the commit itself took is in the next checkpoint.
        add(totals, "rounds_s", time.time() - written)
        return done

    def _check_quorum(self, current: Round) -> None:
        """Raise UpdateError unless enough sites answered, of the stage and of each of its streams."""
        federation = self._experiment.federation
        if len(current.taken) < federation.min_sites or not current.taken:
            asked = len(current.bytes_down)
            raise UpdateError(f"{len(current.taken)} of {asked} sites sent an update, {federation.min_sites} are needed")
        for stream in current.stage.streams:
            wanted = getattr(federation.min_sites_of_stream, stream)
            came = sum(taken.examples.get(stream, 0) > 0 for taken in current.taken)
            if came < wanted:
                raise UpdateError(f"{came} sites with {stream} studies sent an update, {wanted} are needed")

    def _step(self, current: Round, committed: Committed) -> tuple[Parameters, Parameters, float]:
        """The next parameters, the outer optimiser's next state, and the length of the aggregated change.

        One parameter at a time; what no site trained, and its moments, stay as they are to the bit.
        """
        shapes = {name: value.shape for name, value in committed.parameters.items()}
        parameters, outer, squared = dict(committed.parameters), dict(committed.outer), 0.0
        updates = [taken.update for taken in current.taken]
        for name, delta in self._changes(current, updates, shapes):
            moments = {moment: outer[key] for moment in ("velocity", "first", "second") if (key := f"{moment}/{name}") in outer}
            parameters[name], moments = outer_step(parameters[name], delta, moments, current.stage.outer)
            if not bool(parameters[name].isfinite().all()):
                raise UpdateError("the aggregated model holds values that are not finite; lower outer.lr or the sites' rates")
            outer |= {f"{moment}/{name}": value for moment, value in moments.items()}
            squared += float(delta.double().square().sum())
        return parameters, outer, squared**0.5

    def _changes(self, current: Round, updates: Sequence[Coded], shapes: Mapping[str, Size]) -> Iterable[tuple[str, Tensor]]:
        """Every parameter's change; noised, and the noise in the run's ledger first, where that is the server's part."""
        if current.secure is not None:
            return self._unmasked(current, current.secure, shapes)
        if self._experiment.privacy.mode != "central_noise":
            return aggregate.aggregate(updates, shapes, self._experiment.aggregation)
        from server import central_noise  # Opacus takes seconds to import, and most experiments need none of it

        current.privacy = central_noise.spend(self._experiment, self._store, current.number)
        return central_noise.aggregate_noised(updates, shapes, self._experiment)

    def _unmasked(self, current: Round, secure: SecureRound, shapes: Mapping[str, Size]) -> Iterable[tuple[str, Tensor]]:
        try:
            secure.unmask()
        except UpdateError:
            current.failures |= secure.failures  # why sites did not help
            raise
        return secure.changes(shapes, current.reach)

    def _diagnose(self, current: Round, updates: Sequence[Coded]) -> None:
        """What the updates looked like beside each other; not of a crowd, whose numbers nobody would read."""
        if len(updates) > MAX_DIAGNOSED or current.secure is not None:
            return
        weights = weights_of(updates, self._experiment.aggregation)
        shapes = {name: shape for update in updates for name, shape in update.shapes.items()}
        current.say("aggregate", None, diagnostics.diagnose(updates, shapes, weights))

    def _totals(self, current: Round, committed: Committed, *, aggregate_s: float, busy_s: float) -> dict[str, float]:
        """Sums over the whole run, which live in the checkpoint so that a resumed run reports all of it."""
        totals = dict(committed.totals)
        for taken in current.taken:
            site = taken.update.site
            add(totals, f"bytes_up/{site}", taken.bytes_up)
            add(totals, f"bytes_down/{site}", current.bytes_down[site])
            add(totals, f"examples/{site}", sum(taken.examples.values()))
            add(totals, "bytes_full_fp32", num_bytes(committed.parameters.values()))
            totals[f"studies/{site}"] = self._roster.studies[site]
            totals |= {f"privacy/{site}/{name}": value for name, value in taken.privacy.items()}
        if current.secure is not None:
            current.secure.count(totals)
        totals |= {f"privacy/{name}": value for name, value in current.privacy.items()}
        add(totals, "local_train_s", busy_s)
        add(totals, "aggregate_s", aggregate_s)
        return totals

    def _give_up_after(self, failed_in_a_row: int, current: Round, why: str) -> None:
        current.tell("failed", None, why)
        if failed_in_a_row >= self._experiment.federation.max_failed_rounds:
            causes = "; ".join(f"{site}: {cause}" for site, cause in sorted(current.failures.items()))
            raise RunError(
                f"round {current.number} failed {failed_in_a_row} times in a row: {why}{f' ({causes})' if causes else ''}; "
                "mend the cause and go on with --resume"
            )


def _facts_of_round(current: Round, *, busy_s: float, aggregate_s: float) -> dict[str, float]:
    return {
        "time/round_s": time.time() - current.started,
        "time/train_s": busy_s,
        "time/aggregate_s": aggregate_s,
        "num_sites": float(len(current.taken)),
        "num_failed": float(len(current.failures)),
    }
