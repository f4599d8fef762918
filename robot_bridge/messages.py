"""ROS 2 messages as bytes: encode, decode, type hashes and definitions. No ROS installation, no DDS.

CDR is written and read by rosbags; its bytes equal rclpy's (tests hold golden bytes and hashes). Stamps are integers,
nanoseconds since the Unix epoch; arrays are NumPy arrays.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError

JOINT_STATE = "sensor_msgs/msg/JointState"
IMAGE = "sensor_msgs/msg/Image"
JOINT_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
STRING = "std_msgs/msg/String"
BOOL = "std_msgs/msg/Bool"
POSE_STAMPED = "geometry_msgs/msg/PoseStamped"
DIAGNOSTIC_ARRAY = "diagnostic_msgs/msg/DiagnosticArray"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CLOCK = "rosgraph_msgs/msg/Clock"
JOY = "sensor_msgs/msg/Joy"
PARTICIPANT_INFO = "rmw_dds_common/msg/ParticipantEntitiesInfo"
DISTRO = "jazzy"

# `char` in a .msg file is uint8 on the wire and in the type hash; rosbags hashes it as a type of its own.
_CHAR_FIX = """\
uint8[16] data
"""


@functools.cache
def typestore() -> Any:
    """rosbags' types of ROS 2 Jazzy, with `char` mended where we use it."""
    try:
        from rosbags.typesys import Stores, get_types_from_msg, get_typestore
    except ImportError as error:
        raise MissingExtraError("rosbags", "ros", "the ROS 2 bridge") from error
    store = get_typestore(Stores.ROS2_JAZZY)
    store.fielddefs.update(get_types_from_msg(_CHAR_FIX, "rmw_dds_common/msg/Gid"))
    return store


def message_class(message_type: str) -> Any:
    """The dataclass of a type named `package/msg/Name`."""
    store = typestore()
    if message_type not in store.fielddefs:
        raise InputError(f"'{message_type}' is no message type of ROS 2 {DISTRO}.")
    return store.types[message_type]


def encode(message: Any) -> bytes:
    """CDR bytes, little endian, with the four-byte header."""
    return bytes(typestore().serialize_cdr(message, message.__msgtype__))


def decode(data: bytes, message_type: str) -> Any:
    """The message in CDR `data`.

    Raises:
        InputError: the bytes are no message of that type.
    """
    try:
        return typestore().deserialize_cdr(data, message_type)
    except Exception as error:
        raise InputError(f"{len(data)} bytes that are no {message_type}: {error}") from None


@functools.cache
def type_hash(message_type: str) -> str:
    """`RIHS01_` and 64 hex digits, as rosidl computes it."""
    return typestore().hash_rihs01(message_type)


@functools.cache
def definition(message_type: str) -> str:
    """The .msg text with all nested types, as rosbag2 stores it (schema encoding ros2msg)."""
    return typestore().generate_msgdef(message_type, ros_version=2)[0]


def _new(name: str, *fields: Any) -> Any:
    return message_class(name)(*fields)


def time(stamp_ns: int) -> Any:
    """builtin_interfaces/Time."""
    return _new("builtin_interfaces/msg/Time", int(stamp_ns // 10**9), int(stamp_ns % 10**9))


def header(stamp_ns: int, frame_id: str = "") -> Any:
    """std_msgs/Header."""
    return _new("std_msgs/msg/Header", time(stamp_ns), frame_id)


def stamp_ns(message: Any) -> int:
    """The header's stamp [ns]."""
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def string(text: str) -> bytes:
    """std_msgs/String."""
    return encode(_new(STRING, text))


def json_string(value: Mapping[str, Any]) -> bytes:
    """std_msgs/String holding JSON."""
    return string(json.dumps(value))


def read_string(data: bytes) -> str:
    return decode(data, STRING).data


def read_json(data: bytes) -> dict[str, Any]:
    """The JSON object in a std_msgs/String; InputError if it holds anything else."""
    text = read_string(data)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"a String that should hold JSON does not: {error}: {text[:80]!r}") from None
    if not isinstance(value, dict):
        raise InputError(f"a String that should hold a JSON object holds {text[:80]!r}")
    return value


def boolean(value: bool) -> bytes:
    """std_msgs/Bool."""
    return encode(_new(BOOL, bool(value)))


def read_bool(data: bytes) -> bool:
    return bool(decode(data, BOOL).data)


@dataclasses.dataclass(frozen=True)
class JointSample:
    """A JointState by name: position (J,) [rad, m], velocity (J,) [rad/s, m/s], zeros where the robot sends none."""

    stamp_ns: int
    names: tuple[str, ...]
    position: np.ndarray
    velocity: np.ndarray

    def select(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity in the order of `names`; InputError names the joint that is missing."""
        index = {name: i for i, name in enumerate(self.names)}
        for name in names:
            if name not in index:
                raise InputError(f"/joint_states has no joint '{name}'; it has {', '.join(self.names)}.")
        order = [index[name] for name in names]
        return self.position[order], self.velocity[order]


def joint_state(stamp: int, names: Sequence[str], position: np.ndarray, velocity: np.ndarray) -> bytes:
    """sensor_msgs/JointState; effort is left empty."""
    position, velocity = (np.ascontiguousarray(x, np.float64) for x in (position, velocity))
    return encode(_new(JOINT_STATE, header(stamp), list(names), position, velocity, np.zeros(0)))


def read_joint_state(data: bytes) -> JointSample:
    """A JointState. NaN in velocity, with which joint_state_broadcaster fills what a joint lacks, reads as 0."""
    message = decode(data, JOINT_STATE)
    if len(message.position) != len(message.name):
        raise InputError(f"a JointState with {len(message.name)} names and {len(message.position)} positions")
    velocity = message.velocity if len(message.velocity) == len(message.name) else np.zeros(len(message.name))
    return JointSample(stamp_ns(message), tuple(message.name), message.position, np.nan_to_num(velocity, nan=0.0))


def image(stamp: int, frame_id: str, pixels: np.ndarray) -> bytes:
    """sensor_msgs/Image, rgb8, from (H, W, 3) uint8; row 0 is the top."""
    height, width, _ = pixels.shape
    flat = np.ascontiguousarray(pixels, np.uint8).reshape(-1)
    return encode(_new(IMAGE, header(stamp, frame_id), height, width, "rgb8", 0, width * 3, flat))


def read_image(data: bytes) -> tuple[int, np.ndarray]:
    """Stamp [ns] and (H, W, 3) uint8 of an rgb8 or bgr8 image; rows may be padded."""
    message = decode(data, IMAGE)
    if message.encoding not in ("rgb8", "bgr8"):
        raise InputError(f"an Image with encoding '{message.encoding}'; the bridge reads rgb8 and bgr8.")
    if message.step < message.width * 3 or len(message.data) != message.step * message.height:
        raise InputError(f"an Image of {message.height} x {message.width} with {len(message.data)} bytes")
    rows = message.data.reshape(message.height, message.step)[:, : message.width * 3]
    pixels = rows.reshape(message.height, message.width, 3)
    return stamp_ns(message), pixels if message.encoding == "rgb8" else pixels[..., ::-1]


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A JointTrajectory as arrays.

    Attributes:
        stamp_ns: header stamp; 0 means "starts on arrival" to a trajectory controller.
        frame_id: free text; chunks carry `policy:<run>:<sequence>`.
        names: J joints.
        times: (K,) seconds from the start [s].
        positions: (K, J) [rad, m].
        velocities: (K, J) [rad/s, m/s], or None.
    """

    stamp_ns: int
    frame_id: str
    names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None


def joint_trajectory(trajectory: Trajectory) -> bytes:
    """trajectory_msgs/JointTrajectory."""
    empty = np.zeros(0)
    points = []
    for k, seconds in enumerate(trajectory.times):
        nanoseconds = round(float(seconds) * 1e9)
        duration = _new("builtin_interfaces/msg/Duration", nanoseconds // 10**9, nanoseconds % 10**9)
        position = np.ascontiguousarray(trajectory.positions[k], np.float64)
        velocities = trajectory.velocities
        velocity = np.ascontiguousarray(velocities[k], np.float64) if velocities is not None else empty
        points.append(
            _new("trajectory_msgs/msg/JointTrajectoryPoint", position, velocity, empty, empty, duration),
        )
    head = header(trajectory.stamp_ns, trajectory.frame_id)
    return encode(_new(JOINT_TRAJECTORY, head, list(trajectory.names), points))


def read_joint_trajectory(data: bytes) -> Trajectory:
    """A JointTrajectory; InputError if a point's length is not that of the names."""
    message = decode(data, JOINT_TRAJECTORY)
    names = tuple(message.joint_names)
    lengths = {len(p.positions) for p in message.points} | {len(names)}
    velocity_lengths = {len(p.velocities) for p in message.points}
    if len(lengths) > 1 or not velocity_lengths <= {0, len(names)}:
        raise InputError(f"a JointTrajectory of {len(names)} joints whose points hold {sorted(lengths)} positions")
    times = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points])
    shape = (len(message.points), len(names))
    positions = np.array([p.positions for p in message.points], np.float64).reshape(shape)
    velocities = None
    if velocity_lengths == {len(names)}:
        velocities = np.array([p.velocities for p in message.points], np.float64).reshape(shape)
    return Trajectory(stamp_ns(message), message.header.frame_id, names, times, positions, velocities)


def pose_stamped(stamp: int, frame_id: str, position_m: np.ndarray, quat_xyzw: np.ndarray) -> bytes:
    """geometry_msgs/PoseStamped."""
    point = _new("geometry_msgs/msg/Point", *map(float, position_m))
    orientation = _new("geometry_msgs/msg/Quaternion", *map(float, quat_xyzw))
    pose = _new("geometry_msgs/msg/Pose", point, orientation)
    return encode(_new(POSE_STAMPED, header(stamp, frame_id), pose))


def read_pose_stamped(data: bytes) -> tuple[int, np.ndarray]:
    """Stamp [ns] and (7,): position [m], quat_xyzw."""
    message = decode(data, POSE_STAMPED)
    p, q = message.pose.position, message.pose.orientation
    return stamp_ns(message), np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])


def diagnostics(stamp: int, name: str, level: int, text: str, values: Mapping[str, Any]) -> bytes:
    """diagnostic_msgs/DiagnosticArray with one status; level 0 is OK, 1 a warning, 2 an error."""
    pairs = [_new("diagnostic_msgs/msg/KeyValue", key, str(value)) for key, value in values.items()]
    status = _new("diagnostic_msgs/msg/DiagnosticStatus", level, name, text, "", pairs)
    return encode(_new(DIAGNOSTIC_ARRAY, header(stamp), [status]))


def read_diagnostics(data: bytes) -> dict[str, str]:
    """The values of the first status, and its text under `message`."""
    status = decode(data, DIAGNOSTIC_ARRAY).status[0]
    return {"message": status.message} | {pair.key: pair.value for pair in status.values}
