"""Whether a profile may drive a robot: names, topics, adapters, and deadlines that contradict each other."""

import math
import re
import typing
from pathlib import Path

from embodied.contracts.errors import ConfigError, suggest
from embodied.robot_bridge.limits import LARGEST, QUANTITIES, Limits

if typing.TYPE_CHECKING:
    from embodied.robot_bridge.profile import Gripper, Profile, Safety

ADAPTERS = ("jtc", "forward_position", "forward_velocity", "servo_jog", "servo_twist")
GRIPPER_ADAPTERS = ("joint", "forward_position", "gripper_command")
TOPIC_NAME = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")
HEARTBEAT = 0.1  # [s]; deadman and e-stop are published at 10 Hz
_MAY_BE_ZERO = ("look_ahead", "action_delay", "chunk_blend")


def check_profile(profile: "Profile", path: Path) -> None:
    """Refuse a profile that may not drive a robot.

    Raises:
        ConfigError: a limit is missing, values contradict each other, a described frame is unknown.
    """
    _check_names(profile, path)
    _check_adapters(profile, path)
    for fault in safety_faults(profile.safety):
        raise ConfigError(f"{path}: {fault}")
    if not 0 <= profile.position_margin < LARGEST:
        raise ConfigError(f"{path}: position_margin {profile.position_margin:g} must be finite and not negative.")
    for quantity in profile.estimated:
        if quantity not in QUANTITIES:
            raise ConfigError(f"{path}: estimated names '{quantity}', no limit.{suggest(str(quantity), QUANTITIES)}")
    limits = profile.read_limits()
    _check_tracking(profile, limits, path)
    if profile.gripper:
        _check_gripper(profile.gripper, limits, path)
    profile.read_workspace()


def _check_adapters(profile: "Profile", path: Path) -> None:
    if profile.adapter not in ADAPTERS:
        raise ConfigError(f"{path}: adapter '{profile.adapter}' is unknown.{suggest(profile.adapter, ADAPTERS)}")
    if profile.adapter == "forward_velocity" and not profile.acknowledge_no_timeout:
        raise ConfigError(
            f"{path}: with forward_velocity the arm keeps moving when the bridge dies: the controller has no timeout.\n"
            "Prefer jtc or forward_position; acknowledge_no_timeout: true accepts the danger."
        )
    gripper = profile.gripper
    if gripper and gripper.adapter not in GRIPPER_ADAPTERS:
        raise ConfigError(
            f"{path}: gripper.adapter '{gripper.adapter}' is unknown.{suggest(gripper.adapter, GRIPPER_ADAPTERS)}"
        )
    if gripper and gripper.adapter != "joint" and not gripper.topic:
        raise ConfigError(f"{path}: gripper.adapter {gripper.adapter} needs gripper.topic.")
    if profile.adapter.startswith("servo"):
        _check_servo(profile, path)


def _check_servo(profile: "Profile", path: Path) -> None:
    servo, description = profile.servo, profile.description
    if not (servo.frame or description.base):
        raise ConfigError(f"{path}: adapter {profile.adapter} needs servo.frame, the link that commands refer to.")
    for name, value in vars(servo).items():
        if isinstance(value, float) and not 0 < value < math.inf:
            raise ConfigError(f"{path}: servo.{name} is {value:g}; it must be positive and finite.")
    if profile.gripper and profile.gripper.adapter == "joint":
        raise ConfigError(f"{path}: MoveIt Servo drives no gripper; set gripper.adapter and gripper.topic.")
    if profile.adapter == "servo_twist" and not ((description.urdf or description.chain) and description.tool):
        raise ConfigError(f"{path}: adapter servo_twist needs description.urdf and description.tool.")


def _check_names(profile: "Profile", path: Path) -> None:
    if not profile.joints or len(set(profile.all_joints)) != len(profile.all_joints):
        raise ConfigError(f"{path}: joint names must differ and there must be one: {', '.join(profile.all_joints)}.")
    topics = {f"topics.{key}": value for key, value in vars(profile.topics).items() if isinstance(value, str)}
    topics |= {f"topics.cameras.{camera}": topic for camera, topic in profile.topics.cameras.items()}
    if profile.gripper:
        topics |= {f"gripper.{key}": getattr(profile.gripper, key) for key in ("topic", "joint_states")}
    used: dict[str, str] = {}
    for key, topic in topics.items():
        if not topic and key.startswith("gripper."):
            continue
        if not isinstance(topic, str) or not TOPIC_NAME.fullmatch(topic):
            raise ConfigError(f"{path}: {key} is {topic!r}; a topic is written absolutely, as /arm/joint_states.")
        if topic in used and {key, used[topic]} != {"topics.joint_states", "gripper.joint_states"}:
            raise ConfigError(f"{path}: {key} and {used[topic]} are both {topic}.")
        used[topic] = key


def safety_faults(safety: "Safety") -> list[str]:
    """What contradicts itself in a safety section; empty if nothing does."""
    period = 1.0 / safety.rate_hz if safety.rate_hz > 0 else 0.0
    between = safety.command_every * period
    faults = [
        f"safety.{name} is {value:g}; it must be positive and finite."
        for name, value in vars(safety).items()
        if name not in (*_MAY_BE_ZERO, "deadman_button") and not isinstance(value, bool) and not 0 < value < math.inf
    ]
    faults += [
        f"safety.{name} is {getattr(safety, name):g}; it must be finite and not negative."
        for name in _MAY_BE_ZERO
        if not 0 <= getattr(safety, name) < math.inf
    ]
    if faults:
        return faults
    rules = [
        (safety.rate_hz > 1000, f"safety.rate_hz {safety.rate_hz:g} is above 1000; this is no real-time loop."),
        (
            safety.chunk_horizon < 2 * between,
            f"safety.chunk_horizon {safety.chunk_horizon:g} s is shorter than two command periods ({2 * between:g} s = "
            "2 command_every / rate_hz):\na command would end before the next one comes.",
        ),
        (
            safety.chunk_timeout < between,
            f"safety.chunk_timeout {safety.chunk_timeout:g} s is shorter than a command period ({between:g} s).",
        ),
        (
            safety.chunk_max_age <= safety.action_delay,
            f"safety.chunk_max_age {safety.chunk_max_age:g} s must exceed safety.action_delay "
            f"{safety.action_delay:g} s:\nevery chunk would be too old.",
        ),
        (
            safety.joint_timeout < period,
            f"safety.joint_timeout {safety.joint_timeout:g} s is shorter than a tick ({period:g} s = 1 / rate_hz).",
        ),
        (
            safety.joint_stop <= safety.joint_timeout,
            f"safety.joint_stop {safety.joint_stop:g} s (STOPPED) must exceed safety.joint_timeout "
            f"{safety.joint_timeout:g} s (HOLD).",
        ),
        (
            safety.deadman_required and safety.deadman_timeout <= HEARTBEAT,
            f"safety.deadman_timeout {safety.deadman_timeout:g} s must exceed {HEARTBEAT:g} s, the period at which a "
            "deadman is published.",
        ),
        (
            safety.estop_required and safety.estop_timeout <= HEARTBEAT,
            f"safety.estop_timeout {safety.estop_timeout:g} s must exceed {HEARTBEAT:g} s, its heartbeat's period.",
        ),
    ]
    return [text for broken, text in rules if broken]


def _check_tracking(profile: "Profile", limits: Limits, path: Path) -> None:
    steps, error = limits.max_step[: len(profile.joints)], profile.safety.tracking_error
    if error >= steps.min():
        raise ConfigError(
            f"{path}: safety.tracking_error {error:g} is not below the max_step of "
            f"{limits.names[int(steps.argmin())]}, {steps.min():g}:\na command is never further ahead, so an arm that "
            "does not follow would go unnoticed."
        )


def _check_gripper(gripper: "Gripper", limits: Limits, path: Path) -> None:
    low, high = limits.low[-1], limits.high[-1]
    for key in ("open", "closed"):
        if not low - 1e-6 <= getattr(gripper, key) <= high + 1e-6:
            raise ConfigError(
                f"{path}: gripper.{key} is {getattr(gripper, key):g}; the limits of {gripper.joint} are "
                f"[{low:g}, {high:g}]."
            )
    if gripper.open == gripper.closed:
        raise ConfigError(f"{path}: gripper.open and gripper.closed are both {gripper.open:g}.")


def profile_warnings(profile: "Profile", limits: Limits) -> list[str]:
    """What a profile that is accepted leaves to chance, most dangerous first."""
    safety, arm = profile.safety, len(profile.joints)
    between = safety.command_every / safety.rate_hz
    time, _ = limits.braking(limits.velocity)
    wide = [name for name, low, high in zip(profile.joints, limits.low, limits.high, strict=False) if high - low > 6.3]
    rules = [
        (
            profile.adapter == "forward_velocity",
            "forward_velocity: the arm keeps moving when the bridge dies; the controller has no timeout",
        ),
        (
            profile.adapter == "servo_twist",
            "servo_twist: joint limits are left to MoveIt Servo; the bridge bounds the tool's speed and place only",
        ),
        (not safety.deadman_required, "no deadman: the arm moves with nobody holding a button"),
        (not safety.estop_required, "no e-stop heartbeat: the loss of the operator's stop goes unnoticed"),
        (profile.workspace is None, "no workspace: nothing but the joints' ranges keeps the tool off the table"),
        (
            profile.limit_scale > 0.5,
            f"limit_scale {profile.limit_scale:g}: first runs on an arm belong at 0.3 or below",
        ),
        (profile.position_margin == 0, "no position_margin: joints may go to their very limits"),
        *((True, f"{quantity} is an estimate: {text}") for quantity, text in profile.estimated.items()),
        (
            safety.chunk_horizon < 4 * between,
            f"safety.chunk_horizon {safety.chunk_horizon:g} s holds fewer than four command periods ({between:g} s): "
            "a few late commands stop the arm",
        ),
        (
            time[:arm].max() > safety.joint_stop,
            f"{limits.names[int(time[:arm].argmax())]} takes {time[:arm].max():.2f} s to stop from full speed, more "
            f"than safety.joint_stop ({safety.joint_stop:g} s)",
        ),
        (
            profile.policy.max_lead > limits.max_step[:arm].min(),
            f"policy.max_lead {profile.policy.max_lead:g} is above the smallest max_step "
            f"({limits.max_step[:arm].min():g}): targets will be clamped",
        ),
        (bool(wide), f"{', '.join(wide)} may turn more than once around: mind the cables"),
    ]
    return [text for doubtful, text in rules if doubtful]
