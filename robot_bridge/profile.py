"""A robot's profile: which joints, which topics, which limits, which deadlines. One YAML file per robot.

`panda-mujoco.yaml` beside this file is the example; a real arm needs a copy with its own names and limits.
"""

import contextlib
import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, suggest
from embodied.robot_bridge.kinematics import Kinematics, Workspace, description_limits
from embodied.robot_bridge.limits import Limits, LimitSource, match_joints, read_limits
from embodied.robot_bridge.profile_check import check_profile
from embodied.robot_bridge.read_joint_limits import load_yaml, read_joint_limits
from embodied.robot_bridge.read_urdf import read_chain

PROFILES = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Gripper:
    """A gripper as one joint; closed where the action is positive, open elsewhere.

    Attributes:
        joint: its name in joint states.
        open, closed: its positions [m, or rad where the joint turns].
        adapter: how commands reach it. `joint`: as the last joint of the arm's trajectory. `forward_position`: a
            Float64MultiArray of one value on `topic`. `gripper_command`: the action server `topic`.
        topic: of the adapter; unused with `joint`.
        max_effort: of a gripper_command goal [N]; 0 leaves it to the driver.
        joint_states: topic of its joint states where it differs from the arm's; "" where it is the same.
    """

    joint: str
    open: float
    closed: float
    adapter: str = "joint"
    topic: str = ""
    max_effort: float = 0.0
    joint_states: str = ""


@dataclasses.dataclass(frozen=True)
class Description:
    """Where the robot is described.

    Attributes:
        urdf: a URDF, or an MJCF file; relative to the profile. "" without one.
        joint_limits: YAML in the form of MoveIt, of Franka or of Universal Robots; relative to the profile.
        base, tool: names of links.
        chain: where no file is at hand, link -> {joint, xyz, rpy} from the base outwards (`read_urdf.read_chain`).
    """

    urdf: str = ""
    joint_limits: str = ""
    base: str = ""
    tool: str = ""
    chain: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Box:
    """Where the origins of `frames` (link names) must stay, in the base frame [m], `margin` within low and high."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    frames: tuple[str, ...]
    margin: float = 0.02


@dataclasses.dataclass(frozen=True)
class Topics:
    """Absolute ROS topic names.

    Attributes:
        deadman: std_msgs/Bool, or sensor_msgs/Joy if safety.deadman_button names a button.
        cameras: the bundle's camera name -> topic of sensor_msgs/Image; of CompressedImage if it ends in /compressed.
    """

    joint_states: str = "/joint_states"
    command: str = "/joint_trajectory_controller/joint_trajectory"
    clock: str = "/clock"
    deadman: str = "/bridge/deadman"
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Servo:
    """MoveIt Servo, for the adapters servo_jog and servo_twist.

    Attributes:
        frame: frame_id of the commands; a twist is expressed in it.
        linear, angular: largest speed of the tool [m/s], [rad/s].
        unitless: Servo takes values in [-1, 1] (its default), not SI units; then the scales below must be Servo's own.
        linear_scale, angular_scale, joint_scale: Servo's scale parameters [m/s], [rad/s], [rad/s].
    """

    frame: str = ""
    linear: float = 0.05
    angular: float = 0.2
    unitless: bool = False
    linear_scale: float = 0.4
    angular_scale: float = 0.8
    joint_scale: float = 0.5


@dataclasses.dataclass(frozen=True)
class Safety:
    """Deadlines and rates of the safety filter.

    Attributes:
        rate_hz: ticks of the filter [Hz].
        command_every: a command is sent every so many ticks.
        look_ahead: the path is sampled as far ahead as the jerk-limited filter lags behind it, at most this [s].
        action_delay: a chunk's points are due this much after their times, about what it takes from the observation
            to the arrival of the chunk, so that one chunk lasts until the next [s].
        chunk_horizon: how far past its arrival a chunk is executed without a newer one [s].
        chunk_blend: a chunk that begins in the past is faded into over this time [s].
        chunk_timeout: HOLD this long after the last usable point [s].
        chunk_max_age: chunks from observations older than this are refused [s].
        clock_skew_max: stamps further in the future than this are refused [s].
        joint_timeout: HOLD when joint states are older; the arm brakes from half of that on [s].
        joint_stop: STOPPED when they are older [s].
        hold_resume: HOLD ends by itself if its cause is gone within this time [s]; later it needs `run`.
        first_chunk_timeout: HOLD when no chunk came so long after `run` [s].
        tracking_error, tracking_time: HOLD when command and measurement differ by more than tracking_error [rad] for
            tracking_time [s]. Below max_step, by which a command is ahead at most.
        arm_max_velocity: arming is refused while a joint moves faster [rad/s].
        max_clamped_time: HOLD when targets had to be clamped for longer, at every tick [s].
        stop_after_hold: a HOLD because the arm does not follow, or touches something, becomes STOPPED after this [s].
        arm_max_initial_error: how far the first target may lie from the measured joint, beyond max_step [rad].
        deadman_required, deadman_timeout: HOLD unless topics.deadman says true at least this often [s].
        deadman_button: index of the Joy button that must be held; -1 where topics.deadman carries a Bool.
        estop_required, estop_timeout: ESTOP unless /bridge/estop says false at least this often [s].
    """

    rate_hz: float = 100.0
    command_every: int = 2
    look_ahead: float = 0.3
    action_delay: float = 0.03
    chunk_horizon: float = 0.15
    chunk_blend: float = 0.05
    chunk_timeout: float = 0.15
    chunk_max_age: float = 0.5
    clock_skew_max: float = 0.1
    joint_timeout: float = 0.1
    joint_stop: float = 0.5
    hold_resume: float = 1.0
    first_chunk_timeout: float = 2.0
    tracking_error: float = 0.08
    tracking_time: float = 0.3
    arm_max_velocity: float = 0.05
    max_clamped_time: float = 0.5
    stop_after_hold: float = 1.0
    arm_max_initial_error: float = 0.05
    deadman_required: bool = True
    deadman_timeout: float = 0.3
    deadman_button: int = -1
    estop_required: bool = False
    estop_timeout: float = 0.5


@dataclasses.dataclass(frozen=True)
class Policy:
    """How the policy process builds observations and targets.

    Attributes:
        image_timeout: it publishes nothing from an older image [s].
        joint_timeout: nor when the joint state is older than the image (than now, without images) by this much [s].
        max_lead: a target stays this close to the measured joint [rad]; use what the training data used.
        resize_images: cameras of another size than the bundle's are resized; otherwise they are refused.
    """

    image_timeout: float = 0.15
    joint_timeout: float = 0.1
    max_lead: float = 0.2
    resize_images: bool = False


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Rates of the MuJoCo robot [Hz]; a real robot ignores them."""

    joint_states_hz: float = 100.0
    cameras_hz: float = 10.0
    poses_hz: float = 50.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """A robot.

    Attributes:
        joints: arm joints in the order of the policy's action.
        limits: joint -> limits, the gripper's included (`robot_bridge/limits.py`).
        limit_scale: factor on velocity, acceleration and jerk limits.
        estimated: quantity -> whose estimate it is, where the maker of the arm states none; `robot check` repeats it.
        position_margin: taken off both ends of each arm joint's range [rad].
        adapter: how commands reach the robot, one of ADAPTERS. `jtc`: a ros2_control joint_trajectory_controller.
        acknowledge_no_timeout: must be true for forward_velocity, which lets an arm move on when the bridge dies.
        workspace: absent where nothing but the joints bounds the tool.
    """

    name: str
    joints: tuple[str, ...]
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    estimated: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit_scale: float = 0.3
    position_margin: float = 0.05
    adapter: str = "jtc"
    acknowledge_no_timeout: bool = False
    gripper: Gripper | None = None
    description: Description = dataclasses.field(default_factory=Description)
    workspace: Box | None = None
    topics: Topics = dataclasses.field(default_factory=Topics)
    servo: Servo = dataclasses.field(default_factory=Servo)
    safety: Safety = dataclasses.field(default_factory=Safety)
    policy: Policy = dataclasses.field(default_factory=Policy)
    simulation: Simulation = dataclasses.field(default_factory=Simulation)

    @property
    def all_joints(self) -> tuple[str, ...]:
        """Arm joints, then the gripper's."""
        return self.joints + ((self.gripper.joint,) if self.gripper else ())

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything that decides how the robot is driven: processes that differ here must not run."""
        limits = {key: np.asarray(value).tolist() for key, value in vars(self.read_limits()).items()}
        text = json.dumps([dataclasses.asdict(self), limits], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read_limits(self) -> Limits:
        """Limits of every joint: the strictest of profile, URDF and joint_limits.yaml, scaled and with margin.

        The gripper has no margin: it closes on its end stop.

        Raises:
            ConfigError: a limit is stated nowhere, or sources leave nothing (`limits.read_limits`).
        """
        others = list(description_limits(Path(self.description.urdf))) if self.description.urdf else []
        if self.description.joint_limits:
            path = Path(self.description.joint_limits)
            others.append(LimitSource(path.name, read_joint_limits(path)))
        for source in others:
            if not set(match_joints(self.all_joints, source.joints)) & set(self.joints):
                raise ConfigError(
                    f"{source.name} states limits of {', '.join(list(source.joints)[:8])};\n"
                    f"none is a joint of profile {self.name}: {', '.join(self.joints)}."
                )
        limits = read_limits(self.all_joints, self.limits, self.limit_scale, f"profile {self.name}", others)
        return limits.narrowed(np.array([self.position_margin] * len(self.joints) + [0.0] * bool(self.gripper)))

    def read_kinematics(self, frames: Sequence[str]) -> Kinematics:
        """Forward kinematics of `frames` in the frame `description.base`.

        Raises:
            ConfigError: the profile names no description, or it lacks a joint or a frame.
        """
        description = self.description
        if description.urdf:
            return Kinematics(Path(description.urdf), self.joints, frames, description.base)
        if description.chain:
            chain = read_chain(description.base, description.chain, Path(f"profile {self.name}"))
            return Kinematics(chain, self.joints, frames, description.base)
        raise ConfigError(f"profile {self.name}: where links are needs description.urdf, a URDF or MJCF file.")

    def read_workspace(self) -> Workspace | None:
        """The workspace box, None where the profile states none.

        Raises:
            ConfigError: as `read_kinematics`; the box is empty.
        """
        if self.workspace is None:
            return None
        box = self.workspace
        return Workspace(self.read_kinematics(box.frames), box.low, box.high, box.margin)


def profile_path(name: str | Path) -> Path:
    """A YAML file, or the name of a profile that comes with the package."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"profile {path} is no file.")
        return path
    shipped = {file.stem: file for file in PROFILES.glob("*.yaml")}
    if str(name) not in shipped:
        raise ConfigError(f"robot profile '{name}' is neither a YAML file nor shipped.{suggest(str(name), shipped)}")
    return shipped[str(name)]


def load_profile(name: str | Path, urdf: Path | None = None, joint_limits: Path | None = None) -> Profile:
    """Read and check a profile.

    Args:
        name: a YAML file, or a shipped profile.
        urdf, joint_limits: take the place of those in its description.

    Raises:
        ConfigError: the file is absent or no YAML mapping, a key is unknown, a value is missing or of the wrong type,
            a limit is missing.
    """
    path = profile_path(name)
    data = load_yaml(path)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} must hold a mapping; see panda-mujoco.yaml.")
    profile = _build(Profile, data, path, "")
    description = _absolute(profile.description, path.parent)
    given = {"urdf": urdf, "joint_limits": joint_limits}
    given = {key: str(file) for key, file in given.items() if file is not None}
    profile = dataclasses.replace(profile, description=dataclasses.replace(description, **given))
    check_profile(profile, path)
    return profile


def _absolute(description: Description, folder: Path) -> Description:
    paths = {key: getattr(description, key) for key in ("urdf", "joint_limits")}
    return dataclasses.replace(
        description, **{key: str(folder / Path(path).expanduser()) for key, path in paths.items() if path}
    )


def _build(kind: Any, data: Mapping[str, Any], path: Path, where: str) -> Any:
    """A dataclass from a mapping: unknown and missing keys and wrong types are errors."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in fields:
            raise ConfigError(f"{path}: unknown key '{where}{key}'.{suggest(str(key), fields)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], path, f"{where}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}: '{where}{name}' is missing.")
    return kind(**values)


def _convert(hint: Any, value: Any, path: Path, where: str) -> Any:
    arguments = typing.get_args(hint)
    if type(None) in arguments:  # X | None
        return None if value is None else _convert(arguments[0], value, path, where)
    origin = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, path, f"{where}.")
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, path, where) for item in value)
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            return float(value)
    if origin in (dict, str, bool, int) and type(value) is origin:
        return value
    raise ConfigError(f"{path}: '{where}' is {value!r}; it must be {getattr(hint, '__name__', hint)}.")
