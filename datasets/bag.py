"""One rosbag2 MCAP file as arrays by topic. Needs no ROS; a file whose recorder was killed reads up to the break."""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError

log = logging.getLogger(__name__)

JOINT_STATE, IMAGE = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image"
JOINT_TRAJECTORY, STRING = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/String"
POSE_STAMPED = "geometry_msgs/msg/PoseStamped"
MAGIC = b"\x89MCAP0\r\n"


@dataclasses.dataclass
class Series:
    """Messages of one topic, in the order they were received.

    Attributes:
        stamp_ns: (M,) header stamps [ns], on the sender's clock; the receive time where there is no header or stamp 0.
        log_ns: (M,) receive times [ns], on the recorder's clock.
        values: what `scan` kept of each message; empty for images, which are decoded by `read_images`.
    """

    stamp_ns: np.ndarray
    log_ns: np.ndarray
    values: list[Any]

    def last_not_after(self, stamp_ns: int) -> int:
        """Index of the newest message whose stamp is at most `stamp_ns`; -1 when there is none."""
        return int(np.searchsorted(self.stamp_ns, stamp_ns, side="right")) - 1


@dataclasses.dataclass
class Bag:
    """The topics of one file, by type.

    Attributes:
        joint_states: topic -> Series of (names, position, velocity).
        trajectories: topic -> Series of (frame_id, names, last point's positions).
        poses: topic -> Series of (3,) positions [m].
        images: topic -> Series without values.
        events: topic -> Series of JSON objects, from String messages that hold one.
        metadata: name -> the MCAP metadata record's dict.
        complete: False when the file ends in the middle, as after a kill.
    """

    path: Path
    joint_states: dict[str, Series]
    trajectories: dict[str, Series]
    poses: dict[str, Series]
    images: dict[str, Series]
    events: dict[str, Series]
    metadata: dict[str, dict[str, str]]
    complete: bool


def is_mcap(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def scan(path: Path) -> Bag:
    """Read everything but the pixels. Raises InputError when the file is no MCAP or a message cannot be decoded."""
    kept: dict[str, dict[str, list[tuple[int, int, Any]]]] = {
        kind: {} for kind in (JOINT_STATE, JOINT_TRAJECTORY, POSE_STAMPED, IMAGE, STRING)
    }
    metadata: dict[str, dict[str, str]] = {}
    complete = False
    for record in _records(path):
        if record is None:
            complete = True
        elif isinstance(record, _Metadata):
            metadata[record.name] = record.values
        elif record.kind in kept and (row := _row(record, path)) is not None:
            kept[record.kind].setdefault(record.topic, []).append(row)
    series = {kind: {topic: _series(rows) for topic, rows in topics.items()} for kind, topics in kept.items()}
    if not complete:
        log.warning("%s ends in the middle of a record: its recorder was killed. What came before is used.", path)
    return Bag(
        path,
        joint_states=series[JOINT_STATE],
        trajectories=series[JOINT_TRAJECTORY],
        poses=series[POSE_STAMPED],
        images=series[IMAGE],
        events=series[STRING],
        metadata=metadata,
        complete=complete,
    )


def read_images(path: Path, wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decode some images of some topics: topic -> (n,) message numbers in the topic -> (n, H, W, 3) uint8.

    A second pass over the file, so that memory holds the images asked for and no others.
    """
    count = dict.fromkeys(wanted, 0)
    number = {topic: {int(i) for i in numbers} for topic, numbers in wanted.items()}
    found: dict[str, dict[int, np.ndarray]] = {topic: {} for topic in wanted}
    for record in _records(path):
        if isinstance(record, _Message) and record.kind == IMAGE and record.topic in wanted:
            if count[record.topic] in number[record.topic]:
                found[record.topic][count[record.topic]] = _pixels(record, path)
            count[record.topic] += 1
    return {topic: np.stack([found[topic][int(i)] for i in numbers]) for topic, numbers in wanted.items()}


@dataclasses.dataclass(frozen=True)
class _Message:
    topic: str
    kind: str
    data: bytes
    log_ns: int


@dataclasses.dataclass(frozen=True)
class _Metadata:
    name: str
    values: dict[str, str]


def _records(path: Path) -> Iterator[_Message | _Metadata | None]:
    """Messages and metadata in file order; None at the end of a file that was closed properly."""
    try:
        from mcap.exceptions import McapError
        from mcap.records import Channel, Footer, Message, Metadata, Schema
        from mcap.stream_reader import StreamReader
    except ImportError as error:
        raise MissingExtraError("mcap", "ros", "Reading rosbag2 MCAP files") from error
    schemas: dict[int, str] = {}
    channels: dict[int, tuple[str, str]] = {}
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{path} is not an MCAP file: it starts with other bytes.")
        file.seek(0)
        try:
            for record in StreamReader(file, record_size_limit=1 << 30).records:
                if isinstance(record, Schema):
                    schemas[record.id] = record.name
                elif isinstance(record, Channel):
                    channels[record.id] = (record.topic, schemas.get(record.schema_id, ""))
                elif isinstance(record, Message):
                    topic, kind = channels[record.channel_id]
                    yield _Message(topic, kind, record.data, record.log_time)
                elif isinstance(record, Metadata):
                    yield _Metadata(record.name, record.metadata)
                elif isinstance(record, Footer):
                    yield None
        except (McapError, KeyError, ValueError) as error:
            # The break of a killed recorder: the reader's error depends on the byte at which it falls.
            log.debug("%s: %s", path, error)


@functools.cache
def _typestore() -> Any:
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise MissingExtraError("rosbags", "ros", "Reading ROS 2 messages") from error
    return get_typestore(Stores.ROS2_JAZZY)


def _decode(message: _Message, path: Path) -> Any:
    try:
        return _typestore().deserialize_cdr(message.data, message.kind)
    except Exception as error:  # rosbags raises struct, index and type errors of many kinds on damaged bytes
        raise InputError(
            f"{path}: a message of {message.topic} cannot be decoded as {message.kind}: {error}."
        ) from error


def _row(message: _Message, path: Path) -> tuple[int, int, Any] | None:
    """(stamp, log time, value) of a message; None for a String that is no JSON object."""
    if message.kind == IMAGE:
        stamp = _image_stamp(message.data)
        return stamp or message.log_ns, message.log_ns, None
    decoded = _decode(message, path)
    if message.kind == STRING:
        try:
            event = json.loads(decoded.data)
        except ValueError:
            return None
        return (message.log_ns, message.log_ns, event) if isinstance(event, dict) else None
    stamp = decoded.header.stamp.sec * 1_000_000_000 + decoded.header.stamp.nanosec
    value: Any
    if message.kind == JOINT_STATE:
        value = (tuple(decoded.name), np.asarray(decoded.position), np.asarray(decoded.velocity))
    elif message.kind == POSE_STAMPED:
        position = decoded.pose.position
        value = np.array([position.x, position.y, position.z])
    elif not decoded.points:
        return None
    else:
        value = (decoded.header.frame_id, tuple(decoded.joint_names), np.asarray(decoded.points[-1].positions))
    return stamp or message.log_ns, message.log_ns, value


def _image_stamp(data: bytes) -> int:
    """Header stamp [ns] of a serialised message that starts with a header, without decoding the rest."""
    order = "little" if data[1] & 1 else "big"
    return int.from_bytes(data[4:8], order, signed=True) * 1_000_000_000 + int.from_bytes(data[8:12], order)


def _pixels(message: _Message, path: Path) -> np.ndarray:
    image = _decode(message, path)
    if image.encoding not in ("rgb8", "bgr8"):
        raise InputError(f"{path}: {message.topic} is encoded as '{image.encoding}'; rgb8 and bgr8 are read.")
    rows = image.data.reshape(image.height, image.step)[:, : image.width * 3]
    pixels = rows.reshape(image.height, image.width, 3)
    return pixels.copy() if image.encoding == "rgb8" else pixels[..., ::-1].copy()


def _series(rows: list[tuple[int, int, Any]]) -> Series:
    stamp_ns = np.array([row[0] for row in rows], np.int64)
    # Receive order is stamp order but for a sender that publishes late; what is "not after" must hold all the same.
    return Series(
        np.maximum.accumulate(stamp_ns), np.array([row[1] for row in rows], np.int64), [row[2] for row in rows]
    )
