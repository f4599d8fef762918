"""The container of ROS 1: http://wiki.ros.org/Bags/Format/2.0."""

import struct
from collections.abc import Iterator, Set
from typing import BinaryIO

from embodied.datasets.bag_items import BrokenRecord, Damage, Item, Message, Topic, kind_of, skip, take, unpack

ROS1_MAGIC = b"#ROSBAG V2.0\n"


def read_ros1(stream: BinaryIO, wanted: Set[str] | None) -> Iterator[Item]:
    topics: dict[int, Topic] = {}
    announced: set[Topic] = set()
    closed = False
    try:
        while head := _ros1_head(stream):
            fields = _ros1_fields(take(stream, _ros1_size(head)))
            size = _ros1_size(stream.read(4))
            operation = fields.get(b"op", b"")
            if operation == b"\x05":
                yield from _ros1_chunk(fields, take(stream, size), topics, announced, wanted)
            elif operation in (b"\x02", b"\x07"):
                yield from _ros1_record(fields, take(stream, size), topics, announced, wanted)
            else:
                skip(stream, size)
                closed |= operation == b"\x06"  # the list of chunks follows the data
    except BrokenRecord as broken:
        if not closed:
            yield Damage(str(broken))


def _ros1_head(stream: BinaryIO) -> bytes:
    """The first four bytes of the next record, after room that a recorder left and did not use; empty at the end."""
    head, zeros = stream.read(4), 0
    while head == bytes(4):
        while (first := stream.read(1)) == b"\0":
            zeros += 1
            if zeros > 1 << 16:
                raise BrokenRecord("it has nothing but zeros from here on")
        head = first + stream.read(3)
    return head


def _ros1_chunk(
    fields: dict[bytes, bytes], data: bytes, topics: dict[int, Topic], announced: set[Topic], wanted: Set[str] | None
) -> Iterator[Item]:
    try:
        compression = fields.get(b"compression", b"none").decode(errors="replace")
        plain = memoryview(unpack(compression, data, _ros1_size(fields.get(b"size", b""))))
        at = 0
        while at < len(plain):
            parts = []
            for _ in range(2):
                size = _ros1_size(plain[at : at + 4])
                if at + 4 + size > len(plain):
                    raise BrokenRecord("a record in a chunk claims more bytes than the chunk has")
                parts.append(plain[at + 4 : at + 4 + size])
                at += 4 + size
            yield from _ros1_record(_ros1_fields(parts[0]), parts[1], topics, announced, wanted)
    except BrokenRecord as broken:
        yield Damage(str(broken))


def _ros1_record(
    fields: dict[bytes, bytes],
    data: bytes | memoryview,
    topics: dict[int, Topic],
    announced: set[Topic],
    wanted: Set[str] | None,
) -> Iterator[Item]:
    number = _ros1_size(fields.get(b"conn", b""))
    if fields.get(b"op") == b"\x07":
        about = _ros1_fields(data)
        topic = Topic(
            fields.get(b"topic", about.get(b"topic", b"")).decode(errors="replace"),
            kind_of(about.get(b"type", b"").decode(errors="replace")),
            "ros1",
            about.get(b"message_definition", b"").decode(errors="replace"),
            "msg",
        )
        topics[number] = topic
        if topic not in announced:
            announced.add(topic)
            yield topic
    elif fields.get(b"op") == b"\x02":
        topic, stamp = topics.get(number), fields.get(b"time", b"")
        if topic is None or len(stamp) != 8:
            raise BrokenRecord(f"a message names connection {number}, which the file does not describe")
        if wanted is None or topic.name in wanted:
            seconds, nanoseconds = struct.unpack("<II", stamp)
            yield Message(topic, bytes(data), seconds * 1_000_000_000 + nanoseconds)


def _ros1_size(data: bytes | memoryview) -> int:
    if len(data) != 4:
        raise BrokenRecord("it ends in the middle of a record, as after a crash of its recorder")
    return int.from_bytes(data, "little")


def _ros1_fields(data: bytes | memoryview) -> dict[bytes, bytes]:
    """A record's head: name -> value."""
    fields, at, raw = {}, 0, bytes(data)
    while at < len(raw):
        size = _ros1_size(raw[at : at + 4])
        name, equals, value = raw[at + 4 : at + 4 + size].partition(b"=")
        if not equals or at + 4 + size > len(raw):
            raise BrokenRecord("a record's head is damaged")
        fields[name] = value
        at += 4 + size
    return fields
