"""What keeps a loop's ticks on time in Python, as far as it goes, and what tells how late they were.

This is no hard real time, and safety does not rest on it: 100 to 250 Hz are held softly, and a controller that hears
nothing brings the arm to rest.
"""

import argparse
import gc
import logging
import os
from types import TracebackType

import numpy as np

PRIORITY = 50  # what ros2_control's own loop asks for
log = logging.getLogger("scheduling")

WINDOW = 10.0  # lateness is judged over so long [s]


def add_priority(parser: argparse.ArgumentParser) -> None:
    """The flag of a process that has a loop to keep."""
    parser.add_argument(
        "--priority",
        type=int,
        default=PRIORITY,
        help="SCHED_FIFO priority, 1 to 99, if permitted; 0: ordinary scheduling",
    )


def raise_priority(priority: int) -> str:
    """Run this thread ahead of others: SCHED_FIFO, else a negative nice value, else as it is. Says which, in words.

    Threads that it has started, and will start, stay ordinary: what receives messages may wait, a tick may not.

    Args:
        priority: SCHED_FIFO priority, 1 to 99; 0 asks for nothing.
    """
    if priority <= 0:
        return "ordinary scheduling"
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        return f"SCHED_FIFO, priority {priority}"
    except (OSError, AttributeError) as error:
        refused = error
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        return f"nice -10: SCHED_FIFO was refused ({refused})"
    except (OSError, AttributeError):
        return f"ordinary scheduling: SCHED_FIFO was refused ({refused}); see rtprio in /etc/security/limits.conf"


class Collector:
    """Garbage collection between ticks instead of within them; a context manager around the loop."""

    EVERY = 100  # calls between two collections of the young generation
    FULL = 100  # of those, every so many collects everything

    def __init__(self) -> None:
        self._calls, self._was_on = 0, True

    def __enter__(self) -> "Collector":
        self._was_on = gc.isenabled()
        gc.collect()
        gc.freeze()  # what was imported is never looked at again
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_on:
            gc.enable()

    def between_ticks(self) -> None:
        """Call after a tick, when there is time until the next."""
        self._calls += 1
        if self._calls % self.EVERY == 0:
            gc.collect(2 if self._calls % (self.EVERY * self.FULL) == 0 else 0)


class Percentiles:
    """The last `count` of a quantity."""

    def __init__(self, count: int) -> None:
        self._values, self._count = np.zeros(count), 0

    def add(self, value: float) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def clear(self) -> None:
        self._count = 0

    @property
    def full(self) -> bool:
        return self._count >= len(self._values)

    def at(self, share: float) -> float:
        """The value below which `share` of them lie; NaN without any."""
        return self.quantiles(share)[0]

    def quantiles(self, *shares: float) -> list[float]:
        """`at` of each."""
        if not self._count:
            return [float("nan")] * len(shares)
        return np.quantile(self._values[: self._count], shares).tolist()


class Lateness:
    """How much later than on the grid of its period a loop's ticks began."""

    def __init__(self, hz: float) -> None:
        self.period = 1.0 / hz
        self.recent = Percentiles(round(WINDOW * hz))
        self._due = -np.inf
        self._until_judged = 0

    def started(self, now: float) -> None:
        """A tick began. One that is early, or late by more than a period, begins a new grid."""
        late = now - self._due
        if not 0 <= late <= self.period:
            self._due = now
        self.recent.add(max(0.0, late) if late < np.inf else 0.0)
        self._due += self.period
        self._until_judged += 1

    def verdict(self) -> str:
        """Once per window: empty, or by how much the loop does not keep its rate."""
        if not self.recent.full or self._until_judged < round(WINDOW / self.period):
            return ""
        self._until_judged = 0
        late = self.recent.at(0.99)
        if late <= self.period / 2:
            return ""
        period = self.period * 1e3
        return f"1 % of the ticks in {WINDOW:g} s were more than {late * 1e3:.1f} ms late; the period is {period:g} ms"
