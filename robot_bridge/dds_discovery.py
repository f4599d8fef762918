"""`ros_discovery_info`: which endpoints belong to which node, as every ROS 2 process announces it.

The one message whose layout depends on the distribution: a Gid has 16 bytes from Iron on and 24 in Humble, which pads a
DDS GUID with zeros. It is written by hand here, so that both can be spoken; every change sends the whole message.
"""

import dataclasses
import functools
import os
import struct
from collections.abc import Iterable
from typing import Any

from embodied.contracts.errors import InputError
from embodied.robot_bridge import carriers, messages

TOPIC = "ros_discovery_info"
GUID_BYTES = 16
_OLD = ("humble", "galactic", "foxy")


@dataclasses.dataclass(frozen=True)
class NodeInfo:
    """A node and the GUIDs (16 bytes each) of its readers and writers."""

    namespace: str
    name: str
    readers: tuple[bytes, ...] = ()
    writers: tuple[bytes, ...] = ()


def gid_bytes(ros_distro: str | None = None) -> int:
    """24 for Humble and older, else 16; None reads ROS_DISTRO."""
    distro = os.environ.get("ROS_DISTRO", "") if ros_distro is None else ros_distro
    return 24 if distro in _OLD else GUID_BYTES


@functools.cache
def info_class(gid_size: int) -> Any:
    """The carrier class of the message."""
    from cyclonedds.idl import types

    package = "rmw_dds_common/msg"
    gid = carriers.structure(f"{package}/Gid", {"data": types.array[types.uint8, gid_size]})
    name = types.bounded_str[256]
    gids = types.sequence[gid]
    fields = {"node_namespace": name, "node_name": name, "reader_gid_seq": gids, "writer_gid_seq": gids}
    node = carriers.structure(f"{package}/NodeEntitiesInfo", fields)
    fields = {"gid": gid, "node_entities_info_seq": types.sequence[node]}
    return carriers.carrier(carriers.structure(messages.PARTICIPANT_INFO, fields))


def encode(participant: bytes, nodes: Iterable[NodeInfo], gid_size: int) -> bytes:
    """CDR of a ParticipantEntitiesInfo. `participant`: the GUID, 16 bytes."""
    body = bytearray(participant.ljust(gid_size, b"\0"))

    def number(value: int) -> None:
        body.extend(bytes(-len(body) % 4) + struct.pack("<I", value))

    def text(value: str) -> None:
        data = value.encode() + b"\0"
        number(len(data))
        body.extend(data)

    def gids(values: tuple[bytes, ...]) -> None:
        number(len(values))
        for value in values:
            body.extend(value.ljust(gid_size, b"\0"))

    listed = list(nodes)
    number(len(listed))
    for node in listed:
        text(node.namespace)
        text(node.name)
        gids(node.readers)
        gids(node.writers)
    return b"\x00\x01\x00\x00" + bytes(body)


def decode(data: bytes, gid_size: int) -> tuple[bytes, list[NodeInfo]]:
    """The participant's GUID and its nodes. Raises InputError."""
    body, order = data[4:], "<" if data[1:2] == b"\x01" else ">"
    place = gid_size

    def number() -> int:
        nonlocal place
        place += -place % 4 + 4
        return struct.unpack_from(f"{order}I", body, place - 4)[0]

    def text() -> str:
        nonlocal place
        size = number()
        place += size
        return body[place - size : place - 1].decode()

    def gids() -> tuple[bytes, ...]:
        nonlocal place
        start, count = place + -place % 4 + 4, number()
        if count * gid_size > len(body) - start:
            raise ValueError(f"{count} gids do not fit")
        place += count * gid_size
        return tuple(body[at : at + GUID_BYTES] for at in range(start, place, gid_size))

    try:
        count = number()
        if count > len(body):
            raise ValueError(f"{count} nodes do not fit")
        nodes = [NodeInfo(text(), text(), gids(), gids()) for _ in range(count)]
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{len(data)} bytes that are no {messages.PARTICIPANT_INFO}: {error}") from None
    return body[:GUID_BYTES], nodes
