"""Networks, their gradients and Adam in float64 NumPy, written without torch: what learners are held against."""

from typing import Any

import numpy as np


class Net:
    """ReLU layers, a layer norm after each ReLU where the module has them; gradients by hand."""

    def __init__(self, mlp: Any, entry: int = 0) -> None:
        """A copy of entry `entry` of a `StackedMLP`."""
        self.depth = len(mlp.layers)
        self.p = [t[entry].detach().double().numpy().copy() for k in mlp.layers for t in (k.weight, k.bias)]
        self.normed = len(mlp.norms) > 0
        self.p += [t[entry].detach().double().numpy().copy() for k in mlp.norms for t in (k.scale, k.shift)]
        self.m, self.v, self.t = [np.zeros_like(p) for p in self.p], [np.zeros_like(p) for p in self.p], 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.forward(x)[0]

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, list]:
        """(B, in) -> (B, out), and what `backward` needs."""
        kept = []
        for n in range(self.depth):
            z = x @ self.p[2 * n] + self.p[2 * n + 1]
            if n == self.depth - 1:
                return z, [*kept, (x, None, None)]
            h, normed = np.maximum(z, 0), None
            if self.normed:
                deviation = np.sqrt(h.var(-1, keepdims=True) + 1e-5)
                normed = ((h - h.mean(-1, keepdims=True)) / deviation, deviation)
                h = normed[0] * self.p[2 * self.depth + 2 * n] + self.p[2 * self.depth + 2 * n + 1]
            kept.append((x, z, normed))
            x = h
        raise AssertionError

    def backward(self, kept: list, d: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Gradients of the parameters and of the input, from that of the output, (B, out)."""
        gradients = [np.zeros_like(p) for p in self.p]
        for n in reversed(range(self.depth)):
            x, z, normed = kept[n]
            if normed is not None:
                unit, deviation = normed
                at = 2 * self.depth + 2 * n
                gradients[at], gradients[at + 1] = (d * unit).sum(0, keepdims=True), d.sum(0, keepdims=True)
                d = d * self.p[at]
                d = (d - d.mean(-1, keepdims=True) - unit * (d * unit).mean(-1, keepdims=True)) / deviation
            if z is not None:
                d = d * (z > 0)
            gradients[2 * n], gradients[2 * n + 1] = x.T @ d, d.sum(0, keepdims=True)
            d = d @ self.p[2 * n].T
        return gradients, d

    def adam(self, gradients: list[np.ndarray], rate: float) -> None:
        self.t += 1
        for p, g, m, v in zip(self.p, gradients, self.m, self.v, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p -= rate * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)

    def follow(self, online: "Net", rate: float) -> None:
        """As a target network."""
        self.p = [(1 - rate) * t + rate * p for t, p in zip(self.p, online.p, strict=True)]


class Number:
    """One learned number, with Adam."""

    def __init__(self, start: float) -> None:
        self.value, self.m, self.v, self.t = start, 0.0, 0.0, 0

    def adam(self, g: float, rate: float) -> None:
        self.t += 1
        self.m += 0.1 * (g - self.m)
        self.v += 0.001 * (g * g - self.v)
        self.value -= rate * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


def assert_equal(module: Any, net: Net, entry: int = 0, rtol: float = 1e-6) -> None:
    """The module's entry has the net's weights."""
    for ours, reference in zip(Net(module.mlp, entry).p, net.p, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=rtol, atol=1e-9)
