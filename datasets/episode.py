"""One episode in memory: what every reader and collector hands to the StoreWriter."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ArraySpec, DatasetSpec


@dataclasses.dataclass(frozen=True)
class Frames:
    """Pictures of one camera that are decoded when asked for, a block at a time: an hour of video fits no memory.

    Attributes:
        shape: (n, H, W, 3).
        blocks: gives the n pictures in order, as (k, H, W, 3) uint8 arrays of a few MB. It may be called again. It
            raises InputError where the source cannot be decoded.
    """

    shape: tuple[int, int, int, int]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them at once."""
        found = list(self.blocks())
        pictures = np.concatenate(found) if found else np.zeros(self.shape, np.uint8)
        return pictures if dtype is None else pictures.astype(dtype)


def blocks_of(pictures: "np.ndarray | Frames", rows: int = 64) -> Iterator[np.ndarray]:
    """(k, H, W, 3) blocks of pictures, whether they are in memory or not."""
    if isinstance(pictures, Frames):
        yield from pictures.blocks()
    else:
        for start in range(0, len(pictures), rows):
            yield pictures[start : start + rows]


@dataclasses.dataclass
class Episode:
    """One attempt, reset to end. n rows, one per observation; a source with N steps usually gives n = N + 1.

    The row of a final observation has a zero action and `step_valid` False. A source without final observations keeps
    N rows; its last row is `step_valid` only if it terminated, because the successor is unknown otherwise.

    Attributes:
        observations: key -> (n, ...) float32, SI units.
        images: camera -> (n, H, W, 3) uint8, in memory or as `Frames`. A camera of the dataset's spec that is not here
            has no pictures of this episode: the store says so and holds black ones.
        action: (n, A) float32, or None for action-free video.
        step_valid: (n,) bool: this frame has an action and a known successor, or is terminal.
        terminated, truncated: (n,) bool, on the row of the step that ended the episode. Never both.
        timestamp: (n,) float64, seconds since the start of the episode [s], as recorded.
        reward: (n,) float32, paid by the source for the step at this row; None where the source has none.
        instruction: the task in words, empty when unknown.
        success: True, False, or None when the source does not say.
        source_id: where it came from, for messages and for the store's `episode/source_id`.
    """

    observations: dict[str, np.ndarray]
    images: dict[str, np.ndarray | Frames]
    action: np.ndarray | None
    step_valid: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    timestamp: np.ndarray
    reward: np.ndarray | None = None
    instruction: str = ""
    success: bool | None = None
    source_id: str = ""

    def __len__(self) -> int:
        """Frames, the final observation included."""
        return len(self.step_valid)

    def check(self, spec: DatasetSpec) -> None:
        """Raise InputError, naming `source_id`, unless this episode is what `spec` says and can be learned from."""
        try:
            self._check_arrays(spec)
            self._check_ends()
        except InputError as error:
            raise InputError(f"Episode '{self.source_id or '(unnamed)'}': {error}") from None

    def _check_arrays(self, spec: DatasetSpec) -> None:
        if len(self) == 0:
            raise InputError("it has no frames.")
        if spec.action is not None and (self.action is None or self.action.size == 0 or len(self) < 2):
            # Two rows are the least that hold one step: the first and what followed, or two steps of which one counts.
            terminal_step = self.action is not None and self.action.size > 0 and bool(self.terminated.any())
            if not terminal_step:
                raise InputError("it has no actions. Drop it from the source, or import it as action-free video.")
        _check_group("observation", self.observations, spec.observations)
        arrays: dict[str, np.ndarray | Frames] = {f"observation/{key}": a for key, a in self.observations.items()}
        for camera, images in self.images.items():
            if camera not in spec.images:
                raise InputError(
                    f"it has cameras {sorted(self.images)}; the dataset's spec says {sorted(spec.images)}."
                )
            if images.dtype != np.uint8:
                raise InputError(f"camera '{camera}' is {images.dtype}; images are uint8 (H, W, 3).")
            if tuple(images.shape[1:]) != spec.images[camera].shape:
                raise InputError(
                    f"'camera {camera}' has shape {tuple(images.shape[1:])} per step; "
                    f"the spec says {spec.images[camera].shape}."
                )
            arrays[f"observation/images/{camera}"] = images
        if spec.action is None and self.action is not None:
            raise InputError("it has actions; the dataset's spec says there are none.")
        if spec.action is not None and self.action is not None:
            spec.action.check("action", self.action)
            arrays["action"] = self.action
        if spec.has_reward != (self.reward is not None):
            raise InputError(f"reward is {'absent' if self.reward is None else 'present'}; the spec says otherwise.")
        if self.reward is not None:
            ArraySpec(()).check("reward", self.reward)
            arrays["reward"] = self.reward
        ArraySpec(()).check("timestamp", self.timestamp)
        arrays |= {"terminated": self.terminated, "truncated": self.truncated, "timestamp": self.timestamp}
        for name, array in arrays.items():
            if len(array) != len(self):
                raise InputError(f"'{name}' has {len(array)} rows, 'step_valid' has {len(self)}; they must agree.")
        if (np.diff(self.timestamp) < 0).any():
            row = int(np.argmax(np.diff(self.timestamp) < 0)) + 1
            raise InputError(f"timestamps go back at frame {row}; sort the source's frames by time.")

    def _check_ends(self) -> None:
        for name, flags in (("step_valid", self.step_valid), ("terminated", self.terminated)):
            if flags.dtype != np.bool_ or flags.ndim != 1:
                raise InputError(f"'{name}' must be a flat bool array, found {flags.dtype} {flags.shape}.")
        ends = np.flatnonzero(self.terminated | self.truncated)
        if (self.terminated & self.truncated).any():
            raise InputError(
                "a step is both terminated and truncated. Terminal beats timeout: clear 'truncated' there."
            )
        if len(ends) > 1 or (len(ends) == 1 and ends[0] < len(self) - 2):
            raise InputError(f"it ends at frame {int(ends[0])} but has {len(self)} frames. Split it there.")
        if self.step_valid[-1] and not self.terminated[-1]:
            raise InputError("its last frame is step_valid, but has no successor and is not terminal.")


def _check_group(kind: str, arrays: Mapping[str, np.ndarray], specs: Mapping[str, ArraySpec]) -> None:
    if set(arrays) != set(specs):
        raise InputError(f"it has {kind}s {sorted(arrays)}; the dataset's spec says {sorted(specs)}.")
    for name, spec in specs.items():
        spec.check(f"{kind} {name}", arrays[name])


def end_flags(steps: int, rows: int, terminated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`step_valid`, `terminated`, `truncated` (rows,) of an episode with `steps` actions.

    Args:
        steps: number of actions N.
        rows: N + 1 with a final observation, N without one.
        terminated: the last step ended the task; otherwise it was cut by time, an operator or the end of the recording.
    """
    step_valid = np.zeros(rows, bool)
    step_valid[:steps] = True
    if rows == steps and not terminated:
        step_valid[-1] = False
    ends = np.zeros((2, rows), bool)
    ends[0 if terminated else 1, steps - 1] = True
    return step_valid, ends[0], ends[1]


def padded_last(array: np.ndarray, rows: int) -> np.ndarray:
    """`array` (N, ...) lengthened with zeros to (rows, ...): the action and reward of a final observation's row."""
    pad = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, pad) if rows > len(array) else array
