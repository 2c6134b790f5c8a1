"""What the SuperLink does with replies that come over lines that are slow and break.

Flower 1.41.0 hands a reply's head to the ServerApp before its objects have come, and the ServerApp then waits for them, up to
two hours, and takes no other site's reply. It throws a whole reply away if its site is offline when it is asked for. And it
refuses an object that it has already, which is what a site sends again when a line broke before the word that it arrived: the
whole reply is then given up. And what a site was answering when it went it waits for, as long as the site is back in time. Here
none of this is so.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.server.superlink.linkstate.utils import convert_sint64_values_in_dict_to_uint64, dict_to_message
from flwr.supercore.date import now
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import Select, select, update

# Ids of replies, which are those of their outermost objects, of which some objects have not come.
UNFINISHED = (
    select(ObjectPushSessionRoot.root_object_id)
    .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
    .where(ObjectPushSession.pending_count > 0)
)


class ReplyState(sql_linkstate.SqlLinkState):
    """Flower's own state, which hands a reply over when it is whole, or when no more of it comes."""

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Replies to these messages; only of a site that has not begun to answer does it matter whether it is online."""
        whole = self._taken(message_ids, run_id)
        answered = {one.metadata.reply_to_message_id for one in whole} | self._coming(message_ids)
        return whole + super().get_message_res(message_ids - answered, run_id)

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Keep an object; also True if exactly this is kept already."""
        stored = super().store_object(run_id, session_id, object_id, object_content)
        return stored or self.object_store.get(object_id) == object_content

    def deactivate_node(self, node_id: int) -> bool:
        """Take a site offline that says so, and tell the rounds that ask for it what it had been given and will not answer."""
        went = super().deactivate_node(node_id)
        if went:
            with self.session() as session:
                lost = {str(one) for one in session.scalars(_unanswered(node_id))}
                begun = select(MessageRes.message_id).where(MessageRes.reply_to_message_id.in_(lost))
                halves = select(ObjectPushSessionRoot.session_id).where(ObjectPushSessionRoot.root_object_id.in_(begun))
                for half in set(session.scalars(halves)):
                    self._cleanup_push_session(half, cleanup_messages=True)
                self.delete_messages(lost)
        return went

    def _taken(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Those replies that are whole, each of them once."""
        taking = (
            update(MessageRes)
            .where(
                MessageRes.reply_to_message_id.in_(message_ids),
                MessageRes.run_id == uint64_to_int64(run_id),
                MessageRes.delivered_at == "",
                MessageRes.message_id.not_in(UNFINISHED),
            )
            .values(delivered_at=now().isoformat())
            .returning(MessageRes)
        )
        with self.session() as session:
            rows = [sql_linkstate._message_model_to_dict(one) for one in session.scalars(taking)]
        for row in rows:
            convert_sint64_values_in_dict_to_uint64(row, ["run_id", "src_node_id", "dst_node_id"])
        return [dict_to_message(row) for row in rows]

    def _coming(self, message_ids: set[str]) -> set[str]:
        """Those of the messages whose replies a site is sending; one that has fallen silent (Flower: 180 s) is not."""
        asked = select(MessageRes.reply_to_message_id).where(
            MessageRes.reply_to_message_id.in_(message_ids),
            MessageRes.message_id.in_(UNFINISHED.where(ObjectPushSession.expires_at > now())),
        )
        with self.session() as session:
            return {str(one) for one in session.scalars(asked)}


def _unanswered(node_id: int) -> Select[str | None]:
    """Ids of the orders that a node has fetched and not answered whole."""
    whole = select(MessageRes.reply_to_message_id).where(MessageRes.message_id.not_in(UNFINISHED))
    return select(MessageIns.message_id).where(
        MessageIns.dst_node_id == uint64_to_int64(node_id),
        MessageIns.delivered_at != "",
        MessageIns.message_id.not_in(whole),
    )
