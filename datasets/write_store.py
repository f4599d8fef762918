"""Writing an EpisodeStore: episodes are staged one by one, then the store appears whole or not at all."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embodied.contracts.errors import InputError, StoreError
from embodied.contracts.provenance import canonical_json, hash_json
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode, blocks_of
from embodied.datasets.finding import Finding
from embodied.datasets.location import Upload, is_remote, local_place, location, zarr_path
from embodied.datasets.read_frames import LocalShards, ShardReader
from embodied.datasets.staging import Staging
from embodied.datasets.store import BLOCK_BYTES, SCHEMA_VERSION, EpisodeStore, array_specs
from embodied.datasets.write_arrays import PICTURE_CODECS, ArrayStream, choose_codec

SAMPLE = 8  # pictures that decide how a camera is compressed
IMAGES = "observation/images/"


class StoreWriter:
    """Writes the EpisodeStore at `path`.

    Finished episodes wait in `<path>.partial/`, one file each and a folder of compressed pictures, so that a killed
    command resumes at the first missing one; several processes may write different indices. `finish` joins them and
    renames the result to `path`. A store at a URL is made in the cache folder (EMBODIED_CACHE) and then uploaded.

    Args:
        path: the store's folder or fsspec URL; must not exist yet.
        spec: what each frame holds.
        provenance: from `embodied.contracts.provenance.provenance`; its `config` and `inputs` decide whether a staging
            folder found on disk belongs to the same job.
        source: URL or path of the recordings.
        licence: licence of the recordings, as an SPDX name where there is one.

    Raises:
        StoreError: `path` exists, the staging folder belongs to another configuration, or the disk or URL
            refuses.
    """

    def __init__(
        self, path: str | Path, spec: DatasetSpec, provenance: dict[str, Any], source: str = "", licence: str = ""
    ) -> None:
        self.destination = location(path)
        self.spec = spec
        self._attributes = {"source": source, "licence": licence, "provenance": provenance}
        job = _job_of({"spec": spec.to_json(), **self._attributes})
        self._upload = Upload(self.destination, job, "store") if is_remote(self.destination) else None
        self.path = local_place(self.destination) if self._upload else Path(self.destination)
        self.staging = self.path.with_name(self.path.name + ".partial")
        self._staging = Staging(self.staging, job, "store", StoreError)
        # Killed between the last rename or upload and the removal of the staging folder: it is whole, only tidy up.
        self._renamed = self.path.exists() and self._staging.belongs()
        there = self._upload.attributes() if self._upload else None
        self._sent = there is not None and self._staging.belongs() and _job_of(there) == job
        taken, done = (there is not None, self._sent) if self._upload else (self.path.exists(), self._renamed)
        if taken and not done:
            raise StoreError(
                f"{self.destination} exists already.\nStores are never overwritten: delete it or name another."
            )
        if self._upload and not self._renamed:
            shutil.rmtree(self.path, ignore_errors=True)  # of a job whose staging folder is gone
        self._staging.claim({"config": provenance}, replace_if_without="episode_*.npz")
        if self._upload and not self._sent:
            self._upload.claim()

    def has(self, index: int) -> bool:
        """Whether episode `index` is written, or was skipped."""
        return self._renamed or self._sent or self._file(index).exists()

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
            findings: kept in the store's attributes, before those of skipped episodes. Their episode numbers are those
                of `write_episode`; the store counts without the skipped ones.

        Raises:
            InputError: every episode was skipped; says why the first was.
            StoreError: an episode is missing.
        """
        if not self._renamed and not self._sent:
            missing = [i for i in range(num_episodes) if not self.has(i)]
            if missing or num_episodes == 0:
                what = (
                    f"{len(missing)} of {num_episodes} are missing, first {missing[0]}" if missing else "there is none"
                )
                raise StoreError(f"Cannot finish {self.destination}: episodes {what}.")
            self._staging.publish(lambda folder: self._join(folder, num_episodes, findings), self.path)
        if self._upload:
            if not self._sent:
                self._upload.send(self.path)
            shutil.rmtree(self.path, ignore_errors=True)
        self._staging.remove()
        return EpisodeStore(self.destination)

    def abandon(self) -> None:
        """Remove the staging folder and the episodes in it: for a source that cannot be finished as it is."""
        with contextlib.suppress(OSError):  # what is said is why it was abandoned
            self._staging.remove()
        if self._upload:
            self._upload.give_up()

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
        root = zarr.open_group(zarr_path(folder), mode="w-", zarr_format=3)
        root.create_group("labels")
        codecs = {IMAGES + camera: self._codec(camera, kept) for camera in self.spec.images}
        streams = {
            name: ArrayStream(root, name, (num_frames, *shape), dtype, codecs.get(name, PICTURE_CODECS[0]))
            for name, (shape, dtype) in array_specs(self.spec).items()
        }
        for index, length in zip(kept, lengths, strict=True):
            with np.load(self._file(index), allow_pickle=False) as file:
                for name, stream in streams.items():
                    if not name.startswith(IMAGES):
                        stream.append(file[name])
            for camera in self.spec.images:
                stream = streams[IMAGES + camera]
                if reader := self._staged(index, camera):
                    block = max(1, BLOCK_BYTES // max(1, int(np.prod(self.spec.images[camera].shape))))
                    for start in range(0, length, block):
                        stream.append(reader.read(np.arange(start, min(start + block, length))))
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
                "findings": [finding.to_json() for finding in [*_placed(findings, kept), *skipped]],
                **self._attributes,
            }
        )

    def _staged(self, index: int, camera: str) -> ShardReader | None:
        """Reads the staged pictures of an episode; None where it has none."""
        folder = self._pictures(index) / camera
        if not folder.exists():
            return None
        array = zarr.open_array(zarr_path(folder), mode="r", zarr_format=3)
        return ShardReader(array, LocalShards(folder, array.ndim))

    def _codec(self, camera: str, episodes: Sequence[int]) -> tuple[str, int, str]:
        """The codec for a camera, from pictures of the first episode that has any: the same in every run."""
        for index in episodes:
            if reader := self._staged(index, camera):
                return choose_codec(reader.read(np.linspace(0, reader.num_rows - 1, SAMPLE).astype(np.int64)))
        return PICTURE_CODECS[0]

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


def _job_of(attributes: Mapping[str, Any]) -> str:
    """Hash of what decides a store's content, from its attributes."""
    provenance = attributes.get("provenance", {})
    return hash_json(
        [attributes.get("spec"), provenance.get("config"), provenance.get("inputs"), attributes.get("source")]
    )


def _placed(findings: Sequence[Finding], kept: Sequence[int]) -> list[Finding]:
    """The findings with the store's episode numbers."""
    place = {index: number for number, index in enumerate(kept)}
    placed = []
    for finding in findings:
        if finding.episode is None or finding.episode in place:
            number = None if finding.episode is None else place[finding.episode]
            placed.append(dataclasses.replace(finding, episode=number))
        else:
            text = f"episode {finding.episode} of the source, which was left out: {finding.message}"
            placed.append(dataclasses.replace(finding, episode=None, message=text))
    return placed


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
    group = zarr.open_group(zarr_path(folder), mode="w-", zarr_format=3)
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
