"""SiLU networks of a stack on the CPU: one after another, a few rows at a time, differentiated by hand.

What a network of dynamics computes for 256 rows lies in a core's own cache as long as nothing else is computed in
between, and training is as fast as that cache (benchmarks/model_based_speed.py). So each network goes forward and
backward before the next, through the same buffers; hidden layers lie features first, which the products prefer. Since
every network is computed alone, a stack of k networks gives bit for bit what k single ones give.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 256  # that go through a network together
_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input
Slope = Callable[[int, Tensor], Tensor]  # number of a network, its output (B, out) -> derivative of a loss in it


class StackedNetworks:
    """S networks with SiLU between their layers. Views of the weights: what an optimiser writes in place is seen.

    Args:
        layers: weight (S, in, out) and bias (S, 1, out) of each layer. On a GPU all networks go together, and there
            are no gradients from here.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._layers = [(w.detach(), b.detach()) for w, b in layers]
        pairs = [(w.detach().unbind(0), b.detach().unbind(0)) for w, b in layers]
        self._networks = [[(w[i], b[i], b[i].t()) for w, b in pairs] for i in range(len(pairs[0][0]))]
        self._sizes = [weight.shape[2] for weight, _ in layers]
        self._like = layers[0][0]
        self._buffers: dict[int, list[tuple[Tensor, ...]]] = {}

    def _borrow(self, rows: int) -> list[tuple[Tensor, ...]]:
        """Three (size, rows) of each hidden layer: what goes into SiLU, what comes out, and a gradient."""
        if rows not in self._buffers:
            if len(self._buffers) > 4:  # remainders of other numbers of rows
                self._buffers.clear()
            self._buffers[rows] = [self._like.new_empty(3, size, rows).unbind(0) for size in self._sizes[:-1]]
        return self._buffers[rows]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(S, B, in), perhaps expanded, -> (S, B, out)."""
        if x.device.type != "cpu":
            for weight, bias in self._layers[:-1]:
                x = F.silu(torch.baddbmm(bias, x, weight), inplace=True)
            return torch.baddbmm(self._layers[-1][1], x, self._layers[-1][0])
        out = x.new_empty(len(self._networks), x.shape[1], self._sizes[-1])
        blocks = [slice(i, i + ROWS) for i in range(0, x.shape[1], ROWS)]
        for network, inputs, outputs in zip(self._networks, x.unbind(0), out.unbind(0), strict=True):
            for block in blocks:
                h = inputs[block].t()
                for (weight, _, bias), (z, after, _) in zip(network[:-1], self._borrow(h.shape[1]), strict=True):
                    h = _silu(torch.addmm(bias, weight.t(), h, out=z), out=after)
                torch.addmm(network[-1][1], h.t(), network[-1][0], out=outputs[block])
        return out

    @torch.no_grad()
    def gradients(self, x: Tensor, slope: Slope) -> list[Tensor]:
        """Gradient of a sum of losses of each network, in the order weight, bias of each layer.

        Args:
            x: (S, B, in); all B rows at once, in a buffer of their own.
            slope: called for one network after another.
        """
        count, last = len(self._networks), len(self._sizes) - 1
        found = [self._like.new_empty(count, *t.shape) for w, b, _ in self._networks[0] for t in (w, b)]
        buffers = self._borrow(x.shape[1])
        for i, network in enumerate(self._networks):
            inputs = x[i].t()
            h = [inputs]
            for (weight, _, bias), (z, after, _) in zip(network[:-1], buffers, strict=True):
                h.append(_silu(torch.addmm(bias, weight.t(), h[-1], out=z), out=after))
            weight, bias, _ = network[-1]
            d_out = slope(i, torch.addmm(bias, h[-1].t(), weight))
            torch.mm(h[-1], d_out, out=found[2 * last][i])
            torch.sum(d_out, 0, keepdim=True, out=found[2 * last + 1][i])
            d = d_out.t()
            for layer in range(last - 1, -1, -1):
                z, _, d_h = buffers[layer]
                d = _silu_backward(torch.mm(network[layer + 1][0], d, out=d_h), z, grad_input=d_h)
                torch.mm(h[layer], d.t(), out=found[2 * layer][i])
                torch.sum(d, 1, out=found[2 * layer + 1][i, 0])
        return found
