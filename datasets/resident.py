"""Data where training reads it at random: transitions as one tensor on the device, frames in a bounded cache.

Reading one row of a store at random costs a read and a decode. What is drawn for a hundred thousand steps is therefore
decoded once where there is room: low-dimensional transitions into one float32 tensor on the device, or beside it in
memory where that is too small; frames into memory up to a limit. benchmarks/sampling.py measures what each costs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from embodied.contracts.batch import Batch
from embodied.contracts.errors import InputError, suggest
from embodied.datasets.draws import Stream, philox
from embodied.datasets.goals import Goals, HindsightGoals
from embodied.datasets.prefetch import Prefetcher

if TYPE_CHECKING:  # a store is read without torch, which takes seconds to import
    from torch import Tensor

STEPS_AT_ONCE = 64  # steps whose transitions are drawn at once, per seed
FRAMES_AT_ONCE = 256
MEMORY_LIMIT = 2 << 30  # bytes of frames kept in memory
DEVICE_SHARE = 0.5  # of a GPU's free memory that transitions may take


class TransitionArrays(Protocol):
    """N transitions between F frames.

    Attributes:
        observations, actions: (F, D) and (F, A) float32.
        frame, next_frame: (N,) int64 rows of these; a frame begins at most one transition.
        masks: (N,) float32, what multiplies the bootstrap.
    """

    @property
    def observations(self) -> np.ndarray: ...

    @property
    def actions(self) -> np.ndarray: ...

    @property
    def frame(self) -> np.ndarray: ...

    @property
    def next_frame(self) -> np.ndarray: ...

    @property
    def masks(self) -> np.ndarray: ...


class ResidentTransitions:
    """step -> uniform transitions out of one contiguous float32 table (F, D + A + 2) on a device.

    A row is one frame: its observation, its action, and reward and mask of the step that begins there. A batch is two
    gathers of rows; nothing comes from the host but the numbers of the transitions, for 64 steps at once. The optional
    keys of `Batch` are columns more.

    With goals, each transition is given one, a function of (seed, step) too, and observations end with it, at t and at
    t + 1 alike. It is paid -1 until a step reaches the goal, which is paid 0 and ends the trajectory: mask 0. Where an
    episode terminated elsewhere, its last step is paid -1 for ever: it will not be reached.

    Args:
        rewards: (N,) float32, as the learner sees them.
        seeds: each draws transitions of its own, a function of (seed, step) alone: the leading axis S of a batch.
        batch_size: B.
        device: where the table lies and the batches are made.
        returns: (N,) float32; gives batches `returns`.
        next_actions: gives batches `next_actions` and `next_known`.
        goals: gives observations (S, B, D + G); `rewards`, masks and `returns` are then made for the goals.
        discount: the learner's; needed with goals, for returns and what is paid for ever.

    Raises:
        InputError: two transitions that begin at one frame.
    """

    def __init__(
        self,
        data: TransitionArrays,
        rewards: np.ndarray,
        seeds: Sequence[int],
        batch_size: int,
        device: str = "cpu",
        returns: np.ndarray | None = None,
        next_actions: bool = False,
        goals: Goals | None = None,
        discount: float = 0.0,
    ) -> None:
        import torch

        if (times := np.bincount(data.frame)).max(initial=0) > 1:
            raise InputError(f"Frame {int(times.argmax())} begins more than one transition.")
        self._d, self._a = data.observations.shape[1], data.actions.shape[1]
        columns = [rewards, data.masks, *([] if returns is None else [returns])]
        if next_actions:
            columns.append(np.ones_like(data.masks))  # known: every frame where a transition begins
        self._returns, self._next_actions = returns is not None, next_actions
        steps = np.zeros((len(data.observations), len(columns)), np.float32)
        steps[data.frame] = np.stack(columns, 1)
        table = torch.empty((len(steps), self._d + self._a + len(columns)), dtype=torch.float32, device=device)
        parts = table.split([self._d, self._a, len(columns)], 1)
        for part, array in zip(parts, (data.observations, data.actions, steps), strict=True):
            part.copy_(torch.as_tensor(array))
        self._table = table
        self._frame = torch.as_tensor(data.frame, device=device)
        self._next_frame = torch.as_tensor(data.next_frame, device=device)
        self._seeds, self._batch_size = tuple(seeds), batch_size
        self._drawn: tuple[int, tuple[Tensor, ...]] | None = None
        self._relabel = None if goals is None else _Relabel(goals, data, discount, device)

    def __call__(self, step: int) -> Batch:
        """The batch of a step, from 0: (S, B, ...) tensors on the device, views of the rows gathered."""
        numbers, *drawn = self._numbers(step)  # (S, B)
        shape = (*numbers.shape, -1)
        frames, next_frames = (x.index_select(0, numbers.reshape(-1)) for x in (self._frame, self._next_frame))
        now = self._table.index_select(0, frames).view(shape)
        after = self._table.index_select(0, next_frames).view(shape)
        end = self._d + self._a
        batch: Batch = {
            "observations": now[..., : self._d],
            "actions": now[..., self._d : end],
            "rewards": now[..., end],
            "masks": now[..., end + 1],
            "next_observations": after[..., : self._d],
        }
        if self._returns:
            batch["returns"] = now[..., end + 2]
        if self._next_actions:
            batch["next_actions"], batch["next_known"] = after[..., self._d : end], after[..., -1]
        if self._relabel:
            blind = (frames == next_frames).view(numbers.shape)
            self._relabel(batch, next_frames.view(numbers.shape), blind, *drawn)
        return batch

    def _numbers(self, step: int) -> "tuple[Tensor, ...]":
        """The transitions (S, B) of a step; with goals, their frames and how far ahead they lie, (S, B) too."""
        import torch

        block, place = divmod(step, STEPS_AT_ONCE)
        if self._drawn is None or self._drawn[0] != block:
            size = (STEPS_AT_ONCE, self._batch_size)
            draws = [philox(s, block, Stream.BATCHES).integers(len(self._frame), size=size) for s in self._seeds]
            parts = [draws]  # each (STEPS_AT_ONCE, S, B) when stacked
            if self._relabel:
                parts += self._relabel.draw(self._seeds, block, draws)
            arrays = (torch.from_numpy(np.stack(part, 1)) for part in parts)
            if self._table.device.type == "cuda":
                arrays = (array.pin_memory() for array in arrays)
            self._drawn = block, tuple(array.to(self._table.device, non_blocking=True) for array in arrays)
        return tuple(array[place] for array in self._drawn[1])


class _Relabel:
    """Observations, rewards, masks and returns of a batch, made for the goals that its transitions drew."""

    def __init__(self, goals: Goals, data: TransitionArrays, discount: float, device: str) -> None:
        import torch

        self._goals = HindsightGoals(data.frame, data.next_frame, goals.hindsight)
        self._values, self._scale = (torch.as_tensor(x, device=device) for x in (goals.values, goals.scale))
        self._tolerance, self._discount = goals.hindsight.tolerance, discount
        self._never = -1.0 / (1.0 - discount)  # -1 for ever

    def draw(self, seeds: Sequence[int], block: int, numbers: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Goal frames, and how far they lie ahead, of the transitions that each seed drew for a block of steps."""
        goals = [self._goals.draw(seed, block, drawn) for seed, drawn in zip(seeds, numbers, strict=True)]
        return [goals, [self._goals.ahead(drawn, goal) for drawn, goal in zip(numbers, goals, strict=True)]]

    def __call__(
        self, batch: Batch, next_frame: "Tensor", blind: "Tensor", goal_frame: "Tensor", ahead: "Tensor"
    ) -> None:
        """Change the batch in place. Everything else is (S, B); `blind`: what the step led to was not recorded."""
        import torch

        goal, achieved = self._values[goal_frame], self._values[next_frame]  # (S, B, G)
        distance = torch.linalg.vector_norm((achieved - goal) * self._scale, dim=-1)
        reached = (distance <= self._tolerance) & ~blind
        lost = (batch["masks"] == 0) & ~reached
        for key in ("observations", "next_observations"):
            batch[key] = torch.cat([batch[key], goal], -1)
        batch["rewards"] = reached.float() - 1.0 + lost.float() * (self._never + 1.0)
        batch["masks"] = batch["masks"] * ~reached
        if "returns" in batch:
            to_go = torch.where((ahead >= 0) & ~blind, self._never * (1.0 - self._discount**ahead), self._never)
            batch["returns"] = torch.where(reached, 0.0, to_go)


@contextlib.contextmanager
def transition_batches(
    data: TransitionArrays,
    rewards: np.ndarray,
    seeds: Sequence[int],
    batch_size: int,
    steps: int,
    device: str = "cpu",
    limit: int | None = None,
    returns: np.ndarray | None = None,
    next_actions: bool = False,
    goals: Goals | None = None,
    discount: float = 0.0,
) -> Iterator[Callable[[int], Batch]]:
    """step -> batch on the device, for a `with` block: the table resident there where it fits, else in host memory.

    From host memory, batches are gathered in the background, pinned, and copied without waiting. Both give the same
    batches.

    Args:
        rewards, seeds, batch_size, returns, next_actions, goals, discount: see `ResidentTransitions`.
        steps: of the run.
        limit: bytes the table may take on the device; by default half of a GPU's free memory, and any size elsewhere.
    """
    if limit is None:
        limit = _room(device)
    width = data.observations.shape[1] + data.actions.shape[1] + 2 + (returns is not None) + next_actions
    width += 0 if goals is None else goals.values.shape[1]
    fits = limit is None or 4 * len(data.observations) * width <= limit
    table = ResidentTransitions(
        data, rewards, seeds, batch_size, device if fits else "cpu", returns, next_actions, goals, discount
    )
    if fits:
        yield table
    else:
        with Prefetcher(table, steps, device=device) as batches:
            yield batches


def _room(device: str) -> int | None:
    import torch

    if torch.device(device).type != "cuda":
        return None
    return int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])


class ResidentFrames:
    """All frames of a camera for random reads, like an array (F, H, W, 3) uint8: a cache bounded in bytes.

    As many frames as `limit` holds are decoded once and kept, from the first on; the others are read when asked for.
    Goals are drawn from the whole dataset alike, so that it does not matter which frames are kept, and replacing them
    would gain nothing. Threads may read at once.

    Args:
        store: an `EpisodeStore`, or what gives `num_frames`, `spec.images`, `frames` and `read_rows` as it does.
        limit: bytes.

    Raises:
        InputError: no such camera.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, store: Any, camera: str, limit: int = MEMORY_LIMIT) -> None:
        if camera not in store.spec.images:
            raise InputError(f"{store.path}: no camera '{camera}'.{suggest(camera, store.spec.images)}")
        picture = store.spec.images[camera].shape
        self.shape = (store.num_frames, *picture)
        self._store, self._name = store, f"observation/images/{camera}"
        self._kept = np.empty((min(store.num_frames, limit // int(np.prod(picture))), *picture), np.uint8)
        for start in range(0, len(self._kept), FRAMES_AT_ONCE):
            stop = min(start + FRAMES_AT_ONCE, len(self._kept))
            self._kept[start:stop] = store.frames(camera, start, stop)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(B,) frame numbers, in any order -> (B, H, W, 3)."""
        kept = rows < len(self._kept)
        if kept.all():
            return self._kept[rows]
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        out[kept] = self._kept[rows[kept]]
        out[~kept] = self._store.read_rows(self._name, rows[~kept])
        return out
