"""What the coordinator writes down of every message to and from a site, when a run is over real sites.

An order's entry is in the ledger before the order leaves, and the order carries the ledger's head with it; a reply's entry
holds the head that the site sent. So neither side can cut its ledger short without the other being able to show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute

from fedmix.deployment.ledger import Ledger, measured
from fedmix.federation.update import group_of
from server.messages import Order, Reply


@dataclass(frozen=True)
class Books:
    """The ledger of a run over real sites, the digest of the plan that they approved, and the sites' keys that it names."""

    ledger: Ledger
    plan: str
    keys: Mapping[str, str] = field(default_factory=dict)

    def asked(self, query: Message, site: str, run: str, *, round_number: int | None = None) -> None:
        """Write down that a site is about to be asked whether it takes part, or for its part in a round's secure sum."""
        self._append("sent", query, site, {"run": run, "round": round_number, "direction": "out"})

    def answered(
        self, answer: Message, site: str, run: str, *, head: str, why: str | None, round_number: int | None = None
    ) -> None:
        """Write down what a site answered to a question, or the reason that it does not count."""
        facts = {"run": run, "round": round_number, "direction": "in", "peer_head": head, "why": why}
        self._append("received", answer, site, facts)

    def sent(self, message: Message, order: Order) -> None:
        """Write down an order that is about to leave, and put the ledger's head into it."""
        parameters, record = message.content["parameters"], message.content["order"]
        assert isinstance(record, ConfigRecord)
        groups = dict(Counter(map(group_of, parameters)))
        facts = {"run": order.run, "round": order.round_number, "direction": "out", "groups": groups}
        record["ledger"] = self._append("sent", message, order.site.name, facts)

    def received(
        self, message: Message, order: Order, *, reply: Reply | None = None, norm: float | None = None, why: str | None = None
    ) -> None:
        """Write down what a site answered. ``norm``: length of its update; ``why``: the reason it does not count."""
        said: dict[str, Any] = {"groups": {}, "metrics": [], "peer_head": ""}
        if reply is not None:
            names = {array.partition(":")[0] for array in reply.arrays}
            said = {"groups": dict(Counter(map(group_of, names))), "metrics": sorted(reply.metrics), "peer_head": reply.ledger}
        facts = {"run": order.run, "round": order.round_number, "direction": "in", "norm": norm, "epsilon": None, "why": why}
        self._append("received", message, order.site.name, facts | said)

    def _append(self, event: str, message: Message, site: str, facts: Mapping[str, Any]) -> str:
        said = {"peer": site, "kind": message.metadata.message_type, "plan": self.plan} | _measured(message)
        return self.ledger.append(event, **said, **facts)


def _measured(message: Message) -> dict[str, Any]:
    """A message's bytes as Flower sends them, the number of objects that they are sent as, and the hash of its arrays."""
    if not message.has_content():
        return measured((), ())
    with no_object_id_recompute():
        sizes = [len(each.deflate()) for each in get_all_nested_objects(message).values()]
    # Not .array_records, which holds the content in a reference cycle.
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return measured(sizes, ((name, record[name].data) for record in records for name in sorted(record)))
