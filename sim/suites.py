"""The environments there are, by name. A new one is a file beside this and a line in `ENVIRONMENTS`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.datasets.store import EpisodeStore
from embodied.sim import experts, export_scene, gymnasium_task, metaworld_drawer, point_maze, robosuite_lift


@dataclasses.dataclass(frozen=True)
class Environment:
    """One simulated task.

    Attributes:
        make: `make(cameras=(...), image_size=64)` gives an object with Gymnasium's reset(seed) and step(action).
        behaviours: name -> class with `reset(seed) -> str` and `act(observation) -> (A,)`; drives `sim collect`.
        truth_keys: observation keys that `true_reward` and `true_progress` take, (F, ...) each.
        true_reward: the task's own shaped reward per frame, (F,).
        true_progress: how far the task has come per frame, (F,) in [0, 1].
        duration: of an episode on the robot [s]; 0 without one.
        export_scene: writes the scene folder that the MuJoCo robot loads (folder, cameras, image_size, seed).
        initial_states: simulator state (qpos, qvel, ctrl) per seed, those that `reset(seed)` starts from.
        succeeded: the success rule from poses by name, (7,) each, as the MuJoCo robot publishes them.
    """

    make: Callable[..., Any]
    behaviours: Mapping[str, Callable[[Any], Any]]
    truth_keys: tuple[str, ...]
    true_reward: Callable[..., np.ndarray]
    true_progress: Callable[..., np.ndarray]
    duration: float
    export_scene: Callable[..., Path]
    initial_states: Callable[[Sequence[int]], list[dict[str, list[float]]]]
    succeeded: Callable[[Mapping[str, np.ndarray]], bool]


def _cube_is_lifted(poses: Mapping[str, np.ndarray]) -> bool:
    return "cube" in poses and bool(robosuite_lift.is_success(np.asarray(poses["cube"][:3])))


ENVIRONMENTS: dict[str, Environment] = {
    "robosuite/Lift": Environment(
        make=robosuite_lift.LiftEnv,
        behaviours={
            "scripted": experts.ScriptedPolicy,
            "expert": experts.ScriptedExpert,
            "random": experts.RandomPolicy,
            "wander": functools.partial(experts.ScriptedPolicy, behaviour="wander"),
            "play": functools.partial(experts.ScriptedPolicy, behaviour="play"),
        },
        truth_keys=robosuite_lift.REWARD_KEYS,
        true_reward=robosuite_lift.shaped_reward,
        true_progress=robosuite_lift.true_progress,
        duration=robosuite_lift.HORIZON * robosuite_lift.CONTROL_DT,
        export_scene=export_scene.export_scene,
        initial_states=export_scene.initial_states,
        succeeded=_cube_is_lifted,
    ),
    metaworld_drawer.NAME: Environment(
        make=metaworld_drawer.DrawerEnv,
        behaviours={
            "scripted": metaworld_drawer.ScriptedDrawer,
            "expert": functools.partial(metaworld_drawer.ScriptedDrawer, behaviour="expert"),
            "random": metaworld_drawer.RandomDrawer,
            "wander": functools.partial(metaworld_drawer.ScriptedDrawer, behaviour="wander"),
        },
        truth_keys=metaworld_drawer.REWARD_KEYS,
        true_reward=metaworld_drawer.shaped_reward,
        true_progress=metaworld_drawer.true_progress,
        duration=metaworld_drawer.HORIZON * metaworld_drawer.CONTROL_DT,
        export_scene=metaworld_drawer.no_robot,
        initial_states=metaworld_drawer.no_robot,
        succeeded=metaworld_drawer.no_robot,
    ),
    point_maze.NAME: Environment(
        make=point_maze.PointMazeEnv,
        behaviours={
            "scripted": point_maze.Waypoints,
            "random": gymnasium_task.UniformActions,
            **{name: functools.partial(point_maze.Waypoints, behaviour=name) for name in point_maze.BEHAVIOURS},
        },
        truth_keys=point_maze.REWARD_KEYS,
        true_reward=point_maze.shaped_reward,
        true_progress=point_maze.shaped_reward,
        duration=point_maze.HORIZON * point_maze.CONTROL_DT,
        export_scene=point_maze.no_robot,
        initial_states=point_maze.no_robot,
        succeeded=point_maze.no_robot,
    ),
}


def environment(env_id: str) -> Environment:
    """Look up by name, here and among Gymnasium's; an unknown one is an InputError with the list."""
    if env_id in ENVIRONMENTS:
        return ENVIRONMENTS[env_id]
    if gymnasium_task.find(env_id) is None:
        raise InputError(
            f"--env: no environment '{env_id}'.{suggest(env_id, ENVIRONMENTS)}\nNor does Gymnasium know that id."
        )
    return Environment(
        make=functools.partial(gymnasium_task.GymnasiumEnv, env_id),
        behaviours={"random": gymnasium_task.UniformActions},
        truth_keys=gymnasium_task.REWARD_KEYS,
        true_reward=gymnasium_task.task_reward,
        true_progress=gymnasium_task.no_progress,
        duration=0.0,
        export_scene=gymnasium_task.no_robot,
        initial_states=gymnasium_task.no_robot,
        succeeded=gymnasium_task.no_robot,
    )


def _truth(env_id: str, store: EpisodeStore) -> dict[str, np.ndarray]:
    keys = environment(env_id).truth_keys
    if missing := [k for k in keys if k not in store.spec.observations]:
        raise InputError(
            f"{store.path}: no observation '{missing[0]}', which the true reward of {env_id} is computed from.\n"
            "Only a store made by 'embodied sim collect' carries the simulator's state."
        )
    return {key: store.read(f"observation/{key}", 0, store.num_frames) for key in keys}


def true_reward(env_id: str, store: EpisodeStore) -> np.ndarray:
    """(F,) float32: the simulator's shaped reward of every frame of a store that `sim collect` made."""
    return environment(env_id).true_reward(**_truth(env_id, store)).astype(np.float32)


def true_progress(env_id: str, store: EpisodeStore) -> np.ndarray:
    """(F,) float32 in [0, 1]: the simulator's progress of every frame, what a label's ranks are held against."""
    return environment(env_id).true_progress(**_truth(env_id, store)).astype(np.float32)
