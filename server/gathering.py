"""One round's messages: orders out, replies in, each screened as it comes and laid aside on disk.

A site that errs, is late or sends something unusable is dropped for the round, and nobody else.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation import screening
from fedmix.federation.screening import Norms, Screen
from fedmix.federation.update import REACHED_BY, base_of, group_of, tower_of
from server import messages
from server.accounts import Taken, facts_of_site, on_our_clock
from server.books import Books
from server.roster import POLL_S, Roster
from server.secure import SecureRound
from server.spool import Coded, Spool
from server.store import Committed, Parameters, Row, row_of

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
    watch: Watch
    taken: list[Taken] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    privacy: Mapping[str, float] = field(default_factory=dict)  # what the server's own ledger holds with it

    def say(self, event: str, site: str | None, values: Mapping[str, float]) -> None:
        """A row of metrics.jsonl, of a site or of the whole round."""
        row = row_of(event, stage=self.stage.name, round_number=self.number, site=site, values=values)
        self.rows.append(row)
        self.watch(row)

    def tell(self, event: str, site: str | None, why: str) -> None:
        """What went wrong, to whoever watches; it stands in no row."""
        self.watch({"event": event, "stage": self.stage.name, "round": self.number, "site": site, "why": why})

    def drop(self, site: str, why: str) -> None:
        """Go on without a site."""
        self.failures[site] = why
        self.tell("dropped", site, why)


class Gathering:
    """Sends a round's orders over a Grid and takes what comes back."""

    def __init__(self, grid: Grid, experiment: config.Experiment, roster: Roster, *, run: str, books: Books | None) -> None:
        self._grid, self._experiment, self._roster, self._run, self._books = grid, experiment, roster, run, books
        self._fingerprint = experiment.fingerprint()

    def gather(self, current: Round, committed: Committed, screen: Screen, spool: Spool) -> None:
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
                current.drop(sent.order.site.name, "no reply before the deadline")
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
        """The sites that are known and whose agents are connected; the others are dropped."""
        self._roster.welcome()
        known = [site for site in chosen if site.name not in self._roster.absent]
        away = self._roster.away(site.name for site in known)
        why = dict.fromkeys(sorted(away), "its agent is not connected")
        for site, reason in (self._roster.absent | why).items():
            if site in {one.name for one in chosen}:
                current.drop(site, reason)
        return [site for site in known if site.name not in away]

    def _agreed(self, current: Round, secure: SecureRound, chosen: Sequence[config.Site]) -> list[config.Site]:
        """The sites that have exchanged their keys for a secure sum; the others are dropped."""
        try:
            return secure.agree(chosen)
        finally:
            for site, why in sorted(secure.failures.items()):
                current.drop(site, why)

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
            current.drop(order.site.name, "its order could not be sent")
        return dict.fromkeys(ids, sent)

    def _order(self, site: config.Site, current: Round, parameters: Parameters) -> messages.Order:
        shapes = {name: value.shape for name, value in for_stream(parameters, site.stream).items()}
        groups = {group: current.groups[group] for group in sorted({group_of(name) for name in shapes})}
        return messages.Order(
            site=site,
            run=self._run,
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
                current.drop(site.name, messages.reason(message))
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
            current.drop(site.name, f"{error} (strike {strikes}{last})")
            return
        taken = on_our_clock(
            Taken(spool.add(update), reply.examples, reply.bytes_up, reply.train_start, reply.train_end, reply.privacy),
            sent.sent,
            time.time(),
        )
        current.taken.append(taken)
        current.say("site", site.name, facts_of_site(taken, current.bytes_down[site.name]))

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


def for_stream(parameters: Parameters, stream: config.StreamName) -> Parameters:
    """The parameters that a site of this stream can train: the towers its losses reach. Nothing else is sent to it."""
    return {name: value for name, value in parameters.items() if stream in REACHED_BY[tower_of(group_of(name))]}
