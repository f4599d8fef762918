"""EDAC and SAC-N, stacked over seeds: soft actor-critic pessimistic by the minimum over N critics, kept diverse.

An, Moon, Kim, Song 2021 ("Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble"). Critics agree
where there is data; away from it their slopes are pushed apart, so that their minimum falls. With `diversity` 0 it is
SAC-N of the same paper.
"""

import dataclasses

from embodied.policies.configure import Count, Nonnegative, Positive, Share
from embodied.policies.sac_ensemble import SACEnsemble


@dataclasses.dataclass(frozen=True)
class EDACConfig:
    """Attributes:
    discount, target_update_rate: of the critics.
    members: N, critics whose minimum is taken.
    diversity: eta, factor of the term that pushes the critics' slopes apart.
    actor_learning_rate, critic_learning_rate, temperature_learning_rate: of the Adams.
    cosine_actor: the actor's learning rate falls to 0 along a cosine.
    hidden_sizes: of actor and critics.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to its `quantile`.
    """

    discount: Share = 0.99
    target_update_rate: Share = 0.005
    members: Count = 10
    diversity: Nonnegative = 1.0
    actor_learning_rate: Positive = 3e-4
    critic_learning_rate: Positive = 3e-4
    temperature_learning_rate: Positive = 3e-4
    cosine_actor: bool = False
    hidden_sizes: tuple[Count, ...] = (256, 256, 256)
    batch_size: Count = 256
    observation_normalization: str = "none"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)


PRESETS: dict[str, EDACConfig] = {
    # N and eta per dataset: CORL, configs of edac (halfcheetah, hopper, walker2d). Everything else is alike there.
    "halfcheetah-medium": EDACConfig(),
    "halfcheetah-medium-replay": EDACConfig(),
    "halfcheetah-medium-expert": EDACConfig(diversity=5.0),
    "hopper-medium": EDACConfig(members=50),
    "hopper-medium-replay": EDACConfig(members=50),
    "hopper-medium-expert": EDACConfig(members=50),
    "walker2d-medium": EDACConfig(),
    "walker2d-medium-replay": EDACConfig(),
    "walker2d-medium-expert": EDACConfig(diversity=5.0),
    # Ours: no source.
    "sac-n": EDACConfig(diversity=0.0),
    "learned-reward": EDACConfig(discount=0.98, observation_normalization="standard", reward_normalization="quantile"),
}
DEFAULT_PRESET = "learned-reward"


class EDAC(SACEnsemble):
    """S learners, one per seed; see `SACEnsemble.update`."""
