"""Scores between a random policy's (0) and a reference's (1): x -> (x - random) / (reference - random)."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest

# Farama-Foundation/D4RL, d4rl/infos.py: returns of random and expert by the start of a task's name; the longest counts.
D4RL: dict[str, tuple[float, float]] = {
    "ant-": (-325.6, 3879.7),
    "antmaze-": (0.0, 1.0),
    "door-": (-56.512833, 2880.5693087298737),
    "halfcheetah-": (-280.178953, 12135.0),
    "hammer-": (-274.856578, 12794.134825156867),
    "hopper-": (-20.272305, 3234.3),
    "kitchen-": (0.0, 4.0),
    "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
    "maze2d-large-v1": (6.7, 273.99),
    "maze2d-medium-dense-v1": (44.264742, 297.4552547777125),
    "maze2d-medium-v1": (13.13, 277.39),
    "maze2d-open-dense-v0": (11.17817, 27.166538620695782),
    "maze2d-open-v0": (0.01, 20.66),
    "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482),
    "maze2d-umaze-v1": (23.85, 161.86),
    "pen-": (96.262799, 3076.8331017826877),
    "relocate-": (-6.425911, 4233.877797728884),
    "walker2d-": (1.629008, 4592.3),
}

Table = dict[str, dict[str, np.ndarray]]


def normalized(table: Table, rule: str) -> tuple[Table, dict[str, Any]]:
    """The scores on their new scale, and a record of what was done to each task.

    Args:
        rule: `none`, `d4rl`, a number to divide by (100 where scores are D4RL's points already), or a file: JSON
            task -> [random, reference], or CSV with the columns task, random, reference.

    Raises:
        InputError: a task without reference scores, or equal ones.
    """
    if rule == "none":
        return table, {"rule": "none"}
    tasks = sorted({task for scores in table.values() for task in scores})
    ends = _ends(rule, tasks)
    for task, (random, reference) in ends.items():
        if not np.isfinite([random, reference]).all() or random == reference:
            raise InputError(f"--normalize: random {random} and reference {reference} of '{task}' give no scale.")
    result = {
        algorithm: {task: (values - ends[task][0]) / (ends[task][1] - ends[task][0]) for task, values in scores.items()}
        for algorithm, scores in table.items()
    }
    return result, {"rule": rule, "tasks": {task: {"random": a, "reference": b} for task, (a, b) in ends.items()}}


def _ends(rule: str, tasks: list[str]) -> dict[str, tuple[float, float]]:
    try:
        divisor = float(rule)
    except ValueError:
        pass
    else:
        return dict.fromkeys(tasks, (0.0, divisor))
    if rule == "d4rl":
        return {task: _of_d4rl(task) for task in tasks}
    path = Path(rule)
    if not path.is_file():
        raise InputError(f"--normalize {rule}: neither none, d4rl, a number nor a file.")
    known = _read(path)
    for task in tasks:
        if task not in known:
            raise InputError(f"{path} has no reference scores for '{task}'.{suggest(task, known)}")
    return {task: known[task] for task in tasks}


def _of_d4rl(task: str) -> tuple[float, float]:
    fitting = [start for start in D4RL if task.lower().startswith(start)]
    if not fitting:
        raise InputError(f"--normalize d4rl: D4RL has no reference scores for '{task}'. Give a file of your own.")
    return D4RL[max(fitting, key=len)]


def _read(path: Path) -> Mapping[str, tuple[float, float]]:
    try:
        if path.suffix == ".json":
            return {task: (float(ends[0]), float(ends[1])) for task, ends in json.loads(path.read_text()).items()}
        with open(path, newline="") as file:
            return {
                row["task"]: (float(row["random"]), float(row["reference"]))
                for row in csv.DictReader(file, skipinitialspace=True)
            }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as reference scores: {type(error).__name__} {error}.\n"
            "It is JSON, task -> [random, reference], or CSV with the columns task, random, reference."
        ) from None
