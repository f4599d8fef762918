"""The edge of reach: where rollouts end, what is bootstrapped from there and never trained, and what it is believed.

Sims, Lu, Foerster, Teh 2024 ("The Edge-of-Reach Problem in Offline Model-Based Reinforcement Learning"). A value is
trained at states that rollouts pass through, and asked for at the states they lead to. A state that only last steps
lead to is asked for and never trained: its value is whatever the networks say, and the policy seeks the highest.

In continuous states nothing is visited twice, so "trained" is a matter of distance: rollouts are split in two halves,
and a state of one counts as trained where a recorded state, or one that the other half passes through, is as near as
is usual for states that are passed through (`USUAL`). Distances are in units of each number's spread in the data.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied.policies.rollouts import Model
from embodied.policies.trained import Trained

USUAL = 0.99  # quantile of the distances among trained states, up to which a state counts as trained
RECORDED = 10_000  # recorded states that distances are taken to, at most
BLOCK = 256  # rows of a distance matrix at once
SAME = 1e-6  # distance under which two states are one: a rollout's own start
TAIL = 0.01  # of a return, left out where a true rollout is cut
LONGEST = 1000
RESAMPLES = 1000
BINS = 8
# Of the verdict, ours.
MANY = 5.0  # times the share that trained states show themselves
TELLS = 2.0  # ratio of the spread at the edge to that inside, from which an ensemble tells them apart
PULLS = 0.6  # chance that a value at the edge is above one inside
TOO_HIGH = 0.25  # of the true returns' size: over-estimation


@dataclasses.dataclass(frozen=True)
class Walk:
    """n rollouts of k steps. Attributes: states (k + 1, n, D) in the dataset's units; actions (k + 1, n, A) that the
    policy draws there; rewards (k, n) as the learner sees them; alive (k + 1, n): reached, and not past an end."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor


def walk(trained: Trained, model: Model, starts: Tensor, steps: int, rng: np.random.Generator) -> Walk:
    """Roll the policy out as its training does, from states (n, D)."""
    states, actions, rewards, alive = [starts], [], [], [torch.ones(len(starts), dtype=torch.bool)]
    for _ in range(steps):
        actions.append(trained.act(states[-1], rng)[0])
        following, reward, ended, _ = model.step(states[-1], actions[-1], rng)
        reward = trained.paid(reward)
        here = alive[-1] & torch.isfinite(following).all(-1) & torch.isfinite(reward)
        states.append(torch.where(here.unsqueeze(-1), following, states[-1]))
        rewards.append(torch.where(here, reward, 0.0))
        alive.append(here & ~ended)
    actions.append(trained.act(states[-1], rng)[0])
    return Walk(torch.stack(states), torch.stack(actions), torch.stack(rewards), torch.stack(alive))


def nearest(queries: Tensor, reference: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n,) distance to the nearest row; rows within `SAME` are the query itself and do not count."""
    found = []
    for block in queries.split(BLOCK) if len(reference) else ():
        distance = torch.cdist(block, reference, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distance.masked_fill(distance < SAME, math.inf).amin(1))
    return torch.cat(found) if found else torch.full((len(queries),), math.inf)


def examine(
    trained: Trained,
    model: Model,
    recorded: np.ndarray,
    starts: np.ndarray,
    steps: int,
    rollouts: int,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Where rollouts go, and what the critics say there.

    Args:
        recorded: (F, D) states in the dataset's units; `starts` (N,) the rows of them that rollouts begin at.

    Returns:
        figures, JSON-able: `steps`, one entry per step from 0 to k, with `untrained` as it would be if rollouts were
        cut there; `untrained`, the share of all bootstrap targets of rollouts cut at k; `spread`, `value` inside and at
        the edge; `by_distance`. And arrays: of the second half's states, `states` (n, D), `step`, `distance` to the
        recorded ones, `edge` bool, `value`, `spread` (n,).
    """
    known = torch.from_numpy(recorded[np.sort(rng.permutation(len(recorded))[:RECORDED])])
    scale = torch.from_numpy(np.maximum(recorded.std(0), 1e-6))
    begin = torch.from_numpy(recorded[starts[rng.integers(len(starts), size=rollouts)]])
    path = walk(trained, model, begin, steps, rng)
    scaled, half = path.states / scale, rollouts // 2
    rows, columns = [], []
    reference = known / scale
    usual: list[Tensor] = []  # of each step passed through: distances of the second half's states to what is trained
    for step in range(steps + 1):
        alive = path.alive[step]
        mine = alive.clone()
        mine[:half] = False
        query = scaled[step, mine]
        to_data, to_trained = nearest(query, known / scale), nearest(query, reference)
        limit = float(torch.cat(usual).quantile(USUAL)) if usual else math.inf
        outside = to_trained > limit
        q = trained.values(path.states[step, mine], path.actions[step, mine])
        spread = q.std(0) if len(q) > 1 else torch.zeros(q.shape[1])
        rows.append(
            {
                "step": step,
                "alive": float(alive.float().mean()),
                "distance": _quantiles(to_data),
                "untrained": float(outside.float().mean()) if step and len(outside) else 0.0,
                "value": _mean(q.amin(0)),
                "spread": _mean(spread),
            }
        )
        columns.append((path.states[step, mine], to_data, outside & (step == steps), q.amin(0), spread))
        if step < steps:
            first = scaled[step, :half][alive[:half]]
            reference = torch.cat([reference, first])
            usual.append(to_trained)
            passed = [scaled[s, half:][path.alive[s, half:]] for s in range(step + 1)]
            usual = [torch.minimum(old, nearest(states, first)) for old, states in zip(usual, passed, strict=True)]
    names = ("states", "distance", "edge", "value", "spread")
    arrays = {name: torch.cat(column).numpy() for name, column in zip(names, zip(*columns, strict=True), strict=True)}
    arrays["step"] = np.concatenate([np.full(len(c[0]), i) for i, c in enumerate(columns)])
    last, edge = arrays["step"] == steps, arrays["edge"]
    targets = int((arrays["step"] > 0).sum())
    found = {
        "steps": rows,
        "untrained": int(edge.sum()) / max(targets, 1),
        "targets": targets,
        "edge": int(edge.sum()),
        "spread": _inside_and_edge(arrays["spread"], last, edge),
        "value": _inside_and_edge(arrays["value"], last, edge),
        "by_distance": _by_distance(arrays, last),
        "rewards": {"largest": float(path.rewards.max()), "mean": float(path.rewards[path.alive[:-1]].mean())},
    }
    return found, arrays


def _quantiles(values: Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"low": low, "median": middle, "high": high}


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _inside_and_edge(values: np.ndarray, last: np.ndarray, edge: np.ndarray) -> dict[str, float | None]:
    """Medians over states that are passed through and over untrained targets; `above`, the chance that one of the
    latter is above one of the former."""
    inside, outer = np.sort(values[~last]), values[edge]
    return {
        "inside": float(np.median(inside)),
        "edge": float(np.median(outer)) if len(outer) else None,
        "above": float((np.searchsorted(inside, outer) / len(inside)).mean()) if len(outer) else None,
    }


def _by_distance(arrays: dict[str, np.ndarray], last: np.ndarray) -> list[dict[str, float]]:
    """Targets of the last step, in bins of equal count by their distance to the recorded states."""
    order = np.flatnonzero(last)[np.argsort(arrays["distance"][last], kind="stable")]
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    return [
        {
            "distance": float(np.median(arrays["distance"][part])),
            "untrained": float(arrays["edge"][part].mean()),
            "value": float(arrays["value"][part].mean()),
            "spread": float(arrays["spread"][part].mean()),
        }
        for part in bins
    ]


def recorded_edge(frame: np.ndarray, next_frame: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Recorded targets that are no step's beginning, as the last frame of a cut episode: share of all targets."""
    asked = next_frame[masks > 0]
    return {"targets": len(asked), "untrained": float((~np.isin(asked, frame)).mean()) if len(asked) else 0.0}


def true_values(
    trained: Trained, simulator: Model, states: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """What the critics say of the policy's action in states (n, D), and what one true rollout from each returns.

    Where values count the policy's entropy, so do the returns: -temperature log pi of every action after the first.

    Returns:
        least over the critics (n,), discounted return (n,), steps after which a rollout was cut.
    """
    discount, state = float(trained.config.discount), torch.from_numpy(states).clone()
    horizon = LONGEST if discount >= 1 else min(LONGEST, math.ceil(math.log(TAIL) / math.log(discount)))
    action, _ = trained.act(state, rng)
    said = trained.values(state, action).amin(0)
    total, alive = torch.zeros(len(state)), torch.ones(len(state), dtype=torch.bool)
    for step in range(horizon):
        following, reward, ended, _ = simulator.step(state[alive], action[alive], rng)
        reward = torch.nan_to_num(trained.paid(reward))
        total[alive] += discount**step * reward
        goes_on = ~ended & torch.isfinite(following).all(-1)
        alive[alive.clone()] = goes_on
        if not bool(alive.any()):
            break
        state[alive] = following[goes_on]
        drawn, density = trained.act(state[alive], rng)
        action[alive] = drawn
        total[alive] -= discount ** (step + 1) * trained.temperature * density
    return said.numpy(), total.numpy(), horizon


def against_truth(said: np.ndarray, true: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Means, and the over-estimation with a 95 % interval from a bootstrap over states."""
    difference = said - true
    picks = rng.integers(len(difference), size=(RESAMPLES, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    return {
        "states": len(said),
        "said": float(said.mean()),
        "true": float(true.mean()),
        "over": float(difference.mean()),
        "low": float(low),
        "high": float(high),
    }


def verdict(found: dict[str, Any], discount: float, bootstraps_from_policy: bool) -> dict[str, Any]:
    """`word`, ok, doubtful or bad, and `checks`: name, word and a sentence each.

    Args:
        found: of `examine`, and `truth` with `inside` and `edge` of `against_truth` where a simulator was asked.
    """
    checks: list[dict[str, str]] = []

    def check(name: str, word: str, text: str) -> None:
        checks.append({"name": name, "word": word, "text": text})

    last, usual = found["steps"][-1]["untrained"], 1.0 - USUAL
    text = (
        f"{100 * last:.0f} % of the states that last steps lead to lie farther from anything trained than "
        f"{100 * usual:.0f} % of the trained states do: {100 * found['untrained']:.0f} % of all bootstrap targets"
    )
    if not bootstraps_from_policy:
        text += "; this learner never asks for values there, since its targets use recorded actions alone"
    far = last > MANY * usual
    check("reach", "ok" if not far or not bootstraps_from_policy else "doubtful", text)
    if found["edge"]:
        value, spread = found["value"], found["spread"]
        drawn = value["above"] > PULLS
        text = f"the median value there is {value['edge']:.4g}, inside {value['inside']:.4g}; it is the higher one in "
        text += f"{100 * value['above']:.0f} % of pairs"
        text += ": a policy is drawn there" if drawn else ": nothing draws a policy there"
        check("pull", "doubtful" if drawn else "ok", text)
        ratio = spread["edge"] / max(spread["inside"], 1e-12)
        tells = ratio >= TELLS
        text = f"the critics' spread there is {ratio:.2g} times that inside"
        text += ": they tell it apart" if tells else ": their minimum hardly falls there"
        check("doubt", "ok" if tells or not far else "doubtful", text)
    most = found["rewards"]["largest_known"] / (1.0 - discount) if discount < 1 else math.inf
    if found["value"]["inside"] > most:
        text = f"the median value inside, {found['value']['inside']:.4g}, is above all that rewards allow, {most:.4g}"
        check("bound", "bad", text)
    for place, truth in found.get("truth", {}).items():
        high = truth["low"] > TOO_HIGH * max(abs(truth["true"]), 1e-9)
        text = (
            f"values say {truth['said']:.4g}, true rollouts return {truth['true']:.4g}; over by "
            f"{truth['over']:.4g} [{truth['low']:.4g}, {truth['high']:.4g}]"
        )
        check(f"truth, {place}", "bad" if high else "ok", text)
    words = [one["word"] for one in checks]
    word = "bad" if "bad" in words else "doubtful" if words.count("doubtful") > 1 else "ok"
    return {"word": word, "checks": checks, "text": SUMMARY[word]}


SUMMARY = {
    "ok": "No sign that values beyond the edge of reach mislead this policy.",
    "doubtful": "States beyond the edge of reach are asked for, and the values give no reason to trust them there.",
    "bad": "Values are higher than can be true; where they are, the policy follows errors, not returns.",
}
