"""A MuJoCo robot that looks like a ros2_control arm on the ROS 2 graph; `python -m embodied.robot_bridge.mujoco_robot`.

It loads a scene folder (`scene.xml`, `scene.json`: every key is described in robot_bridge/scene.py) and then knows
nothing but topics, so that a real arm takes its place by a profile with other names:

    in   <topics.command>        JointTrajectory   accepted or rejected as joint_trajectory_controller does
    out  <topics.joint_states>   JointState        arm joints, then the gripper's; reliable, 100 Hz
    out  <topics.cameras.NAME>   Image rgb8        sensor data, 10 Hz; drawn only while somebody subscribes
    out  /sim/pose/NAME          PoseStamped       ground truth of the scene's bodies and sites, 50 Hz
    in   /sim/reset              String (JSON)     {"id": any, "qpos": [...]*, "qvel": [...]*, "ctrl": [...]*}
    in   /sim/fault              String (JSON)     {"fault": freeze_state | freeze_cameras | nan_state |
                                                    reject_commands | none}
    out  /sim/status             String (JSON)     {"reset": id of the last reset done, "accepted", "rejected", ...};
                                                   latched

Physics runs at wall-clock speed. A JointState and an Image of the same moment carry the same stamp.
"""

import argparse
import collections
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, EmbodiedError, InputError, MissingExtraError
from embodied.robot_bridge import messages
from embodied.robot_bridge.node import Rate, Stop, arguments, now_ns, open_transport, run_process
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED, SENSOR_DATA
from embodied.robot_bridge.scene import RenderSettings, Scene, SceneState, load_scene
from embodied.robot_bridge.trajectory_controller import TrajectoryController

log = logging.getLogger("mujoco_robot")

RESET_TOPIC, FAULT_TOPIC, STATUS_TOPIC, POSE_PREFIX = "/sim/reset", "/sim/fault", "/sim/status", "/sim/pose/"
FAULTS = ("none", "freeze_state", "freeze_cameras", "nan_state", "reject_commands")
_CONTROL_DT = 0.004  # the controller writes to the actuators this often [s]
_MAX_BEHIND = 0.25  # more lost time than this is skipped, not simulated in a burst [s]


def _mujoco() -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's rasteriser would otherwise take every core
    try:
        import mujoco
    except ImportError as error:
        raise MissingExtraError("mujoco", "ros", "the MuJoCo robot") from error
    return mujoco


class SceneRenderer:
    """Pictures of one size, with the pixels that the scene's settings say."""

    def __init__(self, model: Any, height: int, width: int, settings: RenderSettings) -> None:
        mujoco = _mujoco()
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        model.vis.quality.offsamples = settings.offsamples
        if not settings.flags.get("shadow", True):
            model.vis.quality.shadowsize = 0
        try:
            self._renderer = mujoco.Renderer(model, height, width, max_geom=settings.max_geom)
        except Exception as error:
            raise EmbodiedError(
                f"MuJoCo cannot open an off-screen {os.environ['MUJOCO_GL']} context: {error}\n"
                "Install Mesa (apt-get install libegl1 libgl1-mesa-dri) or set MUJOCO_GL=osmesa."
            ) from error
        for flag, on in settings.flags.items():
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag.upper()}")] = on
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = settings.geomgroup
        self._option.sitegroup[:] = settings.sitegroup

    def render(self, data: Any, camera: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        self._renderer.update_scene(data, camera, self._option)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()


class SimulatedArm:
    """Model, data and controller of a scene; no I/O.

    Attributes:
        names: ROS joints, the arm's and then the gripper's.
    """

    def __init__(self, scene: Scene) -> None:
        mujoco = _mujoco()
        self._mujoco, self.scene = mujoco, scene
        try:
            self.model = mujoco.MjModel.from_xml_path(str(scene.xml))
            joints = [self.model.joint(j.joint) for j in scene.joints.values()]
            actuators = [self.model.actuator(j.actuator).id for j in scene.joints.values()]
            fingers = [(self.model.joint(n), g) for n, g in (scene.gripper.joints if scene.gripper else {}).items()]
            grips = [
                (self.model.actuator(n).id, g) for n, g in (scene.gripper.actuators if scene.gripper else {}).items()
            ]
            self.places = {n: ("body", self.model.body(b).id) for n, b in scene.bodies.items()}
            self.places |= {n: ("site", self.model.site(s).id) for n, s in scene.sites.items()}
            for camera in scene.cameras.values():
                self.model.camera(camera.camera)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{scene.xml.parent}: scene.json and scene.xml do not fit: {error}") from None
        self.data = mujoco.MjData(self.model)
        self.names = tuple(scene.joints) + ((scene.gripper.name,) if scene.gripper else ())
        count, total = len(joints), len(self.names)
        # Linear maps keep a gripper of any number of fingers one joint: position = read @ qpos, ctrl = drive @ command.
        self._read_position = np.zeros((total, self.model.nq))
        self._read_velocity = np.zeros((total, self.model.nv))
        self._drive = np.zeros((self.model.nu, total))
        self._driven = np.zeros(self.model.nu, bool)
        entries = [(row, joint, 1.0) for row, joint in enumerate(joints)] + [(count, j, g) for j, g in fingers]
        for row, joint, gain in entries:
            self._read_position[row, joint.qposadr[0]] = gain
            self._read_velocity[row, joint.dofadr[0]] = gain
        for column, actuator, gain in [(c, a, 1.0) for c, a in enumerate(actuators)] + [
            (count, a, g) for a, g in grips
        ]:
            self._drive[actuator, column] = gain
            self._driven[actuator] = True
        self._substeps = max(1, round(_CONTROL_DT / self.model.opt.timestep))
        self.control_dt = self._substeps * self.model.opt.timestep
        self.controller = TrajectoryController(self.names, np.zeros(total))
        self._renderers: dict[tuple[int, int], SceneRenderer] = {}
        self.reset(scene.initial)

    def reset(self, state: SceneState) -> None:
        """Start from `state`, holding it. InputError if a length is wrong."""
        self._mujoco.mj_resetData(self.model, self.data)
        for name, values in (("qpos", state.qpos), ("qvel", state.qvel), ("ctrl", state.ctrl)):
            array = getattr(self.data, name)
            if len(values) not in (0, len(array)):
                raise InputError(f"a reset with {len(values)} numbers in '{name}'; the scene has {len(array)}.")
            if len(values):
                array[:] = values
        self._mujoco.mj_forward(self.model, self.data)
        target = self.joint_state()[0]
        if state.ctrl:  # the commands that give this ctrl, so that holding does not change it
            target = np.linalg.lstsq(self._drive, self.data.ctrl * self._driven, rcond=None)[0]
        self.controller.hold(target)

    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured position and velocity (J,) in the order of `names`."""
        return self._read_position @ self.data.qpos, self._read_velocity @ self.data.qvel

    def advance(self, now: float) -> None:
        """Simulate one control period; the controller is sampled at `now`."""
        ctrl = self._drive @ self.controller.sample(now)[0]
        self.data.ctrl[self._driven] = ctrl[self._driven]
        self._mujoco.mj_step(self.model, self.data, nstep=self._substeps)

    def pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position [m] and quat_xyzw of a tracked body or site in the world."""
        kind, index = self.places[name]
        if kind == "body":
            return self.data.xpos[index], np.roll(self.data.xquat[index], -1)
        quat_wxyz = np.zeros(4)
        self._mujoco.mju_mat2Quat(quat_wxyz, self.data.site_xmat[index])
        return self.data.site_xpos[index], np.roll(quat_wxyz, -1)

    def render(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 picture of the scene's camera `name`."""
        camera = self.scene.cameras[name]
        size = (camera.height, camera.width)
        if size not in self._renderers:
            self._renderers[size] = SceneRenderer(self.model, *size, self.scene.render)
        return self._renderers[size].render(self.data, camera.camera)

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()


class MujocoRobot:
    """The arm on a transport. Call `tick` at `simulation.joint_states_hz`.

    Args:
        clock: monotonic seconds; physics keeps up with it.
        stamp: ROS time [ns].
    """

    def __init__(
        self,
        arm: SimulatedArm,
        profile: Profile,
        transport: Any,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], int] = now_ns,
    ) -> None:
        self.arm, self._profile, self._clock, self._stamp = arm, profile, clock, stamp
        for camera in profile.topics.cameras:
            if camera not in arm.scene.cameras:
                log.info("the scene has no camera '%s'; its topic stays silent", camera)
        self._inbox: collections.deque[tuple[str, bytes, int]] = collections.deque()
        self._states = transport.publisher(profile.topics.joint_states, messages.JOINT_STATE, DEFAULT)
        self._status = transport.publisher(STATUS_TOPIC, messages.STRING, LATCHED)
        self._cameras = {
            name: transport.publisher(topic, messages.IMAGE, SENSOR_DATA)
            for name, topic in profile.topics.cameras.items()
            if name in arm.scene.cameras
        }
        self._poses = {n: transport.publisher(POSE_PREFIX + n, messages.POSE_STAMPED, DEFAULT) for n in arm.places}
        for topic, kind, qos in (
            (profile.topics.command, messages.JOINT_TRAJECTORY, COMMAND),
            (RESET_TOPIC, messages.STRING, DEFAULT),
            (FAULT_TOPIC, messages.STRING, DEFAULT),
        ):
            transport.subscriber(topic, kind, qos, lambda data, at, topic=topic: self._inbox.append((topic, data, at)))
        self._simulated, self._fault = clock(), "none"
        self._due: dict[str, float] = {}
        self.counts = {"accepted": 0, "rejected": 0, "skipped_s": 0.0}
        self._last_reset: Any = None
        self._publish_status()

    def tick(self) -> None:
        """Take commands, let physics catch up with the clock, publish what is due."""
        while self._inbox:
            topic, data, received_ns = self._inbox.popleft()
            # Physics first runs to the moment of arrival, so that a trajectory starts then and not at a tick.
            self._catch_up(received_ns * 1e-9)
            try:
                self._receive(topic, data)
            except InputError as error:
                self.counts["rejected"] += 1
                log.warning("%s: %s", topic, error)
        self._catch_up(self._clock())
        self._publish()

    def _catch_up(self, now: float) -> None:
        if now - self._simulated > _MAX_BEHIND:
            self.counts["skipped_s"] += now - self._simulated
            self._simulated = now
        while self._simulated + self.arm.control_dt <= now:
            self.arm.advance(self._simulated)
            self._simulated += self.arm.control_dt

    def _receive(self, topic: str, data: bytes) -> None:
        if topic == RESET_TOPIC:
            wish = messages.read_json(data)
            initial = self.arm.scene.initial
            qpos = tuple(wish.get("qpos", initial.qpos))
            ctrl = wish.get("ctrl", () if "qpos" in wish else initial.ctrl)
            self.arm.reset(SceneState(qpos, tuple(wish.get("qvel", ())), tuple(ctrl)))
            self._last_reset = wish.get("id")
            self._publish_status()
        elif topic == FAULT_TOPIC:
            fault = messages.read_json(data).get("fault")
            if fault not in FAULTS:
                raise InputError(f"fault '{fault}' is none of {', '.join(FAULTS)}")
            self._fault = fault
        elif self._fault == "reject_commands":
            self.counts["rejected"] += 1
        else:
            trajectory = messages.read_joint_trajectory(data)
            if reason := self.arm.controller.accept(trajectory, self._simulated, self._stamp()):
                self.counts["rejected"] += 1
                log.warning("trajectory rejected: %s", reason)
            else:
                self.counts["accepted"] += 1

    def _publish(self) -> None:
        rates, stamp = self._profile.simulation, self._stamp()
        if self._fault != "freeze_state":  # a frozen driver stays silent
            position, velocity = self.arm.joint_state()
            if self._fault == "nan_state":
                position = position * np.nan
            self._states.write(messages.joint_state(stamp, self.arm.names, position, velocity))
        if self._is_due("poses", rates.poses_hz):
            for name, publisher in self._poses.items():
                publisher.write(messages.pose_stamped(stamp, "world", *self.arm.pose(name)))
        if self._is_due("cameras", rates.cameras_hz) and self._fault != "freeze_cameras":
            for name, publisher in self._cameras.items():
                if publisher.matched:
                    publisher.write(messages.image(stamp, f"{name}_optical_frame", self.arm.render(name)))

    def _is_due(self, what: str, hz: float) -> bool:
        """By simulated time, so that a late tick does not stretch the average period."""
        now, due = self._simulated, self._due.get(what, self._simulated)
        if now < due - self.arm.control_dt:
            return False
        self._due[what] = max(due, now - 1 / hz) + 1 / hz
        return True

    def _publish_status(self) -> None:
        self._status.write(messages.json_string({"reset": self._last_reset, **self.counts}))


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    arm = SimulatedArm(load_scene(options.scene))
    if set(arm.names) != set(profile.all_joints):
        raise ConfigError(
            f"profile {profile.name} has joints {', '.join(profile.all_joints)};\n"
            f"the scene {options.scene} has {', '.join(arm.names)}."
        )
    for name in arm.scene.cameras:
        arm.render(name)  # opens the context now, not in the first control period
    transport = open_transport("mujoco_robot", options)
    robot = MujocoRobot(arm, profile, transport)
    rate = Rate(profile.simulation.joint_states_hz)
    log.info("ready: %d joints, cameras %s", len(arm.names), ", ".join(arm.scene.cameras) or "(none)")
    try:
        while not rate.sleep(stop):
            robot.tick()
    finally:
        log.info("ended: %s, missed deadlines %d", robot.counts, rate.missed_deadlines)
        transport.close()
        arm.close()


if __name__ == "__main__":
    parser = arguments("A MuJoCo robot on the ROS 2 graph.")
    parser.add_argument("--scene", required=True, help="folder with scene.xml and scene.json")
    run_process(main, parser)
