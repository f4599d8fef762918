"""Sentences for a frame of Lift, written from the simulator's state: what an in-domain CLIP is trained on."""

import numpy as np

from embodied.sim.robosuite_lift import TABLE_HEIGHT

# Stage -> ways to say it. Upper bounds of distance hand-cube [m] first, then the grasp and heights above the table [m].
NEARNESS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.03, ("the gripper surrounds the red cube", "the gripper is around the red cube on the table")),
    (0.06, ("the gripper is very close to the red cube", "the gripper almost touches the red cube")),
    (0.10, ("the gripper is close to the red cube", "the gripper is near the red cube")),
    (0.15, ("the gripper is some way from the red cube", "the gripper hovers at a distance from the red cube")),
    (0.20, ("the gripper is far from the red cube", "the gripper is far away from the red cube")),
    (np.inf, ("the gripper is very far from the red cube", "the gripper is nowhere near the red cube")),
)
HEIGHTS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.01, ("the gripper grasps the red cube on the table", "the gripper holds the red cube on the table")),
    (0.04, ("the gripper lifts the red cube just off the table", "the red cube is lifted slightly above the table")),
    (0.09, ("the gripper lifts the red cube above the table", "the red cube is lifted above the table")),
    (np.inf, ("the gripper lifts the red cube high above the table", "the red cube is lifted high above the table")),
)
NUM_STAGES = len(NEARNESS) + len(HEIGHTS)


def stage(cube_position: np.ndarray, eef_position: np.ndarray, cube_grasped: np.ndarray) -> np.ndarray:
    """(F,) int64: 0 is very far, NUM_STAGES - 1 lifted high. Arguments as `robosuite_lift.true_progress`, (F, ...)."""
    distance = np.linalg.norm(eef_position - cube_position, axis=-1)
    height = cube_position[..., 2] - TABLE_HEIGHT - 0.021
    near = np.searchsorted([bound for bound, _ in NEARNESS], distance)
    up = np.searchsorted([bound for bound, _ in HEIGHTS], height)
    return np.where(cube_grasped[..., 0] > 0, len(NEARNESS) + up, len(NEARNESS) - 1 - near)


def wordings(stage_index: int) -> tuple[str, ...]:
    """The sentences that are true at a stage."""
    if stage_index >= len(NEARNESS):
        return HEIGHTS[stage_index - len(NEARNESS)][1]
    return NEARNESS[len(NEARNESS) - 1 - stage_index][1]
