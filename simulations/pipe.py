"""Flower messages between this process and its workers, over a pipe.

A message travels as protobuf without its arrays' data, then array after array in pieces, so that neither end ever holds a
second copy of a model. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_to_proto
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

PIECE_BYTES = 1 << 20  # of 16 MB arrays in one go a pipe carried 0.6 GB/s, in pieces that stay in the cache 2.8 GB/s


def send(connection: Connection, message: Message) -> None:
    """Write a message: as protobuf what is not an array's data, then the data of array after array from where they lie."""
    connection.send_bytes(_without_data(message))
    for array in _arrays(message):
        data = memoryview(array.data).cast("B")
        for start in range(0, len(data) + 1, PIECE_BYTES):  # a piece that is not full, even an empty one, ends an array
            connection.send_bytes(data[start : start + PIECE_BYTES])


def receive(connection: Connection) -> Message:
    """Read a message that ``send`` wrote. Raises EOFError or OSError if the other end is gone."""
    message = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
    for array in _arrays(message):
        array.data = b"".join(_pieces(connection))
    return message


def _pieces(connection: Connection) -> Iterator[bytes]:
    while len(piece := connection.recv_bytes(PIECE_BYTES)) == PIECE_BYTES:
        yield piece
    yield piece


def _arrays(message: Message) -> Iterator[Array]:
    """A message's arrays in the order in which they stand in it.

    Not by way of ``content.array_records``: Flower's view of a content is a reference cycle that holds it, so whoever has
    looked through it keeps a model in memory until Python next collects cycles, which may be many messages later.
    """
    if message.has_content():
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                yield from record.values()


def _without_data(message: Message) -> bytes:
    """A message as Flower's protobuf, its arrays empty."""
    if message.has_error():
        error: bytes = message_to_proto(message).SerializeToString()
        return error
    proto = ProtoMessage(metadata=metadata_to_proto(message.metadata))
    proto.content.SetInParent()  # content without records is not no content
    for key, record in message.content.items():
        if not isinstance(record, ArrayRecord):
            proto.content.MergeFrom(recorddict_to_proto(RecordDict({key: record})))
            continue
        item = proto.content.items.add(key=key)
        item.array_record.SetInParent()
        for name, array in record.items():
            value = item.array_record.items.add(key=name).value
            value.dtype, value.stype = array.dtype, array.stype
            value.shape.extend(array.shape)
    encoded: bytes = proto.SerializeToString()
    return encoded
