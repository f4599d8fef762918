"""`embodied robot doctor`: what is on the ROS 2 graph, and what is wrong with it, in plain words."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import embodied
from embodied.config import to_json
from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class RobotDoctor:
    """Listen to the ROS 2 graph for a few seconds and say what is wrong: rates, ages, QoS, clocks, joints, commanders.

    Nothing is sent. The exit code is 1 when something is wrong.

    Attributes:
        profile: robot profile whose joints, cameras and controller are looked for: a shipped name or a YAML file.
        seconds: how long to listen.
        transport: auto, dds or rclpy.
        domain: ROS domain; ROS_DOMAIN_ID or 0 by default.
        discovery: localhost, or subnet to see other hosts.
    """

    profile: str | None = None
    seconds: float = 3.0
    transport: str = "auto"
    domain: int | None = None
    discovery: str = "localhost"


def touches(config: RobotDoctor) -> Touches:
    if config.profile is None:
        return Touches()
    shipped = Path(embodied.__file__).parent / "robot_bridge" / f"{config.profile}.yaml"
    return Touches(reads=(Path(config.profile) if Path(config.profile).is_file() else shipped,))


def robot_doctor(config: RobotDoctor, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge.graph_doctor import as_text, diagnose, examine
    from embodied.robot_bridge.profile import load_profile
    from embodied.robot_bridge.transport import open_transport

    if not 0.1 <= config.seconds <= 600 or math.isnan(config.seconds):
        raise InputError(f"--seconds: from 0.1 to 600; found {config.seconds:g}.")
    profile = load_profile(config.profile) if config.profile else None
    transport = open_transport("robot_doctor", config.transport, config.domain, config.discovery)
    try:
        progress.say(f"listening for {config.seconds:g} s")
        seen = examine(transport, profile, config.seconds)
    finally:
        transport.close()
    findings = diagnose(seen)
    return {
        "nodes": list(seen.graph.nodes),
        "topics": [to_json(report) for report in seen.topics()],
        "findings": [to_json(finding) for finding in findings],
        "wrong": sum(finding.level == "wrong" for finding in findings),
        "text": as_text(seen, findings),
    }


def as_text(result: dict[str, Any]) -> str:
    return result["text"]


def exit_code(result: dict[str, Any]) -> int:
    return int(result["wrong"] > 0)
