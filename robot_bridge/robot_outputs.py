"""What the simulated robot sends: joint states, pictures, frames, its description, its clock; faults change them."""

import collections
import logging
from typing import Any

import numpy as np

from embodied.robot_bridge import messages, robot_messages
from embodied.robot_bridge.controller import Reference
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import DEFAULT, LATCHED, SENSOR_DATA, QosProfile
from embodied.robot_bridge.robot_controllers import Mounted
from embodied.robot_bridge.robot_options import POSE_PREFIX, STATUS_TOPIC, RobotOptions
from embodied.robot_bridge.simulated_arm import SimulatedArm
from embodied.robot_bridge.simulated_cameras import SimulatedCameras, camera_matrix
from embodied.robot_bridge.simulated_faults import Fault, distort

log = logging.getLogger("mujoco_robot")

TF = QosProfile(depth=100)
WORLD = "world"
STATUS_HZ, CONTROLLER_STATE_HZ = 2.0, 50.0


class RobotOutputs:
    """Every publisher of the robot, and when each is due by physics time.

    Attributes:
        skipped: how often the cameras were not done with the last pictures.
    """

    def __init__(
        self, arm: SimulatedArm, profile: Profile, transport: Any, mounted: list[Mounted], options: RobotOptions
    ) -> None:
        self._arm, self._mounted, self._style, self._rates = arm, mounted, options.style, profile.simulation
        self._camera_rate = options.camera_rate or profile.simulation.cameras_hz
        self._random = np.random.default_rng([options.seed, 1])
        self._fault = Fault()
        self._late: collections.deque[tuple[float, Any, bytes]] = collections.deque()
        self._now, self._due = 0.0, dict[str, float]()
        self._base = profile.description.base or "base_link"
        self._tool = profile.description.tool or "tool0"
        self._open(profile, transport, options.use_sim_time)
        self._cameras = SimulatedCameras(arm, self._send_picture, options.camera_thread)

    def _open(self, profile: Profile, transport: Any, use_sim_time: bool) -> None:
        topics, gripper, joints = profile.topics, profile.gripper, list(range(len(self._arm.names)))
        if self._style.shuffled:
            joints = [int(i) for i in self._random.permutation(len(joints))]
        apart = gripper is not None and (self._style.separate_gripper or bool(gripper.joint_states))
        grip = [i for i in joints if gripper and self._arm.names[i] == gripper.joint] if apart else []
        states = transport.publisher(topics.joint_states, messages.JOINT_STATE, DEFAULT)
        self._states = [([i for i in joints if i not in grip], states)]
        if gripper and apart:
            topic = gripper.joint_states or topics.joint_states
            self._states.append((grip, transport.publisher(topic, messages.JOINT_STATE, DEFAULT)))
        self._status = transport.publisher(STATUS_TOPIC, messages.STRING, LATCHED)
        self._poses = {
            n: transport.publisher(POSE_PREFIX + n, messages.POSE_STAMPED, DEFAULT) for n in self._arm.places
        }
        self._clock = transport.publisher(topics.clock, messages.CLOCK, DEFAULT) if use_sim_time else None
        self._frames = transport.publisher("/tf", messages.TF_MESSAGE, TF)
        self._static_frames = transport.publisher("/tf_static", messages.TF_MESSAGE, LATCHED)
        self._description = transport.publisher("/robot_description", messages.STRING, LATCHED)
        scene = self._arm.scene
        text = (scene.xml.parent / scene.description) if scene.description else scene.xml
        self._description.write(messages.string(text.read_text()))
        self._controller_state = None
        if profile.adapter == "jtc":
            topic = topics.command.rsplit("/", 1)[0] + "/controller_state"
            self._controller_state = transport.publisher(topic, robot_messages.CONTROLLER_STATE, DEFAULT)
        self._pictures: dict[str, tuple[Any, Any, bool]] = {}
        for name, topic in topics.cameras.items():
            if name not in scene.cameras:
                log.info("the scene has no camera '%s'; its topic stays silent", name)
                continue
            compressed = topic.endswith("/compressed")
            folder = topic.removesuffix("/compressed").rsplit("/", 1)[0]
            kind = messages.COMPRESSED_IMAGE if compressed else messages.IMAGE
            info = transport.publisher(f"{folder}/camera_info", messages.CAMERA_INFO, SENSOR_DATA)
            self._pictures[name] = (transport.publisher(topic, kind, SENSOR_DATA), info, compressed)

    @property
    def skipped(self) -> int:
        return self._cameras.skipped

    def publish(self, now: float, stamp: int, fault: Fault, use_sim_time: bool) -> bool:
        """Send what is due at physics time `now`; True when a status is."""
        self._now, self._fault = now, fault
        while self._late and self._late[0][0] <= now:
            _, publisher, data = self._late.popleft()
            publisher.write(data)
        if self._clock and fault.name != "clock_stop":
            self._clock.write(messages.clock(stamp))
        if fault.name != "freeze_state":  # a frozen driver stays silent
            self._send_states(stamp)
        if self._is_due("poses", self._rates.poses_hz):
            for name, publisher in self._poses.items():
                publisher.write(messages.pose_stamped(stamp, WORLD, *self._arm.pose(name)))
            self._send_frames(stamp)
        if self._controller_state and self._is_due("controller state", CONTROLLER_STATE_HZ):
            self._send_controller_state(stamp)
        if self._is_due("cameras", self._camera_rate) and fault.name != "freeze_cameras":
            wanted = [name for name, (picture, info, _) in self._pictures.items() if picture.matched or info.matched]
            if wanted:
                self._cameras.draw(wanted, stamp)
        return self._is_due("status", STATUS_HZ)

    def _is_due(self, what: str, hz: float) -> bool:
        """By physics time, so that a late tick does not stretch the average period."""
        due = self._due.get(what, self._now)
        if self._now < due - self._arm.control_dt:
            return False
        self._due[what] = max(due, self._now - 1 / hz) + 1 / hz
        return True

    def _send(self, stream: str, publisher: Any, data: bytes) -> None:
        """Through the faults that lose and delay; called from two threads."""
        fault = self._fault
        if fault.is_on("drop", of=stream) and self._random.random() < fault.values["probability"]:
            return
        if fault.is_on("delay", of=stream):
            self._late.append((self._now + fault.values["seconds"], publisher, data))
        else:
            publisher.write(data)

    def _send_states(self, stamp: int) -> None:
        position, velocity = self._arm.joint_state()
        position = distort(self._fault, self._arm.names, position)
        for order, publisher in self._states:
            names = [self._arm.names[i] for i in order]
            data = robot_messages.joint_state(stamp, names, position[order], velocity[order], self._style)
            self._send("joint_states", publisher, data)

    def _send_frames(self, stamp: int) -> None:
        arm = self._arm
        cameras = {name: arm.camera_moves(name) for name in self._pictures}
        if "static frames" not in self._due:
            self._due["static frames"] = np.inf
            fixed = [messages.Transform(stamp, WORLD, self._base, *arm.base_in_world())]
            fixed += [self._camera_frame(stamp, name) for name, moves in cameras.items() if not moves]
            self._static_frames.write(messages.transforms(fixed))
        moving = [self._camera_frame(stamp, name) for name, moves in cameras.items() if moves]
        if arm.has_tool:
            moving.append(messages.Transform(stamp, self._base, self._tool, *arm.tool_in_base()))
        if moving and self._frames.matched:
            self._frames.write(messages.transforms(moving))

    def _camera_frame(self, stamp: int, name: str) -> messages.Transform:
        return messages.Transform(stamp, self._base, optical_frame(name), *self._arm.camera_in_base(name))

    def _send_controller_state(self, stamp: int) -> None:
        if self._controller_state is None or not self._controller_state.matched:
            return
        arm = self._mounted[0]
        position, velocity = (values[arm.columns] for values in self._arm.joint_state())
        measured = Reference(position, velocity)
        data = robot_messages.controller_state(stamp, arm.controller.names, arm.reference, measured)
        self._controller_state.write(data)

    def _send_picture(self, name: str, stamp: int, pixels: np.ndarray) -> None:
        """On the drawing thread."""
        picture, info, compressed = self._pictures[name]
        if self._fault.is_on("camera_black", camera=name):
            pixels = np.zeros_like(pixels)
        encode = messages.compressed_image if compressed else messages.image
        frame = optical_frame(name)
        if picture.matched:
            self._send("cameras", picture, encode(stamp, frame, pixels))
        if info.matched:
            height, width, _ = pixels.shape
            matrix = camera_matrix(self._arm.fovy(name), width, height)
            calibration = messages.CameraInfo(height, width, matrix, np.zeros(5))
            self._send("cameras", info, messages.camera_info(stamp, frame, calibration))

    def status(self, values: dict[str, Any]) -> None:
        self._status.write(messages.json_string(values))

    def close(self) -> None:
        self._cameras.close()


def optical_frame(camera: str) -> str:
    """The frame_id of its pictures."""
    return f"{camera}_optical_frame"
