"""The goal that a policy is told when it acts: by itself, from a file, or within every observation."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import InputError, suggest
from embodied.policies.contract import PolicyContract

IN_OBSERVATION = "goal/"  # before a goal's key, where an environment states goals in its observations


class GoalInput:
    """The goal part of a network's input.

    Args:
        encoder: of images, (B, H, W, 3) uint8 -> (B, E); needed for goals that are pictures.
        embedding_size: E.
        where: the bundle, for errors.
    """

    def __init__(self, contract: PolicyContract, encoder: Any, embedding_size: int, where: str) -> None:
        self.spec, self._encoder = contract.goal, encoder
        mean, std = contract.goal_statistics(embedding_size, where)
        self._mean, self._std = torch.from_numpy(mean), torch.from_numpy(std)
        self._rows: list[Tensor] = []
        self._chosen = 0

    @property
    def size(self) -> int:
        """G, 0 without goals."""
        return len(self._mean)

    @property
    def given(self) -> int:
        """How many goals there are to choose from."""
        return len(self._rows)

    def give(self, goals: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Goals to choose from, the first is chosen. InputError: a key is missing, unknown or of another shape."""
        for goal in goals:
            for key in goal:
                if key not in self.spec:
                    known = suggest(key, self.spec) if self.spec else " It was trained without goals."
                    raise InputError(f"'{key}' is no goal of this policy.{known}")
        self._rows, self._chosen = [self._row(goal) for goal in goals], 0

    def choose(self, number: int) -> None:
        """The goal `number`, counted round and round; nothing where none was given."""
        self._chosen = number % len(self._rows) if self._rows else 0

    def append(self, x: Tensor, observation: Mapping[str, np.ndarray]) -> Tensor:
        """(B, N * D) -> (B, N * D + G): the goal that the observation states, or the chosen one.

        Raises:
            InputError: there is none.
        """
        if not self.spec:
            return x
        stated = {key: observation[IN_OBSERVATION + key] for key in self.spec if IN_OBSERVATION + key in observation}
        if stated:
            row = self._row(stated)
        elif self._rows:
            row = self._rows[self._chosen]
        else:
            raise InputError(
                f"This policy pursues a goal ({', '.join(self.spec)}) and was given none.\n"
                "Name one: --goal FILE of 'embodied eval' and 'embodied deploy', or policy.give_goals({...})."
            )
        return torch.cat([x, row.expand(len(x), -1)], -1)

    def _row(self, goal: Mapping[str, Any]) -> Tensor:
        """(1, G), normalised."""
        parts = []
        for key, spec in self.spec.items():
            if key not in goal:
                raise InputError(f"The goal lacks '{key}'. It has: {', '.join(sorted(goal)) or 'nothing'}.")
            value = np.asarray(goal[key])
            spec.check(f"goal {key}", value, leading=0)
            if not key.startswith("images/"):
                parts.append(torch.from_numpy(value.reshape(1, -1).astype(np.float32)))
                continue
            if value.dtype != np.uint8:
                raise InputError(f"'goal {key}' is {value.dtype}; this policy takes uint8 images.")
            with torch.inference_mode():
                parts.append(self._encoder(torch.from_numpy(np.ascontiguousarray(value[None]))))
        return (torch.cat(parts, -1) - self._mean) / self._std


def read_goal(path: str | Path) -> dict[str, np.ndarray]:
    """A goal from a file: JSON, key -> numbers, or npz with an array per key, pictures as `images/<camera>`.

    Raises:
        InputError: no such file, or one that holds no goal. Never unpickles anything.
    """
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise InputError(f"{path}: a goal is a .json or .npz file.")
    try:
        if path.suffix == ".json":
            found = {key: np.asarray(value, np.float64) for key, value in json.loads(path.read_text()).items()}
        else:
            with np.load(path, allow_pickle=False) as file:
                found = {key: np.asarray(file[key]) for key in file.files}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a goal: {error}.") from None
    if not found:
        raise InputError(f"{path} holds no goal.")
    return found
