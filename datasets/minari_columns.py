"""The arrays of one Minari episode by path, whichever storage they lie in, and the spaces that describe them."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.episode import Frames

DEPTH = 16  # of nested spaces and groups
NUM_COLUMNS = 2000
STEP_VALUES = 1 << 20  # of one array of one step
PICTURE_SIDE = 32  # Minari takes nothing smaller for a picture: a grid of 7 x 7 x 3 holds codes, not colours
BLOCK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Column:
    """One array of an episode, read when asked for.

    Attributes:
        kind: `numbers`, `pictures`, `text`, or `other`: not read, for the `reason`.
        rows: how many there are.
        shape: of one row; of a picture as a store has it, (H, W, 3).
        values: the first n rows: (n, *shape) float32, Frames or a list of str.
    """

    kind: str
    rows: int
    shape: tuple[int, ...] = ()
    values: Callable[[int], Any] = lambda rows: None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A dataset, opened.

    Attributes:
        path: the file or folder with the data, for messages.
        ids: numbers of the episodes there are.
        metadata: what the dataset says of itself.
        columns: number -> path -> Column: `observations/a`, `actions`, `rewards`, `infos/b`. Raises InputError.
        details: number -> what the episode says of itself: `seed`, `total_steps`.
    """

    path: Path
    ids: tuple[int, ...]
    metadata: dict[str, Any]
    columns: Callable[[int], dict[str, Column]]
    details: Callable[[int], dict[str, Any]]


def other(rows: int, reason: str) -> Column:
    return Column("other", rows, reason=reason)


def number_column(rows: int, shape: tuple[int, ...], dtype: str, values: Callable[[int], np.ndarray]) -> Column:
    """Numbers of any shape; more than two axes per step become one."""
    if not 0 < math.prod(shape) <= STEP_VALUES:
        return other(rows, f"{dtype} {shape} per step: neither a vector nor a picture")
    shape = shape if len(shape) <= 2 else (math.prod(shape),)

    def converted(wanted: int) -> np.ndarray:
        with np.errstate(over="ignore"):  # what does not fit is inf, which no store takes
            return np.asarray(values(wanted), np.float32).reshape(-1, *shape)

    return Column("numbers", rows, shape, converted)


def is_picture(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether a row is a picture of bytes: (H, W) or (H, W, 1, 3 or 4), large enough to be one."""
    colors = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    return dtype == np.uint8 and colors and min(shape[:2]) >= PICTURE_SIDE


def picture_column(rows: int, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray]) -> Column:
    """Pictures stored as numbers. `read`: (start, stop) -> (n, *shape) uint8."""
    height, width = shape[:2]
    step = max(1, BLOCK_BYTES // (height * width * 3))

    def blocks(wanted: int) -> Iterator[np.ndarray]:
        for start in range(0, wanted, step):
            found = read(start, min(start + step, wanted)).reshape(-1, height, width, (*shape, 1)[2])
            yield np.repeat(found, 3, 3) if found.shape[3] == 1 else np.ascontiguousarray(found[..., :3])

    def values(wanted: int) -> Frames:
        return Frames((wanted, height, width, 3), lambda: blocks(wanted))

    return Column("pictures", rows, (height, width, 3), values)


@dataclasses.dataclass(frozen=True)
class Space:
    """A leaf of a Gymnasium space.

    Attributes:
        kind: its class: `Box`, `Discrete`, ...
        shape: of one element; None where it is not said.
        low, high: bounds of each value; empty where one is infinite or not known.
    """

    kind: str
    shape: tuple[int, ...] | None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def read_space(text: Any, root: str) -> dict[str, Space]:
    """Path -> leaf of a space as Minari writes it; empty where there is none or it is damaged: the files count."""
    try:
        waiting = [(root, json.loads(text), 0)] if isinstance(text, str) else []
    except (ValueError, RecursionError):
        return {}
    found: dict[str, Space] = {}
    while waiting and len(found) < NUM_COLUMNS:
        path, node, depth = waiting.pop()
        if not isinstance(node, dict) or depth > DEPTH:
            continue
        inner = node.get("subspaces")
        if isinstance(inner, dict | list):
            named = inner.items() if isinstance(inner, dict) else enumerate(inner)
            waiting.extend((f"{path}/{name}", child, depth + 1) for name, child in named)
        else:
            found[path] = _leaf(node)
    return found


def _leaf(node: Mapping[str, Any]) -> Space:
    kind = str(node.get("type"))
    try:
        if kind == "Discrete":
            start = int(node.get("start", 0))
            return Space(kind, (), (float(start),), (float(start + int(node["n"]) - 1),))
        if kind == "MultiDiscrete":
            count = np.asarray(node["nvec"], np.int64)
            start = np.broadcast_to(np.asarray(node.get("start", 0), np.int64), count.shape)
            return Space(kind, count.shape, _bounds(start, count.shape), _bounds(start + count - 1, count.shape))
        if kind == "MultiBinary":
            shape = tuple(np.atleast_1d(np.asarray(node["n"], np.int64)).tolist())
            return Space(kind, shape)
        if kind == "Box":
            shape = tuple(int(size) for size in node["shape"])
            return Space(kind, shape, _bounds(node.get("low"), shape), _bounds(node.get("high"), shape))
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    return Space(kind, None)


def _bounds(values: Any, shape: tuple[int, ...]) -> tuple[float, ...]:
    array = np.asarray(values, np.float64).reshape(-1)
    known = len(array) == math.prod(shape) and len(array) <= 1000 and bool(np.isfinite(array).all())
    return tuple(array.tolist()) if known else ()


def required(columns: Mapping[str, Column], path: str, kind: str) -> Column:
    """The column at `path`. Raises InputError: it is absent or of another kind."""
    if path not in columns:
        raise InputError(f"it lacks '{path}'.")
    if columns[path].kind != kind:
        raise InputError(f"'{path}' is {columns[path].reason or columns[path].kind}, not {kind}.")
    return columns[path]
