"""MOPO, stacked over seeds: soft actor-critic on rollouts whose reward is lowered by the dynamics' doubt.

Yu et al. 2020 ("MOPO: Model-based Offline Policy Optimization"), as OfflineRL-Kit runs it. Here to be compared with:
its penalty is a function of what the model does not know, and vanishes as the model becomes exact.
"""

import dataclasses

from embodied.policies.configure import Count, Nonnegative, Positive, Share
from embodied.policies.sac_ensemble import SACEnsemble


@dataclasses.dataclass(frozen=True)
class MOPOConfig:
    """Attributes:
    discount, target_update_rate: of the critics.
    members: critics; 2 is SAC's.
    diversity: of EDAC's term; MOPO has none.
    penalty_coefficient: lambda in r - lambda * u, u in the units that the dynamics predict in. The published values
        belong to dynamics trained without `standardize_targets`.
    penalty: u, see `dynamics.disagreement`: aleatoric or pairwise.
    rollout_length, rollouts, updates_per_epoch, epochs_kept, real_share: see `RAVLConfig`.
    actor_learning_rate, critic_learning_rate, temperature_learning_rate: of the Adams.
    cosine_actor: the actor's learning rate falls to 0 along a cosine.
    hidden_sizes: of actor and critics.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to its `quantile`. Applied to the penalised reward.
    """

    discount: Share = 0.99
    target_update_rate: Share = 0.005
    members: Count = 2
    diversity: Nonnegative = 0.0
    penalty_coefficient: Nonnegative = 1.0
    penalty: str = "aleatoric"
    rollout_length: Count = 5
    rollouts: Count = 50_000
    updates_per_epoch: Count = 1000
    epochs_kept: Count = 5
    real_share: Share = 0.05
    actor_learning_rate: Positive = 1e-4
    critic_learning_rate: Positive = 3e-4
    temperature_learning_rate: Positive = 1e-4
    cosine_actor: bool = True
    hidden_sizes: tuple[Count, ...] = (256, 256)
    batch_size: Count = 256
    observation_normalization: str = "none"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)


def _published(penalty_coefficient: float, rollout_length: int = 5) -> MOPOConfig:
    return MOPOConfig(penalty_coefficient=penalty_coefficient, rollout_length=rollout_length)


PRESETS: dict[str, MOPOConfig] = {
    # yihaosun1124/OfflineRL-Kit, "suggested hypers" in run_example/run_mopo.py. Networks start as EDAC's: ours.
    "halfcheetah-medium": _published(0.5),
    "halfcheetah-medium-replay": _published(0.5),
    "halfcheetah-medium-expert": _published(2.5),
    "hopper-medium": _published(5.0),
    "hopper-medium-replay": _published(2.5),
    "hopper-medium-expert": _published(5.0),
    "walker2d-medium": _published(0.5),
    "walker2d-medium-replay": _published(2.5, 1),
    "walker2d-medium-expert": _published(2.5, 1),
    # Ours: for two CPU cores and a reward learned from labels.
    "short": MOPOConfig(
        discount=0.98,
        rollouts=2000,
        updates_per_epoch=250,
        hidden_sizes=(128, 128),
        actor_learning_rate=3e-4,
        temperature_learning_rate=3e-4,
        observation_normalization="standard",
        reward_normalization="quantile",
    ),
}
DEFAULT_PRESET = "short"


class MOPO(SACEnsemble):
    """S learners, one per seed; see `SACEnsemble.update`. `policies/rollouts.py` mixes their batches."""

    needs_dynamics = True
