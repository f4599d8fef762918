"""A recording of `embodied deploy` as arrays by topic. One whose recorder was killed reads up to the break."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.bag_files import Recording
from embodied.datasets.bag_items import Damage, Message
from embodied.datasets.bag_mcap import MCAP_MAGIC
from embodied.datasets.bag_types import message_type

log = logging.getLogger(__name__)

JOINT_STATE, IMAGE = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image"
COMPRESSED_IMAGE, CAMERA_INFO = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/CameraInfo"
JOINT_TRAJECTORY, STRING = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/String"
POSE_STAMPED = "geometry_msgs/msg/PoseStamped"
PICTURES = {COMPRESSED_IMAGE: IMAGE}  # kept together


@dataclasses.dataclass
class Series:
    """Messages of one topic, in the order they were received.

    Attributes:
        stamp_ns: (M,) header stamps [ns], on the sender's clock; the receive time where there is no header or stamp 0.
        log_ns: (M,) receive times [ns], on the recorder's clock.
        values: what `scan` kept of each message; None for images, which are decoded when they are asked for.
    """

    stamp_ns: np.ndarray
    log_ns: np.ndarray
    values: list[Any]

    def last_not_after(self, stamp_ns: int) -> int:
        """Index of the newest message whose stamp is at most `stamp_ns`; -1 when there is none."""
        return int(np.searchsorted(self.stamp_ns, stamp_ns, side="right")) - 1


@dataclasses.dataclass
class Bag:
    """The topics of one recording, by type.

    Attributes:
        joint_states: topic -> Series of (names, position, velocity).
        trajectories: topic -> Series of (frame_id, names, last point's positions).
        poses: topic -> Series of (3,) positions [m].
        images: topic -> Series without values, of Image and CompressedImage messages.
        events: topic -> Series of JSON objects, from String messages that hold one.
        calibrations: topic -> its first CameraInfo, JSON-able: size, distortion, K, R, P.
        first_pictures: topic -> its first picture.
        complete: False when something is missing, as after a kill.
    """

    recording: Recording
    joint_states: dict[str, Series]
    trajectories: dict[str, Series]
    poses: dict[str, Series]
    images: dict[str, Series]
    events: dict[str, Series]
    calibrations: dict[str, dict[str, Any]]
    first_pictures: dict[str, Message]
    complete: bool

    @property
    def path(self) -> Path:
        return self.recording.path


def closed(recording: Recording) -> bool:
    """Whether the last file, if it is an MCAP, was finished by its recorder; told by its last bytes."""
    with open(recording.files[-1], "rb") as file:
        if file.read(len(MCAP_MAGIC)) != MCAP_MAGIC:
            return True
        file.seek(-len(MCAP_MAGIC), 2)
        return file.read() == MCAP_MAGIC


def scan(recording: Recording) -> Bag:
    """Read everything but the pixels. Raises InputError when it is no bag or a message cannot be decoded."""
    kept: dict[str, dict[str, list[tuple[int, int, Any]]]] = {
        kind: {} for kind in (JOINT_STATE, JOINT_TRAJECTORY, POSE_STAMPED, IMAGE, STRING)
    }
    first_pictures: dict[str, Message] = {}
    calibrations: dict[str, dict[str, Any]] = {}
    damages = []
    for item in recording.items():
        if isinstance(item, Damage):
            damages.append(item.reason)
        elif isinstance(item, Message) and item.topic.kind == CAMERA_INFO:
            if item.topic.name not in calibrations:
                calibrations[item.topic.name] = _calibration(item, recording.path)
        elif isinstance(item, Message) and (kind := PICTURES.get(item.topic.kind, item.topic.kind)) in kept:
            if kind == IMAGE:
                first_pictures.setdefault(item.topic.name, item)
            if (row := _row(item, recording.path)) is not None:
                kept[kind].setdefault(item.topic.name, []).append(row)
    series = {kind: {topic: _series(rows) for topic, rows in topics.items()} for kind, topics in kept.items()}
    if damages:
        log.warning("%s: %s. What could be read is used.", recording.path, "; ".join(damages[:3]))
    return Bag(
        recording,
        joint_states=series[JOINT_STATE],
        trajectories=series[JOINT_TRAJECTORY],
        poses=series[POSE_STAMPED],
        images=series[IMAGE],
        events=series[STRING],
        calibrations=calibrations,
        first_pictures=first_pictures,
        complete=not damages,
    )


def _row(message: Message, path: Path) -> tuple[int, int, Any] | None:
    """(stamp, log time, value) of a message; None for a String that is no JSON object."""
    kind = message.topic.kind
    try:
        reader = message_type(message.topic)
        if kind in (IMAGE, COMPRESSED_IMAGE):
            stamp = reader.header_stamp(message.data)
            return stamp or message.log_ns, message.log_ns, None
        decoded = reader.decode(message.data)
    except InputError as error:
        raise InputError(f"{path}: {message.topic.name}: {error}.") from error
    if kind == STRING:
        try:
            event = json.loads(decoded.data)
        except (ValueError, RecursionError):
            return None
        return (message.log_ns, message.log_ns, event) if isinstance(event, dict) else None
    stamp = decoded.header.stamp.sec * 1_000_000_000 + decoded.header.stamp.nanosec
    value: Any
    if kind == JOINT_STATE:
        value = (tuple(decoded.name), np.asarray(decoded.position), np.asarray(decoded.velocity))
    elif kind == POSE_STAMPED:
        position = decoded.pose.position
        value = np.array([position.x, position.y, position.z])
    elif not decoded.points:
        return None
    else:
        value = (decoded.header.frame_id, tuple(decoded.joint_names), np.asarray(decoded.points[-1].positions))
    return stamp or message.log_ns, message.log_ns, value


def _calibration(message: Message, path: Path) -> dict[str, Any]:
    try:
        found = message_type(message.topic).decode(message.data)
    except InputError as error:
        raise InputError(f"{path}: {message.topic.name}: {error}.") from error
    numbers = {key: [float(x) for x in getattr(found, key)] for key in ("d", "k", "r", "p")}
    size = {"height": int(found.height), "width": int(found.width)}
    return {"frame_id": str(found.header.frame_id), **size, "distortion_model": str(found.distortion_model), **numbers}


def _series(rows: list[tuple[int, int, Any]]) -> Series:
    stamp_ns = np.array([row[0] for row in rows], np.int64)
    # Receive order is stamp order but for a sender that publishes late; what is "not after" must hold all the same.
    return Series(
        np.maximum.accumulate(stamp_ns), np.array([row[1] for row in rows], np.int64), [row[2] for row in rows]
    )
