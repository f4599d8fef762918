"""From joint states and images to what a bundle takes: one moment, by stamp, and nothing from a source too old."""

import collections
import dataclasses
import struct
import threading
from typing import Any

import numpy as np

from embodied.contracts.errors import BundleError, InputError, MissingExtraError, suggest
from embodied.contracts.protocols import Policy
from embodied.robot_bridge import messages
from embodied.robot_bridge.joint_merge import JointMerge
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import LATEST, SENSOR_DATA

_JOINT_STATES = 400  # kept: an image may be a quarter of a second late, and joint states come at 1 kHz


def check_observations(policy: Policy, profile: Profile) -> None:
    """BundleError, naming what is wrong, unless this robot measures what the bundle takes."""
    arm, every = len(profile.joints), len(profile.all_joints)
    sizes = {"joint_position": (arm,), "joint_velocity": (arm,)}
    sizes |= {"joint_target": (every,)} if profile.adapter != "servo_twist" else {}
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


@dataclasses.dataclass(frozen=True)
class Moment:
    """What the robot was like at one time.

    Attributes:
        stamp_ns: of the first camera's image, or of the newest joint state where the bundle sees through none.
        position, velocity: (J,) of all joints [rad, m], [rad/s, m/s], newest not after the stamp.
        images: camera -> (H, W, 3) uint8, newest.
    """

    stamp_ns: int
    position: np.ndarray
    velocity: np.ndarray
    images: dict[str, np.ndarray]


class Observer:
    """Keeps what arrived, undecoded: `ready` looks at stamps only, `moment` decodes.

    Args:
        wake: set when what sets the pace arrives: the first camera's image, or a joint state without cameras.

    Attributes:
        waiting: what is missing or too old, in words, by topic; as of the last `ready`.
    """

    def __init__(self, policy: Policy, profile: Profile, transport: Any, wake: threading.Event) -> None:
        self._profile, self._wake, self._specs = profile, wake, policy.image_spec
        self.trigger = next(iter(policy.image_spec), "")
        self._joints: collections.deque[bytes] = collections.deque(maxlen=_JOINT_STATES)
        self._images: dict[str, bytes] = {}
        self.waiting: dict[str, str] = {}
        self._merged = JointMerge(profile.all_joints)
        self._topics = {camera: profile.topics.cameras[camera] for camera in policy.image_spec}
        self._names = profile.all_joints if self._needs_gripper(policy, profile) else profile.joints
        for camera, topic in self._topics.items():
            kind = messages.COMPRESSED_IMAGE if topic.endswith("/compressed") else messages.IMAGE
            transport.subscriber(topic, kind, LATEST, lambda data, at, key=camera: self._on_image(key, data))
        sources = {profile.topics.joint_states, profile.gripper.joint_states if profile.gripper else ""} - {""}
        for topic in sorted(sources):
            transport.subscriber(topic, messages.JOINT_STATE, SENSOR_DATA, self._on_joint_state)

    @staticmethod
    def _needs_gripper(policy: Policy, profile: Profile) -> bool:
        """With a controller of the arm's, or in the observation; else a silent gripper does not stop the arm."""
        gripper = profile.gripper
        seen = {"gripper_position", "joint_target"} & set(policy.observation_spec)
        return gripper is not None and (gripper.adapter == "joint" or bool(seen))

    def _on_image(self, camera: str, data: bytes) -> None:
        self._images[camera] = data
        if camera == self.trigger:
            self._wake.set()

    def _on_joint_state(self, data: bytes, received_ns: int) -> None:
        del received_ns
        self._joints.append(data)
        if not self.trigger:
            self._wake.set()

    def forget(self) -> None:
        """As at the start: the clock jumped, and old stamps mean nothing now."""
        self._joints.clear()
        self._images.clear()

    def ready(self, now_ns: int) -> int | None:
        """Stamp [ns] of the newest moment, or None if a source has not been heard or is too old: see `waiting`.

        Raises:
            InputError: a message is malformed.
        """
        limits, waiting = self._profile.policy, {}
        stamps = {camera: _stamp(self._images[camera]) for camera in self._specs if camera in self._images}
        for camera, topic in self._topics.items():
            age = (now_ns - stamps[camera]) * 1e-9 if camera in stamps else np.inf
            if age > limits.image_timeout:
                waiting[topic] = f"the image is {age:.2f} s old" if camera in stamps else "no image came"
        newest = stamps.get(self.trigger, now_ns)
        self._merged = joints = self._joints_at(newest)
        for name, heard_at in zip(joints.names, joints.heard_at, strict=True):
            age = newest * 1e-9 - heard_at
            if name in self._names and age > limits.joint_timeout:
                said = f"{name} is {age:.2f} s old" if age < np.inf else f"no position of {name} came"
                waiting[self._profile.topics.joint_states] = said
                break
        self.waiting = waiting
        if waiting:
            return None
        return newest if self.trigger else joints.stamp_ns

    def moment(self, stamp_ns: int) -> Moment:
        """The moment that `ready` found, decoded.

        Raises:
            InputError: an image is malformed, or of another size than the bundle's.
        """
        images = {camera: self._fitted(camera, self._read_image(camera)[1]) for camera in self._specs}
        return Moment(stamp_ns, self._merged.position, self._merged.velocity, images)

    def _joints_at(self, stamp_ns: int) -> JointMerge:
        """Every joint as it was last stated not after the stamp; ages are by stamp."""
        merged, found = JointMerge(self._profile.all_joints), []
        missing = set(merged.names)
        for data in reversed(list(self._joints)):
            sample = messages.read_joint_state(data)
            if sample.stamp_ns <= stamp_ns and missing & set(sample.names):
                missing -= set(sample.names)
                found.append(sample)
            if not missing or stamp_ns - sample.stamp_ns > 10**9:
                break
        for sample in reversed(found):
            merged.update(sample, sample.stamp_ns * 1e-9)
        return merged

    def _read_image(self, camera: str) -> tuple[int, np.ndarray]:
        topic, data = self._topics[camera], self._images[camera]
        try:
            return messages.read_compressed_image(data) if topic.endswith("/compressed") else messages.read_image(data)
        except InputError as error:
            raise InputError(f"{topic}: {error}") from None

    def _fitted(self, camera: str, pixels: np.ndarray) -> np.ndarray:
        shape = tuple(self._specs[camera].shape)
        if pixels.shape == shape:
            return np.array(pixels)
        if not self._profile.policy.resize_images:
            raise InputError(
                f"{self._topics[camera]} has images of {pixels.shape[1]}x{pixels.shape[0]}; the bundle was trained on "
                f"{shape[1]}x{shape[0]}.\nSet the camera to that size, or policy.resize_images: true in the profile."
            )
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtraError("pillow", "ros", "Resizing images") from error
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BOX))


def _stamp(data: bytes) -> int:
    """The stamp in the header [ns] with which an Image or CompressedImage begins, without decoding the rest."""
    try:
        seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    except (struct.error, IndexError):
        raise InputError(f"an image of {len(data)} bytes") from None
    return seconds * 10**9 + nanoseconds
