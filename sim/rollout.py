"""Step an environment with a behaviour: the one loop behind collection, evaluation and films."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from embodied.contracts.protocols import EpisodicPolicy, GoalPolicy, Policy
from embodied.sim.suites import environment

PolicyFactory = Callable[[], Policy]


class Behaviour(Protocol):
    """What drives an episode. A scripted one may look at the simulator instead of the observation."""

    def reset(self, seed: int) -> str: ...

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray: ...


class PolicyBehaviour:
    """A learned policy in the place of a scripted behaviour.

    It executes the first action of each chunk, or the first `execute` of an `EpisodicPolicy`, then asks again; in
    between the policy only observes. Of several goals that it was given, the seed of the episode chooses one.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._episodic = policy if isinstance(policy, EpisodicPolicy) else None
        self._left: list[np.ndarray] = []

    def reset(self, seed: int) -> str:
        if isinstance(self._policy, GoalPolicy):
            self._policy.choose_goal(seed)
        if self._episodic:
            self._episodic.reset()
        self._left = []
        return "policy"

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        if self._left and self._episodic:
            self._episodic.observe(observation)
        else:
            count = self._episodic.execute if self._episodic else 1
            self._left = list(self._policy.act(observation)[:count])
        return self._left.pop(0)


@dataclasses.dataclass(frozen=True)
class Step:
    """One control step: what was seen, done, and seen then. `success` is None without a rule of success."""

    observation: dict[str, np.ndarray]
    action: np.ndarray
    next_observation: dict[str, np.ndarray]
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None


@functools.lru_cache(maxsize=2)
def cached_policy(factory: PolicyFactory) -> Policy:
    """This process's policy of that factory; equal factories are one policy, loaded once."""
    return factory()


@functools.lru_cache(maxsize=2)
def cached_environment(env_id: str, cameras: tuple[str, ...], image_size: int) -> Any:
    """This process's environment of that make; building one compiles a model."""
    return environment(env_id).make(cameras=cameras, image_size=image_size)


def rollout(env: Any, behaviour: Behaviour, seed: int) -> Iterator[Step]:
    """Yield the steps of one episode until the environment ends it; `behaviour` has been reset with `seed`."""
    observation, _ = env.reset(seed)
    ended = False
    while not ended:
        action = np.clip(behaviour.act(observation), -1.0, 1.0).astype(np.float32)
        following, reward, terminated, truncated, info = env.step(action)
        yield Step(observation, action, following, reward, terminated, truncated, info["success"])
        observation, ended = following, terminated or truncated
