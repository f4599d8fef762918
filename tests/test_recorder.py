"""Bags are rosbag2 bags, whole when closed and nearly whole when the recorder is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import tiny_profile

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, SENSOR_DATA
from embodied.robot_bridge.recorder import BagWriter, Recorder, read_metadata, read_records, recover
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

CONTRACT = {"control_dt": 0.1, "joint_names": ["a"]}


def state(k: int) -> bytes:
    return m.joint_state(10**18 + k, ["a"], np.array([float(k)]), np.zeros(1))


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


def test_publish_time_is_the_headers_stamp(tmp_path: Path) -> None:
    from mcap.reader import make_reader

    writer = BagWriter(tmp_path / "bag")
    writer.write("/joint_states", m.JOINT_STATE, state(3), 77)
    writer.write("/bridge/event", m.STRING, m.string("x"), 78)
    writer.close()
    with open(writer.path, "rb") as file:
        times = [(msg.log_time, msg.publish_time) for _, _, msg in make_reader(file).iter_messages()]
    assert times == [(77, 10**18 + 3), (78, 78)]


KILLED = """
import sys, time, numpy as np
from pathlib import Path
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.recorder import BagWriter
writer = BagWriter(Path(sys.argv[1]), {"embodied_contract": {"control_dt": 0.1}})
for k in range(2000):
    writer.write("/joint_states", m.JOINT_STATE, m.joint_state(10**18, ["a"], np.array([float(k)]), np.zeros(1)), k + 1)
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_recorder_loses_at_most_its_last_chunk(tmp_path: Path) -> None:
    bag = tmp_path / "bag"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(bag)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "written"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    assert not (bag / "metadata.yaml").exists()
    kept = [m.read_joint_state(data).position[0] for _, _, data, _ in read_records(bag / "bag_0.mcap")]
    assert len(kept) > 1850
    assert kept == list(range(len(kept)))

    from rosbags.rosbag2 import Reader

    assert recover(bag) == len(kept)
    with Reader(bag) as reader:
        assert reader.message_count == len(kept)
    assert read_metadata(bag / "bag_0.mcap") == {"embodied_contract": {"control_dt": 0.1}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bag"]
    assert recover(bag) == len(kept)  # nothing left to do
    with pytest.raises(InputError, match="no bag"):
        recover(tmp_path)


def test_events_open_and_close_bags(tmp_path: Path) -> None:
    bus = MemoryBus()
    profile = tiny_profile(tmp_path)
    peer = MemoryTransport(bus)
    events = peer.publisher("/bridge/event", m.STRING, EVENTS)
    states = peer.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
    images = peer.publisher("/camera/eye/image_raw", m.IMAGE, SENSOR_DATA)
    commands = peer.publisher("/bridge/command", m.JOINT_TRAJECTORY, COMMAND)
    recorder = Recorder(profile, MemoryTransport(bus), tmp_path / "out", poses=("cube",))
    (tmp_path / "out").mkdir()
    said: list[dict] = []
    peer.subscriber("/bridge/event", m.STRING, EVENTS, lambda data, at: said.append(m.read_json(data)))
    states.write(state(0))  # before the episode
    events.write(m.json_string({"event": "episode_start", "bag": "e0", "contract": CONTRACT}))
    states.write(state(1))
    images.write(m.image(5, "eye", np.zeros((4, 4, 3), np.uint8)))
    commands.write(m.joint_trajectory(m.Trajectory(5, "armed", ("a",), np.ones(1), np.ones((1, 1)))))
    events.write(m.json_string({"event": "episode_end", "success": True}))
    recorder.step()
    states.write(state(2))  # after it
    recorder.step()
    records = list(read_records(tmp_path / "out" / "e0" / "e0_0.mcap"))
    topics = [topic for topic, *_ in records]
    assert topics[0] == "/bridge/event"
    assert sorted(set(topics)) == ["/bridge/command", "/bridge/event", "/camera/eye/image_raw", "/joint_states"]
    assert [m.read_joint_state(d).position[0] for t, _, d, _ in records if t == "/joint_states"] == [1.0]
    assert abs(records[0][3] - time.time_ns()) < 10**10
    assert [e["event"] for e in said if e.get("source") == "recorder"] == ["recording", "recorded"]
    assert read_metadata(tmp_path / "out" / "e0" / "e0_0.mcap")["embodied_contract"] == CONTRACT

    events.write(m.json_string({"event": "episode_start", "bag": "e0"}))  # never over an older bag
    recorder.step()
    assert said[-1]["event"] == "recording_failed"
    assert "exists" in said[-1]["error"]
