"""ROS 2 messages as bytes: encode, decode, type hashes and definitions. No ROS installation, no DDS.

CDR is written and read by rosbags; its bytes equal rclpy's (tests hold golden bytes and hashes). Stamps are integers,
nanoseconds since the Unix epoch; arrays are NumPy arrays.
"""

import dataclasses
import functools
import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError, suggest
from embodied.robot_bridge.interfaces import DISTRO, typestore

JOINT_STATE = "sensor_msgs/msg/JointState"
IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
JOINT_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
FLOAT_ARRAY = "std_msgs/msg/Float64MultiArray"
JOINT_JOG = "control_msgs/msg/JointJog"
TWIST_STAMPED = "geometry_msgs/msg/TwistStamped"
JOY = "sensor_msgs/msg/Joy"
STRING = "std_msgs/msg/String"
BOOL = "std_msgs/msg/Bool"
CLOCK = "rosgraph_msgs/msg/Clock"
TF_MESSAGE = "tf2_msgs/msg/TFMessage"
POSE_STAMPED = "geometry_msgs/msg/PoseStamped"
DIAGNOSTIC_ARRAY = "diagnostic_msgs/msg/DiagnosticArray"
PARTICIPANT_INFO = "rmw_dds_common/msg/ParticipantEntitiesInfo"
TRIGGER = "std_srvs/srv/Trigger"
SET_BOOL = "std_srvs/srv/SetBool"

# Channels of an Image's encoding that make red, green and blue.
ENCODINGS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2, 3), "bgra8": (2, 1, 0, 3), "mono8": (0,)}
MAX_PIXELS = 50_000_000  # a compressed picture that claims more is refused before it is unpacked


def message_class(message_type: str) -> Any:
    """The dataclass of a type named `package/msg/Name`."""
    store = typestore()
    if message_type not in store.fielddefs:
        package = message_type.split("/")[0] + "/"
        known = [name for name in store.fielddefs if name.startswith(package)]
        raise InputError(f"'{message_type}' is no message type of ROS 2 {DISTRO}.{suggest(message_type, known)}")
    return store.types[message_type]


def encode(message: Any) -> bytes:
    """CDR bytes, little endian, with the four-byte header."""
    return bytes(typestore().serialize_cdr(message, message.__msgtype__))


def decode(data: bytes, message_type: str) -> Any:
    """The message in CDR `data`.

    Raises:
        InputError: the bytes are no message of that type.
    """
    # Pictures are not copied out of `data`; a view of anything wider than a byte would lie on unaligned memory.
    source = memoryview(data) if message_type in (IMAGE, COMPRESSED_IMAGE) else data
    try:
        return typestore().deserialize_cdr(source, message_type)
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


def new(name: str, *fields: Any) -> Any:
    """A message of a type, by its fields in order."""
    return message_class(name)(*fields)


def time(stamp_ns: int) -> Any:
    """builtin_interfaces/Time."""
    return new("builtin_interfaces/msg/Time", int(stamp_ns // 10**9), int(stamp_ns % 10**9))


def duration(seconds: float) -> Any:
    """builtin_interfaces/Duration."""
    nanoseconds = round(float(seconds) * 1e9)
    return new("builtin_interfaces/msg/Duration", nanoseconds // 10**9, nanoseconds % 10**9)


def header(stamp_ns: int, frame_id: str = "") -> Any:
    """std_msgs/Header."""
    return new("std_msgs/msg/Header", time(stamp_ns), frame_id)


def stamp_ns(message: Any) -> int:
    """The header's stamp [ns]."""
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def string(text: str) -> bytes:
    """std_msgs/String."""
    return encode(new(STRING, text))


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
    return encode(new(BOOL, bool(value)))


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
    return encode(new(JOINT_STATE, header(stamp), list(names), position, velocity, np.zeros(0)))


def read_joint_state(data: bytes) -> JointSample:
    """A JointState. A velocity that is not finite, such as the NaN of a joint that has none, reads as 0."""
    message = decode(data, JOINT_STATE)
    if len(message.position) != len(message.name):
        raise InputError(f"a JointState with {len(message.name)} names and {len(message.position)} positions")
    velocity = message.velocity if len(message.velocity) == len(message.name) else np.zeros(len(message.name))
    velocity = np.where(np.isfinite(velocity), velocity, 0.0)
    return JointSample(stamp_ns(message), tuple(message.name), message.position, velocity)


def image(stamp: int, frame_id: str, pixels: np.ndarray) -> bytes:
    """sensor_msgs/Image, rgb8, from (H, W, 3) uint8; row 0 is the top."""
    height, width, _ = pixels.shape
    flat = np.ascontiguousarray(pixels, np.uint8).reshape(-1)
    empty = encode(new(IMAGE, header(stamp, frame_id), height, width, "rgb8", 0, width * 3, flat[:0]))
    # The pixels come last, after their count: this copies them once.
    return b"".join((empty[:-4], struct.pack("<I", flat.size), flat.data))


def read_image(data: bytes) -> tuple[int, np.ndarray]:
    """Stamp [ns] and (H, W, 3) uint8, red first, of an Image in one of ENCODINGS; rows may be padded.

    The array is a view of `data` where the encoding allows it.
    """
    message = decode(data, IMAGE)
    if message.encoding not in ENCODINGS:
        raise InputError(f"an Image with encoding '{message.encoding}'.{suggest(message.encoding, ENCODINGS)}")
    order = ENCODINGS[message.encoding]
    height, width, step, channels = message.height, message.width, message.step, len(order)
    if step < width * channels or len(message.data) != step * height:
        raise InputError(f"an Image of {height} x {width} {message.encoding} with {len(message.data)} bytes")
    pixels = message.data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    if channels == 1:
        pixels = np.broadcast_to(pixels, (height, width, 3))
    elif order[0] == 2:
        pixels = pixels[..., 2::-1]
    return stamp_ns(message), pixels[..., :3]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "ros", "a compressed image") from error
    return Image


def compressed_image(stamp: int, frame_id: str, pixels: np.ndarray, kind: str = "jpeg", quality: int = 90) -> bytes:
    """sensor_msgs/CompressedImage from (H, W, 3) uint8; `kind` is jpeg or png."""
    file = io.BytesIO()
    _pillow().fromarray(np.ascontiguousarray(pixels, np.uint8)).save(file, kind, quality=quality)
    # The name that image_transport's plugin writes and reads.
    name = f"rgb8; {kind} compressed bgr8"
    return encode(new(COMPRESSED_IMAGE, header(stamp, frame_id), name, np.frombuffer(file.getvalue(), np.uint8)))


def read_compressed_image(data: bytes) -> tuple[int, np.ndarray]:
    """Stamp [ns] and (H, W, 3) uint8, red first, of a JPEG or PNG; what is in the bytes counts, not the format's name.

    Raises:
        InputError: another format (compressed depth among them), or a damaged or absurdly large picture.
    """
    message = decode(data, COMPRESSED_IMAGE)
    library = _pillow()
    try:
        with library.open(io.BytesIO(message.data.tobytes()), formats=("JPEG", "PNG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(f"a CompressedImage of {picture.width} x {picture.height} pixels")
            return stamp_ns(message), np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"a CompressedImage '{message.format}' of {len(message.data)} bytes that is no JPEG or PNG: {error}"
        ) from None


@dataclasses.dataclass(frozen=True)
class CameraInfo:
    """A camera's calibration.

    Attributes:
        height, width: [pixels].
        intrinsics: (3, 3) [pixels]: focal lengths on the diagonal, principal point in the last column.
        distortion: (D,) coefficients of `model`.
        model: `plumb_bob` and the like; empty if the camera is not calibrated.
    """

    height: int
    width: int
    intrinsics: np.ndarray
    distortion: np.ndarray
    model: str = "plumb_bob"


def camera_info(stamp: int, frame_id: str, info: CameraInfo) -> bytes:
    """sensor_msgs/CameraInfo of a camera whose image is already upright: no rectification, no binning."""
    k = np.asarray(info.intrinsics, np.float64).reshape(3, 3)
    projection = np.hstack([k, np.zeros((3, 1))]).reshape(-1)
    region = new("sensor_msgs/msg/RegionOfInterest", 0, 0, 0, 0, False)
    distortion = np.ascontiguousarray(info.distortion, np.float64)
    fields = (info.height, info.width, info.model, distortion, k.reshape(-1), np.eye(3).reshape(-1), projection)
    return encode(new(CAMERA_INFO, header(stamp, frame_id), *fields, 0, 0, region))


def read_camera_info(data: bytes) -> CameraInfo:
    message = decode(data, CAMERA_INFO)
    return CameraInfo(message.height, message.width, message.k.reshape(3, 3), message.d, message.distortion_model)


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
        accelerations: (K, J) [rad/s^2, m/s^2], or None.
    """

    stamp_ns: int
    frame_id: str
    names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None
    accelerations: np.ndarray | None = None


def joint_trajectory(trajectory: Trajectory) -> bytes:
    """trajectory_msgs/JointTrajectory."""
    rows = len(trajectory.times)
    empty = np.zeros((rows, 0))
    given = (trajectory.positions, trajectory.velocities, trajectory.accelerations)
    position, velocity, acceleration = (
        empty if values is None else np.ascontiguousarray(values, np.float64) for values in given
    )
    points = [
        new("trajectory_msgs/msg/JointTrajectoryPoint", *arrays, empty[k], duration(trajectory.times[k]))
        for k, arrays in enumerate(zip(position, velocity, acceleration, strict=True))
    ]
    head = header(trajectory.stamp_ns, trajectory.frame_id)
    return encode(new(JOINT_TRAJECTORY, head, list(trajectory.names), points))


def read_joint_trajectory(data: bytes) -> Trajectory:
    """A JointTrajectory; InputError if a point's length is not that of the names."""
    return _trajectory(decode(data, JOINT_TRAJECTORY))


def _trajectory(message: Any) -> Trajectory:
    names, points = tuple(message.joint_names), message.points
    lengths = {len(p.positions) for p in points} | {len(names)}
    if len(lengths) > 1:
        raise InputError(f"a JointTrajectory of {len(names)} joints whose points hold {sorted(lengths)} positions")
    shape = (len(points), len(names))

    def derivative(field: str) -> np.ndarray | None:
        found = {len(getattr(p, field)) for p in points}
        if not found <= {0, len(names)}:
            raise InputError(f"a JointTrajectory of {len(names)} joints whose points hold {sorted(found)} {field}")
        if found != {len(names)}:
            return None
        return np.array([getattr(p, field) for p in points], np.float64).reshape(shape)

    times = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in points])
    positions = np.array([p.positions for p in points], np.float64).reshape(shape)
    return Trajectory(
        stamp_ns(message),
        message.header.frame_id,
        names,
        times,
        positions,
        derivative("velocities"),
        derivative("accelerations"),
    )


def clock(stamp: int) -> bytes:
    """rosgraph_msgs/Clock."""
    return encode(new(CLOCK, time(stamp)))


def read_clock(data: bytes) -> int:
    """The time in a Clock [ns]."""
    stamp = decode(data, CLOCK).clock
    return stamp.sec * 10**9 + stamp.nanosec


@dataclasses.dataclass(frozen=True)
class Transform:
    """The pose of frame `child` in frame `parent`: position_m (3,) [m], quat_xyzw (4,)."""

    stamp_ns: int
    parent: str
    child: str
    position_m: np.ndarray
    quat_xyzw: np.ndarray


def transforms(values: Iterable[Transform]) -> bytes:
    """tf2_msgs/TFMessage."""
    stamped = []
    for value in values:
        rotation = new("geometry_msgs/msg/Quaternion", *map(float, value.quat_xyzw))
        translation = new("geometry_msgs/msg/Vector3", *map(float, value.position_m))
        pose = new("geometry_msgs/msg/Transform", translation, rotation)
        head = header(value.stamp_ns, value.parent)
        stamped.append(new("geometry_msgs/msg/TransformStamped", head, value.child, pose))
    return encode(new(TF_MESSAGE, stamped))


def read_transforms(data: bytes) -> list[Transform]:
    found = []
    for message in decode(data, TF_MESSAGE).transforms:
        p, q = message.transform.translation, message.transform.rotation
        position, quaternion = np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w])
        found.append(
            Transform(stamp_ns(message), message.header.frame_id, message.child_frame_id, position, quaternion)
        )
    return found


def pose_stamped(stamp: int, frame_id: str, position_m: np.ndarray, quat_xyzw: np.ndarray) -> bytes:
    """geometry_msgs/PoseStamped."""
    point = new("geometry_msgs/msg/Point", *map(float, position_m))
    orientation = new("geometry_msgs/msg/Quaternion", *map(float, quat_xyzw))
    pose = new("geometry_msgs/msg/Pose", point, orientation)
    return encode(new(POSE_STAMPED, header(stamp, frame_id), pose))


def read_pose_stamped(data: bytes) -> tuple[int, np.ndarray]:
    """Stamp [ns] and (7,): position [m], quat_xyzw."""
    message = decode(data, POSE_STAMPED)
    p, q = message.pose.position, message.pose.orientation
    return stamp_ns(message), np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])


def diagnostics(stamp: int, name: str, level: int, text: str, values: Mapping[str, Any]) -> bytes:
    """diagnostic_msgs/DiagnosticArray with one status; level 0 is OK, 1 a warning, 2 an error."""
    pairs = [new("diagnostic_msgs/msg/KeyValue", key, str(value)) for key, value in values.items()]
    status = new("diagnostic_msgs/msg/DiagnosticStatus", level, name, text, "", pairs)
    return encode(new(DIAGNOSTIC_ARRAY, header(stamp), [status]))


def read_diagnostics(data: bytes) -> dict[str, str]:
    """The values of the first status, and its text under `message`."""
    status = decode(data, DIAGNOSTIC_ARRAY).status[0]
    return {"message": status.message} | {pair.key: pair.value for pair in status.values}
