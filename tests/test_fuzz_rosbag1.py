"""2,000 damaged ROS 1 bags: plain, bz2 and lz4, with a mapping beside them."""

import bz2
import functools
import struct
import sys
from pathlib import Path

import lz4.frame
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import bag_samples as bags
from fuzzing import change_bytes, fuzz

FORMAT = "rosbag1"
MAPPING = """\
clock: {topic: /camera}
max_age: 0.5
observations:
  joint_position: {topic: /joint_states, field: position, joints: [b, a]}
images:
  wrist: {topic: /camera}
action: {next: joint_position, mode: joint_position}
"""


@functools.cache
def body(steps: int = 6) -> bytes:
    """Connections and messages, as in a chunk."""
    kinds = {"/joint_states": bags.JOINT_STATE, "/camera": bags.IMAGE}
    out = b""
    for number, (topic, kind) in enumerate(kinds.items()):
        out += bags.ros1_connection(number, topic, kind, *bags.ROS1.generate_msgdef(kind, ros_version=1))
    for k in range(steps):
        for part in range(3):
            now = bags.ns(k * 0.1 + part * 0.03)
            state = bags.joint_state(now, ("a", "wheel", "b"), (k + part / 10, 9, -k), store=bags.ROS1)
            out += message(0, now, bytes(bags.ROS1.serialize_ros1(state, bags.JOINT_STATE)))
        now = bags.ns(k * 0.1 + 0.07)
        picture = bags.image(now, np.full((3, 4, 3), k, np.uint8), store=bags.ROS1)
        out += message(1, now, bytes(bags.ROS1.serialize_ros1(picture, bags.IMAGE)))
    return out


def message(number: int, log_ns: int, data: bytes) -> bytes:
    stamp = struct.pack("<II", *divmod(log_ns, 1_000_000_000))
    return bags.ros1_record({"op": b"\x02", "conn": struct.pack("<I", number), "time": stamp}, data)


def chunk(plain: bytes, compression: str, size: int | None = None, packed: bytes | None = None) -> bytes:
    squeeze = {"bz2": bz2.compress, "lz4": lz4.frame.compress}.get(compression, bytes)
    size = len(plain) if size is None else size
    head = {"op": b"\x05", "compression": compression.encode(), "size": struct.pack("<I", size)}
    return bags.ros1_record(head, squeeze(plain) if packed is None else packed)


def bag(*records: bytes) -> bytes:
    head = {"op": b"\x03", "index_pos": bytes(8), "conn_count": bytes(4), "chunk_count": bytes(4)}
    return b"#ROSBAG V2.0\n" + bags.ros1_record(head, b" " * 16) + b"".join(records)


def seeds(folder: Path) -> list[Path]:
    made = []
    for compression in ("none", "bz2", "lz4"):
        made.append(folder / compression)
        made[-1].mkdir()
        (made[-1] / "run.bag").write_bytes(bag(chunk(body(3), compression), chunk(body(6), compression), index()))
        (made[-1] / "embodied_mapping.yaml").write_text(MAPPING)
    return made


def index() -> bytes:
    fields = {"op": b"\x04", "ver": struct.pack("<I", 1), "conn": bytes(4), "count": struct.pack("<I", 1)}
    about = {"op": b"\x06", "ver": struct.pack("<I", 1), "chunk_pos": bytes(8), "count": struct.pack("<I", 1)}
    return bags.ros1_record(fields, bytes(12)) + bags.ros1_record(about, bytes(8))


@functools.cache
def bomb(compression: str, size: int) -> bytes:
    return (bz2.compress if compression == "bz2" else lz4.frame.compress)(bytes(size))


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str | None:
    file, compression = target / "run.bag", target.name
    kind = int(rng.integers(10))
    plain = bytearray(body())
    data = chunk(bytes(plain), compression)
    if kind == 0:  # a bomb that says so, or does not
        kind_of_bomb = compression if compression != "none" else "lz4"
        grown = [1 << 24, 1 << 26][int(rng.integers(2))]
        size = [grown, 100, 2**32 - 1, 1 << 28][int(rng.integers(4))]
        data = data + chunk(b"", kind_of_bomb, size, bomb(kind_of_bomb, grown))
    elif kind == 1:  # damage inside a chunk whose compression is whole
        data = chunk(change_bytes(bytes(plain), rng), compression)
    elif kind == 2:  # a length inside
        at = 4 * int(rng.integers(len(plain) // 4))
        plain[at : at + 4] = struct.pack("<I", [2**31, 2**32 - 1, 0, 1 << 20][int(rng.integers(4))])
        data = chunk(bytes(plain), compression)
    elif kind == 3:  # a damaged index, or nothing but one
        data = data + change_bytes(index() * 20, rng)
    elif kind == 4:
        data = data + bytes(int(rng.integers(1, 3000))) + index()
    elif kind == 5:  # messages of a connection that is not there
        data = chunk(message(7, bags.T0, b"x"), compression) + data
    elif kind == 6:  # a definition that grows, recurs or is code
        text = [
            "JointState x\n",
            "float64[999999999] position\n",
            "Point[] p\n" + "=" * 80 + "\nMSG: geometry_msgs/Point\n",
        ]
        number = int(rng.integers(3))
        data = chunk(bags.ros1_connection(0, "/joint_states", bags.JOINT_STATE, text[number], "0") + plain, compression)
    elif kind == 7:  # another type, or compression, by name
        old, new = [(b"sensor_msgs/Image", b"sensor_msgs/Joint"), (b"/camera", b"/cameri")][int(rng.integers(2))]
        data = chunk(bytes(plain).replace(old, new), compression)
    elif kind == 8:
        data = chunk(bytes(plain), str(rng.choice(["zip", "", "bz2", "lz4"])), len(plain), data)
    else:
        file.write_bytes([b"", b"#ROSBAG V1.2\n", b"#ROSBAG V2.0\n", b"\x28\xb5\x2f\xfd" + data][int(rng.integers(4))])
        return f"another file {kind}"
    file.write_bytes(bag(data, index()))
    return f"attack {kind}"


def test_fuzz():
    pytest.importorskip("rosbags")
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 300
    assert counts.get("partial", 0) + counts.get("whole", 0) > 500
