"""`embodied robot sim`: a simulated arm in a process of its own that looks on the ROS 2 graph like a real one."""

import argparse
import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class RobotSim:
    """Run a MuJoCo robot on the ROS 2 graph until Ctrl-C: joint states and images out, joint trajectories in.

    Attributes:
        profile: robot profile: a shipped name or a YAML file.
        env: environment whose scene is simulated.
        scene: folder with scene.xml and scene.json, instead of an environment's.
        cameras: that publish images.
        image_size: height and width of the images [px].
        seed: of the state that the scene starts in.
        domain: ROS domain; ROS_DOMAIN_ID or 0 by default.
        discovery: localhost, or subnet to be seen by other hosts.
    """

    profile: Positional[str] = "panda-mujoco"
    env: str = "robosuite/Lift"
    scene: Path | None = None
    cameras: tuple[str, ...] = ("wrist",)
    image_size: int = 64
    seed: int = 0
    domain: int | None = None
    discovery: str = "localhost"


def touches(config: RobotSim) -> Touches:
    return Touches(reads=(config.scene,) if config.scene else ())


def robot_sim(config: RobotSim, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge import mujoco_robot
    from embodied.robot_bridge.node import Stop
    from embodied.robot_bridge.profile import load_profile
    from embodied.sim.suites import environment

    profile = load_profile(config.profile)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory(prefix="embodied-scene-") as folder:
        scene = config.scene or environment(config.env).export_scene(
            Path(folder), config.cameras, config.image_size, config.seed
        )
        progress.say(
            f"robot '{profile.name}': {profile.topics.joint_states} out, {profile.topics.command} in; Ctrl-C ends it"
        )
        options = argparse.Namespace(
            profile=config.profile, scene=str(scene), domain=config.domain, discovery=config.discovery, parent=None
        )
        mujoco_robot.main(options, profile, Stop(None))
    return {"robot": profile.name, "ended": True}
