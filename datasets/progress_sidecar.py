"""LeRobot's progress sidecar (`sarm_progress.parquet` beside a LeRobot dataset): a score per frame, joined by key.

Columns `index`, `episode_index`, `frame_index` (int64) and `progress_sparse`, `progress_dense` or both (float32), as
LeRobot's `compute_rabc_weights` writes and its RA-BC weighting reads them. Rows are those of the LeRobot export of the
same store: final observations have none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError, suggest
from embodied.datasets.outgoing import LeftOut, Outgoing, Progress, check_export_options, choice
from embodied.datasets.store import EpisodeStore, Label

KEYS = ("index", "episode_index", "frame_index")
COLUMNS = ("progress_sparse", "progress_dense")
METADATA = b"embodied.provenance"


def write(outgoing: Outgoing, path: Path, options: Mapping[str, Any], progress: Progress) -> list[LeftOut]:
    """Write one parquet file with the scores of the label set that is exported.

    Options:
        column: `progress_sparse` or `progress_dense`, where the label set goes.
        dense: a second label set, which goes to `progress_dense`.

    Raises:
        InputError: no label set was named.
        LabelError: no label set of that name.
    """
    check_export_options("progress", options, ("column", "dense"))
    column = choice("progress", options, "column", COLUMNS)
    if outgoing.label is None:
        names = ", ".join(outgoing.store.label_names()) or "none"
        raise InputError(f"progress needs a label set: --label NAME. {outgoing.store.path} has: {names}.")
    labels = {column: outgoing.label}
    if "dense" in options:
        if column == "progress_dense":
            raise ConfigError(
                "progress: options 'dense' and 'column progress_dense' are two label sets for one column."
            )
        labels["progress_dense"] = outgoing.store.label(str(options["dense"]))
    pyarrow, parquet = _pyarrow("Writing")
    fields = [(key, pyarrow.int64()) for key in KEYS] + [(name, pyarrow.float32()) for name in labels]
    provenance = {name: {"label": label.name, **label.provenance} for name, label in labels.items()}
    schema = pyarrow.schema(fields, metadata={METADATA: json.dumps(provenance)})
    index = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for number, count in enumerate(outgoing.counts.tolist()):
            start = int(outgoing.store.episode_start[number])
            columns = {
                "index": np.arange(index, index + count),
                "episode_index": np.full(count, number, np.int64),
                "frame_index": np.arange(count),
            } | {name: label.score[start : start + count] for name, label in labels.items()}
            writer.write_table(pyarrow.table(columns, schema=schema))
            index += count
            progress(number + 1, outgoing.store.num_episodes, "exporting")
    return _left_out(outgoing, labels)


def read_progress(path: str | Path, store: EpisodeStore, column: str = "progress_sparse") -> np.ndarray:
    """(F,) float32 scores for the frames of `store`; NaN where the sidecar has none, as for final observations.

    Rows are joined by (episode_index, frame_index), whatever their order and whatever `index` says.

    Raises:
        InputError: unreadable, columns missing, a key twice, or one that the store has not.
        MissingExtraError: without pyarrow.
    """
    pyarrow, parquet = _pyarrow("Reading")
    try:
        described = parquet.read_metadata(path)
        names = described.schema.to_arrow_schema().names
        needed = ("episode_index", "frame_index", column)
        if missing := [name for name in needed if name not in names]:
            raise InputError(f"{path} is no progress sidecar: it lacks '{missing[0]}'.{suggest(missing[0], names)}")
        if described.num_rows > store.num_frames:  # a small file may announce any number of equal rows
            raise InputError(f"{path} has {described.num_rows} rows; {store.path} has {store.num_frames} frames.")
        table = parquet.read_table(path, columns=list(needed))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    try:
        episode, frame = (table[name].cast(pyarrow.int64()).to_numpy() for name in needed[:2])
        value = table[column].cast(pyarrow.float32()).to_numpy()
    except (ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: its columns are not numbers ({str(error).splitlines()[0]}).") from error
    if any(table[name].null_count for name in needed[:2]):
        raise InputError(f"{path}: rows without episode_index or frame_index belong to no frame.")
    inside = (episode >= 0) & (episode < store.num_episodes) & (frame >= 0)
    inside[inside] = frame[inside] < store.episode_length[episode[inside]]
    if not inside.all():
        bad = int(np.argmin(inside))
        raise InputError(
            f"{path}: episode {episode[bad]}, frame {frame[bad]} is not in {store.path}; it belongs to another dataset."
        )
    row = store.episode_start[episode] + frame
    if len(np.unique(row)) != len(row):
        order = np.sort(row)
        twice = int(order[1:][order[1:] == order[:-1]][0])
        bad = int(np.flatnonzero(row == twice)[0])
        raise InputError(f"{path}: episode {episode[bad]}, frame {frame[bad]} has two rows.")
    scores = np.full(store.num_frames, np.nan, np.float32)
    scores[row] = value
    return scores


def _left_out(outgoing: Outgoing, labels: Mapping[str, Label]) -> list[LeftOut]:
    found = [LeftOut("everything but the label set", "the sidecar stands beside a LeRobot dataset, which has the rest")]
    if finals := int(outgoing.has_final.sum()):
        found.append(LeftOut(f"scores of {finals} final observations", "LeRobot has no rows for them"))
    for label in labels.values():
        if label.channels:
            found.append(
                LeftOut(f"channels {', '.join(label.channels)} of '{label.name}'", "a sidecar holds one score")
            )
        low, high = float(label.score.min()), float(label.score.max())
        if low < 0 or high > 1:
            found.append(
                LeftOut(
                    f"the meaning of '{label.name}' as progress",
                    f"it runs from {low:.3g} to {high:.3g}; LeRobot takes progress to lie in 0 to 1",
                )
            )
    return found


def _pyarrow(doing: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "formats", f"{doing} LeRobot's progress sidecar") from error
    return pyarrow, parquet
