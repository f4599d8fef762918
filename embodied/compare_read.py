"""Scores of others: CSV (long and wide), NumPy and JSON files, and folders of learning curves, as one list of runs."""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest

# What a column may be called; the first that a file has is taken.
ALGORITHM = ("algorithm", "algo", "agent", "method", "policy")
TASK = ("task", "env", "environment", "env_id", "game", "dataset")
SEED = ("seed", "run", "run_id", "trial")
STEP = ("step", "steps", "timestep", "frame", "iteration", "update", "epoch")
SCORE = ("score", "normalized_score", "return", "episode_return", "reward", "success", "success_rate", "value")
# Of a policy in a result of `embodied eval`, and what they are called; the first that a result has is taken.
MEASURES = {"success": "success", "episode_return": "return"}
# Where a folder's files say whose curve they hold; the first pattern that fits any file is taken for all of them.
LAYOUTS = (
    "{algorithm}_{task}_{seed}_{*}/environment.csv",  # d3rlpy
    "{algorithm}_{task}_{seed}.npy",  # TD3
    "{algorithm}_{task}_{seed}.csv",
    "{algorithm}/{task}/{seed}.csv",
    "{algorithm}/{task}.csv",  # TD-MPC2
)
FIELDS = {
    "{algorithm}": r"(?P<algorithm>[^/_]+)",
    "{task}": r"(?P<task>[^/]+?)",
    "{seed}": r"(?P<seed>\d+)",
    "{*}": r"[^/]*",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's evaluations.

    Attributes:
        seed: as the source names it.
        steps, values: (T,) sorted by step; T = 1 and step 0 where there is only a final score.
        repeats: evaluations that a later one of the same step replaced.
    """

    algorithm: str
    task: str
    seed: str
    steps: np.ndarray
    values: np.ndarray
    repeats: int = 0


def split_name(path: Path) -> tuple[str | None, Path]:
    """`NAME=PATH` as name and path."""
    name, equals, rest = str(path).partition("=")
    return (name, Path(rest)) if equals and not path.exists() else (None, path)


def read_runs(paths: Sequence[Path], layout: str | None = None, metric: str | None = None) -> list[Run]:
    """Every run in the files and folders, in their order.

    Args:
        paths: each [NAME=]PATH; a name stands for the algorithm where the file does not say, or for its only one.
        layout: pattern of a folder's files, see `LAYOUTS`.
        metric: column with the score, or `success` and `episode_return` of results of `embodied eval`.

    Raises:
        InputError: what cannot be read, a score that is not finite, or two entries for the same run.
    """
    runs: list[Run] = []
    for given in paths:
        name, path = split_name(given)
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder.")
        found = _read_folder(path, layout, metric) if path.is_dir() else _read_file(path, metric, {})
        if not found:
            raise InputError(f"{path} holds no scores.")
        if name is not None:
            if len({run.algorithm for run in found}) > 1:
                raise InputError(f"{path} holds several algorithms; '{name}=' can name one only.")
            found = [dataclasses.replace(run, algorithm=name) for run in found]
        runs += found
    seen = set()
    for run in runs:
        key = (run.algorithm, run.task, run.seed)
        if key in seen:
            raise InputError(f"Seed {run.seed} of '{run.algorithm}' on '{run.task}' stands there twice.")
        seen.add(key)
        if not np.isfinite(run.values).all():
            raise InputError(
                f"Seed {run.seed} of '{run.algorithm}' on '{run.task}' has a score that is not finite.\n"
                "A run that failed counts: give it the score that failure is worth."
            )
    return runs


def pick(runs: Sequence[Run], at: str) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """One score per run: algorithm -> task -> (R,) in the order of the seeds, and what the reader should know.

    Args:
        at: `last` (each run's last evaluation), `common` (the last step that all runs of the algorithm reached on that
            task), `best` (each run's greatest: optimistic), `best-mean` (the step with the greatest mean over runs), or
            a step.
    """
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.algorithm, {}).setdefault(run.task, []).append(run)
    table: dict[str, dict[str, np.ndarray]] = {}
    uneven = []
    for algorithm, tasks in groups.items():
        for task, members in tasks.items():
            members = sorted(members, key=lambda run: _order(run.seed))
            if len({int(run.steps[-1]) for run in members}) > 1:
                uneven.append(f"{algorithm} on {task}")
            values = np.array(_values(members, at, f"{algorithm} on {task}"))
            table.setdefault(algorithm, {})[task] = values
    notes = []
    if uneven and at in ("last", "best"):
        some = ", ".join(uneven[:3]) + (", ..." if len(uneven) > 3 else "")
        notes.append(f"runs end at different steps in {len(uneven)} cases ({some}); --at common compares equal steps")
    if repeats := sum(run.repeats for run in runs):
        notes.append(f"{repeats} evaluations stand twice at the same step; of each the later line counts")
    return table, notes


def has_curves(runs: Sequence[Run]) -> bool:
    return any(len(run.values) > 1 for run in runs)


def is_result(path: Path) -> bool:
    """Is it a file that `embodied eval` wrote?"""
    try:
        data = json.loads(path.read_text()) if path.suffix == ".json" and path.is_file() else None
    except (ValueError, OSError):
        return False
    return isinstance(data, dict) and {"env", "initial_seeds", "policies"} <= set(data)


def _values(runs: Sequence[Run], at: str, where: str) -> list[float]:
    if at == "last":
        return [float(run.values[-1]) for run in runs]
    if at == "best":
        return [float(run.values.max()) for run in runs]
    if at == "common":
        step = min(int(run.steps[-1]) for run in runs)
    elif at == "best-mean":
        shared = sorted(set.intersection(*(set(run.steps.tolist()) for run in runs)))
        if not shared:
            raise InputError(f"{where}: the runs have no step in common; --at best-mean needs one.")
        means = [np.mean([run.values[np.searchsorted(run.steps, step)] for run in runs]) for step in shared]
        step = shared[int(np.argmax(means))]
    elif at.isdigit():
        step = int(at)
    else:
        raise InputError(f"--at {at}: no such rule.{suggest(at, ('last', 'common', 'best', 'best-mean', 'STEP'))}")
    if any(run.steps[0] > step for run in runs):
        raise InputError(f"{where}: there is no evaluation at or before step {step}.")
    return [float(run.values[np.searchsorted(run.steps, step, side="right") - 1]) for run in runs]


def _read_folder(folder: Path, layout: str | None, metric: str | None) -> list[Run]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".csv", ".npy", ".npz", ".json"))
    for pattern in [layout] if layout else LAYOUTS:
        expression = _expression(pattern)
        matches = [(path, expression.search(path.relative_to(folder.parent).as_posix())) for path in files]
        named = [(path, match.groupdict()) for path, match in matches if match]
        if named:
            return [run for path, names in named for run in _read_file(path, metric, names)]
    raise InputError(
        f"{folder}: no file is named like {layout or ', '.join(LAYOUTS)}.\n"
        "Say how they are named: --layout '{algorithm}/{task}/seed_{seed}.csv'."
    )


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[^}]*\})", pattern)
    for part in parts[1::2]:
        if part not in FIELDS:
            raise InputError(f"--layout: unknown field {part}.{suggest(part, FIELDS)}")
    body = "".join(FIELDS.get(part, re.escape(part)) for part in parts)
    try:
        return re.compile(f"(?:^|/){body}$")
    except re.error as error:
        raise InputError(f"--layout '{pattern}': {error}.") from None


def _read_file(path: Path, metric: str | None, names: Mapping[str, str]) -> list[Run]:
    readers = {".csv": _read_csv, ".npy": _read_numpy, ".npz": _read_numpy, ".json": _read_json}
    if path.suffix not in readers:
        raise InputError(
            f"{path} is no result of 'embodied eval', and scores are read from {', '.join(readers)} files "
            "and folders of them."
        )
    try:
        return readers[path.suffix](path, metric, names)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as scores: {error}.") from None


# ---- CSV --------------------------------------------------------------------------------------------


def _read_csv(path: Path, metric: str | None, names: Mapping[str, str]) -> list[Run]:
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        raise InputError(f"{path} is empty.")
    if all(_is_number(cell) for cell in rows[0]):  # no head: [epoch,] step, score
        head = {1: ["score"], 2: ["step", "score"], 3: ["epoch", "step", "score"]}.get(len(rows[0]))
        if head is None:
            raise InputError(f"{path} has no head, and {len(rows[0])} columns: say what they are in a first line.")
        rows = [head, *rows]
    head = [cell.strip() for cell in rows[0]]
    records = [dict(zip(head, row, strict=False)) for row in rows[1:]]
    columns = {role: _column(head, known) for role, known in (("a", ALGORITHM), ("t", TASK), ("s", SEED), ("k", STEP))}
    score = metric or _column(head, SCORE)
    if metric and metric not in head:
        raise InputError(f"{path}: there is no column '{metric}'.{suggest(metric, head)}")
    if score is None:
        records, columns = _lengthened(path, head, records, columns)
        score = "score"
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for number, record in enumerate(records):
        if not (record.get(score) or "").strip():
            continue
        algorithm = record[columns["a"]] if columns["a"] else names.get("algorithm", path.stem)
        task = record[columns["t"]] if columns["t"] else names.get("task", "")
        seed = record[columns["s"]] if columns["s"] else names.get("seed")
        if seed is None:
            seed = "0" if columns["k"] else str(number)
        step = float(record[columns["k"]]) if columns["k"] else 0.0
        try:
            groups.setdefault((algorithm, task, seed), []).append((step, float(record[score])))
        except ValueError:
            raise InputError(
                f"{path}, line {number + 2}: '{record[score]}' in column '{score}' is no number."
            ) from None
    return [_run(path, *key, points) for key, points in groups.items()]


def _lengthened(
    path: Path, head: list[str], records: list[dict[str, str]], columns: dict[str, str | None]
) -> tuple[list[dict[str, str]], dict[str, str | None]]:
    """A wide table as a long one: columns are algorithms where rows name tasks, tasks otherwise."""
    known = {column for column in columns.values() if column}
    wide = [column for column in head if column and column not in known and not column.startswith("Unnamed")]
    wide = [column for column in wide if all(_is_number(record.get(column) or "0") for record in records)]
    if not wide:
        raise InputError(f"{path}: no column holds scores. Columns: {', '.join(head)}. Name it: --metric COLUMN.")
    role, name = ("a", "algorithm") if columns["t"] and not columns["a"] else ("t", "task")
    long = []
    for number, record in enumerate(records):
        base = {key: value for key, value in record.items() if key in known}
        base.setdefault("seed", str(number))
        long += [{**base, name: column, "score": record.get(column) or ""} for column in wide]
    return long, {**columns, role: name, "s": columns["s"] or "seed"}


def _run(path: Path, algorithm: str, task: str, seed: str, points: list[tuple[float, float]]) -> Run:
    if len(points) > 1 and not any(step for step, _ in points):
        raise InputError(f"{path}: seed {seed} of '{algorithm}' on '{task}' has {len(points)} scores and no steps.")
    latest = dict(points)  # of two lines for one step, as a resumed run writes them, the later counts
    steps, values = np.array(sorted(latest.items())).T
    return Run(algorithm, task, seed, steps, values, len(points) - len(latest))


def _column(head: Sequence[str], known: Sequence[str]) -> str | None:
    lowered = {column.lower().replace(" ", "_"): column for column in reversed(head)}
    return next((lowered[name] for name in known if name in lowered), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _order(seed: str) -> tuple[float, str]:
    return (float(seed) if _is_number(seed) else math.inf, seed)


# ---- NumPy and JSON -----------------------------------------------------------------------------------


def _read_numpy(path: Path, metric: str | None, names: Mapping[str, str]) -> list[Run]:
    """npz: algorithm -> (runs, tasks) or (runs, tasks, evaluations), `tasks` may name them; npy: one such array.

    A folder's .npy of one axis is the curve of the run that its name tells.
    """
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if loaded.ndim == 1 and "seed" in names:
            steps = np.arange(len(loaded), dtype=float)
            algorithm, task = names.get("algorithm", path.stem), names.get("task", "")
            return [Run(algorithm, task, names["seed"], steps, loaded.astype(np.float64))]
        return _of_array(names.get("algorithm", path.stem), loaded, None, path)
    with loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    tasks = arrays.pop("tasks", None)
    labels = None if tasks is None else [str(task) for task in tasks.tolist()]
    return [run for name, array in arrays.items() for run in _of_array(name, array, labels, path)]


def _of_array(algorithm: str, array: np.ndarray, tasks: list[str] | None, path: Path) -> list[Run]:
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "fiub" or 0 in array.shape:
        raise InputError(f"{path}: '{algorithm}' is {array.dtype} {array.shape}; scores are (runs, tasks).")
    labels = tasks or [f"task {m}" if array.shape[1] > 1 else "" for m in range(array.shape[1])]
    if len(labels) != array.shape[1]:
        raise InputError(f"{path}: {len(labels)} names for the {array.shape[1]} tasks of '{algorithm}'.")
    steps = np.arange(array.shape[2], dtype=float)
    return [
        Run(algorithm, label, str(r), steps, array[r, m].astype(np.float64))
        for m, label in enumerate(labels)
        for r in range(len(array))
    ]


def _read_json(path: Path, metric: str | None, names: Mapping[str, str]) -> list[Run]:
    """Results of `embodied eval`; algorithm -> task -> scores (dictionaries of one entry in between are looked
    through); or algorithm -> rows of scores (runs, tasks)."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected algorithm -> task -> scores.")
    if {"env", "initial_seeds", "policies"} <= set(data):
        return _of_result(data, metric, path)
    runs = []
    for algorithm, tasks in data.items():
        if not isinstance(tasks, dict):
            runs += _of_array(algorithm, np.array(tasks, np.float64), None, path)
            continue
        for task, scores in tasks.items():
            values = np.array(_innermost(scores, f"{path}: {algorithm}, {task}"), np.float64)
            named = _of_array(algorithm, values, None, path)
            runs += [dataclasses.replace(run, task=task) for run in named]
    return runs


def _innermost(value: Any, where: str) -> Any:
    while isinstance(value, dict):
        if len(value) != 1:
            raise InputError(f"{where} holds {len(value)} sets of scores ({', '.join(list(value)[:4])}); keep one.")
        value = next(iter(value.values()))
    return value


def _of_result(data: dict[str, Any], metric: str | None, path: Path) -> list[Run]:
    """A training seed is a run; its score is the mean over the initial states."""
    known = [name for name in MEASURES if all(name in s for p in data["policies"].values() for s in p["seeds"])]
    metric = metric or next(iter(known), "")
    if metric not in known:
        raise InputError(f"{path}: no measure '{metric}'.{suggest(metric, known)}")
    runs = []
    for name, policy in data["policies"].items():
        for place, item in enumerate(policy["seeds"]):
            seed = str(place if item["seed"] is None else item["seed"])
            runs.append(Run(name, data["env"], seed, np.zeros(1), np.array([np.mean(item[metric])])))
    return runs
