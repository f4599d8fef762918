"""A MuJoCo robot that looks like a ros2_control arm on the ROS 2 graph; `python -m embodied.robot_bridge.mujoco_robot`.

It loads a scene folder (`scene.xml`, `scene.json`: every key is described in robot_bridge/scene.py) and then knows
nothing but topics, so that a real arm takes its place by a profile with other names:

    in   <topics.command>        as the profile's adapter says: JointTrajectory, Float64MultiArray, JointJog or
                                 TwistStamped, accepted or refused as the real controller does (*_controller.py)
    in   <gripper.topic>         Float64MultiArray, or a GripperCommand action, unless the gripper is one of the joints
    out  <topics.joint_states>   JointState        arm joints, then the gripper's; reliable
    out  <topics.cameras.NAME>   Image rgb8, or CompressedImage on .../compressed, and camera_info beside it; sensor
                                 data, drawn only while somebody subscribes
    out  <controller>/controller_state  JointTrajectoryControllerState, with the adapter jtc; 50 Hz
    out  /tf, /tf_static         tool and cameras in the base, base in the world
    out  /robot_description      String, latched   URDF or MJCF
    out  <topics.clock>          Clock             with --use-sim-time

And what no real arm has, for tests:

    out  /sim/pose/NAME          PoseStamped       ground truth of the scene's bodies and sites, 50 Hz
    in   /sim/reset              String (JSON)     {"id": any, "qpos": [...]*, "qvel": [...]*, "ctrl": [...]*}
    in   /sim/fault              String (JSON)     robot_bridge/simulated_faults.py
    out  /sim/status             String (JSON)     {"reset": id of the last reset, "fault", "accepted", ...}; latched

A JointState and an Image of the same moment carry the same stamp: that of the simulated moment, not of the sending.
`--log` writes every control step to a file (robot_bridge/robot_log.py).
"""

import argparse
import collections
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.node import Rate, Stop, arguments, now_ns, open_transport, run_process
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT
from embodied.robot_bridge.robot_controllers import mount_controllers
from embodied.robot_bridge.robot_log import RobotLog
from embodied.robot_bridge.robot_options import FAULT_TOPIC, RESET_TOPIC, RobotOptions, StateStyle
from embodied.robot_bridge.robot_outputs import RobotOutputs
from embodied.robot_bridge.scene import SceneState, load_scene
from embodied.robot_bridge.scheduling import add_priority, raise_priority
from embodied.robot_bridge.simulated_arm import CONTROL_DT, SimulatedArm, use_software_gl
from embodied.robot_bridge.simulated_faults import FAULTS, Fault, read_fault

log = logging.getLogger("mujoco_robot")

SIM_EPOCH = 1.0  # simulated time starts here: a stamp of 0 means "now" to a trajectory controller [s]
_MAX_BEHIND = 0.25  # more lost time than this is skipped, not simulated in a burst [s]


class MujocoRobot:
    """The arm on a transport. Call `tick` at `tick_hz`: every tick sends one joint state.

    Args:
        clock: monotonic seconds; physics keeps up with it.
        stamp: the system's ROS time [ns].

    Attributes:
        counts: commands accepted and rejected, seconds of physics skipped.
    """

    def __init__(
        self,
        arm: SimulatedArm,
        profile: Profile,
        transport: Any,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], int] = now_ns,
        options: RobotOptions | None = None,
    ) -> None:
        options = options or RobotOptions()
        self.arm, self._clock, self._system_stamp = arm, clock, stamp
        self._use_sim_time, self._factor = options.use_sim_time, options.real_time_factor
        self._state_rate = options.state_rate or profile.simulation.joint_states_hz
        self._physics, self._anchor = SIM_EPOCH, (clock(), SIM_EPOCH)  # monotonic and physics clock, at one moment
        self._fault, self._frozen_stamp = Fault(), 0
        self.counts = {"accepted": 0, "rejected": 0, "skipped_s": 0.0}
        self._last_reset: Any = None
        self.mounted = mount_controllers(
            profile, arm, transport, lambda: self.stamp, options.interpolate_from_desired_state
        )
        self._outputs = RobotOutputs(arm, profile, transport, self.mounted, options)
        self._log = RobotLog(options.log, arm.names, arm.model.nu, tuple(FAULTS)) if options.log else None
        self._inbox: collections.deque[tuple[str, bytes, int]] = collections.deque()
        self._late: list[tuple[str, bytes, int]] = []
        self._random = np.random.default_rng(options.seed)
        commands = [(m.topic, m.message_type, COMMAND) for m in self.mounted if m.topic]
        self._commands = {mounted.topic: mounted for mounted in self.mounted if mounted.topic}
        inputs = [(RESET_TOPIC, messages.STRING, DEFAULT), (FAULT_TOPIC, messages.STRING, DEFAULT)]
        for topic, kind, qos in commands + inputs:
            transport.subscriber(topic, kind, qos, lambda data, at, topic=topic: self._inbox.append((topic, data, at)))
        self._declare_parameters(transport, options)
        self._publish_status()
        self._anchor = (clock(), SIM_EPOCH)  # opening the cameras took its time

    # ---- time

    @property
    def tick_hz(self) -> float:
        """Ticks per second of wall clock."""
        return self._state_rate * self._factor

    @property
    def stamp(self) -> int:
        """The physics' present on the clock of stamps [ns]."""
        if self._fault.name == "clock_stop":
            return self._frozen_stamp
        jump = round(self._fault.values["seconds"] * 1e9) if self._fault.name == "clock_jump" else 0
        if self._use_sim_time:
            return round(self._physics * 1e9) + jump
        return self._system_stamp() - round((self._clock() - self._wall) * 1e9) + jump

    @property
    def _wall(self) -> float:
        """The physics' present on the monotonic clock [s]."""
        return self._anchor[0] + (self._physics - self._anchor[1]) / self._factor

    def _catch_up(self, wall: float) -> None:
        """Simulate until the monotonic time `wall`."""
        target = self._anchor[1] + (wall - self._anchor[0]) * self._factor
        if target - self._physics > _MAX_BEHIND * max(1.0, self._factor):
            self.counts["skipped_s"] += target - self._physics
            self._anchor, target = (wall, self._physics), self._physics
        while self._physics + self.arm.control_dt <= target:
            self._step()

    def _step(self) -> None:
        """One control step."""
        if self._physics >= self._fault.until:
            self._set_fault(Fault())
        position, velocity = self.arm.joint_state()
        dt, stamp, target = self.arm.control_dt, self.stamp, self.arm.target.copy()
        for mounted in self.mounted:
            moment = mounted.moment(self._physics, stamp, dt, position, velocity)
            mounted.reference = mounted.controller.update(moment)
            target[mounted.columns] = mounted.reference.position
        self.arm.advance(target)
        self._physics += dt
        if self._log:
            position, velocity = self.arm.joint_state()
            self._log.write(
                self._fault.name,
                time=self._physics,
                wall=self._wall,
                late=self._clock() - self._wall,
                stamp_ns=self.stamp,
                position=position,
                velocity=velocity,
                command=target,
                ctrl=self.arm.data.ctrl,
                accepted=self.counts["accepted"],
                contacts=min(self.arm.data.ncon, 65535),
            )

    # ---- what arrives

    def tick(self) -> None:
        """Take commands, let physics catch up with the clock, publish what is due."""
        for topic, data, received_ns in self._arrived():
            # Physics first runs to the moment of arrival, so that a command counts from then and not from a tick.
            self._catch_up(received_ns * 1e-9)
            try:
                self._receive(topic, data)
            except InputError as error:
                self._refuse(topic, str(error))
        self._catch_up(self._clock())
        if self._outputs.publish(self._physics, self.stamp, self._fault, self._use_sim_time):
            self._publish_status()

    def _arrived(self) -> list[tuple[str, bytes, int]]:
        """Messages that count by now, oldest first; a fault may lose or delay commands."""
        new = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for index, (topic, data, received_ns) in enumerate(new):
            if topic in self._commands and self._fault.is_on("delay", of="command"):
                new[index] = (topic, data, received_ns + round(self._fault.values["seconds"] * 1e9))
        if self._fault.is_on("drop", of="command"):
            lost = self._fault.values["probability"]
            new = [item for item in new if item[0] not in self._commands or self._random.random() >= lost]
        waiting = sorted(self._late + new, key=lambda item: item[2])
        now = self._clock() * 1e9
        self._late = [item for item in waiting if item[2] > now]
        return [item for item in waiting if item[2] <= now]

    def _receive(self, topic: str, data: bytes) -> None:
        if topic == RESET_TOPIC:
            self._reset(messages.read_json(data))
        elif topic == FAULT_TOPIC:
            self._set_fault(read_fault(messages.read_json(data), self._physics, self.arm.names))
        elif self._fault.name == "reject_commands":
            self._refuse(topic, "a fault was asked for")
        else:
            mounted = self._commands[topic]
            moment = mounted.moment(self._physics, self.stamp, self.arm.control_dt, *self.arm.joint_state())
            if reason := mounted.controller.receive(data, moment):
                self._refuse(topic, reason)
            else:
                self.counts["accepted"] += 1

    def _refuse(self, topic: str, reason: str) -> None:
        self.counts["rejected"] += 1
        if self.counts["rejected"] <= 20 or self.counts["rejected"] % 100 == 0:
            log.warning("%s: refused: %s", topic, reason)

    def _reset(self, wish: dict[str, Any]) -> None:
        initial = self.arm.scene.initial
        qpos = tuple(wish.get("qpos", initial.qpos))
        ctrl = wish.get("ctrl", () if "qpos" in wish else initial.ctrl)
        self.arm.reset(SceneState(qpos, tuple(wish.get("qvel", ())), tuple(ctrl)))
        for mounted in self.mounted:
            mounted.hold(self.arm.target)
        if self._fault.name == "contact":  # a reset lets go of the arm
            self._fault = Fault()
        self._last_reset = wish.get("id")
        self._publish_status()

    def _set_fault(self, fault: Fault) -> None:
        if fault.name == "clock_stop":
            self._frozen_stamp = self.stamp
        self.arm.release()
        if fault.name == "contact" and fault.values["torque"] is not None:
            for joint in [fault.values["joint"]] if fault.values["joint"] else self.arm.scene.joints:
                self.arm.push(joint, float(fault.values["torque"]))
        elif fault.name == "contact":
            self.arm.lock(fault.values["joint"])
        log.info("fault: %s %s", fault.name, dict(fault.values))
        self._fault = fault
        self._publish_status()

    # ---- the rest

    def _declare_parameters(self, transport: Any, options: RobotOptions) -> None:
        values = {
            "use_sim_time": self._use_sim_time,
            "real_time_factor": float(self._factor),
            "state_rate": float(self._state_rate),
            "seed": options.seed,
        }
        if transport.services:
            transport.parameters(values, self._on_parameter)

    def _on_parameter(self, name: str, value: Any) -> str:
        """Parameters that may change while it runs; returns why one may not."""
        if name == "seed":
            self._random = np.random.default_rng(int(value))
            return ""
        if name not in ("real_time_factor", "state_rate"):
            return f"{name} is fixed once the robot runs; start it with another value"
        if not (math.isfinite(value) and 0.01 <= value <= 2000):
            return f"{name} must lie between 0.01 and 2000"
        if name == "state_rate":
            self._state_rate = float(value)
        else:
            self._anchor, self._factor = (self._wall, self._physics), float(value)
        return ""

    def _publish_status(self) -> None:
        about = {"reset": self._last_reset, "fault": self._fault.name, "about": self.arm.scene.about}
        self._outputs.status({**about, "time": self._physics, "pictures_skipped": self._outputs.skipped, **self.counts})

    def close(self) -> None:
        """Write what is left of the log, give the drawing contexts back."""
        self._outputs.close()
        if self._log:
            self._log.close()


def check_joints(profile: Profile, arm: SimulatedArm, where: str) -> None:
    """ConfigError unless the scene has the profile's joints."""
    if set(arm.names) != set(profile.all_joints):
        raise ConfigError(
            f"profile {profile.name} has joints {', '.join(profile.all_joints)};\n"
            f"the scene {where} has {', '.join(arm.names)}."
        )


def read_options(options: argparse.Namespace) -> RobotOptions:
    """RobotOptions from the flags of `parser`. ConfigError for a rate that is none."""
    for name in ("real_time_factor", "state_rate", "camera_rate"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and 0.01 <= value <= 2000):
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must lie between 0.01 and 2000.")
    fields = ("real_time_factor", "state_rate", "camera_rate", "seed", "log")
    style = StateStyle(**{name.replace("-", "_"): True for name in options.state_style})
    return RobotOptions(
        use_sim_time=options.use_sim_time,
        style=style,
        interpolate_from_desired_state=not options.interpolate_from_measured_state,
        camera_thread=True,
        **{name: getattr(options, name) for name in fields},
    )


def parser() -> argparse.ArgumentParser:
    """The flags of this process."""
    flags = arguments("A MuJoCo robot on the ROS 2 graph.")
    styles = [field.name.replace("_", "-") for field in dataclasses.fields(StateStyle)]
    flags.add_argument("--scene", required=True, help="folder with scene.xml and scene.json")
    flags.add_argument("--real-time-factor", type=float, default=1.0, help="seconds of physics per second")
    flags.add_argument("--state-rate", type=float, default=None, help="joint states per second of physics")
    flags.add_argument("--camera-rate", type=float, default=None, help="pictures per second of physics")
    flags.add_argument("--seed", type=int, default=0, help="of faults and of shuffled joints")
    flags.add_argument("--state-style", nargs="*", default=[], choices=styles, help="how joint states are filled")
    flags.add_argument(
        "--interpolate-from-measured-state",
        action="store_true",
        help="a new trajectory starts where the arm is, not where it should be: joint_trajectory_controller's default",
    )
    flags.add_argument("--log", type=Path, default=None, help="file that gets every control step")
    add_priority(flags)  # a real arm's controller is not held up by what else a computer does
    return flags


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    settings = read_options(options)
    rate_hz = settings.state_rate or profile.simulation.joint_states_hz
    arm = SimulatedArm(load_scene(options.scene), min(CONTROL_DT, 1 / rate_hz))
    check_joints(profile, arm, str(options.scene))
    transport = open_transport("mujoco_robot", options)
    robot = MujocoRobot(arm, profile, transport, options=settings)
    rate = Rate(robot.tick_hz)
    about, cameras = arm.scene.about, ", ".join(arm.scene.cameras) or "none"
    log.info("ready: %s; %d joints, cameras %s, %s", about, len(arm.names), cameras, raise_priority(options.priority))
    try:
        while not rate.sleep(stop):
            robot.tick()
            rate.period = 1 / robot.tick_hz
    finally:
        log.info("ended: %s, missed deadlines %d", robot.counts, rate.missed_deadlines)
        transport.close()
        robot.close()


if __name__ == "__main__":
    use_software_gl()  # reading a profile may import mujoco
    run_process(main, parser())
