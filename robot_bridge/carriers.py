"""Cyclone DDS types that carry CDR bytes under a ROS 2 type's true name and field list.

The wheel's own codec walks a message field by field in Python (80 ms for a VGA image). A carrier class has the type's
real fields, so that Cyclone announces the right type and checks every payload against it, but hands bytes through.
"""

import functools
from collections.abc import Mapping
from typing import Any

from embodied.contracts.errors import MissingExtraError
from embodied.robot_bridge import messages

_PRIMITIVES = {
    "bool": bool,
    "byte": "byte",
    "octet": "byte",
    "char": "uint8",
    "uint8": "uint8",
    "int8": "int8",
    "uint16": "uint16",
    "int16": "int16",
    "uint32": "uint32",
    "int32": "int32",
    "uint64": "uint64",
    "int64": "int64",
    "float32": "float32",
    "float64": "float64",
}


def dds_type_name(message_type: str) -> str:
    """`package/msg/Name` -> `package::msg::dds_::Name_`."""
    package, kind, name = message_type.split("/")
    return f"{package}::{kind}::dds_::{name}_"


def ros_type_name(dds_name: str) -> str:
    """The reverse of `dds_type_name`; a name that is no ROS type's comes back as it is."""
    parts = dds_name.split("::")
    if len(parts) != 4 or parts[2] != "dds_" or not parts[3].endswith("_"):
        return dds_name
    return f"{parts[0]}/{parts[1]}/{parts[3][:-1]}"


def _field_type(description: Any) -> Any:
    """A rosbags field description as an annotation of an IDL class."""
    from cyclonedds.idl import types
    from rosbags.interfaces import Nodetype

    kind, rest = description
    if kind == Nodetype.NAME:
        return _plain(rest)
    if kind == Nodetype.BASE:
        name, limit = rest
        if name == "string":
            # The bound counts characters without the closing zero, as in ROS.
            return types.bounded_str[limit] if limit else str
        primitive = _PRIMITIVES[name]
        return getattr(types, primitive) if isinstance(primitive, str) else primitive
    inner, count = _field_type(rest[0]), rest[1]
    if kind == Nodetype.ARRAY:
        return types.array[inner, count]
    return types.sequence[inner, count] if count else types.sequence[inner]


def structure(message_type: str, fields: Mapping[str, Any]) -> Any:
    """An IDL class under a ROS type's name, of the wheel's field types."""
    try:
        from cyclonedds.idl import make_idl_struct
    except ImportError as error:
        raise MissingExtraError("cyclonedds", "ros", "the ROS 2 bridge") from error
    name = message_type.rsplit("/", 1)[1] + "_"
    # Extensibility stays final: `appendable` would offer XCDR2, which no ROS 2 node reads.
    return make_idl_struct(name, dds_type_name(message_type).replace("::", "."), dict(fields))


def _fields(message_type: str) -> dict[str, Any]:
    messages.message_class(message_type)  # says which name is wrong
    return {name: _field_type(kind) for name, kind in messages.typestore().fielddefs[message_type][1]}


@functools.cache
def _plain(message_type: str) -> Any:
    return structure(message_type, _fields(message_type))


@functools.cache
def carrier_class(message_type: str) -> Any:
    """The class for topics of this type; instances are made by `carry` and hold `.data`."""
    return carrier(structure(message_type, _fields(message_type)))


@functools.cache
def service_class(message_type: str) -> Any:
    """The class for a service's request or response: what rmw_cyclonedds writes before the fields comes first."""
    from cyclonedds.idl import types

    correlation = {"client_id_on_wire": types.uint64, "sequence_number_on_wire": types.int64}
    return carrier(structure(message_type, correlation | _fields(message_type)))


def carrier(cls: Any) -> Any:
    """Let an IDL class hand bytes through."""

    def serialize(self: Any, *args: Any, **kwargs: Any) -> bytes:
        return self.data

    def deserialize(kind: Any, data: bytes, *args: Any, **kwargs: Any) -> Any:
        return carry(kind, data)

    cls.serialize = serialize
    cls.deserialize = classmethod(deserialize)
    # For a sample without data, whose writer disposed of it or went away: nobody needs an empty message of the type.
    cls.deserialize_key = classmethod(deserialize)
    return cls


def carry(cls: Any, data: bytes) -> Any:
    """An instance of a carrier class holding CDR bytes."""
    instance = object.__new__(cls)
    instance.data = data
    return instance
