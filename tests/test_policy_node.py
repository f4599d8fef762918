"""The policy process, and the whole loop robot - policy - safety under virtual time with its faults."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import JOINTS, Clock, tiny_profile, write_scene

from embodied.contracts.errors import BundleError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.mujoco_robot import MujocoRobot
from embodied.robot_bridge.policy_node import Pacer, PolicyNode, Targets, check_fits
from embodied.robot_bridge.profile import load_profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATEST
from embodied.robot_bridge.safety import State
from embodied.robot_bridge.safety_node import SafetyNode
from embodied.robot_bridge.scene import load_scene
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.transport_memory import Fault, MemoryBus, MemoryTransport

ACTION = ActionSpec((3,), names=JOINTS, unit="rad, m", control_mode="joint_position_delta", scale=(0.1, 0.1, 0.04))


@dataclasses.dataclass
class FakePolicy:
    """Plays a fixed chunk and keeps what it saw."""

    chunk: np.ndarray
    cameras: tuple[str, ...] = ("eye",)

    def __post_init__(self) -> None:
        shapes = {"joint_position": (2,), "joint_velocity": (2,), "gripper_position": (1,), "joint_target": (3,)}
        self.observation_spec = {key: ArraySpec(shape) for key, shape in shapes.items()}
        self.image_spec = {name: ArraySpec((64, 64, 3), "uint8") for name in self.cameras}
        self.action_spec, self.control_dt = ACTION, 0.1
        self.seen: list[dict[str, np.ndarray]] = []

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        self.seen.append(dict(observation))
        return self.chunk


def test_targets_are_those_of_the_simulated_environment() -> None:
    """Against `LiftEnv.next_target`, written anew: scale, lead limit, joint range, gripper ramp."""
    profile = load_profile("panda-mujoco")
    scale = np.array([0.1] * 7 + [0.04])
    action = dataclasses.replace(ACTION, shape=(8,), names=profile.all_joints, scale=tuple(scale))
    policy = FakePolicy(np.zeros((1, 8)))
    policy.action_spec = action
    limits = profile.read_limits()
    targets = Targets(policy, profile, limits)
    rng = np.random.default_rng(0)
    measured = np.array([0.0, 0.2, 0.0, -2.0, 0.0, 2.2, 0.7, 0.08])
    expected = measured.copy()
    targets.start(measured)
    for _ in range(200):
        a = rng.uniform(-1.5, 1.5, 8)
        clipped = np.clip(a, -1, 1)
        arm = np.clip(expected[:7] + 0.1 * clipped[:7], measured[:7] - 0.2, measured[:7] + 0.2)
        wanted = 0.0 if a[7] > 0 else 0.08
        gripper = expected[7] + np.clip(wanted - expected[7], -0.04, 0.04)
        expected = np.append(np.clip(arm, limits.low[:7], limits.high[:7]), gripper)
        np.testing.assert_allclose(targets.apply(a[None], measured)[0], expected, atol=1e-12)
        measured = measured + 0.5 * (expected - measured)


def test_a_chunk_becomes_a_path_but_only_its_first_action_counts_as_done(tmp_path: Path) -> None:
    profile = tiny_profile(tmp_path)
    targets = Targets(FakePolicy(np.zeros((1, 3))), profile, profile.read_limits())
    targets.start(np.array([0.0, 0.0, 0.08]))
    rows = targets.apply(np.array([[1, 0, 1], [1, 0, 1], [1, 0, 1.0]]), np.zeros(3))
    np.testing.assert_allclose(rows, [[0.1, 0, 0.04], [0.2, 0, 0.0], [0.2, 0, 0.0]], atol=1e-12)  # 0.2: lead limit
    assert targets.current is not None
    np.testing.assert_allclose(targets.current, [0.1, 0.0, 0.04])


@pytest.mark.parametrize(("hz", "every"), [(10, 1), (20, 2), (30, 3), (60, 6), (100, 10)])
def test_pacer_keeps_the_control_rate_at_any_camera_rate(hz: int, every: int) -> None:
    rng, pacer = np.random.default_rng(0), Pacer(0.1)
    stamps = 10**18 + np.arange(40 * every) * 10**9 // hz + rng.integers(-4_000_000, 4_000_000, 40 * every)
    taken = [int(stamp) for stamp in stamps if pacer.due(int(stamp))]
    assert abs(len(taken) - 40) <= 1
    assert np.diff(taken).min() * 1e-9 > 0.06
    assert np.diff(taken).mean() * 1e-9 == pytest.approx(0.1, rel=0.03)


def test_pacer_starts_anew_after_a_gap() -> None:
    pacer = Pacer(0.1)
    assert pacer.due(10**18)
    assert not pacer.due(10**18 + 50_000_000)
    assert pacer.due(10**18 + 10**10)
    assert not pacer.due(10**18 + 10**10 + 50_000_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_spec": dataclasses.replace(ACTION, control_mode="raw")}, "'raw'"),
        ({"action_spec": dataclasses.replace(ACTION, names=("elbow", "shoulder", "finger"))}, "elbow, shoulder"),
        ({"observation_spec": {"cube_position": ArraySpec((3,))}}, "'cube_position', which no robot measures"),
        ({"observation_spec": {"joint_position": ArraySpec((7,))}}, r"shape \(7,\)"),
        ({"image_spec": {"ey": ArraySpec((64, 64, 3), "uint8")}}, "Did you mean 'eye'"),
    ],
)
def test_a_bundle_that_does_not_fit_the_robot_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    policy = FakePolicy(np.zeros((1, 3)))
    for name, value in change.items():
        setattr(policy, name, value)
    with pytest.raises(BundleError, match=message):
        check_fits(policy, tiny_profile(tmp_path))


class Loop:
    """Robot, policy and safety on a memory bus; ten milliseconds per step."""

    def __init__(self, folder: Path, chunk: object = ((0.5, -0.3, 1.0),), cameras: tuple[str, ...] = ("eye",)) -> None:
        self.clock = Clock()
        self.bus = MemoryBus(self.clock.monotonic_ns)
        profile = tiny_profile(folder)
        self.arm = SimulatedArm(load_scene(write_scene(folder)))
        monotonic, stamp = self.clock.monotonic, self.clock.stamp
        self.robot: MujocoRobot | None = MujocoRobot(self.arm, profile, MemoryTransport(self.bus), monotonic, stamp)
        self.safety: SafetyNode | None = SafetyNode(profile, MemoryTransport(self.bus), monotonic, stamp)
        self.fake = FakePolicy(np.asarray(chunk, np.float64), cameras)
        self.policy: PolicyNode | None = PolicyNode(self.fake, profile, MemoryTransport(self.bus), stamp)
        self.operator = MemoryTransport(self.bus)
        self.mode = self.operator.publisher("/bridge/mode", m.STRING, DEFAULT)
        self.fault = self.operator.publisher("/sim/fault", m.STRING, DEFAULT)
        self.chunks: list[m.Trajectory] = []
        self.commands: list[m.Trajectory] = []
        for topic, keep in (("/bridge/chunk", self.chunks), ("/bridge/command", self.commands)):
            self.operator.subscriber(
                topic, m.JOINT_TRAJECTORY, LATEST, lambda data, _, keep=keep: keep.append(m.read_joint_trajectory(data))
            )
        self.positions: list[np.ndarray] = []

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 100)):
            self.clock.seconds += 0.01
            if self.robot is not None:
                self.robot.tick()
                self.positions.append(self.arm.joint_state()[0])
            if self.policy is not None and self.policy.wake.is_set():
                self.policy.step()
            if self.safety is not None:
                self.safety.tick()

    def send(self, mode: str) -> None:
        self.mode.write(m.string(mode))
        self.run(0.05)

    def start(self) -> "Loop":
        self.run(0.3)
        self.send("arm")
        self.send("run")
        return self

    @property
    def state(self) -> State:
        assert self.safety is not None
        return self.safety.filter.state

    @property
    def speed(self) -> float:
        return float(np.abs(self.arm.joint_state()[1][:2]).max())


def test_the_loop_moves_the_arm_as_the_policy_says(tmp_path: Path) -> None:
    loop = Loop(tmp_path).start()
    assert loop.state is State.RUNNING
    loop.run(2.0)
    steps = len(loop.chunks)
    assert 19 <= steps <= 22
    # Targets are integrated from where the arm stood: 0.05 and -0.03 rad per step.
    wanted = np.array([0.1, -0.2, 0.0]) + steps * np.array([0.05, -0.03, 0.0])
    np.testing.assert_allclose(loop.chunks[-1].positions[0], wanted, atol=1e-3)
    # The last command has not reached the last target yet: it trails by a chunk at most.
    assert np.abs(loop.commands[-1].positions[0] - wanted)[:2].max() < 0.06
    assert np.abs(loop.arm.joint_state()[0] - wanted)[:2].max() < 0.1
    assert loop.speed == pytest.approx(0.5, rel=0.3)
    np.testing.assert_allclose(loop.arm.joint_state()[0][2], 0.0, atol=2e-3)  # the gripper closed
    assert loop.commands[-1].frame_id == loop.chunks[-1].frame_id
    assert loop.safety is not None
    assert loop.safety.filter.counts["rejected"] == loop.safety.filter.counts["holds"] == 0


def test_the_policy_sees_one_moment_even_when_it_comes_late(tmp_path: Path) -> None:
    loop = Loop(tmp_path).start()
    loop.run(0.5)
    policy, loop.policy = loop.policy, None
    assert policy is not None
    policy.wake.clear()
    while not policy.wake.is_set():
        loop.run(0.01)
    moment = loop.positions[-1][:2]
    loop.run(0.03)  # three newer joint states arrive before the process gets to run
    assert policy.step()
    seen = loop.fake.seen[-1]
    assert set(seen) == {"joint_position", "joint_velocity", "gripper_position", "joint_target", "images/eye"}
    assert seen["images/eye"].dtype == np.uint8
    assert seen["joint_position"].dtype == np.float32
    np.testing.assert_allclose(seen["joint_position"], moment, atol=1e-6)
    assert np.abs(loop.positions[-1][:2] - moment).max() > 5e-3
    np.testing.assert_allclose(seen["joint_target"], loop.chunks[-2].positions[0], atol=1e-6)


def test_without_cameras_joint_states_set_the_pace(tmp_path: Path) -> None:
    loop = Loop(tmp_path, cameras=()).start()
    loop.run(1.0)
    assert 9 <= len(loop.chunks) <= 12
    assert loop.state is State.RUNNING


def test_a_killed_policy_stops_the_arm_within_300_ms(tmp_path: Path) -> None:
    loop = Loop(tmp_path).start()
    loop.run(1.0)
    assert loop.speed > 0.3
    loop.policy = None
    loop.run(0.3)
    assert loop.speed < 0.02
    loop.run(0.2)
    assert loop.state is State.HOLD


def test_a_policy_killed_amid_long_chunks_stops_the_arm_within_300_ms(tmp_path: Path) -> None:
    loop = Loop(tmp_path, chunk=np.tile([0.5, -0.3, 1.0], (16, 1))).start()
    loop.run(1.0)
    loop.policy = None
    loop.run(0.3)
    assert loop.speed < 0.02


def test_a_killed_safety_process_stops_the_arm_within_300_ms(tmp_path: Path) -> None:
    loop = Loop(tmp_path).start()
    loop.run(1.0)
    assert loop.speed > 0.3
    loop.safety = None
    loop.run(0.3)
    assert loop.speed < 0.02


def freeze(fault: str) -> Callable[[Loop], None]:
    return lambda loop: loop.fault.write(m.json_string({"fault": fault}))


@pytest.mark.parametrize(
    ("fault", "seconds", "states", "reason"),
    [
        (freeze("freeze_cameras"), 0.6, {State.HOLD}, "no chunk"),
        (freeze("freeze_state"), 0.25, {State.HOLD}, "joint states are stale"),
        (freeze("freeze_state"), 0.8, {State.STOPPED}, "no joint states"),
        (freeze("nan"), 0.25, {State.HOLD}, "joint states are stale"),
        (lambda loop: loop.mode.write(m.string("stop")), 0.3, {State.STOPPED}, "operator"),
    ],
)
def test_faults_end_at_rest(tmp_path: Path, fault, seconds: float, states: set, reason: str) -> None:
    loop = Loop(tmp_path).start()
    loop.run(1.0)
    fault(loop)
    loop.run(seconds)
    assert loop.state in states
    assert loop.safety is not None
    assert reason in loop.safety.filter.reason
    loop.run(0.3)
    assert loop.speed < 0.02


def test_lost_doubled_and_corrupt_messages_do_no_harm(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.start()
    for topic in ("/bridge/chunk", "/joint_states"):
        loop.bus.inject(topic, Fault(drop=0.25, duplicate=0.25, cut=0.25))
    loop.run(2.0)
    assert loop.state in (State.RUNNING, State.HOLD)
    for topic in ("/bridge/chunk", "/joint_states"):
        loop.bus.inject(topic, Fault())
    velocity = np.diff(np.array(loop.positions)[:, :2], axis=0) / 0.01
    assert np.abs(velocity).max() < 2.0


def test_arming_needs_exactly_one_robot_and_one_commander(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run(0.2)
    rival = MemoryTransport(loop.bus)
    rival.publisher("/joint_trajectory_controller/joint_trajectory", m.JOINT_TRAJECTORY, COMMAND)
    loop.send("arm")
    assert loop.state is State.INACTIVE
    rival.close()
    loop.send("arm")
    assert loop.state is State.ARMED

    lonely = SafetyNode(tiny_profile(tmp_path), MemoryTransport(MemoryBus()))
    assert "nobody subscribes" in lonely._obstacle()


def test_a_rival_that_appears_later_stops_the_robot(tmp_path: Path) -> None:
    loop = Loop(tmp_path).start()
    loop.run(0.5)
    MemoryTransport(loop.bus).publisher("/joint_trajectory_controller/joint_trajectory", m.JOINT_TRAJECTORY, COMMAND)
    loop.run(1.1)
    assert loop.state is State.STOPPED


def test_estop_over_the_topic(tmp_path: Path) -> None:
    loop = Loop(tmp_path).start()
    loop.run(0.5)
    loop.operator.publisher("/bridge/estop", m.BOOL, COMMAND).write(m.boolean(True))
    loop.run(0.4)
    assert loop.state is State.ESTOP
    assert loop.speed < 0.02
    loop.send("run")
    assert loop.state is State.ESTOP


def test_a_run_that_starts_unseen_starts_from_where_the_arm_stands(tmp_path: Path) -> None:
    """A busy policy process sees RUNNING, then RUNNING again: the targets of the first run are no longer true."""
    loop = Loop(tmp_path).start()
    loop.run(1.0)
    policy, loop.policy = loop.policy, None
    loop.send("stop")
    loop.run(0.3)
    loop.send("reset")
    loop.operator.publisher("/sim/reset", m.STRING, DEFAULT).write(m.json_string({"id": 1}))
    loop.run(0.1)
    loop.send("arm")
    loop.send("run")
    loop.policy, before = policy, len(loop.chunks)
    loop.run(0.15)
    np.testing.assert_allclose(loop.chunks[before].positions[0], [0.15, -0.23, 0.04], atol=2e-3)
    assert loop.chunks[before].frame_id.endswith(":1")
    assert loop.state is State.RUNNING
