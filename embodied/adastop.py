"""AdaStop: compare agents with few training runs, several looks at the data, one bound on false verdicts.

Mathieu et al. 2023, "AdaStop: adaptive statistical testing for sound comparisons of Deep RL agents". At each look every
agent that still has an open question gets `group` more runs. The statistic of a pair is |sum of differences|; its law
under equality comes from permuting runs between the two agents inside each block; the boundary of a look is the least
one that keeps the chance of any rejection so far at or below alpha (look + 1) / looks.

The boundary is built from the *absolute* statistic, which is the one tested. The authors' package 0.1.3 builds it from
the signed one, which about doubles the rate of false verdicts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

PERMUTATIONS = 10_000


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is known about one pair.

    Attributes:
        first, second: agents.
        verdict: `first` or `second` (that one is better), `equal` (all looks are used up and none was found better), or
            `open`.
        look: at which the verdict fell, from 1; the looks so far where it is open.
        statistic, boundary: mean difference up to that look (signed), and what its absolute value had to pass
            (None before the first look).
    """

    first: str
    second: str
    verdict: str
    look: int
    statistic: float
    boundary: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The state of a sequential comparison.

    Attributes:
        decided: no pair is open.
        decisions: one per pair.
        needs: agent -> runs that the next look lacks; empty when decided.
        runs_used: agent -> runs per task that were looked at.
    """

    decided: bool
    decisions: tuple[Decision, ...]
    needs: dict[str, int]
    runs_used: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "decided": self.decided,
            "decisions": [decision.to_json() for decision in self.decisions],
            "needs": self.needs,
            "runs_used": self.runs_used,
        }


def adastop(
    scores: Mapping[str, np.ndarray],
    group: int = 5,
    looks: int = 5,
    alpha: float = 0.05,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Verdict:
    """Look at the runs in their order, `group` at a time, and stop as soon as every pair is decided.

    Args:
        scores: agent -> (R,) in the order they were run, or (R, M) for M tasks: differences are summed over the
            tasks, and runs are permuted inside each.
        group: n, new runs per look and agent. looks: K, at most. alpha: bound on the chance of any false verdict.
        seed: of the permutations; equal input gives an equal verdict.

    Raises:
        ValueError: fewer than two agents, agents with different tasks, or settings out of range.
    """
    tables = {name: _table(name, values) for name, values in scores.items()}
    tasks = {table.shape[1] for table in tables.values()}
    if len(tables) < 2 or len(tasks) != 1:
        raise ValueError("adastop needs two agents or more, with scores on the same tasks.")
    if group < 2 or looks < 1 or not 0 < alpha < 1 or permutations < 100:
        raise ValueError(f"group {group}, looks {looks}, alpha {alpha}, permutations {permutations} are out of range.")
    names = list(tables)
    open_pairs = list(itertools.combinations(range(len(names)), 2))
    found: dict[tuple[int, int], Decision] = {}
    sums = {pair: np.zeros(permutations) for pair in open_pairs}  # signed statistic, one entry per permutation
    past = {pair: np.empty((0, permutations)) for pair in open_pairs}  # its absolute value at each earlier look
    boundaries: list[float] = []
    used = dict.fromkeys(names, 0)
    needs: dict[str, int] = {}
    look = 0
    while open_pairs and look < looks and not needs:
        live = sorted({agent for pair in open_pairs for agent in pair})
        needs = {names[i]: lack for i in live if (lack := (look + 1) * group - len(tables[names[i]])) > 0}
        if needs:
            break
        blocks = {i: tables[names[i]][look * group : (look + 1) * group] for i in live}  # (n, M) each
        used |= {names[i]: (look + 1) * group for i in live}
        shares = _permuted(blocks, look, group, permutations, seed)
        for first, second in open_pairs:
            sums[first, second] = sums[first, second] + shares[first][0] + shares[second][1]
        look += 1
        scale = look * group * min(tasks)
        boundary = np.inf
        while open_pairs:  # step down: the largest first, then the boundary of those that are left
            now = {pair: np.abs(sums[pair]) for pair in open_pairs}
            boundary = _boundary(now, {pair: past[pair] for pair in open_pairs}, boundaries, alpha * look / looks)
            best = max(open_pairs, key=lambda pair: now[pair][0])
            if now[best][0] <= boundary:
                break
            better = "first" if sums[best][0] > 0 else "second"
            found[best] = Decision(
                names[best[0]], names[best[1]], better, look, float(sums[best][0]) / scale, boundary / scale
            )
            open_pairs.remove(best)
        boundaries.append(boundary)
        for pair in open_pairs:
            past[pair] = np.concatenate([past[pair], np.abs(sums[pair])[None]])
    for pair in open_pairs:
        scale = max(1, look * group * min(tasks))
        bound = boundaries[-1] / scale if boundaries else None
        verdict = "open" if needs else "equal"
        found[pair] = Decision(names[pair[0]], names[pair[1]], verdict, look, float(sums[pair][0]) / scale, bound)
    ordered = tuple(found[pair] for pair in itertools.combinations(range(len(names)), 2))
    return Verdict(not needs, ordered, needs, used)


def _boundary(
    now: Mapping[Any, np.ndarray], past: Mapping[Any, np.ndarray], boundaries: list[float], level: float
) -> float:
    """The least b with P(rejected at an earlier look) + P(max over open pairs > b, not rejected earlier) <= level."""
    greatest = functools.reduce(np.maximum, now.values())  # (permutations,)
    alive = np.ones(len(greatest), bool)
    for look, boundary in enumerate(boundaries):
        alive &= functools.reduce(np.maximum, (table[look] for table in past.values())) <= boundary
    count = len(greatest)
    allowed = int(np.floor(level * count + 1e-9)) - int(count - alive.sum())  # permutations that may still pass
    ordered = np.sort(greatest[alive])[::-1]
    return float(ordered[max(allowed, 0)])  # `allowed` of them at most are strictly greater


def _permuted(
    blocks: Mapping[int, np.ndarray], look: int, group: int, permutations: int, seed: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Agent -> its share of the statistic as first and as second of a pair, (permutations,) each.

    Permuting 2 n runs of a pair is giving n of them the sign + and n the sign -; the same signs serve every pair, so
    that pairs with an agent in common move together. Row 0 is the data as it came.
    """
    shares = {agent: (np.zeros(permutations), np.zeros(permutations)) for agent in blocks}
    for task in range(next(iter(blocks.values())).shape[1]):
        signs = _signs(seed, look, task, group, permutations)
        for agent, block in blocks.items():
            shares[agent] = (
                shares[agent][0] + signs[:, :group] @ block[:, task],
                shares[agent][1] + signs[:, group:] @ block[:, task],
            )
    return shares


@functools.lru_cache(maxsize=64)
def _signs(seed: int, look: int, task: int, group: int, permutations: int) -> np.ndarray:
    """(permutations, 2 n) of +1 and -1, n each, drawn uniformly; row 0 is n times +1, then n times -1."""
    rng = np.random.Generator(np.random.Philox(key=[seed, look * 65536 + task]))
    order = np.argsort(rng.random((permutations, 2 * group)), -1)
    signs = np.where(order < group, 1.0, -1.0)
    signs[0, :group], signs[0, group:] = 1.0, -1.0
    signs.setflags(write=False)
    return signs


def _table(name: str, values: np.ndarray) -> np.ndarray:
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(f"the scores of '{name}' must be finite, (runs,) or (runs, tasks); found {table.shape}.")
    return table
