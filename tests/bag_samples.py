"""Small bags for tests, written by other libraries than those that read them: rosbags, mcap, sqlite3."""

import functools
import io
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mcap.writer import CompressionType, Writer
from rosbags.typesys import Stores, get_typestore

ROS2, ROS1 = get_typestore(Stores.ROS2_JAZZY), get_typestore(Stores.ROS1_NOETIC)
T0 = 1_700_000_000_000_000_000  # [ns]
JOINT_STATE, IMAGE, COMPRESSED = (f"sensor_msgs/msg/{name}" for name in ("JointState", "Image", "CompressedImage"))
TRAJECTORY, FLOATS = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"
POSE, STRING, BOOL = "geometry_msgs/msg/PoseStamped", "std_msgs/msg/String", "std_msgs/msg/Bool"

Row = tuple[int, str, str, Any]  # receive time [ns], topic, type, message of ROS2's types


def ns(seconds: float) -> int:
    return T0 + round(seconds * 1e9)


def header(stamp_ns: int, store: Any = ROS2) -> Any:
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    time = store.types["builtin_interfaces/msg/Time"](seconds, nanoseconds)
    extra = {"seq": 0} if store is ROS1 else {}
    return store.types["std_msgs/msg/Header"](stamp=time, frame_id="", **extra)


def joint_state(
    stamp_ns: int, names: Sequence[str], position: Sequence[float], velocity: Sequence[float] = (), store: Any = ROS2
) -> Any:
    kind = store.types[JOINT_STATE]
    return kind(header(stamp_ns, store), list(names), np.array(position, float), np.array(velocity, float), np.zeros(0))


def image(stamp_ns: int, pixels: np.ndarray, encoding: str = "rgb8", store: Any = ROS2) -> Any:
    height, width = pixels.shape[:2]
    step = pixels.size // height * pixels.itemsize
    data = np.frombuffer(pixels.tobytes(), np.uint8)
    return store.types[IMAGE](header(stamp_ns, store), height, width, encoding, 0, step, data)


def compressed(stamp_ns: int, pixels: np.ndarray, format: str) -> Any:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return ROS2.types[COMPRESSED](header(stamp_ns), format, np.frombuffer(out.getvalue(), np.uint8))


def pose(stamp_ns: int, position: Sequence[float]) -> Any:
    kinds = ROS2.types
    point = kinds["geometry_msgs/msg/Point"](*position)
    turn = kinds["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    return kinds[POSE](header(stamp_ns), kinds["geometry_msgs/msg/Pose"](point, turn))


def trajectory(stamp_ns: int, names: Sequence[str], points: Sequence[Sequence[float]]) -> Any:
    kinds = ROS2.types
    empty = np.zeros(0)
    after = kinds["builtin_interfaces/msg/Duration"](0, 100_000_000)
    point = kinds["trajectory_msgs/msg/JointTrajectoryPoint"]
    return kinds[TRAJECTORY](
        header(stamp_ns), list(names), [point(np.array(p, float), empty, empty, empty, after) for p in points]
    )


def floats(values: Sequence[float]) -> Any:
    layout = ROS2.types["std_msgs/msg/MultiArrayLayout"]([], 0)
    return ROS2.types[FLOATS](layout, np.array(values, float))


def text(value: str) -> Any:
    return ROS2.types[STRING](value)


@functools.cache
def definition(kind: str) -> str:
    return ROS2.generate_msgdef(kind, ros_version=2)[0]


def cdr(kind: str, message: Any) -> bytes:
    return bytes(ROS2.serialize_cdr(message, kind))


def write_mcap(
    path: Path,
    rows: Sequence[Row],
    compression: CompressionType = CompressionType.ZSTD,
    encoding: str = "cdr",
    definitions: Mapping[str, str] | None = None,
    chunk_size: int = 2048,
) -> Path:
    """An MCAP with the rows in their order. `definitions` replaces the text of some types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = Writer(file, chunk_size=chunk_size, compression=compression)
        writer.start(profile="ros2", library="test")
        channels: dict[str, int] = {}
        for log_ns, topic, kind, message in rows:
            if topic not in channels:
                described = (definitions or {}).get(kind)
                described = definition(kind) if described is None else described
                schema = writer.register_schema(kind, "ros2msg", described.encode())
                channels[topic] = writer.register_channel(topic, encoding, schema)
            data = message if isinstance(message, bytes) else cdr(kind, message)
            writer.add_message(channels[topic], log_ns, data, log_ns)
        writer.finish()
    return path


def write_db3(path: Path, rows: Sequence[Row], definitions: bool = False, page_size: int = 512) -> Path:
    """A sqlite3 bag as rosbag2 makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(
        f"PRAGMA page_size={page_size};"
        "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL,"
        " serialization_format TEXT NOT NULL, offered_qos_profiles TEXT NOT NULL);"
        "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL,"
        " data BLOB NOT NULL);"
        "CREATE INDEX timestamp_idx ON messages (timestamp ASC);"
    )
    topics: dict[str, int] = {}
    kinds: set[str] = set()
    for log_ns, topic, kind, message in rows:
        if topic not in topics:
            topics[topic] = len(topics) + 1
            connection.execute("INSERT INTO topics VALUES(?, ?, ?, 'cdr', '')", (topics[topic], topic, kind))
            kinds.add(kind)
        data = message if isinstance(message, bytes) else cdr(kind, message)
        values = (topics[topic], log_ns, data)
        connection.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES(?, ?, ?)", values)
    if definitions:
        connection.execute(
            "CREATE TABLE message_definitions(id INTEGER PRIMARY KEY, topic_type TEXT NOT NULL, encoding TEXT NOT NULL,"
            " encoded_message_definition TEXT NOT NULL, type_description_hash TEXT NOT NULL)"
        )
        for kind in sorted(kinds):
            connection.execute(
                "INSERT INTO message_definitions VALUES(NULL, ?, 'ros2msg', ?, '')", (kind, definition(kind))
            )
    connection.commit()
    connection.close()
    return path


def write_metadata(folder: Path, files: Sequence[str], counts: Mapping[str, tuple[str, int]], **more: Any) -> None:
    """A metadata.yaml. `counts`: topic -> (type, messages)."""
    topics = [
        {"topic_metadata": {"name": name, "type": kind, "serialization_format": "cdr"}, "message_count": count}
        for name, (kind, count) in counts.items()
    ]
    claims = {
        "version": 5,
        "storage_identifier": "mcap",
        "relative_file_paths": list(files),
        "message_count": sum(count for _, count in counts.values()),
        "topics_with_message_count": topics,
    }
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": claims | more}))


def write_ros1(path: Path, rows: Sequence[tuple[int, str, str, Any]], compression: str = "none") -> Path:
    """A ROS 1 bag with one chunk and no index, as one whose recorder was killed. Messages are of ROS1's types."""
    import bz2

    import lz4.frame

    path.parent.mkdir(parents=True, exist_ok=True)
    body, numbers = b"", {}
    for log_ns, topic, kind, message in rows:
        if topic not in numbers:
            numbers[topic] = len(numbers)
            body += ros1_connection(numbers[topic], topic, kind, *ROS1.generate_msgdef(kind, ros_version=1))
        data = message if isinstance(message, bytes) else bytes(ROS1.serialize_ros1(message, kind))
        stamp = struct.pack("<II", *divmod(log_ns, 1_000_000_000))
        body += ros1_record({"op": b"\x02", "conn": struct.pack("<I", numbers[topic]), "time": stamp}, data)
    squeeze = {"none": bytes, "bz2": bz2.compress, "lz4": lz4.frame.compress}[compression]
    head = {"op": b"\x05", "compression": compression.encode(), "size": struct.pack("<I", len(body))}
    fields = {"op": b"\x03", "index_pos": bytes(8), "conn_count": bytes(4), "chunk_count": bytes(4)}
    path.write_bytes(b"#ROSBAG V2.0\n" + ros1_record(fields, b" " * 64) + ros1_record(head, squeeze(body)))
    return path


def ros1_record(fields: Mapping[str, bytes], data: bytes) -> bytes:
    parts = [name.encode() + b"=" + value for name, value in fields.items()]
    head = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return struct.pack("<I", len(head)) + head + struct.pack("<I", len(data)) + data


def ros1_connection(number: int, topic: str, kind: str, text: str, digest: str) -> bytes:
    about = {
        "topic": topic.encode(),
        "type": kind.replace("/msg/", "/").encode(),
        "md5sum": digest.encode(),
        "message_definition": text.encode(),
    }
    parts = [name.encode() + b"=" + value for name, value in about.items()]
    data = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return ros1_record({"op": b"\x07", "conn": struct.pack("<I", number), "topic": topic.encode()}, data)
