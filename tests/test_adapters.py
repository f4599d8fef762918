"""What each adapter makes the arm do, against the simulated robot's own controllers, and what it sends."""

import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline

sys.path.insert(0, str(Path(__file__).parent))
from adapter_rig import TICK, AdapterRig, gantry_profile, gantry_scene
from bridge_fixtures import tiny_profile

from embodied.contracts.errors import ConfigError, SafetyError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.adapter_forward_position import ForwardPositionAdapter
from embodied.robot_bridge.adapter_forward_velocity import ForwardVelocityAdapter
from embodied.robot_bridge.adapter_jtc import HORIZON, SOONEST, JtcAdapter, resting, shaped, unhurried
from embodied.robot_bridge.adapter_servo_jog import ServoJogAdapter
from embodied.robot_bridge.adapter_velocity import CORRECTION
from embodied.robot_bridge.adapters import ADAPTERS, RobotCommands
from embodied.robot_bridge.command_messages import float_array, read_float_array, read_joint_jog, read_twist_stamped
from embodied.robot_bridge.controller import Moment, Reference
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion, MotionFilter, Plan
from embodied.robot_bridge.profile import Profile, Safety
from embodied.robot_bridge.profile_check import ADAPTERS as PROFILE_ADAPTERS
from embodied.robot_bridge.qos import COMMAND, LATEST
from embodied.robot_bridge.robot_clock import RobotClock
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State, Tick
from embodied.robot_bridge.trajectory_controller import Goal, TrajectoryController, interpolate
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

OWN_GRIPPER = {
    "joint": "finger",
    "open": 0.08,
    "closed": 0.0,
    "adapter": "forward_position",
    "topic": "/gripper_controller/commands",
}
SERVO = {"frame": "base_link"}
CHANGES = {
    "jtc": {},
    "forward_position": {"adapter": "forward_position", "topics": {"command": "/forward/commands"}},
    "forward_velocity": {
        "adapter": "forward_velocity",
        "acknowledge_no_timeout": True,
        "topics": {"command": "/forward/commands"},
    },
    "servo_jog": {
        "adapter": "servo_jog",
        "gripper": OWN_GRIPPER,
        "servo": SERVO,
        "topics": {"command": "/servo_node/delta_joint_cmds"},
    },
}
JOINT_ADAPTERS = tuple(CHANGES)


def rig_of(folder: Path, adapter: str, **changes: object) -> AdapterRig:
    return AdapterRig(folder, tiny_profile(folder, **(CHANGES[adapter] | changes)))


def test_every_adapter_of_a_profile_is_there() -> None:
    assert set(ADAPTERS) == set(PROFILE_ADAPTERS)


@pytest.mark.parametrize("adapter", JOINT_ADAPTERS)
def test_the_arm_goes_where_the_chunks_say_and_stays_within_limits(tmp_path: Path, adapter: str) -> None:
    rig = rig_of(tmp_path, adapter).start()
    target = rig.follow(rig.arm.joint_state()[0], np.array([0.5, -0.4, 0.0]), 1.0)
    rig.offer(target)
    rig.run(1.0)
    np.testing.assert_allclose(rig.path[-1][:2], target[:2], atol=6e-3)
    assert np.abs(rig.speed[-1][:2]).max() < 5e-3
    assert rig.safety is not None
    limits = rig.safety.commands.limits
    assert (np.abs(rig.speed)[:, :2] <= limits.velocity[:2] * 1.02).all()
    assert rig.safety.filter.counts["rejected"] == 0


@pytest.mark.parametrize("adapter", JOINT_ADAPTERS)
def test_silence_of_the_policy_ends_at_rest(tmp_path: Path, adapter: str) -> None:
    rig = rig_of(tmp_path, adapter).start()
    rig.follow(rig.arm.joint_state()[0], np.array([0.8, 0.0, 0.0]), 0.8)
    assert np.abs(rig.speed[-1]).max() > 0.5
    rig.run(0.5)
    assert rig.state is State.HOLD
    assert np.abs(rig.speed[-1][:2]).max() < 0.02


@pytest.mark.parametrize("adapter", JOINT_ADAPTERS)
def test_what_the_arm_does_when_the_safety_process_dies(tmp_path: Path, adapter: str) -> None:
    """The reason for the default, and for having to acknowledge forward_velocity."""
    rig = rig_of(tmp_path, adapter).start()
    rig.follow(rig.arm.joint_state()[0], np.array([0.8, 0.0, 0.0]), 0.8)
    assert rig.safety is not None
    brake_time, where, rig.safety = rig.safety.commands.brake_time, rig.path[-1][0], None
    if adapter == "forward_velocity":
        assert brake_time == math.inf
        rig.run(0.5)
        assert rig.speed[-1][0] > 0.5  # nothing stops it
        return
    assert brake_time < 0.5
    rig.run(brake_time + 0.2)
    assert np.abs(rig.speed[-1][0]) < 0.02
    assert rig.path[-1][0] - where < 0.8 * brake_time + 0.05


@pytest.mark.parametrize("adapter", JOINT_ADAPTERS)
@pytest.mark.parametrize("mode", ["stop", "estop"])
def test_stop_and_estop_end_at_rest_and_with_zeros(tmp_path: Path, adapter: str, mode: str) -> None:
    rig = rig_of(tmp_path, adapter).start()
    rig.follow(rig.arm.joint_state()[0], np.array([0.8, 0.0, 0.0]), 0.6)
    if mode == "stop":
        rig.send("stop")
    else:
        rig.operator.publisher("/bridge/estop", m.BOOL, COMMAND).write(m.boolean(True))
    rig.run(0.6)
    assert rig.state is (State.STOPPED if mode == "stop" else State.ESTOP)
    assert np.abs(rig.speed[-1][:2]).max() < 0.02
    if adapter == "forward_velocity":
        np.testing.assert_array_equal(read_float_array(rig.sent[-1]), np.zeros(3))
    if adapter == "servo_jog":
        np.testing.assert_array_equal(read_joint_jog(rig.sent[-1]).velocity, np.zeros(2))
    said = len(rig.sent)
    rig.run(0.3)
    assert (len(rig.sent) == said) == (mode == "estop")  # an e-stop falls silent, a stop holds


def test_a_forward_position_controller_gets_one_vector_per_tick_in_its_order(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "forward_position").start()
    count = len(rig.sent)
    rig.follow(rig.arm.joint_state()[0], np.array([0.3, 0.2, -0.1]), 0.5)
    vectors = np.array([read_float_array(data) for data in rig.sent[count:]])
    assert vectors.shape == (50, 3)
    assert np.isfinite(vectors).all()
    steps = np.diff(vectors, axis=0) / 0.01
    assert rig.safety is not None
    assert (np.abs(steps) <= rig.safety.commands.limits.velocity * 1.001).all()
    acceleration = np.diff(steps, axis=0) / 0.01
    assert (np.abs(acceleration) <= rig.safety.commands.limits.acceleration * 1.01).all()


def test_trajectories_are_what_a_trajectory_controller_accepts(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "jtc").start()
    rng = np.random.default_rng(0)
    target = rig.arm.joint_state()[0]
    for _ in range(30):
        target = target + rng.uniform(-0.12, 0.12, 3) * [1, 1, 0.1]
        rig.offer(target)
        rig.run(0.1)
    assert rig.robot.counts["rejected"] == 0
    assert rig.robot.counts["accepted"] > 150
    sent = [m.read_joint_trajectory(data) for data in rig.sent]
    assert (np.diff([trajectory.stamp_ns for trajectory in sent]) >= 4_000_000).all()  # the rig has one clock
    assert rig.safety is not None
    rig.safety._robot_clock.forget()
    rig.offer(target)
    rig.run(0.05)
    assert m.read_joint_trajectory(rig.sent[len(sent)]).stamp_ns == 0
    for trajectory in sent:
        assert trajectory.names == ("shoulder", "elbow", "finger")
        assert 3 <= len(trajectory.times) <= 30
        assert trajectory.velocities is not None
        assert (np.diff(trajectory.times) > 0).all()
        assert trajectory.times[0] >= SOONEST
        assert HORIZON - 1e-6 <= trajectory.times[-1] <= 0.4
        assert not trajectory.velocities[-1].any()


def paths_of(folder: Path, expects: bool, encoded: list[bool]) -> list[CubicHermiteSpline]:
    """The paths that were sent, over the seconds since all began. Ticks come at odd times, some of them very late."""
    rig, rng = rig_of(folder, "jtc").start(), np.random.default_rng(0)
    safety, began, target = rig.safety, rig.clock.seconds, rig.arm.joint_state()[0]
    assert safety is not None
    adapter, sent, stamp = safety.commands._arm, len(rig.sent), rig.clock.stamp()
    assert isinstance(adapter, JtcAdapter)
    encode, ticking = adapter._encode, False
    adapter._encode = lambda *plan: encoded.append(ticking) or encode(*plan)  # type: ignore[method-assign]
    for step in range(1, 301):
        if step % 10 == 1:
            target = target + rng.uniform(-0.12, 0.12, 3) * [1, 1, 0.1]
            rig.offer(target)
        ticking, rig.clock.seconds = False, began + step * TICK - 0.001
        rig.robot.tick()
        safety.prepare()
        if not expects:
            adapter._ready = None
        late = rng.uniform(0, 0.0008) + 0.003 * (step % 25 == 0)
        ticking, rig.clock.seconds = True, began + step * TICK + late
        safety.tick()
    assert rig.robot.counts["rejected"] == 0
    found = [m.read_joint_trajectory(data) for data in rig.sent[sent:]]
    assert all(trajectory.stamp_ns for trajectory in found)
    return [CubicHermiteSpline((t.stamp_ns - stamp) * 1e-9 + t.times, t.positions, t.velocities) for t in found]


def test_a_message_that_was_made_ready_before_its_tick_says_the_same(tmp_path: Path) -> None:
    encoded: tuple[list[bool], list[bool]] = ([], [])
    plain, ready = [paths_of(tmp_path / str(k), bool(k), encoded[k]) for k in (0, 1)]
    assert len(plain) == len(ready) == sum(encoded[0]) > 140
    assert 0 < sum(encoded[1]) < 0.1 * len(ready)  # in a tick: where it was too late for what was ready
    for ours, theirs in zip(ready, plain, strict=True):
        assert abs(ours.x[0] - theirs.x[0]) < 0.01  # a point less where the tick came later than expected
        times = np.linspace(max(ours.x[0], theirs.x[0]), min(ours.x[-1], theirs.x[-1]), 50)
        np.testing.assert_allclose(ours(times), theirs(times), rtol=0, atol=1e-8)
        assert ours.x[-1] - times[0] > HORIZON - SOONEST - 0.012


def test_a_short_plan_is_padded_and_a_plan_keeps_its_points() -> None:
    rest = shaped(Plan(np.array([0.02]), np.ones((1, 2)), np.zeros((1, 2))))
    np.testing.assert_allclose(rest.times, [0.05, 0.1, 0.15])
    np.testing.assert_array_equal(rest.positions, np.ones((3, 2)))
    times = np.array([0.049, 0.0515, 0.08, 0.2])
    plan = Plan(times, np.arange(8.0).reshape(4, 2), np.vstack([np.ones((3, 2)), np.zeros((1, 2))]))
    kept = shaped(plan)
    np.testing.assert_array_equal(kept.times, times[1:])
    np.testing.assert_array_equal(kept.positions, plan.positions[1:])
    np.testing.assert_array_equal(kept.velocities, plan.velocities[1:])


def test_a_plan_without_a_point_near_the_soonest_gets_one() -> None:
    times = np.array([0.01, 0.03, 0.11, 0.3])
    positions = np.array([[0.0, 1.0], [0.2, 1.0], [0.4, 0.5], [0.5, 0.4]])
    velocities = np.array([[1.0, 0.0], [2.0, -1.0], [1.5, 0.5], [0.0, 0.0]])
    plan = Plan(times, positions, velocities)
    kept, spline = shaped(plan), CubicHermiteSpline(times, positions, velocities)
    np.testing.assert_array_equal(kept.times, [SOONEST, 0.11, 0.3])
    np.testing.assert_allclose(kept.positions[0], spline(SOONEST), rtol=0, atol=1e-12)
    np.testing.assert_allclose(kept.velocities[0], spline(SOONEST, 1), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(kept.positions[1:], positions[2:])
    np.testing.assert_array_equal(plan.times, times)


@pytest.mark.parametrize(("strongest", "jerk"), [(3.0, 30.0), (4.0, 100.0)])
def test_the_way_to_the_first_point_keeps_the_position_box(strongest: float, jerk: float) -> None:
    """A joint that comes to rest at its limit before the first point, while another goes on: it may shoot past by what
    a cubic over SOONEST seconds makes of the last of a brake, jerk * SOONEST^3 / 198 at most."""
    high, rates = np.full(2, 0.6), [np.full(2, value) for value in (0.7, strongest, jerk)]
    limits = Limits(("a", "b"), -high, high, *rates, max_step=np.full(2, 0.3))
    motion_filter, rng, past, paused = MotionFilter(limits, 0.005), np.random.default_rng(0), [], 0
    for _ in range(500):
        target = 0.6 * rng.choice([-1.0, 1.0], 2)
        path = motion_filter.rest(target - np.sign(target) * rng.uniform(0.02, 0.3, 2))
        ticks = int(rng.integers(5, 120))
        path = motion_filter.follow(path, np.repeat(target[None], ticks, 0)).advance(ticks)
        path = motion_filter.follow(path, np.repeat(target[None], rng.integers(0, 6), 0))
        motion, plan = motion_filter.motion(path), motion_filter.plan(path)
        paused += bool(np.append(plan.times, 0.0)[np.searchsorted(plan.times, SOONEST)] > 2 * SOONEST)
        sent = shaped(plan)
        assert sent.times[0] < SOONEST + 0.005
        positions = np.vstack([motion.position, sent.positions])
        spline = CubicHermiteSpline(
            np.append(0.0, sent.times), positions, np.vstack([motion.velocity, sent.velocities])
        )
        past.append((np.abs(spline(np.linspace(0.0, sent.times[-1], 400))) - high).max())
    assert paused > 20
    assert 0.0 < max(past) < jerk * SOONEST**3 / 190


def test_a_first_point_out_of_reach_is_given_time() -> None:
    limit, told = np.array([1.0, 0.5]), np.zeros(2)
    times = np.array([0.05, 0.1, 0.2])
    plan = Plan(times, np.array([[0.06, 0.0], [0.1, 0.0], [0.1, 0.0]]), np.zeros((3, 2)))
    assert unhurried(plan, told, limit, 0.05) is plan  # nothing unusual
    far = Plan(times, plan.positions + np.array([0.0, 0.2]), plan.velocities)
    later = unhurried(far, told, limit, 0.05)
    assert later.times[0] == pytest.approx(0.6)  # a cubic from rest to rest peaks at 1.5 times its mean speed
    np.testing.assert_allclose(np.diff(later.times), np.diff(times))
    assert later.positions is far.positions


def test_a_robot_that_is_not_heard_is_told_where_to_rest_alone() -> None:
    """One that hangs is at `told` when it takes this up, one that follows is at `motion`: both keep their limits."""
    limits = tiny_limits()
    motion_filter = MotionFilter(limits, 0.005)
    path = motion_filter.follow(motion_filter.coasting(np.zeros(2), np.array([1.9, -0.4])), np.zeros((0, 2)))
    plan, motion = motion_filter.plan(path), motion_filter.motion(path)
    told = motion.position - 0.06 * motion.velocity
    rest = resting(plan, told, motion, limits)
    np.testing.assert_array_equal(rest.positions, plan.positions[-1:])
    assert plan.times[-1] < rest.times[0] < plan.times[-1] + 0.1
    end, span = Reference(plan.positions[-1], np.zeros(2)), float(rest.times[0])
    for start, speed, most in ((told, np.zeros(2), 1.1), (motion.position, motion.velocity, 1.0)):
        way = [interpolate(Reference(start, speed), end, span, span * k / 200) for k in range(201)]
        assert max((np.abs(at.velocity) / limits.velocity).max() for at in way) <= most + 1e-9
        past = np.array([at.position - end.position for at in way]) * np.sign(motion.velocity)
        assert past[:, 0].max() <= 1e-9
        assert past[:, 1].max() <= 0.01  # the slow joint, which could stop sooner
    # A joint that could not keep its box that way gets the brake as it is.
    near = dataclasses.replace(limits, low=np.array([-1.9, plan.positions[-1, 1] - 1e-3]))
    assert resting(plan, told, motion, near) is plan


def test_a_trajectory_bears_its_time_only_where_the_robot_reads_our_clock() -> None:
    clock, ms = RobotClock(), 1_000_000
    assert not clock.agrees
    for k in range(20):
        clock.hear(k * 5 * ms, k * 5 * ms + (1 + k % 7) * ms)
    assert clock.agrees
    clock.hear(0, 40 * ms)  # one that is late tells nothing
    assert not clock.agrees
    clock.hear(200 * ms, 201 * ms)
    assert clock.agrees
    clock.hear(300 * ms, 200 * ms)  # the robot's clock was set forward
    assert not clock.agrees
    clock.forget()
    for k in range(30):  # another clock, 20 ms behind
        clock.hear(k * 5 * ms, k * 5 * ms + 21 * ms)
    assert not clock.agrees
    assert clock.lateness == 0.0
    clock.hear(0, 71 * ms)
    assert clock.lateness == pytest.approx(0.05)
    for _ in range(2100):  # what lasts is how this robot is
        clock.hear(0, 71 * ms)
    assert clock.lateness == 0.0


def test_trajectories_that_arrive_late_do_not_make_the_controller_hurry() -> None:
    """Messages take 0 to 20 ms, and a trajectory starts when it arrives: the next one makes up for it."""
    limits = tiny_limits()
    rng, still = np.random.default_rng(0), np.zeros(2)
    safety = SafetyFilter(limits, Safety(deadman_required=False, tracking_error=0.2))
    controller = TrajectoryController(limits.names, still)
    safety.measure(still, still, 0.0)
    assert safety.request("arm", 0.0) == safety.request("run", 0.0) == ""
    waiting: list[tuple[float, Plan]] = []
    asked, last, target = [still], still, still
    for step in range(1, 1500):
        now = 0.002 * step
        if step % 50 == 0:
            target = target + 0.16 * np.array([1.0, -1.0]) * (1 if step < 700 else -1)
            assert safety.offer(Chunk("r", step, now, now, limits.names, np.array([0.1]), target[None]), now) == ""
        if step % 5 == 0:
            safety.measure(last, still, now)
            tick = safety.tick(now)
            if tick.plan is not None:
                waiting.append((max([now + rng.uniform(0, 0.02), *(at for at, _ in waiting)]), shaped(tick.plan)))
        while waiting and waiting[0][0] <= now:
            plan = waiting.pop(0)[1]
            goal = Goal(0, limits.names, plan.times, plan.positions, plan.velocities, plan.velocities * np.nan)
            assert not controller.accept(goal, Moment(now, 0, 0.002, last, still))
        last = controller.sample(now).position
        asked.append(last)
    assert safety.state is State.RUNNING
    speed = np.abs(np.diff(asked, axis=0)) / 0.002
    assert speed.max() > 1.0
    assert speed.max() <= 1.4 * 2.0


def tiny_limits() -> Limits:
    step, wide = np.full(2, 0.3), np.full(2, 1.9)
    return Limits(("a", "b"), -wide, wide, np.full(2, 2.0), np.full(2, 12.0), np.full(2, 5000.0), step)


def tick_of(state: State, position: np.ndarray, velocity: np.ndarray) -> Tick:
    motion = Motion(np.asarray(position, float), np.asarray(velocity, float), np.zeros(len(position)))
    return Tick(state, "", None, None, (), motion)


def test_a_command_that_is_not_finite_is_never_sent(tmp_path: Path) -> None:
    transport = MemoryTransport(MemoryBus())
    adapter = ForwardPositionAdapter(tiny_profile(tmp_path, **CHANGES["forward_position"]), transport)
    seen: list[bytes] = []
    transport.subscriber("/forward/commands", m.FLOAT_ARRAY, LATEST, lambda data, _: seen.append(data))
    with pytest.raises(SafetyError, match="nothing was sent"):
        adapter.send(tick_of(State.RUNNING, np.array([0.0, np.nan, 0.0]), np.zeros(3)), np.zeros(3), 0.0, 0)
    assert not seen


def test_forward_velocity_needs_the_acknowledgement(tmp_path: Path) -> None:
    profile = tiny_profile(tmp_path, **CHANGES["forward_velocity"])
    with pytest.raises(SafetyError, match="acknowledge_no_timeout"):
        ForwardVelocityAdapter(dataclasses.replace(profile, acknowledge_no_timeout=False), MemoryTransport(MemoryBus()))


def test_a_drift_is_taken_back_slowly_and_a_jump_of_the_measurement_does_not_jerk(tmp_path: Path) -> None:
    profile = tiny_profile(tmp_path, **CHANGES["forward_velocity"])
    transport = MemoryTransport(MemoryBus())
    adapter = ForwardVelocityAdapter(profile, transport)
    speeds: list[np.ndarray] = []
    transport.subscriber("/forward/commands", m.FLOAT_ARRAY, LATEST, lambda d, _: speeds.append(read_float_array(d)))
    hold = tick_of(State.HOLD, np.zeros(3), np.zeros(3))
    for _ in range(50):  # the encoder says half a radian, all at once
        adapter.send(hold, np.array([-0.5, 0.0, 0.0]), 0.0, 0)
    found = np.array(speeds)
    assert found[-1][0] == pytest.approx(CORRECTION * 2.0)
    assert np.abs(np.diff(found[:, 0], prepend=0.0)).max() <= 12.0 * 0.01 + 1e-9
    assert not found[:, 1:].any()
    for _ in range(2):
        adapter.send(hold, np.array([-0.05, 0.0, 0.0]), 0.0, 0)
    assert speeds[-1][0] == pytest.approx(0.1)
    stopped = tick_of(State.STOPPED, np.zeros(3), np.zeros(3))
    for _ in range(5):
        adapter.send(stopped, np.array([-0.05, 0.0, 0.0]), 0.0, 0)
    assert not speeds[-1].any()


def test_an_open_loop_would_have_drifted(tmp_path: Path) -> None:
    """Velocities that the robot executes 5 % too slowly still end where the chunks say."""
    rig = rig_of(tmp_path, "forward_velocity").start()
    controller = rig.robot.mounted[0].controller
    receive = controller.receive

    def weak(data: bytes, moment: object) -> str:
        return receive(float_array(0.95 * read_float_array(data)), moment)  # type: ignore[arg-type]

    controller.receive = weak  # type: ignore[method-assign]
    target = rig.follow(rig.arm.joint_state()[0], np.array([0.6, 0.0, 0.0]), 1.5)
    for _ in range(25):
        rig.offer(target)
        rig.run(0.1)
    assert abs(rig.path[-1][0] - target[0]) < 3e-3  # open loop: 0.045 rad short


def test_jog_commands_are_stamped_now_named_and_framed(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, "servo_jog").start()
    rig.follow(rig.arm.joint_state()[0], np.array([0.3, 0.2, 0.0]), 0.3)
    jog = read_joint_jog(rig.sent[-1])
    assert jog.stamp_ns == rig.clock.stamp()
    assert (jog.frame_id, jog.names) == ("base_link", ("shoulder", "elbow"))
    np.testing.assert_allclose(jog.velocity, [0.3, 0.2], atol=0.05)


def test_unitless_servo_gets_shares_of_its_own_scale(tmp_path: Path) -> None:
    changes = CHANGES["servo_jog"] | {"servo": {"frame": "base_link", "unitless": True, "joint_scale": 0.5}}
    adapter = ServoJogAdapter(tiny_profile(tmp_path, **changes), MemoryTransport(MemoryBus()))
    jog = read_joint_jog(adapter.encode(np.array([0.25, -0.5]), 7))
    np.testing.assert_allclose(jog.velocity, [0.5, -1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"servo": {}}, "servo.frame"),
        ({"gripper": {"joint": "finger", "open": 0.08, "closed": 0.0}}, "gripper"),
    ],
)
def test_servo_refuses_what_it_cannot_drive(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RobotCommands(tiny_profile(tmp_path, **(CHANGES["servo_jog"] | changes)), MemoryTransport(MemoryBus()))


# ---- twist: the filter works on the tool's axes


def twist_rig(folder: Path, **changes: object) -> AdapterRig:
    return AdapterRig(gantry_scene(folder), gantry_profile(folder, **changes))


def tool(rig: AdapterRig) -> np.ndarray:
    return np.asarray(rig.arm.joint_state()[0])[:3]


def test_a_twist_moves_the_tool_as_the_targets_say_within_the_axis_limits(tmp_path: Path) -> None:
    rig = twist_rig(tmp_path).start()
    start = np.concatenate([tool(rig), np.zeros(3)])
    target = rig.follow(start, np.array([0.1, -0.05, 0.0, 0.0, 0.0, 0.3]), 1.0)
    for _ in range(8):
        rig.offer(target)
        rig.run(0.1)
    np.testing.assert_allclose(tool(rig), target[:3], atol=3e-3)
    assert rig.path[-1][5] == pytest.approx(0.3, abs=0.03)  # the turn is open loop
    linear = np.abs(np.array(rig.speed)[:, :3])
    assert linear.max() <= 0.2 * 1.05
    twist = read_twist_stamped(rig.sent[-1])
    assert twist.frame_id == "base_link"
    assert twist.stamp_ns == rig.clock.stamp()
    assert rig.commands[-1].names == ("x", "y", "z", "rx", "ry", "rz")


def test_the_tool_stays_in_the_workspace_box(tmp_path: Path) -> None:
    box = {"low": [-0.5, -0.5, 0.0], "high": [0.2, 0.5, 1.0], "frames": ["tip"], "margin": 0.02}
    rig = twist_rig(tmp_path, workspace=box).start()
    rig.follow(np.concatenate([tool(rig), np.zeros(3)]), np.array([0.15, 0, 0, 0, 0, 0]), 2.0)
    assert np.array(rig.path)[:, 0].max() <= 0.18 + 2e-3
    assert np.array(rig.path)[:, 0].max() > 0.15


def test_a_dead_safety_process_stops_a_servoed_arm(tmp_path: Path) -> None:
    rig = twist_rig(tmp_path).start()
    rig.follow(np.concatenate([tool(rig), np.zeros(3)]), np.array([0.15, 0, 0, 0, 0, 0]), 0.8)
    assert rig.speed[-1][0] > 0.1
    assert rig.safety is not None
    brake_time, rig.safety = rig.safety.commands.brake_time, None
    rig.run(brake_time + 0.1)
    assert np.abs(rig.speed[-1]).max() < 0.01


def test_a_twist_is_only_given_in_the_base_frame(tmp_path: Path) -> None:
    gantry_scene(tmp_path)
    profile: Profile = gantry_profile(tmp_path)
    for frame in ("tip", "elsewhere"):
        other = dataclasses.replace(profile, servo=dataclasses.replace(profile.servo, frame=frame))
        with pytest.raises(ConfigError, match="base frame"):
            RobotCommands(other, MemoryTransport(MemoryBus()))


@pytest.mark.parametrize("adapter", ["forward_position", "forward_velocity"])
@pytest.mark.parametrize(
    ("order", "refused"), [(["elbow", "shoulder", "finger"], True), (["shoulder", "elbow", "finger"], False)]
)
def test_a_forward_controller_with_another_joint_order_refuses_arming(
    tmp_path: Path, adapter: str, order: list[str], refused: bool
) -> None:
    rig = rig_of(tmp_path, adapter)
    rig.transport("forward").parameters({"joints": order})  # its commands are on /forward/commands
    rig.before_step = lambda: time.sleep(0.001)  # the question is asked on a thread of its own
    rig.run(1.2)
    rig.send("arm")
    assert (rig.state is State.INACTIVE) == refused
    if refused:
        assert any("/forward has the joints elbow, shoulder, finger" in str(event) for event in rig.events)
