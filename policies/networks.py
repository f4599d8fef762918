"""Networks. Dense layers carry a leading stack axis S (seeds x ensemble members), so that S networks are one batched
matrix product; the image encoder is not stacked. Depends on torch only: the robot imports this file."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied.policies import relu_network

LOG_STD_RANGE = (-5.0, 2.0)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed. A stack of k seeds draws exactly what k single networks would."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


class StackedLinear(nn.Module):
    """S independent dense layers: (S, B, in) -> (S, B, out), S = seeds * members, seed-major.

    Weights are (S, in, out), orthogonal with the given gain; biases are zero, as in the reference IQL.
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        in_size: int,
        out_size: int,
        members: int = 1,
        gain: float = math.sqrt(2),
    ) -> None:
        super().__init__()
        stack = len(seeds) * members
        self.weight = nn.Parameter(torch.empty(stack, in_size, out_size))
        self.bias = nn.Parameter(torch.zeros(stack, 1, out_size))
        with torch.no_grad():
            for i, generator in enumerate(g for g in seeds for _ in range(members)):
                nn.init.orthogonal_(self.weight[i], gain, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class StackedLayerNorm(nn.Module):
    """S independent layer norms over the last axis of (S, B, D)."""

    def __init__(self, stack: int, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(stack, 1, size))
        self.shift = nn.Parameter(torch.zeros(stack, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.scale + self.shift


class StackedMLP(nn.Module):
    """S independent ReLU networks: (S, B, sizes[0]) -> (S, B, sizes[-1]).

    Args:
        seeds: one generator per seed; each draws `members` networks, layer by layer.
        sizes: input, hidden and output sizes.
        members: networks per seed; entry s * members + e of the stack is member e of seed s.
        activate_final: ReLU after the last layer too.
        layer_norm: a layer norm after every activation.
        final_gain: gain of the last layer's initialisation.
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        sizes: Sequence[int],
        members: int = 1,
        activate_final: bool = False,
        layer_norm: bool = False,
        final_gain: float = math.sqrt(2),
    ) -> None:
        super().__init__()
        last = len(sizes) - 2
        layers = nn.ModuleList(
            StackedLinear(seeds, i, o, members, final_gain if n == last else math.sqrt(2))
            for n, (i, o) in enumerate(itertools.pairwise(sizes))
        )
        self.layers = cast("Sequence[StackedLinear]", layers)  # torch's ModuleList forgets what it holds
        self.num_active = len(self.layers) - (0 if activate_final else 1)
        self.norms = nn.ModuleList(
            StackedLayerNorm(len(seeds) * members, size) for size in sizes[1 : 1 + self.num_active] if layer_norm
        )

    def forward(self, x: Tensor, dropout: Sequence[Tensor] = ()) -> Tensor:
        """`dropout`: what the outputs of the layers with a ReLU are multiplied by, (S, B, size) each; see `Dropout`."""
        if not self.norms and not dropout:
            return relu_network.apply(x, self.parameters_in_order(), self.num_active)
        for n, layer in enumerate(self.layers):
            x = layer(x)
            if n < self.num_active:
                x = F.relu(x)
                x = self.norms[n](x) if self.norms else x
                x = x * dropout[n] if dropout else x
        return x

    def parameters_in_order(self) -> list[Tensor]:
        """Weight and bias of each layer in turn."""
        return [parameter for layer in self.layers for parameter in (layer.weight, layer.bias)]


class Value(nn.Module):
    """S state values: observations (S, B, D) -> (S, B)."""

    def __init__(self, seeds: Sequence[torch.Generator], observation_size: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.mlp = StackedMLP(seeds, (observation_size, *hidden_sizes, 1))

    def forward(self, observations: Tensor) -> Tensor:
        return self.mlp(observations).squeeze(-1)


class Critic(nn.Module):
    """E action values per seed: observations (S, B, D), actions (S, B, A) -> (S, E, B)."""

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        members: int = 2,
    ) -> None:
        super().__init__()
        self.members = members
        self.mlp = StackedMLP(seeds, (observation_size + action_size, *hidden_sizes, 1), members)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], -1)  # (S, B, D + A)
        x = x.repeat_interleave(self.members, 0)  # (S * E, B, D + A)
        return self.mlp(x).view(observations.shape[0], self.members, -1)


class Actor(nn.Module):
    """Un-squashed diagonal Gaussian with tanh on its mean and a state-independent log standard deviation.

    Observations (S, B, D) -> mean (S, B, A) in (-1, 1), log_std (S, 1, A). Deployed with the mean.
    """

    def __init__(
        self, seeds: Sequence[torch.Generator], observation_size: int, action_size: int, hidden_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.mlp = StackedMLP(seeds, (observation_size, *hidden_sizes, action_size))
        self.log_std = nn.Parameter(torch.zeros(len(seeds), 1, action_size))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.mlp(observations)), self.log_std.clamp(*LOG_STD_RANGE)


class MultilinearValue(nn.Module):
    """ICVF's heads over features: V_j(s, g, z) = <A_j(t * phi_j(s)), B_j(t * psi_j(g))>, t = T_j(psi_j(z)), j < J.

    psi encodes both goal and intent; A and B have biases (Ghosh et al. 2023, `icvf_networks.py`). T has one layer more
    than the release's: `hidden_sizes` and then d. No seeds are stacked: the stack axis of the layers is J, the ensemble
    of heads over one shared encoder.
    """

    def __init__(
        self,
        generator: torch.Generator,
        feature_size: int,
        hidden_sizes: Sequence[int],
        heads: int = 2,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.feature_size = feature_size
        size = hidden_sizes[-1]
        dense = {"members": heads, "activate_final": True, "layer_norm": layer_norm}
        self.phi = StackedMLP([generator], (feature_size, *hidden_sizes), **dense)
        self.psi = StackedMLP([generator], (feature_size, *hidden_sizes), **dense)
        self.transition = StackedMLP([generator], (size, *hidden_sizes, size), **dense)
        self.matrix_a = StackedLinear([generator], size, size, heads, gain=1.0)
        self.matrix_b = StackedLinear([generator], size, size, heads, gain=1.0)

    def state(self, features: Tensor) -> Tensor:
        """phi: features (B, D) -> (J, B, d)."""
        return self.phi(features.expand(self.heads, *features.shape))

    def outcome(self, features: Tensor) -> Tensor:
        """psi, of goals and of intents: features (B, D) -> (J, B, d)."""
        return self.psi(features.expand(self.heads, *features.shape))

    def combine(self, state: Tensor, goal: Tensor, transition: Tensor) -> Tensor:
        """phi(s), psi(g), t = T(psi(z)), each (J, B, d) -> V (J, B)."""
        return (self.matrix_a(transition * state) * self.matrix_b(transition * goal)).sum(-1)

    def forward(self, state: Tensor, goal: Tensor, intent: Tensor) -> Tensor:
        """Features (B, D) each -> V (J, B)."""
        return self.combine(self.state(state), self.outcome(goal), self.transition(self.outcome(intent)))


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of the image encoder.

    Attributes:
        image_size: height and width [pixels]; multiples of 16.
        channels: of the patch layer (4 x 4 pixels, stride 4) and of the 4 x 4 stride-2 layers after it.
        embedding_size: D of the embedding.
    """

    image_size: tuple[int, int] = (64, 64)
    channels: tuple[int, ...] = (16, 32, 64)
    embedding_size: int = 256


class ImageEncoder(nn.Module):
    """Images (B, H, W, 3) uint8 -> embeddings (B, D).

    Pixels are divided by 255 and nothing else: no ImageNet statistics. The last feature map is flattened, not pooled,
    so the embedding knows where things are. The first layer cuts 4 x 4 patches: with four overlapping stride-2 layers
    an ICVF update took 4 times as long on one CPU core, and this encoder is the cost of pre-training.
    """

    def __init__(self, config: EncoderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Conv2d(3, config.channels[0], 4, stride=4)
        convs = nn.ModuleList(nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in itertools.pairwise(config.channels))
        self.convs = cast("Sequence[nn.Conv2d]", convs)
        height, width = (size // 4 // 2 ** len(self.convs) for size in config.image_size)
        self.project = nn.Linear(config.channels[-1] * height * width, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size)
        if generator is not None:
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif not name.startswith("norm"):
                    nn.init.orthogonal_(parameter, math.sqrt(2), generator=generator)
        self.to(memory_format=torch.channels_last)  # a permuted (B, H, W, 3) array already is

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self.project.weight.dtype)  # (B, 3, H, W)
        x = F.relu(F.conv2d(x, self.patch.weight / 255.0, self.patch.bias, stride=4))  # not every pixel: the weights
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.norm(self.project(x.flatten(1)))


def clip_actions(actions: Tensor) -> Tensor:
    """Dataset actions to +-(1 - 1e-5), as the reference IQL does."""
    return actions.clamp(-1 + 1e-5, 1 - 1e-5)
