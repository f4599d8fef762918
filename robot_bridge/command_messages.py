"""Messages that command: arrays and twists for controllers, buttons and switches for operators. As in messages.py."""

import dataclasses
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages


def float_array(values: np.ndarray) -> bytes:
    """std_msgs/Float64MultiArray of (N,) numbers, as the forward command controllers take."""
    # No dimension, no offset, the count; numbers of eight bytes stand at multiples of eight. Every tick sends one.
    count = len(values)
    return struct.pack("<4B3I4x" if count else "<4B3I", 0, 1, 0, 0, 0, 0, count) + np.asarray(values, "<f8").tobytes()


def read_float_array(data: bytes) -> np.ndarray:
    """(N,) the numbers of a Float64MultiArray; InputError if its layout leaves some out in front."""
    message = messages.decode(data, messages.FLOAT_ARRAY)
    if message.layout.data_offset:
        raise InputError(f"a Float64MultiArray with data_offset {message.layout.data_offset}; the bridge reads 0")
    return message.data


@dataclasses.dataclass(frozen=True)
class Jog:
    """A JointJog: velocity (J,) [rad/s, m/s], or unitless in [-1, 1] as the servo is configured."""

    stamp_ns: int
    frame_id: str
    names: tuple[str, ...]
    velocity: np.ndarray
    duration_s: float = 0.0


def joint_jog(jog: Jog) -> bytes:
    """control_msgs/JointJog. A servo discards one whose stamp is not now."""
    velocity = np.ascontiguousarray(jog.velocity, np.float64)
    head = messages.header(jog.stamp_ns, jog.frame_id)
    return messages.encode(
        messages.new(messages.JOINT_JOG, head, list(jog.names), np.zeros(0), velocity, float(jog.duration_s))
    )


def read_joint_jog(data: bytes) -> Jog:
    """A JointJog; InputError if the velocities are not one per name."""
    message = messages.decode(data, messages.JOINT_JOG)
    names = tuple(message.joint_names)
    if len(message.velocities) != len(names):
        raise InputError(f"a JointJog of {len(names)} joints with {len(message.velocities)} velocities")
    return Jog(messages.stamp_ns(message), message.header.frame_id, names, message.velocities, message.duration)


@dataclasses.dataclass(frozen=True)
class Twist:
    """A TwistStamped in `frame_id`: linear (3,) [m/s] and angular (3,) [rad/s], or unitless in [-1, 1]."""

    stamp_ns: int
    frame_id: str
    linear: np.ndarray
    angular: np.ndarray


def _vector(values: Iterable[float]) -> Any:
    return messages.new("geometry_msgs/msg/Vector3", *map(float, values))


def twist_stamped(twist: Twist) -> bytes:
    """geometry_msgs/TwistStamped. A servo discards one whose stamp is not now."""
    value = messages.new("geometry_msgs/msg/Twist", _vector(twist.linear), _vector(twist.angular))
    return messages.encode(messages.new(messages.TWIST_STAMPED, messages.header(twist.stamp_ns, twist.frame_id), value))


def read_twist_stamped(data: bytes) -> Twist:
    message = messages.decode(data, messages.TWIST_STAMPED)
    linear, angular = (np.array([v.x, v.y, v.z]) for v in (message.twist.linear, message.twist.angular))
    return Twist(messages.stamp_ns(message), message.header.frame_id, linear, angular)


def joy(stamp: int, axes: Sequence[float], buttons: Sequence[int]) -> bytes:
    """sensor_msgs/Joy: axes in [-1, 1], buttons 0 or 1."""
    return messages.encode(
        messages.new(messages.JOY, messages.header(stamp), np.asarray(axes, np.float32), np.asarray(buttons, np.int32))
    )


def read_joy(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Axes (A,) and buttons (B,)."""
    message = messages.decode(data, messages.JOY)
    return message.axes, message.buttons


def trigger_request() -> bytes:
    """std_srvs/Trigger's request, which has no field."""
    return messages.encode(messages.new(f"{messages.TRIGGER}_Request", 0))


def set_bool_request(value: bool) -> bytes:
    """std_srvs/SetBool's request."""
    return messages.encode(messages.new(f"{messages.SET_BOOL}_Request", bool(value)))


def read_set_bool_request(data: bytes) -> bool:
    return bool(messages.decode(data, f"{messages.SET_BOOL}_Request").data)


def outcome(success: bool, text: str) -> bytes:
    """The response of Trigger and of SetBool, which are alike."""
    return messages.encode(messages.new(f"{messages.TRIGGER}_Response", bool(success), text))


def read_outcome(data: bytes) -> tuple[bool, str]:
    """Success and message of a Trigger's or SetBool's response."""
    message = messages.decode(data, f"{messages.TRIGGER}_Response")
    return bool(message.success), message.message
