"""The terminal view fits 80 by 24 and says what is so; an operator's keys do what they say, and nothing once let go."""

import dataclasses
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich", reason="the terminal view needs the extra 'ros'")
sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import JOINTS, tiny_profile, write_profile

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.operate import FIRST_REPEAT, HELP, NEXT_REPEAT, HeldKey, Joystick, Operator
from embodied.robot_bridge.processes import free_domain
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST
from embodied.robot_bridge.transport import open_transport
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport
from embodied.robot_bridge.watch import Keys, LiveView, decode_keys
from embodied.robot_bridge.watch_screen import screen
from embodied.robot_bridge.watch_snapshot import Monitor, Snapshot, Topic

NAN = np.full(3, np.nan)


def snapshot(**changes: Any) -> Snapshot:
    found = Snapshot(
        robot="tiny",
        state="RUNNING",
        reason="",
        counts={"clamped": "17", "holds": "0", "joints_age_ms": "4.2", "chunk_age_ms": "1000000.0", "profile": "ab12"},
        names=JOINTS,
        gripper=np.array([False, False, True]),
        position=np.array([0.0, 1.88, 0.08]),
        command=np.array([0.5, 1.7, 0.08]),
        low=np.array([-1.9, -1.9, 0.0]),
        high=np.array([1.9, 1.9, 0.08]),
        topics={"/joint_states": Topic(100.0, 0.004), "/camera/eye/image_raw": Topic(0.0, np.inf)},
        rare=frozenset(),
        latencies={"observation to chunk": (0.0207, 0.0252)},
        events=(("12:00:01", "safety: ARMED"), ("12:00:02", "recorder: recording_failed error=No space left")),
    )
    return dataclasses.replace(found, **changes)


def lines(shown: Snapshot, width: int = 80, height: int = 24, **options: Any) -> list[str]:
    return screen(shown, width, height, **options).plain.split("\n")


# ---- the picture


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 20), (132, 50), (80, 14), (300, 80)])
@pytest.mark.parametrize("joints", [2, 8, 15])
def test_the_picture_fits_the_terminal(width: int, height: int, joints: int) -> None:
    names = tuple(f"a_rather_long_name_of_an_arm_joint_{k}" for k in range(joints))
    zeros, ones = np.zeros(joints), np.ones(joints)
    many = {f"/a/very/long/namespace/camera_{k}/image_raw/compressed": Topic(30.0, 0.01) for k in range(12)}
    shown = snapshot(
        names=names, gripper=zeros > 1, position=zeros, command=NAN[0] * ones, low=-ones, high=ones, topics=many,
        reason="because " * 60, events=(("12:00:00", "x " * 300),) * 50,
    )  # fmt: skip
    found = lines(shown, width, height, keys=HELP, note="deadman held · rec 20261123-120000")
    assert len(found) == height
    assert max(map(len, found)) <= width
    assert "RUNNING" in found[0]
    assert "q quit" in found[-1] or width < 80


def test_the_picture_says_what_is_so() -> None:
    found = lines(snapshot(), keys="space stop · q quit", note="deadman held")
    assert re.search(r"RUNNING · tiny · deadman held", found[0])
    text = "\n".join(found)
    assert re.search(r"/joint_states\s+100 Hz\s+4\.0 ms", text)
    assert re.search(r"…?/camera/eye/image_raw\s+never", text)
    assert re.search(r"observation to chunk\s+20\.7 ms\s+25\.2 ms", text)
    assert "clamped 17" in text
    assert "holds" not in text  # a count of zero is no news
    assert "age of joints 4.2 ms" in text
    assert "chunk 1" not in text  # it never came
    assert "12:00:02 recorder: recording_failed" in text
    assert found[-1] == "space stop · q quit"
    assert "no safety process" in lines(snapshot(state=""))[0]
    assert "nothing is sent" in lines(snapshot(counts={"shadow": "true"}))[0]


def test_a_joint_stands_where_it_is_between_its_limits() -> None:
    rows = {row.split()[0]: row for row in lines(snapshot()) if "├" in row}
    bar = {name: row[row.index("├") + 1 : row.index("┤")] for name, row in rows.items()}
    cells = len(bar["shoulder"]) - 1
    assert bar["shoulder"].index("●") == round(cells / 2)
    assert bar["shoulder"].index("○") == round(cells * (0.5 + 1.9) / 3.8)
    assert bar["elbow"].index("●") == cells
    assert bar["finger"].index("●") == cells  # on top of its command
    outside = snapshot(position=np.array([-9.0, 9.0, np.nan]), command=NAN)
    rows = {row.split()[0]: row for row in lines(outside) if "├" in row}
    assert rows["shoulder"][rows["shoulder"].index("├") + 1] == "●"  # it does not leave the bar
    assert "●" not in rows["finger"]
    assert snapshot().at_limit.tolist() == [False, True, False]  # an open gripper is at work


# ---- what it hears


class Bench:
    def __init__(self, tmp_path: Path, **profile: Any) -> None:
        self.bus = MemoryBus()
        self.peer = MemoryTransport(self.bus, "peer")
        self.profile = tiny_profile(tmp_path, **profile)
        self.node = MemoryTransport(self.bus, "watch")

    def said(self, topic: str, kind: str = m.STRING, qos: Any = DEFAULT) -> list[bytes]:
        kept: list[bytes] = []
        self.peer.subscriber(topic, kind, qos, lambda data, at: kept.append(data))
        return kept


def test_a_monitor_measures_rates_ages_and_latencies(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    monitor = Monitor(bench.profile, bench.node, cameras=True)
    blank = monitor.snapshot()
    assert blank.state == ""
    assert np.isnan(blank.position).all()
    assert all(np.isinf(topic.age) for topic in blank.topics.values())
    states = bench.peer.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
    chunks = bench.peer.publisher("/bridge/chunk", m.JOINT_TRAJECTORY, COMMAND)
    commands = bench.peer.publisher("/bridge/command", m.JOINT_TRAJECTORY, DEFAULT)
    told = bench.peer.publisher("/bridge/state", m.DIAGNOSTIC_ARRAY, LATCHED)
    events = bench.peer.publisher("/bridge/event", m.STRING, EVENTS)
    for k in range(50):
        states.write(
            m.joint_state(time.time_ns(), ["elbow", "finger", "shoulder"], np.array([2.0, 0.01, k]), np.zeros(3))
        )
    states.write(b"\x00\x01\x00\x00nonsense")
    chunks.write(
        m.joint_trajectory(m.Trajectory(time.time_ns() - 30_000_000, "policy:r:1", JOINTS, np.ones(1), np.ones((1, 3))))
    )
    commands.write(
        m.joint_trajectory(m.Trajectory(1, "policy:r:1", JOINTS[::-1], np.ones(1), np.array([[1.0, 2.0, 3.0]])))
    )
    told.write(m.diagnostics(1, "safety", 1, "held", {"state": "HOLD", "reason": "chunk ran out", "tick_p50_ms": "0.2",
                                                      "tick_p99_ms": "0.5"}))  # fmt: skip
    events.write(m.json_string({"event": "policy_ready", "source": "policy", "contract": {"control_dt": 0.1}}))
    seen = monitor.snapshot()
    assert (seen.state, seen.reason) == ("HOLD", "chunk ran out")
    assert seen.topics["/joint_states"].rate == pytest.approx(25.5)  # 51 in two seconds
    assert seen.topics["/joint_states"].age < 1.0
    assert seen.command.tolist() == [3.0, 2.0, 1.0]  # by name
    p50, p99 = seen.latencies["observation to chunk"]
    assert 0.03 <= p50 <= p99 < 0.5
    assert seen.latencies["tick"] == pytest.approx((0.0002, 0.0005))
    assert monitor.contract == {"control_dt": 0.1}
    assert "policy: policy_ready" in [text for _, text in seen.events]
    assert any("no sensor_msgs/msg/JointState" in text for _, text in seen.events)
    states.write(
        m.joint_state(time.time_ns(), ["elbow", "finger", "shoulder"], np.array([2.0, 0.01, 49.0]), np.zeros(3))
    )
    assert monitor.snapshot().position.tolist() == [49.0, 2.0, 0.01]


def test_where_there_is_no_terminal_it_prints_lines(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    told = bench.peer.publisher("/bridge/state", m.DIAGNOSTIC_ARRAY, LATCHED)
    out = io.StringIO()
    with LiveView(bench.profile, bench.node, out=out) as view:
        assert view.refresh() == ""
        told.write(m.diagnostics(1, "safety", 0, "", {"state": "ARMED", "reason": ""}))
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            view.refresh()
    assert [line.split(" · ")[0] for line in out.getvalue().splitlines()] == [
        "no word from the safety process",
        "ARMED",
    ]
    assert "\x1b" not in out.getvalue()


# ---- keys


def test_keys_are_told_from_what_a_terminal_sends() -> None:
    assert decode_keys(b"a r\x1b") == ["a", "space", "r", "escape"]
    assert decode_keys(b"\x1b[A\x1bOP\x1b[15~q") == ["q"]  # an arrow, F1, F5
    assert decode_keys(b"\x1b\x1b\x1b") == ["escape"] * 3  # held
    assert decode_keys(b"\x1b[A\x1b")[-1] == "escape"


def test_the_most_urgent_key_comes_first_and_the_terminal_is_given_back() -> None:
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    keys = Keys(slave)
    assert termios.tcgetattr(slave)[3] & termios.ECHO == 0
    os.write(master, b"ar \x1bd")
    time.sleep(0.05)
    assert [keys.take() for _ in range(6)] == ["escape", "space", "a", "r", "d", ""]
    keys.close()
    assert termios.tcgetattr(slave) == before
    for descriptor in (master, slave):
        os.close(descriptor)


def test_a_held_key_is_told_from_its_repeats() -> None:
    key = HeldKey()
    assert not key.held(0.0)
    key.press("d", 1.0)
    assert key.held(1.0 + FIRST_REPEAT - 0.01)
    assert not key.held(1.0 + FIRST_REPEAT + 0.01)  # one press, never repeated
    for k in range(10):
        key.press("d", 3.5 + 0.04 * k)
    assert key.held(3.86 + NEXT_REPEAT - 0.01)
    assert not key.held(3.86 + NEXT_REPEAT + 0.01)  # let go
    key.press("d", 5.0)
    key.press("d", 5.5)
    key.press("r", 5.6)  # another key: it begins to repeat later
    assert key.held(5.6 + FIRST_REPEAT - 0.01)


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def operator_bench(tmp_path: Path, **options: Any) -> tuple[Bench, Operator, Time, dict[str, list[bytes]]]:
    bench, clock = Bench(tmp_path), Time()
    said = {
        "mode": bench.said("/bridge/mode"),
        "estop": bench.said("/bridge/estop", m.BOOL, COMMAND),
        "deadman": bench.said("/bridge/deadman", m.BOOL, COMMAND),
        "event": bench.said("/bridge/event", m.STRING, EVENTS),
    }
    return bench, Operator(bench.profile, bench.node, clock=clock, **options), clock, said


def test_an_operators_keys_send_modes_deadman_and_estop(tmp_path: Path) -> None:
    _, operator, clock, said = operator_bench(tmp_path)
    for key in "axh":
        operator.press(key)
    operator.press("space")
    operator.press("?")
    assert [m.read_string(data) for data in said["mode"]] == ["arm", "reset", "hold", "stop"]
    assert m.read_bool(said["deadman"][0])  # before the mode that needs it
    clock.now += 5
    said["mode"].clear()
    for _ in range(25):  # `r` held for a second: run once, deadman all the while
        operator.press("r")
        operator.tick()
        clock.now += 0.04
    assert [m.read_string(data) for data in said["mode"]] == ["run"]
    said["deadman"].clear()
    for _ in range(20):
        operator.tick()
        clock.now += 0.04
    held = [m.read_bool(data) for data in said["deadman"]]
    assert len(held) >= 8  # 10 Hz or more
    assert sum(held) * 0.05 <= NEXT_REPEAT + 0.05
    assert not held[-1]
    assert not any(m.read_bool(data) for data in said["estop"])
    assert len(said["estop"]) >= 20


def test_arm_then_run_in_one_breath(tmp_path: Path) -> None:
    _, operator, clock, said = operator_bench(tmp_path)
    for key in "ddddaarrrrrr":  # the deadman held, then each of the others, with a keyboard's repeats
        operator.press(key)
        operator.tick()
        clock.now += 0.05
    assert [m.read_string(data) for data in said["mode"]] == ["arm", "run"]
    assert all(m.read_bool(data) for data in said["deadman"])


def test_the_estop_latches_until_it_is_cleared(tmp_path: Path) -> None:
    _, operator, clock, said = operator_bench(tmp_path)
    operator.press("d")
    operator.press("escape")
    assert operator.estopped
    assert "E-STOP" in operator.note
    said["deadman"].clear()
    for key in ("d", "r", "a"):
        operator.press(key)
        clock.now += 0.1
        operator.tick()
    assert all(m.read_bool(data) for data in said["estop"][-3:])
    assert not any(m.read_bool(data) for data in said["deadman"])  # what is held does not move the arm
    operator.press("c")
    assert not m.read_bool(said["estop"][-1])


def test_recordings_begin_with_the_contract_and_end_with_a_verdict(tmp_path: Path) -> None:
    _, operator, _, said = operator_bench(tmp_path)
    operator.press("s")  # nothing is being recorded
    operator.press("b", {"control_dt": 0.1})
    operator.press("b")
    operator.press("f")
    found = [m.read_json(data) for data in said["event"]]
    assert [event["event"] for event in found] == ["episode_start", "episode_end"]
    assert found[0]["contract"] == {"control_dt": 0.1}
    assert found[0]["bag"] == found[1]["bag"] != ""
    assert found[1]["success"] is False
    operator.press("b")
    operator.leave()
    assert m.read_json(said["event"][-1])["success"] is None
    assert m.read_string(said["mode"][-1]) == "stop"


def test_a_joysticks_button_is_the_deadman_until_it_is_unplugged(tmp_path: Path) -> None:
    device = tmp_path / "js0"
    os.mkfifo(device)
    keeper = os.open(device, os.O_RDWR)
    joystick = Joystick(device, button=2)
    _, operator, clock, said = operator_bench(tmp_path, joystick=joystick)

    def send(value: int, kind: int, number: int) -> None:
        os.write(keeper, struct.pack("<IhBB", 0, value, kind, number))
        clock.now += 0.1
        operator.tick()

    operator.press("d")  # the key is none now
    assert not m.read_bool(said["deadman"][-1]) if said["deadman"] else True
    results = []
    for event in ((0, 0x81, 2), (1, 1, 0), (1, 2, 2), (1, 1, 2), (0, 1, 0), (0, 1, 2), (1, 1, 2)):
        send(*event)
        results.append(m.read_bool(said["deadman"][-1]))
    assert results == [False, False, False, True, True, False, True]
    os.close(keeper)
    clock.now += 0.1
    operator.tick()
    assert not m.read_bool(said["deadman"][-1])
    assert "joystick is gone" in operator.note
    joystick.close()
    with pytest.raises(InputError, match=r"--joystick .*absent: No such file"):
        Joystick(tmp_path / "absent", 0)


# ---- the verb, on a terminal, over DDS


def test_the_verb_draws_operates_and_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    import fcntl
    import termios

    profile, domain = write_profile(tmp_path / "tiny.yaml"), free_domain()
    peer = open_transport("peer", "dds", domain)
    said: dict[str, list[Any]] = {"mode": [], "estop": [], "deadman": []}
    for name, kind, read in (
        ("mode", m.STRING, m.read_string),
        ("estop", m.BOOL, m.read_bool),
        ("deadman", m.BOOL, m.read_bool),
    ):
        qos = DEFAULT if name == "mode" else LATEST
        peer.subscriber(f"/bridge/{name}", kind, qos, lambda d, at, name=name, read=read: said[name].append(read(d)))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "embodied.cli", "robot", "watch", str(profile), "--operate"]
    command += ["--domain", str(domain), "--transport", "dds", "--seconds", "60"]
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, start_new_session=True)
    shown = b""

    def until(condition: Any) -> None:
        nonlocal shown
        ends = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < ends, (said, shown[-2000:])
            shown += read_some(master)

    try:
        until(lambda: len(said["estop"]) > 5)
        assert not any(said["estop"])
        assert not any(said["deadman"])
        os.write(master, b"d")
        until(lambda: any(said["deadman"]))
        until(lambda: not said["deadman"][-1])  # let go
        os.write(master, b"a")
        until(lambda: "arm" in said["mode"])
        os.write(master, b"\x1b")
        until(lambda: said["estop"][-1])
        os.write(master, b"q")
        until(lambda: child.poll() is not None)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait(10)
        shown += read_some(master)
        peer.close()
    assert child.returncode == 0, child.stderr.read() if child.stderr else ""
    assert said["mode"][-1] == "stop"  # on leaving
    assert b"no safety process" in shown
    assert b"tiny" in shown
    assert termios.tcgetattr(slave)[3] == before[3]  # echo and lines as before
    assert child.stderr is not None
    child.stderr.close()
    for descriptor in (master, slave):
        os.close(descriptor)


def read_some(descriptor: int) -> bytes:
    import select

    return os.read(descriptor, 65536) if select.select([descriptor], [], [], 0.05)[0] else b""
