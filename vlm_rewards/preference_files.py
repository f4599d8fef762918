"""Preferences that others made: our own tables, and the files of Uni-RLHF, Preference Transformer and IPL.

Pairs are joined by key, never by row: two files of the same pairs often list them in different order.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.preferences import Answer, Segment, Verdict
from embodied.contracts.provenance import hash_file

WORDS = {
    "first": Answer.FIRST, "second": Answer.SECOND, "neither": Answer.NO_PREFERENCE, "abstained": Answer.ABSTAINED,
    "0": Answer.FIRST, "1": Answer.SECOND, "-1": Answer.NO_PREFERENCE,
}  # fmt: skip
COLUMNS = ("first_episode", "first_frame", "second_episode", "second_frame", "answer")


@dataclasses.dataclass(frozen=True, eq=False)
class PairLabels:
    """One annotator's opinions.

    Attributes:
        first, second: (P, K) int64 keys of the segments: (step,) of a flat dataset, or (episode, frame).
        answer: (P,) int8 `Answer`.
        segments: (P, 2, T, D) float32 observations, where the file holds the segments themselves.
        ignored: keys without a label, which some files hold.
    """

    first: np.ndarray
    second: np.ndarray
    answer: np.ndarray
    segments: np.ndarray | None = None
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.answer)


def read_pair_labels(path: Path) -> dict[str, PairLabels]:
    """Annotator in the file -> labels.

    Files: .csv and .jsonl with `first_episode, first_frame, second_episode, second_frame, answer` (first, second,
    neither, abstained; or 0, 1, -1) and optionally `annotator`; .npz of Uni-RLHF (`human_i1`, ..., `script_label`),
    Preference Transformer (`index_1`, `index_2`, `label`; indices may outnumber labels) and IPL (`obs_1`, `obs_2`,
    `label` of 0, 0.5, 1, with the segments).

    Raises:
        InputError: none of these, or a value that is none (names the line).
    """
    if not path.is_file():
        raise InputError(f"{path} is no file of preferences.")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in (".csv", ".jsonl"):
        return _read_table(path)
    raise InputError(f"{path}: preferences are read from .csv, .jsonl and .npz.")


def _read_npz(path: Path) -> dict[str, PairLabels]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(f"{path} is no readable .npz file: {error}.") from None
    try:
        if {"human_label", "script_label"} <= arrays.keys():
            return {
                who: _labels(arrays[f"{who}_i1"], arrays[f"{who}_i2"], arrays[f"{who}_label"], path)
                for who in ("human", "script")
            }
        if {"index_1", "index_2", "label"} <= arrays.keys():
            return {"human": _labels(arrays["index_1"], arrays["index_2"], arrays["label"], path)}
        if {"obs_1", "obs_2", "label"} <= arrays.keys():
            number = np.arange(len(arrays["label"]))
            labels = _labels(2 * number, 2 * number + 1, arrays["label"], path)
            segments = np.stack([arrays["obs_1"], arrays["obs_2"]], 1).astype(np.float32)
            if segments.ndim != 4 or len(segments) != len(labels):
                raise InputError(f"{path}: obs_1 and obs_2 must be (pairs, frames, numbers).")
            return {"human": dataclasses.replace(labels, segments=segments)}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} lacks what its format needs: {error}.") from None
    raise InputError(f"{path} holds {', '.join(sorted(arrays))}; that is no format of preferences known here.")


def _labels(first: np.ndarray, second: np.ndarray, label: np.ndarray, path: Path) -> PairLabels:
    """Labels as one-hot pairs (0.5, 0.5 is a tie), as 0 / 1 / -1, or as 0 / 0.5 / 1; the first is preferred at 0."""
    label = np.asarray(label, np.float64)
    if label.ndim == 2 and label.shape[1] == 2:
        side = np.where(label[:, 0] == label[:, 1], 0.5, label.argmax(1))
    else:
        side = np.where(label.ravel() == -1, 0.5, label.ravel())
    if not np.isin(side, (0, 0.5, 1)).all():
        bad = int(np.flatnonzero(~np.isin(side, (0, 0.5, 1)))[0])
        raise InputError(f"{path}: label {bad} is {label[bad]}; it must be 0, 1 or a tie (-1, 0.5).")
    if min(len(first), len(second)) < len(side):
        raise InputError(f"{path}: {len(side)} labels for {min(len(first), len(second))} pairs.")
    answer = np.select([side == 0, side == 1], [Answer.FIRST, Answer.SECOND], Answer.NO_PREFERENCE).astype(np.int8)
    keys = [np.asarray(index, np.int64)[: len(side), None] for index in (first, second)]
    return PairLabels(keys[0], keys[1], answer, ignored=len(first) - len(side))


def _read_table(path: Path) -> dict[str, PairLabels]:
    rows: dict[str, list[tuple[list[int], Answer]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines: Any = csv.DictReader(file) if path.suffix == ".csv" else (json.loads(x) for x in file if x.strip())
            for number, row in enumerate(lines, 2 if path.suffix == ".csv" else 1):
                if not isinstance(row, Mapping):
                    raise InputError(f"{path}: line {number} is no object.")
                if missing := [name for name in COLUMNS if row.get(name) is None]:
                    raise InputError(f"{path}: line {number} lacks {', '.join(missing)}.")
                word = str(row["answer"]).strip().lower()
                if word not in WORDS:
                    raise InputError(f"{path}: line {number}: answer '{word}' is none of {', '.join(WORDS)}.")
                key = [int(row[name]) for name in COLUMNS[:4]]
                rows.setdefault(str(row.get("annotator") or "file"), []).append((key, WORDS[word]))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table of preferences: {error}.") from None
    if not rows:
        raise InputError(f"{path} holds no preferences.")
    return {
        name: PairLabels(
            np.array([key[:2] for key, _ in found], np.int64),
            np.array([key[2:] for key, _ in found], np.int64),
            np.array([answer for _, answer in found], np.int8),
        )
        for name, found in rows.items()
    }


def join_pairs(mine: PairLabels, other: PairLabels) -> np.ndarray:
    """(P,) int8: the other's answer about each of my pairs, turned round where it lists them so; -1 where it has none.

    Raises:
        InputError: a pair occurs twice in one of them.
    """
    table: dict[tuple[Any, Any], Answer] = {}
    for first, second, answer in zip(other.first.tolist(), other.second.tolist(), other.answer, strict=True):
        a, b, given = tuple(first), tuple(second), Answer(answer)
        if (a, b) in table:
            raise InputError(f"The pair {a}, {b} occurs twice; preferences cannot be joined by it.")
        table[a, b], table[b, a] = given, given.swapped
    keys = list(zip(map(tuple, mine.first.tolist()), map(tuple, mine.second.tolist()), strict=True))
    if len(set(keys)) != len(keys):
        raise InputError("A pair occurs twice; preferences cannot be joined by it.")
    return np.array([table.get(key, -1) for key in keys], np.int8)


class FileAnnotator:
    """Answers from a file of labels; what the file does not hold is an abstention.

    Args:
        path: as `read_pair_labels`.
        who: annotator in the file; may be left out where there is one.
        steps: (N,) row of the store of each step of the flat dataset, for files that count steps.
        starts: (E,) first row of each episode, for tables that name episodes.
    """

    sees, workers = False, 1

    def __init__(self, path: Path, who: str, steps: np.ndarray, starts: np.ndarray) -> None:
        found = read_pair_labels(path)
        if not who and len(found) > 1:
            raise InputError(f"{path} holds labels of {', '.join(found)}: say whose, file:{path}#{next(iter(found))}.")
        who = who or next(iter(found))
        if who not in found:
            raise InputError(f"{path} has no labels of '{who}'; it has {', '.join(found)}.")
        labels = found[who]
        if labels.segments is not None:
            raise InputError(f"{path} holds segments of its own; they do not belong to a store's rows.")
        self.name = f"file:{path.name}#{who}"
        self.pairs = np.stack([_rows(labels.first, steps, starts, path), _rows(labels.second, steps, starts, path)], 1)
        rows = hashlib.sha256(np.ascontiguousarray(self.pairs).tobytes()).hexdigest()  # of this store: others elsewhere
        identity = {"annotator": "file", "sha256": hash_file(path), "who": who, "rows": rows}
        self.identity: Mapping[str, Any] = identity
        self._answer = {(int(a), int(b)): Answer(c) for (a, b), c in zip(self.pairs, labels.answer, strict=True)}

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        del task, sample
        a, b = int(first.rows[0]), int(second.rows[0])
        if (a, b) in self._answer:
            return Verdict(self._answer[a, b])
        if (b, a) in self._answer:
            return Verdict(self._answer[b, a].swapped)
        return Verdict(Answer.ABSTAINED, "not in the file")


def _rows(keys: np.ndarray, steps: np.ndarray, starts: np.ndarray, path: Path) -> np.ndarray:
    """Rows of the store of keys (P, 1) steps or (P, 2) (episode, frame)."""
    count = len(steps) if keys.shape[1] == 1 else len(starts)
    what = "steps" if keys.shape[1] == 1 else "episodes"
    if len(keys) and (keys.min() < 0 or keys[:, 0].max() >= count):
        raise InputError(f"{path} names {what} up to {keys[:, 0].max()}; the store has {count}.")
    return steps[keys[:, 0]] if keys.shape[1] == 1 else starts[keys[:, 0]] + keys[:, 1]
