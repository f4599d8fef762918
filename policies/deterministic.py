"""A deterministic actor, and the initial weights of TD3 and its relatives."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embodied.policies.bundle import unstack
from embodied.policies.networks import StackedMLP


class DeterministicActor(nn.Module):
    """a = tanh(mlp(s)): observations (S, B, D) -> actions (S, B, A) in (-1, 1)."""

    def __init__(
        self, seeds: Sequence[torch.Generator], observation_size: int, action_size: int, hidden_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.action_size = action_size
        self.mlp = StackedMLP(seeds, (observation_size, *hidden_sizes, action_size))

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.mlp(observations))

    def deployed(self, index: int) -> dict[str, Tensor]:
        """One seed as the tensors of an `Actor`, which is what a bundle takes."""
        return unstack(self.state_dict(), index) | {"log_std": torch.zeros(1, 1, self.action_size)}


@torch.no_grad()
def uniform_(
    mlp: StackedMLP, seeds: Sequence[torch.Generator], bias: float | None = None, final: float | None = None
) -> None:
    """Weights and biases drawn from U(-k, k), k = 1 / sqrt(inputs), in place: `torch.nn.Linear`'s own start.

    Orthogonal layers of gain root 2 would open with saturated actions, where a policy gradient is 0.

    Args:
        seeds: one generator per seed; each draws its networks' numbers, layer by layer.
        bias: of all layers but the last, a constant instead (ReBRAC: 0.1).
        final: k of the last layer instead (ReBRAC: 1e-3 for the actor, 3e-3 for the critic).
    """
    members = mlp.layers[0].weight.shape[0] // len(seeds)
    for n, layer in enumerate(mlp.layers):
        last = n == len(mlp.layers) - 1
        bound = final if last and final is not None else 1.0 / math.sqrt(layer.weight.shape[1])
        for i, generator in enumerate(g for g in seeds for _ in range(members)):
            layer.weight[i].uniform_(-bound, bound, generator=generator)
            if bias is None or last:
                layer.bias[i].uniform_(-bound, bound, generator=generator)
            else:
                layer.bias[i].fill_(bias)
