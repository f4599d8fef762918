"""`embodied robot recover`: a whole bag of what a killed recorder, a full disk or a power cut left of one."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class RobotRecover:
    """Finish bags whose recorder was killed; whole ones stay as they are. The damaged file is kept beside the new one.

    Attributes:
        bag: folder of a bag, or a folder of such folders.
    """

    bag: Positional[Path]


def touches(config: RobotRecover) -> Touches:
    return Touches(writes=(config.bag,), resumable=True)


def robot_recover(config: RobotRecover, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge.bag_recover import recover

    folders = [config.bag] if any(config.bag.glob("*.mcap")) else sorted(p.parent for p in config.bag.glob("*/*.mcap"))
    if not folders:
        raise InputError(f"{config.bag} is no bag: it holds no .mcap file, nor does a folder in it.")
    found = [recover(folder) for folder in dict.fromkeys(folders)]
    return {
        "bags": [
            {
                "folder": str(bag.folder),
                "messages": bag.messages,
                "changed": bag.changed,
                "damaged": str(bag.damaged) if bag.damaged else None,
                "lost_bytes": bag.lost_bytes,
            }
            for bag in found
        ]
    }


def as_text(result: dict[str, Any]) -> str:
    lines = []
    for bag in result["bags"]:
        done = "recovered" if bag["damaged"] else "metadata.yaml written anew" if bag["changed"] else "whole already"
        lines.append(f"{bag['folder']}: {bag['messages']} messages, {done}")
        if bag["damaged"]:
            lost = f", {bag['lost_bytes']} bytes at the break were of no use" if bag["lost_bytes"] else ""
            lines.append(f"  the damaged file is kept: {bag['damaged']}{lost}")
    return "\n".join(lines)
