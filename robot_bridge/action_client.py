"""A client of ROS 2 actions: three services and a feedback topic, over any transport that carries services."""

import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, TransportError
from embodied.contracts.protocols import Transport
from embodied.robot_bridge import messages
from embodied.robot_bridge.qos import DEFAULT

FOLLOW_JOINT_TRAJECTORY = "control_msgs/action/FollowJointTrajectory"
GRIPPER_COMMAND = "control_msgs/action/GripperCommand"
CANCEL_GOAL = "action_msgs/srv/CancelGoal"

# action_msgs/GoalStatus
STATUSES = {0: "unknown", 1: "accepted", 2: "executing", 3: "canceling", 4: "succeeded", 5: "canceled", 6: "aborted"}


def gripper_goal(position: float, max_effort: float) -> Any:
    """GripperCommand's goal. position [m or rad, as the gripper counts], max_effort [N or N m]."""
    command = messages.new("control_msgs/msg/GripperCommand", float(position), float(max_effort))
    return messages.new(f"{GRIPPER_COMMAND}_Goal", command)


def trajectory_goal(trajectory: messages.Trajectory, goal_time_tolerance_s: float = 0.0) -> Any:
    """FollowJointTrajectory's goal, with the controller's own path and goal tolerances."""
    message = messages.decode(messages.joint_trajectory(trajectory), messages.JOINT_TRAJECTORY)
    none = messages.new("trajectory_msgs/msg/MultiDOFJointTrajectory", messages.header(0), [], [])
    tolerance = messages.duration(goal_time_tolerance_s)
    return messages.new(f"{FOLLOW_JOINT_TRAJECTORY}_Goal", message, none, [], [], [], [], tolerance)


class ActionClient:
    """One client of one action server.

    Args:
        name: of the action, as `/gripper_controller/gripper_cmd`.
        on_feedback: `(goal_id, feedback message)`, on the transport's thread: enqueue only.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        action_type: str,
        on_feedback: Callable[[bytes, Any], None] | None = None,
    ) -> None:
        if not transport.services:
            raise TransportError(f"{name} is an action; this transport has no services.")
        messages.message_class(f"{action_type}_SendGoal_Request")
        self.name, self._type, self._transport = name, action_type, transport
        if on_feedback is not None:
            kind = f"{action_type}_FeedbackMessage"

            def receive(data: bytes, _: int) -> None:
                message = messages.decode(data, kind)
                on_feedback(message.goal_id.uuid.tobytes(), message.feedback)

            transport.subscriber(f"{name}/_action/feedback", kind, DEFAULT, receive)

    def _call(self, part: str, service_type: str, fields: tuple[Any, ...], timeout_s: float) -> Any:
        request = messages.encode(messages.new(f"{service_type}_Request", *fields))
        answer = self._transport.call(f"{self.name}/_action/{part}", service_type, request, timeout_s)
        return messages.decode(answer, f"{service_type}_Response")

    def send_goal(self, goal: Any, timeout_s: float) -> bytes:
        """Ask the server to pursue a goal; its id, 16 bytes. Raises TransportError if it refuses or does not answer."""
        goal_id = secrets.token_bytes(16)
        answer = self._call("send_goal", f"{self._type}_SendGoal", (_uuid(goal_id), goal), timeout_s)
        if not answer.accepted:
            raise TransportError(f"{self.name} rejected the goal.")
        return goal_id

    def get_result(self, goal_id: bytes, timeout_s: float) -> tuple[str, Any]:
        """How a goal ended (a word of STATUSES) and its result. Raises TransportError if it has not ended by then."""
        answer = self._call("get_result", f"{self._type}_GetResult", (_uuid(goal_id),), timeout_s)
        return STATUSES.get(answer.status, "unknown"), answer.result

    def cancel(self, goal_id: bytes, timeout_s: float) -> bool:
        """Ask the server to end a goal; False if it does not, since the goal is unknown or has ended."""
        info = messages.new("action_msgs/msg/GoalInfo", _uuid(goal_id), messages.time(0))
        return bool(self._call("cancel_goal", CANCEL_GOAL, (info,), timeout_s).goals_canceling)

    def run(self, goal: Any, timeout_s: float) -> Any:
        """Send a goal and wait for its result; a goal that runs out of time is cancelled.

        Raises:
            TransportError: the goal was rejected, did not succeed, or took too long.
        """
        deadline = time.monotonic() + timeout_s
        goal_id = self.send_goal(goal, timeout_s)
        try:
            status, result = self.get_result(goal_id, max(0.0, deadline - time.monotonic()))
        except TransportError:
            self.cancel(goal_id, 1.0)
            raise
        if status != "succeeded":
            raise TransportError(f"{self.name}: the goal {status}.")
        return result


def _uuid(goal_id: bytes) -> Any:
    if len(goal_id) != 16:
        raise InputError(f"a goal's id has 16 bytes, not {len(goal_id)}")
    return messages.new("unique_identifier_msgs/msg/UUID", np.frombuffer(goal_id, np.uint8))
