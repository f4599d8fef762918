"""Commands for ros2_control's forward_command_controller on velocity interfaces. An arm whose bridge dies moves on.

The controller has no timeout, so a profile must say `acknowledge_no_timeout: true`. While the bridge lives it sends a
velocity at every safety tick, and zeros at rest when stopped, after an e-stop, and before it leaves.
"""

import math
from typing import Any

import numpy as np

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge import messages
from embodied.robot_bridge.adapter_order import JointOrder
from embodied.robot_bridge.adapter_velocity import VelocityAdapter
from embodied.robot_bridge.command_messages import float_array
from embodied.robot_bridge.profile import Profile


class ForwardVelocityAdapter(VelocityAdapter):
    """A Float64MultiArray of velocities in the order of the controller's joints."""

    message_type = messages.FLOAT_ARRAY
    brake_time = math.inf

    def __init__(self, profile: Profile, transport: Any) -> None:
        if not profile.acknowledge_no_timeout:
            raise SafetyError(
                f"profile {profile.name}: forward_velocity needs acknowledge_no_timeout: true;\n"
                "an arm on this controller keeps moving when the bridge dies."
            )
        super().__init__(profile, transport)
        self._order = JointOrder(transport, profile.topics.command, self.names)

    def prepare(self) -> None:
        self._order.ask()

    def obstacle(self) -> str:
        return self.topic.obstacle() or self._order.fault()

    def encode(self, velocity: np.ndarray, stamp_ns: int) -> bytes:
        return float_array(velocity)
