"""D4RL HDF5: flat arrays over all steps (https://github.com/Farama-Foundation/D4RL/wiki/Tasks).

An episode ends after each step with `terminals` or `timeouts` set; if both are set, the terminal counts. What comes
after the last end is kept as a truncated episode. With `next_observations` each episode gains its final observation;
without, the last step of a truncated episode has no successor and is not `step_valid`, as D4RL's own loader drops it.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.finding import Finding
from embodied.datasets.hdf5 import (
    NumberArray,
    array_at,
    attributes,
    check_episode_bytes,
    find,
    group_at,
    is_hdf5,
    members,
    open_hdf5,
    readable,
    with_final_row,
)
from embodied.datasets.hdf5_pictures import PictureForm, frames, picture_form
from embodied.datasets.source import Source, check_options

REQUIRED = ("observations", "actions", "terminals")
OPTIONAL = ("timeouts", "rewards", "next_observations")
ROWS_AT_ONCE = 8192


def sniff(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with readable(path), open_hdf5(path) as file:
        return all(isinstance(find(file, key), h5py.Dataset) for key in REQUIRED)


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a D4RL file. Raises InputError: truncated, keys missing, not numbers, or of different lengths."""
    check_options("d4rl", options)
    file = open_hdf5(path)
    with readable(path):
        # Kept open from episode to episode: HDF5 forgets a dataset's decoded chunks when its object goes.
        arrays = _arrays(path, file)
        terminals = _flags(path, arrays["terminals"])
        timeouts = _flags(path, arrays["timeouts"]) if "timeouts" in arrays else np.zeros_like(terminals)
        bounds, left_over, single = _episodes(terminals, timeouts, has_next="next_observations" in arrays)
        if not bounds:
            raise InputError(f"{path} holds no episode of one step or more.")
        infos, left_out = _infos(file, len(terminals))
        form = picture_form(arrays["observations"])
        spec = _spec(arrays, infos, form, attributes(file))
        findings = [
            *_end_findings(terminals, timeouts, left_over, single, "timeouts" in arrays),
            *_info_findings(left_out),
            *_reward_findings(path, arrays),
            *_next_findings(path, arrays, terminals | timeouts, form),
        ]
        remembered = {
            "attributes": attributes(file),
            "steps_after_last_end": left_over,
            "terminal_and_timeout": int((terminals & timeouts).sum()),
            "final_observation_repeated": sorted(infos) if "next_observations" in arrays else [],
            "infos_left_out": left_out,
            "timestamps": "absent in the source: zero",
        }
    ends_task = [bool(terminals[stop - 1]) for _, stop in bounds]
    return Source(
        spec,
        len(bounds),
        lambda index: _load(path, arrays, infos, index, bounds[index], ends_task[index], spec),
        remembered,
        tuple(findings),
    )


def _load(
    path: Path,
    arrays: dict[str, NumberArray],
    infos: dict[str, NumberArray],
    index: int,
    bounds: tuple[int, int],
    ends_task: bool,
    spec: DatasetSpec,
) -> Episode:
    start, stop = bounds
    steps, has_next = stop - start, "next_observations" in arrays
    name = f"{path.name}/episode {index}"
    with readable(path):
        read_whole = [array for key, array in arrays.items() if key != "observations" or not spec.images]
        try:
            check_episode_bytes([*infos.values(), *read_whole], steps)
        except InputError as error:
            raise InputError(f"Episode '{name}': {error}") from None
        vectors = {key: array.float32(start, stop) for key, array in infos.items()}
        actions = arrays["actions"].float32(start, stop)
        reward = arrays["rewards"].float32(start, stop).reshape(steps) if spec.has_reward else None
        if has_next:
            vectors = {key: with_final_row(rows, None) for key, rows in vectors.items()}
        observations, images = arrays["observations"], {}
        if spec.images:
            final = (arrays["next_observations"], stop - 1) if has_next else None
            images["image"] = frames(path, observations, start, stop, final)
        else:
            rows = observations.float32(start, stop)
            final_row = arrays["next_observations"].float32(stop - 1, stop)[0] if has_next else None
            vectors["observation"] = with_final_row(rows, final_row) if has_next else rows
    num_rows = steps + has_next
    step_valid, terminated, truncated = end_flags(steps, num_rows, ends_task)
    return Episode(
        observations=vectors,
        images=images,
        action=padded_last(actions, num_rows),
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.zeros(num_rows),
        reward=None if reward is None else padded_last(reward, num_rows),
        source_id=name,
    )


def _arrays(path: Path, file: Any) -> dict[str, NumberArray]:
    """The arrays over all steps. Raises InputError unless they are numbers of one length and fitting shapes."""
    if missing := [key for key in REQUIRED if find(file, key) is None]:
        raise InputError(f"{path} is not in D4RL's layout: it lacks {', '.join(missing)}.")
    try:
        arrays = {key: array_at(file, key) for key in (*REQUIRED, *OPTIONAL) if find(file, key) is not None}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if len({len(array) for array in arrays.values()}) > 1:
        found = ", ".join(f"{key} {len(array)}" for key, array in arrays.items())
        raise InputError(f"{path}: arrays differ in length: {found}.")
    shapes = {key: array.shape[1:] for key, array in arrays.items()}
    if len(shapes["actions"]) != 1:
        raise InputError(f"{path}: 'actions' must be numbers (N, A); found {arrays['actions'].shape}.")
    for key in ("terminals", "timeouts", "rewards"):
        if shapes.get(key, ()) not in ((), (1,)):
            raise InputError(f"{path}: '{key}' must be one number per step; found {arrays[key].shape}.")
    if shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        found = f"{shapes['next_observations']} and {shapes['observations']}"
        raise InputError(f"{path}: 'next_observations' and 'observations' differ in shape: {found} per step.")
    if not len(arrays["actions"]):
        raise InputError(f"{path} has no actions: its arrays are empty.")
    return arrays


def _flags(path: Path, array: NumberArray) -> np.ndarray:
    rows = array.rows().reshape(-1)
    if not np.isin(rows, (0, 1)).all():
        raise InputError(f"{path}: '{array.dataset.name}' holds {rows[~np.isin(rows, (0, 1))][0]}: flags are 0 or 1.")
    return rows.astype(bool)


def _episodes(terminals: np.ndarray, timeouts: np.ndarray, has_next: bool) -> tuple[list[tuple[int, int]], int, int]:
    """[start, stop) of each episode, the number of steps after the last end, and of episodes that are left out.

    A single cut step without a known successor holds no transition and is left out.
    """
    stops = np.flatnonzero(terminals | timeouts) + 1
    left_over = len(terminals) - (int(stops[-1]) if len(stops) else 0)
    if left_over:
        stops = np.append(stops, len(terminals))
    starts = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
    pairs = [(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
    kept = [(a, b) for a, b in pairs if b - a > 1 or has_next or terminals[b - 1]]
    return kept, left_over, len(pairs) - len(kept)


def _spec(
    arrays: dict[str, NumberArray],
    infos: dict[str, NumberArray],
    form: PictureForm | str,
    remembered: dict[str, Any],
) -> DatasetSpec:
    pictures = isinstance(form, PictureForm)
    vectors = {} if pictures else {"observation": ArraySpec(arrays["observations"].shape[1:])}
    vectors |= {key: ArraySpec(array.shape[1:], privileged=True) for key, array in infos.items()}
    environment = next((remembered[key] for key in ("env_id", "env_name", "env") if key in remembered), "")
    return DatasetSpec(
        observations=vectors,
        images={"image": ArraySpec(form.shape, "uint8")} if pictures else {},
        action=ActionSpec(arrays["actions"].shape[1:], control_mode="raw"),
        environment=str(environment),
        has_reward="rewards" in arrays,
    )


def _infos(file: Any, steps: int) -> tuple[dict[str, NumberArray], dict[str, str]]:
    """Key in the store -> per-step numbers below `infos/`, and why others are left out. `infos/qpos` becomes
    `info_qpos`, privileged."""
    taken, left_out = {}, {}
    group = group_at(file, "infos") if find(file, "infos") is not None else None
    for name in members(group):
        try:
            array = array_at(group, name)
        except InputError as error:
            left_out[name] = str(error)
            continue
        if len(array) != steps:
            left_out[name] = f"it has {len(array)} rows, the file has {steps} steps"
        elif 0 in array.shape or len(array.shape) > 3:
            left_out[name] = f"its shape is {array.shape}"
        else:
            taken[f"info_{name}"] = array
    return taken, left_out


def _end_findings(
    terminals: np.ndarray, timeouts: np.ndarray, left_over: int, single: int, has_timeouts: bool
) -> list[Finding]:
    found = []
    both = int((terminals & timeouts).sum())
    if both:
        text = f"{both} steps are both terminal and timeout; the terminal counts"
        found.append(Finding("terminal-and-timeout", "warning", text, "Clear 'timeouts' there if they are right."))
    if not has_timeouts:
        text = "the file has no 'timeouts': attempts that ended by time are joined to the next one"
        found.append(Finding("no-timeouts", "warning", text, "Add 'timeouts' where the environment was reset."))
    if left_over:
        text = f"the last {left_over} steps end in neither terminal nor timeout: imported as a truncated episode"
        found.append(Finding("unfinished-episode", "note", text))
    if single:
        text = f"{single} episodes of a single step without successor hold no transition: left out"
        found.append(Finding("single-step", "warning", text))
    return found


def _info_findings(left_out: dict[str, str]) -> list[Finding]:
    return [
        Finding("info-left-out", "warning", f"'infos/{name}' is left out: {reason}")
        for name, reason in sorted(left_out.items())
    ]


def _reward_findings(path: Path, arrays: dict[str, NumberArray]) -> list[Finding]:
    seen: set[float] = set()
    # Where a block cannot be read, its episodes are left out, each with this reason.
    with contextlib.suppress(InputError), readable(path):
        for start, stop in _blocks(arrays.get("rewards", ())):
            rows = arrays["rewards"].float32(start, stop)
            seen |= {float(rows.min()), float(rows.max())}
            if len(seen) > 1:
                return []
    if not seen:
        return []
    text = f"all rewards are {seen.pop():g}"
    advice = "Nothing is learned from them: label the data, or import a version with rewards."
    return [Finding("constant-reward", "note", text, advice)]


def _next_findings(
    path: Path, arrays: dict[str, NumberArray], ends: np.ndarray, form: PictureForm | str
) -> list[Finding]:
    """Steps inside episodes whose next observation is not the following row."""
    differ, first, inside = 0, 0, 0
    if "next_observations" not in arrays or isinstance(form, PictureForm):
        return []
    with contextlib.suppress(InputError), readable(path):
        for start, stop in _blocks(arrays["observations"]):
            last = min(stop, len(ends) - 1)
            following = arrays["observations"].rows(start + 1, last + 1).reshape(last - start, -1)
            after = arrays["next_observations"].rows(start, last).reshape(last - start, -1)
            wrong = (following != after).any(axis=1) & ~ends[start:last]
            if wrong.any() and not differ:
                first = start + int(np.argmax(wrong))
            differ += int(wrong.sum())
            inside += int((~ends[start:last]).sum())
    if not differ:
        return []
    text = (
        f"at {differ} of {inside} steps inside episodes 'next_observations' is not the following row "
        f"(first at row {first}); the store keeps the following row"
    )
    return [Finding("next-observation", "warning", text, "Check that the steps are in order and no end is missing.")]


def _blocks(rows: Sequence[Any] | NumberArray) -> list[tuple[int, int]]:
    return [(start, min(start + ROWS_AT_ONCE, len(rows))) for start in range(0, len(rows), ROWS_AT_ONCE)]
