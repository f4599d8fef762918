"""A gripper behind a GripperCommand action server, as ros2_control's gripper_action_controller offers it.

A goal moves the gripper at once and replaces the one before. It ends as reached within 0.01 of its position, or as
stalled when the gripper has stood still for a second elsewhere, closed on something. `get_result` answers at once, with
status EXECUTING until the goal has ended: a client that wants the end asks again.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.controller import Moment, Reference
from embodied.robot_bridge.qos import DEFAULT

ACTION = "control_msgs/action/GripperCommand"
CANCEL_GOAL = "action_msgs/srv/CancelGoal"
EXECUTING, SUCCEEDED, CANCELED, ABORTED, UNKNOWN = 2, 4, 5, 6, 0
GOAL_TOLERANCE = 0.01  # [m, or rad where the joint turns]
STALL_VELOCITY, STALL_TIMEOUT = 0.001, 1.0  # [m/s], [s]
FEEDBACK_HZ = 10.0


@dataclasses.dataclass
class _Goal:
    identifier: bytes
    position: float
    accepted_at: float | None = None
    status: int = EXECUTING
    stalled: bool = False
    reached: bool = False
    at: float = 0.0  # the last measured position


class GripperActionController:
    """The controller of one joint and its action server.

    Args:
        topic: the action's name, such as /gripper_controller/gripper_cmd.
        stamp: ROS time [ns].
    """

    def __init__(self, name: str, position: np.ndarray, transport: Any, topic: str, stamp: Callable[[], int]) -> None:
        self.names, self._stamp, self._lock = (name,), stamp, threading.Lock()
        self._goals: list[_Goal] = []
        self._feedback = transport.publisher(f"{topic}/_action/feedback", f"{ACTION}_FeedbackMessage", DEFAULT)
        self._feedback_due = -np.inf
        self.hold(position)
        if transport.services:
            transport.service(f"{topic}/_action/send_goal", f"{ACTION}_SendGoal", self._send_goal)
            transport.service(f"{topic}/_action/get_result", f"{ACTION}_GetResult", self._get_result)
            transport.service(f"{topic}/_action/cancel_goal", CANCEL_GOAL, self._cancel_goal)

    def hold(self, position: np.ndarray) -> None:
        with self._lock:
            self._target = np.array(position, np.float64)
            self._still_since: float | None = None
            for goal in self._goals:
                goal.status = ABORTED if goal.status == EXECUTING else goal.status

    def receive(self, data: bytes, moment: Moment) -> str:
        del data, moment
        return "a gripper_command gripper takes goals of its action, not messages"

    def update(self, moment: Moment) -> Reference:
        with self._lock:
            goal = self._goals[-1] if self._goals and self._goals[-1].status == EXECUTING else None
            if goal is not None:
                self._pursue(goal, moment)
            return Reference(self._target, np.zeros_like(self._target))

    def _pursue(self, goal: _Goal, moment: Moment) -> None:
        position, speed = float(moment.position[0]), abs(float(moment.velocity[0]))
        if goal.accepted_at is None:
            goal.accepted_at, self._still_since = moment.now, None
        goal.at = position
        self._target = np.array([goal.position])
        if abs(position - goal.position) < GOAL_TOLERANCE:
            goal.status, goal.reached = SUCCEEDED, True
        elif speed > STALL_VELOCITY:
            self._still_since = None
        elif self._still_since is None:
            self._still_since = moment.now
        elif moment.now - self._still_since > STALL_TIMEOUT:
            goal.status, goal.stalled = ABORTED, True
        if moment.now >= self._feedback_due:
            self._feedback_due = moment.now + 1 / FEEDBACK_HZ
            feedback = messages.new(f"{ACTION}_Feedback", *self._state(goal))
            message = messages.new(f"{ACTION}_FeedbackMessage", _uuid(goal.identifier), feedback)
            self._feedback.write(messages.encode(message))

    def _state(self, goal: _Goal) -> tuple[float, float, bool, bool]:
        return goal.at, 0.0, goal.stalled, goal.reached

    def _send_goal(self, request: bytes) -> bytes:
        wish = messages.decode(request, f"{ACTION}_SendGoal_Request")
        position = float(wish.goal.command.position)
        accepted = bool(np.isfinite(position))
        with self._lock:
            if accepted:
                for goal in self._goals:
                    goal.status = CANCELED if goal.status == EXECUTING else goal.status
                self._goals = [*self._goals[-20:], _Goal(bytes(wish.goal_id.uuid), position)]
        return messages.encode(messages.new(f"{ACTION}_SendGoal_Response", accepted, messages.time(self._stamp())))

    def _get_result(self, request: bytes) -> bytes:
        identifier = bytes(messages.decode(request, f"{ACTION}_GetResult_Request").goal_id.uuid)
        with self._lock:
            goal = next((g for g in self._goals if g.identifier == identifier), None)
            state = self._state(goal) if goal else (0.0, 0.0, False, False)
            status = goal.status if goal else UNKNOWN
        result = messages.new(f"{ACTION}_Result", *state)
        return messages.encode(messages.new(f"{ACTION}_GetResult_Response", status, result))

    def _cancel_goal(self, request: bytes) -> bytes:
        """An identifier of zeros cancels every goal, as in ROS 2."""
        info = messages.decode(request, f"{CANCEL_GOAL}_Request").goal_info
        identifier = bytes(info.goal_id.uuid)
        with self._lock:
            ended = [g for g in self._goals if g.status == EXECUTING and identifier in (bytes(16), g.identifier)]
            for goal in ended:
                goal.status = CANCELED
                self._target = np.array([goal.at]) if goal.accepted_at is not None else self._target
        stamp = messages.time(self._stamp())
        entries = [messages.new("action_msgs/msg/GoalInfo", _uuid(goal.identifier), stamp) for goal in ended]
        return messages.encode(messages.new(f"{CANCEL_GOAL}_Response", 0 if ended else 1, entries))


def _uuid(identifier: bytes) -> Any:
    return messages.new("unique_identifier_msgs/msg/UUID", np.frombuffer(identifier, np.uint8))
