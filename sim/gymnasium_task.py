"""Gymnasium's environments by their id (`Hopper-v5`), where policies of imported recordings are at home.

Observations are called as imports of Minari and D4RL call them: `observation`, or the keys of a dictionary, joined by
dots. `task_reward`, which no policy sees, is what the step to a frame was paid. Cameras are those of a MuJoCo model. An
environment of a package that must be imported first is named with it: `gymnasium_robotics:PointMaze_UMaze-v3`.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.sim.render import Pictured, check_views, load_mujoco

REWARD_KEYS = ("task_reward",)
SUCCESS = ("success", "is_success")  # what an environment's info may call it


def find(env_id: str) -> Any | None:
    """Gymnasium's entry of that id; None where there is none, or no Gymnasium."""
    try:
        import gymnasium
    except ImportError:
        return None
    package, _, name = env_id.rpartition(":")
    try:
        if package:
            importlib.import_module(package)
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError):
        return None


class GymnasiumEnv(Pictured):
    """Reset and step of one environment. `info["success"]` is None where it has no rule of success.

    Args:
        cameras: of its MuJoCo model, to render at every step; none is fastest.
        image_size: height and width [px].

    Raises:
        InputError: no numbers to see, other actions than numbers in [-1, 1], no time limit, no such camera.
    """

    ends_at_success = False  # evaluation sees the whole episode

    def __init__(self, env_id: str, cameras: Sequence[str] = (), image_size: int = 64) -> None:
        self._env = _make(env_id)
        seen = {key: ArraySpec(tuple(space.shape)) for key, space in _numbers(self._env.observation_space, env_id)}
        action = self._env.action_space
        flat = _is_box(action) and len(action.shape) == 1
        if not (flat and np.all(action.low == -1.0) and np.all(action.high == 1.0)):
            raise InputError(
                f"--env {env_id} takes {action} for actions. Policies act in [-1, 1] per number, and a recording does\n"
                "not say how its actions were scaled to that: such environments are not supported."
            )
        inner = self._env.unwrapped
        self.model, self.data = getattr(inner, "model", None), getattr(inner, "data", None)
        names = [self.model.camera(i).name for i in range(self.model.ncam)] if hasattr(self.model, "ncam") else []
        self.camera_names = {name: name for name in names if name}
        check_views(env_id, self.camera_names, cameras, image_size)
        self.cameras, self._size = tuple(cameras), image_size
        self.spec = DatasetSpec(
            {**seen, "task_reward": ArraySpec((1,), privileged=True)},
            {camera: ArraySpec((image_size, image_size, 3), dtype="uint8") for camera in cameras},
            ActionSpec(action.shape, low=(-1.0,) * action.shape[0], high=(1.0,) * action.shape[0]),
            _control_dt(self._env),
            env_id,
        )

    def reset(self, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; equal seeds give equal episodes."""
        observation, info = self._env.reset(seed=seed)
        return self._observe(observation, 0.0), {"success": _success(info)}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step with an action in [-1, 1]."""
        found, reward, terminated, truncated, info = self._env.step(np.asarray(action, self._env.action_space.dtype))
        after = self._observe(found, float(reward))
        return after, float(reward), bool(terminated), bool(truncated), {"success": _success(info)}

    def close(self) -> None:
        super().close()
        self._env.close()

    def _observe(self, observation: Any, reward: float) -> dict[str, np.ndarray]:
        found = {key: np.asarray(value, np.float32) for key, value in _leaves(observation)}
        found["task_reward"] = np.array([reward], np.float32)
        for camera in self.cameras:
            found[f"images/{camera}"] = self.render(camera)
        return found


class UniformActions:
    """Uniform random actions, what D4RL's `random` sets and its scores' zero were made with."""

    def __init__(self, env: GymnasiumEnv) -> None:
        self._size = env.spec.action.shape if env.spec.action else ()

    def reset(self, seed: int) -> str:
        self._rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        return "random"

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        del observation
        return self._rng.uniform(-1.0, 1.0, self._size).astype(np.float32)


def task_reward(task_reward: np.ndarray) -> np.ndarray:
    """(F, 1) -> (F,): what the step to each frame was paid."""
    return task_reward[..., 0]


def no_progress(**_: np.ndarray) -> np.ndarray:
    """InputError: how far a task has come is not known."""
    raise InputError("Environments of Gymnasium do not say how far a task has come; they only pay rewards.")


def no_robot(*_: Any, **__: Any) -> Any:
    """InputError: no scene for the robot on the ROS 2 graph."""
    raise InputError(
        "Environments of Gymnasium have no robot on the ROS 2 graph. Try 'embodied eval BUNDLE --env ...'."
    )


def _make(env_id: str) -> Any:
    load_mujoco()  # chooses the GL backend before gymnasium imports mujoco
    import gymnasium

    try:
        env = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError) as error:
        raise InputError(f"--env {env_id}: Gymnasium cannot make it: {error}") from error
    if env.spec is None or not env.spec.max_episode_steps:
        raise InputError(f"--env {env_id} has no time limit: an episode might never end. Register it with one.")
    return env


def _control_dt(env: Any) -> float:
    return float(getattr(env.unwrapped, "dt", 0.0))


def _is_box(space: Any) -> bool:
    return hasattr(space, "low") and np.issubdtype(space.dtype, np.floating)


def _numbers(space: Any, env_id: str) -> list[tuple[str, Any]]:
    parts = list(_leaves(space))
    for key, part in parts:
        if not _is_box(part):
            raise InputError(f"--env {env_id}: its {key} is {part}; policies here see real numbers.")
    return parts


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    value = getattr(value, "spaces", value)
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = ((str(i), part) for i, part in enumerate(value))
    else:
        yield name or "observation", value
        return
    for key, part in parts:
        yield from _leaves(part, f"{name}.{key}" if name else key)


def _success(info: Mapping[str, Any]) -> bool | None:
    return next((bool(info[key]) for key in SUCCESS if key in info), None)
