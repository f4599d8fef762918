"""Arrays with one row per frame, kept beside a store's own: label sets, embeddings. Append-only, with provenance.

`<store>/<kind>/<name>/<array>` (F, ...) float32. A set is written in resumable blocks and appears whole or not at all.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embodied.contracts.errors import LabelError
from embodied.contracts.provenance import hash_json
from embodied.datasets.location import STORAGE_OPTIONS, Upload, is_remote, local_place, zarr_path
from embodied.datasets.staging import Staging
from embodied.datasets.store import FRAME_SETS, EpisodeStore
from embodied.datasets.write_arrays import ArrayStream


class FrameSetWriter:
    """Writes the set `<kind>/<name>` of a store.

    Finished blocks wait in `<store>.<kind>-partial/<name>/`, of a remote store in the cache; a killed pass resumes at
    the first missing one and ends with arrays byte-identical to an uninterrupted one's. Several processes may write
    different blocks of one set.

    Args:
        store: local or remote.
        kind: a key of `FRAME_SETS`.
        name: letters, digits, `_`, `-`, `.`.
        provenance: must name `dataset_fingerprint`.
        deciding: keys of the provenance that decide whether blocks found on disk belong to the same pass.
        block: frames per block.
        attributes: kept beside the provenance; they decide too.

    Raises:
        LabelError: the name is taken, the provenance is of another dataset, or another pass was interrupted.
    """

    def __init__(
        self,
        store: EpisodeStore,
        kind: str,
        name: str,
        provenance: Mapping[str, Any],
        deciding: tuple[str, ...],
        block: int = 4096,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        what = FRAME_SETS[kind]
        self._title = f"{what[0].upper()}{what[1:]} '{name}'"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise LabelError(f"'{name}' is no name for {_a(what)}: use letters, digits, '_', '-', '.'.")
        if provenance["dataset_fingerprint"] != store.fingerprint:
            raise LabelError(f"{self._title} is refused: its provenance names another dataset than {store.path}.")
        self.store, self.name, self.block, self._kind = store, name, block, kind
        self._attributes: dict[str, Any] = {"provenance": dict(provenance), **(attributes or {})}
        self._deciding = deciding
        job = hash_json([{key: provenance[key] for key in deciding}, block, *(attributes or {}).values()])
        place = f"{store.path}/{kind}/{name}"
        self._upload = Upload(place, job, what) if is_remote(store.path) else None
        self.path = local_place(place) if self._upload else Path(place)
        self.staging = (
            self.path.with_name(self.path.name + ".partial")
            if self._upload
            else Path(f"{store.path}.{kind}-partial") / name
        )
        # Killed between the last rename or upload and the removal of the staging folder: it is whole, only tidy up.
        self._staging = Staging(self.staging, job, what, LabelError)
        self._renamed = self.path.exists() and self._staging.belongs()
        there = self._upload.attributes() if self._upload else None
        self._sent = there is not None and self._staging.belongs() and self._is_same_pass(there)
        taken, done = (there is not None, self._sent) if self._upload else (self.path.exists(), self._renamed)
        if taken and not done:
            raise LabelError(
                f"{store.path} has {_a(what)} '{name}' already.\n{_plural(what)} are never overwritten: name another."
            )
        if self._upload and not self._renamed:
            shutil.rmtree(self.path, ignore_errors=True)  # of a pass whose staging folder is gone
        self._staging.claim({})
        if self._upload and not self._sent:
            self._upload.claim()

    @property
    def num_blocks(self) -> int:
        return -(-self.store.num_frames // self.block)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(block index, first frame, frame after the last) of each block that is not done."""
        for index in range(self.num_blocks):
            if not self._renamed and not self._sent and not self._file(index).exists():
                yield index, *self._bounds(index)

    def write_arrays(self, index: int, **arrays: np.ndarray) -> None:
        """Stage one block: (frames of the block, ...) by name, the same names in every block.

        Raises:
            LabelError: a value is not finite (names the frame), a length is wrong, or the disk refuses.
        """
        start, stop = self._bounds(index)
        staged = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
        for name, values in staged.items():
            if len(values) != stop - start:
                raise LabelError(
                    f"'{name}' of block {index} has shape {values.shape}; frames {start} to {stop - 1} need one each."
                )
            if not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                raise LabelError(f"{self._title}: '{name}' of frame {start + row} is {values[row]}.")
        self._staging.write(self._file(index), staged)

    def finish(self, **counts: Any) -> Any:
        """Join the blocks and put the set in the store.

        Args:
            counts: kept in the provenance beside the rest, for example `abstentions=3`.
        """
        if not self._renamed and not self._sent:
            if missing := [index for index, _, _ in self.blocks()]:
                raise LabelError(f"{self._title}: {len(missing)} of {self.num_blocks} blocks are missing.")
            options: dict[str, Any] = {"storage_options": STORAGE_OPTIONS} if self._upload else {}
            zarr.open_group(
                zarr_path(f"{self.store.path}/{self._kind}"), mode="a", zarr_format=3, **options
            )  # if there is none
            self._staging.publish(lambda folder: self._join(folder, counts), self.path)
        if self._upload:
            if not self._sent:
                self._upload.send(self.path)
            shutil.rmtree(self.path, ignore_errors=True)
        self._staging.remove()
        if not self._upload and not any(self.staging.parent.iterdir()):
            self.staging.parent.rmdir()

    def _join(self, folder: Path, counts: Mapping[str, Any]) -> None:
        group = zarr.open_group(zarr_path(folder), mode="w-", zarr_format=3)
        streams: dict[str, ArrayStream] = {}
        for index in range(self.num_blocks):
            with np.load(self._file(index), allow_pickle=False) as file:
                arrays = dict(file)
            if index == 0:
                for name, rows in sorted(arrays.items()):
                    streams[name] = ArrayStream(group, name, (self.store.num_frames, *rows.shape[1:]), "float32")
            if set(arrays) != set(streams):
                raise LabelError(f"{self._title}: block {index} has {sorted(arrays)}, block 0 {sorted(streams)}.")
            for name, stream in streams.items():
                stream.append(arrays[name])
        digests = {name: stream.close() for name, stream in streams.items()}
        provenance = self._attributes["provenance"] | {"counts": dict(counts)}
        group.attrs.update(self._attributes | {"provenance": provenance, "fingerprint": hash_json(digests)})

    def _bounds(self, index: int) -> tuple[int, int]:
        return index * self.block, min((index + 1) * self.block, self.store.num_frames)

    def _file(self, index: int) -> Path:
        return self.staging / f"block_{index:06d}.npz"

    def _is_same_pass(self, there: Mapping[str, Any]) -> bool:
        """Whether the attributes of a finished set name what decides this one."""
        mine, other = self._attributes, there.get("provenance", {})
        return all(there.get(key) == mine[key] for key in mine if key != "provenance") and all(
            hash_json(other.get(key)) == hash_json(mine["provenance"][key]) for key in self._deciding
        )


def _a(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def _plural(what: str) -> str:
    return f"{what[0].upper()}{what[1:]}s"
