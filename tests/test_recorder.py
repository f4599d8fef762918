"""Bags are rosbag2 bags; the recorder takes what comes, and its trouble stays its own."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import tiny_profile, write_profile

from embodied.contracts.provenance import hash_file
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.bag_recover import read_metadata, read_records, recover
from embodied.robot_bridge.bag_writer import BagWriter, UnbufferedFile
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, SENSOR_DATA, QosProfile
from embodied.robot_bridge.recorder import Inbox, Recorder, recorded_topics, recording_metadata
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

CONTRACT = {"control_dt": 0.1, "joint_names": ["a"]}


def state(k: int) -> bytes:
    return m.joint_state(10**18 + k, ["a"], np.array([float(k)]), np.zeros(1))


def numbers(path: Path) -> list[float]:
    return [m.read_joint_state(d).position[0] for t, _, d, _ in read_records(path) if t == "/joint_states"]


class Bench:
    """A recorder and a peer on one bus."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        bus = MemoryBus()
        self.out = tmp_path / "out"
        self.out.mkdir()
        self.peer = MemoryTransport(bus)
        self.events = self.peer.publisher("/bridge/event", m.STRING, EVENTS)
        self.states = self.peer.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
        self.images = self.peer.publisher("/camera/eye/image_raw", m.IMAGE, SENSOR_DATA)
        self.recorder = Recorder(tiny_profile(tmp_path), MemoryTransport(bus), self.out, ("cube",), **options)
        self.said: list[dict[str, Any]] = []
        self.peer.subscriber("/bridge/event", m.STRING, EVENTS, lambda data, at: self.said.append(m.read_json(data)))

    def event(self, event: str, **fields: Any) -> None:
        self.events.write(m.json_string({"event": event, **fields}))

    def from_recorder(self) -> list[dict[str, Any]]:
        return [event for event in self.said if event.get("source") == "recorder"]

    def file(self, bag: str) -> Path:
        return self.out / bag / f"{bag}_0.mcap"


def test_a_bag_reads_back_with_rosbags_and_holds_the_contract(tmp_path: Path) -> None:
    from rosbags.rosbag2 import Reader

    writer = BagWriter(tmp_path / "bag", {"embodied_contract": CONTRACT})
    for k in range(200):
        writer.write("/joint_states", m.JOINT_STATE, state(k), 2 * 10**18 + k)
        if k % 10 == 0:
            writer.write("/bridge/event", m.STRING, m.json_string({"k": k}), 2 * 10**18 + k)
    writer.close()
    with Reader(tmp_path / "bag") as reader:
        assert reader.message_count == 220
        assert {c.topic: (c.msgtype, c.digest) for c in reader.connections} == {
            "/joint_states": (m.JOINT_STATE, m.type_hash(m.JOINT_STATE)),
            "/bridge/event": (m.STRING, m.type_hash(m.STRING)),
        }
        rows = [(t, d) for c, t, d in reader.messages() if c.topic == "/joint_states"]
    assert [t for t, _ in rows] == [2 * 10**18 + k for k in range(200)]
    assert m.read_joint_state(bytes(rows[7][1])).position[0] == 7.0
    assert read_metadata(tmp_path / "bag" / "bag_0.mcap") == {"embodied_contract": CONTRACT}


def test_publish_time_is_the_headers_stamp_of_every_type_that_has_one(tmp_path: Path) -> None:
    from mcap.reader import make_reader

    info = m.message_class("sensor_msgs/msg/CompressedImage")
    picture = m.encode(info(m.header(5 * 10**9, "eye"), "jpeg", np.zeros(3, np.uint8)))
    writer = BagWriter(tmp_path / "bag")
    writer.write("/joint_states", m.JOINT_STATE, state(3), 77)
    writer.write("/bridge/event", m.STRING, m.string("x"), 78)
    writer.write("/eye/compressed", "sensor_msgs/msg/CompressedImage", picture, 79)
    writer.write("/joint_states", m.JOINT_STATE, m.joint_state(0, ["a"], np.zeros(1), np.zeros(1)), 80)
    writer.close()
    with open(writer.path, "rb") as file:
        times = [(msg.log_time, msg.publish_time) for _, _, msg in make_reader(file).iter_messages()]
    assert times == [(77, 10**18 + 3), (78, 78), (79, 5 * 10**9), (80, 80)]  # a stamp of 0 is none


def test_offered_qos_and_type_hashes_are_kept_as_rosbag2_does(tmp_path: Path) -> None:
    from mcap.reader import make_reader
    from rosbags.rosbag2 import Reader

    offers = {"/tf_static": [LATCHED], "/joint_states": [SENSOR_DATA, DEFAULT]}
    writer = BagWriter(tmp_path / "bag", offered=lambda topic: offers.get(topic, []))
    writer.write("/tf_static", m.STRING, m.string("x"), 1)
    writer.write("/joint_states", m.JOINT_STATE, state(0), 2)
    writer.write("/other", m.STRING, m.string("x"), 3)
    writer.close()
    info = yaml.safe_load((tmp_path / "bag" / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    found = {t["topic_metadata"]["name"]: t["topic_metadata"] for t in info["topics_with_message_count"]}
    (latched,) = found["/tf_static"]["offered_qos_profiles"]
    assert latched["durability"] == "transient_local"
    assert (latched["history"], latched["depth"], latched["reliability"]) == ("keep_last", 1, "reliable")
    assert latched["lifespan"] == {"sec": 9223372036, "nsec": 854775807}
    assert [q["reliability"] for q in found["/joint_states"]["offered_qos_profiles"]] == ["best_effort", "reliable"]
    assert found["/other"]["offered_qos_profiles"] == []
    assert found["/other"]["type_description_hash"] == m.type_hash(m.STRING)
    with open(writer.path, "rb") as file:
        channels = {c.topic: c.metadata for c in make_reader(file).get_summary().channels.values()}  # type: ignore[union-attr]
    assert yaml.safe_load(channels["/tf_static"]["offered_qos_profiles"]) == [latched]
    with Reader(tmp_path / "bag") as reader:
        qos = {c.topic: c.ext.offered_qos_profiles for c in reader.connections}  # type: ignore[union-attr]
    assert [q.durability.name for q in qos["/tf_static"]] == ["TRANSIENT_LOCAL"]


def test_events_open_and_close_bags(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    commands = bench.peer.publisher("/bridge/command", m.JOINT_TRAJECTORY, COMMAND)
    bench.states.write(state(0))  # before the episode
    bench.event("episode_start", bag="e0", contract=CONTRACT)
    bench.states.write(state(1))
    bench.images.write(m.image(5, "eye", np.zeros((4, 4, 3), np.uint8)))
    commands.write(m.joint_trajectory(m.Trajectory(5, "armed", ("a",), np.ones(1), np.ones((1, 1)))))
    bench.event("episode_end", success=True)
    bench.recorder.step()
    bench.states.write(state(2))  # after it
    bench.recorder.step()
    records = list(read_records(bench.file("e0")))
    topics = [topic for topic, *_ in records]
    assert topics[0] == "/bridge/event"
    assert sorted(set(topics)) == ["/bridge/command", "/bridge/event", "/camera/eye/image_raw", "/joint_states"]
    assert numbers(bench.file("e0")) == [1.0]
    assert abs(records[0][3] - time.time_ns()) < 10**10
    assert [e["event"] for e in bench.from_recorder()] == ["recording", "recorded"]
    assert read_metadata(bench.file("e0"))["embodied_contract"] == CONTRACT

    bench.event("episode_start", bag="e0")  # never over an older bag
    bench.recorder.step()
    assert bench.said[-1]["event"] == "recording_failed"
    assert "exists" in bench.said[-1]["error"]
    assert bench.said[-1]["bag"] == "e0"
    (offered,) = [
        t["topic_metadata"]["offered_qos_profiles"]
        for t in yaml.safe_load((bench.out / "e0" / "metadata.yaml").read_text())["rosbag2_bagfile_information"][
            "topics_with_message_count"
        ]
        if t["topic_metadata"]["name"] == "/camera/eye/image_raw"
    ]
    assert [(qos["reliability"], qos["depth"]) for qos in offered] == [("best_effort", 5)]  # as the graph says
    bench.event("episode_start", bag="../outside")  # whoever may publish events may not choose where files appear
    bench.recorder.step()
    assert bench.said[-1]["event"] == "recording_failed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.yaml"]


def test_no_message_is_lost_between_one_episode_and_the_next(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for k in range(300):
        if k % 100 == 50:
            bench.event("episode_start", bag=f"e{k // 100}")
        bench.states.write(state(k))
        if k % 7 == 0:
            bench.recorder.step()
    bench.recorder.step()
    bench.recorder.close()
    found = [numbers(bench.file(f"e{k}")) for k in range(3)]
    assert [len(part) for part in found] == [100, 100, 50]
    assert [*found[0], *found[1], *found[2]] == list(range(50, 300))
    assert all((bench.out / f"e{k}" / "metadata.yaml").exists() for k in range(3))


def test_the_policys_own_word_is_the_contract_where_the_event_has_none(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.event("policy_ready", source="policy", contract=CONTRACT)
    bench.event("episode_start", bag="e0")
    bench.event("episode_start", bag="e1", contract={"control_dt": 0.2})
    bench.recorder.step()
    bench.recorder.close()
    assert read_metadata(bench.file("e0"))["embodied_contract"] == CONTRACT
    assert read_metadata(bench.file("e1"))["embodied_contract"] == {"control_dt": 0.2}


def test_every_bag_begins_with_what_is_latched(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    static = bench.peer.publisher("/tf_static", "tf2_msgs/msg/TFMessage", LATCHED)
    urdf = bench.peer.publisher("/robot_description", m.STRING, LATCHED)
    transforms = m.encode(m.message_class("tf2_msgs/msg/TFMessage")([]))
    static.write(transforms)
    urdf.write(m.string("<robot/>"))
    for bag in ("e0", "e1"):
        bench.event("episode_start", bag=bag)
        bench.event("episode_end")
    bench.recorder.step()
    for bag in ("e0", "e1"):
        kept = {topic: data for topic, _, data, _ in read_records(bench.file(bag))}
        assert kept["/tf_static"] == transforms
        assert m.read_string(kept["/robot_description"]) == "<robot/>"
        info = yaml.safe_load((bench.out / bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        offered = {
            t["topic_metadata"]["name"]: t["topic_metadata"]["offered_qos_profiles"]
            for t in info["topics_with_message_count"]
        }
        assert offered["/robot_description"][0]["durability"] == "transient_local"


def test_the_topics_are_those_of_the_profile(tmp_path: Path) -> None:
    cameras = {"cameras": {"eye": "/camera/eye/image_raw", "far": "/far/image_raw/compressed"}}
    topics = recorded_topics(tiny_profile(tmp_path, topics=cameras), ("cube",))
    kinds = {topic: kind for topic, (kind, _) in topics.items()}
    assert kinds["/far/image_raw/compressed"] == "sensor_msgs/msg/CompressedImage"
    assert kinds["/camera/eye/camera_info"] == kinds["/far/camera_info"] == "sensor_msgs/msg/CameraInfo"
    assert {"/diagnostics", "/tf", "/tf_static", "/robot_description", "/sim/pose/cube"} <= set(kinds)
    assert "/clock" not in kinds
    assert "/clock" in recorded_topics(tiny_profile(tmp_path), clock=True)
    # Who subscribes to the adapter's topic counts as a robot.
    assert "/joint_trajectory_controller/joint_trajectory" not in kinds
    for kind in kinds.values():
        assert m.type_hash(kind).startswith("RIHS01_")


def test_a_recording_says_what_its_numbers_mean_and_what_made_it(tmp_path: Path) -> None:
    file = write_profile(tmp_path / "tiny.yaml")
    profile = load_profile(file)
    about = recording_metadata(profile, file)
    bench = Bench(tmp_path, about=about)
    bench.event("episode_start", bag="e0")
    bench.recorder.step()  # still being written: the record is there at once
    found = read_metadata(bench.file("e0"))["embodied_recording"]
    assert found["joints"] == ["shoulder", "elbow", "finger"]
    assert found["files_sha256"] == {"tiny.yaml": hash_file(file)}
    assert found["limits"]["names"] == found["joints"]
    assert found["limits"]["velocity"] == profile.read_limits().velocity.tolist()
    assert found["code_version"].startswith("0.")
    assert found["max_age_s"] == {"joint_states": 0.1, "images": 0.3}


def test_a_full_disk_ends_the_bag_with_an_event_and_the_next_episode_is_recorded(tmp_path: Path) -> None:
    """The file may grow to 40 kB: RLIMIT_FSIZE gives the same refusal, with a part written, as a disk that is full."""
    script = """
import resource, sys, numpy as np
from pathlib import Path
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.qos import DEFAULT, EVENTS
from embodied.robot_bridge.recorder import Recorder
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

folder, said, bus = Path(sys.argv[1]), [], MemoryBus()
peer = MemoryTransport(bus)
events = peer.publisher("/bridge/event", m.STRING, EVENTS)
states = peer.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
recorder = Recorder(load_profile(folder / "tiny.yaml"), MemoryTransport(bus), folder / "out")
peer.subscriber("/bridge/event", m.STRING, EVENTS, lambda data, at: said.append(m.read_json(data)))
events.write(m.json_string({"event": "episode_start", "bag": "e0"}))
recorder.step()
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
for k in range(2000):
    states.write(m.joint_state(10**18 + k, ["a"], np.array([float(k)]), np.zeros(1)))
    recorder.step()
failures = [event for event in said if event["event"] == "recording_failed"]
assert len(failures) == 1 and failures[0]["bag"] == "e0" and "too large" in failures[0]["error"], failures
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
events.write(m.json_string({"event": "episode_start", "bag": "e1"}))
states.write(m.joint_state(10**18, ["a"], np.ones(1), np.zeros(1)))
events.write(m.json_string({"event": "episode_end"}))
recorder.step()
assert said[-1]["event"] == "recorded", said[-1]
"""
    write_profile(tmp_path / "tiny.yaml")
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    damaged = tmp_path / "out" / "e0"
    assert (damaged / "e0_0.mcap").stat().st_size == 40_000
    assert recover(damaged).messages > 150  # 216 bytes each
    kept = numbers(damaged / "e0_0.mcap")
    assert kept == list(range(len(kept)))
    assert numbers(tmp_path / "out" / "e1" / "e1_0.mcap") == [1.0]


def test_a_write_that_the_disk_takes_a_part_of_is_no_success(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from embodied.robot_bridge.bag_writer import UnbufferedFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); UnbufferedFile(Path(sys.argv[1])).write(bytes(3000))"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], capture_output=True, text=True)
    assert "File too large" in run.stderr
    assert (tmp_path / "file").stat().st_size == 1000


def test_a_slow_disk_costs_pictures_first_bounded_memory_and_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, writes = 0.0, 0
    write = UnbufferedFile.write

    def slowly(self: UnbufferedFile, data: bytes) -> int:
        nonlocal writes
        writes += 1
        time.sleep(slow)
        return write(self, data)

    monkeypatch.setattr(UnbufferedFile, "write", slowly)
    limit = 400_000
    bench = Bench(tmp_path, queue_bytes=limit)
    bench.event("episode_start", bag="e0")
    bench.recorder.step()
    slow, done, most = 0.1, threading.Event(), 0
    writer = threading.Thread(target=lambda: [bench.recorder.step() for _ in iter(done.is_set, True)], daemon=True)
    writer.start()
    picture = m.image(5, "eye", np.zeros((64, 64, 3), np.uint8))
    took = np.zeros(1000)
    try:
        for k in range(1000):  # 12 MB of pictures and 80 kB of joint states
            started = time.perf_counter()
            bench.states.write(state(k))
            bench.images.write(picture)
            took[k] = time.perf_counter() - started
            most = max(most, bench.recorder.waiting_bytes)
        slow = 0.0
        bench.event("episode_end")
    finally:
        done.set()
        writer.join(60.0)
    assert (took > 0.1).mean() < 0.01  # whoever publishes does not wait for the disk; the host may let it wait
    assert most <= limit
    bench.recorder.step()
    assert numbers(bench.file("e0")) == list(range(1000))
    pictures = sum(topic == "/camera/eye/image_raw" for topic, *_ in read_records(bench.file("e0")))
    assert 15 <= pictures < 200
    dropped = [event["messages"] for event in bench.said if event["event"] == "recording_dropped"]
    assert {topic for event in dropped for topic in event} == {"/camera/eye/image_raw"}
    assert sum(event["/camera/eye/image_raw"] for event in dropped) == 1000 - pictures
    assert bench.said[-1]["event"] == "recorded"


def test_the_queue_is_bounded_even_without_pictures() -> None:
    inbox = Inbox(1000, frozenset({"/eye"}))
    for _ in range(30):
        inbox.put("/joint_states", m.JOINT_STATE, bytes(100), 0)
        inbox.put("/eye", m.IMAGE, bytes(100), 0)
    taken = collections_of(inbox)
    assert sum(len(item[2]) for item in taken) <= 1000
    assert sum(item[0] == "/joint_states" for item in taken) >= 6
    dropped = inbox.dropped()
    assert sum(dropped.values()) == 60 - len(taken)
    assert inbox.dropped() == {}
    inbox.put("/eye", m.IMAGE, bytes(100), 0)  # there is room again
    assert len(collections_of(inbox)) == 1


def collections_of(inbox: Inbox) -> list[tuple[str, str, bytes, int]]:
    items = []
    while (item := inbox.take()) is not None:
        items.append(item)
    return items


def test_a_subscription_of_the_recorder_matches_whatever_a_robot_publishes(tmp_path: Path) -> None:
    from embodied.robot_bridge.qos import incompatibility

    topics = recorded_topics(tiny_profile(tmp_path))
    for topic in ("/joint_states", "/camera/eye/image_raw", "/diagnostics", "/tf"):
        assert not incompatibility(QosProfile(1, reliable=False), topics[topic][1]), topic


def test_the_verb_records_what_is_on_the_graph(tmp_path: Path) -> None:
    """Over DDS, with what the publishers offer, until it is told to end; nothing that was sent reliably is missing."""
    import os
    import signal

    from embodied.robot_bridge.processes import free_domain
    from embodied.robot_bridge.transport import open_transport

    profile, domain = write_profile(tmp_path / "tiny.yaml"), free_domain()
    peer = open_transport("peer", "dds", domain)
    command = [
        sys.executable,
        "-m",
        "embodied.cli",
        "robot",
        "record",
        str(profile),
        str(tmp_path / "bags"),
        "--bag",
        "b",
    ]
    command += ["--domain", str(domain), "--transport", "dds", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        publisher = peer.publisher("/bridge/command", m.JOINT_TRAJECTORY, QosProfile(depth=200))
        states = peer.publisher("/joint_states", m.JOINT_STATE, SENSOR_DATA)
        urdf = peer.publisher("/robot_description", m.STRING, LATCHED)
        urdf.write(m.string("<robot/>"))
        ends = time.monotonic() + 40
        while not (publisher.matched and states.matched and urdf.matched):  # type: ignore[attr-defined]
            assert time.monotonic() < ends
            assert child.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)  # its side matches too
        for k in range(100):
            publisher.write(m.joint_trajectory(m.Trajectory(k + 1, "armed", ("a",), np.ones(1), np.full((1, 1), k))))
            states.write(state(k))
            time.sleep(0.002)
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGINT)
        out, _ = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait(10)
        peer.close()
    assert child.returncode == 0
    assert f'"{tmp_path / "bags" / "b"}"' in out
    file = tmp_path / "bags" / "b" / "b_0.mcap"
    found = [m.read_joint_trajectory(d).positions[0, 0] for t, _, d, _ in read_records(file) if t == "/bridge/command"]
    assert found == list(range(100))
    assert len(numbers(file)) > 80  # best effort
    information = yaml.safe_load((file.parent / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    topics = {t["topic_metadata"]["name"]: t["topic_metadata"] for t in information["topics_with_message_count"]}
    qos = {
        name: (q[0]["reliability"], q[0]["durability"])
        for name, t in topics.items()
        if (q := t["offered_qos_profiles"])
    }
    assert qos["/joint_states"] == ("best_effort", "volatile")
    assert qos["/bridge/command"] == ("reliable", "volatile")
    assert qos["/robot_description"] == ("reliable", "transient_local")
    assert read_metadata(file)["embodied_recording"]["robot"] == "tiny"


@pytest.mark.parametrize("event", [{}, {"bag": ""}, {"bag": None}])
def test_an_episode_that_names_no_bag_is_not_recorded(tmp_path: Path, event: dict[str, Any]) -> None:
    bench = Bench(tmp_path)
    bench.event("episode_start", **event)
    bench.states.write(state(1))
    bench.recorder.step()
    assert list(bench.out.iterdir()) == []
    assert bench.from_recorder() == []
