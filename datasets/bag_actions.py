"""From what a robot was commanded to the actions that say the same: the reverse of what the bridge does with actions.

    joint_position_delta   action = (target - target before) / scale
    joint_position         action = target / scale
    joint_velocity         action = (target - target before) / (scale * control_dt)

An empty scale is 1. Scaled actions are clipped to [-1, 1], as they are when a policy gives them. A gripper's action is
its direction, as in `sim`: positive closes; where it does not move, it is the sign that keeps it there. Only
`joint_position` has it as a position.
"""

import numpy as np

from embodied.contracts.specs import ActionSpec, DatasetSpec

CONTROL_MODES = ("joint_position_delta", "joint_position", "joint_velocity")


def actions_of(targets: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(N, A) actions from the targets (N + 1, A) before the first and after each of N steps."""
    action = spec.action
    assert action is not None
    scale = _scale(action)
    if action.control_mode == "joint_position":
        return _bounded(targets[1:] / scale, action).astype(np.float32)
    period = spec.control_dt if action.control_mode == "joint_velocity" else 1.0
    actions = np.diff(targets, axis=0) / (scale * period)
    gripper = spec.observations.get("gripper_position")
    for column, name in enumerate(action.names):
        if gripper is not None and name in gripper.names:
            actions[:, column] = _gripper(targets[:, column], float(scale[column]), gripper.low, gripper.high)
    return _bounded(actions, action).astype(np.float32)


def _scale(action: ActionSpec) -> np.ndarray:
    return np.asarray(action.scale if len(action.scale) else np.ones(action.shape), np.float64)


def _bounded(actions: np.ndarray, action: ActionSpec) -> np.ndarray:
    return np.clip(actions, -1.0, 1.0) if len(action.scale) else actions


def _gripper(targets: np.ndarray, scale: float, low: tuple[float, ...], high: tuple[float, ...]) -> np.ndarray:
    """(N,) direction of a gripper whose opening was commanded to be `targets` (N + 1,)."""
    found = 0.0 - np.clip(np.diff(targets) / scale, -1.0, 1.0)  # a closing gripper's opening shrinks
    if not (low and high):
        return found
    still = np.where(targets[1:] < (low[0] + high[0]) / 2, 1.0, -1.0)
    return np.where(np.abs(found) > 0.05, np.sign(found), still)
