"""2,000 damaged rosbag2 recordings: MCAP and sqlite3, with a mapping beside them or a contract inside."""

import functools
import json
import sqlite3
import struct
import sys
from pathlib import Path

import lz4.frame
import numpy as np
import pytest
import zstandard
from mcap.writer import CompressionType

sys.path.insert(0, str(Path(__file__).parent))
import bag_samples as bags
from fuzzing import change_bytes, fuzz

FORMAT = "rosbag2"
MAPPING = """\
clock: {topic: /camera}
max_age: 0.5
observations:
  joint_position: {topic: /joint_states, field: position, joints: [b, a]}
  tool: {topic: /pose, field: pose.position}
images:
  wrist: {topic: /camera}
  side: {topic: /side}
action: {topic: /command, field: points.-1.positions, joints: [a, b], mode: joint_position}
success: {topic: /done}
"""


@functools.cache
def rows(steps: int = 6) -> list[bags.Row]:
    out: list[bags.Row] = []
    for k in range(steps):
        for part in range(3):
            now = bags.ns(k * 0.1 + part * 0.03)
            state = bags.joint_state(now, ("a", "wheel", "b"), (k + part / 10, 9.0, -k))
            out.append((now, "/joint_states", bags.JOINT_STATE, state))
        now = bags.ns(k * 0.1 + 0.05)
        pixels = np.full((3, 4, 3), k, np.uint8)
        out.append((now, "/camera", bags.IMAGE, bags.image(now, pixels)))
        out.append((now, "/side", bags.COMPRESSED, bags.compressed(now, pixels, "PNG")))
        out.append((now, "/pose", bags.POSE, bags.pose(now, (k, 0, 1))))
        goal = bags.trajectory(now + 1000, ("a", "b"), [(k, k), (k + 1, k + 2)])
        out.append((now + 2000, "/command", bags.TRAJECTORY, goal))
    out.append((bags.ns(steps * 0.1), "/done", bags.STRING, bags.text('{"success": true}')))
    return [(log_ns, topic, kind, bags.cdr(kind, message)) for log_ns, topic, kind, message in out]


def seeds(folder: Path) -> list[Path]:
    counts: dict[str, tuple[str, int]] = {}
    for _, topic, kind, _ in rows():
        counts[topic] = (kind, counts.get(topic, (kind, 0))[1] + 1)
    made = []
    for name, write in (("run_mcap", bags.write_mcap), ("run_db3", bags.write_db3)):
        made.append(folder / name)
        half = len(rows()) // 2
        suffix = name.removeprefix("run_")
        write(folder / name / f"{name}_0.{suffix}", rows()[:half])
        write(folder / name / f"{name}_1.{suffix}", rows()[half:])
        files = [f"{name}_0.{suffix}", f"{name}_1.{suffix}"]
        some = {topic: counts[topic] for topic in ("/camera", "/pose")}  # parsing YAML takes longer than the rest
        bags.write_metadata(folder / name, files, some, storage_identifier=suffix, message_count=len(rows()))
        (folder / name / "embodied_mapping.yaml").write_text(MAPPING)
    made.append(deployed(folder / "deployed.mcap"))
    return made


def deployed(path: Path) -> Path:
    """A bag of `embodied deploy` in small: its contract, joint states, commands and pictures."""
    array = {"dtype": "float32", "unit": "", "names": [], "low": [], "high": [], "privileged": False}
    contract = {
        "observations": [{"key": "joint_position", "spec": array | {"shape": [2], "names": ["a", "b"]}}],
        "images": [{"camera": "wrist", "spec": array | {"shape": [3, 4, 3], "dtype": "uint8"}}],
        "action": array
        | {"shape": [2], "names": ["a", "b"], "control_mode": "joint_position_delta", "scale": [0.1, 0.1]},
        "control_dt": 0.1,
    }
    out = []
    for k in range(6):
        now = bags.ns(k * 0.1)
        out.append((now, "/joint_states", bags.JOINT_STATE, bags.joint_state(now, ("b", "a"), (k, -k), (0, 0))))
        pixels = np.full((3, 4, 3), k, np.uint8)
        out.append((now, "/camera/wrist/image_raw", bags.IMAGE, bags.image(now, pixels)))
        goal = bags.trajectory(now + 1000, ("a", "b"), [(k / 10, k / 20)])
        out.append((now + 2000, "/bridge/command", bags.TRAJECTORY, goal))
    out.insert(0, (bags.ns(0), "/bridge/event", bags.STRING, bags.text(json.dumps({"contract": contract}))))
    return bags.write_mcap(path, out, CompressionType.NONE)


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str | None:
    if target.is_file():
        return _messages(target, rng)
    attacks = [_mapping, _metadata, _wrong_file]
    attacks += [_mcap_records, _mcap_bomb, _definitions, _messages] if "mcap" in target.name else [_tables, _rows]
    return attacks[int(rng.integers(len(attacks)))](target, rng)


def _first(target: Path, suffix: str) -> Path:
    return sorted(target.glob(f"*{suffix}"))[0]


def _mapping(target: Path, rng: np.random.Generator) -> str:
    file = target / "embodied_mapping.yaml"
    old, new = [
        ("/camera}", "/joint_states}"),
        ("clock: {topic: /camera}", "clock: {rate: 1.0e+9}"),
        ("clock: {topic: /camera}", "clock: {rate: 9999}"),
        ("max_age: 0.5", "max_age: .inf"),
        ("max_age: 0.5", "stamps: received"),
        ("points.-1.positions", "points.99999999999999999999.positions"),
        ("points.-1.positions", "header.stamp"),
        ("field: pose.position", "field: __class__.__mro__"),
        ("field: pose.position", "field: header.frame_id"),
        ("joints: [b, a]", "joints: [b, a, gripper]"),
        ("joints: [b, a]", "joints: *x"),
        ("observations:", "observations: &a\n  x: *a"),
        ("wrist: {topic: /camera}", "wrist: {topic: /camera, size: [1024, 1024]}"),
        ("wrist: {topic: /camera}", "../../wrist: {topic: /camera}"),
        ("wrist: {topic: /camera}", "wrist: {topic: /pose}"),
        ("tool:", "age_joint_position:"),
        ("mode: joint_position}", "mode: joint}"),
        ("max_age: 0.5", "max_age: !!python/object/apply:os.system ['touch hacked']"),
        ("max_age: 0.5", "max_age: 1.0e-9"),
        ("/done}", "/nothing}"),
        (MAPPING, "[" * 5000),
    ][int(rng.integers(21))]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return f"mapping: {new[:40]!r}"


def _metadata(target: Path, rng: np.random.Generator) -> str:
    names = [
        ["../../../etc/passwd"],
        ["/etc/passwd", "nothing.mcap"],
        [1, None, {}],
        ["x" * 2000] * 20,
        "run_0.mcap",
    ][int(rng.integers(5))]
    count = [-1, 2**70, "many", None, [1]][int(rng.integers(5))]
    bags.write_metadata(target, [], {"/camera": (bags.IMAGE, 3)}, relative_file_paths=names, message_count=count)
    return f"metadata: {str(names)[:40]}, {count}"


def _wrong_file(target: Path, rng: np.random.Generator) -> str:
    file = sorted(target.glob("run_*"))[int(rng.integers(2))]
    kind = int(rng.integers(5))
    data = file.read_bytes()
    if kind == 0:
        file.write_bytes(b"")
    elif kind == 1:
        file.unlink()
    elif kind == 2:
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    elif kind == 3:
        file.with_name(f"{file.name}.zstd").write_bytes(change_bytes(zstandard.compress(data), rng))
        file.unlink()
    else:
        file.with_name(f"{file.name}.zstd").write_bytes(_zeros_after(data[:64]))
        file.unlink()
    return f"file {kind}"


@functools.cache
def _zeros_after(head: bytes) -> bytes:
    return zstandard.compress(head + bytes(1 << 27))


def _mcap_records(target: Path, rng: np.random.Generator) -> str:
    """One record's type or length made absurd."""
    file = _first(target, ".mcap")
    data = bytearray(file.read_bytes())
    starts, at = [], 8
    while at + 9 <= len(data) - 8:
        starts.append(at)
        at += 9 + int.from_bytes(data[at + 1 : at + 9], "little")
    at = starts[int(rng.integers(len(starts)))]
    if rng.random() < 0.3:
        data[at] = int(rng.integers(256))
    else:
        length = [0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1, len(data)][int(rng.integers(7))]
        data[at + 1 : at + 9] = length.to_bytes(8, "little")
    file.write_bytes(data)
    return "an MCAP record's length"


@functools.cache
def _bomb(compression: str, size: int) -> bytes:
    plain = bytes(size) if size > 1000 else b"\x05" + struct.pack("<Q", 1 << 60) + bytes(size - 9)
    squeeze = {"zstd": zstandard.compress, "lz4": lz4.frame.compress}.get(compression)
    return squeeze(plain) if squeeze else plain[:1000]


def _mcap_bomb(target: Path, rng: np.random.Generator) -> str:
    """A chunk that declares one size and is another, or that is huge."""
    grown = [1 << 24, 1 << 26, 109][int(rng.integers(3))]
    compression = ["zstd", "lz4", "", "xz"][int(rng.integers(4))]
    packed = _bomb(compression, grown)
    size = [grown, 10, 1 << 40, (1 << 63) - 1, 1 << 28][int(rng.integers(5))]
    body = struct.pack("<QQQI", 0, 1, size, 0) + struct.pack("<I", len(compression)) + compression.encode()
    body += struct.pack("<Q", len(packed)) + packed
    file = _first(target, ".mcap")
    data = file.read_bytes()
    start = 8 + 9 + int.from_bytes(data[9:17], "little")
    file.write_bytes(data[:start] + b"\x06" + struct.pack("<Q", len(body)) + body + data[start:])
    return f"chunk of {grown} as {compression} said to be {size}"


def _definitions(target: Path, rng: np.random.Generator) -> str:
    line = "=" * 80
    nest = (
        "\n".join(f"{line}\nMSG: a/B{k}\nB{k + 1} x\nB{k + 1} y" for k in range(40)) + f"\n{line}\nMSG: a/B40\nint8 x"
    )
    text = [
        "JointState x\n",
        "float64[1000000000] position\n",
        "geometry_msgs/Point[100000] p\n" + f"{line}\nMSG: geometry_msgs/Point\nfloat64 x\n",
        "\n".join(f"float64 x{k}" for k in range(3000)),
        f"std_msgs/Header header\nB0 b\n{nest}\n",
        "string name\nfloat64 position\n",
        "std_msgs/Empty[] e\n" + f"{line}\nMSG: std_msgs/Empty\n",
        "int32 class\nint32 None\nint32 self\nint32 __init__\n",
        "x" * 300_000,
        'string a "\\"); import os; os.system(\\"touch hacked\\") #"\n',
        "uint8 A=1\nstring B='''\\n",
        "\x00\xff\n",
        bags.definition(bags.JOINT_STATE).replace("float64[] position", "float64[3] position"),
        bags.definition(bags.JOINT_STATE).replace("string[] name", "string[<=1] name"),
    ][int(rng.integers(14))]
    half = rows()[: len(rows()) // 2]
    kind = [bags.JOINT_STATE, bags.IMAGE, bags.POSE][int(rng.integers(3))]
    encoding = "cdr" if rng.random() < 0.7 else str(rng.choice(["ros1", "", "wrong_format", "json"]))
    bags.write_mcap(_first(target, ".mcap"), half, encoding=encoding, definitions={kind: text})
    return f"definition of {kind}: {text[:30]!r} {encoding}"


def _messages(target: Path, rng: np.random.Generator) -> str:
    """Damaged bytes inside the messages, with every checksum right."""
    file = target if target.is_file() else _first(target, ".mcap")
    kind = int(rng.integers(4))
    if target.is_file():
        from mcap.reader import make_reader

        with open(file, "rb") as stream:
            read = make_reader(stream).iter_messages()
            half = [
                (message.log_time, channel.topic, schema.name if schema else "", message.data)
                for schema, channel, message in read
            ]
    else:
        half = rows()[:15]
    for _ in range(int(rng.choice([1, 3, 10]))):
        at = int(rng.integers(len(half)))
        log_ns, topic, name, data = half[at]
        changed = bytearray(data)
        if kind == 0:
            changed = bytearray(change_bytes(data, rng))
        elif kind == 1 and len(changed) > 16:  # a length
            place = 4 * int(rng.integers(1, len(changed) // 4))
            changed[place : place + 4] = struct.pack("<I", int(rng.choice([2**31, 2**32 - 1, 2**20, 0, 7])))
        elif kind == 2:
            log_ns = [0, 2**63 - 1, 2**64 - 1, 1, bags.T0 + 10**15][int(rng.integers(5))]
        else:
            changed[4:12] = struct.pack("<iI", int(rng.choice([-1, 0, 2**31 - 1, 5])), int(rng.choice([0, 2**32 - 1])))
        half[at] = (log_ns, topic, name, bytes(changed))
    bags.write_mcap(file, half)
    return f"messages {kind}"


def _tables(target: Path, rng: np.random.Generator) -> str:
    """The schema of the database: views, triggers, generated columns, virtual and other tables."""
    kind = int(rng.integers(11))
    script = [
        "ALTER TABLE messages RENAME TO m; CREATE VIEW messages AS SELECT id, topic_id, timestamp, "
        "(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c) AS data FROM m;",
        "DROP TABLE messages; CREATE VIRTUAL TABLE messages USING fts5(topic_id, timestamp, data);",
        "DROP TABLE messages; CREATE TABLE messages(topic_id INTEGER, timestamp INTEGER, "
        "data BLOB AS (zeroblob(200000000)));"
        "INSERT INTO messages(topic_id, timestamp) VALUES (1, 1), (1, 2);",
        "CREATE TRIGGER t AFTER INSERT ON messages BEGIN DELETE FROM messages; END;",
        "DROP TABLE topics; CREATE TABLE topics(id TEXT, name BLOB, type INTEGER, serialization_format TEXT);"
        "INSERT INTO topics VALUES ('x', x'00ff', 1, 'cdr');",
        "DROP TABLE topics;",
        "UPDATE topics SET serialization_format = 'wrong_format';",
        "UPDATE topics SET name = '/joint_states';",
        "UPDATE topics SET type = 'a/msg/B' WHERE id = 1;",
        "DROP TABLE messages; CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, "
        "data BLOB) WITHOUT ROWID;",
        "WITH RECURSIVE c(x) AS (SELECT 100 UNION ALL SELECT x + 1 FROM c LIMIT 2000) "
        "INSERT INTO topics SELECT x, 't' || x, 'std_msgs/msg/String', 'cdr', '' FROM c;",
    ][kind]
    _script(_first(target, ".db3"), script)
    return f"tables {kind}"


def _rows(target: Path, rng: np.random.Generator) -> str:
    kind = int(rng.integers(9))
    script = [
        "UPDATE messages SET data = zeroblob(30000000) WHERE id = 2;",
        "UPDATE messages SET data = 'text' WHERE id % 3 = 0;",
        "UPDATE messages SET timestamp = -timestamp WHERE id % 2 = 0;",
        "UPDATE messages SET timestamp = 'soon' WHERE id = 1;",
        "UPDATE messages SET timestamp = 9223372036854775807 WHERE id = 3;",
        "UPDATE messages SET topic_id = 99;",
        "UPDATE messages SET topic_id = (topic_id % 5) + 1;",
        "UPDATE messages SET data = substr(data, 1, id % 40);",
        "UPDATE messages SET data = x'28b52ffd' || data WHERE id % 2 = 0;",
    ][kind]
    _script(_first(target, ".db3"), script)
    return f"rows {kind}"


def _script(file: Path, script: str) -> None:
    connection = sqlite3.connect(file)
    connection.executescript(script)
    connection.commit()
    connection.close()


def test_fuzz():
    pytest.importorskip("rosbags")
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 300
    assert counts.get("partial", 0) + counts.get("whole", 0) > 500
