"""robomimic HDF5: one group `data/demo_<i>` per episode (https://robomimic.github.io/docs/datasets/overview.html).

Ends: `dones` means success, end of the demo or both, depending on how the file was made, and the file does not say.
Here a demo ends where its group ends; it is `terminated` when its last done is set and the file does not call the demo
a failure, else `truncated`. Dones before the last step (success held over several steps) cut nothing.
"""

import json
import re
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


def sniff(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with readable(path), open_hdf5(path) as file:
        return isinstance(file.get("data"), h5py.Group) and bool(_demos(file))


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a robomimic file. Raises InputError: truncated, or demos without `obs` or `actions`."""
    check_options("robomimic", options)
    file = open_hdf5(path)
    with readable(path):
        demos = _demos(file)
        if not demos:
            raise InputError(f"{path} has no group 'data/demo_0': it is not in robomimic's layout.")
        environment = _environment(file)
        first = file[f"data/{demos[0]}"]
        observations, images, skipped = _observation_specs(path, first)
        if not isinstance(first.get("actions"), h5py.Dataset):
            raise InputError(f"Episode '{path.name}/{demos[0]}' has no actions: 'data/{demos[0]}/actions' is absent.")
        if first["actions"].ndim != 2 or first["actions"].dtype.kind not in "fiub":
            found = f"{first['actions'].dtype} {first['actions'].shape}"
            raise InputError(f"Episode '{path.name}/{demos[0]}': 'actions' must be numbers (N, A); found {found}.")
        settings = environment.get("env_kwargs")
        control_hz = settings.get("control_freq", 0) if isinstance(settings, dict) else 0
        spec = DatasetSpec(
            observations=observations,
            images=images,
            action=ActionSpec(tuple(first["actions"].shape[1:]), control_mode="raw"),
            control_dt=1.0 / control_hz if control_hz else 0.0,
            environment=str(environment.get("env_name", "")),
            has_reward="rewards" in first,
        )
        keys = {*observations, *images}
        final = set(first["next_obs"]) if "next_obs" in first else set()
        attributes = {
            "env_args": environment,
            "filter_keys": _filter_keys(file, demos),
            "observations_left_out": skipped,
            "final_observation_repeated": sorted(keys - final) if final else [],
            "timestamps": "step * control period of the simulator" if control_hz else "absent in the source: zero",
            "early_dones": _early_dones(file, demos),
        }
    return Source(spec, len(demos), lambda index: _load(path, file, demos[index], spec), attributes)


def _load(path: Path, file: Any, demo: str, spec: DatasetSpec) -> Episode:
    with readable(path):
        group = file[f"data/{demo}"]
        source_id = f"{path.name}/{demo}"
        actions = group["actions"][:] if "actions" in group else np.zeros((0, 1), np.float32)
        if len(actions) == 0:
            raise InputError(f"Episode '{source_id}' has no actions. Drop it from the source.")
        if missing := [key for key in [*spec.observations, *spec.images] if key not in group.get("obs", {})]:
            raise InputError(f"Episode '{source_id}' lacks observations that the first demo has: {', '.join(missing)}.")
        steps = len(actions)
        success = bool(group.attrs["success"]) if "success" in group.attrs else None
        done = bool(group["dones"][-1]) if "dones" in group and len(group["dones"]) else False
        rows = steps + (1 if "next_obs" in group else 0)
        step_valid, terminated, truncated = end_flags(steps, rows, done and success is not False)
        arrays = {key: _observation(group, key, rows) for key in [*spec.observations, *spec.images]}
        return Episode(
            observations={key: np.asarray(arrays[key], np.float32) for key in spec.observations},
            images={key: arrays[key] for key in spec.images},
            action=padded_last(np.asarray(actions, np.float32), rows),
            step_valid=step_valid,
            terminated=terminated,
            truncated=truncated,
            timestamp=np.arange(rows) * spec.control_dt,
            reward=padded_last(np.asarray(group["rewards"][:], np.float32), rows) if "rewards" in group else None,
            instruction=_instruction(group),
            success=success,
            source_id=source_id,
        )


def _observation(group: Any, key: str, rows: int) -> np.ndarray:
    observation = group[f"obs/{key}"][:]
    if "next_obs" not in group or len(observation) >= rows:
        return observation
    return with_final_row(observation, group[f"next_obs/{key}"][-1] if key in group["next_obs"] else None)


def _instruction(group: Any) -> str:
    """Some makers keep the task's words in the demo's attributes; robomimic itself has no field for them."""
    for key in ("instruction", "language_instruction", "lang"):
        if key in group.attrs:
            return as_text(group.attrs[key])
    return ""


def _demos(file: Any) -> list[str]:
    """Demo groups by number: demo_2 before demo_10."""
    numbers = {name: re.fullmatch(r"demo_(\d+)", name) for name in file.get("data", {})}
    return sorted((n for n, m in numbers.items() if m), key=lambda n: int(n.removeprefix("demo_")))


def _environment(file: Any) -> dict[str, Any]:
    text = as_text(file["data"].attrs.get("env_args", "{}"))
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"unreadable": text}


def _filter_keys(file: Any, demos: list[str]) -> dict[str, list[int]]:
    """`mask/<name>` -> episode numbers."""
    number = {demo: index for index, demo in enumerate(demos)}
    return {
        name: [number[as_text(demo)] for demo in dataset[:] if as_text(demo) in number]
        for name, dataset in file.get("mask", {}).items()
    }


def _observation_specs(path: Path, demo: Any) -> tuple[dict[str, ArraySpec], dict[str, ArraySpec], dict[str, str]]:
    if "obs" not in demo:
        raise InputError(
            f"{path}: {demo.name} has no 'obs', only simulator states.\n"
            "Extract observations first with robomimic's dataset_states_to_obs.py."
        )
    observations, images, skipped = {}, {}, {}
    for key, dataset in demo["obs"].items():
        if not isinstance(dataset, h5py.Dataset):
            skipped[key] = "a group, not an array"
        elif is_image(dataset.shape, dataset.dtype):
            images[key] = ArraySpec(tuple(dataset.shape[1:]), "uint8")
        elif dataset.ndim > 2 or dataset.dtype.kind not in "fiub":
            skipped[key] = f"{dataset.dtype} {tuple(dataset.shape[1:])} per step: neither a vector nor an RGB image"
        else:
            observations[key] = ArraySpec(tuple(dataset.shape[1:]), privileged=key in ("object", "object-state"))
    return observations, images, skipped


def _early_dones(file: Any, demos: list[str]) -> int:
    """Demos with a done before their last step."""
    return sum(bool(np.any(file[f"data/{d}/dones"][:-1])) for d in demos if "dones" in file[f"data/{d}"])
