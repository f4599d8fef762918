"""Runs a bundle on the graph: joint states and images in, chunks of absolute joint targets out.

`python -m embodied.robot_bridge.policy_node --bundle DIR --profile NAME`

A chunk goes out for every image of the bundle's first camera that is due (for every joint state, if it sees through
none), stamped with that image's stamp, at the bundle's control rate. When an observation is too old nothing goes out:
the safety process notices the silence. Action 1.0 means what it meant in training: `joint_position_delta` adds
scale * action to the last joint target.
"""

import argparse
import collections
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.contracts.errors import BundleError, InputError, suggest
from embodied.contracts.protocols import Policy
from embodied.robot_bridge import messages
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.node import EventLog, Stop, arguments, now_ns, open_transport, run_process
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED, LATEST
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, STATE_TOPIC

log = logging.getLogger("policy")

OBSERVATIONS = ("joint_position", "joint_velocity", "gripper_position", "joint_target")
ACTIVE = ("RUNNING", "HOLD")


def check_fits(policy: Policy, profile: Profile) -> None:
    """BundleError, naming what is wrong, unless this robot can give what the bundle takes and do what it says."""
    action = policy.action_spec
    if action.control_mode != "joint_position_delta":
        raise BundleError(
            f"The bundle's actions are '{action.control_mode}'; the bridge drives 'joint_position_delta' only."
        )
    if tuple(action.names) != profile.all_joints:
        raise BundleError(
            f"The bundle's action is {', '.join(action.names) or '(unnamed)'};\n"
            f"profile {profile.name} has {', '.join(profile.all_joints)}."
        )
    arm, every = len(profile.joints), len(profile.all_joints)
    sizes = {"joint_position": (arm,), "joint_velocity": (arm,), "joint_target": (every,)}
    sizes |= {"gripper_position": (1,)} if profile.gripper else {}
    for key, spec in policy.observation_spec.items():
        if key not in sizes:
            raise BundleError(f"The bundle observes '{key}', which no robot measures here.{suggest(key, sizes)}")
        if tuple(spec.shape) != sizes[key]:
            raise BundleError(
                f"The bundle's '{key}' has shape {spec.shape}; profile {profile.name} gives {sizes[key]}."
            )
    for camera in policy.image_spec:
        if camera not in profile.topics.cameras:
            raise BundleError(
                f"The bundle sees through camera '{camera}'.{suggest(camera, profile.topics.cameras)}\n"
                f"Add it under topics.cameras of profile {profile.name}."
            )


class Targets:
    """Joint targets from `joint_position_delta` actions, with the arithmetic of the simulated environment.

    Attributes:
        current: (J,) last target, or None before `start`.
    """

    def __init__(self, policy: Policy, profile: Profile, limits: Limits) -> None:
        self._scale = np.asarray(policy.action_spec.scale, np.float64)
        self._arm, self._gripper = len(profile.joints), profile.gripper
        self._limits, self._max_lead = limits, profile.policy.max_lead
        self.current: np.ndarray | None = None

    def start(self, position: np.ndarray) -> None:
        self.current = np.array(position, np.float64)

    def apply(self, actions: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Targets (K, J) after each of the actions (K, J); the first becomes `current`.

        The arm's stay within `max_lead` of the measured joints, so that nothing winds up against a contact. The
        gripper's target moves towards open (action <= 0) or closed (action > 0) by at most its scale per step.
        """
        assert self.current is not None
        target, arm, rows = self.current, self._arm, []
        for action in np.clip(np.asarray(actions, np.float64), -1.0, 1.0):
            wanted = target + self._scale * action
            wanted[:arm] = np.clip(wanted[:arm], measured[:arm] - self._max_lead, measured[:arm] + self._max_lead)
            if self._gripper:
                goal = self._gripper.closed if action[arm] > 0 else self._gripper.open
                wanted[arm] = target[arm] + np.clip(goal - target[arm], -self._scale[arm], self._scale[arm])
            target = self._limits.clip_position(wanted)
            rows.append(target)
        self.current = rows[0]
        return np.stack(rows)


class Pacer:
    """Which of a stream of stamps are due at a period, whatever the stream's own rate. Stamps in ns, period in s."""

    def __init__(self, period: float) -> None:
        self._period, self._due = round(period * 1e9), 0

    def restart(self) -> None:
        self._due = 0

    def due(self, stamp_ns: int) -> bool:
        """True for the first sample at most a quarter period early; keeps the average rate."""
        if stamp_ns < self._due - self._period // 4:
            return False
        on_grid = abs(stamp_ns - self._due) <= self._period // 2
        self._due = (self._due if on_grid else stamp_ns) + self._period
        return True


class PolicyNode:
    """The policy on a transport. `step` is called whenever `wake` is set; it never waits."""

    def __init__(
        self,
        policy: Policy,
        profile: Profile,
        transport: Any,
        stamp: Callable[[], int] = now_ns,
    ) -> None:
        check_fits(policy, profile)
        self._policy, self._profile, self._stamp = policy, profile, stamp
        self._targets = Targets(policy, profile, profile.read_limits())
        self._pacer = Pacer(policy.control_dt)
        self._times = policy.control_dt * np.arange(1, 1 + 64)
        self.wake = threading.Event()
        self._joints: collections.deque[bytes] = collections.deque(maxlen=64)
        self._latest: dict[str, bytes] = {}
        self._state, self._runs, self._run, self._sequence = "", "", "", 0
        self.counts = {"chunks": 0, "stale": 0, "failed": 0}
        self._chunks = transport.publisher(CHUNK_TOPIC, messages.JOINT_TRAJECTORY, COMMAND)
        self._trigger = next(iter(policy.image_spec), "")
        for camera in policy.image_spec:
            topic = profile.topics.cameras[camera]
            transport.subscriber(topic, messages.IMAGE, LATEST, lambda data, _, key=camera: self._store(key, data))
        transport.subscriber(profile.topics.joint_states, messages.JOINT_STATE, LATEST, self._store_joints)
        transport.subscriber(COMMAND_TOPIC, messages.JOINT_TRAJECTORY, DEFAULT, lambda d, _: self._store("/command", d))
        transport.subscriber(STATE_TOPIC, messages.DIAGNOSTIC_ARRAY, LATCHED, lambda d, _: self._store("/state", d))

    def _store(self, key: str, data: bytes) -> None:
        self._latest[key] = data
        if key in (self._trigger, "/state"):
            self.wake.set()

    def _store_joints(self, data: bytes, _: int) -> None:
        self._joints.append(data)
        if not self._trigger:
            self.wake.set()

    def step(self) -> bool:
        """Act if the newest observation is due and the safety process listens. True if a chunk went out."""
        self.wake.clear()
        self._follow_state()
        if self._state not in ACTIVE:
            return False
        try:
            return self._act()
        except InputError as error:
            self.counts["failed"] += 1
            log.warning("no chunk: %s", error)
            return False

    def _follow_state(self) -> None:
        data = self._latest.pop("/state", None)
        if data is None:
            return
        values = messages.read_diagnostics(data)
        state, runs = values["state"], values["runs"]
        if runs != self._runs:  # counted, since a busy process may miss the states between two runs
            self._run, self._sequence = secrets.token_hex(4), 0
            self._pacer.restart()
        if runs != self._runs or state not in ACTIVE or state != self._state == "RUNNING":
            self._targets.current = None  # the next chunk starts from where the arm is commanded to stand
        self._state, self._runs = state, runs

    def _act(self) -> bool:
        images = {camera: messages.read_image(self._latest[camera]) for camera in self._policy.image_spec
                  if camera in self._latest}  # fmt: skip
        if len(images) < len(self._policy.image_spec):
            return False
        now = self._stamp()
        stamp = images[self._trigger][0] if self._trigger else now
        joints = self._joint_sample(stamp)
        if joints is None:
            return False
        stamp = stamp if self._trigger else joints.stamp_ns
        limits = self._profile.policy
        oldest = min((image[0] for image in images.values()), default=now)
        newest = stamp if self._trigger else now
        if now - oldest > limits.image_timeout * 1e9 or newest - joints.stamp_ns > limits.joint_timeout * 1e9:
            self.counts["stale"] += 1
            return False
        if not self._pacer.due(stamp):
            return False
        self._publish(stamp, joints, {camera: image[1] for camera, image in images.items()})
        return True

    def _joint_sample(self, stamp: int) -> messages.JointSample | None:
        """The newest joint state that is not after the image."""
        for data in reversed(list(self._joints)):
            sample = messages.read_joint_state(data)
            if sample.stamp_ns <= stamp:
                return sample
        return None

    def _publish(self, stamp: int, joints: messages.JointSample, images: dict[str, np.ndarray]) -> None:
        names, arm = self._profile.all_joints, len(self._profile.joints)
        position, velocity = joints.select(names)
        if not np.isfinite(position).all():
            raise InputError(f"joint states hold {position}")
        if self._targets.current is None:
            self._targets.start(self._commanded(position))
        assert self._targets.current is not None
        values = {
            "joint_position": position[:arm],
            "joint_velocity": velocity[:arm],
            "gripper_position": position[arm:],
            "joint_target": self._targets.current,
        }
        observation = {key: values[key].astype(np.float32) for key in self._policy.observation_spec}
        observation |= {f"images/{camera}": np.array(image) for camera, image in images.items()}
        targets = self._targets.apply(self._policy.act(observation), position)
        self._sequence += 1
        self.counts["chunks"] += 1
        frame = f"policy:{self._run}:{self._sequence}"
        times = self._times[: len(targets)]
        self._chunks.write(messages.joint_trajectory(messages.Trajectory(stamp, frame, names, times, targets)))
        if self._state == "HOLD":
            self._targets.current = None  # not executed, unless it ends the hold

    def _commanded(self, measured: np.ndarray) -> np.ndarray:
        """Where the safety process holds the robot, or the measured joints before its first command."""
        data = self._latest.get("/command")
        if data is None:
            return measured
        command = messages.read_joint_trajectory(data)
        order = [command.names.index(name) for name in self._profile.all_joints]
        return command.positions[0][order]


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    from embodied.policies.bundle import load_policy

    policy = load_policy(options.bundle)
    transport = open_transport("policy", options)
    node = PolicyNode(policy, profile, transport)
    blank = {key: np.zeros(spec.shape, np.float32) for key, spec in policy.observation_spec.items()}
    blank |= {f"images/{key}": np.zeros(spec.shape, np.uint8) for key, spec in policy.image_spec.items()}
    started = time.perf_counter()
    for _ in range(5):  # the first inferences are slow: not while the robot runs
        policy.act(blank)
    events = EventLog(transport, "policy")
    inference_s = (time.perf_counter() - started) / 5
    events.write(
        "policy_ready",
        bundle=str(options.bundle),
        profile=profile.fingerprint,
        inference_s=inference_s,
        contract=policy.contract.to_json(),
    )
    try:
        while not stop.is_set():
            if node.wake.wait(0.1):
                node.step()
    finally:
        log.info("ended: %s", node.counts)
        transport.close()


if __name__ == "__main__":
    parser = arguments("Run a policy bundle on the ROS 2 graph.")
    parser.add_argument("--bundle", required=True, help="policy bundle folder")
    run_process(main, parser)
