"""Can a label set be trusted? Checks that need no training: do scores rise in successes, tell them from failures, agree
with each other and with the truth, move at all, and do they pay an agent for not finishing?
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import rankdata

from embodied.contracts.errors import InputError
from embodied.vlm_rewards.audit import progress_correlation, spearman

RESAMPLES = 2000
# Verdicts. Chance is 0.5 and 0; the levels in between are ours.
GOOD_AUC, GOOD_RISE, SATURATED = 0.75, 0.5, 0.5


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The episodes that are looked at.

    Attributes:
        start, length: (E,) frames in the store.
        success: (E,) int8: 1, 0, or -1 for unknown.
    """

    start: np.ndarray
    length: np.ndarray
    success: np.ndarray

    def rows(self) -> list[np.ndarray]:
        """Frame indices of each episode."""
        return [np.arange(a, a + n) for a, n in zip(self.start, self.length, strict=True)]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive outscores a negative, ties counted half (Mann and Whitney's U over its maximum)."""
    ranks = rankdata(np.concatenate([positive, negative]))
    wins = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def auc_interval(estimate: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % score interval of an AUC (Newcombe 2006, "Confidence intervals for an effect size measure based on the
    Mann-Whitney statistic", part 2, method 5). Unlike a bootstrap it does not collapse where nothing overlaps.
    """
    size = (positives + negatives) / 2

    def excess(theta: float) -> float:
        """Squared distance from the estimate over its squared bound at `theta`: 0 on the interval's ends."""
        spread = 1 + (size - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (estimate - theta) ** 2 - 1.959964**2 * theta * (1 - theta) * spread / (positives * negatives)

    # 0 and 1 themselves solve the equation for an estimate of 0 or 1; the other solution is the interval's end.
    low: Any = brentq(excess, 0.0, estimate - 1e-9) if estimate > 1e-6 else 0.0
    high: Any = brentq(excess, estimate + 1e-9, 1.0) if estimate < 1 - 1e-6 else 1.0
    return float(low), float(high)


def separation(values: np.ndarray, success: np.ndarray) -> dict[str, Any] | None:
    """AUC of one number per episode for success against failure, with its 95 % interval.

    Args:
        values: (E,), for example each episode's score at its final frame.
        success: (E,) int8; episodes of unknown outcome (-1) are left out.

    Returns:
        `auc`, `low`, `high`, `successes`, `failures`; None where one of the two outcomes does not occur.
    """
    positive, negative = values[success == 1], values[success == 0]
    if len(positive) == 0 or len(negative) == 0:
        return None
    estimate = auc(positive, negative)
    low, high = auc_interval(estimate, len(positive), len(negative))
    return {"auc": estimate, "low": low, "high": high, "successes": len(positive), "failures": len(negative)}


def orientation(score: np.ndarray, episodes: Episodes, seed: int = 0) -> dict[str, Any]:
    """Spearman of score with step, by outcome: a reward should rise where the task is done, and less where it is not.

    Returns:
        For `success`, `failure` and `unknown`: `episodes`, `mean` with `low` and `high` (95 %, bootstrap over
        episodes), `rising` (share of the episodes above 0); None for an outcome that does not occur. An episode whose
        score never changes counts as 0.
    """
    rise = np.array([spearman(score[row], np.arange(len(row))) if len(row) > 1 else np.nan for row in episodes.rows()])
    found: dict[str, Any] = {}
    rng = np.random.default_rng(seed)
    for name, value in (("success", 1), ("failure", 0), ("unknown", -1)):
        chosen = rise[(episodes.success == value) & ~np.isnan(rise)]
        found[name] = None
        if len(chosen):
            means = chosen[rng.integers(len(chosen), size=(RESAMPLES, len(chosen)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            found[name] = {
                "episodes": len(chosen),
                "mean": float(chosen.mean()),
                "low": float(low),
                "high": float(high),
                "rising": float((chosen > 0).mean()),
            }
    return found


def spread(score: np.ndarray, episodes: Episodes) -> dict[str, Any]:
    """Does the score move? `at_low` and `at_high`: shares of the frames at the least and greatest value; `within`: the
    median over episodes of the standard deviation inside one, over that of all frames."""
    rows = np.concatenate(episodes.rows())
    values = score[rows]
    low, high, total = float(values.min()), float(values.max()), float(values.std())
    inside = float(np.median([score[row].std() for row in episodes.rows()]))
    return {
        "min": low,
        "max": high,
        "std": total,
        "constant": high == low,
        "at_low": float((values == low).mean()),
        "at_high": float((values == high).mean()),
        "within": inside / total if total > 0 else 0.0,
        "positive": float((values > 0).mean()),
    }


def pearson_distance(score: np.ndarray, truth: np.ndarray) -> float | None:
    """sqrt((1 - r) / 2): 0 equal up to scale and shift, 0.71 unrelated, 1 opposite; None if one is constant.

    This is EPIC (Gleave et al. 2021, arXiv 2006.13900) where reward belongs to the state reached: with states drawn
    from the dataset's marginal its canonical shaping only adds a constant, which the correlation ignores.
    """
    if np.ptp(score) == 0 or np.ptp(truth) == 0:
        return None
    r = float(np.clip(np.corrcoef(np.asarray(score, np.float64), np.asarray(truth, np.float64))[0, 1], -1.0, 1.0))
    return float(np.sqrt((1.0 - r) / 2.0))


def agreement(scores: Mapping[str, np.ndarray], episodes: Episodes) -> list[dict[str, Any]]:
    """Each pair of label sets: Spearman over all frames (`pooled`) and the mean over episodes (`within`)."""
    rows = np.concatenate(episodes.rows())
    names = list(scores)
    found = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = scores[first], scores[second]
            inside = [spearman(a[row], b[row]) for row in episodes.rows() if np.ptp(b[row]) > 0]
            pooled = spearman(a[rows], b[rows])
            found.append(
                {
                    "labels": [first, second],
                    "pooled": 0.0 if np.isnan(pooled) else pooled,
                    "within": float(np.mean(inside)) if inside else None,
                }
            )
    return found


def termination_trap(
    reward: np.ndarray, terminated: np.ndarray, episode_success: np.ndarray, seen: str = "as labelled"
) -> dict[str, Any]:
    """Would an agent rather not finish? An episode that ends at success forgoes every later positive reward.

    Args:
        reward: (N,) of each transition, as the learner will see it.
        terminated: (N,) bool, the transition ends the episode.
        episode_success: (N,) int8, outcome of the transition's episode.
        seen: what was done to the rewards, for the message.

    Returns:
        `at_risk`, `terminations` (at success), `positive` (share of the rewards), `reason`.
    """
    ends = int((terminated & (episode_success == 1)).sum())
    positive = float((reward > 0).mean()) if len(reward) else 0.0
    at_risk = ends > 0 and float(reward.mean()) > 0
    if at_risk:
        reason = (
            f"{ends} episodes end at success and rewards ({seen}) are positive in {positive:.0%} of the steps: "
            "finishing costs what would have followed. Shift them to at most 0 (reward normalisation 'quantile')."
        )
    elif ends:
        reason = f"{ends} episodes end at success; rewards ({seen}) are negative on average, so finishing pays."
    else:
        reason = "No episode ends at success, so the sign of the rewards does not matter."
    return {"at_risk": at_risk, "terminations": ends, "positive": positive, "reason": reason}


def check_label(
    score: np.ndarray,
    episodes: Episodes,
    progress: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    trap: dict[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every check of one label set, and the verdict.

    Args:
        score: (F,) per frame of the store.
        progress, truth: (F,) true progress and true reward, where a simulator knows them.
        trap: from `termination_trap`.
        counts: the label set's own counts, such as abstentions.

    Returns:
        JSON-able: `progress` (as `Audit.to_json`), `final` and `mean` (AUC of an episode's final and mean score),
        `orientation`, `spread`, `epic`, `success_correlation`, `termination`, `verdict` (`use`, `doubtful`, `do not
        use` or `no evidence`) and its `reasons`.
    """
    rows = episodes.rows()
    together = np.concatenate(rows)
    final = np.array([score[row[-1]] for row in rows])
    known = episodes.success >= 0
    has_progress = progress is not None and any(np.ptp(progress[row]) > 0 for row in rows)
    correlation = spearman(final[known], episodes.success[known]) if known.any() else float("nan")
    checks: dict[str, Any] = {
        "progress": progress_correlation(score, progress, episodes.start, episodes.length).to_json()
        if has_progress and progress is not None
        else None,
        "final": separation(final, episodes.success),
        "mean": separation(np.array([score[row].mean() for row in rows]), episodes.success),
        "orientation": orientation(score, episodes),
        "spread": spread(score, episodes),
        "epic": pearson_distance(score[together], truth[together]) if truth is not None else None,
        "success_correlation": None if np.isnan(correlation) else correlation,
        "termination": trap,
        "counts": dict(counts or {}),
    }
    word, reasons = verdict(checks)
    return {**checks, "verdict": word, "reasons": reasons}


def verdict(checks: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A word, and the reasons for it, worst first. Thresholds: GOOD_AUC, GOOD_RISE, SATURATED of this module."""
    bad, doubt, good = [], [], []
    moves, final, rise = checks["spread"], checks["final"], checks["orientation"]["success"]
    if moves["constant"]:
        bad.append(f"every frame has the score {moves['min']:.4g}: there is nothing to learn from")
    elif max(moves["at_low"], moves["at_high"]) >= SATURATED:
        side, share = (
            ("least", moves["at_low"]) if moves["at_low"] >= moves["at_high"] else ("greatest", moves["at_high"])
        )
        doubt.append(f"{share:.0%} of the frames share the {side} score: it is saturated")
    if final is not None:
        text = f"the final frame's score tells success from failure with AUC {final['auc']:.2f} "
        text += f"[{final['low']:.2f}, {final['high']:.2f}]"
        if final["high"] < 0.5:
            bad.append(f"{text}: failures score higher than successes")
        elif final["low"] <= 0.5:
            doubt.append(f"{text}: no better than chance can be ruled out")
        else:
            (good if final["auc"] >= GOOD_AUC else doubt).append(text)
    if rise is not None:
        numbers = f"{rise['mean']:.2f} [{rise['low']:.2f}, {rise['high']:.2f}]"
        text = f"it rises in successful episodes: Spearman with step {numbers}"
        if rise["high"] < 0:
            bad.append(text.replace("it rises", "it falls"))
        elif rise["mean"] < GOOD_RISE:
            doubt.append(text.replace("it rises", "it hardly rises"))
        else:
            good.append(text)
    if checks["progress"] is not None:
        mean, low, high = (checks["progress"][key] for key in ("mean", "low", "high"))
        text = f"Spearman with true progress {mean:.2f} [{low:.2f}, {high:.2f}]"
        (bad if high < 0 else doubt if mean < GOOD_RISE else good).append(text)
    if checks["termination"] is not None and checks["termination"]["at_risk"]:
        bad.append(checks["termination"]["reason"])
    if failed := sum(int(checks["counts"].get(key, 0)) for key in ("abstentions", "failures")):
        doubt.append(f"the labeller abstained or failed {failed} times")
    if not bad and not doubt and not good:
        return "no evidence", ["neither successes and failures nor true progress are known here"]
    word = "do not use" if bad else "doubtful" if doubt else "use"
    return word, [*bad, *doubt, *good]


def join_by_key(
    keys: Sequence[tuple[Any, Any]], other_keys: Sequence[tuple[Any, Any]], other: np.ndarray
) -> np.ndarray:
    """`other` (M,) put into the order of `keys` (F,): frames are matched by (episode's source id, frame number).

    Joining two label sets by row silently compares different frames as soon as one store has another order.

    Raises:
        InputError: a key occurs twice, or is absent in the other set (says how many).
    """
    row = {key: index for index, key in enumerate(other_keys)}
    if len(row) != len(other_keys) or len(set(keys)) != len(keys):
        raise InputError("Two episodes have the same source id; label sets cannot be joined by it.")
    missing = [key for key in keys if key not in row]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(keys)} frames are not in the other store, "
            f"first frame {missing[0][1]} of {missing[0][0]}."
        )
    return other[[row[key] for key in keys]]
