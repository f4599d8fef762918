"""What a critic says of recorded steps, asked at logs: does it promise more than was earned, does it diverge?"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import TrainingError
from embodied.policies.networks import clip_actions

STARTS, STEPS = 64, 256  # episode starts whose return is compared, steps whose value is watched
SMALL_TAIL = 0.05  # of a cut episode: weight of what came after it in the return of its start
BEYOND = 10.0  # times what rewards allow is divergence,
PATIENCE = 3  # at so many logs in a row


class Probe:
    """Call it at a log: metrics (S,) of fixed rows of the data.

    `q_over_return`: mean of Q(s, a) - return at starts of episodes, the return being the discounted sum of the rewards
    to the end. Positive: over-estimated, as seen from the behaviour; an improved policy's values are rightly above it.
    Only episodes that terminated, or are so long that what was cut off weighs little; absent where there is none.
    `q_largest`: max |Q(s, a)| over rows of the whole data.

    Args:
        learner: with `q_values(s, a) -> (S, B)` or `target_critic(s, a) -> (S, E, B)`.
        data: `TransitionData`.
        rewards: (N,) as the learner sees them.
    """

    def __init__(self, learner: Any, data: Any, rewards: np.ndarray, discount: float, seeds: int, device: str) -> None:
        self._learner, self._seeds = learner, seeds
        self._discount, self._reward = discount, float(np.abs(rewards).max())
        starts, returns, longest = episode_returns(data, rewards, discount)
        chosen = np.unique(np.linspace(0, max(len(starts) - 1, 0), min(STARTS, len(starts))).astype(np.int64))
        rows = np.unique(np.linspace(0, len(rewards) - 1, min(STEPS, len(rewards))).astype(np.int64))
        self.returns = torch.as_tensor(returns[chosen], dtype=torch.float32, device=device)
        frames = data.frame[np.concatenate([starts[chosen], rows])]
        self._observations = torch.as_tensor(data.observations[frames], device=device)[None]
        self._actions = torch.as_tensor(data.actions[frames], device=device)[None]
        self.limit = BEYOND * self._reward * (1.0 / (1.0 - discount) if discount < 1 else longest)
        self._beyond = np.zeros(seeds, np.int64)  # logs in a row

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        observations, actions = (x.expand(self._seeds, -1, -1) for x in (self._observations, self._actions))
        if hasattr(self._learner, "q_values"):
            q = self._learner.q_values(observations, actions)
        else:
            q = self._learner.target_critic(observations, clip_actions(actions)).amin(1)
        count = len(self.returns)
        largest = q[:, count:].abs().amax(-1)
        self._beyond = (self._beyond + 1) * (largest.cpu().numpy() > self.limit) if self.limit else self._beyond
        found = {"q_over_return": (q[:, :count] - self.returns).mean(-1)} if count else {}
        return {**found, "q_largest": largest}

    @property
    def doubtful(self) -> bool:
        """Whether values are beyond the limit now: no state to keep as the last good one."""
        return bool(self._beyond.any())

    def check(self, step: int, largest: Tensor, where: str) -> None:
        """Raise TrainingError where a seed's values have been beyond the limit for `PATIENCE` logs."""
        if self._beyond.max() < PATIENCE:
            return
        seed = int(self._beyond.argmax())
        raise TrainingError(
            f"Seed number {seed} diverges: |Q| is {float(largest[seed]):.3g} at step {step}, at {PATIENCE} logs in a"
            f" row above {self.limit:.3g}, {BEYOND:g} times what rewards up to {self._reward:.3g} and a discount of"
            f" {self._discount:g} allow; {where}.\n"
            "Lower the learning rate, or choose a more conservative learner or setting."
        )


def watches(learner: Any) -> bool:
    """Whether a learner has action values to ask for."""
    return hasattr(learner, "q_values") or hasattr(learner, "target_critic")


def episode_returns(data: Any, rewards: np.ndarray, discount: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Transitions (E,) that begin an episode whose return is known; the returns (E,); the longest episode's length."""
    continues = np.zeros(len(data.frame), bool)
    continues[:-1] = (data.next_frame[:-1] == data.frame[1:]) & (data.masks[:-1] > 0)
    if data.episode is not None:
        continues[:-1] &= data.episode[:-1] == data.episode[1:]
    ends = np.flatnonzero(~continues)
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    known = (data.masks[ends] == 0) | (discount**length < SMALL_TAIL)
    pairs = zip(starts[known], ends[known], strict=True)
    returns = [rewards[a : b + 1] @ discount ** np.arange(b + 1 - a) for a, b in pairs]
    return starts[known], np.array(returns, np.float64), int(length.max())
