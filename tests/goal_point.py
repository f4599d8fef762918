"""A point that is to reach places: an environment, and a store of what somebody without aim did there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from made_stores import write_store

from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.datasets.store import EpisodeStore

SPEED, NEAR, HORIZON, FAR = 0.15, 0.15, 25, 0.7
SPEC = DatasetSpec(
    observations={"position": ArraySpec((2,), unit="m")},
    images={},
    action=ActionSpec((2,), names=("x", "y")),
    control_dt=0.1,
    environment="tests/Point",
    has_reward=True,
)


class PointEnv:
    """x' = x + 0.15 a within [-1, 1]^2; success within 0.15 of a place that is drawn with the start, 0.7 away or more.

    It states that place in its observations where `states`.
    """

    def __init__(self, states: bool = True) -> None:
        goal = {"goal/position": ArraySpec((2,), unit="m")} if states else {}
        self.spec = DatasetSpec(SPEC.observations | goal, {}, SPEC.action, SPEC.control_dt, SPEC.environment)
        self.states, self.position, self.goal, self.left = states, np.zeros(2), np.zeros(2), 0

    def reset(self, seed: int) -> tuple[dict[str, np.ndarray], dict]:
        rng = np.random.default_rng(seed)
        self.position, self.goal = rng.uniform(-1, 1, (2, 2))
        while np.linalg.norm(self.position - self.goal) < FAR:
            self.goal = rng.uniform(-1, 1, 2)
        self.left = HORIZON
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        self.position = np.clip(self.position + SPEED * np.clip(action, -1, 1), -1, 1)
        self.left -= 1
        reached = bool(np.linalg.norm(self.position - self.goal) < NEAR)
        return self._seen(), reached - 1.0, False, self.left == 0, {"success": reached}

    def _seen(self) -> dict[str, np.ndarray]:
        seen = {"position": self.position.astype(np.float32)}
        return seen | ({"goal/position": self.goal.astype(np.float32)} if self.states else {})


def environment(states: bool = True) -> Any:
    """As `suites.ENVIRONMENTS` holds one."""
    return SimpleNamespace(make=lambda cameras=(), image_size=64: PointEnv(states), behaviours={})


def point_store(path: Path, episodes: int = 150) -> EpisodeStore:
    """Walks that change direction every five steps; the reward is that of reaching the episode's own place."""
    made = []
    for index in range(episodes):
        env, rng, seen, actions, rewards = PointEnv(), np.random.default_rng([7, index]), [], [], []
        seen.append(env.reset(index)[0]["position"])
        for step in range(HORIZON):
            if step % 5 == 0:
                direction = rng.normal(size=2)
                direction /= np.linalg.norm(direction)
            actions.append(np.clip(direction + rng.normal(0, 0.4, 2), -1, 1))
            after, reward, *_ = env.step(actions[-1])
            seen.append(after["position"])
            rewards.append(reward)
        rows = HORIZON + 1
        step_valid, terminated, truncated = end_flags(HORIZON, rows, False)
        made.append(
            Episode(
                observations={"position": np.array(seen, np.float32)},
                images={},
                action=padded_last(np.array(actions, np.float32), rows),
                step_valid=step_valid,
                terminated=terminated,
                truncated=truncated,
                timestamp=np.arange(rows) * SPEC.control_dt,
                reward=padded_last(np.array(rewards, np.float32), rows),
            )
        )
    return write_store(path, made, SPEC)
