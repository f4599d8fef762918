"""What the episodes of a Minari dataset hold and how they end, looked at before the import."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.finding import Finding
from embodied.datasets.minari_columns import Column, Storage, required

NUM_SURVEYED = 1000  # evenly spread


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was seen.

    Attributes:
        template: the columns of the first episode that can be read.
        shared: paths of `infos/` that every episode seen has in the template's shape.
        seeds: of each episode; None where it does not say.
        findings: what the user should know.
    """

    template: Mapping[str, Column]
    shared: frozenset[str]
    seeds: list[int | None]
    findings: tuple[Finding, ...]


def survey(storage: Storage) -> Survey:
    """Look at up to 1,000 episodes. Raises InputError when not one can be read."""
    template: dict[str, Column] = {}
    shared: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    num_steps, num_seen, problem = 0, 0, ""
    chosen = np.linspace(0, len(storage.ids) - 1, min(len(storage.ids), NUM_SURVEYED)).round().astype(int)
    for place in np.unique(chosen).tolist():
        try:
            columns = storage.columns(storage.ids[place])
            steps, seen = _ends(columns)
        except InputError as error:
            problem = problem or str(error)
            continue
        infos = {name for name in columns if name.startswith("infos/")}
        if not template:
            template, shared = columns, infos
        shared = {name for name in shared & infos if _alike(columns[name], template[name])}
        counts.update(seen)
        num_steps += steps
        num_seen += 1
    if not template:
        raise InputError(f"{storage.path}: no episode can be read. The first: {problem}")
    seeds = [_seed(storage, episode) for episode in storage.ids]
    whole = num_seen == len(storage.ids)
    claims = [*_claims(storage, num_steps if whole else None), *_gaps(storage)]
    return Survey(template, frozenset(shared), seeds, (*claims, *_habits(counts, num_seen, len(storage.ids))))


def num_steps_of(columns: Mapping[str, Column]) -> int:
    """Steps of an episode. Raises InputError where the arrays of its steps differ in length, or it has none."""
    lengths = {name: columns[name].rows for name in ("rewards", "terminations", "truncations") if name in columns}
    lengths |= {name: column.rows for name, column in columns.items() if name.partition("/")[0] == "actions"}
    if len(set(lengths.values())) > 1:
        raise InputError(f"its arrays differ in length: {', '.join(f'{k} {v}' for k, v in lengths.items())}.")
    if not lengths or not max(lengths.values()):
        raise InputError("it has no steps.")
    return max(lengths.values())


def read_scalars(columns: Mapping[str, Column], name: str, steps: int) -> np.ndarray:
    """(N,) float32: `rewards`, `terminations` or `truncations`. Raises InputError: not one number per step."""
    column = required(columns, name, "numbers")
    if math.prod(column.shape) != 1:
        raise InputError(f"'{name}' has shape {column.shape} per step, not one number.")
    return column.values(steps).reshape(steps)


def _ends(columns: Mapping[str, Column]) -> tuple[int, list[str]]:
    """Steps of one episode, and what is odd about it."""
    steps = num_steps_of(columns)
    terminations, truncations = (read_scalars(columns, name, steps) != 0 for name in ("terminations", "truncations"))
    rows = {column.rows for name, column in columns.items() if name.partition("/")[0] == "observations"}
    odd = {
        "no-final-observation": rows == {steps},
        "early-end": bool((terminations | truncations)[:-1].any()),
        "terminal-and-timeout": bool(terminations[-1] and truncations[-1]),
        "no-end": not (terminations[-1] or truncations[-1]),
    }
    return steps, [what for what, is_so in odd.items() if is_so]


def _habits(counts: Mapping[str, int], num_seen: int, num_episodes: int) -> list[Finding]:
    looked = "" if num_seen == num_episodes else f" that could be read ({num_episodes} in all)"
    known = {
        "no-final-observation": (
            "warning",
            "have as many observations as steps: the last observation is missing, so their last step counts only if it "
            "terminated.",
            "Minari's own recorder stores one more; see what made them.",
        ),
        "early-end": (
            "warning",
            "have a termination or truncation before their last step: it cuts nothing there.",
            "Split them in the source if it should.",
        ),
        "terminal-and-timeout": ("note", "end by termination and truncation at once: taken as terminated.", ""),
        "no-end": ("note", "end by neither termination nor truncation: taken as truncated.", ""),
    }
    return [
        Finding(what, severity, f"{counts[what]} of {num_seen} episodes{looked} {message}", advice)
        for what, (severity, message, advice) in known.items()
        if counts.get(what)
    ]


def _claims(storage: Storage, num_steps: int | None) -> list[Finding]:
    """Where the dataset's own counts differ from its files; the steps only if every episode was read."""
    counted = {"episodes": len(storage.ids), "steps": num_steps}
    found = []
    for what, count in counted.items():
        claimed = storage.metadata.get(f"total_{what}")
        if isinstance(claimed, int | float) and count is not None and claimed != count:
            message = f"the metadata says total_{what} = {claimed:g}; the files hold {count}."
            found.append(Finding(f"{what.rstrip('s')}-count", "warning", message, "The files count."))
    return found


def _gaps(storage: Storage) -> list[Finding]:
    missing = storage.ids[-1] + 1 - len(storage.ids)
    if not missing:
        return []
    message = f"{missing} of the numbers below episode {storage.ids[-1]} have no episode."
    return [Finding("episode-gap", "warning", message, "See whether episodes were lost or removed.")]


def _alike(column: Column, other: Column) -> bool:
    return (column.kind, column.shape) == (other.kind, other.shape)


def _seed(storage: Storage, episode: int) -> int | None:
    try:
        seed: Any = storage.details(episode).get("seed")
    except InputError:
        return None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None
