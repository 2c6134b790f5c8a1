"""Sites of a secure sum without models: every phase's real code at both ends, over messages that are serialised on the way."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from little import AtOnce, values, wired
from numpy.typing import NDArray
from torch import Size

from client import messages as site_messages
from client.secure import SecureSite
from fedmix import config
from fedmix.errors import FedmixError
from fedmix.federation import secure_sum
from fedmix.federation.update import REACHED_BY, group_of, tower_of
from server import messages
from server.roster import Roster
from server.secure import SecureRound

SHAPES = {
    "blocks.0.attention.qkv.weight": Size((7, 5)),
    "blocks.0.mlp.image.weight": Size((4, 3)),
    "patch_decoder.weight": Size((6,)),
    "word_head.weight": Size((2, 9)),
    "projection.image.weight": Size((3, 3)),
}
FAR = dict.fromkeys(map(group_of, SHAPES), 1e6)
Changes = Mapping[str, NDArray[np.float32]]
Tamper = Callable[[Message], Message]


def experiment(streams: Iterable[str], **wanted: Any) -> config.Experiment:
    """An experiment of so many sites in one stage; their studies are never drawn."""
    stage = {"name": "all", "rounds": 3, "local_steps": 2, "batch_size": 8}
    plain = values(Path("unused"), stages=[stage], aggregation={"clip": None}, secure_sum={"clip": 0.5} | wanted)
    plain["data"]["sites"] = [
        {"name": f"site{number}", "stream": stream, "phantom": {"studies": 24, "look": "north", "seed": number}}
        for number, stream in enumerate(streams)
    ]
    return config.build(plain, source="the test")


def plain_rounds(folder: Path, *, rounds: int = 1, **changes: Any) -> dict[str, Any]:
    """One stage for all three sites; nothing that only the one paired site trains."""
    stage = {"name": "all", "rounds": rounds, "local_steps": 1, "batch_size": 4}
    stage["objectives"] = {"contrast": 0.0, "match": 0.0, "joint_share": 0.0}  # type: ignore[assignment]
    return values(folder, stages=[stage], aggregation={"clip": None}, **changes)


def summed_rounds(folder: Path, **changes: Any) -> dict[str, Any]:
    """The same with a secure sum."""
    return plain_rounds(folder, secure_sum={"threshold": 2, "clip": 0.1}, **changes)


def shapes_of(stream: str) -> dict[str, Size]:
    """What a site of a stream trains."""
    return {name: shape for name, shape in SHAPES.items() if stream in REACHED_BY[tower_of(group_of(name))]}


class Crowd(AtOnce):
    """A Grid of sites that answer the phases of a secure sum.

    ``silent``: by phase the sites that do not answer. ``on_way``: by phase what becomes of a message to a site; ``back``: of a
    site's answer.
    """

    def __init__(self, folder: Path, wanted: config.Experiment, *, registered: bool = False) -> None:
        super().__init__()
        self.folder, self.experiment, self.run_id = folder, wanted, "crowd"
        self.sites = list(wanted.data.sites)
        self.studies = {site.name: 5 + 3 * number for number, site in enumerate(self.sites)}
        chance = np.random.default_rng(len(self.sites))
        self.changes: dict[str, Changes] = {
            site.name: {
                name: chance.normal(0.0, 0.1, shape).astype(np.float32) for name, shape in shapes_of(site.stream).items()
            }
            for site in self.sites
        }
        self.silent: dict[str, Collection[str]] = {}
        self.on_way: dict[str, Tamper] = {}
        self.back: dict[str, Tamper] = {}
        self.keys: Mapping[str, str] | None = {} if registered else None
        self.said: list[tuple[str, str, Message]] = []  # phase, site, what it answered
        self.asked: list[Message] = []
        self.roster = Roster(self, wanted)
        self.roster.nodes = {site.name: number for number, site in enumerate(self.sites, start=2)}
        self.roster.studies = dict(self.studies)

    def round(self, number: int = 1) -> SecureRound:
        """An attempt at a round."""
        settings = self.experiment.secure_sum
        assert settings is not None
        return SecureRound(self, self.experiment, settings, self.roster, run=self.run_id, round_number=number, books=None)

    def train(self, secure: SecureRound, sites: Iterable[config.Site], *, number: int = 1) -> dict[str, str]:
        """Order the sites to train, and take what they send; what went wrong, by site."""
        failures = {}
        for site in sites:
            if site.name in self.silent.get("train", ()):
                continue
            order = self.order(site, number)
            content = RecordDict({"sum": secure.part_of(site.name)})
            message = messages.order_message(self.roster.nodes[site.name], order, content, deadline_s=9.0)
            answer = self.answer(message)
            try:
                if answer.has_error():
                    raise FedmixError(messages.reason(answer))
                secure.take(answer, order)
            except FedmixError as error:
                failures[site.name] = str(error)
        return failures

    def order(self, site: config.Site, number: int = 1) -> messages.Order:
        """The order to train."""
        words = {"base": f"base of round {number}", "nonce": "n", "plan": "", "groups": {}}
        fingerprint = self.experiment.fingerprint()
        shapes = shapes_of(site.stream)
        return messages.Order(site=site, run=self.run_id, round_number=number, fingerprint=fingerprint, shapes=shapes, **words)  # type: ignore[arg-type]

    def answer(self, message: Message) -> Message:
        """What a site answers, as it arrives."""
        name = next(site for site, node in self.roster.nodes.items() if node == message.metadata.dst_node_id)
        phase = message.metadata.message_type.removeprefix("query.")
        if message.metadata.message_id == "":
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        self.asked.append(message)
        received = wired(self.on_way.get(phase, lambda one: one)(message))
        try:
            said = self._done(name, phase, received)
        except FedmixError as error:
            said = Message(Error(code=1001, reason=str(error)), reply_to=received)
        self.said.append((phase, name, said))
        return wired(self.back.get(phase, lambda one: one)(said))

    def site(self, name: str, message: Message) -> SecureSite:
        """A site, as a new process that a message has started."""
        phase = site_messages.read_phase(message)
        stage, _ = self.experiment.stage_of(phase.round_number)
        assert self.experiment.secure_sum is not None
        return SecureSite(
            site=name,
            phase=phase,
            streams={one.name: one.stream for one in self.sites},
            studies=self.studies[name],
            stage=stage,
            settings=self.experiment.secure_sum,
            aggregation=self.experiment.aggregation,
            state=self.folder / name,
            key=None,
            registered=self.keys or None,
        )

    def _done(self, name: str, phase: str, message: Message) -> Message:
        secure = self.site(name, message)
        if phase == "keys":
            signed = secure.make_keys()
            values = ConfigRecord({"content": signed.content, "signature": signed.signature, "signer": signed.signer})
        elif phase == "shares":
            values = ConfigRecord(dict(secure.write_letters(site_messages.read_roster(message))))
        elif phase == "unmask":
            revealed = secure.reveal(site_messages.read_by_site(message, "signatures"))
            values = ConfigRecord({str(tower): shares for tower, shares in revealed.items()})
        else:
            attempt = secure.read_letters(site_messages.read_by_site(message, "letters"))
            shapes = shapes_of(secure.streams[name])
            vectors, clipped, signature = secure.mask(attempt, self.changes[name], shapes, site_messages.read_base(message))
            plain = Message(RecordDict(), reply_to=message)
            return site_messages.sealed(message, plain, secure.phase, vectors, clipped, signature)
        return site_messages.phase_reply(message, secure.phase, name, phase, values)

    def expected(self, tower: str, agreed: Collection[str], survivors: Collection[str]) -> dict[str, NDArray[np.float64]]:
        """The plain weighted sum of the survivors, times what the drop-outs' weights are missing."""
        members = [
            secure_sum.Member(site.name, site.stream, min(16, self.studies[site.name]))
            for site in self.sites
            if site.name in agreed
        ]
        weights = secure_sum.weights(members, tower, self.experiment.aggregation)  # type: ignore[arg-type]
        factor = sum(weights.values()) / sum(weights[site] for site in weights if site in survivors)
        names = [name for name in SHAPES if tower_of(group_of(name)) == tower]
        return {
            name: factor
            * sum(
                weights[site] * np.clip(self.changes[site][name].astype(np.float64), -0.5, 0.5)
                for site in weights
                if site in survivors
            )
            for name in names
        }

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name = next(site for site, node in self.roster.nodes.items() if node == message.metadata.dst_node_id)
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            if name not in self.silent.get(message.metadata.message_type.removeprefix("query."), ()):
                self.replies[ids[-1]] = self.answer(message)
        return ids

    def get_node_ids(self) -> Iterable[int]:
        return list(self.roster.nodes.values())
