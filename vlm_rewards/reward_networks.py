"""Networks that give a frame a reward, an ensemble of them as one: every weight carries a leading member axis."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError

SCALES = {"mlp": "tanh: (-1, 1)", "cnn": "tanh: (-1, 1)", "resnet18": "unbounded"}
_KERNELS, _CHANNELS, _STRIDES = (5, 3, 3, 3), (16, 32, 64, 128), (3, 2, 2, 2)


def frame_network(kind: str, shape: Sequence[int], hidden_sizes: Sequence[int] = (256, 256)) -> nn.Module:
    """One member: a batch (B, *shape) -> (B,).

    Args:
        kind: `mlp` for vectors (D,); `cnn` and `resnet18` for pictures (H, W, 3) uint8.

    `cnn` is RL-VLM-F's: four convolutions without padding, a linear layer, tanh, last weights within 1e-3. `resnet18`
    is torchvision's with group norms: with batch norms a frame's reward could depend on the frames beside it.

    Raises:
        ConfigError: an unknown kind, or one that does not take this shape.
        InputError: pictures too small for the convolutions.
    """
    if kind not in SCALES:
        raise ConfigError(f"Reward network '{kind}' is unknown. Valid: {', '.join(SCALES)}.")
    if (kind == "mlp") != (len(shape) == 1):
        wants = "vectors (D,)" if kind == "mlp" else "pictures (H, W, 3)"
        raise ConfigError(f"Reward network '{kind}' takes {wants}; it was given {tuple(shape)}.")
    if kind == "mlp":
        sizes = (int(shape[0]), *hidden_sizes)
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        return nn.Sequential(*layers, _last(sizes[-1]), nn.Tanh(), nn.Flatten(0))
    if kind == "resnet18":
        try:
            from torchvision.models import resnet18
        except ImportError as error:
            raise MissingExtraError("torchvision", "clip", "the resnet18 reward network") from error
        return nn.Sequential(
            _Pixels(), resnet18(num_classes=1, norm_layer=functools.partial(nn.GroupNorm, 32)), nn.Flatten(0)
        )
    side = np.array(shape[:2])
    convolutions: list[nn.Module] = []
    for channels_in, channels, kernel, stride in zip((3, *_CHANNELS), _CHANNELS, _KERNELS, _STRIDES, strict=False):
        side = (side - kernel) // stride + 1
        convolutions += [nn.Conv2d(channels_in, channels, kernel, stride), nn.ReLU()]
    if side.min() < 1:
        raise InputError(f"Pictures of {shape[0]} x {shape[1]} are too small for the reward network 'cnn'; use 'mlp'.")
    size = int(side.prod()) * _CHANNELS[-1]
    return nn.Sequential(_Pixels(), *convolutions, nn.Flatten(), _last(size), nn.Tanh(), nn.Flatten(0))


class _Pixels(nn.Module):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-0.5, 0.5]."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.permute(0, 3, 1, 2).float() / 255 - 0.5


def _last(size: int) -> nn.Linear:
    layer = nn.Linear(size, 1)
    nn.init.uniform_(layer.weight, -1e-3, 1e-3)
    nn.init.uniform_(layer.bias, -1e-3, 1e-3)
    return layer


class Rows(Protocol):
    """Where frames come from, by row of the store: an array of vectors or pictures, or a store's camera."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Ensemble:
    """M members of one kind. Parameters are {name: (M, ...)}; element-wise optimisers keep members independent."""

    def __init__(self, kind: str, shape: Sequence[int], hidden_sizes: Sequence[int], seeds: Sequence[int]) -> None:
        self.kind, self.shape, self.hidden_sizes, self.seeds = kind, tuple(shape), tuple(hidden_sizes), tuple(seeds)
        members = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                members.append(frame_network(kind, shape, hidden_sizes))
        stacked, _ = torch.func.stack_module_state(members)
        self.parameters = {name: value.detach().requires_grad_() for name, value in stacked.items()}
        self._network = members[0].to("meta")

    def rewards(self, inputs: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """(M, B, *shape) -> (M, B): member m sees inputs[m]."""

        def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self._network, weights, (x,))

        return torch.func.vmap(one)(self.parameters if parameters is None else parameters, inputs)

    def __len__(self) -> int:
        return len(self.seeds)
