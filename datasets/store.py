"""EpisodeStore: one Zarr v3 group per dataset, frame-aligned, read-only once written (layout: ARCHITECTURE.md)."""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

from embodied.contracts.errors import EmbodiedError, InputError, LabelError, StoreError, suggest
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode, Frames
from embodied.datasets.finding import Finding
from embodied.datasets.location import (
    STORAGE_OPTIONS,
    filesystem,
    is_remote,
    location,
    reason,
    remote_errors,
    zarr_path,
)
from embodied.datasets.read_frames import LocalShards, RemoteShards, ShardReader, readable

BLOCK_BYTES = 8_000_000  # of pictures that are read at once
FRAME_SETS = {"labels": "label set", "embeddings": "embedding set"}  # kind, a group of the store -> what one is called

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Label:
    """One label set: a score per frame and where it came from.

    Attributes:
        score: (F,) float32.
        channels: further named (F, ...) arrays, for example `confidence`.
        alignment: `post`: the reward of the step at frame t is score[t + 1], as an environment would pay it.
    """

    name: str
    score: np.ndarray
    channels: dict[str, np.ndarray]
    provenance: dict[str, Any]
    alignment: str


class EpisodeStore:
    """A dataset, opened for reading.

    Args:
        path: local folder, or any fsspec URL (`s3://...`).

    Raises:
        StoreError: nothing is there, it is no EpisodeStore, or it is of another schema version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = location(path)
        self._open()
        self.attributes: dict[str, Any] = dict(self._group.attrs)
        self.spec = DatasetSpec.from_json(self.attributes["spec"])
        self.fingerprint: str = self.attributes["fingerprint"]
        self.num_frames: int = self.attributes["num_frames"]
        self.num_episodes: int = self.attributes["num_episodes"]

    def _open(self) -> None:
        self._process, self._group = os.getpid(), _open(self.path)
        self._arrays: dict[str, tuple[zarr.Array, ShardReader | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return EpisodeStore, (self.path,)

    @functools.cached_property
    def episode_start(self) -> np.ndarray:
        """(E,) int64: the frame at which each episode starts."""
        return self.read("episode/start")

    @functools.cached_property
    def episode_length(self) -> np.ndarray:
        """(E,) int64: frames of each episode, the final observation included."""
        return self.read("episode/length")

    @functools.cached_property
    def success(self) -> np.ndarray:
        """(E,) int8: 1 success, 0 failure, -1 unknown."""
        return self.read("episode/success")

    @functools.cached_property
    def instructions(self) -> list[str]:
        """The task in words, per episode."""
        return [str(text) for text in self.read("episode/instruction")]

    @functools.cached_property
    def source_ids(self) -> list[str]:
        """Where each episode came from."""
        return [str(text) for text in self.read("episode/source_id")]

    @functools.cached_property
    def findings(self) -> list[Finding]:
        """What the import met: where files and metadata disagreed, what was left out and why."""
        return [Finding.from_json(data) for data in self.attributes.get("findings", [])]

    def has_camera(self, camera: str) -> np.ndarray:
        """(E,) bool: the episodes with pictures of `camera`; in the others its frames are black."""
        if camera not in self.spec.images:
            raise InputError(f"{self.path} has no camera '{camera}'.{suggest(camera, self.spec.images)}")
        if f"has_camera/{camera}" not in self._group["episode"]:  # type: ignore[operator]
            return np.ones(self.num_episodes, bool)
        return self.read(f"episode/has_camera/{camera}")

    def names(self) -> list[str]:
        """Names of the frame-aligned arrays."""
        return list(array_specs(self.spec))

    def array(self, name: str) -> zarr.Array:
        """The Zarr array `name`, such as `action` or `observation/images/wrist`. Raises InputError with the list."""
        return self._array(name)[0]

    def _array(self, name: str) -> tuple[zarr.Array, ShardReader | None]:
        """The array, and what reads its rows if Zarr itself does not."""
        if self._process != os.getpid() and is_remote(self.path):  # a forked child cannot use its parent's connections
            self._open()
        if name not in self._arrays:
            with self._reading(name):
                found = self._group.get(name)
            if not isinstance(found, zarr.Array):
                if name in self.names():
                    raise StoreError(f"{self.path}: the array '{name}' is gone.\nThe store is damaged: make it again.")
                raise InputError(f"{self.path} has no array '{name}'.{suggest(name, self.names())}")
            with self._reading(name):
                reader = ShardReader(found, self._shards(name, found.ndim)) if readable(found) else None
                chunks = reader.num_chunks if reader else found.nchunks_initialized
            if chunks < self.attributes.get("array_chunks", {}).get(name, chunks):  # Zarr reads what is gone as zeros
                raise StoreError(f"{self.path}: chunks of '{name}' are gone.\nThe store is damaged: make it again.")
            self._arrays[name] = found, reader
        return self._arrays[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of an array, the whole of it by default."""
        array, reader = self._array(name)
        with self._reading(name):
            if reader:
                return reader.read(np.arange(*slice(start, stop).indices(array.shape[0])))
            return np.asarray(array[start:stop])

    def read_rows(self, name: str, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows of an array by index, in any order: (B,) int -> (B, ...).

        Args:
            out: C-contiguous, (B, ...) of the array's dtype: filled and returned. Saves the system's clearing of a new
                one, a fifth of the time at 224x224.

        Pictures: each is one read and one decode. Threads may read from one store at once, and a process may fork.
        """
        array, reader = self._array(name)
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < array.shape[0]):
            raise InputError(f"'{name}' has rows 0 to {array.shape[0] - 1}; asked for {rows.min()} to {rows.max()}.")
        shape = (len(rows), *array.shape[1:])
        if out is None:
            out = np.empty(shape, array.dtype)
        elif out.shape != shape or out.dtype != array.dtype or not out.flags.c_contiguous:
            raise InputError(f"'{name}': out is {out.dtype} {out.shape}; it must be {array.dtype} {shape}, contiguous.")
        if reader:
            with self._reading(name):
                return reader.read(rows, out)
        chunk = array.chunks[0]  # decoded once each, one at a time: several times the speed of Zarr's `oindex`
        chunk_of = rows // chunk
        order = np.argsort(chunk_of, kind="stable")
        edges = np.flatnonzero(np.diff(chunk_of[order])) + 1
        for group in np.split(order, edges):
            if len(group):
                start = int(chunk_of[group[0]]) * chunk
                out[group] = self.read(name, start, start + chunk)[rows[group] - start]
        return out

    def frames(self, camera: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Images `start` to `stop` of a camera, (n, H, W, 3) uint8. Raises InputError with the list of cameras."""
        if camera not in self.spec.images:
            raise InputError(f"{self.path} has no camera '{camera}'.{suggest(camera, self.spec.images)}")
        return self.read(f"observation/images/{camera}", start, stop)

    def episode(self, index: int) -> Episode:
        """Episode `index`, whole; its pictures are read when asked for. A camera it has no pictures of is left out."""
        if not 0 <= index < self.num_episodes:
            raise InputError(f"{self.path} has episodes 0 to {self.num_episodes - 1}; asked for {index}.")
        start = int(self.episode_start[index])
        stop = start + int(self.episode_length[index])
        rows = {
            name: self.read(name, start, stop) for name in self.names() if not name.startswith("observation/images/")
        }
        success = int(self.success[index])
        return Episode(
            observations={key: rows[f"observation/{key}"] for key in self.spec.observations},
            images={c: self._pictures(c, start, stop) for c in self.spec.images if self.has_camera(c)[index]},
            action=rows.get("action"),
            step_valid=rows["step_valid"],
            terminated=rows["terminated"],
            truncated=rows["truncated"],
            timestamp=rows["timestamp"],
            reward=rows.get("reward"),
            instruction=self.instructions[index],
            success=None if success < 0 else bool(success),
            source_id=self.source_ids[index],
        )

    def _shards(self, name: str, dimensions: int) -> LocalShards | RemoteShards:
        if is_remote(self.path):
            return RemoteShards(functools.partial(filesystem, f"{self.path}/{name}"), dimensions)
        return LocalShards(Path(self.path) / name, dimensions)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Say what it means when `name` cannot be read."""
        try:
            yield
        except EmbodiedError:
            raise
        except Exception as error:  # a remote file system has exceptions of its own
            if is_remote(self.path) and not isinstance(error, (FileNotFoundError, RuntimeError, ValueError)):
                raise StoreError(reason(self.path, error)) from error
            raise StoreError(
                f"{self.path}: cannot read '{name}' ({error}).\nThe store is damaged: make it again."
            ) from error

    def _pictures(self, camera: str, start: int, stop: int) -> Frames:
        height, width, channels = self.spec.images[camera].shape
        rows = max(1, BLOCK_BYTES // (height * width * channels))

        def blocks() -> Iterator[np.ndarray]:
            for first in range(start, stop, rows):
                yield self.frames(camera, first, min(first + rows, stop))

        return Frames((stop - start, height, width, channels), blocks)

    def group_names(self, kind: str) -> list[str]:
        """Names of the groups inside the group `kind`, sorted; none where there is no such group."""
        with self._reading(kind):
            group = self._group.get(kind)
            if not isinstance(group, zarr.Group):
                return []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ZarrUserWarning)  # a set that is being uploaded is no group yet
                return sorted(group.group_keys())

    def open_group(self, path: str) -> zarr.Group:
        """The group `path`, which must exist."""
        with self._reading(path):
            group: Any = self._group[path]
            return group

    def frame_set(self, kind: str, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays (F, ...) by name of the set `<kind>/<name>`, and its attributes.

        Raises:
            LabelError: no such set (lists them), one without provenance, of another dataset, or of another length.
        """
        what = FRAME_SETS[kind]
        if name not in (names := self.group_names(kind)):
            raise LabelError(f"{self.path} has no {what} '{name}'.{suggest(name, names)}")
        group = self.open_group(f"{kind}/{name}")
        attributes: dict[str, Any] = dict(group.attrs)
        where = f"{self.path}: {what} '{name}'"
        if "provenance" not in attributes:
            raise LabelError(f"{where} is refused: it has no provenance. Make it again with 'embodied label'.")
        if attributes["provenance"].get("dataset_fingerprint") != self.fingerprint:
            raise LabelError(f"{where} is refused: its provenance names another dataset. Label this store itself.")
        with self._reading(f"{kind}/{name}"):
            arrays = {key: np.asarray(array[:]) for key, array in group.arrays()}
        for key, array in arrays.items():
            if len(array) != self.num_frames:
                raise LabelError(f"{where} has {len(array)} rows of '{key}' for {self.num_frames} frames.")
        return arrays, attributes

    def label_names(self) -> list[str]:
        """Names of the label sets, sorted."""
        with self._reading("labels"):
            if not isinstance(self._group.get("labels"), zarr.Group):
                raise StoreError(f"{self.path}: its group 'labels' is gone.\nThe store is damaged: make it again.")
        return self.group_names("labels")

    def label(self, name: str) -> Label:
        """The label set `name`. Raises LabelError as `frame_set`, or where it has no alignment or no score."""
        arrays, attributes = self.frame_set("labels", name)
        where = f"{self.path}: label set '{name}'"
        if "alignment" not in attributes:
            raise LabelError(f"{where} is refused: it has no alignment. Make it again with 'embodied label'.")
        if "score" not in arrays:
            raise LabelError(f"{where} has no 'score'. Make it again with 'embodied label'.")
        return Label(name, arrays.pop("score"), arrays, attributes["provenance"], attributes["alignment"])


def array_specs(spec: DatasetSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape of one row, dtype) of every frame-aligned array of a store with this spec."""
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, array in spec.observations.items():
        arrays[f"observation/{key}"] = (array.shape, "float32")
    for camera, array in spec.images.items():
        arrays[f"observation/images/{camera}"] = (array.shape, "uint8")
    if spec.action is not None:
        arrays["action"] = (spec.action.shape, "float32")
    if spec.has_reward:
        arrays["reward"] = ((), "float32")
    return arrays | {
        "step_valid": ((), "bool"),
        "terminated": ((), "bool"),
        "truncated": ((), "bool"),
        "timestamp": ((), "float64"),
    }


def _open(path: str) -> zarr.Group:
    if not is_remote(path):
        if not Path(path).exists():
            partial = Path(f"{path}.partial")
            unfinished = f"\n{partial} is unfinished: run the command that wrote it again." if partial.exists() else ""
            raise StoreError(f"{path} does not exist.{unfinished}")
        if not Path(path).is_dir():
            raise StoreError(f"{path} is a file, not an EpisodeStore.\nImport it: embodied data import {path} STORE")
    try:
        if is_remote(path):
            with remote_errors(path):
                group = zarr.open_group(path, mode="r", zarr_format=3, storage_options=STORAGE_OPTIONS)
        else:
            group = zarr.open_group(zarr_path(path), mode="r", zarr_format=3)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is not an EpisodeStore: it holds no Zarr v3 group.") from error
    version = group.attrs.get("embodied_schema")
    required = ("embodied_schema", "spec", "fingerprint", "num_frames", "num_episodes")
    if missing := [key for key in required if key not in group.attrs]:
        raise StoreError(f"{path} is a Zarr group but not an EpisodeStore: its attributes lack '{missing[0]}'.")
    if version != SCHEMA_VERSION:
        raise StoreError(f"{path} has schema version {version}; this program reads version {SCHEMA_VERSION}.")
    return group
