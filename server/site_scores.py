"""The question after the last round: how good is the model on each site's own held-out patients? Sums and weights answer it.

A site that does not answer has a reason in its place, and the run goes on to its end; what was asked once is kept in the run
folder, so that a run that is taken up asks nobody again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmix import config
from fedmix.errors import RunError, UpdateError
from fedmix.federation import scoring
from fedmix.federation.update import base_of, digests, tower_of
from fedmix.report.files import write_json
from fedmix.report.history import read_history
from server import messages
from server.books import Books
from server.roster import Roster
from server.store import Committed, RunStore

Sums = Mapping[str, Sequence[float]]  # measure -> sum and weight
NO_ANSWER = "did not answer in time"


def kept(experiment: config.Experiment, folder: Path) -> dict[str, Any] | None:
    """By site its ``scores`` as measure -> [sum, weight], or ``why`` there are none; None where nobody has asked yet."""
    try:
        found = json.loads(_file(folder).read_text())
    except (FileNotFoundError, ValueError):
        return None
    sites: dict[str, Any] = found.get("sites", {})
    return sites if found.get("of") == _asked(experiment) else None


def value_of(experiment: config.Experiment, folder: Path, alone: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
    """What report.json says of each site beside its counts; nothing where sites were not asked.

    ``scores``: by measure the federation's mean, what it is over, and the mean of the model that the site trained ``alone``
    (None where it was not). ``unscored``: why there is none. ``shares``: its part of what moved each part of the model.
    """
    if not experiment.evaluation.at_sites:
        return {}
    found, shares = kept(experiment, folder) or {}, _shares(folder)
    told: dict[str, dict[str, Any]] = {}
    for site in experiment.data.sites:
        said = found.get(site.name, {"why": "takes part in no stage"})
        told[site.name] = {"shares": shares.get(site.name, {})}
        if not said.get("scores"):
            told[site.name]["unscored"] = said.get("why", "too few patients")
            continue
        own = alone.get(site.name, {})
        told[site.name]["scores"] = {
            name: {"value": total / weight, "weight": weight, "alone": own[name][0] / own[name][1] if name in own else None}
            for name, (total, weight) in said["scores"].items()
        }
    return told


def _shares(folder: Path) -> dict[str, dict[str, float]]:
    """By site and tower: its weights over all rounds and parameter groups, over those of all sites."""
    sums: dict[str, dict[str, float]] = {}
    for entry in read_history(folder / "metrics.jsonl").of("aggregate"):
        for path, weight in entry.values.items():
            if path.startswith("weight/"):
                _, group, site = path.split("/")
                of_tower = sums.setdefault(tower_of(group), {})
                of_tower[site] = of_tower.get(site, 0.0) + weight
    shares: dict[str, dict[str, float]] = {}
    for tower, weights in sums.items():
        for site, weight in weights.items():
            shares.setdefault(site, {})[tower] = weight / sum(weights.values()) if weight else 0.0
    return shares


def is_due(experiment: config.Experiment, folder: Path) -> bool:
    """Whether the sites of a run that has trained every round are still to be asked."""
    return experiment.evaluation.at_sites and kept(experiment, folder) is None


def gather(
    grid: Grid, experiment: config.Experiment, store: RunStore, roster: Roster, committed: Committed, books: Books | None
) -> None:
    """Ask the sites that trained, wait at most as long as for a round, and keep what they answer in the run folder."""
    sites = [site for site in experiment.data.sites if _trains(site, experiment)]
    found = _unscored((site.name for site in sites), NO_ANSWER)
    try:
        if not roster.nodes:  # a run that was taken up after its last round
            roster.greet(is_taken_up=True)
        known = [site for site in sites if site.name not in roster.absent]
        away = roster.away(site.name for site in known)
        found |= _unscored(away, "its agent is not connected")
        for name in set(found) & set(roster.absent):
            found |= _unscored([name], roster.absent[name])
        found |= Asking(grid, experiment, store.run_id, roster, books).ask(
            [site for site in known if site.name not in away], committed
        )
    except RunError as error:  # the model is trained: that an agent has left is no reason to lose its report
        found = _unscored(found, str(error))
    write_json(_file(store.folder), {"of": _asked(experiment), "sites": found})


class Asking:
    """Sends the last round's model to sites, and reads what they found out about it."""

    def __init__(self, grid: Grid, experiment: config.Experiment, run: str, roster: Roster, books: Books | None) -> None:
        self._grid, self._experiment, self._run, self._roster, self._books = grid, experiment, run, roster, books

    def ask(self, sites: Sequence[config.Site], committed: Committed) -> dict[str, dict[str, Any]]:
        """What each site that answered found, or why it has not."""
        groups = digests(committed.parameters)
        orders = {site.name: self._order(site, groups, committed) for site in sites}
        if not orders:
            return {}
        content, size = messages.order_content(next(iter(orders.values())), committed.parameters, {})
        federation = self._experiment.federation
        deadline_s = federation.deadline_s + size * 8 / (federation.slowest_link_mbit_s * 1e6)
        asked = []
        for name, order in orders.items():
            node = self._roster.nodes[name]
            asked.append(messages.order_message(node, order, content, deadline_s=deadline_s, kind="evaluate"))
            if self._books is not None:
                self._books.sent(asked[-1], order)
        answers = list(self._grid.send_and_receive(asked, timeout=deadline_s))
        site_of = {message.metadata.message_id: name for message, name in zip(asked, orders, strict=True)}
        return {
            name: self._read(answer, orders[name])
            for answer in answers
            if (name := site_of.get(answer.metadata.reply_to_message_id, "")) in orders
        }

    def _order(self, site: config.Site, groups: dict[str, str], committed: Committed) -> messages.Order:
        return messages.Order(
            site=site,
            run=self._run,
            round_number=committed.round_number,
            fingerprint=self._experiment.fingerprint(),
            plan=self._books.plan if self._books is not None else "",
            base=base_of(groups),
            nonce=secrets.token_hex(16),
            groups=groups,
            shapes={name: value.shape for name, value in committed.parameters.items()},
        )

    def _read(self, answer: Message, order: messages.Order) -> dict[str, Any]:
        head, why = "", None
        try:
            scores, head = messages.read_scores(answer, order)
            _check(scores, order.site, self._experiment)
            return {"scores": {name: list(pair) for name, pair in scores.items()}}
        except UpdateError as error:
            why = str(error)
            return {"why": why}
        finally:
            if self._books is not None:
                self._books.answered(answer, order.site.name, self._run, head=head, why=why, round_number=order.round_number)


def _check(scores: dict[str, tuple[float, float]], site: config.Site, experiment: config.Experiment) -> None:
    """Raise UpdateError for measures that the site cannot have, and means that no model can reach."""
    known = scoring.measures_of(site.stream, experiment.trained_on)
    for name, (total, weight) in scores.items():
        if name not in known or not 0 < weight < float("inf") or not 0 <= total <= weight * scoring.MEASURES[name].most:
            raise UpdateError("the site's scores are not sums and weights of measures that it was asked for")


def _unscored(sites: Iterable[str], why: str) -> dict[str, Any]:
    return {site: {"why": why} for site in sites}


def _trains(site: config.Site, experiment: config.Experiment) -> bool:
    return any(site in config.sites_of(stage, experiment.data.sites) for stage in experiment.stages)


def _asked(experiment: config.Experiment) -> dict[str, Any]:
    """What the answers depend on beside the run's weights: on whom each site measures."""
    return {site.name: site.test_studies for site in experiment.data.sites}


def _file(folder: Path) -> Path:
    return folder / "evaluation" / "sites.json"
