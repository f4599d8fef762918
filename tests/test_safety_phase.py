"""Ticks that come early, late or half a tick beside the filter's grid: the path goes on evenly, and never back."""

import numpy as np
import pytest

from embodied.robot_bridge.chunk import Chunk
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.machine import State
from embodied.robot_bridge.profile import Safety
from embodied.robot_bridge.safety import SafetyFilter

DT, NAMES = 0.005, ("one", "two")
LOW, HIGH, VELOCITY, ACCELERATION, JERK, MAX_STEP = (np.full(2, x) for x in (-3.0, 3.0, 1.0, 8.0, 500.0, 0.5))
LIMITS = Limits(NAMES, LOW, HIGH, VELOCITY, ACCELERATION, JERK, MAX_STEP)
SAFETY = Safety(rate_hz=1 / DT, deadman_required=False, chunk_horizon=1.0, max_clamped_time=9.0)


def follow(times: np.ndarray, streaming: bool) -> tuple[SafetyFilter, list[float]]:
    """A filter that is ticked at `times`, asked to go on at 0.4 rad/s; where it was told to be."""
    safety, told, chunks = SafetyFilter(LIMITS, SAFETY, streaming=streaming), [], 0
    safety.measure(np.zeros(2), np.zeros(2), 0.0)
    assert safety.request("arm", 0.0) == safety.request("run", 0.0) == ""
    for now in times.tolist():
        if now >= 0.05 * chunks:
            chunks += 1
            at = np.arange(1, 9) * 0.05
            safety.offer(Chunk("run", chunks, now, now, NAMES, at, np.full((8, 2), 0.4) * (now + at)[:, None]), now)
        if safety.motion is not None:
            safety.measure(safety.motion.position, safety.motion.velocity, now)
        safety.tick(now)
        assert safety.motion is not None
        told.append(float(safety.motion.position[0]))
    return safety, told


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("phase", [0.3, 0.5, 0.7])
def test_a_phase_beside_the_grid_neither_skips_nor_doubles_ticks(streaming: bool, phase: float) -> None:
    rng = np.random.default_rng(0)
    times = DT * (np.arange(1, 301) + rng.uniform(-0.05, 0.05, 300))
    times[20:] += phase * DT
    safety, told = follow(times, streaming)
    assert safety.state is State.RUNNING
    assert safety.counts["missed_ticks"] == 0
    steps = np.diff(told[100:])
    assert steps.min() > 0.3 * DT  # 0.4 rad/s, at every tick
    assert steps.max() < 0.5 * DT


@pytest.mark.parametrize("streaming", [False, True])
def test_bursts_of_ticks_after_a_pause_never_lead_back(streaming: bool) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        gaps = np.where(rng.random(300) < 0.3, rng.uniform(0.0, 0.3, 300), 1.0)
        gaps = np.where(rng.random(300) < 0.1, rng.uniform(1.0, 4.0, 300), gaps)
        safety, told = follow(np.cumsum(DT * gaps), streaming)
        assert (safety.state, safety.counts["violations"], safety.counts["bugs"]) == (State.RUNNING, 0, 0)
        assert np.diff(told).min() > -1e-9
