"""Random numbers inside an update: functions of (seed, step) alone, so that a resumed run repeats them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embodied.datasets.draws import Stream, philox

STEPS_AT_ONCE = 16


class Noise:
    """step -> (S, *shape) standard normal numbers on a device, in torch's default type; each seed has its own.

    Args:
        shape: of one seed's numbers at one step.
        stream: what they are for.
        uniform: uniform in [-1, 1) instead.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], stream: Stream, device: str = "cpu", uniform: bool = False
    ) -> None:
        self._seeds, self._shape, self._stream = tuple(seeds), tuple(shape), stream
        self._device, self._uniform, self._dtype = device, uniform, torch.get_default_dtype()
        self._drawn: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tensor:
        block, place = divmod(step, STEPS_AT_ONCE)
        if self._drawn is None or self._drawn[0] != block:  # one transfer for several steps
            numbers = torch.from_numpy(np.stack([self._draw(seed, block) for seed in self._seeds], 1))
            self._drawn = block, numbers.to(self._device, self._dtype)
        return self._drawn[1][place]

    def _draw(self, seed: int, block: int) -> np.ndarray:
        draws, size = philox(seed, block, self._stream), (STEPS_AT_ONCE, *self._shape)
        if self._uniform:
            return 2.0 * draws.random(size, dtype=np.float32) - 1.0
        return draws.standard_normal(size, dtype=np.float32)


class Dropout:
    """step -> for each hidden layer what its outputs are multiplied by, (S, B, size): 0 with probability `rate`, else
    1 / (1 - rate). An empty list where nothing is dropped."""

    def __init__(
        self, seeds: Sequence[int], rate: float, batch_size: int, sizes: Sequence[int], device: str = "cpu"
    ) -> None:
        self._rate, self._sizes = rate, list(sizes)
        self._noise = Noise(seeds, (batch_size, sum(sizes)), Stream.DROPOUT, device, uniform=True)

    def __call__(self, step: int) -> list[Tensor]:
        if self._rate == 0:
            return []
        kept = self._noise(step) >= 2.0 * self._rate - 1.0
        return list((kept / (1.0 - self._rate)).split(self._sizes, -1))
