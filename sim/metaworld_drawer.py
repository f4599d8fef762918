"""Meta-World v3's drawer-open: a Sawyer hand pulls a drawer open by its handle. Needs the extra `metaworld`.

Scene, placement, observation, shaped reward and success flag are Meta-World's. Two things differ. An episode has
HORIZON steps, not 500: Meta-World's own scripted policy needs about 90. It never terminates: success is reported in
`info`. Seeds give the drawer's place, which Meta-World draws from a state of its own.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.sim.render import Pictured, check_views, load_mujoco

NAME, TASK = "metaworld/drawer-open", "drawer-open-v3"
CONTROL_DT = 0.0125  # [s]
HORIZON = 200  # control steps in an episode
ACTION_SCALE = 0.01  # action 1.0 moves the hand's target by this much in one control step [m]
MAX_REWARD = 10.0
HANDLE_DEPTH = 0.17  # the closed drawer's handle lies this far before its body's origin, along y [m]
CAMERAS = {"wrist": "gripperPOV", "side": "corner4", "corner": "corner3", "top": "topview"}
WORKSPACE = np.array([[-0.2, 0.5, 0.05], [0.2, 0.85, 0.25]])  # where a wandering hand goes [m]
REWARD_KEYS = ("task_reward",)
_HALF = (
    "hand_x",
    "hand_y",
    "hand_z",
    "gripper",
    "handle_x",
    "handle_y",
    "handle_z",
    *(f"object_{i}" for i in range(11)),
)


def _load() -> tuple[Any, Any]:
    """Meta-World's class of the task and its scripted policy for it."""
    load_mujoco()  # chooses the GL backend before gymnasium imports mujoco
    warnings.filterwarnings("ignore", r"Constant\(s\) may be too high")  # at every start: its gain is meant to be
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise MissingExtraError("metaworld", "metaworld", f"the environment {NAME}") from error
    return ALL_V3_ENVIRONMENTS[TASK], ENV_POLICY_MAP[TASK]


def dataset_spec(cameras: Sequence[str], image_size: int) -> DatasetSpec:
    """The arrays this environment gives per frame."""
    state = (*_HALF, *(f"last_{name}" for name in _HALF), "goal_x", "goal_y", "goal_z")
    observations = {
        "state": ArraySpec((39,), names=state),
        "task_reward": ArraySpec((1,), low=(0.0,), high=(MAX_REWARD,), privileged=True),
    }
    action = ActionSpec(
        (4,),
        names=("x", "y", "z", "gripper"),
        low=(-1.0,) * 4,
        high=(1.0,) * 4,
        unit="m, effort",
        control_mode="end_effector_delta",
        scale=(ACTION_SCALE,) * 3 + (1.0,),
    )
    images = {camera: ArraySpec((image_size, image_size, 3), dtype="uint8") for camera in cameras}
    return DatasetSpec(observations, images, action, CONTROL_DT, NAME)


class DrawerEnv(Pictured):
    """Gymnasium's reset and step over Meta-World's task.

    Args:
        cameras: which of CAMERAS to render at every step; none is fastest.
        image_size: height and width [px].
    """

    horizon = HORIZON
    camera_names = CAMERAS

    def __init__(self, cameras: Sequence[str] = ("side",), image_size: int = 64) -> None:
        check_views(NAME, CAMERAS, cameras, image_size)
        task, _ = _load()
        self.task = task()
        # What set_task does with a pickled task: the place of the drawer comes from outside.
        self.task._freeze_rand_vec, self.task._set_task_called = True, True
        self.model, self.data = self.task.model, self.task.data
        self.spec = dataset_spec(cameras, image_size)
        self.cameras, self._size = tuple(cameras), image_size

    def drawer_place(self, seed: int) -> np.ndarray:
        """(3,) [m] where `reset(seed)` puts the drawer: uniform over Meta-World's range."""
        space = self.task._random_reset_space
        return np.random.Generator(np.random.Philox(key=[seed, 0])).uniform(space.low, space.high)

    def reset(self, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; equal seeds give equal episodes."""
        self.task._last_rand_vec = self.drawer_place(seed)
        self.state, _ = self.task.reset()
        self.steps = 0
        reward, _ = self.task.evaluate_state(self.state, np.zeros(4, np.float32))
        return self._observe(reward), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move the hand's target by one action, (4,) in [-1, 1]; the last entry closes the gripper when positive."""
        self.state, reward, _, _, info = self.task.step(np.clip(np.asarray(action, np.float64), -1.0, 1.0))
        self.steps += 1
        success = bool(info["success"])
        return self._observe(reward), float(reward), False, self.steps >= HORIZON, {"success": success}

    def opening(self) -> float:
        """How far the drawer is open [m]; it counts as opened from about 0.16 on."""
        return float(self.task.obj_init_pos[1] - HANDLE_DEPTH - self.state[5])

    def _observe(self, reward: float) -> dict[str, np.ndarray]:
        observation = {"state": self.state.astype(np.float32), "task_reward": np.array([reward], np.float32)}
        for camera in self.cameras:
            observation[f"images/{camera}"] = self.render(camera)
        return observation


def shaped_reward(task_reward: np.ndarray) -> np.ndarray:
    """(F, 1) -> (F,): Meta-World's reward in [0, 10], half for the hand's nearness to the handle, half for opening."""
    return task_reward[..., 0]


def true_progress(task_reward: np.ndarray) -> np.ndarray:
    """(F, 1) -> (F,) in [0, 1]: the reward's share of its maximum."""
    return np.clip(task_reward[..., 0] / MAX_REWARD, 0.0, 1.0)


def no_robot(*_: Any, **__: Any) -> Any:
    """InputError: this task is no scene for the robot on the ROS 2 graph."""
    raise InputError(
        f"{NAME} has no robot on the ROS 2 graph: its hand is moved by a mocap body.\n"
        f"Try the policy with 'embodied eval {NAME}'."
    )


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How an episode is driven.

    Attributes:
        offset: how far beside the handle, along x, the hand aims [m].
        noise: standard deviation of the correlated disturbance of each action.
        let_go: the hand rises from the handle when the drawer is open this far [m]; infinite: never.
        aimless: the hand wanders between random points and never looks at the drawer.
    """

    offset: float = 0.0
    noise: float = 0.15
    let_go: float = np.inf
    aimless: bool = False


# As for Lift: a minority succeeds; the rest miss, let go, fumble or wander.
BEHAVIOURS: dict[str, Behaviour] = {
    "expert": Behaviour(),
    "miss": Behaviour(offset=0.11),
    "let_go": Behaviour(let_go=0.03),
    "fumble": Behaviour(offset=0.03, noise=1.0),
    "wander": Behaviour(noise=0.3, aimless=True),
}
MIXTURE: dict[str, float] = {"expert": 0.20, "miss": 0.25, "let_go": 0.20, "fumble": 0.15, "wander": 0.20}


class ScriptedDrawer:
    """Drives one episode of `DrawerEnv` after a `Behaviour`, by Meta-World's own scripted policy where it has an aim.

    Args:
        env: read for the simulator's state.
        behaviour: a key of BEHAVIOURS, or `mixed`: one is drawn per episode from MIXTURE.
    """

    def __init__(self, env: DrawerEnv, behaviour: str = "mixed") -> None:
        self._env, self._wanted = env, behaviour
        _, policy = _load()
        self._policy = policy()

    def reset(self, seed: int) -> str:
        """Draw this episode's behaviour and disturbances; returns the behaviour's name."""
        self._rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        name = self._wanted
        if name == "mixed":
            name = str(self._rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
        self._behaviour = BEHAVIOURS[name]
        self._side = float(self._rng.choice([-1.0, 1.0]))
        self._disturbance, self._point, self._gone = np.zeros(4), None, False
        return name

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """(4,) action in [-1, 1] for the environment's present state."""
        del observation
        behaviour = self._behaviour
        action = self._wander() if behaviour.aimless else self._pull()
        draw = self._rng.normal(0.0, behaviour.noise, 4)
        self._disturbance = 0.8 * self._disturbance + 0.6 * draw
        return np.clip(action + self._disturbance, -1.0, 1.0).astype(np.float32)

    def _pull(self) -> np.ndarray:
        state = self._env.state.copy()
        self._gone |= self._env.opening() > self._behaviour.let_go
        if self._gone:
            return np.array([0.0, 0.0, 1.0, -1.0])
        state[4] += self._side * self._behaviour.offset
        return np.clip(self._policy.get_action(state), -1.0, 1.0)

    def _wander(self) -> np.ndarray:
        hand, rng = self._env.state[:3], self._rng
        if self._point is None or np.linalg.norm(self._point - hand) < 0.03 or rng.random() < 0.03:
            self._point, self._grip = rng.uniform(*WORKSPACE), rng.uniform(-1.0, 1.0)
        return np.array([*np.clip(10.0 * (self._point - hand), -1.0, 1.0), self._grip])


class RandomDrawer:
    """Uniform actions, held for a few steps: the floor."""

    def __init__(self, env: DrawerEnv) -> None:
        del env

    def reset(self, seed: int) -> str:
        self._rng, self._left = np.random.Generator(np.random.Philox(key=[seed, 1])), 0
        return "random"

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        del observation
        if self._left == 0:
            self._action, self._left = self._rng.uniform(-1.0, 1.0, 4).astype(np.float32), 4
        self._left -= 1
        return self._action
