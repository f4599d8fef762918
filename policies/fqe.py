"""Fitted Q evaluation: what a policy would earn, judged from recorded transitions alone; many policies at once.

Le, Voloshin, Yue 2019 ("Batch Policy Learning under Constraints"), with a slowly moving target instead of refitting to
convergence, as in Voloshin et al. 2021 ("Empirical Study of Off-Policy Policy Evaluation"):

    Q(s, a) <- r + discount * mask * Q_target(s', pi(s')),     value of pi = mean over initial states of Q(s, pi(s))

Every policy gets `members` networks, each trained on the episodes of its own bootstrap resample; the spread of their
values is that of the estimate (Hao et al. 2021, "Bootstrapping Fitted Q-Evaluation"). Member m of every policy has the
same episodes, batches and initial weights, so that differences between policies carry less chance than values.

Where it fails: where the policy acts as nobody did in the data, Q is a guess of the network, and no interval says so.
`outside` is the share of steps at which that is so; beyond `MOST_OUTSIDE` an estimate is not to be trusted.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from embodied.contracts.errors import InputError, TrainingError
from embodied.policies.configure import Count, Positive, Share
from embodied.policies.loop import Adam, Progress, update_target
from embodied.policies.networks import StackedMLP, generators

CONFIDENCE = 0.95
MOST_OUTSIDE = 0.25
MOST_LEFT = 0.05  # discount ** (steps * target_update_rate): share of the way to the fixed point that is left to go
MOST_DRIFT = 0.05  # change over the last fifth of training, of the greatest value: beyond it values had not settled
REFERENCE_ROWS, QUERY_ROWS = 20_000, 1_000  # of the search for recorded actions like the policy's


@dataclasses.dataclass(frozen=True)
class FQEConfig:
    """Attributes:
    discount: of the value that is estimated.
    members: networks per policy, two at least.
    steps, batch_size, learning_rate, target_update_rate, hidden_sizes: of every network. Values see about
        steps * target_update_rate steps of the task ahead; that must be 3 / (1 - discount) or more.
    """

    discount: Share = 0.99
    members: Count = 5
    steps: Count = 20_000
    batch_size: Count = 128
    learning_rate: Positive = 3e-4
    target_update_rate: Share = 0.02
    hidden_sizes: tuple[Count, ...] = (128, 128)


PRESETS: dict[str, FQEConfig] = {
    "default": FQEConfig(),
    "quick": FQEConfig(steps=4000, target_update_rate=0.1, hidden_sizes=(64, 64)),
}
DEFAULT_PRESET = "default"


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Values of P policies by M members.

    Attributes:
        values: (P, M) discounted return from the initial states, in units of the reward.
        outside: (P,) share of steps at which the policy acts unlike anything recorded in such a place.
        drift: (P,) how much each value changed over the last fifth of training.
        left: share of the way to the fixed point that training had not gone, see `MOST_LEFT`.
        recorded: the recorded episodes' own mean discounted return: what the data's behaviour earned, as far as it
            was recorded.
    """

    values: np.ndarray
    outside: np.ndarray
    drift: np.ndarray
    left: float
    recorded: float

    def settled(self, policy: int) -> bool:
        """Had the value stopped moving, and the target network the time to bring rewards from far ahead?"""
        return self.left <= MOST_LEFT and bool(self.drift[policy] <= MOST_DRIFT * np.abs(self.values).max())

    def interval(self, policy: int) -> dict[str, float]:
        """Estimate with its 95 % interval: mean of the members, Student's t times their standard deviation (ddof 1).

        The deviation is that of one estimate from resampled episodes; it is not divided by the root of M.
        """
        return _interval(self.values[policy])

    def difference(self, first: int, second: int) -> dict[str, float]:
        """The same for value(first) - value(second), paired over the members."""
        return _interval(self.values[first] - self.values[second])

    def ranking(self) -> list[int]:
        """Policies by mean value, the greatest first."""
        return np.argsort(-self.values.mean(1), kind="stable").tolist()


def fitted_q_evaluation(
    data: Any,
    policy_actions: np.ndarray,
    config: FQEConfig,
    seed: int = 0,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Estimates:
    """Evaluate P policies on the transitions of `data`.

    Args:
        data: a `TransitionData`: observations (F, D) normalised, actions (F, A), frame, next_frame, reward, masks,
            episode (N,). The first transition of an episode starts at an initial state.
        policy_actions: (P, F, A) what each policy does at every frame.
        seed: of batches, resamples and weights.

    Raises:
        InputError: fewer than two members or episodes, or shapes that disagree. TrainingError: values that diverge.
    """
    data.check()
    actions = np.asarray(policy_actions, np.float32)
    if actions.ndim != 3 or actions.shape[1:] != data.actions.shape:
        raise InputError(
            f"The policies' actions are {actions.shape}; the data's {data.actions.shape} ask for (P, F, A)."
        )
    if config.members < 2 or data.episode is None:
        raise InputError("Fitted Q evaluation needs two members or more, and the episode of every transition.")
    episodes = np.unique(data.episode, return_inverse=True)[1]
    if episodes.max() < 1:
        raise InputError("Fitted Q evaluation resamples episodes for its interval: one episode is not enough.")
    returns = discounted_returns(data, config.discount)
    first = _first_rows(episodes)
    scale = float(np.abs(returns).max()) or 1.0  # the networks learn values of about 1
    low, high = _bounds(data, config.discount, scale)

    policies, members = len(actions), config.members
    samples = [_resample(seed, member, episodes) for member in range(members)]
    seeds = [seed * 1000 + member for _ in range(policies) for member in range(members)]
    sizes = (data.observations.shape[1] + actions.shape[2], *config.hidden_sizes, 1)
    critic = StackedMLP(generators(seeds), sizes).to(device)
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = Adam(critic, config.learning_rate)

    rng = np.random.Generator(np.random.Philox(key=[seed, 0xF0E]))
    observed, acted = (
        torch.from_numpy(np.asarray(a, np.float32)).to(device) for a in (data.observations, data.actions)
    )
    planned = torch.from_numpy(actions).to(device)  # (P, F, A)
    rewards = torch.from_numpy(np.asarray(data.reward, np.float32) / scale).to(device)
    masks = torch.from_numpy(np.asarray(data.masks, np.float32)).to(device)
    frames, next_frames = (torch.from_numpy(np.asarray(a, np.int64)).to(device) for a in (data.frame, data.next_frame))

    def stacked(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(M, B) frames and (P, M, B, A) actions -> network input (P * M, B, D + A)."""
        x = observed[rows].expand(policies, *rows.shape, -1)  # (P, M, B, D)
        return torch.cat([x, chosen.expand(policies, *rows.shape, -1)], -1).flatten(0, 1)

    starts = torch.from_numpy(np.asarray(data.frame[first], np.int64)).to(device).expand(members, -1)  # (M, E)
    counts = np.stack([_episode_counts(seed, member, len(first)) for member in range(members)])  # (M, E)

    @torch.no_grad()
    def values() -> np.ndarray:
        """(P, M) mean Q of the policies' actions in the initial states of each member's episodes."""
        q = critic(stacked(starts, planned[:, starts])).squeeze(-1).clamp(low, high).view(policies, members, -1)
        return scale * (q.cpu().double().numpy() * counts).sum(-1) / counts.sum(-1)

    before = values()
    for step in range(config.steps):
        drawn = np.stack([sample[rng.integers(0, len(sample), config.batch_size)] for sample in samples])
        index = torch.from_numpy(drawn).to(device)  # (M, B) transitions
        rows, next_rows = frames[index], next_frames[index]
        with torch.no_grad():
            follow = target(stacked(next_rows, planned[:, next_rows])).squeeze(-1)  # (P * M, B)
            reward, mask = (array[index].repeat(policies, 1) for array in (rewards, masks))
            y = (reward + config.discount * mask * follow).clamp(low, high)
        q = critic(stacked(rows, acted[rows])).squeeze(-1)
        optimizer.descend((q - y).square().mean(-1).sum())
        update_target(target, critic, config.target_update_rate)
        if step + 1 == config.steps * 4 // 5:
            before = values()
        if progress and ((step + 1) % 100 == 0 or step + 1 == config.steps):
            progress(step + 1, config.steps, "evaluating")
    after = values()
    if not np.isfinite(after).all():
        raise TrainingError("Fitted Q evaluation diverged: values are not finite. Lower its learning_rate.")
    drift = np.abs(after - before).mean(1)
    left = config.discount ** (config.steps * config.target_update_rate)
    return Estimates(after, share_outside(data, actions, seed), drift, left, float(returns[first].mean()))


def discounted_returns(data: Any, discount: float) -> np.ndarray:
    """(N,) discounted sum of the recorded rewards from each transition to its episode's end; no bootstrap."""
    result = np.zeros(len(data.reward))
    following = 0.0
    for row in range(len(result) - 1, -1, -1):
        last = row + 1 == len(result) or data.episode[row + 1] != data.episode[row]
        following = float(data.reward[row]) + (0.0 if last else discount * following)
        result[row] = following
    return result


def share_outside(data: Any, actions: np.ndarray, seed: int = 0) -> np.ndarray:
    """(P,) share of steps at which (s, pi(s)) is further from the data than recorded pairs are from each other.

    Half of the episodes are asked about, the other half is the reference. Further: more than twice the distance that
    99 % of the recorded pairs stay below. Actions weigh as much as observations, both in standard deviations.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5EE]))
    episodes = np.unique(data.episode, return_inverse=True)[1]
    asked = rng.permutation(int(episodes.max()) + 1)[: (int(episodes.max()) + 1) // 2]
    is_asked = np.isin(episodes, asked)
    reference, query = (
        rng.permutation(np.flatnonzero(rows))[:most]
        for rows, most in ((~is_asked, REFERENCE_ROWS), (is_asked, QUERY_ROWS))
    )
    recorded = np.asarray(data.actions[data.frame], np.float64)
    spread = np.maximum(recorded.std(0), 1e-3)
    states = np.asarray(data.observations[data.frame], np.float64)
    weight = float(np.sqrt(max(np.var(states, 0).sum(), 1e-6) / recorded.shape[1]))

    def joined(rows: np.ndarray, chosen: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([states[rows], weight * chosen / spread], 1)).float()

    known = joined(reference, recorded[reference])

    def nearest(points: torch.Tensor) -> np.ndarray:
        return torch.cdist(points, known, compute_mode="donot_use_mm_for_euclid_dist").amin(1).numpy()

    bound = 2 * np.quantile(nearest(joined(query, recorded[query])), 0.99)
    frames = data.frame[query]
    return np.array([np.mean(nearest(joined(query, plan[frames].astype(np.float64))) > bound) for plan in actions])


def store_actions(policies: list[Any], store: Any, block: int = 512, progress: Progress | None = None) -> np.ndarray:
    """(P, F, A) what policies from bundles do at every frame of an `EpisodeStore`, the pictures read block by block.

    Of a chunk the first action counts, as if the policy were asked at every step.

    Raises:
        InputError: the store lacks a key or camera that a policy takes, or a policy pursues goals.
    """
    if any(getattr(policy, "goal_spec", None) for policy in policies):
        raise InputError("One reward does not judge a policy that pursues goals. 'embodied eval' tries it: --goal.")
    keys = sorted({key for policy in policies for key in policy.observation_spec})
    cameras = sorted({camera for policy in policies for camera in policy.image_spec})
    for name, known in [(k, store.spec.observations) for k in keys] + [(c, store.spec.images) for c in cameras]:
        if name not in known:
            raise InputError(f"{store.path} has no '{name}', which a policy takes. It has: {', '.join(sorted(known))}.")
    values = {key: store.read(f"observation/{key}") for key in keys}
    episode_starts = set(np.asarray(store.episode_start).tolist())
    out = np.empty((len(policies), store.num_frames, int(np.prod(policies[0].action_spec.shape))), np.float32)
    for start in range(0, store.num_frames, block):
        stop = min(start + block, store.num_frames)
        seen: dict[str, np.ndarray] = {key: value[start:stop] for key, value in values.items()}
        seen |= {f"images/{camera}": np.asarray(store.frames(camera, start, stop)) for camera in cameras}
        for place, policy in enumerate(policies):
            if policy.contract.stack == 1:
                out[place, start:stop] = policy.act_batch(seen)
                continue
            for row in range(start, stop):  # its memory is filled step by step
                if row in episode_starts:
                    policy.reset()
                out[place, row] = policy.act({key: value[row - start] for key, value in seen.items()})[0]
        if progress:
            progress(stop, store.num_frames, "asking the policies")
    return out


def _bounds(data: Any, discount: float, scale: float) -> tuple[float, float]:
    """Between these every true value lies: the least and greatest reward for ever, or 0 after a termination."""
    horizon = 1.0 / max(1.0 - discount, 1e-4)
    return min(0.0, float(data.reward.min())) * horizon / scale, max(0.0, float(data.reward.max())) * horizon / scale


def _episode_counts(seed: int, member: int, episodes: int) -> np.ndarray:
    """(E,) how often each episode is in the member's resample."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xB007 + member]))
    return np.bincount(rng.integers(0, episodes, episodes), minlength=episodes)


def _resample(seed: int, member: int, episodes: np.ndarray) -> np.ndarray:
    """Rows of the transitions of the member's episodes, as often as they were drawn."""
    counts = _episode_counts(seed, member, int(episodes.max()) + 1)
    return np.repeat(np.arange(len(episodes)), counts[episodes])


def _first_rows(episodes: np.ndarray) -> np.ndarray:
    """Row of the first transition of each episode."""
    return np.unique(episodes, return_index=True)[1]


def _interval(values: np.ndarray) -> dict[str, float]:
    from scipy.stats import t

    half = float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1))
    mean = float(values.mean())
    return {"estimate": mean, "low": mean - half, "high": mean + half}


def select(estimates: Estimates, steps: Mapping[int, int]) -> dict[str, Any]:
    """The last, the best and their intervals, side by side: best alone is the greatest of many noisy numbers.

    Args:
        steps: policy -> training steps of its checkpoint; the last is the one with most, of equals the last given.
    """
    ranking = estimates.ranking()
    best = ranking[0]
    last = max(steps, key=lambda policy: (steps[policy], policy))
    gap = estimates.difference(best, last)
    agreeing = float((estimates.values.argmax(0) == best).mean())
    return {
        "ranking": ranking,
        "best": best,
        "last": last,
        "best_minus_last": gap,
        "resolved": best == last or gap["low"] > 0,
        "members_that_agree": agreeing,
        "mean_of_all": float(estimates.values.mean()),
    }
