"""A stream of noisy chunks is followed within the limits and without lag."""

import dataclasses

import numpy as np
import pytest

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.profile import Safety
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State

FREE = Safety(deadman_required=False, tracking_error=9.0, max_clamped_time=1e6, action_delay=0.0)


def limits(velocity: float, acceleration: float, jerk: float) -> Limits:
    low, high, v, a, j, step = (np.array([x]) for x in (-3.0, 3.0, velocity, acceleration, jerk, 2.0))
    return Limits(("a",), low, high, v, a, j, step)


@dataclasses.dataclass(frozen=True)
class Followed:
    """How a sine was followed; lag in seconds, error in rad."""

    acceleration: float
    jerk: float
    lag: float
    error: float


def follow(
    bound: Limits, config: Safety, amplitude: float, chunk_hz: float, points: int, noise: float, latency: float
) -> Followed:
    """Chunks of a 0.3 Hz sine, each off by noise of its own, to a robot that goes where it is told."""
    rng, dt = np.random.default_rng(0), 1 / config.rate_hz
    safety = SafetyFilter(bound, config)

    def wanted(times: np.ndarray) -> np.ndarray:
        return amplitude * np.sin(2 * np.pi * 0.3 * times)

    safety.measure(np.zeros(1), np.zeros(1), 0.0)
    assert safety.request("arm", 0.0) == safety.request("run", 0.0) == ""
    told, waiting, observed_at, sequence = [], [], 0.0, 0
    for tick in range(round(15 / dt)):
        now = tick * dt
        if now >= observed_at - 1e-9:
            times = np.arange(1, points + 1) / chunk_hz
            rows = wanted(observed_at + times)[:, None] + noise * rng.standard_normal()
            sequence, observed_at = sequence + 1, observed_at + 1 / chunk_hz
            waiting.append((now + latency, Chunk("r", sequence, now, now + latency, ("a",), times, rows)))
        if waiting and waiting[0][0] <= now + 1e-9:
            assert safety.offer(waiting.pop(0)[1], now) == ""
        motion = safety.tick(now).motion
        assert motion is not None
        safety.measure(motion.position, motion.velocity, now)
        told.append(motion.position[0])
    assert safety.state is State.RUNNING
    path, at = np.array(told), dt * np.arange(1, len(told) + 1)
    late = at > 3
    lags = np.arange(-0.05, 0.15, 0.001)
    due = at - config.action_delay
    errors = [np.sqrt(np.mean((path[late] - wanted(due[late] - lag)) ** 2)) for lag in lags]
    return Followed(
        float(np.abs(np.diff(path, 2)).max() / dt**2),
        float(np.abs(np.diff(path, 3)).max() / dt**3),
        float(lags[int(np.argmin(errors))]),
        float(np.sqrt(np.mean((path[late] - wanted(due[late])) ** 2))),
    )


@pytest.mark.parametrize("amplitude", [0.5, 0.8])
@pytest.mark.parametrize("latency", [0.0, 0.06])
def test_a_noisy_sine_in_overlapping_chunks_is_smooth_and_in_time(amplitude: float, latency: float) -> None:
    """20 Hz chunks of 8, 0.015 rad of noise on each; 250 Hz, limits 2 rad/s, 10 rad/s², 500 rad/s³."""
    config = dataclasses.replace(FREE, rate_hz=250.0, command_every=2, chunk_horizon=0.4)
    found = follow(limits(2.0, 10.0, 500.0), config, amplitude, 20.0, 8, 0.015, latency)
    assert found.acceleration <= 10.0 * 1.001
    assert found.jerk <= 500.0 * 1.001
    assert abs(found.lag) <= 0.010
    assert found.error < 0.02
    blind = follow(
        limits(2.0, 10.0, 500.0), dataclasses.replace(config, look_ahead=0.0), amplitude, 20.0, 8, 0.015, latency
    )
    assert blind.lag > 0.035
    assert blind.error > 1.5 * found.error


def test_single_targets_at_10_hz_are_followed_without_stops_between_them() -> None:
    """As the simulated Panda gets them: each target lasts just until the next arrives."""
    config = dataclasses.replace(FREE, action_delay=0.03)
    found = follow(limits(2.175, 60.0, 20000.0), config, 0.5, 10.0, 1, 0.0, 0.02)
    assert abs(found.lag) <= 0.005
    assert found.error < 0.002


def test_a_slow_arm_lags_no_more_than_a_fast_one() -> None:
    """At 30 % of a UR5e's acceleration a stop from full speed takes 0.4 s; the chunk says early enough what comes."""
    config = dataclasses.replace(FREE, rate_hz=200.0, command_every=4, chunk_horizon=0.4, action_delay=0.03)
    found = follow(limits(0.9, 2.4, 500.0), config, 0.3, 10.0, 8, 0.003, 0.04)
    assert found.acceleration <= 2.4 * 1.001
    assert abs(found.lag) <= 0.010
    assert found.error < 0.005
