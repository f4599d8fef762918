"""The messages that only a robot sends: joint states in a style of its own, the state of its controller."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.controller import Reference
from embodied.robot_bridge.messages import encode, header, new
from embodied.robot_bridge.robot_options import StateStyle

CONTROLLER_STATE = "control_msgs/msg/JointTrajectoryControllerState"


def joint_state(
    stamp_ns: int, names: Sequence[str], position: np.ndarray, velocity: np.ndarray, style: StateStyle
) -> bytes:
    """sensor_msgs/JointState of (J,) arrays."""
    effort = np.full(len(names), np.nan) if style.nan_effort else np.zeros(0)
    speeds = np.zeros(0) if style.no_velocity else np.ascontiguousarray(velocity, np.float64)
    values = (np.ascontiguousarray(position, np.float64), speeds, effort)
    return encode(new(messages.JOINT_STATE, header(stamp_ns), list(names), *values))


def controller_state(stamp_ns: int, names: Sequence[str], reference: Reference, measured: Reference) -> bytes:
    """control_msgs/JointTrajectoryControllerState: reference, feedback, their difference, output."""
    empty, zero = np.zeros(0), messages.duration(0.0)

    def point(position: np.ndarray, velocity: np.ndarray) -> Any:
        arrays = (np.ascontiguousarray(position), np.ascontiguousarray(velocity), empty, empty)
        return new("trajectory_msgs/msg/JointTrajectoryPoint", *arrays, zero)

    points = (
        point(reference.position, reference.velocity),
        point(measured.position, measured.velocity),
        point(reference.position - measured.position, reference.velocity - measured.velocity),
        point(reference.position, empty),
    )
    nothing = new("trajectory_msgs/msg/MultiDOFJointTrajectoryPoint", [], [], [], zero)
    return encode(new(CONTROLLER_STATE, header(stamp_ns), list(names), *points, [], *[nothing] * 4, 1.0))
