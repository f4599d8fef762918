"""The seams between rooms. A new labeller, learner, policy or transport is one new file that satisfies one of these."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from embodied.contracts.batch import Batch, Metrics
from embodied.contracts.specs import ActionSpec, ArraySpec


class Labeller(Protocol):
    """Scores frames: CLIP, preference model, value, ..."""

    def score(self, frames: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B,) float32, one score per frame, independent of the batch they came in."""
        ...


class Policy(Protocol):
    """What `sim` evaluates and `robot_bridge` runs."""

    observation_spec: dict[str, ArraySpec]
    image_spec: dict[str, ArraySpec]
    action_spec: ActionSpec
    control_dt: float

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """One step's action chunk.

        Args:
            observation: keys of `observation_spec`, and `images/<camera>` uint8 (H, W, 3).

        Returns:
            (chunk, A) in [-1, 1]; the first row is for now.
        """
        ...


class Learner(Protocol):
    """One algorithm, one file. All tensors carry a leading stack axis S (seeds)."""

    def update(self, batch: Batch) -> Metrics:
        """One gradient step. Metrics are tensors of shape (S,), left on the device."""
        ...

    def actor_state(self, index: int) -> dict[str, Any]:
        """The actor of one seed, by its position in the stack, as a policy bundle keeps it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs to go on exactly: parameters, optimiser moments, step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Publisher(Protocol):
    def write(self, data: bytes) -> None: ...


class Transport(Protocol):
    """Carries CDR bytes between nodes; knows no message class.

    Callbacks run on the transport's own thread: enqueue only.
    """

    def publisher(self, topic: str, message_type: str, qos: Any) -> Publisher: ...

    def subscriber(self, topic: str, message_type: str, qos: Any, callback: Callable[[bytes, int], None]) -> Any:
        """`callback(data, received_monotonic_ns)`."""
        ...

    def close(self) -> None: ...
