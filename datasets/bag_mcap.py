"""MCAP, the container of rosbag2 since Iron: https://mcap.dev/spec."""

import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator, Set
from typing import Any, BinaryIO

from embodied.datasets.bag_items import (
    BrokenRecord,
    Damage,
    Item,
    Message,
    Metadata,
    Topic,
    kind_of,
    skip,
    take,
    unpack,
)

MCAP_MAGIC = b"\x89MCAP0\r\n"
_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK, _METADATA, _DATA_END = 1, 2, 3, 4, 5, 6, 12, 15
_MESSAGE_HEAD = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time


@dataclasses.dataclass
class _McapTables:
    schemas: dict[int, tuple[str, str, str]] = dataclasses.field(default_factory=dict)
    channels: dict[int, Topic] = dataclasses.field(default_factory=dict)
    announced: set[Topic] = dataclasses.field(default_factory=set)


def read_mcap(stream: BinaryIO, wanted: Set[str] | None) -> Iterator[Item]:
    tables, closed = _McapTables(), False
    try:
        while True:
            head = take(stream, 9)
            opcode, size = head[0], int.from_bytes(head[1:], "little")
            if opcode == _FOOTER:
                return
            if opcode in (_SCHEMA, _CHANNEL, _MESSAGE, _METADATA):
                yield from _mcap_record(opcode, memoryview(take(stream, size)), tables, wanted)
            elif opcode == _CHUNK:
                yield from _mcap_chunk(take(stream, size), tables, wanted)
            elif opcode == 0:
                raise BrokenRecord("a record has no type")
            else:
                skip(stream, size)
                closed |= opcode == _DATA_END
    except BrokenRecord as broken:
        if not closed:  # what follows the data only repeats it
            yield Damage(str(broken))


def _mcap_chunk(payload: bytes, tables: _McapTables, wanted: Set[str] | None) -> Iterator[Item]:
    """The records of a chunk; a chunk that is damaged inside is left out as a whole."""
    from mcap.records import Chunk

    try:
        chunk = _parsed(Chunk, memoryview(payload))
        plain = unpack(chunk.compression, chunk.data, chunk.uncompressed_size)
        if chunk.uncompressed_crc and zlib.crc32(plain) != chunk.uncompressed_crc:
            raise BrokenRecord("a chunk's checksum says that its bytes were changed; the chunk is left out")
        view, at = memoryview(plain), 0
        while at < len(view):
            if at + 9 > len(view):
                raise BrokenRecord("a chunk ends in the middle of a record")
            opcode, size = view[at], int.from_bytes(view[at + 1 : at + 9], "little")
            at += 9
            if opcode not in (_SCHEMA, _CHANNEL, _MESSAGE):
                raise BrokenRecord(f"a chunk holds a record of type {opcode}, which none may")
            if at + size > len(view):
                raise BrokenRecord("a record in a chunk claims more bytes than the chunk has")
            yield from _mcap_record(opcode, view[at : at + size], tables, wanted)
            at += size
    except BrokenRecord as broken:
        yield Damage(str(broken))


def _mcap_record(opcode: int, payload: memoryview, tables: _McapTables, wanted: Set[str] | None) -> Iterator[Item]:
    if opcode == _MESSAGE:
        if len(payload) < _MESSAGE_HEAD.size:
            raise BrokenRecord("a message is shorter than its head")
        channel, _, log_ns, _ = _MESSAGE_HEAD.unpack_from(payload)
        topic = tables.channels.get(channel)
        if topic is None:
            raise BrokenRecord(f"a message names channel {channel}, which the file does not describe")
        if wanted is None or topic.name in wanted:
            yield Message(topic, bytes(payload[_MESSAGE_HEAD.size :]), _time(log_ns))
    elif opcode in (_SCHEMA, _CHANNEL, _METADATA):
        yield from _mcap_description(opcode, payload, tables)


def _mcap_description(opcode: int, payload: memoryview, tables: _McapTables) -> Iterator[Item]:
    from mcap.records import Channel, Schema
    from mcap.records import Metadata as MetadataRecord

    if opcode == _SCHEMA:
        schema = _parsed(Schema, payload)
        language = {"ros2msg": "msg", "ros1msg": "msg", "ros2idl": "idl"}.get(schema.encoding, "")
        tables.schemas[schema.id] = (kind_of(schema.name), schema.data.decode(errors="replace"), language)
    elif opcode == _CHANNEL:
        channel = _parsed(Channel, payload)
        kind, definition, language = tables.schemas.get(channel.schema_id, ("", "", ""))
        topic = Topic(channel.topic, kind, channel.message_encoding, definition, language)
        tables.channels[channel.id] = topic
        if topic not in tables.announced:
            tables.announced.add(topic)
            yield topic
    else:
        record = _parsed(MetadataRecord, payload)
        yield Metadata(record.name, record.metadata)


def _parsed(record: Any, payload: memoryview) -> Any:
    from mcap.data_stream import ReadDataStream

    try:
        return record.read(ReadDataStream(io.BytesIO(payload)))
    except Exception as error:  # mcap raises struct, unicode and errors of its own on damaged bytes
        raise BrokenRecord(f"a {record.__name__} record is damaged: {error}") from error


def _time(stamp: int) -> int:
    if stamp >= 1 << 63:
        raise BrokenRecord(f"a message has the receive time {stamp} ns")
    return stamp
