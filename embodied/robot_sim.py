"""`embodied robot sim`: a simulated arm in a process of its own that looks on the ROS 2 graph like a real one."""

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from embodied.contracts.errors import InputError, suggest
from embodied.progress import Progress
from embodied.verbs import Touches

if TYPE_CHECKING:
    from embodied.robot_bridge.kinematics import Workspace
    from embodied.robot_bridge.profile import Profile
    from embodied.sim.arm_scene import ArmSpec

LIFT = "robosuite/Lift"
STAND_IN = "stand-in"
CLEARANCE = 0.1  # an arm starts so far inside its workspace where it can [m]
TRIES = 5000  # postures looked at for one inside the workspace
# The model of each shipped profile: an environment, or one of sim/arm_scene.py. Others get a stand-in.
MODELS = {"panda-mujoco": LIFT, "franka-panda": LIFT, "franka-fr3": LIFT, "ur5e": "ur5e", "xarm7": "xarm7"}


@dataclasses.dataclass(frozen=True)
class RobotSim:
    """Run a MuJoCo robot on the ROS 2 graph until Ctrl-C: what the profile's arm publishes out, its commands in.

    Attributes:
        profile: robot profile: a shipped name or a YAML file.
        model: robosuite/Lift, panda, ur5e, xarm7 or stand-in.
        urdf: instead of the profile's own.
        scene: folder with scene.xml and scene.json instead.
        cameras: that publish, instead of all.
        image_size: height and width [px].
        state_rate: joint states per second.
        camera_rate: images per second.
        real_time_factor: seconds of physics per second.
        use_sim_time: stamp with physics time and publish it on /clock.
        state_style: separate-gripper, nan-effort, no-velocity, shuffled.
        seed: of the state that the scene starts in, and of faults.
        log: file that gets every control step.
        transport: auto, dds or rclpy.
        domain: ROS domain.
        discovery: localhost, or subnet.
    """

    profile: Positional[str] = "panda-mujoco"
    model: str | None = None
    urdf: Path | None = None
    scene: Path | None = None
    cameras: tuple[str, ...] | None = None
    image_size: int = 64
    state_rate: float | None = None
    camera_rate: float | None = None
    real_time_factor: float = 1.0
    use_sim_time: bool = False
    state_style: tuple[str, ...] = ()
    seed: int = 0
    log: Path | None = None
    transport: str = "auto"
    domain: int | None = None
    discovery: str = "localhost"


def touches(config: RobotSim) -> Touches:
    reads = tuple(path for path in (config.scene, config.urdf) if path)
    return Touches(reads=reads, writes=(config.log,) if config.log else ())


def robot_sim(config: RobotSim, progress: Progress) -> dict[str, Any]:
    from embodied.robot_bridge import mujoco_robot
    from embodied.robot_bridge.node import Stop
    from embodied.robot_bridge.profile import load_profile
    from embodied.robot_bridge.scene import load_scene
    from embodied.robot_bridge.simulated_arm import use_software_gl

    use_software_gl()  # reading a profile may import mujoco
    _check(config)
    profile = load_profile(config.profile, config.urdf)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="embodied-scene-") as folder:
        scene = config.scene or write_robot_scene(Path(folder), profile, config)
        progress.say(
            f"robot '{profile.name}': {load_scene(scene).about or scene}\n"
            f"{profile.topics.joint_states} out, {profile.topics.command} in ({profile.adapter}); Ctrl-C ends it"
        )
        options = mujoco_robot.parser().parse_args(_flags(config, scene))
        mujoco_robot.main(options, profile, Stop(None))
    return {"robot": profile.name, "ended": True}


def _check(config: RobotSim) -> None:
    """InputError for a word that means nothing, before seconds go into a scene."""
    from embodied.robot_bridge.robot_options import StateStyle
    from embodied.robot_bridge.transport import DISCOVERY, KINDS

    styles = [field.name.replace("_", "-") for field in dataclasses.fields(StateStyle)]
    for flag, words, known in (
        ("transport", (config.transport,), KINDS),
        ("discovery", (config.discovery,), DISCOVERY),
        ("state-style", config.state_style, styles),
    ):
        for word in words:
            if word not in known:
                raise InputError(f"--{flag}: there is no '{word}'.{suggest(word, known)}")


def _flags(config: RobotSim, scene: Path) -> list[str]:
    """The robot process's flags for this configuration."""
    flags = ["--profile", config.profile, "--scene", str(scene), "--discovery", config.discovery]
    values = {
        "--transport": config.transport,
        "--domain": config.domain,
        "--state-rate": config.state_rate,
        "--camera-rate": config.camera_rate,
        "--real-time-factor": config.real_time_factor,
        "--seed": config.seed,
        "--log": config.log,
    }
    for flag, value in values.items():
        flags += [flag, str(value)] if value is not None else []
    flags += ["--state-style", *config.state_style] if config.state_style else []
    return [*flags, "--use-sim-time"] if config.use_sim_time else flags


def write_robot_scene(folder: Path, profile: "Profile", config: RobotSim) -> Path:
    """The scene folder for a profile: its joints' names on the model that fits."""
    from embodied.sim.arm_scene import MODELS as ARMS
    from embodied.sim.arm_scene import export_arm_scene
    from embodied.sim.export_scene import export_scene
    from embodied.sim.robosuite_lift import CAMERAS

    urdf = config.urdf or (Path(profile.description.urdf) if profile.description.urdf.endswith(".urdf") else None)
    model = config.model or ("" if urdf else MODELS.get(profile.name, STAND_IN))
    if model and model not in (LIFT, STAND_IN, *ARMS):
        raise InputError(f"--model: there is no '{model}'.{suggest(model, (LIFT, STAND_IN, *ARMS))}")
    cameras = tuple(profile.topics.cameras) if config.cameras is None else config.cameras
    gripper = profile.gripper
    if model == LIFT:
        if gripper is None or gripper.closed != 0 or gripper.open <= 0:
            raise InputError(f"{LIFT} has a gripper whose closed position is 0; profile {profile.name} has another.")
        if config.cameras is None:
            cameras = tuple(camera for camera in cameras if camera in CAMERAS)
        joint = (gripper.joint, gripper.open)
        return export_scene(folder, cameras, config.image_size, config.seed, profile.joints, joint)
    own = "" if model in ("", STAND_IN) else model
    return export_arm_scene(
        folder, _arm_spec(profile, own, cameras), own, None if model else urdf, config.image_size, config.seed
    )


def _arm_spec(profile: "Profile", model: str, cameras: tuple[str, ...]) -> "ArmSpec":
    """What the profile says of its arm, and a posture inside its workspace to start from."""
    from embodied.sim.arm_scene import ArmSpec, home_of

    limits, count, gripper, about = profile.read_limits(), len(profile.joints), profile.gripper, profile.description
    low = tuple(float(x) - profile.position_margin for x in limits.low[:count])
    high = tuple(float(x) + profile.position_margin for x in limits.high[:count])
    home = np.clip(home_of(model, low, high), limits.low[:count], limits.high[:count])
    workspace, tool_at = profile.read_workspace(), ()
    if workspace is not None and (not model or workspace.outside(home)):
        draws = np.random.default_rng(0).uniform(limits.low[:count], limits.high[:count], (TRIES, count))
        near = [home, *draws[np.argsort(np.abs(draws - home).max(axis=1))]]
        home = next((q for clear in (CLEARANCE, 0.0) for q in near if _inside(workspace, q, clear)), home)
    if about.tool and (about.chain or about.urdf):
        tool_at = tuple(float(x) for x in profile.read_kinematics([about.tool]).positions(home)[0])
    ends = (gripper.joint, gripper.open, gripper.closed) if gripper else None
    posture = tuple(float(x) for x in home)
    return ArmSpec(profile.joints, low, high, ends, about.base, about.tool, cameras, about.chain, posture, tool_at)


def _inside(workspace: "Workspace", posture: np.ndarray, clear: float) -> bool:
    """Whether every frame that the workspace looks at is in it, and so far from its sides [m]."""
    xyz = workspace.kinematics.positions(posture)
    return bool((xyz >= workspace.low + clear).all() and (xyz <= workspace.high - clear).all())
