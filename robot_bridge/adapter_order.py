"""Whether a forward_command_controller has the joints of the profile, in its order: its vectors carry no names."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from embodied.contracts.errors import EmbodiedError
from embodied.robot_bridge import messages

log = logging.getLogger("safety")

GET_PARAMETERS = "rcl_interfaces/srv/GetParameters"
TIMEOUT = 2.0  # [s]


class JointOrder:
    """Asks the controller for its parameter `joints`, once, on a thread of its own.

    Some peers carry no services, and some controllers have no such parameter: then nothing can be compared.

    Args:
        topic: the controller's commands, such as /forward_position_controller/commands.
        names: the joints in the order in which they are sent.
    """

    def __init__(self, transport: Any, topic: str, names: Sequence[str]) -> None:
        self._transport, self._service = transport, f"{topic.rsplit('/', 1)[0]}/get_parameters"
        self._controller, self._names = topic.rsplit("/", 1)[0], tuple(names)
        self._asking, self._fault = False, ""
        self.joints: tuple[str, ...] | None = None  # as the controller says; () where it does not say

    def ask(self) -> None:
        """Ask, unless that was done or nobody could answer. Returns at once."""
        if self._asking or self.joints is not None or not self._served():
            return
        self._asking = True
        threading.Thread(target=self._ask, name="joint-order", daemon=True).start()

    def _served(self) -> bool:
        if not self._transport.services:
            return False
        return any(service.name == self._service for service in self._transport.graph().services)

    def _ask(self) -> None:
        request = messages.encode(messages.new(f"{GET_PARAMETERS}_Request", ["joints"]))
        try:
            answer = self._transport.call(self._service, GET_PARAMETERS, request, TIMEOUT)
            values = messages.decode(answer, f"{GET_PARAMETERS}_Response").values
            self.joints = tuple(values[0].string_array_value) if values else ()
        except EmbodiedError as error:
            log.warning("%s: its joint order is not known: %s", self._controller, error)
        self._asking = False

    def fault(self) -> str:
        """Why the controller must not be sent these vectors; empty if it may, or did not say."""
        if not self.joints or self.joints == self._names:
            return ""
        return (
            f"{self._controller} has the joints {', '.join(self.joints)}; the bridge sends {', '.join(self._names)}: "
            "give the profile that order"
        )
