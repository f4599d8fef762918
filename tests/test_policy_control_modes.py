"""What a bundle's actions and cameras mean to the policy process: control modes, chunks, encodings, sizes, silence."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from adapter_rig import GANTRY, AdapterRig, gantry_profile, gantry_scene
from bridge_fixtures import JOINTS, tiny_profile

from embodied.contracts.errors import BundleError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.actions import Targets, check_action
from embodied.robot_bridge.policy_node import PolicyNode, check_fits
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import EVENTS, LATCHED, LATEST, SENSOR_DATA
from embodied.robot_bridge.safety import State
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

SI = ActionSpec((3,), names=JOINTS, unit="rad", control_mode="joint_position")
AXES = ("x", "y", "z", "rx", "ry", "rz")
EYE = "/camera/eye/image_raw"


@dataclasses.dataclass
class Scripted:
    """Gives what `plan` says for the observation."""

    action_spec: ActionSpec
    plan: Any
    observation_spec: dict[str, ArraySpec] = dataclasses.field(
        default_factory=lambda: {"joint_position": ArraySpec((2,))}
    )
    image_spec: dict[str, ArraySpec] = dataclasses.field(default_factory=dict)
    control_dt: float = 0.1

    def __post_init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        self.seen.append(dict(observation))
        return np.atleast_2d(np.asarray(self.plan(observation) if callable(self.plan) else self.plan, np.float64))


def targets_of(folder: Path, spec: ActionSpec, **profile: Any) -> tuple[Targets, Profile]:
    made = tiny_profile(folder, **profile)
    return Targets(Scripted(spec, np.zeros(3)), made, made.read_limits()), made


# ---- control modes


def test_absolute_positions_are_the_targets(tmp_path: Path) -> None:
    targets, _ = targets_of(tmp_path, SI)
    targets.start(np.array([0.0, 0.0, 0.08]))
    rows = targets.apply(np.array([[0.4, -0.3, 0.05], [5.0, 0.0, 0.02]]), np.zeros(3))
    np.testing.assert_allclose(rows, [[0.4, -0.3, 0.05], [1.9, 0.0, 0.02]])  # the joint's end


def test_scaled_positions_are_bounded_as_in_training(tmp_path: Path) -> None:
    targets, _ = targets_of(tmp_path, dataclasses.replace(SI, scale=(0.5, 0.5, 0.08)))
    targets.start(np.zeros(3))
    np.testing.assert_allclose(targets.apply(np.array([[2.0, -0.5, 0.5]]), np.zeros(3)), [[0.5, -0.25, 0.04]])


def test_velocities_are_integrated_over_the_control_period_within_the_lead(tmp_path: Path) -> None:
    targets, _ = targets_of(tmp_path, dataclasses.replace(SI, control_mode="joint_velocity"))
    targets.start(np.array([0.1, 0.0, 0.08]))
    rows = targets.apply(np.array([[1.0, -0.5, 1.0]] * 3), np.array([0.1, 0.0, 0.08]))
    np.testing.assert_allclose(rows[:, 0], [0.2, 0.3, 0.3])  # 0.1 rad per period; 0.2 rad ahead at most
    np.testing.assert_allclose(rows[:, 1], [-0.05, -0.1, -0.15])
    assert rows[-1, 2] == 0.0  # positive closes


def test_a_slow_inference_leaves_as_many_actions_behind_as_periods_went_by(tmp_path: Path) -> None:
    targets, _ = targets_of(tmp_path, dataclasses.replace(SI, control_mode="joint_velocity"))
    targets.start(np.zeros(3))
    rows = targets.apply(np.array([[0.5, 0.0, 1.0]] * 4), np.zeros(3))
    for steps, row in ((0, 0), (1, 0), (3, 2), (9, 3)):
        targets.passed(steps)
        np.testing.assert_array_equal(targets.current, rows[row])


@pytest.mark.parametrize(
    ("spec", "profile", "message"),
    [
        (dataclasses.replace(SI, control_mode="raw"), {}, "'raw': the bridge cannot know"),
        (dataclasses.replace(SI, control_mode="joint_positions"), {}, "Did you mean 'joint_position'"),
        (dataclasses.replace(SI, control_mode="end_effector_delta"), {}, "servo_twist"),
        (dataclasses.replace(SI, shape=(2,), names=JOINTS[:2]), {}, r"shape \(2,\)"),
        (dataclasses.replace(SI, scale=(0.1,)), {}, "scales"),
    ],
)
def test_actions_that_the_robot_cannot_do_are_refused(tmp_path: Path, spec, profile: dict, message: str) -> None:
    with pytest.raises(BundleError, match=message) as refused:
        check_action(Scripted(spec, np.zeros(3)), tiny_profile(tmp_path, **profile))
    assert str(refused.value).count("\n") <= 2


class Loop(AdapterRig):
    """The rig with a policy process in it."""

    def __init__(self, folder: Path, policy: Scripted, profile: Profile | None = None, **node: Any) -> None:
        super().__init__(folder, profile, **node)
        self.policy = PolicyNode(policy, self.profile, self.transport("policy"), self.clock.stamp)
        self.chunks: list[m.Trajectory] = []
        self.operator.subscriber(
            "/bridge/chunk",
            m.JOINT_TRAJECTORY,
            LATEST,
            lambda d, _: self.chunks.append(m.read_joint_trajectory(d)),
        )
        self.before_step = lambda: self.policy.wake.is_set() and self.policy.step()


@pytest.mark.parametrize("mode", ["joint_position", "joint_velocity"])
def test_the_arm_does_what_the_actions_say(tmp_path: Path, mode: str) -> None:
    if mode == "joint_position":
        plan = lambda seen: np.append(seen["joint_position"] + [0.06, -0.04], 0.05)  # noqa: E731
    else:
        plan = np.array([[0.5, -0.3, -1.0]])
    loop = Loop(tmp_path, Scripted(dataclasses.replace(SI, control_mode=mode), plan))
    loop.start()
    start = loop.path[-1].copy()
    loop.run(1.0)
    assert loop.state is State.RUNNING
    assert 9 <= len(loop.chunks) <= 11
    moved = loop.path[-1] - start
    assert moved[0] > 0.25
    assert moved[1] < -0.15
    assert loop.safety is not None
    assert loop.safety.filter.counts["rejected"] == 0


def test_chunks_carry_the_observations_stamp_and_a_time_per_point(tmp_path: Path) -> None:
    policy = Scripted(dataclasses.replace(SI, control_mode="joint_velocity"), np.tile([0.3, 0.0, -1.0], (5, 1)))
    policy.control_dt = 0.05
    loop = Loop(tmp_path, policy)
    loop.start().run(0.5)
    chunk = loop.chunks[-1]
    np.testing.assert_allclose(chunk.times, 0.05 * np.arange(1, 6))
    assert 0 <= loop.clock.stamp() - chunk.stamp_ns <= 60_000_000
    np.testing.assert_allclose(np.diff(chunk.positions[:, 0]), 0.015, atol=1e-9)


def test_end_effector_deltas_move_the_tool(tmp_path: Path) -> None:
    gantry_scene(tmp_path)
    scale = (0.02, 0.02, 0.02, 0.1, 0.1, 0.1)
    spec = ActionSpec((6,), names=AXES, control_mode="end_effector_delta", scale=scale)
    policy = Scripted(spec, np.array([[0.5, 0.0, -0.5, 0.0, 0.0, 0.4]]))
    policy.observation_spec = {"joint_position": ArraySpec((len(GANTRY),))}
    loop = Loop(tmp_path, policy, gantry_profile(tmp_path))
    loop.start()
    start = loop.path[-1].copy()
    loop.run(2.0)
    assert loop.state is State.RUNNING
    moved = loop.path[-1] - start
    np.testing.assert_allclose(moved[:3], [0.2, 0.0, -0.2], atol=0.03)
    assert moved[5] == pytest.approx(0.8, abs=0.1)
    assert loop.chunks[-1].names == AXES


def test_a_bundle_of_joints_does_not_drive_a_twist(tmp_path: Path) -> None:
    gantry_scene(tmp_path)
    spec = ActionSpec((6,), names=GANTRY, control_mode="joint_position_delta", scale=(0.1,) * 6)
    with pytest.raises(BundleError, match="adapter servo_twist"):
        check_fits(Scripted(spec, np.zeros(6)), gantry_profile(tmp_path))


# ---- cameras


def seeing(shape: tuple[int, ...] = (64, 64, 3)) -> Scripted:
    spec = dataclasses.replace(SI, control_mode="joint_velocity")
    return Scripted(spec, np.array([[0.2, 0.0, -1.0]]), image_spec={"eye": ArraySpec(shape, "uint8")})


def test_a_camera_of_another_size_is_refused_with_what_to_do(tmp_path: Path) -> None:
    loop = Loop(tmp_path, seeing((32, 48, 3)))
    loop.start().run(0.5)
    assert not loop.chunks
    said = [event["text"] for event in loop.events if event["event"] == "policy_waits"]
    assert any("64x64" in text and "48x32" in text and "policy.resize_images" in text for text in said)
    assert loop.policy.counts["failed"] > 0


def test_a_camera_of_another_size_is_resized_where_the_profile_says_so(tmp_path: Path) -> None:
    profile = tiny_profile(tmp_path, policy={"image_timeout": 0.3, "resize_images": True})
    policy = seeing((32, 48, 3))
    loop = Loop(tmp_path, policy, profile)
    loop.start().run(0.5)
    assert len(loop.chunks) >= 4
    image = policy.seen[-1]["images/eye"]
    assert image.shape == (32, 48, 3)
    assert image.dtype == np.uint8


def test_compressed_images_and_other_encodings_are_read(tmp_path: Path) -> None:
    topics = {"cameras": {"eye": "/camera/eye/image_raw/compressed"}}
    policy = seeing()
    loop = Loop(tmp_path, policy, tiny_profile(tmp_path, topics=topics))
    loop.start().run(0.4)
    assert len(loop.chunks) >= 3
    assert policy.seen[-1]["images/eye"].shape == (64, 64, 3)


# ---- what is missing is named


def test_what_nobody_publishes_is_named(tmp_path: Path) -> None:
    bundle = seeing()
    bundle.image_spec["side"] = ArraySpec((64, 64, 3), "uint8")
    topics = {"cameras": {"eye": EYE, "side": "/camera/side/image_raw"}}
    loop = Loop(tmp_path, bundle, tiny_profile(tmp_path, topics=topics))
    said: list[str] = []
    loop.operator.subscriber("/bridge/event", m.STRING, EVENTS, lambda d, _: said.append(m.read_string(d)))
    loop.run(0.3)
    loop.policy.look()
    assert any("/camera/side/image_raw: no image came" in text for text in said)
    assert not any(f"{EYE}: " in text for text in said)
    loop.send("arm")
    loop.send("run")
    loop.run(0.3)
    assert not loop.chunks


def test_a_second_camera_that_freezes_silences_the_policy(tmp_path: Path) -> None:
    bundle = seeing()
    bundle.image_spec["side"] = ArraySpec((64, 64, 3), "uint8")
    topics = {"cameras": {"eye": EYE, "side": "/camera/side/image_raw"}}
    loop = Loop(tmp_path, bundle, tiny_profile(tmp_path, topics=topics))
    side = loop.operator.publisher("/camera/side/image_raw", m.IMAGE, SENSOR_DATA)
    loop.run(0.3)
    side.write(m.image(loop.clock.stamp(), "side", np.zeros((64, 64, 3), np.uint8)))
    loop.send("arm")
    loop.send("run")
    loop.run(0.15)
    sent = len(loop.chunks)
    assert sent >= 1
    loop.run(0.5)
    assert len(loop.chunks) <= sent + 2  # image_timeout is 0.3 s
    assert "s old" in loop.policy._observer.waiting["/camera/side/image_raw"]
    assert loop.policy.counts["stale"] > 0


def test_a_joint_that_nobody_states_is_named(tmp_path: Path) -> None:
    gripper = {"joint": "claw", "open": 0.08, "closed": 0.0}
    limits = {name: {"position": [-1.9, 1.9], "velocity": 2.0, "acceleration": 12.0, "jerk": 5000.0, "max_step": 0.3}
              for name in ("shoulder", "elbow", "claw")}  # fmt: skip
    profile = tiny_profile(tmp_path, gripper=gripper, limits=limits)
    policy = Scripted(dataclasses.replace(SI, names=("shoulder", "elbow", "claw")), np.zeros(3))
    bus = MemoryBus()
    node = PolicyNode(policy, profile, MemoryTransport(bus), lambda: 10**18)
    other = MemoryTransport(bus)
    states = other.publisher("/joint_states", m.JOINT_STATE, SENSOR_DATA)
    states.write(m.joint_state(10**18, ("shoulder", "elbow"), np.zeros(2), np.zeros(2)))
    node.look()
    assert node._observer.waiting == {"/joint_states": "no position of claw came"}


def test_malformed_messages_never_raise_out_of_a_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path, seeing())
    loop.start().run(0.3)
    rng = np.random.default_rng(0)
    kinds = {
        EYE: (m.IMAGE, m.image(loop.clock.stamp(), "c", np.zeros((16, 16, 3), np.uint8))),
        "/joint_states": (m.JOINT_STATE, m.joint_state(loop.clock.stamp(), JOINTS, np.zeros(3), np.zeros(3))),
        "/bridge/state": (m.DIAGNOSTIC_ARRAY, m.diagnostics(1, "safety", 0, "", {"state": "RUNNING", "runs": "7"})),
        "/bridge/command": (m.JOINT_TRAJECTORY, loop.sent[-1]),
    }
    for topic, (kind, valid) in kinds.items():
        writer = loop.operator.publisher(topic, kind, LATCHED)
        for k in range(2000):
            data = bytearray(valid)
            if k % 3 == 0:
                data = bytearray(rng.bytes(int(rng.integers(0, 200))))
            elif k % 3 == 1:
                for place in rng.integers(0, min(len(data), 200), 3):
                    data[place] = int(rng.integers(0, 256))
            else:
                data = data[: int(rng.integers(0, len(data)))]
            writer.write(bytes(data))
            loop.policy.step()
        loop.policy.look()
    assert loop.policy.counts["failed"] > 100


def test_a_clock_that_was_set_back_does_not_silence_the_policy(tmp_path: Path) -> None:
    policy = Scripted(dataclasses.replace(SI, control_mode="joint_velocity"), np.array([[0.2, 0.0, -1.0]]))
    loop = Loop(tmp_path, policy)
    loop.start().run(0.5)
    before = len(loop.chunks)
    stamp = loop.clock.stamp
    loop.clock.stamp = lambda: stamp() - 50 * 10**9  # type: ignore[method-assign]
    loop.policy._stamp = loop.clock.stamp
    loop.robot._system_stamp = loop.clock.stamp  # type: ignore[assignment]
    loop.safety._stamp = loop.clock.stamp  # type: ignore[union-attr]
    loop.run(0.5)
    assert len(loop.chunks) >= before + 4


def test_in_shadow_every_chunk_starts_at_the_measured_joints(tmp_path: Path) -> None:
    spec = ActionSpec((3,), names=JOINTS, control_mode="joint_position_delta", scale=(0.1, 0.1, 0.04))
    loop = Loop(tmp_path, Scripted(spec, np.array([[0.6, -0.4, -1.0]])), shadow=True)
    loop.start().run(2.0)
    assert loop.state is State.RUNNING
    assert len(loop.chunks) >= 18
    start = loop.path[-1]
    for chunk in loop.chunks:
        np.testing.assert_allclose(chunk.positions[0][:2] - start[:2], [0.06, -0.04], atol=2e-3)
    np.testing.assert_allclose(loop.path[0], start, atol=2e-3)
