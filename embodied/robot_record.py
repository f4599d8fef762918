"""`embodied robot record`: the recorder by itself, for an arm that something else drives or starts episodes on."""

import argparse
import dataclasses
import logging
import threading
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class RobotRecord:
    """Record a robot's topics as rosbag2 MCAP bags until Ctrl-C: one per episode, or one now with --bag.

    Episodes begin and end with events: 'embodied deploy' sends them, and the keys b, s and f of
    'embodied robot watch --operate'.

    Attributes:
        profile: robot profile: a shipped name or a YAML file.
        out: folder that gets the bags.
        bag: name of a bag to begin at once.
        seconds: end by itself after so long.
        transport: auto, dds or rclpy.
        domain: ROS domain; ROS_DOMAIN_ID or 0 by default.
        discovery: localhost, or subnet to reach other hosts.
        use_sim_time: record the clock topic too.
    """

    profile: Positional[str]
    out: Positional[Path]
    bag: str = ""
    seconds: float | None = None
    transport: str = "auto"
    domain: int | None = None
    discovery: str = "localhost"
    use_sim_time: bool = False


def touches(config: RobotRecord) -> Touches:
    profile = (Path(config.profile),) if Path(config.profile).is_file() else ()
    return Touches(reads=profile, writes=(config.out,), resumable=True)


def robot_record(config: RobotRecord, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge import recorder
    from embodied.robot_bridge.node import Stop
    from embodied.robot_bridge.profile import load_profile

    if config.bag and (config.out / config.bag).exists():
        raise InputError(f"{config.out / config.bag} exists. Name another bag, or remove it first.")
    profile = load_profile(config.profile)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    before = _bags(config.out)
    progress.say(f"recording {profile.name} into {config.out}; Ctrl-C ends it")
    options = argparse.Namespace(
        **{name: getattr(config, name) for name in ("profile", "transport", "domain", "discovery", "use_sim_time")},
        out=str(config.out),
        bag=config.bag,
        poses=[],
        namespace="/",
        parent=None,
    )
    stop = Stop()
    if config.seconds is not None:
        timer = threading.Timer(config.seconds, stop.set)
        timer.daemon = True
        timer.start()
    recorder.main(options, profile, stop)
    return {"robot": profile.name, "bags": [str(config.out / name) for name in sorted(_bags(config.out) - before)]}


def as_text(result: dict[str, Any]) -> str:
    return "\n".join([f"recorded {bag}" for bag in result["bags"]] or [f"{result['robot']}: no episode was recorded"])


def _bags(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/metadata.yaml")}
