"""What the adapters have in common that command velocities: zeros when it is over, and no drift from the path."""

import collections
from typing import Any

import numpy as np

from embodied.robot_bridge.adapter_topic import TopicAdapter, checked
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.safety import State, Tick

GAIN = 2.0  # a drift decays with this rate [1/s]
DEAD_BAND = 1e-3  # a smaller drift is left alone [rad, m]
LAG = 0.15  # a joint that is where it was told to be within this time lags behind, it has not drifted [s]
CORRECTION = 0.1  # share of the velocity limit that correcting a drift may take
ZEROS = 20  # zeros sent after the last motion: the topic is one deep, and a lost zero would leave an arm moving


class Velocities:
    """Velocities that follow the filter's motion and take back what an open loop drifts off.

    Their rate of change stays within the acceleration limits even when the measurement jumps.
    """

    def __init__(self, limits: Limits, dt: float) -> None:
        self._limits, self._dt = limits, dt
        self._last = np.zeros(len(limits.names))
        self._told = collections.deque[np.ndarray](maxlen=max(2, round(LAG / dt)))  # recent commanded positions (J,)

    def step(self, tick: Tick, measured: np.ndarray) -> np.ndarray | None:
        """(J,) for this tick; None where the filter has nothing to say. Stopped and at rest, it is zero."""
        motion, limits = tick.motion, self._limits
        if motion is None:
            self._last = np.zeros_like(self._last)
            self._told.clear()
            return None
        self._told.append(motion.position)
        told = np.stack(self._told)
        drift = np.clip(measured, told.min(axis=0), told.max(axis=0)) - measured
        drift = np.where(np.isfinite(drift) & (np.abs(drift) > DEAD_BAND), drift, 0.0)
        if tick.state in (State.STOPPED, State.ESTOP):
            drift = np.zeros_like(drift)
        most = CORRECTION * limits.velocity
        wanted = np.clip(motion.velocity + np.clip(GAIN * drift, -most, most), -limits.velocity, limits.velocity)
        change = limits.acceleration * self._dt
        self._last = np.clip(wanted, self._last - change, self._last + change)
        return self._last


class VelocityAdapter(TopicAdapter):
    """Sends the velocity of `tick.motion` at every tick, and zeros after the motion has ended."""

    def __init__(self, profile: Profile, transport: Any, limits: Limits | None = None) -> None:
        super().__init__(profile, transport)
        self.limits = limits or self.limits
        self._velocities = Velocities(self.limits, 1.0 / profile.safety.rate_hz)
        self._count, self._zeros = len(self.names), 0

    def send(self, tick: Tick, measured: np.ndarray, now: float, stamp_ns: int) -> bool:
        velocity = self._velocities.step(tick, measured)
        if velocity is None:
            if self._zeros:
                self._zeros -= 1
                self.topic.write(self.encode(np.zeros(self._count), stamp_ns))
            return False
        self._zeros = ZEROS
        self.topic.write(self.encode(checked(velocity[: self._count], self._count), stamp_ns))
        return True

    def leave(self, stamp_ns: int) -> None:
        self.topic.write(self.encode(np.zeros(self._count), stamp_ns))

    def encode(self, velocity: np.ndarray, stamp_ns: int) -> bytes:
        """The message of (J,) velocities."""
        raise NotImplementedError
