"""Monte-Carlo returns of recorded steps."""

import numpy as np


def returns_to_go(
    rewards: np.ndarray, masks: np.ndarray, frame: np.ndarray, next_frame: np.ndarray, discount: float
) -> np.ndarray:
    """Discounted sum of rewards from each step to the end of its episode, (N,) float32: a lower bound where it is cut.

    After a termination nothing more is paid. After a truncation nothing is known, and nothing is bootstrapped: what
    follows counts as min(0, smallest reward of the data) for ever, so that the sum never exceeds what the behaviour
    would have got. A tail of 0 would exceed it with rewards such as -1 per step. Cal-QL's code does the same for
    antmaze episodes that never reach the goal (Nakamoto et al. 2023).

    Args:
        rewards: (N,) as the learner sees them, after normalisation.
        masks: (N,) 1 - terminated.
        frame, next_frame: (N,) rows; the step that follows is the one whose frame is this one's next frame.
        discount: the learner's. With 1 and negative rewards the bound of a cut episode is -inf.
    """
    lowest = min(0.0, float(rewards.min(initial=0.0)))
    tail = 0.0 if lowest == 0.0 else lowest / (1.0 - discount) if discount < 1 else -np.inf
    order = np.argsort(frame, kind="stable")[::-1]  # a step's successor stands behind it in the store
    following = dict(zip(frame.tolist(), range(len(frame)), strict=True))
    result = np.full(len(frame), tail)
    for i in order.tolist():
        if masks[i] == 0:
            result[i] = rewards[i]
            continue
        after = following.get(int(next_frame[i]), i) if next_frame[i] > frame[i] else i
        result[i] = rewards[i] + discount * masks[i] * (tail if after == i else result[after])
    return result.astype(np.float32)
