"""Minari 0.4 and newer: local datasets in HDF5, Arrow or Parquet (https://minari.farama.org/content/dataset_standards).

An episode of N steps has N + 1 observations. One with N has no final observation: its last step counts only if it
terminated. Numbers in `infos` become privileged observations `info_<key>`. Keys of dictionaries and tuples are joined
by dots: `observations/arm/0` is `arm.0`. A dictionary of actions becomes one vector, its parts in the order of their
names; a discrete action becomes a column with the number of the choice.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets import minari_arrow, minari_hdf5
from embodied.datasets.episode import Episode, Frames, end_flags, padded_last
from embodied.datasets.finding import Finding
from embodied.datasets.hdf5 import EPISODE_BYTES, is_hdf5, is_key, members, open_hdf5, readable, with_final_row
from embodied.datasets.json_file import read_json
from embodied.datasets.minari_columns import Column, Space, Storage, read_space, required
from embodied.datasets.minari_survey import Survey, num_steps_of, read_scalars, survey
from embodied.datasets.source import Source, check_options

MAIN_FILE, METADATA = "main_data.hdf5", "metadata.json"
INSTRUCTIONS = ("mission", "instruction", "language_instruction", "task")
CHOICES = ("Discrete", "MultiDiscrete", "MultiBinary")
DESCRIBED = ("dataset_id", "minari_version", "algorithm_name", "code_permalink", "author", "data_format")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which column of an episode is what.

    Attributes:
        observations: key -> path, infos included.
        cameras: camera -> path.
        actions: paths of the action's parts, in order.
        instruction: path of the task's words, empty without.
        left_out: path -> why it is not read.
    """

    observations: dict[str, str]
    cameras: dict[str, str]
    actions: tuple[str, ...]
    instruction: str
    left_out: dict[str, str]


def sniff(path: Path) -> bool:
    if path.is_dir():
        data = _data_folder(path)
        return (data / MAIN_FILE).is_file() or bool(minari_arrow.episode_folders(data))
    if not is_hdf5(path):
        return False
    with readable(path), open_hdf5(path) as file:
        return any(minari_hdf5.EPISODE.fullmatch(name) for name in members(file))


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a dataset: its folder, the folder `data` in it, or the HDF5 file. It takes no options.

    Raises:
        InputError: nothing of Minari's is there, no episode can be read, or the actions are no numbers.
    """
    check_options("minari", options)
    storage, spaces = _open(path)
    if not storage.ids:
        raise InputError(f"{storage.path} holds no episode: neither group nor folder of one.")
    seen = survey(storage)
    layout = _layout(seen)
    if not layout.actions:
        actions = {name: column.reason for name, column in seen.template.items() if name.startswith("actions")}
        raise InputError(f"{storage.path}: no part of the actions is numbers: {actions or 'absent'}.")
    spec = DatasetSpec(
        observations={
            key: _observation_spec(seen.template[name], spaces.get(name), name.startswith("infos/"))
            for key, name in layout.observations.items()
        },
        images={camera: ArraySpec(seen.template[name].shape, "uint8") for camera, name in layout.cameras.items()},
        action=_action_spec(seen.template, layout.actions, spaces),
        environment=_environment(storage.metadata),
        has_reward="rewards" in seen.template,
    )
    attributes = {
        "metadata": {key: str(storage.metadata[key])[:1000] for key in DESCRIBED if key in storage.metadata},
        "seeds": seen.seeds,
        "action_spaces": {name: spaces[name].kind for name in layout.actions if name in spaces},
        "observations_left_out": layout.left_out,
        "timestamps": "absent in the source: zero",
    }
    dataset = str(storage.metadata.get("dataset_id") or storage.path.name)[:200]

    def load(index: int) -> Episode:
        source_id = f"{dataset}/episode_{storage.ids[index]}"
        try:
            return _load(storage.columns(storage.ids[index]), layout, spec, source_id)
        except InputError as error:
            raise InputError(f"Episode '{source_id}': {error}") from error

    return Source(spec, len(storage.ids), load, attributes, (*seen.findings, *_choices(layout, spaces)))


def _load(columns: dict[str, Column], layout: Layout, spec: DatasetSpec, source_id: str) -> Episode:
    steps = num_steps_of(columns)
    numbers = {key: required(columns, name, "numbers") for key, name in layout.observations.items()}
    pictures = {camera: required(columns, name, "pictures") for camera, name in layout.cameras.items()}
    actions = [required(columns, name, "numbers") for name in layout.actions]
    lengths = {name: columns[name].rows for name in columns if name.partition("/")[0] == "observations"}
    lengths = {name: rows for name, rows in lengths.items() if name not in layout.left_out} or {"observations": steps}
    rows = min(lengths.values())
    if len(set(lengths.values())) > 1 or rows not in (steps, steps + 1):
        raise InputError(f"it has {steps} steps; its observations have {lengths} rows, not {steps + 1}.")
    size = sum(math.prod(column.shape) for column in [*numbers.values(), *actions]) * rows * 4
    if size > EPISODE_BYTES:
        raise InputError(f"its arrays have {size >> 20} MiB; one episode may have {EPISODE_BYTES >> 20} MiB.")
    for key, column in numbers.items():
        if column.shape != spec.observations[key].shape:
            raise InputError(
                f"'{layout.observations[key]}' has shape {column.shape}, not {spec.observations[key].shape}."
            )
    terminated = bool(read_scalars(columns, "terminations", steps)[-1])
    read_scalars(columns, "truncations", steps)
    step_valid, ends, cuts = end_flags(steps, rows, terminated)
    action = np.concatenate([column.values(steps).reshape(steps, -1) for column in actions], 1)
    images: dict[str, np.ndarray | Frames] = {camera: column.values(rows) for camera, column in pictures.items()}
    return Episode(
        observations={key: _rows(column, layout.observations[key], rows) for key, column in numbers.items()},
        images=images,
        action=padded_last(action, rows),
        step_valid=step_valid,
        terminated=ends,
        truncated=cuts,
        timestamp=np.zeros(rows),
        reward=padded_last(read_scalars(columns, "rewards", steps), rows) if spec.has_reward else None,
        instruction=_instruction(columns, layout.instruction),
        success=_success(columns),
        source_id=source_id,
    )


def _rows(column: Column, name: str, rows: int) -> np.ndarray:
    """All rows of an observation. An info may lack the one of the reset or the end: its last row is repeated."""
    if column.rows >= rows:
        return column.values(rows)
    if column.rows != rows - 1:
        raise InputError(f"'{name}' has {column.rows} rows, not {rows}.")
    return with_final_row(column.values(rows - 1), None)


def _instruction(columns: Mapping[str, Column], name: str) -> str:
    column = columns.get(name)
    if column is None or column.kind != "text" or not column.rows:
        return ""
    return column.values(1)[0]


def _success(columns: Mapping[str, Column]) -> bool | None:
    """What `infos/success` says at the end."""
    column = columns.get("infos/success") or columns.get("infos/is_success")
    if column is None or column.kind != "numbers" or not column.rows or math.prod(column.shape) != 1:
        return None
    return bool(column.values(column.rows).reshape(-1)[-1])


def _open(path: Path) -> tuple[Storage, dict[str, Space]]:
    """The storage, and the leaves of its spaces by path."""
    if path.is_dir():
        data = _data_folder(path)
        file = data / MAIN_FILE
    else:
        data, file = path.parent, path
    described = read_json(data / METADATA) if (data / METADATA).is_file() else {}
    metadata = described if isinstance(described, dict) else {}
    if file.is_file():
        # Until 0.4 the file's own attributes are the metadata.
        found = minari_hdf5.read_metadata(file) | metadata
        spaces = _spaces(found)
        return minari_hdf5.open_storage(file, found, spaces), spaces
    if path.is_dir() and minari_arrow.episode_folders(data):
        spaces = _spaces(metadata)
        return minari_arrow.open_storage(data, metadata, spaces), spaces
    raise InputError(f"{path} has no {MAIN_FILE}, nor folders of Arrow files: it is no dataset of Minari.")


def _data_folder(path: Path) -> Path:
    return path / "data" if (path / "data").is_dir() else path


def _spaces(metadata: Mapping[str, Any]) -> dict[str, Space]:
    observed = read_space(metadata.get("observation_space"), "observations")
    return observed | read_space(metadata.get("action_space"), "actions")


def _environment(metadata: Mapping[str, Any]) -> str:
    try:
        described = json.loads(str(metadata.get("env_spec", "")))
    except (ValueError, RecursionError):
        return ""
    name = described.get("id") if isinstance(described, dict) else None
    return name[:200] if isinstance(name, str) else ""


def _layout(seen: Survey) -> Layout:
    observations: dict[str, str] = {}
    cameras: dict[str, str] = {}
    left_out: dict[str, str] = {}
    actions, texts = [], []
    for name, column in sorted(seen.template.items()):
        kind, _, rest = name.partition("/")
        key = rest.replace("/", ".")
        if kind == "actions":
            if column.kind == "numbers":
                actions.append(name)
            else:
                left_out[name] = column.reason or column.kind
        elif kind not in ("observations", "infos"):
            continue
        elif column.kind == "text" and kind == "observations" and name.rpartition("/")[2] in INSTRUCTIONS:
            texts.append(name)
        elif column.kind not in ("numbers", "pictures") or (kind == "infos" and column.kind == "pictures"):
            left_out[name] = column.reason or column.kind
        elif kind == "infos" and name not in seen.shared:
            left_out[name] = "not in every episode, or not of the same shape"
        elif column.kind == "pictures":
            _add(cameras, key or "image", name, left_out)
        else:
            _add(observations, f"info_{key}" if kind == "infos" else key or "observation", name, left_out)
    return Layout(observations, cameras, tuple(actions), texts[0] if texts else "", left_out)


def _add(found: dict[str, str], key: str, name: str, left_out: dict[str, str]) -> None:
    if key in found or not is_key(key):
        left_out[name] = "its name cannot be a key of a store"
    else:
        found[key] = name


def _observation_spec(column: Column, space: Space | None, privileged: bool) -> ArraySpec:
    low, high = _bounds(column, space)
    return ArraySpec(column.shape, low=low, high=high, privileged=privileged)


def _bounds(column: Column, space: Space | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = math.prod(column.shape)
    low, high = (space.low, space.high) if space is not None else ((), ())
    return (low if len(low) == size else ()), (high if len(high) == size else ())


def _action_spec(template: Mapping[str, Column], actions: tuple[str, ...], spaces: dict[str, Space]) -> ActionSpec:
    sizes = {name: math.prod(template[name].shape) for name in actions}
    bounds = [_bounds(template[name], spaces.get(name)) for name in actions]
    names = [
        part if sizes[name] == 1 else f"{part}.{place}"
        for name in actions
        for part in [name.removeprefix("actions/").replace("/", ".")]
        for place in range(sizes[name])
    ]
    low, high = (tuple(value for each in bounds for value in each[side]) for side in (0, 1))
    width = sum(sizes.values())
    return ActionSpec(
        (width,),
        names=tuple(names) if actions != ("actions",) else (),
        low=low if len(low) == width else (),
        high=high if len(high) == width else (),
        control_mode="raw",
    )


def _choices(layout: Layout, spaces: dict[str, Space]) -> list[Finding]:
    discrete = {name: spaces[name].kind for name in layout.actions if name in spaces and spaces[name].kind in CHOICES}
    if not discrete:
        return []
    which = ", ".join(f"{name} ({kind})" for name, kind in discrete.items())
    message = f"{which}: a choice, kept as its number. Learners here take actions for continuous."
    return [Finding("discrete-action", "warning", message, "Evaluate a policy learned from it with care.")]
