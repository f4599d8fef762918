"""N critics of S seeds with their gradients written by hand: nothing is differentiated that is thrown away.

A critic is a ReLU network, so its slope in the action is a product of weights and of masks that do not change. Of
EDAC's diversity term (An et al. 2021, equation 5) that gives the gradient in closed form, without differentiating a
gradient: the term's derivative in each weight is a forward pass of a tangent times the backward pass already made, and
adds to the squared error's in one product. benchmarks/edac_speed.py compares; tests hold it against autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied.policies.networks import StackedMLP

NORM_FLOOR = 1e-10  # added to the length of a slope, as in EDAC's code
_relu_backward = torch.ops.aten.threshold_backward


class CriticEnsemble(nn.Module):
    """Q_i(s, a), i < N: observations (S, B, D), actions (S, B, A) -> (S, N, B).

    Weights start uniform in +-1 / sqrt(inputs), biases at 0.1, the last layer uniform in +-3e-3 (EDAC).
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        members: int,
    ) -> None:
        super().__init__()
        self.seeds, self.members, self.action_size = len(seeds), members, action_size
        self.mlp = StackedMLP(seeds, (observation_size + action_size, *hidden_sizes, 1), members)
        start_uniformly(self.mlp, seeds, members, 3e-3)

    @torch.no_grad()
    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = self._inputs(observations, actions)
        return torch.cat([self._activations(x, part)[-1] for part in self._parts()]).view(self.seeds, self.members, -1)

    @torch.no_grad()
    def least(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The minimum over all N, its slope in the action, and the spread of the N, for the actor's loss.

        Only the critic that is the minimum of a row is differentiated there, and only in the action.

        Returns:
            q (S, B); dq / da (S, B, A); standard deviation over the critics (S, B).
        """
        x = self._inputs(observations, actions)
        q = self(observations, actions)
        least = q.min(1)
        slope = self._slopes_by_member(x, least.indices) if x.device.type == "cpu" else self._slopes(x, least.indices)
        return least.values, slope, q.std(1) if self.members > 1 else torch.zeros_like(least.values)

    @torch.no_grad()
    def loss_gradients(
        self, observations: Tensor, actions: Tensor, target: Tensor, diversity: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """EDAC's critic loss and its gradient.

        sum_i mean_b (Q_i - y)^2 + diversity * mean_b sum_{i != j} <u_i, u_j> / (N - 1), u_i the direction of dQ_i / da.

        Args:
            target: y, (S, B).

        Returns:
            squared error (S,), mean over critics; diversity term without its factor (S,), 0 where it is not asked for;
            mean Q (S,); gradients of the sum over seeds in the order of `parameters()`.
        """
        x = self._inputs(observations, actions)
        weights = [layer.weight for layer in self.mlp.layers]
        signals: list[tuple[list[Tensor], list[Tensor]]] = []  # per part: activations, slopes of Q before each ReLU
        slopes = []
        diverse = diversity > 0.0 and self.members > 1
        for part in self._parts():
            h = self._activations(x, part)
            e = _relu_backward(weights[-1][part].transpose(1, 2).expand_as(h[-2]), h[-2], 0)
            signal = [e]
            for layer in range(len(weights) - 2, 0, -1):
                e = _relu_backward(torch.bmm(e, weights[layer][part].transpose(1, 2)), h[layer], 0)
                signal.insert(0, e)
            signals.append((h, signal))
            if diverse:
                slopes.append(torch.bmm(e, weights[0][part][:, -self.action_size :].transpose(1, 2)))
        q = torch.cat([h[-1] for h, _ in signals]).view(self.seeds, self.members, -1)
        error = q - target.unsqueeze(1)
        d_q = (2.0 / error.shape[-1] * error).flatten(0, 1).unsqueeze(-1)  # (S * N, B, 1)
        term, tangent = torch.zeros_like(q[:, 0, 0]), None
        if diverse:
            term, d_slope = diversity_gradient(torch.cat(slopes).unflatten(0, (self.seeds, self.members)))
            tangent = diversity * d_slope.flatten(0, 1)
        grown: list[list[Tensor]] = [[] for _ in range(2 * len(weights))]
        for part, (h, signal) in zip(self._parts(), signals, strict=True):
            t = None if tangent is None else F.pad(tangent[part], (x.shape[-1] - self.action_size, 0))
            for layer, weight in enumerate(weights):
                left = d_q[part] * h[layer] if t is None else torch.addcmul(t, d_q[part], h[layer])  # (., B, in)
                if layer < len(signal):
                    e = signal[layer]
                    grown[2 * layer].append(torch.bmm(left.transpose(1, 2), e))
                    grown[2 * layer + 1].append(torch.bmm(d_q[part].transpose(1, 2), e))
                    if t is not None:
                        t = _relu_backward(torch.bmm(t, weight[part]), h[layer + 1], 0)
                else:
                    grown[2 * layer].append(left.sum(1).unsqueeze(-1))
                    grown[2 * layer + 1].append(d_q[part].sum(1, keepdim=True))
        return error.square().mean((1, 2)), term, q.mean((1, 2)), [torch.cat(pieces) for pieces in grown]

    def _inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.cat([observations, actions], -1)  # (S, B, D + A)

    def _parts(self) -> list[slice]:
        """Entries of the stack that are computed together: all on a GPU, one on a CPU, where it stays cached."""
        count = self.seeds * self.members
        size = 1 if self.mlp.layers[0].weight.device.type == "cpu" else count
        return [slice(i, i + size) for i in range(0, count, size)]

    def _activations(self, x: Tensor, part: slice) -> list[Tensor]:
        """What each layer takes, then Q (., B, 1): a part of the stack."""
        first, count = part.start // self.members, part.stop - part.start
        h = x[first : first + 1] if count == 1 else x.repeat_interleave(self.members, 0)[part]
        kept = [h]
        for number, layer in enumerate(self.mlp.layers):
            h = torch.baddbmm(layer.bias[part], h, layer.weight[part])
            if number < len(self.mlp.layers) - 1:
                h = h.relu_()
            kept.append(h)
        return kept

    def _slopes_by_member(self, x: Tensor, least: Tensor) -> Tensor:
        """dQ_i / da (S, B, A) with i = least (S, B): each member sees only the rows where it is the minimum."""
        out = torch.empty(*least.shape, self.action_size, dtype=x.dtype)
        layers = self.mlp.layers
        for s in range(self.seeds):
            for member in torch.unique(least[s]).tolist():
                rows = torch.nonzero(least[s] == member).flatten()
                k = s * self.members + member
                h, kept = x[s, rows], []
                for layer in layers[:-1]:
                    h = torch.addmm(layer.bias[k], h, layer.weight[k]).relu_()
                    kept.append(h)
                e = _relu_backward(layers[-1].weight[k].t().expand_as(h), h, 0)
                for number in range(len(kept) - 1, 0, -1):
                    e = _relu_backward(e @ layers[number].weight[k].t(), kept[number - 1], 0)
                out[s, rows] = e @ layers[0].weight[k][-self.action_size :].t()
        return out

    def _slopes(self, x: Tensor, least: Tensor) -> Tensor:
        """The same with every member at every row, masked: no round trip to the host."""
        h = self._activations(x, slice(0, self.seeds * self.members))
        chosen = (
            F.one_hot(least, self.members).to(x.dtype).transpose(1, 2).reshape(-1, least.shape[1], 1)
        )  # (S*N, B, 1)
        layers = self.mlp.layers
        e = _relu_backward(chosen * layers[-1].weight.transpose(1, 2), h[-2], 0)
        for number in range(len(layers) - 2, 0, -1):
            e = _relu_backward(torch.bmm(e, layers[number].weight.transpose(1, 2)), h[number], 0)
        slopes = torch.bmm(e, layers[0].weight[:, -self.action_size :].transpose(1, 2))
        return slopes.unflatten(0, (self.seeds, self.members)).sum(1)


def diversity_gradient(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """EDAC's term and its gradient in the slopes g_i = dQ_i / da.

    mean_b sum_{i != j} <u_i, u_j> / (N - 1) with u = g / (|g| + 1e-10). With U = sum u, the sum is |U|^2 - sum |u_i|^2,
    and d / du_i = 2 (U - u_i): no N x N products.

    Args:
        slopes: (S, N, B, A), N > 1.

    Returns:
        (S,), and (S, N, B, A): the derivative of its sum over seeds.
    """
    norm = slopes.norm(dim=-1, keepdim=True)
    u = slopes / (norm + NORM_FLOOR)
    total = u.sum(1, keepdim=True)
    scale = 1.0 / (slopes.shape[2] * (slopes.shape[1] - 1))
    term = scale * (total.square().sum((1, 2, 3)) - u.square().sum((1, 2, 3)))
    v = 2.0 * scale * (total - u)  # d term / du
    along = (u * v).sum(-1, keepdim=True) * slopes / norm.clamp_min(NORM_FLOOR)
    return term, (v - along) / (norm + NORM_FLOOR)


def start_uniformly(mlp: StackedMLP, seeds: Sequence[torch.Generator], members: int, last: float) -> None:
    """EDAC's start: weights +-1 / sqrt(inputs), biases 0.1, the last layer's weights and biases +-`last`."""
    with torch.no_grad():
        for number, layer in enumerate(mlp.layers):
            final = number == len(mlp.layers) - 1
            bound = last if final else layer.weight.shape[1] ** -0.5
            layer.bias.fill_(0.1)
            for entry in range(len(layer.weight)):
                generator = seeds[entry // members]
                layer.weight[entry].uniform_(-bound, bound, generator=generator)
                if final:
                    layer.bias[entry].uniform_(-last, last, generator=generator)
