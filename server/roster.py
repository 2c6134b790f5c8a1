"""Who takes part: which node is which site, what it registered, which sites a round asks, and what they already hold."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Iterable, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedmix import config
from fedmix.batch import STREAMS
from fedmix.errors import RunError, UpdateError
from fedmix.federation.local import seed_of
from server import messages
from server.books import Books

POLL_S = 0.05
GREETING_POLL_S = 0.5  # kinder to a link over which the sites come one by one
GREETING_DEADLINE_S = 120.0
RETURN_S = 120.0  # so long a round waits for an agent that was there; the SuperLink lets a killed one back in after a minute


class Roster:
    """The sites of an experiment behind a Grid.

    In a run over real sites, which has ``books``, a node is asked who it is only if its key is registered under a site's name,
    and is believed no other name. In a simulation every node is asked, and those that are no site are sent nothing else.
    """

    def __init__(self, grid: Grid, experiment: config.Experiment, *, run: str = "", books: Books | None = None) -> None:
        self._grid, self._experiment, self._run, self._books = grid, experiment, run, books
        self._fingerprint = experiment.fingerprint()
        self.nodes: dict[str, int] = {}
        self.studies: dict[str, int] = {}
        self._held: dict[str, dict[str, str]] = {}  # site -> group -> digest
        self._given_up: set[str] = set()
        self._goes_on_without = False
        self.absent: dict[str, str] = {}  # site -> why a run that was taken up goes on without it for now

    def greet(self, *, is_taken_up: bool = False) -> None:
        """Learn which node is which site; every site of the experiment must be there and run the same experiment.

        A node that goes offline before it has answered is waited for, and asked again. A run over real sites that is taken
        up goes on without those that do not come or refuse: its quorum says how many it needs, and ``welcome`` lets them in.
        """
        self._goes_on_without = is_taken_up and self._books is not None
        deadline = time.monotonic() + GREETING_DEADLINE_S
        while self._ask(self._wait_for_nodes(deadline)) and time.monotonic() < deadline:
            pass
        missing = [site.name for site in self._experiment.data.sites if site.name not in self.nodes]
        if missing and not self._goes_on_without:
            raise RunError(f"no node answered for {', '.join(missing)}; start their agents, or take them out of data.sites")
        self.absent = dict.fromkeys(missing, "its agent has not come since the run was taken up") | self.absent

    def welcome(self) -> None:
        """Ask sites that a run was taken up without, and whose agents are connected by now, who they are."""
        if self.absent:
            self._ask({node.node_id: node.name for node in self._grid.get_nodes() if node.name in self.absent})

    def away(self, sites: Iterable[str]) -> set[str]:
        """Those of some sites whose agents are not connected, once they have had time to come back.

        A site that did not use that time is not waited for again before it has been seen. In a simulation nobody is away.
        """
        if self._books is None:
            return set()
        wanted, deadline = set(sites), time.monotonic() + RETURN_S
        while True:
            online = {node.name for node in self._grid.get_nodes()}
            missing = wanted - online
            self._given_up -= online
            if not missing - self._given_up or time.monotonic() > deadline:
                self._given_up |= missing
                return missing
            time.sleep(GREETING_POLL_S)

    def chosen(self, stage: config.Stage, round_number: int, excluded: Collection[str]) -> list[config.Site]:
        """The sites that a round asks: of each stream the share ``federation.participation``, at least one.

        Which ones follows from seed and round, so a resumed round asks the same. ``excluded`` are never asked.
        """
        able = [site for site in config.sites_of(stage, self._experiment.data.sites) if site.name not in excluded]
        names: set[str] = set()
        for stream in STREAMS:
            of_stream = sorted(site.name for site in able if site.stream == stream)
            number = math.ceil(self._experiment.federation.participation * len(of_stream))
            draw = random.Random(seed_of(self._experiment.seed, "sites of a round", round_number, stream))
            names.update(draw.sample(of_stream, number))
        return [site for site in able if site.name in names]

    def lacks(self, site: str, groups: Mapping[str, str]) -> frozenset[str]:
        """The groups that the site is not known to hold in just this state, and has to be sent."""
        held = self._held.get(site, {})
        return frozenset(group for group, digest in groups.items() if held.get(group) != digest)

    def holds(self, site: str, groups: Mapping[str, str]) -> None:
        """A site has answered an order over these groups, so it has them."""
        self._held.setdefault(site, {}).update(groups)

    def forget(self, site: str) -> None:
        """A site has lost what it held."""
        self._held.pop(site, None)

    def _ask(self, registered: Mapping[int, str]) -> bool:
        """Ask nodes that are not known yet who they are; whether one of them went offline before it answered."""
        plan = "" if self._books is None else self._books.plan
        known = set(self.nodes.values())
        asked = [messages.query(node, fingerprint=self._fingerprint, plan=plan) for node in registered if node not in known]
        if self._books is not None:
            for query in asked:
                self._books.asked(query, registered[query.metadata.dst_node_id], self._run)
        # A site reads its whole shard before it answers, so it has at least as long as for a round.
        deadline_s = max(GREETING_DEADLINE_S, self._experiment.federation.deadline_s)
        answers = list(self._grid.send_and_receive(asked, timeout=deadline_s))
        # By what an answer answers, and not by whom it says that it is from: the SuperLink may answer for a node.
        node_of = {query.metadata.message_id: query.metadata.dst_node_id for query in asked}
        for answer in answers:
            node_id = node_of[answer.metadata.reply_to_message_id]
            name = registered[node_id]
            try:
                self._know(self._read(answer, name), node_id)
            except RunError as error:
                if not self._goes_on_without:
                    raise
                self.absent[name] = str(error).removeprefix(f"site {name}: ")
        return any(map(messages.is_offline, answers))

    def _know(self, greeting: messages.Greeting | None, node_id: int) -> None:
        """Take a node for the site that it says it is; raises RunError if that cannot be."""
        if greeting is None or greeting.site not in {site.name for site in self._experiment.data.sites}:
            return
        if greeting.fingerprint != self._fingerprint:
            raise RunError(
                f"site {greeting.site} was given another experiment (fingerprints differ); hand every site the same config"
            )
        if greeting.site in self.nodes:
            raise RunError(f"two nodes answer as site {greeting.site}; stop one of its agents")
        self.nodes[greeting.site] = node_id
        self.studies[greeting.site] = greeting.studies
        self.absent.pop(greeting.site, None)

    def _read(self, answer: Message, name: str) -> messages.Greeting | None:
        """A node's greeting, written down, or None if it went offline; raises RunError with its own reason if it refused."""
        try:
            greeting = messages.read_greeting(answer)
            if self._books is not None and greeting.site != name:
                raise UpdateError("its node answers under another name than its key is registered under; its agent is misled")
        except UpdateError as error:
            if self._books is None:
                raise RunError(str(error)) from None
            self._books.answered(answer, name, self._run, head="", why=str(error))
            if messages.is_offline(answer):
                return None
            raise RunError(f"site {name}: {error}") from None
        if self._books is not None:
            self._books.answered(answer, name, self._run, head=greeting.ledger, why=None)
        return greeting

    def _wait_for_nodes(self, deadline: float) -> dict[int, str]:
        """Ids of the nodes to ask, and the names that their keys are registered under, which a simulation has none of."""
        sites = [site.name for site in self._experiment.data.sites]
        while True:
            if self._books is None:
                nodes = dict.fromkeys(self._grid.get_node_ids(), "")
            else:
                nodes = {node.node_id: node.name for node in self._grid.get_nodes() if node.name in sites}
            if len(nodes) >= len(sites):
                return nodes
            if time.monotonic() > deadline:
                if nodes and self._goes_on_without:
                    return nodes
                missing = f" ({', '.join(sorted(set(sites) - set(nodes.values())))} missing)" if self._books is not None else ""
                raise RunError(f"{len(nodes)} of {len(sites)} nodes came within {GREETING_DEADLINE_S:.0f} s{missing}")
            time.sleep(GREETING_POLL_S)
