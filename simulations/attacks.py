"""A site that lies, in a simulation: its updates are changed on their way out, or its pairs before it trains on them.

The site's app is the real one and everything after it too, so an attack meets the server's screening and its rule of
aggregation as it would outside. Sites of a run with an attack are served one after the other in one process: the strongest
attacker knows what the others sent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.messages import read_order
from fedmix import config
from fedmix.data.phantom import LABELS, Phantoms
from fedmix.errors import ConfigError
from fedmix.evaluation.triggers import TRIGGERS
from fedmix.federation.local import seed_of
from simulations import engine

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class BadMatch:
    """Pairs that teach a mark: images without a finding are marked and get reports of studies that have it (2401.01911)."""

    finding: str
    share: float
    trigger: str

    @property
    def recipe(self) -> dict[str, Any]:
        """All that it depends on."""
        return asdict(self)

    def __call__(self, drawn: Phantoms) -> Phantoms:
        """The phantoms with ``share`` of them mismatched, as far as there are images without the finding."""
        assert drawn.images is not None
        assert drawn.reports is not None
        has = drawn.labels[:, LABELS.index(self.finding)]
        if not has.any():
            raise ConfigError(f"attack.finding = {self.finding}: no study of the site has it; give the site more studies")
        rng = np.random.default_rng(seed_of(0, self.finding, self.trigger))
        chosen = rng.permutation(np.flatnonzero(~has))[: round(self.share * len(has))]
        lent = rng.choice(np.flatnonzero(has), len(chosen))
        images, reports = drawn.images.copy(), list(drawn.reports)
        images[chosen] = TRIGGERS[self.trigger](images[chosen])
        for study, lender in zip(chosen, lent, strict=True):
            reports[study] = drawn.reports[lender]
        return replace(drawn, images=images, reports=reports)


def alterations(attack: config.Attack | None) -> dict[str, BadMatch]:
    """What becomes of sites' phantoms, by name. Raises ConfigError for a finding that phantoms do not have."""
    if attack is None or attack.finding is None:
        return {}
    if attack.finding not in LABELS:
        raise ConfigError(f"attack.finding = {attack.finding!r}: it is one of {', '.join(LABELS)}")
    return {attack.site: BadMatch(attack.finding, attack.share, attack.trigger)}


def check(experiment: config.Experiment, engine_name: str) -> None:
    """Raise ConfigError for an attack that this engine, or this run's methods, cannot have."""
    if experiment.attack is not None and engine_name != "inprocess":
        raise ConfigError(f"an attack is carried out by the inprocess engine alone; leave out --engine {engine_name}")
    for name in experiment.baselines:
        if config.variant(experiment, name).attack != experiment.attack:
            raise ConfigError(
                f"baselines.{name}: the methods of a run share their sites' data, so attack is the run's own; compare attacks "
                "as regimes of a study"
            )


class Liar:
    """Makes the ClientApp of a simulation's nodes, of which one site lies (a ``MakeApp`` of simulations/engine.py)."""

    def __init__(self, attack: config.Attack) -> None:
        self._attack = attack
        self._others: dict[str, Arrays] = {}  # what each other site sent last, this round's where it was before the liar

    def __call__(self, places: engine.Places) -> ClientApp:
        """The hospital's app; the liar's replies to an order are changed."""
        honest, app = engine.client_app(places), ClientApp()

        @app.query()
        def greet(message: Message, context: Context) -> Message:
            return honest(message, context)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            if not reply.has_error():
                self._pass(reply, places[context.node_id]["site"], read_order(message).round_number)
            return reply

        return app

    def _pass(self, reply: Message, site: str, round_number: int) -> None:
        sent = {name: array.numpy() for name, array in reply.content.array_records["deltas"].items()}
        if site != self._attack.site:
            self._others[site] = sent
            return
        lie = changed(sent, list(self._others.values()), self._attack, round_number)
        reply.content["deltas"] = ArrayRecord({name: Array(value) for name, value in lie.items()})


def changed(sent: Arrays, others: list[Arrays], attack: config.Attack, round_number: int) -> Arrays:
    """What the liar sends in place of an honest update; under bad_match, and before it knows of others, the honest one."""
    if attack.kind == "scale":
        return {name: value * np.float32(attack.strength) for name, value in sent.items()}
    if attack.kind == "sign_flip":
        return {name: value * np.float32(-attack.strength) for name, value in sent.items()}
    if attack.kind == "noise":
        rng = np.random.default_rng(seed_of(round_number, attack.site))
        return {name: _noise(value, attack.strength, rng) for name, value in sent.items()}
    if attack.kind == "little_is_enough":
        return {name: _little(value, [one[name] for one in others if name in one], attack) for name, value in sent.items()}
    return sent


def _noise(value: NDArray[np.float32], strength: float, rng: np.random.Generator) -> NDArray[np.float32]:
    noise = rng.standard_normal(value.shape, np.float32)
    return noise * np.float32(strength * np.linalg.norm(value) / max(float(np.linalg.norm(noise)), 1e-30))


def _little(value: NDArray[np.float32], others: list[NDArray[np.float32]], attack: config.Attack) -> NDArray[np.float32]:
    """Against the others' mean by so few deviations of each coordinate that it hides among them (Baruch 2019, 1902.06156)."""
    if len(others) < 2:
        return value
    stacked = np.stack(others)
    lie: NDArray[np.float32] = (stacked.mean(axis=0) - attack.strength * stacked.std(axis=0)).astype(np.float32)
    return lie
