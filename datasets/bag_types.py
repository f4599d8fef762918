"""Messages of any type as objects and numbers: by the definition that a bag carries, or the one that ROS ships."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError, suggest
from embodied.datasets.bag_items import Topic, unpacked_message

MAX_DEFINITION = 1 << 18  # characters of a type's definition
MAX_LEAVES = 20_000  # fields of a message type, its parts' included; the decoder of each becomes code
MAX_NUMBERS = 4096  # numbers that one observation takes from a message; more is a picture or a cloud
BASE, NAME, ARRAY, SEQUENCE = 1, 2, 3, 4  # rosbags' kinds of fields


@dataclasses.dataclass(frozen=True)
class MessageType:
    """How to read the messages of a topic.

    Attributes:
        kind: `sensor_msgs/msg/JointState`.
        encoding: `cdr` or `ros1`.
        store: rosbags' Typestore that knows the type.
    """

    kind: str
    encoding: str
    store: Any

    def decode(self, data: bytes) -> Any:
        """The message as an object with its fields as attributes. Raises InputError where the bytes are damaged."""
        decode = self.store.deserialize_cdr if self.encoding == "cdr" else self.store.deserialize_ros1
        data = unpacked_message(data)
        try:
            return decode(data, self.kind)
        except Exception as error:  # rosbags raises struct, index and type errors of many kinds on damaged bytes
            raise InputError(f"a message cannot be decoded as {self.kind}: {error}") from error

    @property
    def has_header(self) -> bool:
        """Whether the message starts with a header, whose stamp is at bytes 4 to 12 of CDR and ROS 1 alike."""
        _, fields = self.store.fielddefs[self.kind]
        return bool(fields) and fields[0] == ("header", (NAME, "std_msgs/msg/Header"))

    def header_stamp(self, data: bytes) -> int:
        """Stamp of a message that `has_header` [ns], without decoding the rest."""
        data = unpacked_message(data)
        order = "big" if self.encoding == "cdr" and data[1:2] != b"\x01" else "little"
        return int.from_bytes(data[4:8], order, signed=True) * 1_000_000_000 + int.from_bytes(data[8:12], order)

    def number_paths(self) -> list[str]:
        """Every dotted path that leads to numbers, the header's left out."""
        return [path for path, numeric in self._paths(self.kind, "") if numeric]

    def names_list(self) -> str | None:
        """The field that names joints: the first list of strings."""
        for name, field in self.store.fielddefs[self.kind][1]:
            if field[0] == SEQUENCE and field[1][0] == (BASE, ("string", 0)):
                return name
        return None

    def leaf_names(self, path: str) -> tuple[str, ...]:
        """Names of the numbers at a path that ends in a message of scalars, `('x', 'y', 'z')`; empty for others."""
        kind = self.kind
        for part in [part for part in path.split(".") if part]:
            fields = dict(self.store.fielddefs[kind][1])
            if part.lstrip("-").isdigit():
                continue
            field = fields.get(part)
            field = field[1][0] if field is not None and field[0] in (ARRAY, SEQUENCE) else field
            if field is None or field[0] != NAME:
                return ()
            kind = field[1]
        found = list(self._paths(kind, ""))
        scalar = all(numeric and "[" not in leaf for leaf, numeric in found)
        return tuple(leaf for leaf, _ in found) if scalar and len(found) <= MAX_NUMBERS else ()

    def _paths(self, kind: str, before: str) -> Iterator[tuple[str, bool]]:
        """(path, whether it is a number or an array of them) of every leaf; lists are written `points[]`."""
        for name, field in self.store.fielddefs[kind][1]:
            path = f"{before}{name}"
            inner = field[1][0] if field[0] in (ARRAY, SEQUENCE) else field
            listed = "[]" if field[0] in (ARRAY, SEQUENCE) else ""
            if inner[0] == BASE:
                text = inner[1][0] in ("string", "wstring")
                yield path + listed, not text
            elif not (before == "" and name == "header"):
                yield from self._paths(inner[1], f"{path}{listed}.")


def numbers(message: Any, path: str) -> list[float]:
    """What is at a dotted path of a decoded message; a nested message gives its numbers in their order.

    `points.-1.positions` takes the last of a list. The empty path takes all numbers but the header's.

    Raises:
        InputError: there is no such field, or what is there is no number.
    """
    value = message
    for part in [part for part in path.split(".") if part]:
        if part.lstrip("-").isdigit():
            if not isinstance(value, (list, np.ndarray)) or not -len(value) <= int(part) < len(value):
                return []  # this message has fewer
            value = value[int(part)]
        else:
            fields = _field_names(type(value))
            if part in fields:
                value = getattr(value, part)
                continue
            raise InputError(f"has no field '{part}' in '{path}'.{suggest(part, fields)}")
    out: list[float] = []
    _flatten(value, path, out)
    return out


@functools.cache
def _field_names(kind: type) -> list[str]:
    """Fields of a message, without its constants: rosbags declares those with a ClassVar that is never evaluated."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [field.name for field in fields if "ClassVar" not in str(field.type)]


def _flatten(value: Any, path: str, out: list[float]) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        if len(out) + value.size > MAX_NUMBERS:
            raise InputError(
                f"holds {value.size} numbers in '{path}'; an observation takes at most {MAX_NUMBERS}. "
                "Pictures go under images."
            )
        out.extend(map(float, value.ravel().tolist()))
    elif isinstance(value, (bool, int, float, np.number)):
        out.append(float(value))
    elif isinstance(value, list):
        for item in value:
            _flatten(item, path, out)
    elif names := _field_names(type(value)):
        for name in names:
            if path or name != "header":
                _flatten(getattr(value, name), path, out)
    elif path or not isinstance(value, str):
        raise InputError(f"holds no numbers in '{path or 'its fields'}' but {type(value).__name__}")
    if len(out) > MAX_NUMBERS:
        raise InputError(f"holds more than {MAX_NUMBERS} numbers in '{path}'")


@functools.lru_cache(maxsize=256)
def message_type(topic: Topic) -> MessageType:
    """How to decode a topic. Raises InputError saying why it cannot be done."""
    if topic.encoding not in ("cdr", "ros1"):
        raise InputError(f"its messages are serialised as '{topic.encoding[:80]}'; cdr and ROS 1 are read")
    if not topic.kind:
        raise InputError("the bag does not say its type")
    shipped = _shipped(topic.encoding)
    reason = "the bag holds no definition of its type"
    if "\n---\n" in topic.definition:
        reason = "the bag holds the definition of a service, not of its events"
    elif topic.definition:
        try:
            return MessageType(topic.kind, topic.encoding, _store(topic))
        except InputError as error:
            reason = str(error)
    if topic.kind in shipped.fielddefs:
        return MessageType(topic.kind, topic.encoding, shipped)
    raise InputError(f"{reason}, and {topic.kind} is not among those that ROS ships")


@functools.cache
def _shipped(encoding: str) -> Any:
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise MissingExtraError("rosbags", "formats", "Reading ROS messages") from error
    return get_typestore(Stores.ROS2_JAZZY if encoding == "cdr" else Stores.ROS1_NOETIC)


def _store(topic: Topic) -> Any:
    """A Typestore with a topic's own definition. rosbags turns a definition into code, so it is bounded first."""
    from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore

    if len(topic.definition) > MAX_DEFINITION:
        raise InputError(f"its definition has {len(topic.definition)} characters; at most {MAX_DEFINITION} are read")
    try:
        text = topic.definition.replace("\r\n", "\n")
        types = get_types_from_idl(text) if topic.language == "idl" else get_types_from_msg(text, topic.kind)
        store = get_typestore(Stores.EMPTY)
        for name in (
            _shipped(topic.encoding).fielddefs.keys() & _referred(types) - types.keys() - store.fielddefs.keys()
        ):
            types |= {name: ([], _shipped(topic.encoding).fielddefs[name][1])}
        known = {name: fields for name, (_, fields) in (store.fielddefs | types).items()}
        _leaves(topic.kind, known, {}, ())
        store.register(types)
        store.get_msgdef(topic.kind)
    except InputError:
        raise
    except Exception as error:  # the parser, the code generator and the compiler each raise their own
        raise InputError(f"its definition cannot be used: {' '.join(str(error)[:160].split())}") from error
    return store


def _referred(types: Any) -> set[str]:
    inner = [
        field[1][0] if field[0] in (ARRAY, SEQUENCE) else field for _, fields in types.values() for _, field in fields
    ]
    return {field[1] for field in inner if field[0] == NAME}


def _leaves(kind: str, known: dict[str, Any], seen: dict[str, int], within: tuple[str, ...]) -> int:
    """How many fields a message of this type is read with, lists counted once; raises InputError above MAX_LEAVES."""
    if kind in within or kind not in known:
        raise InputError(f"its definition does not end: {kind} is {'in itself' if kind in within else 'missing'}")
    if kind not in seen:
        total = 0
        for _, field in known[kind]:
            inner = field[1][0] if field[0] in (ARRAY, SEQUENCE) else field
            each = _leaves(inner[1], known, seen, (*within, kind)) if inner[0] == NAME else 1
            if field[0] == SEQUENCE and each == 0:
                raise InputError(f"its definition has a list of empty {inner[1]}, whose length nothing bounds")
            unrolled = field[0] == ARRAY and (inner[0] == NAME or inner[1][0] == "string")
            total += each * (field[1][1] if unrolled else 1)
            if total > MAX_LEAVES or (field[0] == ARRAY and field[1][1] > 1 << 24):
                raise InputError(f"its definition has more than {MAX_LEAVES} fields, or an array of absurd length")
        seen[kind] = total
    return seen[kind]
