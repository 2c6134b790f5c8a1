"""The round loop over a Flower Grid: order, wait with a deadline, drop what failed, aggregate, commit.

Flower's own Strategy.start has no deadline a site, no checkpoint, no early stop, and ends the run on one odd reply. Here
a site that errs, is late or sends something unusable is dropped for the round; a round without enough sites is a failure
and never a success; and after some failed rounds in a row the run stops and says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmix import config
from fedmix.errors import RunError, UpdateError
from fedmix.federation import aggregate
from fedmix.federation.local import sum_metrics
from fedmix.federation.update import REACHED_BY, Update, check, digest, group_of, num_bytes, tower_of
from server import messages
from server.store import Committed, Parameters, Row, RunStore, row_of

POLL_S = 0.05  # at least so long from one question to the next; a Grid that waits by itself is asked again at once
GREETING_DEADLINE_S = 120.0

Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Order:
    """An order on its way: to whom, on which parameters, and since when (seconds since 1970)."""

    site: config.Site
    base: str
    parameters: Parameters
    num_bytes: int
    sent: float


@dataclass
class Round:
    """What one round gathers while replies come in; its rows are written down once it counts."""

    number: int
    stage: config.Stage
    replies: list[messages.Reply] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


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
    ) -> None:
        self._grid, self._experiment, self._store, self._watch = grid, experiment, store, watch
        self._on_committed = on_committed
        self._fingerprint = experiment.fingerprint()
        self._nodes: dict[str, int] = {}
        self._studies: dict[str, int] = {}

    def run(self, initial: Parameters) -> Committed:
        """Train every round that is not yet committed; returns where the run stands at the end."""
        committed = self._store.latest() or Committed(0, initial, {}, {})
        if committed.round_number:
            self._tell(committed)  # a kill may have come between the commit and what follows it
        if committed.round_number < self._experiment.num_rounds:
            self._greet()
        failed_in_a_row = 0
        while committed.round_number < self._experiment.num_rounds:
            started = time.time()
            stage, round_in_stage = self._experiment.stage_of(committed.round_number + 1)
            velocity = committed.velocity if round_in_stage else {}
            current = self._gather(Round(committed.round_number + 1, stage), committed.parameters)
            try:
                committed = self._commit(current, committed, velocity, started)
            except UpdateError as error:
                failed_in_a_row += 1
                self._give_up_after(failed_in_a_row, current, str(error))
            else:
                failed_in_a_row = 0
                self._tell(committed)
        return committed

    def _tell(self, committed: Committed) -> None:
        if self._on_committed is not None:
            stage, _ = self._experiment.stage_of(committed.round_number)
            self._on_committed(committed.round_number, stage.name, committed.parameters)

    def _greet(self) -> None:
        """Learn which node is which site; every site of the experiment must be there and run the same experiment."""
        asked = [messages.query(node_id) for node_id in self._wait_for_nodes()]
        # A site reads its whole shard before it answers, so it has at least as long as for a round.
        deadline_s = max(GREETING_DEADLINE_S, self._experiment.federation.deadline_s)
        for answer in self._grid.send_and_receive(asked, timeout=deadline_s):
            try:
                greeting = messages.read_greeting(answer)
            except UpdateError as error:
                raise RunError(str(error)) from None
            if greeting.fingerprint != self._fingerprint:
                raise RunError(
                    f"site {greeting.site} was given another experiment (fingerprints differ); hand every site the same config"
                )
            if greeting.site in self._nodes:
                raise RunError(f"two nodes answer as site {greeting.site}; stop one of its agents")
            self._nodes[greeting.site] = greeting.node_id
            self._studies[greeting.site] = greeting.studies
        missing = [site.name for site in self._experiment.data.sites if site.name not in self._nodes]
        if missing:
            raise RunError(f"no node answered for {', '.join(missing)}; start their agents, or take them out of data.sites")

    def _wait_for_nodes(self) -> list[int]:
        deadline = time.monotonic() + GREETING_DEADLINE_S
        while len(nodes := list(self._grid.get_node_ids())) < len(self._experiment.data.sites):
            if time.monotonic() > deadline:
                raise RunError(
                    f"{len(nodes)} of {len(self._experiment.data.sites)} nodes came within {GREETING_DEADLINE_S:.0f} s"
                )
            time.sleep(POLL_S)
        return nodes

    def _gather(self, current: Round, parameters: Parameters) -> Round:
        """Send the orders and take replies as they come, until all have answered or the deadline has passed."""
        waiting = self._send(current, parameters)
        deadline = time.monotonic() + self._experiment.federation.deadline_s
        while waiting and time.monotonic() < deadline:
            asked = time.monotonic()
            replies = list(self._grid.pull_messages(list(waiting)))
            for message in replies:
                order = waiting.pop(message.metadata.reply_to_message_id, None)
                if order is not None:
                    self._take(message, order, current)
            if waiting and not replies:
                time.sleep(max(0.0, POLL_S - (time.monotonic() - asked)))
        for order in waiting.values():
            self._drop(order.site.name, "no reply before the deadline", current)
        return current

    def _send(self, current: Round, parameters: Parameters) -> dict[str, Order]:
        """Order every site of the stage to train, by message id; sites of one stream get the same content, made once."""
        contents: dict[str, tuple[RecordDict, int, str, Parameters]] = {}
        waiting: dict[str, Order] = {}
        for site in config.sites_of(current.stage, self._experiment.data.sites):
            if site.stream not in contents:
                contents[site.stream] = self._content(current, for_stream(parameters, site.stream))
            content, size, base, sent = contents[site.stream]
            message = messages.order(
                self._nodes[site.name],
                content,
                round_number=current.number,
                deadline_s=self._experiment.federation.deadline_s,
            )
            order = Order(site, base, sent, size, time.time())
            ids = [one for one in self._grid.push_messages([message]) if one]  # Flower says None of what it could not send
            waiting |= dict.fromkeys(ids, order)
            current.bytes_down[site.name] = size
            if not ids:
                self._drop(site.name, "its order could not be sent", current)
        return waiting

    def _content(self, current: Round, parameters: Parameters) -> tuple[RecordDict, int, str, Parameters]:
        base = digest(parameters)
        content, size = messages.order_content(
            run=self._store.run_id,
            round_number=current.number,
            fingerprint=self._fingerprint,
            base=base,
            parameters=parameters,
        )
        return content, size, base, parameters

    def _take(self, message: Message, order: Order, current: Round) -> None:
        """Read one reply; whatever is wrong with it drops the site for this round only."""
        site = order.site
        try:
            reply = messages.read_reply(
                message,
                site=site.name,
                run=self._store.run_id,
                round_number=current.number,
                fingerprint=self._fingerprint,
                base=order.base,
                parameters=order.parameters,
            )
            check(reply.update, order.parameters)
            _check_work(reply.update, site, current.stage)
        except UpdateError as error:
            self._drop(site.name, str(error), current)
            return
        reply = _on_our_clock(reply, order.sent, time.time())
        current.replies.append(reply)
        values = {f"train/{name}": total / weight for name, (total, weight) in reply.update.metrics.items() if weight > 0}
        values |= {f"data/{stream}": float(count) for stream, count in reply.update.examples.items()}
        values |= {
            "comm/bytes_up": float(reply.bytes_up),
            "comm/bytes_down": float(order.num_bytes),
            "time/train_s": reply.train_end - reply.train_start,
        }
        self._say("site", current, site.name, values)

    def _drop(self, site: str, why: str, current: Round) -> None:
        current.failures[site] = why
        self._watch({"event": "dropped", "stage": current.stage.name, "round": current.number, "site": site, "why": why})

    def _commit(self, current: Round, committed: Committed, velocity: Parameters, started: float) -> Committed:
        """Aggregate, step, and make the round last; raises UpdateError where the replies make no round."""
        wanted = self._experiment.federation.min_sites
        if len(current.replies) < wanted:
            raise UpdateError(f"{len(current.replies)} of {len(current.bytes_down)} sites sent an update, {wanted} are needed")
        gathered = time.time()
        deltas = aggregate.aggregate([reply.update for reply in current.replies], self._experiment.aggregation)
        parameters, velocity = aggregate.outer_step(committed.parameters, deltas, velocity, current.stage.outer)
        if not all(bool(parameters[name].isfinite().all()) for name in deltas):
            raise UpdateError("the aggregated model holds values that are not finite; lower outer.lr or the sites' rates")
        aggregate_s, busy_s = time.time() - gathered, covered([(one.train_start, one.train_end) for one in current.replies])
        values = {f"train/{name}": value for name, value in sum_metrics(reply.update for reply in current.replies).items()}
        values |= {
            "time/round_s": time.time() - started,
            "time/train_s": busy_s,
            "time/aggregate_s": aggregate_s,
            "num_sites": float(len(current.replies)),
            "num_failed": float(len(current.failures)),
            "aggregate/update_norm": sum(float(delta.square().sum()) for delta in deltas.values()) ** 0.5,
        }
        self._say("round", current, None, values)
        totals = self._totals(current, committed, aggregate_s=aggregate_s, busy_s=busy_s)
        _add(totals, "rounds_s", time.time() - started)
        written = time.time()
        # Rows first: of a round that a kill left uncommitted they are dropped on resume, and a committed round has its own.
        self._store.append(current.rows)
        self._store.commit(Committed(current.number, parameters, velocity, totals))
        # What the commit itself took is in the next checkpoint.
        _add(totals, "rounds_s", time.time() - written)
        return Committed(current.number, parameters, velocity, totals)

    def _totals(self, current: Round, committed: Committed, *, aggregate_s: float, busy_s: float) -> dict[str, float]:
        """Sums over the whole run, which live in the checkpoint so that a resumed run reports all of it."""
        totals = dict(committed.totals)
        for reply in current.replies:
            site = reply.update.site
            _add(totals, f"bytes_up/{site}", reply.bytes_up)
            _add(totals, f"bytes_down/{site}", current.bytes_down[site])
            _add(totals, f"examples/{site}", sum(reply.update.examples.values()))
            _add(totals, "bytes_full_fp32", num_bytes(committed.parameters.values()))
            totals[f"studies/{site}"] = self._studies[site]
        _add(totals, "local_train_s", busy_s)
        _add(totals, "aggregate_s", aggregate_s)
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


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one interval runs."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _check_work(update: Update, site: config.Site, stage: config.Stage) -> None:
    """Raise UpdateError unless a site did the work it was asked for: counts decide its weight in the mean."""
    if update.steps != stage.local_steps:
        raise UpdateError(f"the site took {update.steps} steps, it was asked for {stage.local_steps}")
    others = sum(count for stream, count in update.examples.items() if stream != site.stream)
    if others:
        raise UpdateError(f"the site counts {others} studies of a stream that is not its own ({site.stream})")
    most = 2 * stage.local_steps * stage.batch_size  # twice: batches drawn study by study (differential privacy) vary
    if update.examples.get(site.stream, 0) > most:
        raise UpdateError(f"the site counts more than {most} studies, which its steps cannot have seen")


def _on_our_clock(reply: messages.Reply, sent: float, came: float) -> messages.Reply:
    """The reply with its training time inside the time we waited for it; a site's clock may be wrong."""
    if sent <= reply.train_start <= reply.train_end <= came:
        return reply
    length = min(max(reply.train_end - reply.train_start, 0.0), came - sent)
    return replace(reply, train_start=came - length, train_end=came)


def _add(totals: dict[str, float], name: str, value: float) -> None:
    totals[name] = totals.get(name, 0.0) + value
