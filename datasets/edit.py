"""Edits that lose nothing: split, merge, filter and drop each write a new store, with lineage; the old one stays.

Label sets and findings go along with the frames and episodes that they are about.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, LabelError, StoreError, suggest
from embodied.contracts.provenance import hash_json, provenance
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.duplicates import groups_of_duplicates
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.labels import LabelWriter
from embodied.datasets.pieces import Piece, cut
from embodied.datasets.store import EpisodeStore, Label
from embodied.datasets.write_store import StoreWriter

Progress = Callable[[int, int, str], None]
LEFT_OUT = "episode-left-out"  # its number counts the source's episodes, not the store's


@dataclasses.dataclass(frozen=True)
class Edit:
    """A new store in the making.

    Attributes:
        path: the new store; must not exist, unless this very edit was interrupted there.
        verb: for the provenance, `data split`.
        config: what decides the result beside the parents.
        parents: the stores that the episodes come from.
        pieces: the new store's episodes, in order.
        spec: of the new store.
        labels: names of the label sets to carry; None for all.
        change: applied to each episode before it is written.
    """

    path: Path
    verb: str
    config: Mapping[str, Any]
    parents: Sequence[EpisodeStore]
    pieces: Sequence[Piece]
    spec: DatasetSpec
    labels: Sequence[str] | None = None
    change: Callable[[Piece, Episode], Episode] = lambda piece, episode: episode
    findings: Sequence[Finding] = ()


@dataclasses.dataclass(frozen=True)
class Edited:
    """What an edit wrote.

    Attributes:
        labels: label sets that went along.
        labels_left: those that did not -> why.
    """

    store: EpisodeStore
    labels: list[str]
    labels_left: dict[str, str]


def write_edit(edit: Edit, progress: Progress = lambda done, total, text: None, reuse: bool = False) -> Edited:
    """Write the store of an edit; one that was interrupted goes on. Memory: an episode at a time, and its label sets.

    Args:
        reuse: take the new store as it is if this very edit has written it already.

    Raises:
        InputError: no episode is left, an unknown label set was named, or an episode cannot be stored.
        StoreError: the new store exists, or the disk refuses.
    """
    if not edit.pieces:
        raise InputError(f"{edit.path}: no episode would be left in it.")
    record = _record(edit)
    kept, left = label_sets(edit)
    store = _written(edit, record)
    if store is not None and set(kept) <= set(store.label_names()) and not reuse:
        raise StoreError(f"{edit.path} exists already.\nStores are never overwritten: delete it or name another.")
    if store is None:
        writer = StoreWriter(
            edit.path, edit.spec, record, _joined(edit, "source", "; "), _joined(edit, "licence", " AND ")
        )
        _write_episodes(edit, writer, progress)
        store = writer.finish(len(edit.pieces), carried_findings(edit))
    for name, labels in kept.items():
        if name not in store.label_names():
            _carry(store, name, labels, edit)
    return Edited(EpisodeStore(edit.path), sorted(kept), left)


def _write_episodes(edit: Edit, writer: StoreWriter, progress: Progress) -> None:
    for index, piece in enumerate(edit.pieces):
        parent = edit.parents[piece.parent]
        if not writer.has(index):
            try:
                episode = cut(parent.episode(piece.episode), piece.start, piece.stop)
                writer.write_episode(index, edit.change(piece, episode))
            except InputError as error:  # another program wrote what our writer refuses
                writer.abandon()
                raise InputError(
                    f"{parent.path}: episode {piece.episode} cannot be kept as it is: {str(error).splitlines()[0]}\n"
                    f"Mend it first: embodied data doctor {parent.path} --repair NEW_STORE"
                ) from None
        progress(index + 1, len(edit.pieces), f"writing {edit.path.name}")


def _joined(edit: Edit, attribute: str, separator: str) -> str:
    values = (str(store.attributes.get(attribute, "")) for store in edit.parents)
    return separator.join(dict.fromkeys(filter(None, values)))


def _record(edit: Edit) -> dict[str, Any]:
    parents = {f"parent_{number}": store.fingerprint for number, store in enumerate(edit.parents)}
    attributes = [store.attributes.get("provenance", {}).get("source_attributes") for store in edit.parents]
    pieces = [[piece.parent, piece.episode, piece.start, piece.stop] for piece in edit.pieces]
    return provenance(
        edit.verb,
        {**edit.config, "pieces": hash_json(pieces)},
        parents,
        lineage=_lineage(edit.parents),
        episodes=pieces,
        source_attributes=attributes[0] if all(a == attributes[0] for a in attributes) else None,
    )


def _written(edit: Edit, record: Mapping[str, Any]) -> EpisodeStore | None:
    """What this very edit wrote, if it did: killed before its label sets were carried, it goes on there."""
    if not edit.path.exists() or Path(f"{edit.path}.partial").exists():
        return None
    try:
        store = EpisodeStore(edit.path)
    except StoreError:
        return None
    found = store.attributes.get("provenance", {})
    same = all(hash_json(found.get(key)) == hash_json(record[key]) for key in ("made_by", "config", "inputs"))
    return store if same else None


def _lineage(parents: Sequence[EpisodeStore]) -> list[dict[str, Any]]:
    """The ancestors, oldest first, each once: where a store came from can be read in the last of its line."""
    line: list[dict[str, Any]] = []
    for store in parents:
        own = dict(store.attributes.get("provenance", {}))
        line += own.pop("lineage", [])
        own.pop("episodes", None)
        source = {key: store.attributes.get(key, "") for key in ("source", "licence")}
        line.append({"path": store.path, "fingerprint": store.fingerprint, **source, "provenance": own})
    return list({entry["fingerprint"]: entry for entry in line}.values())


# ---- what goes along -----------------------------------------------------------------------------


def label_sets(edit: Edit) -> tuple[dict[str, list[Label]], dict[str, str]]:
    """Name -> the label set in every parent, of those that can be carried; and name -> why not, of the others."""
    present = [store.label_names() for store in edit.parents]
    everywhere = sorted(set().union(*present))
    for name in edit.labels or ():
        if name not in everywhere:
            raise InputError(f"{edit.parents[0].path} has no label set '{name}'.{suggest(name, everywhere)}")
    kept: dict[str, list[Label]] = {}
    left: dict[str, str] = {}
    for name in everywhere if edit.labels is None else edit.labels:
        if absent := [s.path for s, names in zip(edit.parents, present, strict=True) if name not in names]:
            left[name] = f"{absent[0]} has no label set of that name"
            continue
        try:
            labels = [store.label(name) for store in edit.parents]
        except LabelError as error:
            left[name] = str(error).splitlines()[0]
            continue
        said = [_made_alike(label) for label in labels]
        if differing := [key for key in said[0] if any(other[key] != said[0][key] for other in said)]:
            left[name] = f"the stores' differ in {', '.join(differing)}"
        elif not all(np.isfinite(array).all() for x in labels for array in (x.score, *x.channels.values())):
            left[name] = "it holds values that are not finite"
        else:
            kept[name] = labels
    return kept, left


def _made_alike(label: Label) -> dict[str, Any]:
    made = {key: label.provenance.get(key) for key in ("labeller", "config")}
    channels = {name: array.shape[1:] for name, array in label.channels.items()}
    return made | {"alignment": label.alignment, "channels": channels}


def _carry(store: EpisodeStore, name: str, labels: Sequence[Label], edit: Edit) -> None:
    """Write the rows of a label set that belong to the new store's frames."""
    rows = []
    for piece in edit.pieces:
        parent = edit.parents[piece.parent]
        start, length = int(parent.episode_start[piece.episode]), int(parent.episode_length[piece.episode])
        rows.append((piece.parent, start + piece.start, start + (length if piece.stop is None else piece.stop)))
    origin = [
        {"dataset_fingerprint": label.provenance["dataset_fingerprint"], "counts": label.provenance.get("counts", {})}
        for label in labels
    ]
    record = {key: value for key, value in labels[0].provenance.items() if key != "counts"}
    record |= {"dataset_fingerprint": store.fingerprint, "derived_from": origin, "carried_by": edit.verb}
    writer = LabelWriter(store, name, record, alignment=labels[0].alignment)
    columns: dict[str, np.ndarray] = {}
    for key in ("score", *labels[0].channels):
        arrays = [label.score if key == "score" else label.channels[key] for label in labels]
        columns[key] = np.concatenate([arrays[parent][start:stop] for parent, start, stop in rows])
    for block, start, stop in writer.blocks():
        part = {key: array[start:stop] for key, array in columns.items()}
        writer.write_block(block, part.pop("score"), **part)
    writer.finish()


def carried_findings(edit: Edit) -> list[Finding]:
    """Findings of the parents: those of the kept episodes with their new number, those of the whole as they are."""
    number: dict[tuple[int, int], int] = {}
    for index, piece in enumerate(edit.pieces):
        number.setdefault((piece.parent, piece.episode), index)
    found = list(edit.findings)
    for parent, store in enumerate(edit.parents):
        for finding in store.findings:
            if finding.episode is None:
                found.append(finding)
            elif finding.check == LEFT_OUT:
                source = store.attributes.get("source") or "the source"
                message = f"episode {finding.episode} of {source} was {finding.message}"
                found.append(dataclasses.replace(finding, episode=None, message=message))
            elif (parent, finding.episode) in number:
                found.append(dataclasses.replace(finding, episode=number[parent, finding.episode]))
    return list(dict.fromkeys(found))


def split(
    store: EpisodeStore,
    parts: Mapping[Path, Sequence[int]],
    config: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    progress: Progress = lambda done, total, text: None,
) -> list[Edited]:
    """One new store for each path, of the episodes given. Killed after the first of them, it goes on with the next."""
    edits = [
        Edit(path, "data split", config, [store], [Piece(0, i) for i in episodes], store.spec, labels)
        for path, episodes in parts.items()
    ]
    written = [_written(edit, _record(edit)) for edit in edits]
    carried = set(label_sets(edits[0])[0])
    whole = all(found is not None and carried <= set(found.label_names()) for found in written)
    return [write_edit(edit, progress, reuse=not whole) for edit in edits]


# ---- the verbs -----------------------------------------------------------------------------------


def select(
    store: EpisodeStore,
    path: Path,
    episodes: Sequence[int],
    verb: str,
    config: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    without: Sequence[str] = (),
    progress: Progress = lambda done, total, text: None,
) -> Edited:
    """A new store of some episodes, in the order given, without some observations and cameras."""
    spec = without_keys(store, without)

    def change(piece: Piece, episode: Episode) -> Episode:
        del piece
        return dataclasses.replace(
            episode,
            observations={key: episode.observations[key] for key in spec.observations},
            images={camera: pictures for camera, pictures in episode.images.items() if camera in spec.images},
        )

    pieces = [Piece(0, int(episode)) for episode in episodes]
    return write_edit(Edit(Path(path), verb, config, [store], pieces, spec, labels, change), progress)


def without_keys(store: EpisodeStore, keys: Sequence[str]) -> DatasetSpec:
    spec = store.spec
    for key in keys:
        if key not in spec.observations and key not in spec.images:
            raise InputError(f"{store.path} has no '{key}'.{suggest(key, [*spec.observations, *spec.images])}")
    return dataclasses.replace(
        spec,
        observations={key: array for key, array in spec.observations.items() if key not in keys},
        images={camera: array for camera, array in spec.images.items() if camera not in keys},
    )


def split_by_fractions(store: EpisodeStore, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Episode numbers of each part, ascending; a function of the content and the seed alone.

    Whole episodes, and duplicates together: a frame that is on both sides measures memory, not learning.
    """
    if any(not fraction > 0 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-6:
        given = " ".join(f"{fraction:g}" for fraction in fractions)
        raise InputError(f"--fractions {given}: they must be above 0 and their sum 1.")
    groups = groups_of_duplicates(store)
    if len(groups) < len(fractions):
        raise InputError(
            f"{store.path} has {len(groups)} episodes that differ; they cannot be split into {len(fractions)}."
        )
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(groups))
    wanted = np.array(fractions) * store.num_episodes
    parts: list[list[int]] = [[] for _ in fractions]
    left = len(groups)
    # The largest groups first: single episodes then fill every part to its share.
    for index in sorted(order, key=lambda index: -len(groups[index])):
        empty = [part for part, episodes in enumerate(parts) if not episodes]
        # The part that lacks most; an empty one where as many groups are left as parts are empty.
        missing = wanted - [len(episodes) for episodes in parts]
        chosen = int(np.argmax(missing)) if left > len(empty) else max(empty, key=lambda part: missing[part])
        parts[chosen] += groups[index]
        left -= 1
    return [sorted(episodes) for episodes in parts]


def split_by_value(store: EpisodeStore, by: str) -> dict[str, list[int]]:
    """Value -> its episodes. `success`: success, failure, unknown; `instruction`: in order of first appearance."""
    parts: dict[str, list[int]] = {}
    if by == "success":
        parts = {
            name: np.flatnonzero(store.success == value).tolist()
            for name, value in {"success": 1, "failure": 0, "unknown": -1}.items()
        }
        return {name: episodes for name, episodes in parts.items() if episodes}
    if by != "instruction":
        raise InputError(f"--by '{by}' is unknown.{suggest(by, ['success', 'instruction'])}")
    for episode, text in enumerate(store.instructions):
        parts.setdefault(text, []).append(episode)
    return parts


def merge(
    stores: Sequence[EpisodeStore],
    path: Path,
    labels: Sequence[str] | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Edited:
    """All episodes of all stores, in the order given. Raises InputError saying where their specs differ."""
    fingerprints = [store.fingerprint for store in stores]
    for number, store in enumerate(stores):
        if store.fingerprint in fingerprints[:number]:
            first = stores[fingerprints.index(store.fingerprint)].path
            raise InputError(f"{store.path} holds the same as {first}: every episode would be there twice.")
        if differences := spec_differences(stores[0].spec, store.spec):
            shown = "\n".join(differences[:2])
            more = f" (and {len(differences) - 2} more differences)" if len(differences) > 2 else ""
            raise InputError(f"{stores[0].path} and {store.path} cannot be merged:{more}\n{shown}")
    environments = dict.fromkeys(store.spec.environment for store in stores)
    spec = dataclasses.replace(stores[0].spec, environment=stores[0].spec.environment if len(environments) == 1 else "")
    notes = []
    if len(environments) > 1:
        message = f"merged from several environments: {', '.join(name or '(none named)' for name in environments)}"
        notes = [Finding("several-environments", "note", message)]
    pieces = [Piece(number, episode) for number, store in enumerate(stores) for episode in range(store.num_episodes)]
    edit = Edit(Path(path), "data merge", {}, stores, pieces, spec, labels, findings=notes)
    return write_edit(edit, progress)


def spec_differences(first: DatasetSpec, second: DatasetSpec) -> list[str]:
    """One line for each thing that two specs say differently; the environment's name aside."""
    lines = []
    ours, theirs = first.to_json(), second.to_json()
    for kind in ("observations", "images"):
        for key in dict.fromkeys([*ours[kind], *theirs[kind]]):
            if key not in theirs[kind] or key not in ours[kind]:
                lines.append(f"'{key}' is only in the {'first' if key in ours[kind] else 'second'}")
            else:
                lines += _field_differences(f"'{key}'", ours[kind][key], theirs[kind][key])
    if ours["action"] and theirs["action"]:
        lines += _field_differences("'action'", ours["action"], theirs["action"])
    elif ours["action"] or theirs["action"]:
        lines.append(f"only the {'first' if ours['action'] else 'second'} has actions")
    keys = ("control_dt", "has_reward")
    return lines + _field_differences("", {k: ours[k] for k in keys}, {k: theirs[k] for k in keys})


def _field_differences(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {key}: {ours[key] or 'none'} and {theirs[key] or 'none'}".strip()
        for key in ours
        if ours[key] != theirs[key]
    ]
