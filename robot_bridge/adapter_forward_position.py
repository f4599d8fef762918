"""Commands for ros2_control's forward_command_controller on position interfaces: one vector at every safety tick.

The controller applies the last vector for ever: an arm whose bridge dies stands still, at once and with a jerk. It
takes as many finite values as it has joints, in the order of its own `joints` parameter, which must be the profile's.
"""

from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_order import JointOrder
from embodied.robot_bridge.adapter_topic import TopicAdapter, checked
from embodied.robot_bridge.command_messages import float_array
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import Tick


class ForwardPositionAdapter(TopicAdapter):
    """Sends the position of `tick.motion`."""

    message_type = messages.FLOAT_ARRAY

    def __init__(self, profile: Profile, transport: Any) -> None:
        super().__init__(profile, transport)
        self._order = JointOrder(transport, profile.topics.command, self.names)

    def prepare(self) -> None:
        self._order.ask()

    def obstacle(self) -> str:
        return self.topic.obstacle() or self._order.fault()

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        if tick.motion is None:
            return False
        count = len(self.names)
        self.topic.write(float_array(checked(tick.motion.position[:count], count)))
        return True
