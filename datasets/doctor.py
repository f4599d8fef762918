"""`data doctor`: every check that has bitten users of recordings, on a store or between stores. It changes nothing."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import LabelError, StoreError
from embodied.contracts.provenance import canonical_json, hash_json
from embodied.contracts.specs import ArraySpec
from embodied.datasets.doctor_checks import (
    Ends,
    clock_findings,
    end_findings,
    length_findings,
    listed,
    spec_findings,
)
from embodied.datasets.doctor_columns import (
    ActionRange,
    Column,
    CopiedAction,
    column_findings,
    jump_findings,
    jumps,
    label_findings,
    reward_findings,
    unnamed_findings,
)
from embodied.datasets.doctor_media import media_findings
from embodied.datasets.duplicates import Contents, contents, rows_of_episodes, same_episodes
from embodied.datasets.finding import SEVERITIES, Finding
from embodied.datasets.store import EpisodeStore

Progress = Callable[[int, int, str], None]
FLAGS = ("step_valid", "terminated", "truncated")
IMAGES = "observation/images/"
SAME_REWARD = {"constant-reward", "reward-zero"}
DAMAGED = "The store is damaged: make it again, or copy it again."


def examine(
    store: EpisodeStore, deep: bool = False, progress: Progress = lambda done, total, text: None
) -> list[Finding]:
    """All findings of one store, errors first, in the order of the episodes. Those of its import are among them.

    Two passes over the low-dimensional arrays, and samples of the pictures. Memory: a few thousand frames of the
    former, 64 frames of the latter.

    Args:
        deep: read every byte and compare with the hashes that were written.
        progress: called with (checks done, checks in all, what is looked at).
    """
    found: list[Finding] = []
    damage = list(array_findings(store))
    if not damage and deep:
        progress(0, 4, "hashing every array")
        damage += hash_findings(store)
    found += damage
    if not damage:
        parts: list[Callable[[], Iterator[Finding]]] = [
            lambda: row_findings(store),
            lambda: duplicate_findings(store),
            lambda: (finding for camera in store.spec.images for finding in media_findings(store, camera)),
            lambda: all_label_findings(store),
        ]
        try:
            for done, part in enumerate(parts):
                progress(done, len(parts), "examining")
                found += part()
            progress(len(parts), len(parts), "examining")
        except StoreError as error:
            found.append(Finding("store-damaged", "error", str(error).splitlines()[0], DAMAGED))
    return sorted(_said_once(store.findings, found), key=lambda f: SEVERITIES.index(f.severity))


def _said_once(recorded: Sequence[Finding], found: Sequence[Finding]) -> list[Finding]:
    """Findings of the import and our own; of two that say the same the one that says more."""
    imported, own = {finding.check for finding in recorded}, {finding.check for finding in found}
    kept = [f for f in recorded if not (f.check in SAME_REWARD and own & SAME_REWARD)]
    return kept + [f for f in found if not (f.check == "missing-media" and f.check in imported)]


# ---- the files -----------------------------------------------------------------------------------


def array_findings(store: EpisodeStore) -> Iterator[Finding]:
    """Arrays that are gone, that lack chunks, or whose length or type is not what the store says."""
    expected = dict.fromkeys(store.names(), store.num_frames)
    for column in ("start", "length", "success", "instruction", "source_id"):
        expected[f"episode/{column}"] = store.num_episodes
    for name, rows in expected.items():
        try:
            array = store.array(name)
        except StoreError as error:
            yield Finding("store-damaged", "error", str(error).splitlines()[0], DAMAGED)
            continue
        except Exception as error:  # whatever Zarr raises for metadata that it cannot read
            yield Finding("store-damaged", "error", f"'{name}' cannot be opened: {error}", DAMAGED)
            continue
        if array.shape[0] != rows:
            message = f"'{name}' has {array.shape[0]} rows; the store says {rows}"
            yield Finding("count-mismatch", "error", message, DAMAGED)
    try:
        start, length = store.episode_start, store.episode_length
    except Exception as error:  # as above
        yield Finding("store-damaged", "error", f"the table of episodes cannot be read: {error}", DAMAGED)
        return
    if int(length.sum()) != store.num_frames or not np.array_equal(start, np.cumsum(length) - length):
        message = f"episodes have {int(length.sum())} frames in all; the store says {store.num_frames}"
        yield Finding("count-mismatch", "error", message, DAMAGED)


def hash_findings(store: EpisodeStore) -> Iterator[Finding]:
    """Arrays whose bytes are not those that were written (SHA-256 over name, shape, type and rows)."""
    for name, written in store.attributes.get("array_hashes", {}).items():
        try:
            found = _digest(store, name)
        except Exception as error:  # a damaged chunk; its codec raises what it likes
            yield Finding("store-damaged", "error", f"'{name}' cannot be read: {error}".splitlines()[0], DAMAGED)
            continue
        if found != written:
            message = f"the bytes of '{name}' are not those that were written: they changed since"
            yield Finding("content-changed", "error", message, DAMAGED)


def _digest(store: EpisodeStore, name: str) -> str:
    array = store.array(name)
    if name in ("episode/instruction", "episode/source_id"):
        return hash_json([str(text) for text in store.read(name)])
    digest = hashlib.sha256(canonical_json([name, list(array.shape), array.dtype.name]).encode())
    camera = name.removeprefix(IMAGES)
    if name.startswith(IMAGES) and not (has := store.has_camera(camera)).all():
        # Missing pictures are hashed as such, episode by episode: they are not kept as bytes.
        for start, length, there in zip(store.episode_start, store.episode_length, has, strict=True):
            if not there:
                digest.update(f"{length} rows are missing".encode())
                continue
            _update(digest, store, name, int(start), int(start + length))
    else:
        _update(digest, store, name, 0, array.shape[0])
    return digest.hexdigest()


def _update(digest: Any, store: EpisodeStore, name: str, start: int, stop: int) -> None:
    array = store.array(name)
    row_bytes = max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize)
    rows = max(array.chunks[0], 8_000_000 // row_bytes)
    for first in range(start, stop, rows):
        digest.update(np.ascontiguousarray(store.read(name, first, min(first + rows, stop))).data)


# ---- the rows ------------------------------------------------------------------------------------


def row_findings(store: EpisodeStore) -> Iterator[Finding]:
    """Clocks, ends, columns, actions, rewards and jumps: two passes over everything but the pictures."""
    spec = store.spec
    columns = new_columns(store, store.num_frames)
    names = [*columns, *FLAGS, "timestamp"]
    ends, periods, clocks = Ends(spec.action is not None), [], 0
    actions = [ActionRange(spec.action), CopiedAction(spec.observations, spec.action)] if spec.action else []
    for episode, rows in rows_of_episodes(store, names):
        yield from clock_findings(episode, rows["timestamp"], spec.control_dt)
        yield from end_findings(episode, rows)
        yield from _finite_findings(episode, rows, columns)
        if rows["timestamp"].any():
            clocks += 1
            periods.append(float(np.median(np.diff(rows["timestamp"]))))
        ends.add(rows)
        for check in actions:
            check.add(rows)
        for name, column in columns.items():
            # The row of a final observation has no action and no reward.
            column.add(rows[name][rows["step_valid"]] if name in ("action", "reward") else rows[name])
            if name.startswith("observation/"):
                column.add_steps(rows[name])
    if not clocks and store.num_frames > store.num_episodes:
        message = f"no episode has timestamps: all {store.num_frames} are zero"
        yield Finding("clock-zero", "note", message, "The source has no clock; gaps and dropped frames cannot be seen.")
    yield from spec_findings(spec, float(np.median(periods)) if periods else None)
    yield from length_findings(np.array(ends.lengths))
    for name, column in columns.items():
        if name != "reward" and column.count:
            yield from column_findings(name, column)
    yield from unnamed_findings(columns)
    for check in actions:
        yield from check.findings()
    if spec.has_reward and columns["reward"].count:
        yield from reward_findings(columns["reward"], any(ends.terminated))
    yield from _instruction_findings(store)
    yield from second_pass(store, columns, ends)
    yield from ends.findings(store.success)


def second_pass(store: EpisodeStore, columns: dict[str, Column], ends: Ends) -> Iterator[Finding]:
    """What needs the first pass: jumps, and rewards with two values."""
    limits = {name: column.jump_limit() for name, column in columns.items() if name.startswith("observation/")}
    paid = "reward" in columns and columns["reward"].low[0] < columns["reward"].high[0]
    for episode, rows in rows_of_episodes(store, [*columns, *FLAGS]):
        yield from jump_findings(episode, jumps(rows, columns, limits))
        if paid:
            ends.add_reward(rows, float(columns["reward"].high[0]))


def new_columns(store: EpisodeStore, num_frames: int) -> dict[str, Column]:
    """A column for each array but the pictures and flags, to be filled with `num_frames` rows."""
    specs: dict[str, ArraySpec] = {f"observation/{key}": spec for key, spec in store.spec.observations.items()}
    if store.spec.action:
        specs["action"] = store.spec.action
    if store.spec.has_reward:
        specs["reward"] = ArraySpec(())
    return {name: Column(spec, num_frames) for name, spec in specs.items()}


def _finite_findings(episode: int, rows: dict[str, np.ndarray], columns: dict[str, Column]) -> Iterator[Finding]:
    for name in [*columns, "timestamp"]:
        bad = ~np.isfinite(rows[name].reshape(len(rows[name]), -1))
        if bad.any():
            elements = np.flatnonzero(bad.any(0))
            named = [columns[name].names[i] for i in elements] if name in columns else [0]
            frames = np.flatnonzero(bad.any(1)).tolist()
            yield Finding(
                "not-finite",
                "error",
                f"'{name.removeprefix('observation/')}' element {listed(named)} is NaN or infinite in "
                f"{len(frames)} of {len(bad)} frames, first {frames[0]}",
                "NaN is never learned from: --repair leaves the episode out.",
                episode,
            )


def _instruction_findings(store: EpisodeStore) -> Iterator[Finding]:
    missing = [episode for episode, text in enumerate(store.instructions) if not text.strip()]
    if missing:
        which = "no episode has an" if len(missing) == store.num_episodes else f"{len(missing)} episodes have no"
        yield Finding(
            "instruction-missing",
            "note",
            f"{which} instruction" + (f": {listed(missing)}" if len(missing) < store.num_episodes else ""),
            "Name the task when labelling: --goal TEXT.",
        )


# ---- duplicates, labels --------------------------------------------------------------------------


def duplicate_findings(store: EpisodeStore) -> Iterator[Finding]:
    whole = contents(store)
    for earliest, later in same_episodes(whole, whole):
        yield Finding(
            "duplicate-episode",
            "warning",
            f"it holds the same data as episode {earliest}",
            "It counts twice in training, and leaks when the two land in different splits: --repair keeps the first.",
            later,
        )


def leak_findings(stores: Sequence[EpisodeStore]) -> Iterator[Finding]:
    """Episodes that two stores share: splits that leak. Compared by content: another order or name hides nothing."""
    hashed: list[Contents] = [contents(store) for store in stores]
    for number, second in enumerate(hashed):
        for first in hashed[:number]:
            pairs = same_episodes(first, second)
            if pairs:
                shared = [f"{b} = {a}" for a, b in pairs]
                yield Finding(
                    "split-leak",
                    "error",
                    f"{len(pairs)} of {second.store.num_episodes} episodes of {second.store.path} are also in "
                    f"{first.store.path}: {listed(shared, 4)}",
                    "What is measured on one says nothing about data not seen in the other. Merge them without the "
                    "duplicates (--repair), then: embodied data split",
                )


def all_label_findings(store: EpisodeStore) -> Iterator[Finding]:
    for name in store.label_names():
        try:
            label = store.label(name)
        except LabelError as error:
            yield Finding("label-refused", "error", " ".join(str(error).splitlines()), "Label this store itself.")
            continue
        yield from label_findings(name, label.score)
