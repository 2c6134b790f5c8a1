"""The round loop over a Flower Grid: order, wait with a deadline, screen, write down, add up, commit.

Flower's own Strategy.start has no deadline a site, no checkpoint, no early stop, and ends the run on one odd reply. Here
a site that errs, is late or sends something unusable is dropped for the round; a round without enough sites is a failure
and never a success; and after some failed rounds in a row the run stops and says why.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Size, Tensor

from fedmix import config, heap
from fedmix.errors import RunError, UpdateError
from fedmix.federation import aggregate, diagnostics, screening
from fedmix.federation.noisy import largest_deviation
from fedmix.federation.outer import outer_step
from fedmix.federation.screening import Norms, Screen
from fedmix.federation.update import REACHED_BY, base_of, digests, group_of, mean_metrics, num_bytes, tower_of
from fedmix.federation.weights import weights_of
from server import messages
from server.accounts import Taken, add, covered, facts_of_site, on_our_clock
from server.books import Books
from server.roster import POLL_S, Roster
from server.secure import SecureRound
from server.spool import Coded, Spool
from server.store import Committed, Parameters, Row, RunStore, row_of

MAX_DIAGNOSED = 32  # sites

Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Sent:
    """An order on its way.

    ``sent``: when, in seconds since 1970; ``until``: when its reply comes too late, on the monotonic clock; ``is_whole``:
    whether it carried everything.
    """

    order: messages.Order
    sent: float
    until: float
    is_whole: bool


@dataclass
class Round:
    """What one round gathers while replies come in; its rows are written down once it counts.

    ``groups``: digests of the parameter groups it begins with; ``reach``: how far its steps can lead in each of them;
    ``secure``: the sum that hides each site's update, None where updates come as they are.
    """

    number: int
    stage: config.Stage
    started: float
    groups: Mapping[str, str]
    reach: Norms
    secure: SecureRound | None
    taken: list[Taken] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    privacy: Mapping[str, float] = field(default_factory=dict)  # what the server's own ledger holds with it


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
        self._fingerprint = experiment.fingerprint()
        self._books = books
        self._roster = Roster(grid, experiment, run=store.run_id, books=books)

    def run(self, initial: Parameters) -> Committed:
        """Train every round that is not yet committed; returns where the run stands at the end."""
        heap.give_back()
        committed = self._store.latest() or Committed(0, initial, {}, {})
        del initial  # a whole model, needed no longer than the first round
        if committed.round_number:
            self._tell(committed)  # a kill may have come between the commit and what follows it
        if committed.round_number < self._experiment.num_rounds:
            self._roster.greet()
        failed_in_a_row = 0
        while committed.round_number < self._experiment.num_rounds:
            done = self._round(committed, failed_in_a_row)
            failed_in_a_row = failed_in_a_row + 1 if done.round_number == committed.round_number else 0
            committed = done
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
        )
        spool = Spool(self._store.spool_folder)
        try:
            self._gather(current, begun, screen, spool)
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

    def _gather(self, current: Round, committed: Committed, screen: Screen, spool: Spool) -> None:
        """Send the orders and take replies as they come, until all have answered or their deadlines have passed."""
        waiting = self._send_all(current, committed, screen)
        while waiting := self._in_time(waiting, current):
            asked = time.monotonic()
            replies = list(self._grid.pull_messages(list(waiting)))[::-1]
            came = len(replies)
            while replies:
                message = replies.pop()  # out of memory as soon as it is written down
                sent = waiting.pop(message.metadata.reply_to_message_id, None)
                if sent is not None and messages.needs_all(message) and not sent.is_whole:
                    waiting |= self._send_whole(current, committed, sent)
                elif sent is not None:
                    self._take(message, sent, current, screen, spool)
                del message
            if waiting and not came:
                time.sleep(max(0.0, POLL_S - (time.monotonic() - asked)))

    def _in_time(self, waiting: Mapping[str, Sent], current: Round) -> dict[str, Sent]:
        """The orders whose replies may still come; the sites of the others are dropped."""
        now = time.monotonic()
        for sent in waiting.values():
            if sent.until <= now:
                self._drop(sent.order.site.name, "no reply before the deadline", current)
        return {one: sent for one, sent in waiting.items() if sent.until > now}

    def _send_all(self, current: Round, committed: Committed, screen: Screen) -> dict[str, Sent]:
        """Order the round's sites to train, by message id; sites that are sent the same share one content.

        Every deadline begins when all are sent: a grid may hand over one order after the other.
        """
        contents: dict[tuple[str, frozenset[str]], tuple[RecordDict, int]] = {}
        waiting: dict[str, Sent] = {}
        struck_out = screen.struck_out() & {site.name for site in config.sites_of(current.stage, self._experiment.data.sites)}
        current.failures |= dict.fromkeys(struck_out, "refused too often, so it is not asked again in this run")
        chosen = self._roster.chosen(current.stage, current.number, struck_out)
        present = self._present(current, chosen)
        ready = present if current.secure is None else self._agreed(current, current.secure, present)
        began = time.monotonic()
        for site in ready:
            order = self._order(site, current, committed.parameters)
            lacking = self._roster.lacks(site.name, order.groups)
            key = (site.stream, lacking)
            if key not in contents:
                contents[key] = self._content(order, committed, lacking)
            waiting |= self._send(order, *contents[key], current, is_whole=len(lacking) == len(order.groups))
        took = time.monotonic() - began
        return {one: replace(sent, until=sent.until + took) for one, sent in waiting.items()}

    def _present(self, current: Round, chosen: Sequence[config.Site]) -> list[config.Site]:
        """The sites whose agents are connected; the others are dropped."""
        away = self._roster.away(site.name for site in chosen)
        for site in sorted(away):
            self._drop(site, "its agent is not connected", current)
        return [site for site in chosen if site.name not in away]

    def _agreed(self, current: Round, secure: SecureRound, chosen: Sequence[config.Site]) -> list[config.Site]:
        """The sites that have exchanged their keys for a secure sum; the others are dropped."""
        try:
            return secure.agree(chosen)
        finally:
            for site, why in sorted(secure.failures.items()):
                self._drop(site, why, current)

    def _send_whole(self, current: Round, committed: Committed, sent: Sent) -> dict[str, Sent]:
        """The same order again, with everything: the site has lost what it held."""
        site = sent.order.site
        self._roster.forget(site.name)
        content, size = self._content(sent.order, committed, frozenset(sent.order.groups))
        return self._send(sent.order, content, size, current, is_whole=True)

    def _send(
        self, order: messages.Order, content: RecordDict, size: int, current: Round, *, is_whole: bool
    ) -> dict[str, Sent]:
        node_id = self._roster.nodes[order.site.name]
        federation = self._experiment.federation
        size_up = sum(4 * shape.numel() for shape in order.shapes.values())  # at most; a coding makes it less
        deadline_s = federation.deadline_s + (size + size_up) * 8 / (federation.slowest_link_mbit_s * 1e6)
        if current.secure is not None:
            content = RecordDict({**content, "sum": current.secure.part_of(order.site.name)})
        message = messages.order_message(node_id, order, content, deadline_s=deadline_s)
        if self._books is not None:
            self._books.sent(message, order)
        sent = Sent(order, time.time(), time.monotonic() + deadline_s, is_whole)
        ids = [one for one in self._grid.push_messages([message]) if one]  # Flower says None of what it could not send
        current.bytes_down[order.site.name] = current.bytes_down.get(order.site.name, 0) + size
        if not ids:
            self._drop(order.site.name, "its order could not be sent", current)
        return dict.fromkeys(ids, sent)

    def _order(self, site: config.Site, current: Round, parameters: Parameters) -> messages.Order:
        shapes = {name: value.shape for name, value in for_stream(parameters, site.stream).items()}
        groups = {group: current.groups[group] for group in sorted({group_of(name) for name in shapes})}
        return messages.Order(
            site=site,
            run=self._store.run_id,
            round_number=current.number,
            fingerprint=self._fingerprint,
            plan=self._books.plan if self._books is not None else "",
            base=base_of(groups),
            nonce=secrets.token_hex(16),
            groups=groups,
            shapes=shapes,
        )

    def _content(self, order: messages.Order, committed: Committed, lacking: frozenset[str]) -> tuple[RecordDict, int]:
        parameters = {name: committed.parameters[name] for name in order.shapes if group_of(name) in lacking}
        moments = {name: value for name, value in committed.second_moments.items() if name in order.shapes}
        return messages.order_content(order, parameters, moments)

    def _take(self, message: Message, sent: Sent, current: Round, screen: Screen, spool: Spool) -> None:
        """Read and screen one reply; whatever is wrong with it drops the site for this round only."""
        site = sent.order.site
        try:
            if message.has_error():  # the site's own word, or its engine's: no strike
                self._note(message, sent.order, why=messages.reason(message))
                self._drop(site.name, messages.reason(message), current)
                return
            reply = messages.read_reply(message, sent.order, is_masked=current.secure is not None)
            self._roster.holds(site.name, sent.order.groups)
            update, norm = self._screened(reply, sent.order, current, screen)
            if current.secure is not None:
                current.secure.take(message, sent.order)
            self._note(message, sent.order, reply=reply, norm=norm)
        except UpdateError as error:
            self._note(message, sent.order, why=str(error))
            strikes = screen.strike(site.name)
            last = "; it is not asked again" if site.name in screen.struck_out() else ""
            self._drop(site.name, f"{error} (strike {strikes}{last})", current)
            return
        taken = on_our_clock(
            Taken(spool.add(update), reply.examples, reply.bytes_up, reply.train_start, reply.train_end, reply.privacy),
            sent.sent,
            time.time(),
        )
        current.taken.append(taken)
        self._say("site", current, site.name, facts_of_site(taken, current.bytes_down[site.name]))

    def _note(
        self,
        message: Message,
        order: messages.Order,
        *,
        reply: messages.Reply | None = None,
        norm: float | None = None,
        why: str | None = None,
    ) -> None:
        """Write a site's answer down, in a run over real sites."""
        if self._books is not None:
            self._books.received(message, order, reply=reply, norm=norm, why=why)

    def _screened(
        self, reply: messages.Reply, order: messages.Order, current: Round, screen: Screen
    ) -> tuple[Coded, float | None]:
        """The update and its length, once nothing is found wrong with it; what it holds is decoded a slab at a time.

        Behind the masks of a secure sum neither is to be seen: the update holds the work done and no change.
        """
        asked = screening.Asked(
            order.site.stream, current.stage.local_steps, current.stage.batch_size, self._roster.studies[order.site.name]
        )
        examples = screening.check_work(reply.examples, reply.steps, reply.metrics, asked)
        if bool(reply.privacy) != self._experiment.privacy.is_counted_by_sites:
            raise UpdateError(f"the site's update does not fit privacy.mode = {self._experiment.privacy.mode}")
        screening.check_second_moments(reply.second_moments, order.shapes, current.stage.optimiser)
        update = Coded(
            site=order.site.name,
            examples=examples,
            steps=reply.steps,
            parts={}
            if current.secure is not None
            else screening.check_arrays(reply.arrays, order.shapes, order.site.stream, self._experiment.wire),
            shapes=order.shapes,
            wire=self._experiment.wire,
            metrics=reply.metrics,
            second_moments=reply.second_moments,
        )
        if current.secure is not None:
            return update, None
        norms = screening.norms_of(update, order.shapes)
        screen.take(update.site, order.site.stream, norms, current.reach)
        return update, math.hypot(*norms.values())

    def _drop(self, site: str, why: str, current: Round) -> None:
        current.failures[site] = why
        self._watch({"event": "dropped", "stage": current.stage.name, "round": current.number, "site": site, "why": why})

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
        self._say("round", current, None, values)
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
        self._say("aggregate", current, None, diagnostics.diagnose(updates, shapes, weights))

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
        self._watch({"event": "failed", "stage": current.stage.name, "round": current.number, "site": None, "why": why})
        if failed_in_a_row >= self._experiment.federation.max_failed_rounds:
            causes = "; ".join(f"{site}: {cause}" for site, cause in sorted(current.failures.items()))
            raise RunError(
                f"round {current.number} failed {failed_in_a_row} times in a row: {why}{f' ({causes})' if causes else ''}; "
                "mend the cause and go on with --resume"
            )

    def _say(self, event: str, current: Round, site: str | None, values: Mapping[str, float]) -> None:
        row = row_of(event, stage=current.stage.name, round_number=current.number, site=site, values=values)
        current.rows.append(row)
        self._watch(row)


def for_stream(parameters: Parameters, stream: config.StreamName) -> Parameters:
    """The parameters that a site of this stream can train: the towers its losses reach. Nothing else is sent to it."""
    return {name: value for name, value in parameters.items() if stream in REACHED_BY[tower_of(group_of(name))]}


def _facts_of_round(current: Round, *, busy_s: float, aggregate_s: float) -> dict[str, float]:
    return {
        "time/round_s": time.time() - current.started,
        "time/train_s": busy_s,
        "time/aggregate_s": aggregate_s,
        "num_sites": float(len(current.taken)),
        "num_failed": float(len(current.failures)),
    }
