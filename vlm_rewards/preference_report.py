"""How far preferences can be trusted: agreement by key, accuracy where truth is known, by difficulty, cycles."""

from typing import Any

import numpy as np

from embodied.contracts.preferences import Answer
from embodied.vlm_rewards.preference_files import PairLabels, join_pairs


def agreement(mine: PairLabels, other: PairLabels) -> dict[str, int]:
    """Two annotators about the same pairs, joined by key.

    Returns:
        `pairs` both were asked, `both_decided` of them with a side by both, `agree` of these; `ties`, `other_ties`.
    """
    joined = join_pairs(mine, other)
    both = joined >= 0
    decided = both & (mine.answer <= Answer.SECOND) & (joined <= Answer.SECOND)
    return {
        "pairs": int(both.sum()),
        "both_decided": int(decided.sum()),
        "agree": int((decided & (mine.answer == joined)).sum()),
        "ties": int((both & (mine.answer == Answer.NO_PREFERENCE)).sum()),
        "other_ties": int((both & (joined == Answer.NO_PREFERENCE)).sum()),
    }


def accuracy(answer: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    """Answers (P,) against the true side (P,) of pairs that have one.

    Args:
        truth: `Answer.FIRST` or `SECOND`; pairs with anything else are left out.

    Returns:
        `pairs`, `decided` of them with a side, `correct`, `ties`, `abstained`. Correct over pairs counts what took no
        side as wrong; correct over decided leaves it out.
    """
    known = truth <= Answer.SECOND
    given, true = answer[known], truth[known]
    return {
        "pairs": int(known.sum()),
        "decided": int((given <= Answer.SECOND).sum()),
        "correct": int((given == true).sum()),
        "ties": int((given == Answer.NO_PREFERENCE).sum()),
        "abstained": int((given == Answer.ABSTAINED).sum()),
    }


def true_sides(difference: np.ndarray) -> np.ndarray:
    """(P,) `Answer`: who is truly better, from the second's true return less the first's."""
    side = np.where(difference > 0, Answer.SECOND, Answer.FIRST)
    return np.where(difference == 0, Answer.NO_PREFERENCE, side).astype(np.int8)


def by_difficulty(answer: np.ndarray, difference: np.ndarray, bins: int = 5) -> list[dict[str, Any]]:
    """Accuracy in equally filled bins of the true difference, the hardest first.

    Returns:
        Per bin `low` and `high` (absolute true difference) beside what `accuracy` counts.
    """
    known = np.flatnonzero(difference != 0)
    if not len(known):
        return []
    order = known[np.argsort(np.abs(difference[known]), kind="stable")]
    found = []
    for part in np.array_split(order, min(bins, len(order))):
        size = np.abs(difference[part])
        counted = accuracy(answer[part], true_sides(difference[part]))
        found.append({"low": float(size.min()), "high": float(size.max()), **counted})
    return found


def cycles(first: np.ndarray, second: np.ndarray, answer: np.ndarray, limit: int = 20_000) -> dict[str, int]:
    """Does it contradict itself: how many triples A > B, B > C that were asked about C and A form a circle.

    Returns:
        `triples` of segments whose three pairs are all decided, `cyclic` of them; about `limit` are looked at.
    """
    beats: dict[int, set[int]] = {}
    for a, b, verdict in zip(first.tolist(), second.tolist(), answer, strict=True):
        if verdict == Answer.FIRST:
            beats.setdefault(a, set()).add(b)
        elif verdict == Answer.SECOND:
            beats.setdefault(b, set()).add(a)
    triples = cyclic = 0
    for a, losers in beats.items():
        for b in losers:
            for c in beats.get(b, ()):
                if c == a or triples >= limit:
                    continue
                if a in beats.get(c, ()):
                    cyclic += 1
                    triples += 1
                elif c in losers:
                    triples += 3  # met once, where a circle is met three times
    return {"triples": triples // 3, "cyclic": cyclic // 3}
