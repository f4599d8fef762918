"""Runs a bundle on the graph: joint states and images in, chunks of absolute targets out.

`python -m embodied.robot_bridge.policy_node --bundle DIR --profile NAME`

A chunk goes out for every image of the bundle's first camera that is due (for every joint state, if it sees through
none), stamped with that image's stamp, at the bundle's control rate; its points are due at 1, 2, ... control periods
after the stamp. When an observation is too old nothing goes out: the safety process notices the silence. What actions
mean is in actions.py, what is observed in observations.py.

A bundle that wants several actions of a chunk executed (`execute`) is asked when they are done. Until then the actions
that are left go out with every observation anew, so that silence is noticed as soon as without chunks.
"""

import argparse
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.contracts.errors import BundleError, InputError
from embodied.contracts.protocols import EpisodicPolicy, GoalPolicy, Policy
from embodied.robot_bridge import messages
from embodied.robot_bridge.actions import Targets, check_action, target_names
from embodied.robot_bridge.adapter_servo_twist import axis_limits
from embodied.robot_bridge.node import EventLog, RosTime, Stop, arguments, now_ns, open_transport, run_process
from embodied.robot_bridge.observations import Moment, Observer, check_observations
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, STATE_TOPIC

log = logging.getLogger("policy")

ACTIVE = ("RUNNING", "HOLD")
REPORT_PERIOD = 2.0  # what is missing is said at most this often [s]
_MALFORMED = (InputError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError)


def check_fits(policy: Policy, profile: Profile) -> None:
    """BundleError, naming what is wrong, unless this robot can give what the bundle takes and do what it says."""
    check_action(policy, profile)
    check_observations(policy, profile)
    if isinstance(policy, GoalPolicy) and policy.goal_spec and not policy.goals_given:
        raise BundleError(
            f"The bundle pursues a goal ({', '.join(policy.goal_spec)}) and was given none.\n"
            "Name a .json or .npz file with it: --goal FILE."
        )


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
        self._episodic = policy if isinstance(policy, EpisodicPolicy) else None
        twist = profile.adapter == "servo_twist"
        self._targets = Targets(policy, profile, axis_limits(profile) if twist else profile.read_limits())
        self._names = target_names(profile)
        self._pacer, self._period_ns = Pacer(policy.control_dt), policy.control_dt * 1e9
        self.wake = threading.Event()
        self._observer = Observer(policy, profile, transport, self.wake)
        self._left, self._done = np.empty((0, 0)), 0  # actions of the last chunk still to come, and those executed
        self._latest: dict[str, bytes] = {}
        self._state, self._runs, self._run, self._sequence = "", "", "", 0
        self._shadow = False
        self._now, self._last_stamp, self._reported_at, self._reported = 0, 0, -np.inf, ""
        self.counts = {"chunks": 0, "stale": 0, "failed": 0}
        self.events = EventLog(transport, "policy", stamp)
        self._chunks = transport.publisher(CHUNK_TOPIC, messages.JOINT_TRAJECTORY, COMMAND)
        transport.subscriber(COMMAND_TOPIC, messages.JOINT_TRAJECTORY, DEFAULT, lambda d, _: self._store("/command", d))
        transport.subscriber(STATE_TOPIC, messages.DIAGNOSTIC_ARRAY, LATCHED, lambda d, _: self._store("/state", d))

    def _store(self, key: str, data: bytes) -> None:
        self._latest[key] = data
        if key == "/state":
            self.wake.set()

    def step(self) -> bool:
        """Act if the newest observation is due and the safety process listens. True if a chunk went out."""
        self.wake.clear()
        try:
            self._follow_state()
            if self._state not in ACTIVE:
                return False
            return self._act()
        except _MALFORMED as error:
            self.counts["failed"] += 1
            self._say(f"no chunk: {error}")
            return False

    def look(self) -> None:
        """Say what is missing, though nothing arrives that would wake the policy. Call now and then."""
        if self._state not in ACTIVE:
            try:
                self._observer.ready(self._stamp())
            except _MALFORMED as error:
                self._say(f"malformed: {error}")
        if self._observer.waiting:
            self._say("waiting: " + "; ".join(f"{topic}: {why}" for topic, why in self._observer.waiting.items()))

    def _say(self, text: str) -> None:
        """An event, unless one like it came just now."""
        now, kind = time.monotonic(), text.split(":")[0]
        if kind != self._reported or now - self._reported_at > REPORT_PERIOD:
            self._reported, self._reported_at = kind, now
            self.events.write("policy_waits", text=text)

    def _follow_state(self) -> None:
        data = self._latest.pop("/state", None)
        if data is None:
            return
        values = messages.read_diagnostics(data)
        state, runs = values["state"], values["runs"]
        if runs != self._runs:  # counted, since a busy process may miss the states between two runs
            self._run, self._sequence = secrets.token_hex(4), 0
            self._pacer.restart()
            if self._episodic:
                self._episodic.reset()
        if runs != self._runs or state not in ACTIVE or state != self._state == "RUNNING":
            self._targets.current = None  # the next chunk starts from where the arm is commanded to stand
        self._state, self._runs, self._shadow = state, runs, values.get("shadow") == "true"

    def _act(self) -> bool:
        now = self._stamp()
        if now < self._now - 10**8:  # a simulated clock was set back
            self._observer.forget()
            self._pacer.restart()
            self._targets.current = None
        self._now = now
        stamp = self._observer.ready(now)
        if stamp is None:
            self.counts["stale"] += 1
            return False
        if not self._pacer.due(stamp):
            return False
        self._publish(self._observer.moment(stamp))
        return True

    def _publish(self, moment: Moment) -> None:
        arm, stamp = len(self._profile.joints), moment.stamp_ns
        if self._targets.current is None:
            self._targets.start(self._commanded(moment.position))
            self._left = self._left[:0]
        else:
            passed = max(round((stamp - self._last_stamp) / self._period_ns), 1)
            self._targets.passed(passed)
            self._left, self._done = self._left[passed:], self._done + passed
        self._last_stamp = stamp
        assert self._targets.current is not None
        values = {
            "joint_position": moment.position[:arm],
            "joint_velocity": moment.velocity[:arm],
            "gripper_position": moment.position[arm:],
            "joint_target": self._targets.current,
        }
        observation = {key: values[key].astype(np.float32) for key in self._policy.observation_spec}
        observation |= {f"images/{camera}": image for camera, image in moment.images.items()}
        targets = self._targets.apply(self._plan(observation), moment.position)
        self._sequence += 1
        self.counts["chunks"] += 1
        frame = f"policy:{self._run}:{self._sequence}"
        times = self._policy.control_dt * np.arange(1, len(targets) + 1)
        self._chunks.write(messages.joint_trajectory(messages.Trajectory(stamp, frame, self._names, times, targets)))
        if self._state == "HOLD" or self._shadow:
            self._targets.current = None  # not executed, unless it ends the hold

    def _plan(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """(K, A) from now on: what is left of the chunk while the bundle wants it executed, or else a new one."""
        if self._episodic and len(self._left) and self._done < self._episodic.execute:
            self._episodic.observe(observation)
        else:
            self._left, self._done = np.asarray(self._policy.act(observation)), 0
        return self._left

    def _commanded(self, measured: np.ndarray) -> np.ndarray:
        """Where the safety process holds the robot; or the measured joints, where it commands nothing or in shadow.

        Raises:
            InputError: the tool's axes are known from the safety process only, and it has not said them yet.
        """
        data, axes = self._latest.get("/command"), self._names != self._profile.all_joints
        command = messages.read_joint_trajectory(data) if data is not None else None
        if command is None or (command.frame_id.startswith("shadow:") and not axes):
            if axes:
                raise InputError(f"{COMMAND_TOPIC} has not said where the tool is")
            return measured
        order = [command.names.index(name) for name in self._names]
        return command.positions[0][order]


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    from embodied.policies.bundle import load_policy

    policy = load_policy(options.bundle, goal=options.goal)
    transport = open_transport("policy", options)
    node = PolicyNode(policy, profile, transport, RosTime(transport, options.use_sim_time, profile.topics.clock).now_ns)
    blank = {key: np.zeros(spec.shape, np.float32) for key, spec in policy.observation_spec.items()}
    blank |= {f"images/{key}": np.zeros(spec.shape, np.uint8) for key, spec in policy.image_spec.items()}
    started = time.perf_counter()
    for _ in range(5):  # the first inferences are slow: not while the robot runs
        policy.act(blank)
    inference_s = (time.perf_counter() - started) / 5
    node.events.write(
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
            node.look()
    finally:
        log.info("ended: %s", node.counts)
        transport.close()


if __name__ == "__main__":
    parser = arguments("Run a policy bundle on the ROS 2 graph.")
    parser.add_argument("--bundle", required=True, help="policy bundle folder")
    parser.add_argument("--goal", help=".json or .npz file with what the policy is to reach")
    run_process(main, parser)
