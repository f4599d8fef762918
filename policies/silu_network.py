"""SiLU networks of a stack on the CPU, through buffers that are kept, and differentiated by hand.

Forward passes take one network after another and a few hundred rows at a time, whose activations then stay in a core's
own cache. Gradients take all networks at once, in one product per layer, which was faster than one after another.
Hidden layers lie features first, which the products prefer. benchmarks/model_based_speed.py measures.

Products may be in bfloat16, of gradients or of one forward pass: factors and products of layers with `WIDE` inputs or
more, forwards and backwards, and the activations between them are rounded to 8 bits of mantissa. Weights, narrow first
layers and the last layer, whose errors would be the model's, stay float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512  # that go through a network together
WIDE = 64  # inputs from which rounding a layer's factors costs less than it gains
_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input
Slope = Callable[[Tensor], Tensor]  # outputs (S, out, B) -> derivative of a loss in them


class StackedNetworks:
    """S networks with SiLU between their layers. Views of the weights: what an optimiser writes in place is seen.

    Args:
        layers: weight (S, in, out) and bias (S, 1, out) of each layer. On a GPU all networks go together, and there
            are no gradients from here.
        products: of float32 networks in `gradients`; see `relu_network.product_type`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], products: torch.dtype = torch.float32) -> None:
        self._layers = [(w.detach(), b.detach()) for w, b in layers]
        pairs = [(w.detach().unbind(0), b.detach().unbind(0)) for w, b in layers]
        self._networks = [[(w[i], b[i], b[i].t()) for w, b in pairs] for i in range(len(pairs[0][0]))]
        self._sizes = [weight.shape[2] for weight, _ in layers]
        self._like = layers[0][0].detach()
        self._kinds = self._types(products)
        self._block: dict[tuple[int, torch.dtype], list[tuple[Tensor, ...]]] = {}
        self._passes: dict[int, list[tuple[Tensor, ...]]] = {}

    def _types(self, products: torch.dtype) -> list[torch.dtype]:
        """Of each layer's products."""
        kind = self._like.dtype
        low = [kind == torch.float32 and weight.shape[1] >= WIDE for weight, _ in self._layers[:-1]]
        return [*(products if rounded else kind for rounded in low), kind]

    @torch.inference_mode(False)  # what is made in that mode could not be written to outside it
    def _borrow(self, rows: int, products: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Two (size, rows) of each hidden layer: what goes into SiLU and what comes out."""
        if (rows, products) not in self._block:
            if len(self._block) > 4:  # remainders of other numbers of rows
                self._block.clear()
            self._block[rows, products] = [
                self._like.new_empty((2, size, rows), dtype=kind).unbind(0)
                for size, kind in zip(self._sizes[:-1], self._types(products), strict=False)
            ]
        return self._block[rows, products]

    @torch.inference_mode(False)  # what is made in that mode could not be written to outside it
    def _kept(self, rows: int) -> list[tuple[Tensor, ...]]:
        """The same and a gradient, (S, size, rows) each."""
        if rows not in self._passes:
            self._passes.clear()
            shapes = [(3, len(self._networks), size, rows) for size in self._sizes[:-1]]
            self._passes[rows] = [
                self._like.new_empty(shape, dtype=kind).unbind(0)
                for shape, kind in zip(shapes, self._kinds, strict=False)
            ]
        return self._passes[rows]

    @torch.no_grad()
    def forward(self, x: Tensor, products: torch.dtype = torch.float32) -> Tensor:
        """(S, B, in), perhaps expanded, -> (S, B, out). `products`: of float32 networks on a CPU."""
        if x.device.type != "cpu":
            for weight, bias in self._layers[:-1]:
                x = F.silu(torch.baddbmm(bias, x, weight), inplace=True)
            return torch.baddbmm(self._layers[-1][1], x, self._layers[-1][0])
        out = x.new_empty(len(self._networks), x.shape[1], self._sizes[-1])
        blocks, kinds = [slice(i, i + ROWS) for i in range(0, x.shape[1], ROWS)], self._types(products)
        for network, inputs, outputs in zip(self._networks, x.unbind(0), out.unbind(0), strict=True):
            hidden = [(w.to(kind).t(), b.to(kind)) for (w, _, b), kind in zip(network[:-1], kinds, strict=False)]
            for block in blocks:
                h = inputs[block].t()
                for n, (z, after) in enumerate(self._borrow(h.shape[1], products)):
                    weight, bias = hidden[n]
                    h = _silu(torch.addmm(bias, weight, h, out=z), out=after).to(kinds[n + 1])
                torch.addmm(network[-1][1], h.t(), network[-1][0], out=outputs[block])
        return out

    @torch.no_grad()
    def gradients(self, x: Tensor, slope: Slope) -> list[Tensor]:
        """Gradient of a sum of losses of each network, in the order weight, bias of each layer.

        Args:
            x: (S, B, in).
            slope: may overwrite what it is given.
        """
        last, kinds, buffers = len(self._sizes) - 1, self._kinds, self._kept(x.shape[1])
        found = [torch.empty_like(tensor) for layer in self._layers for tensor in layer]
        weights = [weight.to(kind) for (weight, _), kind in zip(self._layers, kinds, strict=True)]
        biases = [bias.transpose(1, 2).to(kind) for (_, bias), kind in zip(self._layers, kinds, strict=True)]
        h = [x.transpose(1, 2)]  # what each layer takes
        for n, (z, after, _) in enumerate(buffers):
            torch.baddbmm(biases[n], weights[n].transpose(1, 2), h[n], out=z)
            h.append(_silu(z, out=after).to(kinds[n + 1]))
        d = slope(torch.baddbmm(biases[last], weights[last].transpose(1, 2), h[last]))
        for n in range(last, -1, -1):
            _product(h[n], d.transpose(1, 2), found[2 * n])
            torch.sum(d, 2, dtype=self._like.dtype, out=found[2 * n + 1][:, 0])
            if n:
                z, _, d_h = buffers[n - 1]
                _product(weights[n], d, d_h)
                d = _silu_backward(d_h, z, grad_input=d_h)
        return found


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, rounded or widened where `out` has another type."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
