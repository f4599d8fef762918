"""D4RL HDF5: all steps of all episodes in flat arrays (Fu et al. 2020; keys of `d4rl.offline_env.OfflineEnv`).

An episode ends at a terminal or a timeout; terminal beats timeout where a step has both. What follows the last end is
kept as a truncated episode. With `next_observations` each episode gains its final observation; without, the last step
of a truncated episode has no successor and is not `step_valid`, as D4RL's own loader drops it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.source import (
    Source,
    as_text,
    check_options,
    is_hdf5,
    is_image,
    open_hdf5,
    readable,
    with_final_row,
)

REQUIRED = ("observations", "actions")


def sniff(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with readable(path), open_hdf5(path) as file:
        return all(isinstance(file.get(key), h5py.Dataset) for key in (*REQUIRED, "terminals"))


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a D4RL file. Raises InputError: truncated, keys missing or of different lengths."""
    check_options("d4rl", options)
    file = open_hdf5(path)
    with readable(path):
        _check_lengths(path, file)
        terminals = np.asarray(file["terminals"][:]).reshape(-1).astype(bool)
        timeouts = np.asarray(file["timeouts"][:]).reshape(-1).astype(bool) if "timeouts" in file else terminals & False
        bounds, left_over = _episodes(terminals, timeouts, has_next="next_observations" in file)
        if not bounds:
            raise InputError(f"{path} holds no episode of one step or more.")
        infos = _infos(file)
        spec = _spec(file, infos)
        attributes = {
            "attributes": {key: _plain(value) for key, value in file.attrs.items()},
            "steps_after_last_end": int(left_over),
            "terminal_and_timeout": int((terminals & timeouts).sum()),
            "final_observation_repeated": sorted(infos) if "next_observations" in file else [],
            "timestamps": "absent in the source: zero",
        }
        names = (*REQUIRED, "rewards", "next_observations", *infos.values())
        # Kept open from episode to episode: HDF5 forgets a dataset's decoded chunks when its object goes.
        arrays = {name: file[name] for name in names if name in file}
    privileged = {key: arrays[name] for key, name in infos.items()}
    ends_task = [bool(terminals[stop - 1]) for _, stop in bounds]
    return Source(
        spec, len(bounds), lambda i: _load(path, arrays, privileged, i, bounds[i], ends_task[i], spec), attributes
    )


def _load(
    path: Path,
    arrays: dict[str, Any],
    privileged: dict[str, Any],
    index: int,
    bounds: tuple[int, int],
    ends_task: bool,
    spec: DatasetSpec,
) -> Episode:
    start, stop = bounds
    steps = stop - start
    with readable(path):
        observation = arrays["observations"][start:stop]
        vectors = {key: array[start:stop] for key, array in privileged.items()}
        actions = np.asarray(arrays["actions"][start:stop], np.float32)
        reward = np.asarray(arrays["rewards"][start:stop], np.float32).reshape(steps) if spec.has_reward else None
        if "next_observations" in arrays:
            observation = with_final_row(observation, arrays["next_observations"][stop - 1])
            vectors = {key: with_final_row(array, None) for key, array in vectors.items()}
    rows = len(observation)
    step_valid, terminated, truncated = end_flags(steps, rows, ends_task)
    if not spec.images:
        vectors["observation"] = observation
    return Episode(
        observations={key: np.asarray(array, np.float32) for key, array in vectors.items()},
        images={"image": observation} if spec.images else {},
        action=padded_last(actions, rows),
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.zeros(rows),
        reward=None if reward is None else padded_last(reward, rows),
        source_id=f"{path.name}/episode {index}",
    )


def _episodes(terminals: np.ndarray, timeouts: np.ndarray, has_next: bool) -> tuple[list[tuple[int, int]], int]:
    """[start, stop) of each episode, and the number of steps after the last end.

    A single cut step without a known successor holds no transition and is left out.
    """
    stops = np.flatnonzero(terminals | timeouts) + 1
    left_over = len(terminals) - (int(stops[-1]) if len(stops) else 0)
    if left_over:
        stops = np.append(stops, len(terminals))
    starts = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
    pairs = [(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
    return [(a, b) for a, b in pairs if b - a > 1 or has_next or terminals[b - 1]], left_over


def _spec(file: Any, infos: dict[str, str]) -> DatasetSpec:
    observations = file["observations"]
    pictures = is_image(observations.shape, observations.dtype)
    vectors = {} if pictures else {"observation": ArraySpec(tuple(observations.shape[1:]))}
    vectors |= {key: ArraySpec(tuple(file[name].shape[1:]), privileged=True) for key, name in infos.items()}
    environment = next((as_text(file.attrs[key]) for key in ("env_id", "env_name", "env") if key in file.attrs), "")
    return DatasetSpec(
        observations=vectors,
        images={"image": ArraySpec(tuple(observations.shape[1:]), "uint8")} if pictures else {},
        action=ActionSpec(tuple(file["actions"].shape[1:]), control_mode="raw"),
        environment=environment,
        has_reward="rewards" in file,
    )


def _infos(file: Any) -> dict[str, str]:
    """Key in the store -> numeric per-step array below `infos/`. `infos/qpos` becomes `info_qpos`, privileged."""
    steps = len(file["actions"])
    return {
        f"info_{key}": f"infos/{key}"
        for key, dataset in file.get("infos", {}).items()
        if isinstance(dataset, h5py.Dataset) and dataset.shape[:1] == (steps,) and dataset.dtype.kind in "fiub"
    }


def _check_lengths(path: Path, file: Any) -> None:
    if missing := [key for key in (*REQUIRED, "terminals") if key not in file]:
        raise InputError(f"{path} is not in D4RL's layout: it lacks {', '.join(missing)}.")
    names = (*REQUIRED, "terminals", "timeouts", "rewards", "next_observations")
    lengths = {key: len(file[key]) for key in names if key in file}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(f"{path}: arrays differ in length: {found}.")
    if file["actions"].ndim != 2 or file["actions"].dtype.kind not in "fiub":
        found = f"{file['actions'].dtype} {file['actions'].shape}"
        raise InputError(f"{path}: 'actions' must be numbers (N, A); found {found}.")
    if not lengths["actions"]:
        raise InputError(f"{path} has no actions: its arrays are empty.")


def _plain(value: Any) -> Any:
    """An HDF5 attribute as JSON can hold it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
