"""Minari's HDF5 storage: `data/main_data.hdf5`, a group `episode_<i>` each.

Pictures are JPEG files, one row of bytes each, where Minari took a space for pictures; up to 0.5.0 they are numbers.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.hdf5 import (
    array_at,
    as_text,
    attribute,
    attributes,
    check_claim,
    find,
    group_at,
    members,
    open_hdf5,
    readable,
)
from embodied.datasets.minari_columns import (
    DEPTH,
    NUM_COLUMNS,
    Column,
    Space,
    Storage,
    is_picture,
    number_column,
    other,
    picture_column,
)
from embodied.datasets.pictures import lazy_pictures, picture_shape

TUPLE = re.compile(r"_index_([0-9]{1,4})")  # how Minari names the parts of a tuple
EPISODE = re.compile(r"episode_([0-9]{1,9})")


def read_metadata(path: Path) -> dict[str, Any]:
    """The file's attributes: until 0.4 they describe the dataset."""
    with readable(path), open_hdf5(path) as file:
        return attributes(file)


def open_storage(path: Path, metadata: dict[str, Any], spaces: dict[str, Space]) -> Storage:
    """Open `main_data.hdf5`."""
    file = open_hdf5(path)
    with readable(path):
        names = {int(match[1]): name for name in members(file) if (match := EPISODE.fullmatch(name))}

    def columns(episode: int) -> dict[str, Column]:
        with readable(path):
            return dict(_columns(path, group_at(file, names[episode]), spaces))

    def details(episode: int) -> dict[str, Any]:
        with readable(path):
            group = group_at(file, names[episode])
            return {} if group is None else {key: attribute(group, key) for key in ("seed", "total_steps")}

    return Storage(path, tuple(sorted(names)), metadata, columns, details)


def _columns(path: Path, episode: Any, spaces: dict[str, Space]) -> Iterator[tuple[str, Column]]:
    waiting, count = [("", episode, 0)], 0
    while waiting:
        at, group, depth = waiting.pop()
        for name in members(group):
            part = TUPLE.fullmatch(name)
            key = f"{at}/{part[1] if part else name}".lstrip("/")
            count += 1
            if depth > DEPTH or count > NUM_COLUMNS:
                raise InputError(f"it has more than {NUM_COLUMNS} arrays, or groups deeper than {DEPTH}.")
            try:
                item = find(group, name)
                if isinstance(item, h5py.Group):
                    waiting.append((key, item, depth + 1))
                elif isinstance(item, h5py.Dataset):
                    yield key, _column(path, group, name, item, spaces.get(key))
            except InputError as error:
                yield key, other(0, str(error))


def _column(path: Path, group: Any, name: str, dataset: Any, space: Space | None) -> Column:
    if dataset.is_virtual or dataset.external or dataset.shape is None or not dataset.shape:
        return other(0, "no array of steps")
    rows, variable = int(dataset.shape[0]), h5py.check_vlen_dtype(dataset.dtype)
    if h5py.check_string_dtype(dataset.dtype) is not None and dataset.ndim == 1:
        check_claim(dataset)
        return Column("text", rows, values=lambda wanted: _texts(path, dataset, wanted))
    files = dataset.ndim == 2 and dataset.dtype == np.uint8 and space is not None and len(space.shape or ()) > 1
    if files or (variable == np.uint8 and dataset.ndim == 1):
        check_claim(dataset)
        return _encoded(path, dataset, rows)
    array = array_at(group, name)
    shape = array.shape[1:]
    if is_picture(shape, array.dtype):

        def pictures(start: int, stop: int) -> np.ndarray:
            with readable(path):
                return array.rows(start, stop)

        return picture_column(rows, shape, pictures)

    def numbers(wanted: int) -> np.ndarray:
        with readable(path):
            return array.float32(0, wanted)

    return number_column(rows, shape, str(array.dtype), numbers)


def _encoded(path: Path, dataset: Any, rows: int) -> Column:
    def row(place: int) -> bytes:
        with readable(path):
            return np.asarray(dataset[place], np.uint8).tobytes()

    if not rows:
        return other(rows, "no pictures")
    shape = picture_shape(row(0), f"'{dataset.name}' 0")

    def encoded(start: int, stop: int) -> Iterator[bytes]:
        return (row(place) for place in range(start, stop))

    return Column("pictures", rows, shape, lambda wanted: lazy_pictures((wanted, *shape), encoded, f"'{dataset.name}'"))


def _texts(path: Path, dataset: Any, wanted: int) -> list[str]:
    with readable(path):
        return [as_text(value) for value in np.asarray(dataset[:wanted], object)]
