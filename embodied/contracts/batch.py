"""The batch every learner takes. Keys are fixed; a learner that needs more says so in its own file."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

# Any: numpy arrays in datasets, torch tensors in policies. Shapes carry a leading stack axis S in policies.


class Batch(TypedDict):
    """Transitions.

    Keys:
        observations: (..., B, D) what the policy sees at frame t.
        actions: (..., B, A) in [-1, 1].
        rewards: (..., B) reward of the step t -> t+1.
        masks: (..., B) 1 - terminated: multiplies the bootstrap. Truncation leaves it at 1.
        next_observations: (..., B, D) frame t+1.

    Keys that only some learners ask for (their `optional_keys`):
        returns: (..., B) discounted sum of the rewards from this step to the end of its episode, see `returns_to_go`.
        next_actions: (..., B, A) what was done at frame t+1.
        next_known: (..., B) 1 where the data hold that action, 0 where the episode was cut there.
    """

    observations: Any
    actions: Any
    rewards: Any
    masks: Any
    next_observations: Any
    returns: NotRequired[Any]
    next_actions: NotRequired[Any]
    next_known: NotRequired[Any]


Metrics = Mapping[str, Any]
