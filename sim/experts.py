"""Scripted behaviours for Lift: the one that succeeds, and the ones a real data set is mostly made of.

Each is a feedback law in end-effector space, turned into joint targets by damped least squares, so its actions are a
function of what is seen. None is told the true reward.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from embodied.sim.render import load_mujoco
from embodied.sim.robosuite_lift import JOINT_SCALE, TABLE_HEIGHT, LiftEnv

HOVER = 0.10  # height above the cube from which to descend [m]
ALIGNED = 0.012  # horizontal error below which the hand descends [m]
CUBE_REST = 0.821  # height of the cube's centre on the table [m]
LIFTED = 0.18  # height above the table to carry the cube to [m]
MAX_STEP = 0.03  # largest hand motion per control step [m]
DAMPING = 0.02  # of the least squares


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How an episode is driven.

    Attributes:
        offset: where the hand aims beside the cube, in the table's frame [m]: a hand-eye calibration that is off.
        noise: standard deviation of the correlated disturbance on the hand's motion, in steps of MAX_STEP.
        slip: probability per step that the gripper command is flipped for three steps.
        drop_height: the gripper opens when it has carried the cube this far up [m]; infinite: never.
        aimless: the hand wanders between random points, opening and closing as it likes.
        curious: probability that a wandering hand's next point is the cube, about; 0: it never looks at the cube.
        speed: factor on MAX_STEP.
    """

    offset: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.15
    slip: float = 0.0
    drop_height: float = np.inf
    aimless: bool = False
    curious: float = 0.0
    speed: float = 1.0


# A minority succeeds; the rest miss, drop, fumble or wander, as unlabelled recordings do.
BEHAVIOURS: dict[str, Behaviour] = {
    "expert": Behaviour(),
    "miss": Behaviour(offset=(0.01, 0.06)),
    "drop": Behaviour(drop_height=0.003, speed=0.35),
    "fumble": Behaviour(noise=0.5, slip=0.15, speed=0.8),
    "wander": Behaviour(noise=0.3, slip=0.05, aimless=True),
    "play": Behaviour(noise=0.3, aimless=True, curious=0.3),
}
MIXTURE: dict[str, float] = {"expert": 0.20, "miss": 0.35, "drop": 0.10, "fumble": 0.15, "wander": 0.20}


class ScriptedPolicy:
    """Drives one episode of `LiftEnv` after a `Behaviour`.

    Args:
        env: read for the simulator's state; a learned policy never sees it.
        behaviour: a key of BEHAVIOURS, or `mixed`: one is drawn per episode from MIXTURE.
    """

    def __init__(self, env: LiftEnv, behaviour: str = "mixed") -> None:
        self._env, self._wanted = env, behaviour

    def reset(self, seed: int) -> str:
        """Draw this episode's behaviour and disturbances; returns the behaviour's name."""
        self._rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        name = self._wanted
        if name == "mixed":
            name = str(self._rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
        self._behaviour = BEHAVIOURS[name]
        self._offset = np.array([*self._behaviour.offset, 0.0])
        self._disturbance = np.zeros(3)
        self._flipped, self._closing, self._opening, self._pause, self._point = 0, 0, 0, 0, None
        return name

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """(8,) action in [-1, 1] for the environment's present state."""
        del observation
        behaviour, rng = self._behaviour, self._rng
        motion, close = self._wander() if behaviour.aimless else self._pick()
        limit = MAX_STEP * behaviour.speed
        motion *= min(1.0, limit / (np.linalg.norm(motion) + 1e-9))
        self._disturbance = 0.8 * self._disturbance + 0.6 * rng.normal(0.0, behaviour.noise, 3)
        motion = motion + MAX_STEP * self._disturbance
        if self._flipped == 0 and rng.random() < behaviour.slip:
            self._flipped = 3
        if self._flipped:
            self._flipped -= 1
            close = not close
        return np.array([*self._joint_step(motion), 1.0 if close else -1.0], np.float32)

    def _pick(self) -> tuple[np.ndarray, bool]:
        """Hover, descend, close, lift; decided from where hand, cube and fingers are now."""
        env = self._env
        hand = env.data.site_xpos[env.grip_site]
        aim = env.data.xpos[env.cube_body] + self._offset
        opening = env.opening()
        relative = aim - hand
        horizontal = np.linalg.norm(relative[:2])
        self._closing = self._closing + 1 if opening < 0.06 else 0
        if env.data.xpos[env.cube_body][2] - CUBE_REST > self._behaviour.drop_height:
            self._opening = 4
        if self._opening:
            self._opening -= 1
            return np.zeros(3), False
        if self._closing >= 2 and (self._closing < 14 or env.grasped()):
            return np.array([0.0, 0.0, np.clip(TABLE_HEIGHT + LIFTED - hand[2], -MAX_STEP, MAX_STEP)]), True
        if self._closing >= 14:  # nothing in the hand after lifting: try again
            return np.array([0.0, 0.0, MAX_STEP]), False
        if horizontal < ALIGNED and relative[2] > -0.01:
            return np.zeros(3), True
        if horizontal < ALIGNED * (1 + 2 * (relative[2] > -0.05)):
            return np.array([*relative[:2], relative[2]]), False
        return np.array([*relative[:2], relative[2] + HOVER]), False

    def _wander(self) -> tuple[np.ndarray, bool]:
        env, rng = self._env, self._rng
        hand = env.data.site_xpos[env.grip_site]
        if self._pause:  # fingers need time to close on what lies between them
            self._pause -= 1
            return np.zeros(3), self._grip
        if self._point is None or np.linalg.norm(self._point - hand) < 0.02 or rng.random() < 0.05:
            self._point = rng.uniform([-0.14, -0.12, 0.83], [0.10, 0.12, 1.05])
            self._grip = bool(rng.random() < 0.4)
            if self._behaviour.curious and rng.random() < self._behaviour.curious:
                self._point = env.data.xpos[env.cube_body] + rng.normal(0.0, 0.01, 3)
            self._pause = 3 if self._behaviour.curious and self._grip else 0
        return self._point - hand, self._grip

    def _joint_step(self, motion: np.ndarray) -> np.ndarray:
        """(7,) action that moves the hand by `motion` [m] and keeps it pointing down."""
        env, mujoco = self._env, load_mujoco()
        position, rotation = np.zeros((3, env.model.nv)), np.zeros((3, env.model.nv))
        mujoco.mj_jacSite(env.model, env.data, position, rotation, env.grip_site)
        jacobian = np.concatenate([position[:, env.arm_dofs], rotation[:, env.arm_dofs]])
        frame = env.data.site_xmat[env.grip_site].reshape(3, 3)
        tilt = np.cross(frame[:, 2], [0.0, 0.0, -1.0])  # rotates the approach axis onto straight down
        forward = np.array([1.0, 0.0, 0.0]) if abs(frame[0, 0]) > abs(frame[1, 0]) else np.array([0.0, 1.0, 0.0])
        forward = forward * np.sign(forward @ frame[:, 0])
        twist = np.array([0.0, 0.0, np.cross(frame[:, 0], forward)[2]])
        wanted = np.concatenate([motion, 0.5 * (tilt + twist)])
        square = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
        step = jacobian.T @ np.linalg.solve(square, wanted)
        # Targets, not joints, are moved: take back the lag between both, or the hand drifts.
        lag = env.target[:7] - env.data.qpos[env.arm_qpos]
        return np.clip((step - 0.3 * lag) / JOINT_SCALE, -1.0, 1.0)


class ScriptedExpert(ScriptedPolicy):
    """The behaviour that succeeds, alone."""

    def __init__(self, env: LiftEnv) -> None:
        super().__init__(env, "expert")


class RandomPolicy:
    """Uniform actions, held for a few steps: the floor."""

    def __init__(self, env: LiftEnv) -> None:
        del env

    def reset(self, seed: int) -> str:
        self._rng, self._left = np.random.Generator(np.random.Philox(key=[seed, 1])), 0
        return "random"

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        del observation
        if self._left == 0:
            self._action, self._left = self._rng.uniform(-1.0, 1.0, 8).astype(np.float32), 4
        self._left -= 1
        return self._action
