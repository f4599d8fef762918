"""The goal that a policy is told when it acts: by itself, from a file, or within every observation."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import InputError, suggest
from embodied.contracts.specs import ArraySpec
from embodied.policies.contract import PolicyContract

IN_OBSERVATION = "goal/"  # before a goal's key, where an environment states goals in its observations


class Goals:
    """What a policy is to reach: one of the goals that it was given, or what an observation states."""

    def __init__(self, spec: Mapping[str, ArraySpec]) -> None:
        self.spec = spec
        self._rows: list[Any] = []
        self._chosen = 0

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

    def pursued(self, observation: Mapping[str, np.ndarray]) -> Any:
        """`_row` of the goal that the observation states, or of the chosen one. InputError: there is none."""
        stated = {key: observation[IN_OBSERVATION + key] for key in self.spec if IN_OBSERVATION + key in observation}
        if stated:
            return self._row(stated)
        if self._rows:
            return self._rows[self._chosen]
        raise InputError(
            f"This policy pursues a goal ({', '.join(self.spec)}) and was given none.\n"
            "Name one: --goal FILE of 'embodied eval' and 'embodied deploy', or policy.give_goals({...})."
        )

    def _row(self, goal: Mapping[str, Any]) -> Any:
        """(1, ...) of every key: uint8 of pictures, float32 of all else."""
        parts = []
        for key, spec in self.spec.items():
            if key not in goal:
                raise InputError(f"The goal lacks '{key}'. It has: {', '.join(sorted(goal)) or 'nothing'}.")
            value, picture = np.asarray(goal[key]), key.startswith("images/")
            spec.check(f"goal {key}", value, leading=0)
            if picture and value.dtype != np.uint8:
                raise InputError(f"'goal {key}' is {value.dtype}; this policy takes uint8 images.")
            parts.append(np.ascontiguousarray(value[None], np.uint8 if picture else np.float32))
        return parts


GoalsKind = TypeVar("GoalsKind", bound=Goals)


class Pursuer(Generic[GoalsKind]):
    """What a policy offers to whoever tells it its goal."""

    _goal: GoalsKind

    def give_goals(self, *goals: Mapping[str, np.ndarray]) -> None:
        """What to reach: `goal_spec`'s keys in SI units, `images/<camera>` uint8. It outlasts `reset`.

        Goals within an observation, `goal/<key>`, come first. Of several goals given here `choose_goal` takes one.

        Raises:
            InputError: a key is missing, unknown or of another shape.
        """
        self._goal.give(goals)

    @property
    def goals_given(self) -> int:
        return self._goal.given

    def choose_goal(self, number: int) -> None:
        """Of the goals given, counted round and round, this one."""
        self._goal.choose(number)


class GoalInput(Goals):
    """The goal part of a network's input.

    Args:
        encoder: of images, (B, H, W, 3) uint8 -> (B, E); needed for goals that are pictures.
        embedding_size: E.
        where: the bundle, for errors.

    Attributes:
        mean, std: (G,); G is 0 without goals.
    """

    def __init__(self, contract: PolicyContract, encoder: Any, embedding_size: int, where: str) -> None:
        super().__init__(contract.goal)
        self._encoder = encoder
        mean, std = contract.goal_statistics(embedding_size, where)
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(std)

    def append(self, x: Tensor, observation: Mapping[str, np.ndarray]) -> Tensor:
        """(B, N * D) -> (B, N * D + G): the goal that the observation states, or the chosen one.

        Raises:
            InputError: there is none.
        """
        return torch.cat([x, self.pursued(observation).expand(len(x), -1)], -1) if self.spec else x

    def _row(self, goal: Mapping[str, Any]) -> Tensor:
        """(1, G), normalised."""
        with torch.inference_mode():
            parts = [embedded(torch.from_numpy(value), self._encoder) for value in super()._row(goal)]
            return (torch.cat(parts, -1) - self.mean) / self.std


def embedded(value: Tensor, encoder: Any) -> Tensor:
    """(B, ...) -> (B, E) of pictures, all else as it is, flat."""
    return encoder(value) if value.dtype == torch.uint8 else value.reshape(value.shape[0], -1)


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
