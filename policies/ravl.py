"""RAVL, stacked over seeds: a policy learned on short rollouts of a dynamics model, with EDAC's pessimism about values.

Sims, Lu, Foerster, Teh 2024 ("The Edge-of-Reach Problem in Offline Model-Based Reinforcement Learning"). States that
rollouts reach only with their last step are bootstrapped from and never trained: their values are whatever the networks
say, and a policy is drawn to the highest. A better model does not help, since it is a matter of reach; the minimum over
a diverse ensemble does. No penalty on the model's doubt.
"""

import dataclasses

from embodied.policies.configure import Count, Nonnegative, Positive, Share
from embodied.policies.sac_ensemble import SACEnsemble


@dataclasses.dataclass(frozen=True)
class RAVLConfig:
    """Attributes:
    discount, target_update_rate: of the critics.
    members: N, critics whose minimum is taken in target and actor.
    diversity: eta, factor of the term that pushes the critics' slopes apart.
    rollout_length: k, steps of a rollout. The cut after k is no end: its last state is bootstrapped from.
    rollouts, updates_per_epoch: rollouts of the current policy from recorded states, before each so many updates.
    epochs_kept: rollouts of so many epochs are drawn from. Scale the three down together on a CPU.
    real_share: of each batch that is recorded.
    actor_learning_rate, critic_learning_rate, temperature_learning_rate: of the Adams.
    cosine_actor: the actor's learning rate falls to 0 along a cosine.
    hidden_sizes: of actor and critics.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to its `quantile`. The model's rewards are treated alike.
    """

    discount: Share = 0.99
    target_update_rate: Share = 0.005
    members: Count = 10
    diversity: Nonnegative = 1.0
    rollout_length: Count = 5
    rollouts: Count = 50_000
    updates_per_epoch: Count = 1000
    epochs_kept: Count = 5
    real_share: Share = 0.05
    actor_learning_rate: Positive = 3e-4
    critic_learning_rate: Positive = 3e-4
    temperature_learning_rate: Positive = 3e-4
    cosine_actor: bool = False
    hidden_sizes: tuple[Count, ...] = (256, 256, 256)
    batch_size: Count = 256
    observation_normalization: str = "none"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)


PRESETS: dict[str, RAVLConfig] = {
    # anyasims/edge-of-reach, train_ravl_agent.py and its README: defaults, and the example of this dataset.
    "halfcheetah-medium": RAVLConfig(),
    # Ours: the paper's table of each dataset could not be read. N and eta are EDAC's (CORL), k and real_share MOBILE's.
    "halfcheetah-medium-replay": RAVLConfig(),
    "halfcheetah-medium-expert": RAVLConfig(diversity=5.0, real_share=0.5),
    "hopper-medium": RAVLConfig(members=50),
    "hopper-medium-replay": RAVLConfig(members=50),
    "hopper-medium-expert": RAVLConfig(members=50),
    "walker2d-medium": RAVLConfig(),
    "walker2d-medium-replay": RAVLConfig(rollout_length=1),
    "walker2d-medium-expert": RAVLConfig(diversity=5.0, rollout_length=1),
    # Ours: for two CPU cores and a reward learned from labels.
    "short": RAVLConfig(
        discount=0.98,
        rollouts=2000,
        updates_per_epoch=250,
        hidden_sizes=(128, 128),
        observation_normalization="standard",
        reward_normalization="quantile",
    ),
}
DEFAULT_PRESET = "short"


class RAVL(SACEnsemble):
    """S learners, one per seed; see `SACEnsemble.update`. `policies/rollouts.py` mixes their batches."""

    needs_dynamics = True
