"""Writing an EpisodeStore: episodes are staged one by one, then the store appears whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from embodied.contracts.errors import InputError, StoreError
from embodied.contracts.provenance import canonical_json, hash_json
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.staging import Staging
from embodied.datasets.store import SCHEMA_VERSION, EpisodeStore, array_specs

# Measured on 64x64 images: 16 images per chunk (192 KiB) stream at 60,000 images/s and give one image in 1.5 ms;
# one image per chunk streams at 4,700 and is no faster at random, because Zarr's cost is per call and per chunk.
CHUNK_BYTES = 200_000
SHARD_BYTES = 6_400_000


class StoreWriter:
    """Writes the EpisodeStore at `path`.

    Finished episodes wait in `<path>.partial/`, one file each, so that a killed command resumes at the first missing
    one; several processes may write different indices. `finish` joins them and renames the result to `path`.

    Args:
        path: the store's folder; must not exist yet.
        spec: what each frame holds.
        provenance: from `embodied.contracts.provenance.provenance`; its `config` and `inputs` decide whether a staging
            folder found on disk belongs to the same job.
        source: URL or path of the recordings.
        licence: licence of the recordings, as an SPDX name where there is one.

    Raises:
        StoreError: `path` exists, the staging folder belongs to another configuration, or the disk refuses.
    """

    def __init__(
        self, path: str | Path, spec: DatasetSpec, provenance: dict[str, Any], source: str = "", licence: str = ""
    ) -> None:
        self.path = Path(path)
        self.spec = spec
        self._attributes = {"source": source, "licence": licence, "provenance": provenance}
        job = hash_json([spec.to_json(), provenance.get("config"), provenance.get("inputs"), source])
        self.staging = self.path.with_name(self.path.name + ".partial")
        # Killed between the last rename and the removal of the staging folder: the store is whole, only tidy up.
        self._staging = Staging(self.staging, job, "store", StoreError)
        self._renamed = self.path.exists() and self._staging.belongs()
        if self.path.exists() and not self._renamed:
            raise StoreError(f"{self.path} exists already.\nStores are never overwritten: delete it or name another.")
        self._staging.claim({"config": provenance}, replace_if_without="episode_*.npz")

    def has(self, index: int) -> bool:
        """Whether episode `index` is written."""
        return self._renamed or self._file(index).exists()

    def write_episode(self, index: int, episode: Episode) -> None:
        """Check and stage one episode. Raises InputError (bad episode) or StoreError (the disk refuses)."""
        episode.check(self.spec)
        arrays = _to_arrays(episode, self.spec)
        info = {"instruction": episode.instruction, "success": episode.success, "source_id": episode.source_id}
        arrays["info"] = np.frombuffer(canonical_json(info).encode(), np.uint8)
        self._staging.write(self._file(index), arrays)

    def finish(self, num_episodes: int) -> EpisodeStore:
        """Join episodes 0 to `num_episodes` - 1 into the store, rename it to `path`, remove the staging folder.

        Memory is bounded by one episode and one shard per array. Raises StoreError when an episode is missing.
        """
        if not self._renamed:
            missing = [i for i in range(num_episodes) if not self.has(i)]
            if missing or num_episodes == 0:
                what = (
                    f"{len(missing)} of {num_episodes} are missing, first {missing[0]}" if missing else "there is none"
                )
                raise StoreError(f"Cannot finish {self.path}: episodes {what}.")
            self._staging.publish(lambda folder: self._join(folder, num_episodes), self.path)
        shutil.rmtree(self.staging)
        return EpisodeStore(self.path)

    def abandon(self) -> None:
        """Remove the staging folder and the episodes in it: for a source that cannot be finished as it is."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.staging / f"episode_{index:06d}.npz"

    def _staged(self, num_episodes: int) -> Iterator[dict[str, np.ndarray]]:
        for index in range(num_episodes):
            with np.load(self._file(index), allow_pickle=False) as file:
                yield dict(file)

    def _join(self, folder: Path, num_episodes: int) -> None:
        lengths, infos = self._headers(num_episodes)
        num_frames = int(lengths.sum())
        root = zarr.open_group(folder, mode="w-", zarr_format=3)
        root.create_group("labels")
        streams = {
            name: ArrayStream(root, name, (num_frames, *shape), dtype)
            for name, (shape, dtype) in array_specs(self.spec).items()
        }
        for arrays in self._staged(num_episodes):
            for name, stream in streams.items():
                stream.append(arrays[name])
        digests = {name: stream.close() for name, stream in streams.items()}
        success = [-1 if info["success"] is None else int(info["success"]) for info in infos]
        for name, values in {
            "start": np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
            "length": lengths,
            "success": np.array(success, np.int8),
        }.items():
            stream = ArrayStream(root, f"episode/{name}", values.shape, values.dtype.name)
            stream.append(values)
            digests[f"episode/{name}"] = stream.close()
        for key in ("instruction", "source_id"):
            texts = [info[key] for info in infos]
            array = root.create_array(
                f"episode/{key}", shape=(num_episodes,), dtype="str", chunks=(max(1, num_episodes),)
            )
            array[:] = np.array(texts, dtype=object)
            digests[f"episode/{key}"] = hash_json(texts)
        arrays = sorted((name, item) for name, item in root.members(max_depth=None) if isinstance(item, zarr.Array))
        chunks = {name: array.nchunks_initialized for name, array in arrays}
        root.attrs.update(
            {
                "embodied_schema": SCHEMA_VERSION,
                "spec": self.spec.to_json(),
                "num_frames": num_frames,
                "num_episodes": num_episodes,
                "array_hashes": digests,
                "array_chunks": chunks,
                "fingerprint": hash_json([self.spec.to_json(), digests]),
                **self._attributes,
            }
        )

    def _headers(self, num_episodes: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        lengths = np.zeros(num_episodes, np.int64)
        infos = []
        for index in range(num_episodes):
            with np.load(self._file(index), allow_pickle=False) as file:
                lengths[index] = len(file["step_valid"])
                infos.append(json.loads(file["info"].tobytes()))
        return lengths, infos


class ArrayStream:
    """Appends rows to a new Zarr array, writing whole shards only: fast, and the same bytes in every run.

    Blosc compresses a chunk as one block here: with several blocks and threads, their order in the file would vary.

    Args:
        group: parent group.
        name: array name, `/` between groups.
        shape: full shape, rows first.
        dtype: NumPy name.

    Attributes:
        num_waiting: rows taken and not yet written; less than a shard between two appends.
    """

    def __init__(self, group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> None:
        itemsize = np.dtype(dtype).itemsize
        row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
        chunk = _power_of_two(CHUNK_BYTES / row_bytes)
        # Only images are sharded: a shard bounds the number of files, and small arrays have few anyway.
        self._unit = chunk * _power_of_two(SHARD_BYTES / (chunk * row_bytes)) if len(shape) == 4 else chunk
        self._array = group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(chunk, *shape[1:]),
            shards=(self._unit, *shape[1:]) if self._unit > chunk else None,
            compressors=BloscCodec(
                cname="lz4",
                clevel=5,
                shuffle="shuffle" if itemsize > 1 else "noshuffle",
                typesize=itemsize,
                blocksize=chunk * row_bytes,
            ),
        )
        self._dtype = np.dtype(dtype)
        self._digest = hashlib.sha256(canonical_json([name, list(shape), dtype]).encode())
        self._waiting: list[np.ndarray] = []
        self.num_waiting = 0
        self._written = 0

    def append(self, rows: np.ndarray) -> None:
        """Add (n, ...) rows."""
        rows = np.ascontiguousarray(rows, self._dtype)
        self._digest.update(rows.data)
        self._waiting.append(rows)
        self.num_waiting += len(rows)
        if self.num_waiting >= self._unit:
            joined = np.concatenate(self._waiting)
            whole = len(joined) - len(joined) % self._unit
            for start in range(0, whole, self._unit):
                self._write(joined[start : start + self._unit])
            self._waiting = [joined[whole:].copy()]
            self.num_waiting = len(joined) - whole

    def close(self) -> str:
        """Write what is left. Returns the SHA-256 over name, shape, dtype and the rows' bytes in order."""
        if self.num_waiting:
            self._write(np.concatenate(self._waiting))
        if self._written != self._array.shape[0]:
            raise InputError(f"'{self._array.name}': {self._written} rows came, {self._array.shape[0]} were announced.")
        return self._digest.hexdigest()

    def _write(self, rows: np.ndarray) -> None:
        self._array[self._written : self._written + len(rows)] = rows
        self._written += len(rows)


def _to_arrays(episode: Episode, spec: DatasetSpec) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray | None] = {
        "action": episode.action,
        "reward": episode.reward,
        "step_valid": episode.step_valid,
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "timestamp": episode.timestamp,
    }
    arrays |= {f"observation/{key}": a for key, a in episode.observations.items()}
    arrays |= {f"observation/images/{camera}": a for camera, a in episode.images.items()}
    return {name: np.asarray(arrays[name], dtype) for name, (_, dtype) in array_specs(spec).items()}


def _power_of_two(value: float) -> int:
    """The largest power of two not above `value`, at least 1."""
    return 1 << max(0, int(np.log2(max(1.0, value))))
