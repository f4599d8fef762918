"""One recording as arrays: of every topic how much there is, of those that a mapping names numbers and times."""

import dataclasses
import math
from array import array
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.datasets.bag_files import Recording
from embodied.datasets.bag_images import COMPRESSED_IMAGE, IMAGE
from embodied.datasets.bag_items import Damage, Message, Topic
from embodied.datasets.bag_mapping import BagMapping, FromTopic, NumbersFrom
from embodied.datasets.bag_types import MessageType, message_type, numbers

ACTION = "action"  # key of the action's columns; no observation's, because those are checked against a mapping
MAX_NAMES = 4096
MAX_VALUES = 1 << 26  # numbers of one key of one recording, 4 bytes each


@dataclasses.dataclass
class TopicCount:
    topic: Topic
    count: int = 0
    first_ns: int = 0
    last_ns: int = 0

    @property
    def rate(self) -> float:
        """Messages per second by receive time [Hz]; 0 for fewer than two."""
        seconds = (self.last_ns - self.first_ns) * 1e-9
        return (self.count - 1) / seconds if self.count > 1 and seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Series:
    """The messages of one topic that a mapping uses, in file order.

    Attributes:
        number: (M,) which message of the topic each is; those that cannot be decoded are left out.
        header_ns: (M,) stamps in the messages' headers [ns], 0 where there is none.
        log_ns: (M,) receive times [ns].
        columns: key -> (M, J) float32; NaN where a message does not have the number.
        texts: (M,) what each message of a topic of Strings or Bools says; empty for topics that no key asks for words.
    """

    topic: Topic
    number: np.ndarray
    header_ns: np.ndarray
    log_ns: np.ndarray
    columns: dict[str, np.ndarray]
    texts: list[str | bool | None]


@dataclasses.dataclass(frozen=True)
class Table:
    """A recording, read once.

    Attributes:
        counts: every topic, in the order the file announces them.
        series: the topics that the mapping names and the bag has.
        first_pictures: topic -> its first message's bytes.
        names: key -> what its numbers are called, joints or fields; empty where they have no names.
        damages: what the files lack.
        undecodable: topic -> (messages, reason) that could not be decoded.
        odd: key -> messages whose numbers were of another count, and so not used.
        not_finite: key -> messages that hold NaN or infinity among the numbers that are used.
    """

    recording: Recording
    counts: dict[str, TopicCount]
    series: dict[str, Series]
    first_pictures: dict[str, bytes]
    names: dict[str, tuple[str, ...]]
    damages: list[str]
    undecodable: dict[str, tuple[int, str]]
    odd: dict[str, int]
    not_finite: dict[str, int]


def read_table(recording: Recording, mapping: BagMapping | None) -> Table:
    """One pass over a recording. Pictures are counted and timed, not kept.

    Raises:
        InputError: no message can be read, or one that the mapping names is not there, not decodable, or lacks a field.
    """
    counts: dict[str, TopicCount] = {}
    readers: dict[str, _Reader | None] = {}
    damages: list[str] = []
    wanted = mapping.topics() if mapping else set()
    for item in recording.items():
        if isinstance(item, Topic):
            counts.setdefault(item.name, TopicCount(item))
        elif isinstance(item, Damage):
            damages.append(item.reason)
        elif isinstance(item, Message):
            count = counts.setdefault(item.topic.name, TopicCount(item.topic))
            if count.topic.kind != item.topic.kind:
                continue  # two types on one topic: the first is read
            count.first_ns = min(count.first_ns, item.log_ns) if count.count else item.log_ns
            count.last_ns = max(count.last_ns, item.log_ns)
            count.count += 1
            if item.topic.name in wanted and mapping is not None:
                if item.topic.name not in readers:
                    readers[item.topic.name] = _Reader(recording, item.topic, mapping)
                reader = readers[item.topic.name]
                assert reader is not None
                reader.add(item)
    if not any(count.count for count in counts.values()):
        listed = f" Topics without messages: {', '.join(list(counts)[:8])}." if counts else ""
        reason = f" {damages[0]}." if damages else ""
        raise InputError(f"{recording.path} holds no messages: nothing was recorded.{reason}{listed}")
    found = {name: reader for name, reader in readers.items() if reader is not None}
    for reader in found.values():
        reader.check()
    columns = {key: column for reader in found.values() for key, column in reader.columns.items()}
    return Table(
        recording,
        counts,
        {name: reader.series() for name, reader in found.items()},
        {name: reader.first_picture for name, reader in found.items() if reader.first_picture},
        {key: column.names for key, column in columns.items()},
        damages,
        {name: (reader.bad, reader.bad_reason) for name, reader in found.items() if reader.bad},
        {key: column.odd for key, column in columns.items() if column.odd},
        {key: column.not_finite for key, column in columns.items() if column.not_finite},
    )


class _Column:
    """Numbers of one key, row after row."""

    def __init__(self, source: NumbersFrom, kind: MessageType) -> None:
        self.source = source
        self.names_list = kind.names_list() if source.joints else None
        self.width = len(source.joints)
        self.names = source.joints or kind.leaf_names(source.field)
        self.seen: set[str] = set()
        self.orders: dict[tuple[str, ...], list[int]] = {}
        self.values, self.filled = array("f"), 0
        self.odd, self.not_finite = 0, 0

    def add(self, message: Any) -> None:
        found = numbers(message, self.source.field)
        if self.source.joints:
            found = self._by_name(message, found)
        else:
            self.not_finite += not all(map(math.isfinite, found))
        if self.width == 0 and found:
            self.width = len(found)
            self.values.extend([math.nan] * (self.width * self.filled))
        if len(found) != self.width:
            self.odd += len(found) > 0
            found = [math.nan] * self.width
        self.filled += 1
        self.values.extend(found)
        if len(self.values) > MAX_VALUES:
            raise InputError(f"has more than {MAX_VALUES} numbers; split the bag with ros2 bag convert")

    def _by_name(self, message: Any, found: list[float]) -> list[float]:
        if self.names_list is None:
            raise InputError("has no list of names; leave 'joints' out")
        names = tuple(getattr(message, self.names_list))
        if names not in self.orders:
            if len(self.orders) > MAX_NAMES:
                raise InputError(f"names its joints in more than {MAX_NAMES} ways")
            self.seen.update(names)
            self.orders[names] = [names.index(joint) if joint in names else -1 for joint in self.source.joints]
        order = self.orders[names]
        if len(found) != len(names):
            self.odd += len(found) > 0
            return [math.nan] * self.width
        here = [found[place] if place >= 0 else math.nan for place in order]
        self.not_finite += any(place >= 0 and not math.isfinite(found[place]) for place in order)
        return here

    def rows(self) -> np.ndarray:
        return np.frombuffer(self.values, np.float32).reshape(self.filled, self.width)


class _Reader:
    """Collects what a mapping wants of one topic."""

    def __init__(self, recording: Recording, topic: Topic, mapping: BagMapping) -> None:
        self.recording, self.topic = recording, topic
        try:
            self.kind = message_type(topic)
        except InputError as error:
            raise InputError(f"{recording.path}: {topic.name} cannot be read: {error}.") from error
        self.columns = {
            key: _Column(source, self.kind)
            for key, source in mapping.observations.items()
            if source.topic == topic.name
        }
        action = mapping.action
        if action is not None and action.topic == topic.name:
            self.columns[ACTION] = _Column(NumbersFrom(topic.name, action.field, action.joints), self.kind)
        says = [part.topic for part in (mapping.instruction, mapping.success) if isinstance(part, FromTopic)]
        self.says = topic.name in says
        self.pictures = topic.kind in (IMAGE, COMPRESSED_IMAGE)
        if self.pictures is False and any(source.topic == topic.name for source in mapping.images.values()):
            raise InputError(f"{recording.path}: {topic.name} is {topic.kind}, no camera; put it under observations.")
        self.header = self.kind.has_header
        self.stamps, self.logs, self.number = array("q"), array("q"), array("q")
        self.texts: list[str | bool | None] = []
        self.first_picture, self.count, self.bad, self.bad_reason = b"", 0, 0, ""

    def add(self, message: Message) -> None:
        number, self.count = self.count, self.count + 1
        try:
            decoded = self.kind.decode(message.data) if self.columns or self.says else None
            stamp = self.kind.header_stamp(message.data) if self.header else 0
        except InputError as error:
            self.bad, self.bad_reason = self.bad + 1, self.bad_reason or str(error)
            return
        for column in self.columns.values():
            try:
                column.add(decoded)
            except InputError as error:
                paths = self.kind.number_paths()
                listed = f" Fields with numbers: {', '.join(paths[:24])}" if paths else " It has no numbers"
                raise InputError(
                    f"{self.recording.path}: {self.topic.name} ({self.topic.kind}) {str(error).rstrip('.')}.{listed}."
                ) from error
        if self.says:
            said = getattr(decoded, "data", None)
            self.texts.append(said if isinstance(said, (str, bool)) else None)
        if self.pictures and not self.first_picture:
            self.first_picture = message.data
        self.stamps.append(stamp)
        self.logs.append(message.log_ns)
        self.number.append(number)

    def check(self) -> None:
        """Raise InputError if nothing of the topic is of use, or a joint is named by no message."""
        where = f"{self.recording.path}: {self.topic.name}"
        if self.bad == self.count:
            raise InputError(f"{where}: none of its {self.count} messages can be decoded: {self.bad_reason}.")
        for column in self.columns.values():
            for joint in column.source.joints:
                if joint not in column.seen:
                    raise InputError(f"{where} never names the joint '{joint}'.{suggest(joint, column.seen)}")
            if column.width == 0 or not np.isfinite(column.rows()).any(0).all():
                raise InputError(f"{where} never has a number in '{column.source.field}' for all of its entries.")

    def series(self) -> Series:
        stamps, logs, number = (
            np.frombuffer(a, np.int64) if len(a) else np.zeros(0, np.int64)
            for a in (self.stamps, self.logs, self.number)
        )
        columns = {key: column.rows() for key, column in self.columns.items()}
        return Series(self.topic, number, stamps, logs, columns, self.texts)


def listed_topics(table: Table) -> str:
    """One line per topic with messages: name, type, count and rate."""
    rows = sorted((count for count in table.counts.values() if count.count), key=lambda count: -count.count)
    shown = [f"  {row.topic.name}  {row.topic.kind}  {row.count} messages, {row.rate:.3g} Hz" for row in rows[:30]]
    return "\n".join(shown + ([f"  ... and {len(rows) - 30} more"] if len(rows) > 30 else []))
