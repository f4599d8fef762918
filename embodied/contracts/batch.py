"""The batch every learner takes. Keys are fixed; a learner that needs more says so in its own file."""

from collections.abc import Mapping
from typing import Any, TypedDict

# Any: numpy arrays in datasets, torch tensors in policies. Shapes carry a leading stack axis S in policies.


class Batch(TypedDict):
    """Transitions.

    Keys:
        observations: (..., B, D) what the policy sees at frame t.
        actions: (..., B, A) in [-1, 1].
        rewards: (..., B) reward of the step t -> t+1.
        masks: (..., B) 1 - terminated: multiplies the bootstrap. Truncation leaves it at 1.
        next_observations: (..., B, D) frame t+1.
    """

    observations: Any
    actions: Any
    rewards: Any
    masks: Any
    next_observations: Any


Metrics = Mapping[str, Any]
