"""When a simulated episode ends: rules by hand for known environments, none, or a head that the dynamics learn.

A rule sees observations in their own units, never normalised ones, and is written next to the numbers that it needs in
the dynamics' bundle. `agreement` holds it against recorded ends: units or an order other than the rule's show there.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import ConfigError, suggest

Rule = Callable[[Tensor], Tensor]  # next observations (..., D) -> ended (...,) bool


def _finite(s: Tensor) -> Tensor:
    return torch.isfinite(s).all(-1)


def _never(s: Tensor) -> Tensor:
    return torch.zeros(s.shape[:-1], dtype=torch.bool, device=s.device)


def _hopper(s: Tensor) -> Tensor:
    """Observation: height [m], torso angle [rad], joints, velocities. As MBPO and Gymnasium's `Hopper.is_healthy`."""
    healthy = _finite(s) & (s[..., 1:].abs() < 100).all(-1) & (s[..., 0] > 0.7) & (s[..., 1].abs() < 0.2)
    return ~healthy


def _walker2d(s: Tensor) -> Tensor:
    healthy = _finite(s) & (s[..., 0] > 0.8) & (s[..., 0] < 2.0) & (s[..., 1].abs() < 1.0)
    return ~healthy


def _ant(s: Tensor) -> Tensor:
    return ~(_finite(s) & (s[..., 0] >= 0.2) & (s[..., 0] <= 1.0))


def _inverted_pendulum(s: Tensor) -> Tensor:
    """Observation: cart position [m], pole angle [rad], their velocities."""
    return ~(_finite(s) & (s[..., 1].abs() <= 0.2))


def _inverted_double_pendulum(s: Tensor) -> Tensor:
    """Observation: cart position [m], sin of both angles, cos of both, ...; ends when the tip is at most 1 m high."""
    sin, cos = s[..., 1:3], s[..., 3:5]
    tip = 0.6 * cos[..., 0] + 0.6 * (cos[..., 0] * cos[..., 1] - sin[..., 0] * sin[..., 1])
    return ~(_finite(s) & (tip > 1.0))


# name -> (rule, smallest observation it can read)
RULES: dict[str, tuple[Rule, int]] = {
    "none": (_never, 0),
    "halfcheetah": (_never, 0),
    "swimmer": (_never, 0),
    "reacher": (_never, 0),
    "hopper": (_hopper, 11),
    "walker2d": (_walker2d, 17),
    "ant": (_ant, 27),
    "invertedpendulum": (_inverted_pendulum, 4),
    "inverteddoublependulum": (_inverted_double_pendulum, 8),
}
LEARNED = "learned"


def find_rule(name: str, observation_size: int) -> Rule:
    """The rule of a name in `RULES`. ConfigError on an unknown name, or on observations too short for it."""
    if name not in RULES:
        raise ConfigError(f"Unknown termination '{name}'.{suggest(name, [*RULES, LEARNED])}")
    rule, needed = RULES[name]
    if observation_size < needed:
        raise ConfigError(
            f"Termination '{name}' reads {needed} numbers; these observations have {observation_size}.\n"
            "Keep the environment's own observation, or choose none or learned."
        )
    return rule


def choose(environment: str, any_terminal: bool) -> str:
    """What `auto` means: the rule of the environment's name (`Hopper-v5`, `hopper-medium-v2`); without one, `learned`
    where the data has terminations and `none` where it has not."""
    plain = environment.lower().replace("-", "").replace("_", "").split("/")[-1]
    for name in sorted(RULES, key=len, reverse=True):
        if name != "none" and plain.startswith(name):
            return name
    return LEARNED if any_terminal else "none"


def agreement(rule: Rule, next_observations: np.ndarray, terminated: np.ndarray, rows: int = 65_536) -> dict[str, int]:
    """Recorded ends against the rule's: counts `both`, `only_rule`, `only_recorded`, `neither`.

    Args:
        next_observations: (N, D) in the dataset's own units.
        terminated: (N,) bool as recorded; a time-out is none.
    """
    blocks = [torch.from_numpy(next_observations[i : i + rows]) for i in range(0, len(next_observations), rows)]
    ruled = np.concatenate([rule(block).numpy() for block in blocks]) if blocks else np.zeros(0, bool)
    return {
        "both": int((ruled & terminated).sum()),
        "only_rule": int((ruled & ~terminated).sum()),
        "only_recorded": int((~ruled & terminated).sum()),
        "neither": int((~ruled & ~terminated).sum()),
    }
