"""Histogram values beside squared error: what shifting targets do to them, and the fixed point of a backup.

    python benchmarks/hl_gauss.py

- `shifts`: y = sin(10 f(x)) + b of random inputs x and a random network f, b = 0, 8, 16, 24, 32 in turn, 600 steps of
  batch 128 each, 101 bins on [-40, 40] (Farebrother et al. 2024, B.4; Lyle et al. 2024). Mean squared error after each
  b over all inputs, mean of two seeds, for squared error, two bins next to the target, and HL-Gauss. How hard the
  regression is depends on the number of inputs and their size, so that is a table.
- `fixed_point`: of one state that pays 0.3 for ever at discount 0.99, true value 30, on [0, 100]; and with a
  Gaussian that lacks its left side, as a public implementation has it.
"""

import argparse
from typing import Any

import numpy as np
import torch
from record import write_result
from torch import Tensor

from embodied.policies.hl_gauss import Support, cross_entropy, expectation
from embodied.policies.loop import Adam
from embodied.policies.networks import StackedMLP, generators

SEEDS, SHIFTS, SUPPORT = (0, 1), (0.0, 8.0, 16.0, 24.0, 32.0), Support(-40.0, 40.0, 101)
HEADS = ("mse", "two_hot", "hl_gauss")


def two_hot(targets: Tensor) -> Tensor:
    """All probability on the two centres next to the target: (...) -> (..., bins)."""
    place = ((targets - SUPPORT.low) / SUPPORT.width - 0.5).clamp(0, SUPPORT.bins - 1)
    return (1 - (place.unsqueeze(-1) - torch.arange(SUPPORT.bins)).abs()).clamp(min=0)


def shifts(head: str, inputs: int, size: int, steps: int) -> list[float]:
    draws = generators(SEEDS)
    x = torch.stack([torch.randn(inputs, size, generator=draw) for draw in draws])  # (S, N, size)
    with torch.no_grad():
        y = torch.sin(10 * StackedMLP(draws, (size, 128, 128, 1))(x))[..., 0]  # (S, N)
    network = StackedMLP(draws, (size, 128, 128, 1 if head == "mse" else SUPPORT.bins))
    adam, centres, errors = Adam(network, 1e-3), SUPPORT.centres(), []
    for shift in SHIFTS:
        for _ in range(steps):
            rows = torch.randint(inputs, (128,), generator=draws[0])
            out, target = network(x[:, rows]), y[:, rows] + shift
            if head == "mse":
                loss = (out[..., 0] - target).square()
            else:
                loss = cross_entropy(out, two_hot(target) if head == "two_hot" else SUPPORT.project(target))
            adam.descend(loss.mean(-1).sum())
        with torch.no_grad():
            out = network(x)
            value = out[..., 0] if head == "mse" else expectation(out, centres)
            errors.append(float(f"{float((value - y - shift).square().mean()):.3g}"))
    return errors


def fixed_points(bins: int) -> dict[str, float]:
    support = Support(0.0, 100.0, bins)
    centres, edges = support.centres().double().numpy(), np.linspace(0, 100, bins + 1)

    def right(y: float) -> np.ndarray:
        return support.project(torch.tensor(y, dtype=torch.float64)).numpy()

    def one_sided(y: float) -> np.ndarray:
        cdf = torch.erf(torch.from_numpy(np.maximum(edges - y, 1e-6)) / (np.sqrt(2) * support.sigma)).numpy()
        return np.diff(cdf) / (cdf[-1] - cdf[0])

    found = {}
    for name, project in (("hl_gauss", right), ("one_sided", one_sided)):
        value, last = 0.0, -1.0
        while abs(value - last) > 1e-12:
            last, value = value, float(project(0.3 + 0.99 * value) @ centres)
        found[name] = round(value, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="per shift")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[dict[str, Any]] = []
    for inputs in (512, 1024, 2048):
        for size in (16, 32):
            errors = {head: shifts(head, inputs, size, options.steps) for head in HEADS}
            ratio = [round(h / m, 3) for h, m in zip(errors["hl_gauss"], errors["mse"], strict=True)]
            cells.append({"inputs": inputs, "input_size": size, **errors, "hl_gauss_over_mse": ratio})
            print(cells[-1])
    fixed = {str(bins): fixed_points(bins) for bins in (21, 51, 101, 401)}
    print(fixed)
    print(write_result("hl_gauss", {"shifts": list(SHIFTS), "cells": cells, "fixed_point": fixed}))


if __name__ == "__main__":
    main()
