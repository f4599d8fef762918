"""Writing an EpisodeStore: episodes are staged one by one, then the store appears whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from embodied.contracts.errors import InputError, StoreError
from embodied.contracts.provenance import canonical_json, hash_json
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode, blocks_of
from embodied.datasets.finding import Finding
from embodied.datasets.staging import Staging
from embodied.datasets.store import SCHEMA_VERSION, EpisodeStore, array_specs

# Measured on 64x64 images: 16 images per chunk (192 KiB) stream at 60,000 images/s and give one image in 1.5 ms;
# one image per chunk streams at 4,700 and is no faster at random, because Zarr's cost is per call and per chunk.
CHUNK_BYTES = 200_000
SHARD_BYTES = 6_400_000
IMAGES = "observation/images/"


class StoreWriter:
    """Writes the EpisodeStore at `path`.

    Finished episodes wait in `<path>.partial/`, one file each and a folder of compressed pictures, so that a killed
    command resumes at the first missing one; several processes may write different indices. `finish` joins them and
    renames the result to `path`.

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
        """Whether episode `index` is written, or was skipped."""
        return self._renamed or self._file(index).exists()

    def write_episode(self, index: int, episode: Episode) -> None:
        """Check and stage one episode. Raises InputError (bad episode) or StoreError (the disk refuses)."""
        episode.check(self.spec)
        arrays = _to_arrays(episode, self.spec)
        info = {
            "instruction": episode.instruction,
            "success": episode.success,
            "source_id": episode.source_id,
            "cameras": sorted(episode.images),
        }
        arrays["info"] = np.frombuffer(canonical_json(info).encode(), np.uint8)
        if episode.images:
            self._staging.write_folder(self._pictures(index), lambda folder: _stage_pictures(folder, episode))
        self._staging.write(self._file(index), arrays)

    def skip_episode(self, index: int, finding: Finding) -> None:
        """Stage the fact that the source's episode `index` cannot be used; the store remembers the finding."""
        text = canonical_json({"skipped": finding.to_json()})
        self._staging.write(self._file(index), {"info": np.frombuffer(text.encode(), np.uint8)})

    def finish(self, num_episodes: int, findings: Sequence[Finding] = ()) -> EpisodeStore:
        """Join episodes 0 to `num_episodes` - 1 into the store, rename it to `path`, remove the staging folder.

        Memory is bounded by one shard per camera and one episode's other arrays.

        Args:
            findings: kept in the store's attributes, before those of skipped episodes.

        Raises:
            InputError: every episode was skipped; says why the first was.
            StoreError: an episode is missing.
        """
        if not self._renamed:
            missing = [i for i in range(num_episodes) if not self.has(i)]
            if missing or num_episodes == 0:
                what = (
                    f"{len(missing)} of {num_episodes} are missing, first {missing[0]}" if missing else "there is none"
                )
                raise StoreError(f"Cannot finish {self.path}: episodes {what}.")
            self._staging.publish(lambda folder: self._join(folder, num_episodes, findings), self.path)
        shutil.rmtree(self.staging)
        return EpisodeStore(self.path)

    def abandon(self) -> None:
        """Remove the staging folder and the episodes in it: for a source that cannot be finished as it is."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.staging / f"episode_{index:06d}.npz"

    def _pictures(self, index: int) -> Path:
        return self.staging / f"episode_{index:06d}.images"

    def _join(self, folder: Path, num_episodes: int, findings: Sequence[Finding]) -> None:
        kept, lengths, infos, skipped = self._headers(num_episodes)
        if not kept:
            more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
            raise InputError(f"No episode can be used{more}. {skipped[0].message}")
        num_frames = int(lengths.sum())
        root = zarr.open_group(folder, mode="w-", zarr_format=3)
        root.create_group("labels")
        streams = {
            name: ArrayStream(root, name, (num_frames, *shape), dtype)
            for name, (shape, dtype) in array_specs(self.spec).items()
        }
        for index, length in zip(kept, lengths, strict=True):
            with np.load(self._file(index), allow_pickle=False) as file:
                for name, stream in streams.items():
                    if not name.startswith(IMAGES):
                        stream.append(file[name])
            for camera in self.spec.images:
                staged = self._pictures(index) / camera
                stream = streams[IMAGES + camera]
                if staged.exists():
                    array = zarr.open_array(staged, mode="r", zarr_format=3)
                    for start in range(0, length, stream.rows_at_once):
                        stream.append(np.asarray(array[start : start + stream.rows_at_once]))
                else:
                    stream.skip(length)
        digests = {name: stream.close() for name, stream in streams.items()}
        success = [-1 if info["success"] is None else int(info["success"]) for info in infos]
        columns = {
            "start": np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
            "length": lengths,
            "success": np.array(success, np.int8),
        }
        for camera in self.spec.images:
            has = np.array([camera in info["cameras"] for info in infos])
            if not has.all():
                columns[f"has_camera/{camera}"] = has
        for name, values in columns.items():
            stream = ArrayStream(root, f"episode/{name}", values.shape, values.dtype.name)
            stream.append(values)
            digests[f"episode/{name}"] = stream.close()
        for key in ("instruction", "source_id"):
            texts = [info[key] for info in infos]
            array = root.create_array(f"episode/{key}", shape=(len(kept),), dtype="str", chunks=(max(1, len(kept)),))
            array[:] = np.array(texts, dtype=object)
            digests[f"episode/{key}"] = hash_json(texts)
        arrays = sorted((name, item) for name, item in root.members(max_depth=None) if isinstance(item, zarr.Array))
        chunks = {name: array.nchunks_initialized for name, array in arrays}
        root.attrs.update(
            {
                "embodied_schema": SCHEMA_VERSION,
                "spec": self.spec.to_json(),
                "num_frames": num_frames,
                "num_episodes": len(kept),
                "array_hashes": digests,
                "array_chunks": chunks,
                "fingerprint": hash_json([self.spec.to_json(), digests]),
                "findings": [finding.to_json() for finding in [*findings, *skipped]],
                **self._attributes,
            }
        )

    def _headers(self, num_episodes: int) -> tuple[list[int], np.ndarray, list[dict[str, Any]], list[Finding]]:
        """Of the episodes that are kept: indices, lengths, infos; and why the others were skipped."""
        kept, lengths, infos, skipped = [], [], [], []
        for index in range(num_episodes):
            with np.load(self._file(index), allow_pickle=False) as file:
                info = json.loads(file["info"].tobytes())
                if "skipped" in info:
                    skipped.append(Finding.from_json(info["skipped"]))
                    continue
                kept.append(index)
                infos.append(info)
                lengths.append(len(file["step_valid"]))
        return kept, np.array(lengths, np.int64), infos, skipped


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

    @property
    def rows_at_once(self) -> int:
        """Rows that are written together; more than that in one `append` only costs memory."""
        return self._unit

    def append(self, rows: np.ndarray) -> None:
        """Add (n, ...) rows."""
        rows = np.ascontiguousarray(rows, self._dtype)
        self._digest.update(rows.data)
        self._take(rows)

    def _take(self, rows: np.ndarray) -> None:
        self._waiting.append(rows)
        self.num_waiting += len(rows)
        if self.num_waiting >= self._unit:
            joined = np.concatenate(self._waiting)
            whole = len(joined) - len(joined) % self._unit
            for start in range(0, whole, self._unit):
                self._write(joined[start : start + self._unit])
            self._waiting = [joined[whole:].copy()]
            self.num_waiting = len(joined) - whole

    def skip(self, rows: int) -> None:
        """Add rows of zeros that are neither kept on disk nor read back as bytes: for pictures that are missing."""
        self._digest.update(f"{rows} rows are missing".encode())
        head = min(rows, -self.num_waiting % self._unit)
        self._take(np.zeros((head, *self._array.shape[1:]), self._dtype))
        whole = (rows - head) // self._unit * self._unit
        self._written += whole
        self._take(np.zeros((rows - head - whole, *self._array.shape[1:]), self._dtype))

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
    """Everything but the pictures, under the names of the store."""
    arrays: dict[str, np.ndarray | None] = {
        "action": episode.action,
        "reward": episode.reward,
        "step_valid": episode.step_valid,
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "timestamp": episode.timestamp,
    }
    arrays |= {f"observation/{key}": a for key, a in episode.observations.items()}
    specs = {name: dtype for name, (_, dtype) in array_specs(spec).items() if not name.startswith(IMAGES)}
    return {name: np.asarray(arrays[name], dtype) for name, dtype in specs.items()}


def _stage_pictures(folder: Path, episode: Episode) -> None:
    """One Zarr array per camera, compressed like the store's: staging an hour of video costs no hour of raw pixels."""
    group = zarr.open_group(folder, mode="w-", zarr_format=3)
    for camera, pictures in episode.images.items():
        stream = ArrayStream(group, camera, tuple(pictures.shape), "uint8")
        num_rows = 0
        for block in blocks_of(pictures):
            if block.dtype != np.uint8 or block.shape[1:] != tuple(pictures.shape[1:]):
                raise InputError(
                    f"Episode '{episode.source_id}': camera '{camera}' gives {block.dtype} {block.shape[1:]} "
                    f"at frame {num_rows}, {tuple(pictures.shape[1:])} before."
                )
            num_rows += len(block)
            if num_rows <= len(pictures):
                stream.append(block)
        if num_rows != len(pictures):
            raise InputError(
                f"Episode '{episode.source_id}': camera '{camera}' gives {num_rows} pictures for {len(pictures)} rows."
            )
        stream.close()


def _power_of_two(value: float) -> int:
    """The largest power of two not above `value`, at least 1."""
    return 1 << max(0, int(np.log2(max(1.0, value))))
