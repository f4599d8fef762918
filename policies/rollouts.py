"""Rollouts of the current policy in a model, and batches that mix them with recorded transitions.

What lies in the buffer at a step is a function of the seed, the step and the actors at the starts of the last epochs.
Checkpoints hold those actors, not the buffer: a resumed run makes the same rollouts again and ends with the same
weights. A rollout is cut after k steps; the cut is no end, and its mask stays 1.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.provenance import hash_json
from embodied.datasets.draws import Stream, philox
from embodied.policies.dynamics import DISAGREEMENTS

STEPS_AT_ONCE = 16  # whose rows are drawn together
ACTOR_ROWS = 10_000


class Model(Protocol):
    """What a rollout steps through: trained `Dynamics`, or a simulator in their place."""

    def step(
        self, observations: Tensor, actions: Tensor, rng: np.random.Generator, penalty: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(n, D) in the dataset's units, (n, A) -> next (n, D), reward (n,), ended (n,) bool, uncertainty or None."""
        ...


class WithReward:
    """A model whose steps are paid by a function of the state that they lead to, instead of by its own reward.

    A label pays a step by the score of its next frame, and so does this.

    Args:
        model: see `Model`.
        reward: next observations (n, D), in the dataset's units and the model's order of keys -> (n,) float32.
        fingerprint: of the function; a run is not resumed with another.
    """

    def __init__(self, model: Any, reward: Callable[[np.ndarray], np.ndarray], fingerprint: str) -> None:
        self._model, self._reward = model, reward
        self.facts = getattr(model, "facts", {})
        self.fingerprint = hash_json([getattr(model, "fingerprint", ""), fingerprint])

    def step(
        self, observations: Tensor, actions: Tensor, rng: np.random.Generator, penalty: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As the model's, see `Model.step`. A state that is not finite is paid NaN."""
        following, _, ended, doubt = self._model.step(observations, actions, rng, penalty)
        known = torch.isfinite(following).all(-1)
        paid = self._reward(torch.where(known.unsqueeze(-1), following, 0.0).cpu().numpy())
        if paid.shape != (len(following),):
            raise InputError(f"The reward function gave {paid.shape} for {len(following)} states.")
        reward = torch.as_tensor(paid, dtype=following.dtype, device=following.device)
        return following, torch.where(known, reward, torch.nan), ended, doubt


class Rollouts:
    """A preallocated buffer of model transitions, (S, epochs, rollouts * k) rows of one float32 table.

    Args:
        model: see `Model`.
        actor: stacked; its weights are replaced by those of each epoch's start.
        observations: (F, D) normalised as the policy sees them; `starts` (N,) are the rows that rollouts begin at.
        mean, std: (D,) of that normalisation: the model works in units, the table holds what the policy sees.
        reward: scale, shift and bound of the learner's rewards, as `normalize_rewards` records them.
        config: with `rollout_length`, `rollouts`, `epochs_kept`, and perhaps `penalty` and `penalty_coefficient`.
    """

    def __init__(
        self,
        model: Model,
        actor: Any,
        observations: np.ndarray,
        starts: np.ndarray,
        mean: np.ndarray,
        std: np.ndarray,
        reward: Mapping[str, Any],
        config: Any,
        seeds: Sequence[int],
        action_size: int,
        device: str = "cpu",
    ) -> None:
        self._model, self._config, self._seeds, self._device = model, config, list(seeds), device
        self._actor = copy.deepcopy(actor).requires_grad_(False)
        self._observations = torch.as_tensor(observations, device=device)
        self._starts = starts
        self._mean, self._std = torch.as_tensor(mean, device=device), torch.as_tensor(std, device=device)
        self._scale, self._shift = float(reward.get("scale", 1.0)), float(reward.get("shift", 0.0))
        self._at_most_zero = bool(reward.get("at_most_zero", False))
        self._coefficient = float(getattr(config, "penalty_coefficient", 0.0))
        self._penalty = getattr(config, "penalty", None) if self._coefficient else None
        if self._penalty is not None and self._penalty not in DISAGREEMENTS:
            raise ConfigError(f"Unknown penalty '{self._penalty}'. Valid: {', '.join(DISAGREEMENTS)}.")
        self._d, self._a = observations.shape[1], action_size
        self.capacity = config.rollouts * config.rollout_length  # rows of one seed and epoch
        width = 2 * self._d + self._a + 2
        self.table = torch.empty((len(seeds), config.epochs_kept * self.capacity, width), device=device)
        self.counts = np.zeros((len(seeds), config.epochs_kept), np.int64)
        self.epochs: dict[int, int] = {}  # epoch -> its place
        self.metrics: dict[str, Tensor] = {}
        self._drawn: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def fill(self, epoch: int, actor: Mapping[str, Tensor]) -> None:
        """Roll out the actor with these weights, k steps or to a termination, in place of the oldest epoch."""
        config, count = self._config, self._config.rollouts
        self._actor.load_state_dict(actor)
        place = epoch % config.epochs_kept
        self.epochs = {e: p for e, p in self.epochs.items() if p != place} | {epoch: place}
        self.counts[:, place] = 0
        draws = [philox(seed, epoch, Stream.ROLLOUTS) for seed in self._seeds]
        rows = np.stack([self._starts[rng.integers(len(self._starts), size=count)] for rng in draws])
        seen = self._observations[torch.as_tensor(rows, device=self._device)]  # (S, n, D) as the policy sees it
        state = seen * self._std + self._mean
        alive = torch.ones(seen.shape[:2], dtype=torch.bool, device=self._device)
        paid = torch.zeros(len(draws), device=self._device)
        for _ in range(config.rollout_length):
            noise = np.stack([rng.standard_normal((count, self._a), np.float32) for rng in draws])
            actions = self._act(seen, torch.as_tensor(noise, device=self._device))
            found = [self._model.step(state[s], actions[s], rng, self._penalty) for s, rng in enumerate(draws)]
            state, reward, ended = (torch.stack(x) for x in list(zip(*(f[:3] for f in found), strict=True)))
            if self._penalty:
                reward = reward - self._coefficient * torch.stack([f[3] for f in found])  # type: ignore[misc]
            after = (state - self._mean) / self._std
            alive &= torch.isfinite(after).all(-1) & torch.isfinite(
                reward
            )  # a model that runs away is not learned from
            paid += torch.where(alive, reward, 0.0).sum(-1)
            reward = reward * self._scale + self._shift
            reward = reward.clamp_max(0.0) if self._at_most_zero else reward
            row = torch.cat([seen, actions, reward.unsqueeze(-1), (~ended).unsqueeze(-1).float(), after], -1)
            for s in range(len(draws)):
                kept = row[s][alive[s]]
                start = place * self.capacity + int(self.counts[s, place])
                self.table[s, start : start + len(kept)] = kept
                self.counts[s, place] += len(kept)
            alive &= ~ended
            seen = after
        filled = torch.as_tensor(self.counts[:, place], device=self._device)
        self.metrics = {"rollout_reward": paid / filled.clamp_min(1), "rollout_steps": filled / count}
        self._drawn = None

    def _act(self, seen: Tensor, noise: Tensor) -> Tensor:
        parts = zip(seen.split(ACTOR_ROWS, 1), noise.split(ACTOR_ROWS, 1), strict=True)
        return torch.cat([self._actor.sample(s, n)[0] for s, n in parts], 1)

    def batch(self, step: int, size: int) -> Batch:
        """(S, size, ...) rows drawn uniformly from all that is held, a function of (seed, step)."""
        key, place = (step // STEPS_AT_ONCE, size), step % STEPS_AT_ONCE
        if self._drawn is None or self._drawn[0] != key:
            numbers = np.stack([self._rows(s, *key) for s in range(len(self._seeds))], 1)  # (steps, S, size)
            self._drawn = key, torch.as_tensor(numbers, device=self._device)
        rows = self._drawn[1][place].unsqueeze(-1).expand(-1, -1, self.table.shape[-1])
        now, action, paid, mask, after = self.table.gather(1, rows).split([self._d, self._a, 1, 1, self._d], -1)
        return {
            "observations": now,
            "actions": action,
            "rewards": paid.squeeze(-1),
            "masks": mask.squeeze(-1),
            "next_observations": after,
        }

    def _rows(self, s: int, block: int, size: int) -> np.ndarray:
        """(steps, size) rows of one seed's table."""
        ends = np.cumsum(self.counts[s])
        if ends[-1] == 0:
            raise InputError("No rollout holds a finite step: the dynamics run away at once. Train them longer.")
        shares = philox(self._seeds[s], block, Stream.ROLLOUT_ROWS).random((STEPS_AT_ONCE, size))
        number = np.minimum((shares * ends[-1]).astype(np.int64), ends[-1] - 1)
        place = np.searchsorted(ends, number, side="right")
        return place * self.capacity + number - (ends - self.counts[s])[place]


class ModelBased:
    """A learner with its rollouts, as the loop drives one: batches through `mixed`, actors of epochs in its state.

    Args:
        learner: on `SACEnsemble`: with `actor`, `config`, `update`, `actor_state`, `state_dict`, `load_state_dict`.
        rollouts: empty.
    """

    def __init__(self, learner: Any, rollouts: Rollouts) -> None:
        self.learner, self.rollouts, self.config = learner, rollouts, learner.config
        self._actors: dict[int, dict[str, Tensor]] = {}  # epoch -> the actor at its start

    def mixed(self, recorded: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """step -> real_share of the recorded batch, the rest from rollouts; makes an epoch's rollouts at its start."""
        real = int(self.config.real_share * self.config.batch_size)

        def batch(step: int) -> Batch:
            self._prepare(step // self.config.updates_per_epoch)
            data = recorded(step)
            model = self.rollouts.batch(step, self.config.batch_size - real)
            return {key: torch.cat([data[key][:, :real], model[key]], 1) for key in model}  # type: ignore[return-value]

        return batch if real < self.config.batch_size else recorded

    def _prepare(self, epoch: int) -> None:
        if epoch in self.rollouts.epochs:
            return
        if epoch not in self._actors:
            self._actors[epoch] = {k: v.detach().clone() for k, v in self.learner.actor.state_dict().items()}
        self._actors = {e: a for e, a in self._actors.items() if e > epoch - self.config.epochs_kept}
        for number in sorted(self._actors):  # more than one after a resume
            if number not in self.rollouts.epochs:
                self.rollouts.fill(number, self._actors[number])

    def update(self, batch: Batch) -> dict[str, Tensor]:
        return self.learner.update(batch) | self.rollouts.metrics

    def actor_state(self, index: int) -> dict[str, Tensor]:
        return self.learner.actor_state(index)

    def state_dict(self) -> dict[str, Tensor]:
        kept = {f"rollouts.{e}.{name}": value for e, actor in self._actors.items() for name, value in actor.items()}
        return self.learner.state_dict() | kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._actors, device = {}, self.rollouts.table.device
        for key, value in state.items():
            if key.startswith("rollouts."):
                _, epoch, name = key.split(".", 2)
                self._actors.setdefault(int(epoch), {})[name] = value.to(device)
        self.learner.load_state_dict({k: v for k, v in state.items() if not k.startswith("rollouts.")})


def roll_out(
    learner: Any,
    model: Any,
    data: Any,
    contract: Any,
    reward: Mapping[str, Any],
    seeds: Sequence[int],
    device: str = "cpu",
) -> ModelBased:
    """The learner with rollouts from the data's transitions.

    Args:
        data: `TransitionData`.
        contract: of the policy, whose normaliser `data` went through; None: the data are in the model's units.
        reward: what `normalize_rewards` did.

    Raises:
        ConfigError: no model. InputError: the dynamics' observation keys are not the policy's, in order.
    """
    if model is None:
        raise ConfigError(f"{type(learner).__name__} learns on rollouts of a model: give --dynamics.")
    mean, std = units_of(model, data, contract)
    actions = data.actions.shape[1]
    return ModelBased(
        learner,
        Rollouts(
            model,
            learner.actor,
            data.observations,
            data.frame,
            mean,
            std,
            reward,
            learner.config,
            seeds,
            actions,
            device,
        ),
    )


def units_of(model: Any, data: Any, contract: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (D,) float32 between what the policy sees and the model's units; arguments as of `roll_out`.

    Raises:
        InputError: the dynamics' observation keys are not the policy's, in order.
    """
    known = getattr(model, "facts", {}).get("contract")
    if contract is not None and known is not None and list(known.observations) != list(contract.observations):
        raise InputError(
            f"The dynamics know {list(known.observations)}; this policy is to see {list(contract.observations)}.\n"
            "Give both the same --keys."
        )
    if contract is not None:
        return contract.statistics(0, "the policy")
    size = data.observations.shape[1]
    return np.zeros(size, np.float32), np.ones(size, np.float32)
