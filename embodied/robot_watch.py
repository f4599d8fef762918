"""`embodied robot watch`: the running bridge on a terminal; with --operate also an operator's keys."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class RobotWatch:
    """Show state, joints against their limits, rates, ages, latencies and events; space stops the robot, q ends.

    Where standard output is no terminal it prints a line per second.

    Attributes:
        profile: robot profile: a shipped name or a YAML file.
        operate: be the operator: a arm, r run, d deadman (while held), h hold, x reset, escape e-stop, c clear it,
            b begins a recording, s and f end it with success or failure. No rated safety function.
        joystick: device whose button is the deadman, such as /dev/input/js0, instead of a key.
        button: of the joystick.
        seconds: end by itself after so long.
        cameras: count pictures too.
        transport: auto, dds or rclpy.
        domain: ROS domain; ROS_DOMAIN_ID or 0 by default.
        discovery: localhost, or subnet to reach other hosts.
    """

    profile: Positional[str] = "panda-mujoco"
    operate: bool = False
    joystick: Path | None = None
    button: int = 0
    seconds: float | None = None
    cameras: bool = True
    transport: str = "auto"
    domain: int | None = None
    discovery: str = "localhost"


def touches(config: RobotWatch) -> Touches:
    return Touches(reads=(Path(config.profile),) if Path(config.profile).is_file() else ())


def robot_watch(config: RobotWatch, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge import messages
    from embodied.robot_bridge.operate import HELP, Joystick, Operator
    from embodied.robot_bridge.profile import load_profile
    from embodied.robot_bridge.qos import DEFAULT
    from embodied.robot_bridge.safety_node import MODE_TOPIC
    from embodied.robot_bridge.transport import open_transport
    from embodied.robot_bridge.watch import LiveView

    if config.joystick is not None and not config.operate:
        raise InputError("--joystick is the deadman of an operator: add --operate.")
    profile = load_profile(config.profile)
    joystick = Joystick(config.joystick, config.button) if config.joystick is not None else None
    progress.close()
    transport = open_transport("robot_watch", config.transport, config.domain, config.discovery)
    operator = Operator(profile, transport, joystick) if config.operate else None
    mode = None if operator else transport.publisher(MODE_TOPIC, messages.STRING, DEFAULT)
    ends = time.monotonic() + (config.seconds if config.seconds is not None else float("inf"))
    try:
        with LiveView(profile, transport, HELP if operator else "space stop · q quit", config.cameras) as view:
            try:
                while (key := view.refresh()) != "q" and time.monotonic() < ends:
                    if operator is not None:
                        operator.press(key, view.monitor.contract)
                        operator.tick()
                        view.note = operator.note
                    elif mode is not None and key in ("space", "escape"):
                        mode.write(messages.string("stop"))
                    time.sleep(0 if key else 0.01)
            except KeyboardInterrupt:
                pass
            if operator is not None:
                _leave(operator, view)
            last = view.monitor.snapshot()
    finally:
        transport.close()
    return {"robot": profile.name, "state": last.state, "reason": last.reason, "counts": dict(last.counts)}


def _leave(operator: Any, view: Any) -> None:
    """Stop the robot, and keep the e-stop's heartbeat until it stands or a second has passed."""
    operator.leave()
    ends = time.monotonic() + 1.0
    while view.monitor.snapshot().state in ("ARMED", "RUNNING", "HOLD") and time.monotonic() < ends:
        operator.tick()
        time.sleep(0.02)


def as_text(result: dict[str, Any]) -> str:
    state = result["state"] or "nothing heard from the safety process"
    return f"{result['robot']}: {state}" + (f", {result['reason']}" if result["reason"] else "")
