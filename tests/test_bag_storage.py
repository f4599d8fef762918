import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from mcap.writer import CompressionType

sys.path.insert(0, str(Path(__file__).parent))
import bag_samples as bags

from embodied.contracts.errors import InputError
from embodied.datasets.bag_files import ROSBAG1, ROSBAG2, find_recordings
from embodied.datasets.bag_items import Damage, Message, Topic
from embodied.datasets.bag_storage import read_items
from embodied.datasets.bag_types import message_type, numbers


def joints(count: int, first: int = 0) -> list[bags.Row]:
    out = []
    for k in range(first, first + count):
        now = bags.ns(k * 0.1)
        out.append((now, "/joint_states", bags.JOINT_STATE, bags.joint_state(now, ("a", "b"), (k, -k))))
    return out


def positions(path: Path) -> list[float]:
    """The first joint's position in every message, decoded."""
    found = (item for item in read_items(path) if isinstance(item, Message))
    return [float(message_type(item.topic).decode(item.data).position[0]) for item in found]


def damages(path: Path) -> list[str]:
    return [item.reason for item in read_items(path) if isinstance(item, Damage)]


@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.LZ4, CompressionType.ZSTD])
def test_mcap_of_every_compression_gives_the_same(tmp_path, compression):
    path = bags.write_mcap(tmp_path / "a.mcap", joints(50), compression)
    assert positions(path) == list(range(50))
    assert damages(path) == []
    assert [item.log_ns for item in read_items(path) if isinstance(item, Message)] == [r[0] for r in joints(50)]
    topic = next(item for item in read_items(path) if isinstance(item, Topic))
    assert (topic.name, topic.kind, topic.encoding) == ("/joint_states", bags.JOINT_STATE, "cdr")


@pytest.mark.parametrize("compression", ["none", "bz2", "lz4"])
def test_ros1_of_every_compression_gives_the_same(tmp_path, compression):
    rows = [
        (bags.ns(k * 0.1), "/j", bags.JOINT_STATE, bags.joint_state(bags.ns(k * 0.1), ("a",), (k,), store=bags.ROS1))
        for k in range(20)
    ]
    path = bags.write_ros1(tmp_path / "a.bag", rows, compression)
    assert positions(path) == list(range(20))
    item = next(item for item in read_items(path) if isinstance(item, Message))
    assert message_type(item.topic).header_stamp(item.data) == bags.T0
    cut = tmp_path / "cut.bag"
    cut.write_bytes(path.read_bytes()[:-30])
    assert "crash" in damages(cut)[0]


@pytest.mark.parametrize("write", [bags.write_mcap, bags.write_db3])
def test_zstd_of_files_and_of_messages(tmp_path, write):
    path = write(tmp_path / "a.bag", joints(30))
    packed = tmp_path / "a.bag.zstd"
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    assert positions(packed) == list(range(30))
    rows = [(log, topic, kind, zstandard.compress(bags.cdr(kind, message))) for log, topic, kind, message in joints(30)]
    assert positions(write(tmp_path / "messages.bag", rows)) == list(range(30))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bag", "a.bag.zstd", "messages.bag"]


def test_a_file_that_grows_without_end_is_refused(tmp_path):
    path = tmp_path / "bomb.mcap.zstd"
    whole = bags.write_mcap(tmp_path / "a.mcap", joints(2), CompressionType.NONE).read_bytes()
    path.write_bytes(zstandard.compress(whole[:8] + b"\x09" + (1 << 40).to_bytes(8, "little") + bytes(1 << 27)))
    with pytest.raises(InputError, match="grows more than 1000 times"):
        list(read_items(path))


def test_mcap_reads_up_to_a_break_and_past_a_damaged_chunk(tmp_path):
    path = bags.write_mcap(tmp_path / "a.mcap", joints(60), CompressionType.NONE, chunk_size=1024)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    kept = positions(path)
    assert 10 < len(kept) < 50
    assert kept == list(range(len(kept)))
    assert "middle of a record" in damages(path)[0]
    changed = bytearray(whole)
    at = whole.index(bags.cdr(bags.JOINT_STATE, joints(60)[20][3])) + 90
    changed[at] ^= 1
    path.write_bytes(changed)
    kept = positions(path)
    assert 20 not in kept
    assert kept[0] == 0
    assert kept[-1] == 59
    assert len(damages(path)) == 1
    assert "checksum" in damages(path)[0]


def test_absurd_lengths_cost_neither_memory_nor_time(tmp_path):
    path = bags.write_mcap(tmp_path / "a.mcap", joints(3), CompressionType.NONE)
    data = bytearray(path.read_bytes())
    at = 8 + 9 + int.from_bytes(data[9:17], "little")  # the record after the header
    data[at + 1 : at + 9] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(data)
    assert positions(path) == []
    assert "claims 4611686018427387904 bytes" in damages(path)[0]


def test_sqlite_gives_what_was_committed_and_what_a_journal_holds(tmp_path):
    path = bags.write_db3(tmp_path / "a.db3", joints(20))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    row = (bags.ns(2), bags.cdr(bags.JOINT_STATE, joints(1, 20)[0][3]))
    connection.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES(1, ?, ?)", row)
    connection.commit()
    (tmp_path / "killed").mkdir()
    for name in ("a.db3", "a.db3-wal"):
        shutil.copy(tmp_path / name, tmp_path / "killed" / name)  # as a recorder that was killed leaves it
    connection.close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()}
    assert positions(tmp_path / "killed" / "a.db3") == list(range(21))
    assert {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()} == before


def test_sqlite_cut_short_reads_up_to_the_break(tmp_path):
    path = bags.write_db3(tmp_path / "a.db3", joints(200))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    kept = positions(path)
    assert kept == list(range(len(kept)))
    assert len(damages(path)) == 1
    assert "database" in damages(path)[0]


def test_a_view_in_place_of_a_table_is_never_run(tmp_path):
    path = bags.write_db3(tmp_path / "a.db3", joints(3))
    connection = sqlite3.connect(path)
    connection.executescript(
        "ALTER TABLE messages RENAME TO m; CREATE VIEW messages AS SELECT id, topic_id, timestamp, (WITH RECURSIVE"
        " c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c) AS data FROM m;"
    )
    connection.close()
    with pytest.raises(InputError, match="no table 'messages'"):
        list(read_items(path))


def test_what_is_no_bag_is_refused_by_name(tmp_path):
    for content, reason in ((b"", "is empty"), (b"#ROSBAG V1.1\n", "version 1"), (b"\x89PNG\r\n\x1a\n", "is no bag")):
        (tmp_path / "x.mcap").write_bytes(content)
        with pytest.raises(InputError, match=rf"x\.mcap.*{reason}"):
            list(read_items(tmp_path / "x.mcap"))


def test_files_of_a_split_bag_are_one_recording_in_order(tmp_path):
    for k in (10, 2, 0, 1):
        bags.write_mcap(tmp_path / "run" / f"run_{k}.mcap", joints(2, 2 * k))
    bags.write_mcap(tmp_path / "other" / "lift_0.mcap", joints(1))
    bags.write_mcap(tmp_path / "other" / "lift_1.mcap", joints(1))
    found = find_recordings(tmp_path, ROSBAG2)
    assert [recording.name for recording in found] == ["lift_0.mcap", "lift_1.mcap", "run"]
    assert [file.name for file in found[2].files] == ["run_0.mcap", "run_1.mcap", "run_2.mcap", "run_10.mcap"]
    assert find_recordings(tmp_path, ROSBAG1) == []


def test_metadata_orders_the_files_and_names_none_outside(tmp_path):
    for name in ("b", "a", "late"):
        bags.write_mcap(tmp_path / f"{name}.mcap", joints(1))
    outside = bags.write_mcap(tmp_path.parent / "secret.mcap", joints(1))
    names = ["run/b.mcap", "a.mcap", "gone.mcap", "../secret.mcap", str(outside)]
    bags.write_metadata(tmp_path, names, {})
    (recording,) = find_recordings(tmp_path, ROSBAG2)
    assert [file.name for file in recording.files] == ["b.mcap", "a.mcap", "late.mcap"]
    assert [finding.check for finding in recording.findings] == ["missing-files", "metadata-stale"]
    (tmp_path / "metadata.yaml").write_text("something: else")
    assert [len(recording.files) for recording in find_recordings(tmp_path, ROSBAG2)] == [1, 1, 1]


LINE = "=" * 80


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("float64 x\nThing next\n", "does not end"),
        (f"Point[100000] p\n{LINE}\nMSG: a/Point\nfloat64 x\n", "more than 20000 fields"),
        ("float64[99999999999] x\n", "absurd length"),
        (f"B[] b\n{LINE}\nMSG: a/B\nC[0] c\n{LINE}\nMSG: a/C\nint8 x\n", "length nothing bounds"),
        ("x" * 300_000, "characters"),
        ("not a definition", "is missing"),
        ("float64 $x\n", "cannot be used"),
        ("", "no definition"),
    ],
)
def test_a_definition_that_cannot_be_trusted_makes_the_topic_unreadable(text, reason):
    with pytest.raises(InputError, match=reason):
        message_type(Topic("/x", "a/msg/Thing", "cdr", text, "msg"))


def test_numbers_of_any_field(tmp_path):
    line = bags.trajectory(bags.T0, ("a", "b"), [(1, 2), (3, 4)])
    assert numbers(line, "points.-1.positions") == [3, 4]
    assert numbers(line, "points.0.positions.1") == [2]
    assert numbers(line, "points.5.positions") == []
    pose = bags.pose(bags.T0, (1, 2, 3))
    assert numbers(pose, "pose") == [1, 2, 3, 0, 0, 0, 1]
    with pytest.raises(InputError, match="Did you mean 'position'"):
        numbers(pose, "pose.positon")
    with pytest.raises(InputError, match="no numbers"):
        numbers(pose, "header.frame_id")
    with pytest.raises(InputError, match="no field '__class__'"):
        numbers(pose, "__class__")
    path = bags.write_mcap(tmp_path / "a.mcap", [(1, "/pose", bags.POSE, pose)])
    kind = message_type(next(item for item in read_items(path) if isinstance(item, Topic)))
    assert kind.leaf_names("pose.position") == ("x", "y", "z")
    assert kind.number_paths()[:2] == ["pose.position.x", "pose.position.y"]
    with pytest.raises(InputError, match="at most 4096"):
        numbers(bags.image(bags.T0, np.zeros((40, 40, 3), np.uint8)), "data")
