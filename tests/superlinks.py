"""A SuperLink's database with one order to a site, and the site's reply to it, for tests of how replies come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from server.replies import ReplyState


class Awaited:
    """A run that goes on, an order of it to site west, and west's reply of ``num_bytes`` in ``objects``, by their ids.

    ``head`` and ``tree`` are what a site announces its reply with.
    """

    def __init__(self, database: Path, num_bytes: int, *, key: bytes = b"key") -> None:
        self.state = ReplyState(str(database), NoOpFederationManager(), ObjectStoreFactory(str(database)).store())
        self.state.initialize()
        self.run = self.state.create_run("a", "1", "0", {}, NOOP_FEDERATION_ID, None, "me", TaskType.SERVER_APP)
        (task,) = self.state.get_tasks(run_ids=[self.run])
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        self.node = self.state.create_node("me", "me", key, 30.0, name="west")
        assert self.state.activate_node(self.node, 30.0)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self.run, SUPERLINK_NODE_ID
        order = Message(RecordDict(), self.node, "train")
        order.metadata.__dict__["_message_id"] = self.order = order.object_id
        assert self.state.store_message_ins(order) is not None
        update = np.random.default_rng(0).bytes(num_bytes)
        arrays = ArrayRecord({"update": Array(np.frombuffer(update, dtype=np.uint8))})
        reply = Message(RecordDict({"arrays": arrays}), reply_to=order)
        self.objects = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        self.tree = get_object_tree(reply)
        self.head = Message(RecordDict(), reply_to=order)
        self.head.metadata.__dict__["_message_id"] = self.tree.object_id

    def lose_its_line(self) -> None:
        """Nothing is heard of the site for so long that it counts as offline."""
        assert self.state.acknowledge_node_heartbeat(self.node, -1.0)

    def replies(self) -> list[Message]:
        """What the ServerApp is given when it asks."""
        return self.state.get_message_res({self.order}, self.run)


class Sending(Awaited):
    """A site that has announced its reply."""

    def __init__(self, database: Path) -> None:
        super().__init__(database, 8_000_000)  # two objects of Flower's 5 MiB
        self.database = database
        assert self.state.get_message_ins(self.node, 1)
        self.session = self.state.start_session(self.run)
        assert self.state.store_message_and_object_tree(self.head, self.tree, self.session)[0]

    def push(self, name: str) -> bool:
        """What the site's call to store one of the reply's objects answers."""
        return self.state.store_object(self.run, self.session, name, self.objects[name])
