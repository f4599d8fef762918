"""`embodied robot check`: what a profile allows a robot to do, where each limit comes from, what is left to chance."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class RobotCheck:
    """Show every limit of a robot profile after scale and margin, its source, what disagrees and what wins, how fast
    joints stop, topics, deadlines, workspace, and what is left to chance. Nothing is sent and no robot is needed.

    A profile that must not drive a robot is refused with the reason, exit code 2. Software limits are no rated safety
    function; the robot's own limits and a wired stop stay in charge.

    Attributes:
        profile: a shipped name or a YAML file.
        urdf: URDF or MJCF instead of the profile's description.urdf.
        joint_limits: joint_limits.yaml instead of the profile's description.joint_limits.
        strict: exit code 1 if there is a warning.
    """

    profile: Positional[str]
    urdf: Path | None = None
    joint_limits: Path | None = None
    strict: bool = False


def touches(config: RobotCheck) -> Touches:
    files = [Path(config.profile)] if Path(config.profile).suffix in (".yaml", ".yml") else []
    return Touches((*files, *(file for file in (config.urdf, config.joint_limits) if file)))


def robot_check(config: RobotCheck, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge.limits import QUANTITIES
    from embodied.robot_bridge.profile import load_profile, profile_path
    from embodied.robot_bridge.profile_check import profile_warnings

    profile = load_profile(config.profile, config.urdf, config.joint_limits)
    progress.say(f"read {profile_path(config.profile)}")
    limits = profile.read_limits()
    time, distance = limits.braking(limits.velocity)
    joints = [
        {
            "name": name,
            "position": [float(limits.low[i]), float(limits.high[i])],
            **{key: float(getattr(limits, key)[i]) for key in QUANTITIES[1:]},
            "stop_time": float(time[i]),
            "stop_distance": float(distance[i]),
            "sources": {key: [list(source) for source in limits.sources[name][key]] for key in QUANTITIES},
        }
        for i, name in enumerate(limits.names)
    ]
    return {
        "profile": profile.name,
        "file": str(profile_path(config.profile)),
        "adapter": profile.adapter,
        "limit_scale": profile.limit_scale,
        "position_margin": profile.position_margin,
        "joints": joints,
        "disagreements": list(limits.notes),
        "gripper": dataclasses.asdict(profile.gripper) if profile.gripper else None,
        "topics": dataclasses.asdict(profile.topics),
        "workspace": dataclasses.asdict(profile.workspace) if profile.workspace else None,
        "description": dataclasses.asdict(profile.description),
        "safety": dataclasses.asdict(profile.safety),
        "warnings": profile_warnings(profile, limits),
        "strict": config.strict,
    }


def exit_code(result: dict[str, Any]) -> int:
    return int(result["strict"] and bool(result["warnings"]))


def as_text(result: dict[str, Any]) -> str:
    scale, margin, safety = result["limit_scale"], result["position_margin"], result["safety"]
    lines = [
        f"{result['profile']} ({result['file']})",
        f"Limits in use: velocity, acceleration and jerk are {scale:g} of what is stated, positions end {margin:g} rad "
        "earlier.\nIn rad and s, a sliding gripper in m. The last two columns: braking from full speed.",
        "",
        *_table(
            ["joint", "position", "velocity", "accel.", "jerk", "max step", "stops in", "within"],
            [_limit_row(joint) for joint in result["joints"]],
        ),
        "",
        *_sources(result["joints"]),
        "",
        "Sources that disagree, and what is used:" if result["disagreements"] else "No two sources disagree.",
        *(f"  {note}" for note in result["disagreements"]),
        "",
        *_table([], _connections(result)),
        "",
        f"Deadlines [s]: {_deadlines(safety)}.",
        "",
        *(f"warning: {text}." for text in result["warnings"]),
        "No rated safety function: the robot's own limits and a wired stop stay in charge.",
    ]
    return "\n".join(lines)


def _limit_row(joint: dict[str, Any]) -> list[str]:
    low, high = joint["position"]
    rates = [f"{joint[key]:.5g}" for key in ("velocity", "acceleration", "jerk", "max_step")]
    return [
        joint["name"],
        f"{low:.4f} to {high:.4f}",
        *rates,
        f"{joint['stop_time']:.3f} s",
        f"{joint['stop_distance']:.3f}",
    ]


def _sources(joints: list[dict[str, Any]]) -> list[str]:
    """Where limits come from; joints for which that is the same share a line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for joint in joints:
        groups.setdefault(tuple(_winner(key, stated) for key, stated in joint["sources"].items()), []).append(
            joint["name"]
        )
    if len({winner for winners in groups for winner in winners}) == 1:
        return [f"Every limit comes from {next(iter(groups))[0]}."]
    lines = ["Where they come from (* the strictest of several):"]
    for winners, names in groups.items():
        lines.append(f"  {', '.join(names)}")
        lines += [
            f"    {row}" for row in _table([], [[*pair] for pair in zip(joints[0]["sources"], winners, strict=True)])
        ]
    return lines


def _winner(quantity: str, stated: list[list[Any]]) -> str:
    if len(stated) == 1:
        return stated[0][0]
    if quantity == "position":
        low, high = (pick(value[end] for _, value in stated) for end, pick in ((0, max), (1, min)))
        winners = [name for name, value in stated if value[0] == low or value[1] == high]
    else:
        smallest = min(value for _, value in stated)
        winners = [name for name, value in stated if value == smallest]
    return "* " + " and ".join(winners)


def _connections(result: dict[str, Any]) -> list[list[str]]:
    topics, gripper, box = result["topics"], result["gripper"], result["workspace"]
    rows = [
        ["arm", f"{result['adapter']} on {topics['command']}"],
        ["joint states", topics["joint_states"]],
        *(["camera " + name, topic] for name, topic in topics["cameras"].items()),
        ["deadman", topics["deadman"]],
    ]
    if gripper:
        where = "with the arm" if gripper["adapter"] == "joint" else f"{gripper['adapter']} on {gripper['topic']}"
        states = f", states on {gripper['joint_states']}" if gripper["joint_states"] else ""
        ends = f"open {gripper['open']:g}, closed {gripper['closed']:g}"
        rows.append(["gripper", f"{gripper['joint']}: {where}{states}; {ends}"])
    if box:
        low, high = ("(" + ", ".join(f"{x:g}" for x in box[key]) + ")" for key in ("low", "high"))
        rows.append(["workspace", f"{', '.join(box['frames'])} from {low} to {high} m, {box['margin']:g} m inside"])
    else:
        rows.append(["workspace", "none"])
    return rows


def _deadlines(safety: dict[str, Any]) -> str:
    shown = ("joint_timeout", "joint_stop", "chunk_horizon", "chunk_timeout", "chunk_max_age", "first_chunk_timeout")
    parts = [f"tick {1 / safety['rate_hz']:g}", f"command every {safety['command_every'] / safety['rate_hz']:g}"]
    parts += [f"{name} {safety[name]:g}" for name in shown]
    for name in ("deadman", "estop"):
        needed = safety[f"{name}_required"]
        parts.append(f"{name}_timeout {safety[f'{name}_timeout']:g}" if needed else f"no {name}")
    return ", ".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    every = [header, *rows] if header else rows
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
