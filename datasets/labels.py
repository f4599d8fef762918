"""Writing label sets: one score per frame, in resumable blocks, whole or not at all, never without provenance."""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embodied.contracts.errors import LabelError
from embodied.contracts.provenance import hash_json
from embodied.datasets.location import Upload, is_remote, local_place
from embodied.datasets.staging import Staging
from embodied.datasets.store import EpisodeStore, Label
from embodied.datasets.write_arrays import ArrayStream

PASS = ("labeller", "config", "dataset_fingerprint")
REQUIRED_PROVENANCE = (*PASS, "code_version")


class LabelWriter:
    """Writes the label set `name` of a store.

    Finished blocks wait in `<store>.labels-partial/<name>/`, of a remote store in the cache; a killed pass resumes
    at the first missing one and ends with arrays byte-identical to an uninterrupted one's.

    Args:
        store: local or remote.
        name: letters, digits, `_`, `-`, `.`.
        provenance: must have `labeller`, `config`, `dataset_fingerprint`, `code_version`; the first three decide
            whether blocks found on disk belong to the same pass.
        block: frames per block.
        alignment: `post` (the reward of the step at frame t is score[t + 1]) or `pre` (score[t]).

    Raises:
        LabelError: the name is taken, provenance is missing or of another dataset, or another pass was interrupted.
    """

    def __init__(
        self, store: EpisodeStore, name: str, provenance: Mapping[str, Any], block: int = 4096, alignment: str = "post"
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise LabelError(f"'{name}' is no name for a label set: use letters, digits, '_', '-', '.'.")
        if missing := [key for key in REQUIRED_PROVENANCE if not provenance.get(key) and provenance.get(key) != {}]:
            raise LabelError(f"Label set '{name}' is refused: its provenance lacks {', '.join(missing)}.")
        if provenance["dataset_fingerprint"] != store.fingerprint:
            raise LabelError(f"Label set '{name}' is refused: its provenance names another dataset than {store.path}.")
        if alignment not in ("post", "pre"):
            raise LabelError(f"Alignment '{alignment}' is unknown. Valid: post, pre.")
        self.store, self.name, self.block = store, name, block
        self._attributes = {"provenance": dict(provenance), "alignment": alignment}
        job = hash_json([{key: provenance[key] for key in PASS}, block, alignment])
        place = f"{store.path}/labels/{name}"
        self._upload = Upload(place, job, "label set") if is_remote(store.path) else None
        self.path = local_place(place) if self._upload else Path(place)
        self.staging = (
            self.path.with_name(self.path.name + ".partial")
            if self._upload
            else Path(f"{store.path}.labels-partial") / name
        )
        # Killed between the last rename or upload and the removal of the staging folder: it is whole, only tidy up.
        self._staging = Staging(self.staging, job, "label set", LabelError)
        self._renamed = self.path.exists() and self._staging.belongs()
        there = self._upload.attributes() if self._upload else None
        self._sent = there is not None and self._staging.belongs() and _same_pass(there, self._attributes)
        taken, done = (there is not None, self._sent) if self._upload else (self.path.exists(), self._renamed)
        if taken and not done:
            raise LabelError(
                f"{store.path} has a label set '{name}' already.\nLabels are never overwritten: name another."
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

    def write_block(self, index: int, scores: np.ndarray, **channels: np.ndarray) -> None:
        """Stage one block: scores (frames of the block,), and further channels (frames, ...) by name.

        Raises:
            LabelError: a score or channel is not finite (names the frame), has a wrong length, or the disk refuses.
        """
        start, stop = self._bounds(index)
        arrays = {name: np.asarray(a, np.float32) for name, a in {"score": scores, **channels}.items()}
        for name, values in arrays.items():
            if len(values) != stop - start or (name == "score" and values.ndim != 1):
                raise LabelError(
                    f"'{name}' of block {index} has shape {values.shape}; frames {start} to {stop - 1} need one each."
                )
            if not np.isfinite(values).all():
                frame = start + int(np.argwhere(~np.isfinite(values))[0][0])
                raise LabelError(f"Label set '{self.name}': '{name}' of frame {frame} is {values[frame - start]}.")
        self._staging.write(self._file(index), arrays)

    def finish(self, **counts: Any) -> Label:
        """Join the blocks and put the label set in the store.

        Args:
            counts: kept in the provenance beside the rest, for example `abstentions=3`.
        """
        if not self._renamed and not self._sent:
            if missing := [index for index, _, _ in self.blocks()]:
                raise LabelError(f"Label set '{self.name}': {len(missing)} of {self.num_blocks} blocks are missing.")
            self._staging.publish(lambda folder: self._join(folder, counts), self.path)
        if self._upload:
            if not self._sent:
                self._upload.send(self.path)
            shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(self.staging)
        if not self._upload and not any(self.staging.parent.iterdir()):
            self.staging.parent.rmdir()
        return self.store.label(self.name)

    def _join(self, folder: Path, counts: Mapping[str, Any]) -> None:
        group = zarr.open_group(folder, mode="w-", zarr_format=3)
        streams: dict[str, ArrayStream] = {}
        for index in range(self.num_blocks):
            with np.load(self._file(index), allow_pickle=False) as file:
                arrays = dict(file)
            if index == 0:
                for name, rows in sorted(arrays.items()):
                    streams[name] = ArrayStream(group, name, (self.store.num_frames, *rows.shape[1:]), "float32")
            if set(arrays) != set(streams):
                raise LabelError(
                    f"Label set '{self.name}': block {index} has {sorted(arrays)}, block 0 {sorted(streams)}."
                )
            for name, stream in streams.items():
                stream.append(arrays[name])
        digests = {name: stream.close() for name, stream in streams.items()}
        provenance = self._attributes["provenance"] | {"counts": dict(counts)}  # type: ignore[operator]
        group.attrs.update(self._attributes | {"provenance": provenance, "fingerprint": hash_json(digests)})

    def _bounds(self, index: int) -> tuple[int, int]:
        return index * self.block, min((index + 1) * self.block, self.store.num_frames)

    def _file(self, index: int) -> Path:
        return self.staging / f"block_{index:06d}.npz"


def _same_pass(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the attributes of two label sets name one labeller, configuration, dataset and alignment."""
    one, other = first.get("provenance", {}), second["provenance"]
    return first.get("alignment") == second["alignment"] and all(
        hash_json(one.get(key)) == hash_json(other[key]) for key in PASS
    )
