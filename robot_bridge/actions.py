"""What a bundle's actions mean: from actions to absolute targets that the safety process is offered.

    joint_position_delta   targets += scale * action                 joints, any joint adapter
    joint_position         targets = scale * action                  joints, any joint adapter
    joint_velocity         targets += scale * action * control_dt    joints, any joint adapter
    end_effector_delta     targets += scale * action                 tool axes x, y, z, rx, ry, rz; adapter servo_twist

The gripper's target moves towards open (action <= 0) or closed (action > 0) by at most its scale per step; only
`joint_position` takes its action as a position. An empty scale is 1: the actions are in SI units.
"""

import numpy as np

from embodied.contracts.errors import BundleError, suggest
from embodied.contracts.protocols import Policy
from embodied.robot_bridge.adapter_servo_twist import AXES
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.profile import Profile

JOINT_MODES = ("joint_position_delta", "joint_position", "joint_velocity")
CONTROL_MODES = (*JOINT_MODES, "end_effector_delta")


def target_names(profile: Profile) -> tuple[str, ...]:
    """What a chunk's columns are called: joints, or with servo_twist the tool's axes, and then the gripper's joint."""
    if profile.adapter != "servo_twist":
        return profile.all_joints
    return AXES + profile.all_joints[len(profile.joints) :]


def check_action(policy: Policy, profile: Profile) -> None:
    """BundleError, naming what is wrong and what to do, unless this robot can do what the bundle's actions say."""
    action, names = policy.action_spec, target_names(profile)
    mode = action.control_mode
    if mode not in CONTROL_MODES:
        raise BundleError(
            f"The bundle's actions are '{mode}': the bridge cannot know what they do to a robot."
            f"{suggest(mode, CONTROL_MODES)}\nTrain on a dataset whose action spec names one of these control modes."
        )
    if (mode == "end_effector_delta") != (profile.adapter == "servo_twist"):
        fitting = "servo_twist" if mode == "end_effector_delta" else "jtc, forward_position or servo_jog"
        raise BundleError(
            f"The bundle's actions are '{mode}'; profile {profile.name} has adapter {profile.adapter}.\n"
            f"Use a profile with adapter {fitting}, or a bundle with other actions."
        )
    if action.shape != (len(names),):
        raise BundleError(f"The bundle's action has shape {action.shape}; profile {profile.name} has {len(names)}.")
    if mode != "end_effector_delta" and tuple(action.names) != names:
        raise BundleError(
            f"The bundle's action is {', '.join(action.names) or '(unnamed)'};\n"
            f"profile {profile.name} has {', '.join(names)}."
        )
    scale = np.asarray(action.scale, np.float64)
    if len(scale) not in (0, len(names)) or not np.isfinite(scale).all():
        raise BundleError(f"The bundle's action has {len(names)} elements and the scales {list(action.scale)}.")


class Targets:
    """Absolute targets from actions, with the arithmetic of the environment that the data came from.

    Attributes:
        current: (J,) last target, or None before `start`.
    """

    def __init__(self, policy: Policy, profile: Profile, limits: Limits) -> None:
        action = policy.action_spec
        self._mode, self._dt = action.control_mode, policy.control_dt
        self._scale = np.asarray(action.scale if len(action.scale) else np.ones(action.shape), np.float64)
        # SI actions have no natural bound; a scaled action is at most 1, as it was in training.
        self._bound = 1.0 if len(action.scale) else np.inf
        self._arm = len(target_names(profile)) - bool(profile.gripper)
        self._gripper, self._limits, self._max_lead = profile.gripper, limits, profile.policy.max_lead
        self._rows: np.ndarray | None = None
        self.current: np.ndarray | None = None

    def start(self, position: np.ndarray) -> None:
        """From (J,) where the robot is commanded to stand."""
        self.current, self._rows = np.array(position, np.float64), None

    def passed(self, steps: int) -> None:
        """So many control periods went by since the last chunk: as many of its actions count as done, the first does
        in any case. An inference that is slower than the control rate leaves more than one behind."""
        if self._rows is not None:
            self.current = self._rows[min(max(steps, 1), len(self._rows)) - 1]

    def apply(self, actions: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Targets (K, J) after each of the actions (K, J); the first becomes `current`.

        Joint targets that are reached by steps stay within `max_lead` of the measured joints, so that nothing winds up
        against a contact.

        Args:
            measured: (J,) joints; unused with end_effector_delta, whose targets the safety process bounds.
        """
        assert self.current is not None
        target, rows = self.current, []
        for action in np.clip(np.asarray(actions, np.float64), -self._bound, self._bound):
            target = self._limits.clip_position(self._next(target, action, measured))
            rows.append(target)
        self._rows = np.stack(rows)
        self.current = self._rows[0]
        return self._rows

    def _next(self, target: np.ndarray, action: np.ndarray, measured: np.ndarray) -> np.ndarray:
        arm = self._arm
        if self._mode == "joint_position":
            return self._scale * action
        wanted = target + self._scale * action * (self._dt if self._mode == "joint_velocity" else 1.0)
        if self._mode != "end_effector_delta":
            wanted[:arm] = np.clip(wanted[:arm], measured[:arm] - self._max_lead, measured[:arm] + self._max_lead)
        if self._gripper:
            goal = self._gripper.closed if action[arm] > 0 else self._gripper.open
            wanted[arm] = target[arm] + np.clip(goal - target[arm], -self._scale[arm], self._scale[arm])
        return wanted
