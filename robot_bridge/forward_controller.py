"""What ros2_control's forward_command_controller does: the newest vector goes to the hardware, for ever.

No timeout: a position stays, a velocity keeps the arm moving. Before the first message nothing happens. A message with
a value that is not finite is dropped. One of the wrong length is an error of the controller, which the controller
manager then deactivates: nobody writes to the hardware any more, and it keeps its last command.
"""

from collections.abc import Sequence

import numpy as np

from embodied.robot_bridge.command_messages import read_float_array
from embodied.robot_bridge.controller import Moment, Reference

MAX_LEAD = 0.25  # the servo's target runs ahead of a joint that cannot follow its velocity by this at most [rad]


class ForwardController:
    """One value per joint, in the order of `names`.

    Args:
        interface: `position`, or `velocity`: the simulated servo's target then moves at that speed.

    Attributes:
        error: why the controller is dead; "" while it lives.
    """

    def __init__(self, names: Sequence[str], position: np.ndarray, interface: str) -> None:
        self.names, self.interface = tuple(names), interface
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        self._target = np.array(position, np.float64)
        self._velocity = np.zeros_like(self._target)
        self.error = ""

    def receive(self, data: bytes, moment: Moment) -> str:
        del moment
        values = np.asarray(read_float_array(data), np.float64)
        if self.error:
            return self.error
        if not np.isfinite(values).all():
            return "a value is not finite"
        if len(values) != len(self.names):
            self.error = f"dead: it got {len(values)} values for {len(self.names)} joints; reset the simulation"
            return self.error
        if self.interface == "position":
            self._target = values.copy()
        else:
            self._velocity = values.copy()
        return ""

    def update(self, moment: Moment) -> Reference:
        if self.interface == "velocity" and self._velocity.any():
            target = self._target + self._velocity * moment.dt
            self._target = np.clip(target, moment.position - MAX_LEAD, moment.position + MAX_LEAD)
        return Reference(self._target, self._velocity)
