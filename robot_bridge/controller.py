"""What the simulated robot's controllers share. Each drives some joints; none knows MuJoCo or a transport."""

import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moment:
    """One step of the control loop.

    Attributes:
        now: physics clock [s].
        stamp_ns: the same moment on the clock of message stamps [ns].
        dt: length of the step [s].
        position, velocity: measured (J,), in the order of the controller's `names`.
    """

    now: float
    stamp_ns: int
    dt: float
    position: np.ndarray
    velocity: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a controller wants now: (J,) each. Acceleration is None where it is not known."""

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray | None = None


class Controller(Protocol):
    """A controller of `names`. `receive` takes a command, `update` runs once per control step."""

    names: tuple[str, ...]

    def hold(self, position: np.ndarray) -> None:
        """Forget every command and stay at `position` (J,)."""
        ...

    def receive(self, data: bytes, moment: Moment) -> str:
        """Take a message's CDR bytes. Returns why it is refused, "" if it is accepted; InputError if malformed."""
        ...

    def update(self, moment: Moment) -> Reference:
        """The targets of this step; the simulated servos follow the position."""
        ...
