"""What the safety process says about itself: /bridge/state, /diagnostics, and how long things took."""

import math
from typing import Any

from embodied.robot_bridge import messages
from embodied.robot_bridge.qos import DEFAULT, LATCHED
from embodied.robot_bridge.safety import State
from embodied.robot_bridge.scheduling import Lateness, Percentiles
from embodied.robot_bridge.tick_messages import diagnostics

DIAGNOSTICS_TOPIC = "/diagnostics"
STATE_HZ, DIAGNOSTICS_HZ = 10.0, 1.0
_LEVEL = {State.RUNNING: 0, State.ARMED: 0, State.INACTIVE: 0, State.HOLD: 1}


class SafetyReport:
    """Publishes the state at STATE_HZ and when told to; keeps the latest latencies.

    Attributes:
        tick_cost: of a whole tick [s].
        command_cost: from its beginning until its command was written [s]; only of ticks that sent one.
        lateness: of the ticks, against the profile's rate.
        observation_to_command: from the newest observation of a chunk to the first command made from it [s].
    """

    def __init__(self, transport: Any, topic: str, rate_hz: float) -> None:
        self._state = transport.publisher(topic, messages.DIAGNOSTIC_ARRAY, LATCHED)
        self._diagnostics = transport.publisher(DIAGNOSTICS_TOPIC, messages.DIAGNOSTIC_ARRAY, DEFAULT)
        self._every, self._ticks = round(rate_hz / STATE_HZ), 0
        self._second = round(self._every * STATE_HZ / DIAGNOSTICS_HZ)
        self.tick_cost, self.command_cost = Percentiles(round(10 * rate_hz)), Percentiles(round(10 * rate_hz))
        self.lateness = Lateness(rate_hz)
        self.observation_to_command = Percentiles(200)
        self._latencies: dict[str, str] = {}
        self._fresh = False  # the latencies are of this second

    def due(self) -> bool:
        """Once per tick: whether the state is to be published though nothing has changed."""
        self._ticks += 1
        return (self._ticks - 1) % self._every == 0

    def between_ticks(self) -> None:
        """Sort some thousand numbers for the next tick that publishes them, once per second."""
        if not self._fresh and self._ticks % self._second == 0:
            self._latencies, self._fresh = self._quantiles(), True

    def publish(self, stamp_ns: int, state: State, reason: str, ages: dict[str, float], values: dict[str, Any]) -> None:
        """Send the state.

        Args:
            ages: of the inputs [s]; left out if there never was one.
            values: what else there is to say: counts, the profile's fingerprint, ...
        """
        every_second = self._ticks % self._second == 1
        if not self._fresh and (every_second or not self._latencies):
            self._latencies = self._quantiles()
        self._fresh = False
        shown = {"state": state, "reason": reason, **values, **self._latencies}
        shown |= {f"{name}_age_ms": f"{age * 1e3:.1f}" for name, age in ages.items() if math.isfinite(age)}
        data = diagnostics(stamp_ns, "safety", _LEVEL.get(state, 2), reason, shown)
        self._state.write(data)
        if every_second:
            self._diagnostics.write(data)

    def _quantiles(self) -> dict[str, str]:
        found = {}
        for name, values in (
            ("tick", self.tick_cost),
            ("tick_to_command", self.command_cost),
            ("lateness", self.lateness.recent),
            ("observation_to_command", self.observation_to_command),
        ):
            for label, value in zip(("p50", "p99"), values.quantiles(0.5, 0.99), strict=True):
                if not math.isnan(value):
                    found[f"{name}_{label}_ms"] = f"{value * 1e3:.3f}"
        return found
