"""Deadman and e-stop of a simulation, where nobody stands beside the arm. A real robot's come from its operator."""

import threading
from collections.abc import Callable
from typing import Any

from embodied.robot_bridge import messages
from embodied.robot_bridge.command_messages import joy
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, LATCHED
from embodied.robot_bridge.safety_node import ESTOP_TOPIC

HEARTBEAT = 0.05  # [s]


def hold_the_switches(profile: Profile, transport: Any, stamp: Callable[[], int], closing: threading.Event) -> None:
    """Until `closing`: the deadman counts as held and the e-stop as released, as far as the profile asks for them."""
    safety, heartbeats = profile.safety, []
    if safety.deadman_required:
        kind = messages.BOOL if safety.deadman_button < 0 else messages.JOY
        buttons = [0] * safety.deadman_button + [1]
        held = messages.boolean(True) if safety.deadman_button < 0 else joy(stamp(), [], buttons)
        heartbeats.append((transport.publisher(profile.topics.deadman, kind, COMMAND), held))
    if safety.estop_required:
        heartbeats.append((transport.publisher(ESTOP_TOPIC, messages.BOOL, LATCHED), messages.boolean(False)))
    while heartbeats and not closing.wait(HEARTBEAT):
        for publisher, data in heartbeats:
            publisher.write(data)
