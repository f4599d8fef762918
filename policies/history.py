"""Windows in time: the last observations that a policy sees, and the next actions that it gives.

Training and acting stack alike: oldest first, an episode's first observation repeated before its start.
"""

import collections

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import ConfigError
from embodied.datasets.transitions import TransitionIndex
from embodied.datasets.windows import Episodes, step_runs, window_rows


class History:
    """The last `stack` inputs (B, D) of an episode, as one."""

    def __init__(self, stack: int) -> None:
        self._rows: collections.deque[Tensor] = collections.deque(maxlen=stack)
        self._stack = stack

    def append(self, row: Tensor) -> None:
        self._rows.extend([row] * (1 if self._rows else self._stack))

    def stacked(self) -> Tensor:
        """(B, stack * D), oldest first."""
        return torch.cat(list(self._rows), -1)


def stack_observations(observations: np.ndarray, episodes: Episodes, stack: int) -> np.ndarray:
    """(F, D) of every frame -> (F, stack * D): the last `stack` frames of its episode, oldest first."""
    if stack < 1:
        raise ConfigError(f"A stack holds 1 observation or more; found {stack}.")
    if stack == 1:
        return observations
    rows, _ = window_rows(episodes, np.arange(len(observations)), range(1 - stack, 1))  # (F, stack)
    return observations[rows].reshape(len(observations), -1)


def chunk_actions(actions: np.ndarray, index: TransitionIndex, chunk: int) -> np.ndarray:
    """(F, A) of every frame -> (F, chunk * A): from each step on, the last action of its run repeated after the end.

    No chunk crosses the end of an episode or a gap in a recording. Frames that begin no step keep zeros.
    """
    if chunk < 1:
        raise ConfigError(f"A chunk holds 1 action or more; found {chunk}.")
    if chunk == 1:
        return actions
    rows, _ = window_rows(step_runs(index), index.frame, range(chunk))  # (N, chunk)
    out = np.zeros((len(actions), chunk * actions.shape[1]), actions.dtype)
    out[index.frame] = actions[rows].reshape(len(rows), -1)
    return out
