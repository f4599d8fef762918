"""Minari datasets as Minari 0.5 lays them out, written with h5py and pyarrow alone."""

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

STORAGES = ("hdf5", "arrow", "parquet")


def box(*shape: int, low: float = -1, high: float = 1, dtype: str = "float32") -> dict[str, Any]:
    bounds = {"low": np.full(shape, low).tolist(), "high": np.full(shape, high).tolist()}
    return {"type": "Box", "dtype": dtype, "shape": list(shape), **bounds}


def discrete(n: int, start: int = 0) -> dict[str, Any]:
    return {"type": "Discrete", "dtype": "int64", "start": start, "n": n}


def nested(**spaces: Any) -> dict[str, Any]:
    return {"type": "Dict", "subspaces": spaces}


def sequence(*spaces: Any) -> dict[str, Any]:
    return {"type": "Tuple", "subspaces": list(spaces)}


TEXT: dict[str, Any] = {"type": "Text", "max_length": 20, "min_length": 0, "charset": "abc"}


def jpegs(pictures: np.ndarray, format: str = "JPEG") -> list[bytes]:
    """Each of (n, H, W[, C]) uint8 as a file."""
    found = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format)
        found.append(file.getvalue())
    return found


def episode(steps: int, observations: Any, actions: Any, end: str = "terminations", **more: Any) -> dict[str, Any]:
    """The arrays of an episode: dictionaries, tuples, NumPy arrays, lists of str, lists of bytes (pictures)."""
    ends = {name: (np.arange(steps) == steps - 1) & (name == end) for name in ("terminations", "truncations")}
    return {"observations": observations, "actions": actions, "rewards": np.arange(steps) + 1.0, **ends, **more}


def write_dataset(
    root: Path,
    storage: str,
    episodes: dict[int, dict[str, Any]],
    observation_space: Any,
    action_space: Any,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """`root/data/` with the episodes; `metadata` replaces what Minari would say."""
    data = root / "data"
    data.mkdir(parents=True)
    steps = {number: len(arrays["rewards"]) for number, arrays in episodes.items()}
    known = {
        "total_episodes": len(episodes),
        "total_steps": sum(steps.values()),
        "data_format": storage,
        "observation_space": json.dumps(observation_space),
        "action_space": json.dumps(action_space),
        "env_spec": json.dumps({"id": "Toy-v0", "entry_point": "toy:Env"}),
        "dataset_id": "toy/set-v0",
        "minari_version": "0.5.4",
        "author": ["me"],
    }
    (data / "metadata.json").write_text(json.dumps(known | (metadata or {})))
    if storage == "hdf5":
        with h5py.File(data / "main_data.hdf5", "w", track_order=True) as file:
            for number, arrays in episodes.items():
                group = file.create_group(f"episode_{number}")
                group.attrs.update({"id": number, "seed": number + 100, "total_steps": steps[number]})
                _write_group(group, arrays)
        return root
    for number, arrays in episodes.items():
        folder = data / str(number)
        folder.mkdir()
        details = {"id": number, "seed": number + 100, "total_steps": steps[number]}
        (folder / "metadata.json").write_text(json.dumps(details))
        write_table(folder / f"part-0.{storage}", arrow_table(arrays))
    return root


def _write_group(group: Any, arrays: dict[str, Any]) -> None:
    for name, value in arrays.items():
        if isinstance(value, dict | tuple):
            inner = value if isinstance(value, dict) else {f"_index_{i}": part for i, part in enumerate(value)}
            _write_group(group.create_group(name), inner)
        elif isinstance(value, list) and value and isinstance(value[0], bytes):
            rows = [np.frombuffer(data, np.uint8) for data in value]
            same = len({len(row) for row in rows}) == 1
            dataset = group.create_dataset(
                name, (len(rows), len(rows[0])) if same else (len(rows),), "u1" if same else h5py.vlen_dtype(np.uint8)
            )
            for place, row in enumerate(rows):
                dataset[place] = row
        elif isinstance(value, list):
            group.create_dataset(name, data=value, dtype=h5py.string_dtype("utf-8"))
        else:
            group.create_dataset(name, data=value, chunks=True, maxshape=(None, *value.shape[1:]))


def arrow_table(arrays: dict[str, Any]) -> Any:
    """Columns of steps are padded to a row per observation, as Minari pads them."""
    rows = max(len(leaf) for leaf in _leaves(arrays["observations"]))
    return pyarrow.table({name: _arrow(value, 0 if name == "infos" else rows) for name, value in arrays.items()})


def write_table(path: Path, table: Any, **options: Any) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **options)
        return
    with pyarrow.ipc.new_file(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | tuple):
        return [leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(each)]
    return [value]


def _arrow(value: Any, rows: int) -> Any:
    if isinstance(value, dict | tuple):
        inner = value if isinstance(value, dict) else {str(i): part for i, part in enumerate(value)}
        columns = {name: _arrow(part, rows) for name, part in inner.items()}
        # Only infos carry their shape; that of an observation or action stands in its space.
        shapes = {
            name: {"shape": ",".join(map(str, part.shape[1:]))}
            for name, part in inner.items()
            if not rows and isinstance(part, np.ndarray)
        }
        fields = [pyarrow.field(name, column.type, metadata=shapes.get(name)) for name, column in columns.items()]
        return pyarrow.StructArray.from_arrays(list(columns.values()), fields=fields)
    if isinstance(value, list):
        return pyarrow.array(value)
    padded = np.pad(value, [(0, max(0, rows - len(value)))] + [(0, 0)] * (value.ndim - 1))
    if value.ndim == 1 and rows:
        return pyarrow.array(padded)
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(value.dtype), int(np.prod(value.shape[1:])))
    return pyarrow.FixedSizeListArray.from_arrays(padded.reshape(-1), type=kind)
