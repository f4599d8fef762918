"""Commands for a gripper that is not a joint of the arm's controller: a position topic, or a GripperCommand action.

The safety filter moves the gripper's joint as it moves the arm's, so what arrives here is limited in speed. It is sent
on when it has changed enough to matter: grippers take few commands a second, and an action's goal replaces the last.
A stop leaves the gripper where it is, closed on what it holds.
"""

import logging
import math
import queue
import secrets
import threading
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_topic import CommandTopic, checked
from embodied.robot_bridge.command_messages import float_array
from embodied.robot_bridge.profile import Gripper, Profile
from embodied.robot_bridge.safety import Tick

log = logging.getLogger("safety")

STALE = 1.0  # a gripper whose joint states are older is not commanded [s]
SEND_GOAL = "control_msgs/action/GripperCommand_SendGoal"


class Hysteresis:
    """Which positions are worth sending: changed by `step`, at their end, or not said for `again`; one per `period`."""

    def __init__(self, step: float, period: float, again: float) -> None:
        self._step, self._period, self._again = step, period, again
        self._last, self._sent_at = np.nan, -np.inf

    def due(self, position: float, at_rest: bool, now: float) -> bool:
        """True for a position to send, which then counts as sent."""
        change = abs(position - self._last)  # NaN before the first
        enough = not change < self._step or (at_rest and change > 1e-6) or now - self._sent_at > self._again
        if not enough or now - self._sent_at < self._period:
            return False
        self._last, self._sent_at = position, now
        return True


class GripperAdapter:
    """The last joint of `tick.motion` on a Float64MultiArray topic, as a forward or gripper controller takes it.

    Attributes:
        failure: what went wrong with the last command; empty if nothing did.
    """

    PERIOD, STEP = 0.04, 0.01  # [s], share of the stroke
    AGAIN = 1.0  # a topic may lose a message [s]

    def __init__(self, profile: Profile, transport: Any) -> None:
        assert profile.gripper is not None
        self.gripper: Gripper = profile.gripper
        self.failure = ""
        stroke = abs(self.gripper.open - self.gripper.closed)
        self._hysteresis = Hysteresis(self.STEP * stroke, self.PERIOD, self.AGAIN)
        self._low, self._high = sorted((self.gripper.open, self.gripper.closed))
        self.connect(transport)

    def connect(self, transport: Any) -> None:
        self._topic = CommandTopic(transport, self.gripper.topic, messages.FLOAT_ARRAY)

    def obstacle(self) -> str:
        return self._topic.obstacle()

    def rival(self) -> str:
        return self._topic.rival()

    def send(self, tick: Tick, age: float, now: float) -> str:
        """Send the position if it matters.

        Args:
            age: of the gripper's joint state [s].

        Returns:
            Why the gripper does not get what it should; empty if it does.
        """
        if tick.motion is None:
            return ""
        if age > STALE:
            return f"the joint state of {self.gripper.joint} is {min(age, 999.0):.1f} s old; the gripper is left alone"
        position = float(np.clip(checked(tick.motion.position[-1:], 1)[0], self._low, self._high))
        if self._hysteresis.due(position, tick.motion.at_rest, now):
            self.write(position)
        return self.failure

    def write(self, position: float) -> None:
        self._topic.write(float_array(np.array([position])))

    def close(self) -> None:
        """Nothing runs behind a topic."""


class GripperActionAdapter(GripperAdapter):
    """The same as goals of a GripperCommand action; a thread of its own waits for the server's answers.

    An action is three services, which not every transport and peer carry: arming is refused where they are absent.
    """

    PERIOD, STEP, TIMEOUT = 0.2, 0.05, 2.0  # [s], share of the stroke, [s]
    AGAIN = math.inf  # a goal was accepted, or its failure is known

    def connect(self, transport: Any) -> None:
        self._transport, self._goal_service = transport, f"{self.gripper.topic}/_action/send_goal"
        self._goals: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gripper", daemon=True)
        self._thread.start()

    def obstacle(self) -> str:
        if not self._transport.services:
            return f"{self.gripper.topic} is an action; this transport has no services"
        served = {service.name for service in self._transport.graph().services}
        return "" if self._goal_service in served else f"nobody serves the action {self.gripper.topic}"

    def rival(self) -> str:
        return ""  # an action server serves many clients; the last goal counts

    def write(self, position: float) -> None:
        self._goals.put(position)

    def _work(self) -> None:
        while (position := self._goals.get()) is not None:
            while not self._goals.empty():  # only the newest goal is worth sending
                position = self._goals.get()
                if position is None:
                    return
            try:
                answer = self._transport.call(
                    self._goal_service,
                    SEND_GOAL,
                    gripper_goal(position, self.gripper.max_effort, secrets.token_bytes(16)),
                    self.TIMEOUT,
                )
                accepted = bool(messages.decode(answer, f"{SEND_GOAL}_Response").accepted)
                self.failure = "" if accepted else f"{self.gripper.topic} rejected a goal"
            except EmbodiedError as error:
                self.failure = str(error)
            if self.failure:
                log.warning("gripper: %s", self.failure)

    def close(self) -> None:
        self._goals.put(None)


def gripper_goal(position: float, max_effort: float, goal_id: bytes) -> bytes:
    """The request that sends a GripperCommand goal. `goal_id`: 16 bytes, unique."""
    uuid = messages.new("unique_identifier_msgs/msg/UUID", np.frombuffer(goal_id, np.uint8))
    command = messages.new("control_msgs/msg/GripperCommand", position, max_effort)
    goal = messages.new("control_msgs/action/GripperCommand_Goal", command)
    return messages.encode(messages.new(f"{SEND_GOAL}_Request", uuid, goal))


GRIPPERS = {"forward_position": GripperAdapter, "gripper_command": GripperActionAdapter}
