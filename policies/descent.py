"""Forward passes of ReLU networks, and steps of Adam from a loss's gradient by what they put out: most of an update.

On a CPU without autograd: parameters, gradients and Adam's moments are one vector each, gradients are written where the
optimiser reads them, and one operator moves everything. Elsewhere, and with dropout or layer norms, by autograd. Both
are the same update within rounding; benchmarks/iql_speed.py says what it is worth.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from embodied.policies.loop import Adam, update_target
from embodied.policies.networks import StackedMLP
from embodied.policies.relu_network import Networks

ALIGN = 16  # numbers; each parameter begins at a multiple of them in its vector, where a cache line does


class Descent:
    """One module and its optimiser.

    Args:
        module: whose parameters are moved: those of `mlp`, and perhaps a few of its own.
        mlp: its S * members ReLU networks.
        optimizer: of the module. Checkpoints hold the same tensors whichever way is gone.
        members: networks per entry of the input.
        by_hand: by default where it is possible.
    """

    def __init__(
        self, module: nn.Module, mlp: StackedMLP, optimizer: Adam, members: int = 1, by_hand: bool | None = None
    ) -> None:
        self._mlp, self._optimizer, self.members = mlp, optimizer, members
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._names, self._of_mlp = list(names.values()), [names[id(p)] for p in mlp.parameters_in_order()]
        self._out: Tensor | None = None
        self._networks: Networks | None = None
        self.vector: Tensor | None = None
        if possible(mlp) if by_hand is None else by_hand:
            self.vector, self._moments = one_vector(optimizer.parameters), [*map(one_vector, optimizer.moments)]
            gradients = [torch.zeros_like(p, requires_grad=False) for p in optimizer.parameters]
            self._gradient = one_vector(gradients)
            self._gradients = dict(zip(self._names, gradients, strict=True))
            into = [self._gradients[name] for name in self._of_mlp]
            self._networks = Networks(mlp.parameters_in_order(), mlp.num_active, into, members)

    def values(self, x: Tensor) -> Tensor:
        """(S, B, in) -> (S * members, B, out), nothing kept."""
        return _values(x, self._networks, self._mlp, self.members)

    def forward(self, x: Tensor, dropout: Sequence[Tensor] = ()) -> Tensor:
        """The same, to be followed by `step`. `dropout`: see `StackedMLP`."""
        if self._networks and not dropout:
            self._out = None
            return self._networks.forward(x, keep=True)
        with torch.enable_grad():
            out = self._mlp(x.repeat_interleave(self.members, 0), dropout)
        self._out = out
        return out.detach()

    def step(self, gradient: Tensor, others: Mapping[str, Tensor] | None = None) -> None:
        """One step of Adam.

        Args:
            gradient: of the loss by what the last `forward` gave.
            others: of the loss by the module's other parameters, by name.
        """
        if self._out is None:
            assert self._networks is not None
            self._networks.backward(gradient)
            for name, found in (others or {}).items():
                self._gradients[name].copy_(found)
            self._optimizer.step_of([self.vector], [self._gradient], *([moment] for moment in self._moments))
            return
        found = torch.autograd.grad(self._out, self._mlp.parameters_in_order(), gradient)
        by_name = {**dict(zip(self._of_mlp, found, strict=True)), **(others or {})}
        self._out = None
        self._optimizer.step([by_name[name] for name in self._names])


class Follower:
    """A target network of a descending one: forward passes, and steps towards it."""

    def __init__(self, target: nn.Module, mlp: StackedMLP, online: nn.Module, descent: Descent) -> None:
        self._target, self._mlp, self._online, self._descent = target, mlp, online, descent
        self._vector, self._networks = None, None
        if descent.vector is not None:
            self._vector = one_vector(list(target.parameters()))
            self._networks = Networks(mlp.parameters_in_order(), mlp.num_active, (), descent.members)

    def values(self, x: Tensor) -> Tensor:
        """As `Descent.values`."""
        return _values(x, self._networks, self._mlp, self._descent.members)

    def follow(self, rate: float) -> None:
        """target <- (1 - rate) target + rate online."""
        if self._vector is None or self._descent.vector is None:
            update_target(self._target, self._online, rate)
        else:
            self._vector.lerp_(self._descent.vector, rate)


def possible(mlp: StackedMLP) -> bool:
    """Whether these networks can be differentiated by hand: on a CPU, without layer norms."""
    return not mlp.norms and mlp.layers[0].weight.device.type == "cpu"


def one_vector(tensors: Sequence[Tensor]) -> Tensor:
    """A vector that the tensors, kept as they are, become parts of; zeros where nothing lies."""
    places = [0]
    for tensor in tensors:
        places.append(places[-1] + -(-tensor.numel() // ALIGN) * ALIGN)
    vector = tensors[0].new_zeros(places[-1], requires_grad=False)
    for tensor, place in zip(tensors, places[:-1], strict=True):
        part = vector[place : place + tensor.numel()].view(tensor.shape)
        part.copy_(tensor.detach())
        tensor.data = part
    return vector


def _values(x: Tensor, networks: Networks | None, mlp: StackedMLP, members: int) -> Tensor:
    if networks:
        return networks.forward(x)
    with torch.no_grad():
        return mlp(x.repeat_interleave(members, 0))
