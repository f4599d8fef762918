"""Rollouts of a behaviour model over whole episodes of a model, the choice among them, and batches of what was kept.

A rollout begins where a recorded episode began and goes on for `horizon` steps or to a termination. The cut at the
horizon is no end, and nothing is bootstrapped there: a return is what was paid within the horizon, in rollouts and in
recorded episodes alike. What is kept is a function of the seed and the behaviour model's weights; checkpoints hold
those, and a resumed run makes the same rollouts again.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets.draws import Stream, philox
from embodied.policies.rollouts import STEPS_AT_ONCE, Model, units_of

SELECTIONS = ("above_data", "top_share", "final", "recorded")


def reward_to_go(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n, H) rewards of n episodes, of which the first `lengths` (n,) steps happened -> (n, H) float64 sums of the
    rewards from each step on: the undiscounted return to go of MBRCSL, 0 after the end."""
    happened = np.arange(rewards.shape[1]) < lengths[:, None]
    paid = np.where(happened, rewards.astype(np.float64), 0.0)
    return paid[:, ::-1].cumsum(1)[:, ::-1]


@dataclasses.dataclass(frozen=True)
class Episodes:
    """n episodes of up to H steps. What lies beyond an episode's length means nothing.

    Attributes:
        rows: (n, H, D + A) float32: observation as the policy sees it, action.
        rewards: (n, H) float32 in their own units.
        lengths: (n,) int64 steps that happened.
        finite: (n,) bool; a model may run away.
    """

    rows: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    finite: np.ndarray

    def returns(self) -> np.ndarray:
        """(n,) float64 undiscounted."""
        return reward_to_go(self.rewards, self.lengths)[:, 0]

    def keep(self, chosen: np.ndarray) -> "Episodes":
        return Episodes(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def table(self) -> np.ndarray:
        """(N, D + A + 1) float32: one row per step that happened, observation, action, return to go."""
        togo = reward_to_go(self.rewards, self.lengths)
        happened = np.arange(self.rewards.shape[1]) < self.lengths[:, None]
        return np.concatenate([self.rows, togo[..., None].astype(np.float32)], -1)[happened]


def join(parts: Sequence[Episodes]) -> Episodes:
    fields = [field.name for field in dataclasses.fields(Episodes)]
    return Episodes(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def recorded_episodes(data: Any, horizon: int = 0) -> Episodes:
    """The episodes of `TransitionData`, their first `horizon` steps (0: all); InputError where it names no episodes.

    A terminated and a truncated episode are alike here: both were paid what they were paid.
    """
    if data.episode is None:
        raise InputError("MBRCSL compares whole episodes; these transitions do not say which episode they are of.")
    order = np.lexsort((data.frame, data.episode))
    number = np.unique(data.episode[order], return_inverse=True)[1]
    counts = np.bincount(number)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    longest = int(counts.max())
    horizon = min(horizon, longest) if horizon else longest
    within = place < horizon
    number, place, order = number[within], place[within], order[within]
    frame = data.frame[order]
    values = np.concatenate([data.observations[frame], np.clip(data.actions[frame], -1.0, 1.0)], 1)
    rows = np.zeros((len(counts), horizon, values.shape[1]), np.float32)
    rewards = np.zeros((len(counts), horizon), np.float32)
    rows[number, place], rewards[number, place] = values, data.reward[order]
    return Episodes(rows, rewards, np.minimum(counts, horizon), np.ones(len(counts), bool))


def accepted(episodes: Episodes, config: Any, threshold: float) -> np.ndarray:
    """(n,) bool: what the rule `config.selection` says of each rollout alone.

    Args:
        threshold: what `above_data` has to exceed. `top_share` accepts here whatever is finite, and ranks later.
    """
    if config.selection == "above_data":
        return episodes.finite & (episodes.returns() > threshold)
    if config.selection == "final":
        low, high, top = config.final_rewards
        count = np.minimum(config.final_steps, episodes.lengths)
        place = np.arange(episodes.rewards.shape[1])
        last = (place < episodes.lengths[:, None]) & (place >= (episodes.lengths - count)[:, None])
        least = np.where(last, episodes.rewards, np.inf).min(1)
        most = np.where(last, episodes.rewards, -np.inf).max(1)
        return episodes.finite & (least > low) & (high < most) & (most < top)
    return episodes.finite.copy()


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a seed learns from: (N, D + A + 1) float32 rows, the returns (n,) of its episodes, rollouts made and those
    that the rule accepted."""

    table: np.ndarray
    returns: np.ndarray
    made: int
    accepted: int


class Imagination:
    """Makes the rollouts of one seed and chooses among them.

    Args:
        model: see `Model`.
        starts: (N, D) observations that episodes began with, as the policy sees them.
        mean, std: (D,) of that normalisation: the model works in units.
        threshold: see `accepted`.
        bounds: of the rewards, or None.
        horizon: H.
    """

    def __init__(
        self,
        model: Model,
        starts: np.ndarray,
        mean: np.ndarray,
        std: np.ndarray,
        config: Any,
        threshold: float,
        bounds: tuple[float, float] | None,
        horizon: int,
        device: str = "cpu",
    ) -> None:
        self._model, self._config, self._threshold, self._bounds = model, config, threshold, bounds
        self._horizon, self._device = horizon, device
        self._starts = torch.as_tensor(starts, device=device)
        self._mean, self._std = (torch.as_tensor(x, device=device) for x in (mean, std))

    @torch.no_grad()
    def roll_out(self, actor: Any, seed: int, round_: int, count: int) -> Episodes:
        """`count` rollouts of an actor that is a stack of one, a function of (seed, round) and its weights."""
        rng = philox(seed, round_, Stream.ROLLOUTS)
        rows = torch.from_numpy(rng.integers(len(self._starts), size=count)).to(self._device)
        seen, noises = self._starts[rows], getattr(actor, "noise_size", actor.size)
        state = seen * self._std + self._mean
        alive = torch.ones(count, dtype=torch.bool, device=self._device)
        finite, lengths = alive.clone(), torch.zeros(count, dtype=torch.int64, device=self._device)
        width = seen.shape[1] + actor.size
        table = torch.zeros((count, self._horizon, width), device=self._device)
        rewards = torch.zeros((count, self._horizon), device=self._device)
        for step in range(self._horizon):
            noise = torch.from_numpy(rng.standard_normal((1, count, noises), np.float32)).to(self._device)
            action = actor.generate(seen[None], noise)[0].clamp(-1.0, 1.0)
            state, reward, ended, _ = self._model.step(state, action, rng)
            after = (state - self._mean) / self._std
            sound = torch.isfinite(after).all(-1) & torch.isfinite(reward)
            finite &= sound | ~alive
            alive &= sound
            if self._bounds is not None:
                reward = reward.clamp(*self._bounds)
            table[:, step] = torch.cat([seen, action], -1)
            rewards[:, step] = torch.where(alive, reward, 0.0)
            lengths += alive
            alive = alive & ~ended
            if not bool(alive.any()):
                break
            seen = torch.where(sound.unsqueeze(-1), after, seen)
            state = torch.where(sound.unsqueeze(-1), state, seen * self._std + self._mean)
        return Episodes(*(x.cpu().numpy() for x in (table, rewards, lengths, finite)))

    def choose(self, actor: Any, seed: int) -> Kept:
        """Rounds of rollouts until enough are kept, or `max_rollouts` were made. Never holds more than a round and
        what is kept of it.

        Raises:
            InputError: the rule accepts none.
        """
        config, pool, made, passed, best = self._config, [], 0, 0, -np.inf
        ranked = config.selection == "top_share"
        limit = config.max_rollouts
        if ranked:  # so many that the wanted number is the wanted share of them
            limit = min(limit, int(np.ceil(config.keep / max(config.top_share, 1e-9))))
        round_ = 0
        while made < limit and (ranked or passed < config.keep):
            fresh = self.roll_out(actor, seed, round_, min(config.rollouts_at_once, limit - made))
            made, round_ = made + len(fresh.lengths), round_ + 1
            fine = accepted(fresh, config, self._threshold)
            if fresh.finite.any():
                best = max(best, float(fresh.returns()[fresh.finite].max()))
            passed += int(fine.sum())
            pool = [*pool, fresh.keep(fine)]
            if ranked:
                whole = join(pool)
                pool = [whole.keep(np.sort(np.argsort(-whole.returns(), kind="stable")[: config.keep]))]
        kept = join(pool)
        if ranked:
            passed = min(int(np.ceil(config.top_share * made)), len(kept.lengths))
            kept = kept.keep(np.sort(np.argsort(-kept.returns(), kind="stable")[:passed]))
        else:
            kept = kept.keep(np.arange(min(config.keep, len(kept.lengths))))
        if not len(kept.lengths):
            raise InputError(self._none(seed, made, best))
        return Kept(kept.table(), kept.returns(), made, passed)

    def _none(self, seed: int, made: int, best: float) -> str:
        ask = f"return more than {self._threshold:.4g}, which recorded episodes do"
        ask = ask if self._config.selection == "above_data" else f"meet the rule '{self._config.selection}'"
        return (
            f"Seed {seed}: none of {made} rollouts {ask}; the best returns {best:.4g}.\n"
            "Lower data_quantile, choose selection top_share, raise max_rollouts, or train both models longer."
        )


class Stitching:
    """An `MBRCSL` with its rollouts, as the loop drives one: recorded batches in its first phase, kept rows after it.

    Args:
        learner: an `MBRCSL`.
        choose: number of a seed -> what it learns from.
        data_return: the best recorded return, for the metrics.
    """

    def __init__(
        self, learner: Any, choose: Callable[[int], Kept], data_return: float, seeds: Sequence[int], device: str
    ) -> None:
        self.learner, self.config = learner, learner.config
        self._choose, self._data_return, self._seeds, self._device = choose, data_return, list(seeds), device
        self._tables: list[Tensor] = []
        self._drawn: tuple[Any, Tensor] | None = None
        self.metrics: dict[str, Tensor] = {}

    def mixed(self, recorded: Callable[[int], Batch]) -> Callable[[int], Any]:
        """step -> the recorded batch; from the second phase on, rows of kept rollouts, made at its beginning."""

        def batch(step: int) -> Any:
            if step < self.learner.behaviour_steps:
                return recorded(step)
            if not self._tables:
                self._imagine()
            return self.batch(step)

        return batch

    def _imagine(self) -> None:
        kept = [self._choose(index) for index in range(len(self._seeds))]
        self._tables = [torch.as_tensor(one.table, device=self._device) for one in kept]
        target = [float(np.quantile(one.returns, self.config.target_quantile)) for one in kept]
        actor, self.learner.target_return = self.learner.actor, torch.tensor(target, dtype=torch.float64)
        for s, table in enumerate(self._tables):
            togo = table[:, -1].double()
            actor.wanted_mean[s], actor.wanted_std[s] = togo.mean(), max(float(togo.std(correction=0)), 1e-6)
        figures = {
            "accepted_share": [one.accepted / max(one.made, 1) for one in kept],
            "rollouts": [one.made for one in kept],
            "kept": [len(one.returns) for one in kept],
            "target_return": target,
            "data_return": [self._data_return] * len(kept),
        }
        self.metrics = {name: torch.tensor(values, device=self._device) for name, values in figures.items()}
        self.metrics = {name: value.float() for name, value in self.metrics.items()}

    def batch(self, step: int) -> dict[str, Tensor]:
        """(S, B, ...) observations, actions and returns to go, rows drawn uniformly: a function of (seed, step)."""
        block, place = divmod(step, STEPS_AT_ONCE)
        size, d = (STEPS_AT_ONCE, self.config.batch_size), self._tables[0].shape[1] - 1 - self.learner.actor_size
        if self._drawn is None or self._drawn[0] != block:
            draws = zip(self._seeds, self._tables, strict=True)
            rows = [philox(seed, block, Stream.ROLLOUT_ROWS).integers(len(t), size=size) for seed, t in draws]
            self._drawn = block, torch.from_numpy(np.stack(rows, 1)).to(self._device)  # (steps, S, B)
        found = torch.stack([table[rows] for table, rows in zip(self._tables, self._drawn[1][place], strict=True)])
        now, action, togo = found.split([d, self.learner.actor_size, 1], -1)
        return {"observations": now, "actions": action, "returns": togo.squeeze(-1)}

    def update(self, batch: Any) -> dict[str, Tensor]:
        return self.learner.update(batch) | self.metrics

    def actor_state(self, index: int) -> dict[str, Tensor]:
        return self.learner.actor_state(index)

    def actor_kind(self, index: int) -> dict[str, object]:
        return self.learner.actor_kind(index)

    def state_dict(self) -> dict[str, Tensor]:
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._tables, self._drawn = [], None
        self.learner.load_state_dict(state)


def stitch(
    learner: Any,
    model: Any,
    data: Any,
    contract: Any,
    reward: Mapping[str, Any],
    seeds: Sequence[int],
    device: str = "cpu",
) -> Stitching:
    """The learner with rollouts that begin where the data's episodes began; arguments and errors as of `roll_out`."""
    del reward  # returns stay in the reward's own units
    config = learner.config
    recorded = recorded_episodes(data, config.horizon)
    returns = recorded.returns()
    paid = data.reward.astype(np.float64)
    learner.actor.reward_mean.fill_(paid.mean())
    learner.actor.reward_std.fill_(max(paid.std(), 1e-6))
    if config.selection == "recorded":
        whole = Kept(recorded.table(), returns, 0, 0)
        return Stitching(learner, lambda index: whole, float(returns.max()), seeds, device)
    if model is None:
        raise ConfigError("MBRCSL learns on rollouts of a model: give --dynamics.")
    mean, std = units_of(model, data, contract)
    imagination = Imagination(
        model,
        recorded.rows[:, 0, : data.observations.shape[1]],
        mean,
        std,
        config,
        float(np.quantile(returns, config.data_quantile)),
        (float(data.reward.min()), float(data.reward.max())) if config.clip_rewards else None,
        recorded.rewards.shape[1],  # with more steps than any episode had, a rollout would return more for that alone
        device,
    )

    def choose(index: int) -> Kept:
        return imagination.choose(one_of(learner.behaviour.actor, index), int(seeds[index]))

    return Stitching(learner, choose, float(returns.max()), seeds, device)


def one_of(actor: Any, index: int) -> Any:
    """The actor of one seed, a stack of one, without gradients."""
    single = copy.deepcopy(actor).requires_grad_(False)
    for parameter in single.parameters():
        parameter.data = parameter.data[index : index + 1].clone()
    return single
