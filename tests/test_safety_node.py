"""The safety process around its filter: services, deadmen, shadow mode, clocks, malformed bytes, ends and reports."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from adapter_rig import TICK, AdapterRig
from bridge_fixtures import tiny_profile

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.command_messages import joy, read_float_array, read_outcome, trigger_request
from embodied.robot_bridge.node import Rate, Stop
from embodied.robot_bridge.parameters import to_message
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED, LATEST, SENSOR_DATA, QosProfile
from embodied.robot_bridge.robot_options import RobotOptions, StateStyle
from embodied.robot_bridge.safety import State
from embodied.robot_bridge.safety_node import CLOCK_SILENCE, SafetyNode, run
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

FORWARD = {"adapter": "forward_velocity", "acknowledge_no_timeout": True, "topics": {"command": "/forward/commands"}}


def rig_of(folder: Path, node: dict[str, Any] | None = None, **profile: Any) -> AdapterRig:
    return AdapterRig(folder, tiny_profile(folder, **profile), **(node or {}))


def states_of(rig: AdapterRig, topic: str = "/bridge/state") -> list[tuple[float, dict[str, str]]]:
    seen: list[tuple[float, dict[str, str]]] = []
    qos = LATCHED if topic == "/bridge/state" else LATEST
    rig.operator.subscriber(
        topic, m.DIAGNOSTIC_ARRAY, qos, lambda d, _: seen.append((rig.clock.seconds, m.read_diagnostics(d)))
    )
    return seen


def moving(rig: AdapterRig, seconds: float = 0.6) -> AdapterRig:
    rig.follow(rig.arm.joint_state()[0], np.array([0.8, 0.0, 0.0]), seconds)
    assert rig.speed[-1][0] > 0.5
    return rig


# ---- operators


def test_services_do_what_the_mode_topic_does_and_say_why_not(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)

    def call(mode: str) -> tuple[bool, str]:
        return read_outcome(rig.operator.call(f"/safety/{mode}", m.TRIGGER, trigger_request(), 1.0))

    refused, why = call("arm")
    assert not refused
    assert "no joint state names shoulder, elbow, finger" in why
    rig.run(0.2)
    assert call("arm") == (True, "the state is ARMED")
    assert call("run")[0]
    assert call("hold") == (True, "the state is HOLD")
    assert call("stop") == (True, "the state is STOPPED")
    assert not call("run")[0]
    rig.run(0.1)
    assert call("reset") == (True, "the state is INACTIVE")


def test_a_service_called_while_the_node_ticks_does_not_disturb_it(tmp_path: Path) -> None:
    """Services are answered on the transport's thread."""
    rig = rig_of(tmp_path).run(0.2)
    done = threading.Event()

    def pester() -> None:
        for _ in range(100):
            for mode in ("arm", "run", "hold", "stop", "reset"):
                rig.operator.call(f"/safety/{mode}", m.TRIGGER, trigger_request(), 1.0)
        done.set()

    thread = threading.Thread(target=pester)
    thread.start()
    while not done.is_set():
        rig.run(TICK)
    thread.join()
    assert rig.safety is not None
    assert rig.safety.filter.counts["bugs"] == rig.safety.filter.counts["violations"] == 0


def test_the_configuration_is_served_as_parameters_that_cannot_be_set(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    get = "rcl_interfaces/srv/GetParameters"
    request = m.encode(m.new(f"{get}_Request", ["safety.rate_hz", "adapter"]))
    answer = m.decode(rig.operator.call("/safety/get_parameters", get, request, 1.0), f"{get}_Response")
    values = [(value.double_value, value.string_value) for value in answer.values]
    assert values == [(100.0, ""), (0.0, "jtc")]
    put = "rcl_interfaces/srv/SetParameters"
    parameter = m.new("rcl_interfaces/msg/Parameter", "safety.rate_hz", to_message(500.0))
    request = m.encode(m.new(f"{put}_Request", [parameter]))
    result = m.decode(rig.operator.call("/safety/set_parameters", put, request, 1.0), f"{put}_Response").results[0]
    assert not result.successful
    assert "profile" in result.reason


def test_a_joystick_button_is_a_deadman(tmp_path: Path) -> None:
    safety = {"deadman_required": True, "deadman_button": 2}
    rig = rig_of(tmp_path, safety=safety, topics={"deadman": "/joy"})
    stick = rig.operator.publisher("/joy", m.JOY, SENSOR_DATA)
    held = [True]

    def hold() -> None:
        if round(rig.clock.seconds / TICK) % 5 == 0:
            stick.write(joy(rig.clock.stamp(), [0.0], [0, 0, int(held[0])]))

    rig.run(0.2)
    rig.send("arm")
    assert rig.state is State.INACTIVE
    rig.before_step = hold
    moving(rig.start())
    held[0] = False
    rig.run(0.1)
    assert rig.state is State.HOLD
    rig.run(0.3)
    assert np.abs(rig.speed[-1][:2]).max() < 0.02
    stick.write(joy(rig.clock.stamp(), [], [1]))  # a joystick with one button
    rig.run(0.02)
    assert rig.safety is not None
    assert rig.safety.malformed["/joy"] == 1


def test_a_silent_deadman_and_a_silent_estop_act_in_time(tmp_path: Path) -> None:
    safety = {"deadman_required": True, "deadman_timeout": 0.3, "estop_required": True, "estop_timeout": 0.5}
    rig = rig_of(tmp_path, safety=safety)
    deadman = rig.operator.publisher("/bridge/deadman", m.BOOL, COMMAND)
    estop = rig.operator.publisher("/bridge/estop", m.BOOL, COMMAND)
    speak = {"deadman", "estop"}

    def beat() -> None:
        if round(rig.clock.seconds / TICK) % 5 == 0:
            if "deadman" in speak:
                deadman.write(m.boolean(True))
            if "estop" in speak:
                estop.write(m.boolean(False))

    rig.before_step = beat
    moving(rig.start())
    speak.remove("deadman")
    rig.follow(rig.path[-1], np.array([0.8, 0.0, 0.0]), 0.4)
    assert rig.state is State.HOLD
    speak.add("deadman")
    rig.run(0.1)
    rig.send("run")
    assert rig.state is State.RUNNING
    speak.remove("estop")
    rig.run(0.56)
    assert rig.state is State.ESTOP
    speak.add("estop")
    rig.run(0.2)
    rig.send("run")
    assert rig.state is State.ESTOP  # latched


# ---- what refuses to arm


def test_a_controller_with_other_qos_is_named_with_both_profiles(tmp_path: Path) -> None:
    bus = MemoryBus()
    profile = tiny_profile(tmp_path)
    node = SafetyNode(profile, MemoryTransport(bus, "safety"))
    robot = MemoryTransport(bus, "stubborn")
    latched = QosProfile(depth=1, reliable=True, latched=True)
    robot.subscriber(profile.topics.command, m.JOINT_TRAJECTORY, latched, lambda data, at: None)
    refusal = node.request("arm")
    assert "/stubborn" in refusal
    assert "transient local" in refusal
    assert "volatile" in refusal


def test_a_controller_of_another_kind_is_named(tmp_path: Path) -> None:
    bus = MemoryBus()
    profile = tiny_profile(tmp_path)
    node = SafetyNode(profile, MemoryTransport(bus, "safety"))
    MemoryTransport(bus, "robot").subscriber(profile.topics.command, m.FLOAT_ARRAY, COMMAND, lambda data, at: None)
    assert "Float64MultiArray" in node.request("arm")


@pytest.mark.parametrize(
    "style", [StateStyle(nan_effort=True), StateStyle(no_velocity=True), StateStyle(shuffled=True)]
)
def test_joint_states_as_drivers_send_them_are_understood(tmp_path: Path, style: StateStyle) -> None:
    rig = AdapterRig(tmp_path, tiny_profile(tmp_path), RobotOptions(style=style))
    moving(rig.start())
    assert rig.state is State.RUNNING


def test_a_rival_on_the_command_topic_refuses_and_stops(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, **FORWARD).run(0.2)
    rival = MemoryTransport(rig.bus, "rival")
    rival.publisher("/forward/commands", m.FLOAT_ARRAY, DEFAULT)
    rig.send("arm")
    assert rig.state is State.INACTIVE
    rival.close()
    moving(rig.start())
    MemoryTransport(rig.bus, "rival").publisher("/forward/commands", m.FLOAT_ARRAY, DEFAULT)
    rig.run(1.3)
    assert rig.state is State.STOPPED
    assert any("1 other publisher on /forward/commands" in str(event) for event in rig.events)


# ---- shadow


def test_in_shadow_everything_runs_and_nothing_is_sent(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, node={"shadow": True})
    rig.start()
    for _ in range(10):
        rig.offer(rig.arm.joint_state()[0] + np.array([0.08, 0.0, 0.0]))
        rig.run(0.1)
    assert rig.state is State.RUNNING
    assert not rig.sent
    assert not rig.bus.publishers(rig.profile.topics.command)
    assert rig.commands
    assert all(command.frame_id.startswith("shadow:") for command in rig.commands)
    assert rig.commands[-1].frame_id.startswith("shadow:policy:r:")
    assert np.ptp(np.array(rig.path)[:, 0]) < 1e-3
    assert np.abs(rig.commands[-1].positions[0][0] - rig.path[-1][0]) > 0.005
    assert rig.safety is not None
    assert rig.safety.filter.counts["chunks"] == 10


# ---- reports


def test_state_is_published_ten_times_a_second_and_at_every_change(tmp_path: Path) -> None:
    rig = rig_of(tmp_path).run(0.3)
    seen, slow = states_of(rig), states_of(rig, "/diagnostics")
    seen.clear()
    rig.run(2.0)
    assert 19 <= len(seen) <= 21
    assert len(slow) == 2
    at = rig.clock.seconds
    rig.send("arm")
    rig.send("run")
    rig.follow(rig.arm.joint_state()[0], np.array([0.3, 0, 0]), 1.5)
    changes = [(t, v) for t, v in seen if v["state"] == "ARMED"]
    assert changes[0][0] - at < 0.02
    last = seen[-1][1]
    assert (last["state"], last["adapter"], last["malformed"]) == ("RUNNING", "jtc", "0")
    assert last["profile"] == rig.profile.fingerprint
    assert 0 <= float(last["joints_age_ms"]) <= 20
    assert 0 <= float(last["gripper_age_ms"]) <= 20
    assert 0 < float(last["tick_p50_ms"]) <= float(last["tick_p99_ms"])
    assert 0 < float(last["tick_to_command_p50_ms"]) <= float(last["tick_to_command_p99_ms"])
    assert float(last["lateness_p99_ms"]) == pytest.approx(0.0, abs=0.01)
    # A chunk is offered when it is observed; the next tick sends it.
    assert float(last["observation_to_command_p99_ms"]) == pytest.approx(10.0, abs=1.0)
    assert int(last["chunks"]) >= 10


# ---- clocks


class SimRig(AdapterRig):
    """The safety process on simulated time, which tests move at will; wall time is the rig's clock."""

    def __init__(self, folder: Path, **profile: Any) -> None:
        super().__init__(folder, tiny_profile(folder, **profile))
        self.offset = 0.0
        self.frozen: float | None = None
        next(t for t in self.bus.transports if t.node == "safety").close()
        sim = {"sim_time": True, "wall": self.clock.monotonic}
        self.safety = SafetyNode(
            self.profile, self.transport("safety2"), self.sim_seconds, lambda: round(self.sim_seconds() * 1e9), **sim
        )
        self.ticked = 0

    def sim_seconds(self) -> float:
        return self.frozen if self.frozen is not None else 0.5 * (self.clock.seconds - 1000.0) + 50.0 + self.offset

    def run(self, seconds: float) -> "SimRig":
        for _ in range(round(seconds / TICK)):
            self.clock.seconds += TICK
            self.robot.tick()
            assert self.safety is not None
            if self.safety.due():
                self.tick = self.safety.tick()
                self.ticked += 1
            position, velocity = self.arm.joint_state()
            self.path.append(position.copy())
            self.speed.append(velocity.copy())
        return self

    def offer(self, targets: Any, names: tuple[str, ...] | None = None, dt: float = 0.1) -> None:
        self.sequence += 1
        rows = np.atleast_2d(np.asarray(targets, np.float64))
        assert self.safety is not None
        columns = names or self.safety.commands.limits.names
        times = dt * np.arange(1, len(rows) + 1)
        stamp = round(self.sim_seconds() * 1e9)
        self._chunk.write(
            m.joint_trajectory(m.Trajectory(stamp, f"policy:r:{self.sequence}", columns, times, rows)),
        )


def test_with_sim_time_ticks_and_ages_are_simulated(tmp_path: Path) -> None:
    rig = SimRig(tmp_path)
    rig.run(0.3).send("arm")
    rig.send("run")
    assert rig.state is State.RUNNING
    before = rig.ticked
    target = rig.follow(rig.arm.joint_state()[0], np.array([0.4, 0, 0]), 2.0)  # 0.8 rad/s of simulated time
    assert 95 <= rig.ticked - before <= 105  # half of the wall's 200
    assert rig.state is State.RUNNING
    assert rig.path[-1][0] == pytest.approx(target[0], abs=0.1)


def test_a_clock_that_stands_still_ends_in_hold_at_rest(tmp_path: Path) -> None:
    rig = SimRig(tmp_path, **FORWARD)
    rig.run(0.3).send("arm")
    rig.send("run")
    rig.follow(rig.arm.joint_state()[0], np.array([0.4, 0, 0]), 1.0)
    assert rig.speed[-1][0] > 0.2
    rig.frozen = rig.sim_seconds()
    rig.run(CLOCK_SILENCE + 0.4)
    assert rig.state is State.HOLD
    assert rig.speed[-1][0] < 0.05
    rig.run(6.0)  # what the arm drifted on before that was noticed is taken back slowly
    assert rig.state is State.HOLD
    assert np.abs(rig.speed[-1][:2]).max() < 0.03
    assert any("/clock stands still" in str(event) for event in rig.events)


def test_a_clock_that_jumps_back_holds_and_forgets(tmp_path: Path) -> None:
    rig = SimRig(tmp_path)
    rig.run(0.3).send("arm")
    rig.send("run")
    rig.follow(rig.arm.joint_state()[0], np.array([0.4, 0, 0]), 1.0)
    rig.offset = -20.0
    rig.run(0.1)
    assert rig.state is State.HOLD
    assert rig.safety is not None
    assert rig.safety.filter.counts["clock_jumps"] == 1
    rig.run(0.6)
    assert np.abs(rig.speed[-1][:2]).max() < 0.02
    assert rig.state is State.HOLD  # joint states are fresh on the new time
    rig.send("run")
    assert rig.state is State.RUNNING


# ---- bytes that mean nothing


TOPICS = {
    "/joint_states": m.JOINT_STATE,
    "/bridge/chunk": m.JOINT_TRAJECTORY,
    "/bridge/mode": m.STRING,
    "/bridge/estop": m.BOOL,
    "/bridge/deadman": m.BOOL,
}


def mutations(valid: list[bytes], rng: np.random.Generator, count: int) -> list[bytes]:
    """Random bytes, and valid messages with bytes altered, cut or appended."""
    found = []
    for k in range(count):
        data = bytearray(valid[k % len(valid)])
        kind = k % 4
        if kind == 0:
            data = bytearray(rng.bytes(int(rng.integers(0, 300))))
        elif kind == 1:
            for place in rng.integers(4, len(data), 4):
                data[place] = int(rng.integers(0, 256))
        elif kind == 2:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            data[:4] = rng.bytes(4)
            data += rng.bytes(int(rng.integers(0, 20)))
        found.append(bytes(data))
    return found


@pytest.mark.parametrize("topic", TOPICS)
def test_two_thousand_malformed_messages_do_no_harm(tmp_path: Path, topic: str) -> None:
    rig = rig_of(tmp_path, safety={"deadman_required": False, "deadman_button": -1}).start()
    rng = np.random.default_rng(0)
    position = rig.arm.joint_state()[0]
    names = ("shoulder", "elbow", "finger")
    chunk = m.Trajectory(rig.clock.stamp(), "policy:r:900", names, np.array([0.1, 0.2]), np.tile(position, (2, 1)))
    valid = {
        "/joint_states": [m.joint_state(rig.clock.stamp(), names, position, np.zeros(3))],
        "/bridge/chunk": [m.joint_trajectory(chunk)],
        "/bridge/mode": [m.string("hold"), m.string("run")],
        "/bridge/estop": [m.boolean(False)],
        "/bridge/deadman": [m.boolean(True)],
    }[topic]
    writer = rig.operator.publisher(topic, TOPICS[topic], COMMAND)
    for data in mutations(valid, rng, 2000):
        writer.write(data)
        rig.clock.seconds += 1e-4
        assert rig.safety is not None
        rig.safety.tick()
        if rig.tick is not None and rig.sequence % 50 == 0:
            rig.robot.tick()
    assert rig.safety is not None
    assert rig.safety.malformed[topic] > 200
    assert rig.safety.filter.counts["bugs"] == rig.safety.filter.counts["violations"] == 0
    assert len([e for e in rig.events if e["event"] == "malformed"]) <= 3
    rig.run(0.5)
    assert np.abs(rig.speed[-1][:2]).max() < 0.02
    travelled = np.abs(np.array(rig.path)[:, :2] - position[:2]).max()
    assert travelled < 0.35  # a chunk with one digit changed may be a sound chunk


def test_a_burst_after_a_pause_is_decoded_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_of(tmp_path).run(0.2)
    writer, decoded = rig.operator.publisher("/joint_states", m.JOINT_STATE, COMMAND), []
    assert rig.safety is not None
    read = rig.safety._reader.read
    monkeypatch.setattr(rig.safety._reader, "read", lambda data: decoded.append(1) or read(data))
    for k in range(1000):
        writer.write(m.joint_state(k, ("shoulder", "elbow", "finger"), np.full(3, 0.001 * k), np.zeros(3)))
    rig.clock.seconds += TICK
    rig.safety.tick()
    assert len(decoded) == 16
    assert rig.safety._joints.position[0] == pytest.approx(0.999)


def test_a_flood_of_joint_states_pushes_no_estop_out(tmp_path: Path) -> None:
    rig = moving(rig_of(tmp_path).start())
    rig.operator.publisher("/bridge/estop", m.BOOL, COMMAND).write(m.boolean(True))
    states = rig.operator.publisher("/joint_states", m.JOINT_STATE, COMMAND)
    data = m.joint_state(rig.clock.stamp(), ("shoulder", "elbow", "finger"), rig.path[-1], np.zeros(3))
    for _ in range(20_000):
        states.write(data)
    rig.run(TICK)
    assert rig.state is State.ESTOP


@pytest.mark.parametrize("plans", [True, False])
def test_a_chunk_that_comes_after_a_tick_was_prepared_is_for_the_next_one(tmp_path: Path, plans: bool) -> None:
    """Whether that tick is one of those that plan or one between two of them."""
    rig = moving(rig_of(tmp_path).start())
    safety = rig.safety
    assert safety is not None
    safety.prepare()
    assert safety.filter._prepared is not None
    if (safety.filter._prepared.planned is not None) != plans:
        rig.clock.seconds += TICK
        rig.robot.tick()
        safety.tick()
        safety.prepare()
    assert (safety.filter._prepared.planned is not None) == plans
    before = safety.filter.counts["chunks"]
    rig.offer(rig.path[-1])
    stop = rig.operator.publisher("/bridge/mode", m.STRING, DEFAULT)
    for expected in (0, 1):
        rig.clock.seconds += TICK
        rig.robot.tick()
        safety.tick()
        assert safety.filter.counts["chunks"] - before == expected
        assert safety.filter._prepared is None
    safety.prepare()
    stop.write(m.string("stop"))
    safety.tick()  # what is not a chunk does not wait
    assert rig.state is State.STOPPED


# ---- ends


class Virtual(Rate):
    """A rate that lets the rig's time pass instead of sleeping."""

    def __init__(self, rig: AdapterRig, ticks: int) -> None:
        super().__init__(100.0)
        self.rig, self.left, self.period = rig, ticks, 0.0

    def sleep(self, stop: Stop, prepare: Callable[[], None] | None = None, lead: float = 0.0) -> bool:
        del stop, lead
        if prepare:
            prepare()
        self.rig.clock.seconds += TICK
        self.rig.robot.tick()
        self.left -= 1
        return self.left < 0


def test_the_end_brakes_holds_and_leaves_zeros(tmp_path: Path) -> None:
    rig = moving(rig_of(tmp_path, **FORWARD).start())
    assert rig.safety is not None
    tick, safety = rig.safety.tick, rig.safety

    def advancing(later: bool = False) -> Any:
        rig.clock.seconds += TICK
        rig.robot.tick()
        return tick(later)

    rate = Virtual(rig, 5)
    safety.tick = advancing  # type: ignore[method-assign]
    run(safety, rate, Stop())
    assert rig.state is State.STOPPED
    np.testing.assert_array_equal(read_float_array(rig.sent[-1]), np.zeros(3))
    rig.safety = None
    rig.run(0.3)
    assert np.abs(rig.speed[-1][:2]).max() < 0.02


def test_an_unknown_exception_stops_the_arm_and_is_passed_on(tmp_path: Path) -> None:
    rig = moving(rig_of(tmp_path, **FORWARD).start())
    assert rig.safety is not None
    tick, safety, raised = rig.safety.tick, rig.safety, []

    def faulty() -> Any:
        rig.clock.seconds += TICK
        rig.robot.tick()
        if not raised:
            raised.append(1)
            raise ZeroDivisionError
        return tick()

    safety.tick = faulty  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run(safety, Virtual(rig, 5), Stop())
    assert rig.state is State.STOPPED
    np.testing.assert_array_equal(read_float_array(rig.sent[-1]), np.zeros(3))


def test_even_a_node_that_only_raises_leaves_zeros(tmp_path: Path) -> None:
    rig = moving(rig_of(tmp_path, **FORWARD).start())
    assert rig.safety is not None

    def broken() -> Any:
        raise ZeroDivisionError

    rig.safety.tick = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run(rig.safety, Virtual(rig, 5), Stop())
    np.testing.assert_array_equal(read_float_array(rig.sent[-1]), np.zeros(3))
