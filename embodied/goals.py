"""Goals at the front door: what of a store's frames is a goal to train on, and where a policy's goals come from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest

REWARD = "hindsight"  # the name under which --reward asks for what goals pay
SHARES = ("next", "future", "final", "random")


def check_goal_flags(goal: tuple[str, ...], hindsight: Mapping[str, Any], reward: str | None) -> None:
    """ConfigError where --goal, --hindsight and --reward contradict each other. `reward` None: of a clone."""
    if goal and reward not in (None, REWARD):
        raise ConfigError(f"--goal: a step is paid for reaching its goal; give --reward {REWARD}, not '{reward}'.")
    if reward == REWARD and not goal:
        raise ConfigError(f"--reward {REWARD} needs --goal: the observation keys, or images/<camera>, to reach.")
    if hindsight and not goal:
        raise ConfigError("--hindsight says how goals are drawn; give --goal too, the observation keys to reach.")


def with_goals(
    store: Any,
    data: Any,
    contract: Any,
    keys: tuple[str, ...],
    changes: Mapping[str, Any],
    cloning: bool,
    normalization: str = "standard",
) -> tuple:
    """Training data and contract of a policy that is told a goal, from those of one that is not.

    Args:
        keys: what a goal is made of: observation keys, seen by the policy or not, and `images/<camera>` of its camera.
        changes: to `Hindsight`; shares that are not named are 0 as soon as one is.
        cloning: rewards are not learned from.
        normalization: of keys that the policy does not see itself.

    Raises:
        InputError: an unknown key. ConfigError: `Hindsight` refuses.
    """
    from embodied.datasets.goals import HINDSIGHT, Goals
    from embodied.datasets.transitions import observation_matrix
    from embodied.policies.configure import configure
    from embodied.policies.contract import input_sizes
    from embodied.policies.normalize import apply_statistics, fit_statistics

    spec, pictures = store.spec, {f"images/{camera}": array for camera, array in contract.images.items()}
    known = {**spec.observations, **pictures}
    for key in keys:
        if key not in known:
            why = " Pictures as goals need --encoder." if key.startswith("images/") and not pictures else ""
            raise InputError(f"--goal: {store.path} has no '{key}' to reach.{suggest(key, known)}{why}")
    if set(SHARES) & set(changes):
        changes = {**dict.fromkeys(SHARES, 0.0), **changes}
    hindsight = configure({"": HINDSIGHT["cloning" if cloning else "value"]}, "", changes, "--hindsight")
    if hindsight.tolerance and any(key in pictures for key in keys):
        raise ConfigError("--hindsight tolerance: pictures have no distance in SI units; leave it at 0, or drop them.")
    embedding = len(contract.normalizer[next(iter(pictures))]["mean"]) if pictures else 0
    seen, start = {}, (contract.stack - 1) * data.observations.shape[1] // contract.stack
    for key, size in input_sizes({**contract.observations, **pictures}, embedding).items():  # of the newest observation
        seen[key] = slice(start, start + size)
        start += size
    normalizer, columns, rows = dict(contract.normalizer), [], np.union1d(data.frame, data.next_frame)
    for key in keys:
        if key in seen:
            columns.append(data.observations[:, seen[key]])
            continue
        values = observation_matrix(store, [key])
        normalizer[key] = fit_statistics(values[rows], normalization)
        columns.append(apply_statistics(values, normalizer[key]))
    scale = np.concatenate([normalizer[key]["std"] for key in keys])
    goals = Goals(np.ascontiguousarray(np.concatenate(columns, 1)), scale.astype(np.float32), hindsight)
    contract = dataclasses.replace(contract, goal={key: known[key] for key in keys}, normalizer=normalizer)
    return dataclasses.replace(data, goals=goals), contract


def goals_of(source: Path, spec: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """The goals that --goal names: that of a file, or the last frames of a store's episodes.

    Of a store only episodes that succeeded count, or all where none is known to have; episodes without a camera that
    the goals are seen through are left out.

    Args:
        spec: of the goal, from the policy's contract.

    Raises:
        InputError: nothing there, no goal in it, or a store without a key.
    """
    from embodied.datasets.store import EpisodeStore
    from embodied.policies.goal import read_goal

    if not (source / "zarr.json").exists():
        return [read_goal(source)]
    store = EpisodeStore(source)
    cameras = [key.removeprefix("images/") for key in spec if key.startswith("images/")]
    known = [*store.spec.observations, *(f"images/{camera}" for camera in store.spec.images)]
    for key in spec:
        if key not in known:
            raise InputError(
                f"--goal: {store.path} has no '{key}', which the policy's goals are made of.{_list(known)}"
            )
    usable = np.logical_and.reduce([np.ones(store.num_episodes, bool), *(store.has_camera(c) for c in cameras)])
    succeeded = usable & (store.success == 1)
    episodes = np.flatnonzero(succeeded if succeeded.any() else usable)
    if len(episodes) == 0:
        raise InputError(f"--goal: {store.path} has no episode with pictures of {', '.join(cameras)}.")
    rows = (store.episode_start + store.episode_length - 1)[episodes]
    values = {key: store.read_rows(f"observation/{key}", rows) for key in spec}
    return [{key: np.asarray(value[i]) for key, value in values.items()} for i in range(len(rows))]


def _list(names: list[str]) -> str:
    return f" It has: {', '.join(names)}."
