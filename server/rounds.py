"""The round loop over a Flower Grid: order, wait with a deadline, drop what failed, aggregate, commit.

Flower's own Strategy.start has no deadline a site, no checkpoint, no early stop, and ends the run on one odd reply. Here
a site that errs, is late or sends something unusable is dropped for the round; a round without enough sites is a failure
and never a success; and after some failed rounds in a row the run stops and says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmix import config
from fedmix.errors import RunError, UpdateError
from fedmix.federation import aggregate
from fedmix.federation.local import sum_metrics
from fedmix.federation.update import REACHED_BY, check, digest, group_of, num_bytes, tower_of
from server import messages
from server.store import Committed, Parameters, RunStore

POLL_S = 0.02
GREETING_DEADLINE_S = 120.0

Watch = Callable[[Mapping[str, Any]], None]


@dataclass
class Round:
    """What one round gathers while replies come in."""

    number: int
    stage: config.Stage
    replies: list[messages.Reply] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)


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
        if committed.round_number < self._experiment.num_rounds:
            self._greet()
        failed_in_a_row = 0
        while committed.round_number < self._experiment.num_rounds:
            started = time.time()
            stage, round_in_stage = self._experiment.stage_of(committed.round_number + 1)
            velocity = committed.velocity if round_in_stage else {}
            current = self._gather(Round(committed.round_number + 1, stage), committed.parameters)
            if len(current.replies) < self._experiment.federation.min_sites:
                failed_in_a_row += 1
                self._give_up_after(failed_in_a_row, current)
                continue
            failed_in_a_row = 0
            committed = self._commit(current, committed, velocity, started)
            if self._on_committed is not None:
                self._on_committed(committed.round_number, stage.name, committed.parameters)
        return committed

    def _greet(self) -> None:
        """Learn which node is which site; every site of the experiment must be there and run the same experiment."""
        asked = [messages.query(node_id) for node_id in self._wait_for_nodes()]
        for answer in self._grid.send_and_receive(asked, timeout=GREETING_DEADLINE_S):
            try:
                greeting = messages.read_greeting(answer)
            except UpdateError as error:
                raise RunError(str(error)) from None
            if greeting.fingerprint != self._fingerprint:
                raise RunError(
                    f"site {greeting.site} was given another experiment (fingerprints differ); hand every site the same config"
                )
            self._nodes[greeting.site] = greeting.node_id
            self._studies[greeting.site] = greeting.studies
        missing = [site.name for site in self._experiment.data.sites if site.name not in self._nodes]
        if missing:
            raise RunError(f"no node answered for {', '.join(missing)}; start their agents, or take them out of data.sites")

    def _wait_for_nodes(self) -> list[int]:
        deadline = time.time() + GREETING_DEADLINE_S
        while len(nodes := list(self._grid.get_node_ids())) < len(self._experiment.data.sites):
            if time.time() > deadline:
                raise RunError(
                    f"{len(nodes)} of {len(self._experiment.data.sites)} nodes came within {GREETING_DEADLINE_S:.0f} s"
                )
            time.sleep(POLL_S)
        return nodes

    def _gather(self, current: Round, parameters: Parameters) -> Round:
        """Send the orders and take replies as they come, until all have answered or the deadline has passed."""
        sites = config.sites_of(current.stage, self._experiment.data.sites)
        waiting: dict[str, tuple[config.Site, str]] = {}
        for site in sites:
            sent = for_stream(parameters, site.stream)
            base = digest(sent)
            message, current.bytes_down[site.name] = messages.order(
                self._nodes[site.name],
                run=self._store.run_id,
                round_number=current.number,
                fingerprint=self._fingerprint,
                base=base,
                parameters=sent,
            )
            waiting |= dict.fromkeys(self._grid.push_messages([message]), (site, base))
        deadline = time.time() + self._experiment.federation.deadline_s
        while waiting and time.time() < deadline:
            for message in list(self._grid.pull_messages(list(waiting))):
                site, base = waiting.pop(message.metadata.reply_to_message_id)
                self._take(message, site, base, current, parameters)
            if waiting:
                time.sleep(POLL_S)
        for site, _ in waiting.values():
            self._drop(site.name, "no reply before the deadline", current)
        return current

    def _take(self, message: Message, site: config.Site, base: str, current: Round, parameters: Parameters) -> None:
        """Read one reply; whatever is wrong with it drops the site for this round only."""
        try:
            reply = messages.read_reply(
                message,
                site=site.name,
                run=self._store.run_id,
                round_number=current.number,
                fingerprint=self._fingerprint,
                base=base,
            )
            check(reply.update, for_stream(parameters, site.stream))
        except UpdateError as error:
            self._drop(site.name, str(error), current)
            return
        current.replies.append(reply)
        values = {f"train/{name}": total / weight for name, (total, weight) in reply.update.metrics.items() if weight > 0}
        values |= {f"data/{stream}": float(count) for stream, count in reply.update.examples.items()}
        values |= {
            "comm/bytes_up": float(reply.bytes_up),
            "comm/bytes_down": float(current.bytes_down[site.name]),
            "time/train_s": reply.train_end - reply.train_start,
        }
        self._say("site", current, site.name, values)

    def _drop(self, site: str, why: str, current: Round) -> None:
        current.failures[site] = why
        self._watch({"event": "dropped", "stage": current.stage.name, "round": current.number, "site": site, "why": why})

    def _commit(self, current: Round, committed: Committed, velocity: Parameters, started: float) -> Committed:
        """Aggregate, step, and make the round last."""
        gathered = time.time()
        deltas = aggregate.aggregate([reply.update for reply in current.replies], self._experiment.aggregation)
        parameters, velocity = aggregate.outer_step(committed.parameters, deltas, velocity, current.stage.outer)
        totals = dict(committed.totals)
        # Sums over the whole run live in the checkpoint, so that a resumed run reports all of it.
        busy_s = covered([(reply.train_start, reply.train_end) for reply in current.replies])
        for reply in current.replies:
            site = reply.update.site
            _add(totals, f"bytes_up/{site}", reply.bytes_up)
            _add(totals, f"bytes_down/{site}", current.bytes_down[site])
            _add(totals, f"examples/{site}", sum(reply.update.examples.values()))
            _add(totals, "bytes_full_fp32", num_bytes(committed.parameters.values()))
            totals[f"studies/{site}"] = self._studies[site]
        _add(totals, "local_train_s", busy_s)
        _add(totals, "aggregate_s", time.time() - gathered)
        _add(totals, "rounds_s", time.time() - started)
        result = Committed(current.number, parameters, velocity, totals)
        written = time.time()
        self._store.commit(result)
        _add(totals, "rounds_s", time.time() - written)
        norm = sum(float(delta.square().sum()) for delta in deltas.values()) ** 0.5
        values = {f"train/{name}": value for name, value in sum_metrics(reply.update for reply in current.replies).items()}
        values |= {
            "time/round_s": time.time() - started,
            "time/train_s": busy_s,
            "time/aggregate_s": time.time() - gathered,
            "num_sites": float(len(current.replies)),
            "num_failed": float(len(current.failures)),
            "aggregate/update_norm": norm,
        }
        self._say("round", current, None, values)
        return result

    def _give_up_after(self, failed_in_a_row: int, current: Round) -> None:
        causes = "; ".join(f"{site}: {why}" for site, why in sorted(current.failures.items())) or "no site was asked"
        if failed_in_a_row >= self._experiment.federation.max_failed_rounds:
            raise RunError(
                f"round {current.number} failed {failed_in_a_row} times in a row ({causes}); "
                "mend the cause and go on with --resume"
            )

    def _say(self, event: str, current: Round, site: str | None, values: Mapping[str, float]) -> None:
        self._watch(self._store.log(event, stage=current.stage.name, round_number=current.number, site=site, values=values))


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


def _add(totals: dict[str, float], name: str, value: float) -> None:
    totals[name] = totals.get(name, 0.0) + value
