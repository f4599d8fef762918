"""Preferences kept with a store: which pairs were asked, in which order they were shown, what was answered.

`<store>/preferences/<name>/<array>`, one row per pair, with provenance. A set appears whole or not at all and is never
overwritten. Editing a store (split, merge, filter, drop) leaves preferences out: their rows would be others.
"""

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embodied.contracts.errors import LabelError, suggest
from embodied.contracts.preferences import Answer
from embodied.contracts.provenance import hash_json
from embodied.datasets.location import STORAGE_OPTIONS, Upload, is_remote, zarr_path
from embodied.datasets.staging import Staging
from embodied.datasets.store import EpisodeStore

KIND = "preferences"
ANSWERS = len(Answer)
_ROWS = ("first", "second", "answer", "votes", "weight", "annotator")


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences:
    """P pairs of segments of `length` frames, and what became of them.

    Attributes:
        task: the sentence that was asked about.
        camera: whose frames were shown; empty where none were.
        first, second: (P,) int64, row of the store at which each segment starts.
        answer: (P,) int8 `Answer`, the opinion that counts, about (first, second).
        votes: (P, 2, 4) int16: how often each `Answer` was given, as shown; [:, 0] shown as (first, second), [:, 1]
            the other way round.
        weight: (P,) float32 in [0, 1], how much the pair counts in a fit.
        annotator: (P,) int8 index into `annotators`: who had the last word.
        records: JSON text per pair: every raw answer with prompt, model, time, tokens and cost.
        provenance: must name `annotator`, `config`, `dataset_fingerprint` and `code_version`.
    """

    task: str
    camera: str
    length: int
    first: np.ndarray
    second: np.ndarray
    answer: np.ndarray
    votes: np.ndarray
    weight: np.ndarray
    annotator: np.ndarray
    annotators: tuple[str, ...]
    records: Sequence[str]
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.first)

    @property
    def decided(self) -> np.ndarray:
        """(P,) bool: a side was taken."""
        return self.answer <= Answer.SECOND

    @property
    def compared(self) -> np.ndarray:
        """(P,) bool: a side was taken, or neither was found better."""
        return self.answer <= Answer.NO_PREFERENCE

    def rows(self, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n, 2, length) rows of the store of the chosen pairs."""
        starts = np.stack([self.first[chosen], self.second[chosen]], 1)
        return starts[..., None] + np.arange(self.length)


def preference_names(store: EpisodeStore) -> list[str]:
    """Names of the preference sets of a store, sorted."""
    return store.group_names(KIND)


def read_preferences(store: EpisodeStore, name: str) -> Preferences:
    """The set `name`.

    Raises:
        LabelError: no such set (lists them), no provenance, one of another dataset, or damaged.
    """
    names = preference_names(store)
    where = f"{store.path}: preference set '{name}'"
    if name not in names:
        raise LabelError(f"{store.path} has no preference set '{name}'.{suggest(name, names)}")
    group = store.open_group(f"{KIND}/{name}")
    attributes = dict(group.attrs)
    provenance: Any = attributes.get("provenance")
    if not isinstance(provenance, Mapping):
        raise LabelError(f"{where} is refused: it has no provenance. Make it again with 'embodied label prefer'.")
    if provenance.get("dataset_fingerprint") != store.fingerprint:
        raise LabelError(f"{where} is refused: its provenance names another dataset.")
    arrays: dict[str, Any] = {key: np.asarray(array[:]) for key, array in group.arrays()}  # type: ignore[union-attr]
    count = len(arrays.get("first", ()))
    for key in (*_ROWS, "record"):
        if key not in arrays or len(arrays[key]) != count:
            raise LabelError(f"{where} is damaged: '{key}' does not have {count} rows. Make it again.")
    found = Preferences(
        task=str(attributes["task"]),
        camera=str(attributes["camera"]),
        length=int(attributes["length"]),  # type: ignore[call-overload]
        annotators=tuple(attributes["annotators"]),  # type: ignore[arg-type]
        records=[str(text) for text in arrays["record"]],
        provenance=provenance,
        **{key: arrays[key] for key in _ROWS},
    )
    _check(store, found, where)
    return found


def write_preferences(store: EpisodeStore, name: str, preferences: Preferences) -> None:
    """Put a set into the store, whole.

    Raises:
        LabelError: the name is taken or no name, provenance is missing or of another dataset, a row or an answer is out
            of range, or the disk refuses.
    """
    where = f"Preference set '{name}'"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise LabelError(f"'{name}' is no name for a preference set: use letters, digits, '_', '-', '.'.")
    for key in ("annotator", "config", "dataset_fingerprint", "code_version"):
        if key not in preferences.provenance:
            raise LabelError(f"{where} is refused: its provenance lacks '{key}'.")
    if preferences.provenance["dataset_fingerprint"] != store.fingerprint:
        raise LabelError(f"{where} is refused: its provenance names another dataset than {store.path}.")
    _check(store, preferences, where)
    if name in preference_names(store):
        raise LabelError(f"{store.path} has a preference set '{name}' already.\nNone is overwritten: name another.")
    job = hash_json([name, preferences.task, [int(x) for x in preferences.first], [int(x) for x in preferences.answer]])
    place = f"{store.path}/{KIND}/{name}"
    if not is_remote(store.path):
        zarr.open_group(zarr_path(f"{store.path}/{KIND}"), mode="a", zarr_format=3)  # if there is none
        staging = Staging(Path(f"{store.path}.{KIND}-partial") / name, job, "preference set", LabelError)
        staging.claim({}, replace_if_without="*.npz")
        staging.publish(lambda folder: _fill(folder, preferences), Path(place))
        staging.remove()
        if not any(staging.folder.parent.iterdir()):
            staging.folder.parent.rmdir()
        return
    zarr.open_group(zarr_path(f"{store.path}/{KIND}"), mode="a", zarr_format=3, storage_options=STORAGE_OPTIONS)
    upload = Upload(place, job, "preference set")
    upload.claim()
    with tempfile.TemporaryDirectory(prefix="embodied-preferences-") as folder:
        _fill(Path(folder) / name, preferences)
        upload.send(Path(folder) / name)


def _fill(folder: Path, preferences: Preferences) -> None:
    group = zarr.open_group(zarr_path(folder), mode="w-", zarr_format=3)
    for key, kind in zip(_ROWS, ("int64", "int64", "int8", "int16", "float32", "int8"), strict=True):
        group.create_array(key, data=np.asarray(getattr(preferences, key)).astype(kind))
    text = group.create_array(
        "record", shape=(len(preferences),), dtype=str, chunks=(max(1, min(256, len(preferences))),)
    )
    text[:] = np.array(list(preferences.records), dtype=object)
    group.attrs.update(
        {
            "task": preferences.task,
            "camera": preferences.camera,
            "length": preferences.length,
            "annotators": list(preferences.annotators),
            "provenance": dict(preferences.provenance),
        }
    )


def _check(store: EpisodeStore, found: Preferences, where: str) -> None:
    count = len(found)
    shapes = {key: np.shape(getattr(found, key)) for key in _ROWS}
    wanted = {key: (count,) for key in _ROWS} | {"votes": (count, 2, ANSWERS)}
    for key, shape in shapes.items():
        if shape != wanted[key]:
            raise LabelError(f"{where}: '{key}' has shape {shape}; {wanted[key]} is needed.")
    if len(found.records) != count:
        raise LabelError(f"{where}: {len(found.records)} records for {count} pairs.")
    if count == 0:
        return
    starts = np.concatenate([found.first, found.second])
    if starts.min() < 0 or starts.max() + found.length > store.num_frames:
        raise LabelError(f"{where}: segments lie outside the {store.num_frames} frames of {store.path}.")
    which = np.searchsorted(store.episode_start, starts, side="right") - 1
    if (starts + found.length > store.episode_start[which] + store.episode_length[which]).any():
        raise LabelError(f"{where}: a segment of {found.length} frames crosses the end of an episode.")
    if not np.isin(found.answer, list(Answer)).all():
        raise LabelError(f"{where}: an answer is none of {', '.join(a.name for a in Answer)}.")
    if not np.isin(found.annotator, range(len(found.annotators))).all():
        raise LabelError(f"{where}: an annotator's number is none of the {len(found.annotators)} annotators.")
    if not ((found.weight >= 0) & (found.weight <= 1)).all():
        raise LabelError(f"{where}: a weight lies outside [0, 1].")
