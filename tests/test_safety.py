"""Whatever a policy sends, what comes out stays within limits, and silence ends at rest."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Plan
from embodied.robot_bridge.profile import Safety
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State, Tick

NAMES = ("a", "b")
LIMITS = Limits(
    NAMES,
    low=np.array([-1.0, -2.0]),
    high=np.array([1.0, 2.0]),
    velocity=np.array([2.0, 1.0]),
    acceleration=np.array([10.0, 5.0]),
    jerk=np.array([2000.0, 1000.0]),
    max_step=np.array([0.3, 0.3]),
)
CONFIG = Safety(deadman_required=False)
DT = 1 / CONFIG.rate_hz


class Bench:
    """A filter with a robot that follows it exactly, and a clock."""

    def __init__(self, config: Safety = CONFIG, start: tuple[float, float] = (0.0, 0.0)) -> None:
        self.filter, self.now, self.sequence = SafetyFilter(LIMITS, config), 10.0, 0
        self.measured: np.ndarray | None = np.array(start)
        self.path: list[np.ndarray] = []
        self.plans: list[Plan] = []

    def measure(self) -> None:
        if self.measured is not None:
            self.filter.measure(self.measured, np.zeros(2), self.now)

    def run(self) -> "Bench":
        self.measure()
        assert self.filter.request("arm", self.now) == ""
        assert self.filter.request("run", self.now) == ""
        return self

    def offer(self, targets: object, age: float = 0.01, dt: float = 0.1, **changes: object) -> str:
        self.sequence += 1
        rows = np.atleast_2d(np.asarray(targets, np.float64))
        times = dt * np.arange(1, len(rows) + 1)
        chunk = Chunk("r", self.sequence, self.now - age, self.now, NAMES, times, rows)
        return self.filter.offer(dataclasses.replace(chunk, **changes), self.now)

    def tick(self, count: int = 1, follow: bool = True) -> Tick:
        tick = Tick(self.filter.state, "", None, None, ())
        for _ in range(count):
            self.now += DT
            self.measure()
            tick = self.filter.tick(self.now)
            if self.filter.motion is not None:
                self.path.append(self.filter.motion.position)
                if follow and self.measured is not None:
                    self.measured = self.filter.motion.position
            if tick.plan is not None:
                self.plans.append(tick.plan)
        return tick

    def assert_within_limits(self) -> None:
        path = np.array(self.path)
        velocity = np.diff(path, axis=0) / DT
        acceleration = np.diff(velocity, axis=0) / DT
        assert np.isfinite(path).all()
        assert (path >= LIMITS.low - 1e-6).all()
        assert (path <= LIMITS.high + 1e-6).all()
        assert (np.abs(velocity) <= LIMITS.velocity * 1.001 + 1e-6).all()
        assert (np.abs(acceleration) <= LIMITS.acceleration * 1.01 + 1e-6).all()
        for plan in self.plans:
            assert (np.diff(plan.times) > 0).all()
            assert plan.times[0] > 0
            assert not plan.velocities[-1].any()
            assert (plan.positions >= LIMITS.low - 1e-6).all()
            assert (plan.positions <= LIMITS.high + 1e-6).all()


NUMBER = st.one_of(st.floats(-3, 3), st.sampled_from([np.nan, np.inf, -np.inf, 1e9]))
CHUNK = st.tuples(
    st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.02, 0.2, 0.6, -0.5]),  # age
    st.sampled_from([0.0, 0.05, 0.1]),  # dt; 0 does not rise
    st.integers(0, 25),  # ticks until the next
)


@settings(max_examples=40, deadline=None)
@given(st.lists(CHUNK, min_size=1, max_size=8))
def test_any_stream_of_chunks_stays_within_limits_and_never_raises(stream: list) -> None:
    bench = Bench().run()
    for rows, age, dt, ticks in stream:
        bench.offer(rows, age=age, dt=dt)
        bench.tick(ticks)
        if bench.filter.state is State.HOLD:
            bench.filter.request("run", bench.now)
    bench.tick(60)
    bench.assert_within_limits()
    assert bench.filter.state is not State.STOPPED  # STOPPED here would be the filter's own post-check
    assert bench.filter.motion is not None
    assert bench.filter.motion.at_rest


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3)), min_size=3, max_size=12))
def test_same_inputs_give_same_outputs(targets: list) -> None:
    paths = []
    for _ in range(2):
        bench = Bench().run()
        for target in targets:
            bench.offer([target])
            bench.tick(10)
        paths.append(np.array(bench.path))
    np.testing.assert_array_equal(*paths)


def test_a_steady_chunk_stream_is_followed_with_little_lag() -> None:
    bench = Bench().run()
    wanted = []
    for k in range(1, 21):
        bench.offer([[0.03 * k, 0.0]], age=0.0)  # 0.3 rad/s
        for _ in range(10):
            bench.tick()
            wanted.append(0.3 * (bench.now - 10.0))
    lag = np.mean(np.array(wanted)[50:] - np.array(bench.path)[50:, 0]) / 0.3
    assert -0.02 < lag < 0.04  # [s]
    assert {name: count for name, count in bench.filter.counts.items() if count} == {"runs": 1, "chunks": 20}


def test_silence_brings_the_arm_to_rest_in_time() -> None:
    bench = Bench().run()
    for k in range(1, 6):
        bench.offer([[0.15 * k, 0.08 * k]])
        bench.tick(10)
    assert bench.filter.motion is not None
    assert np.abs(bench.filter.motion.velocity).max() > 0.5
    silent_since = bench.now  # the chunk of 0.1 s ago was the last
    while not bench.filter.motion.at_rest:
        bench.tick()
    assert bench.now - silent_since < 0.3
    bench.tick(30)
    assert (bench.filter.state, bench.filter.reason) == (State.HOLD, "no chunk from the policy")


def test_a_long_chunk_is_executed_no_further_than_the_chunk_horizon() -> None:
    bench = Bench().run()
    bench.offer(0.1 * np.arange(1, 11)[:, None] * np.ones(2), age=0.0)  # one second at 1 rad/s
    bench.tick(100)
    stopping = 1.0**2 / (2 * LIMITS.acceleration[0])  # [rad]
    assert 0.1 < bench.path[-1][0] <= CONFIG.chunk_horizon + stopping + 1e-6
    moved = np.flatnonzero(np.diff(np.array(bench.path)[:, 0]))
    assert moved[-1] * DT <= CONFIG.chunk_horizon + 1.0 / LIMITS.acceleration[0] + 4 * DT + 1e-9


def test_hold_ends_by_itself_soon_but_not_late() -> None:
    bench = Bench().run()
    bench.offer([[0.1, 0.1]])
    bench.tick(40)
    assert bench.filter.state is State.HOLD
    assert bench.offer([[0.12, 0.1]]) == ""
    assert bench.filter.state is State.RUNNING
    bench.tick(150)
    assert bench.filter.state is State.HOLD
    assert "HOLD" in bench.offer([[0.14, 0.1]])
    assert bench.filter.request("run", bench.now) == ""
    assert bench.offer([[0.14, 0.1]]) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": np.array([[np.nan, 0.0]])}, "not finite"),
        ({"positions": np.array([[0.1, 0.0, 0.0]])}, "shape"),
        ({"names": ("a", "c")}, "joints are a, c"),
        ({"times": np.array([-0.1])}, "rise"),
        ({"times": np.array([0.1, 0.1]), "positions": np.zeros((2, 2))}, "rise"),
        ({"times": np.zeros(0), "positions": np.zeros((0, 2))}, "shape"),
    ],
)
def test_malformed_chunks_are_rejected_whole_and_hold(changes: dict, reason: str) -> None:
    bench = Bench().run()
    bench.offer([[0.1, 0.0]])
    bench.tick(5)
    assert reason in bench.offer([[0.2, 0.0]], **changes)
    assert bench.filter.state is State.HOLD
    assert bench.filter.counts["rejected"] == 1


@pytest.mark.parametrize(("age", "reason"), [(0.7, "old"), (0.3, "passed"), (-0.2, "future")])
def test_untimely_chunks_are_rejected_without_a_hold(age: float, reason: str) -> None:
    bench = Bench().run()
    assert reason in bench.offer([[0.1, 0.0]], age=age)
    assert bench.filter.state is State.RUNNING


def test_repeated_and_reordered_chunks_are_ignored() -> None:
    bench = Bench().run()
    assert bench.offer([[0.1, 0.0]], sequence=5) == ""
    assert "older" in bench.offer([[0.2, 0.0]], sequence=5)
    assert "older" in bench.offer([[0.2, 0.0]], sequence=4)
    assert bench.offer([[0.2, 0.0]], run="another", sequence=1) == ""


def test_first_target_far_away_is_refused() -> None:
    bench = Bench().run()
    assert "too far away" in bench.offer([[0.0, 0.5]])
    assert bench.filter.state is State.HOLD
    assert "HOLD" in bench.offer([[0.0, 0.1]])  # an operator must look first


def test_targets_are_clamped_to_the_measured_joint_and_counted() -> None:
    bench = Bench().run()
    for k in range(8):
        bench.offer([[0.1 * (k + 1), 0.0]])
        bench.tick(10, follow=False)  # the robot is stuck
    assert max(p[0] for p in bench.path) <= LIMITS.max_step[0] + 1e-6
    assert bench.filter.counts["clamped"] > 20


def test_a_robot_that_does_not_follow_is_noticed() -> None:
    bench = Bench(dataclasses.replace(CONFIG, tracking_error=0.1)).run()
    for k in range(8):
        bench.offer([[0.1 * (k + 1), 0.0]])
        bench.tick(10, follow=False)
    assert bench.filter.state is State.HOLD
    assert "a does not follow" in bench.filter.reason


def test_stale_joint_states_hold_then_stop() -> None:
    bench = Bench().run()
    for k in range(5):
        bench.offer([[0.1 * (k + 1), 0.0]])
        bench.tick(10)
    bench.measured = None
    bench.tick(15)
    assert (bench.filter.state, bench.filter.reason) == (State.HOLD, "joint states are stale")
    bench.tick(45)
    assert bench.filter.state is State.STOPPED
    assert bench.filter.motion is not None
    assert bench.filter.motion.at_rest
    assert "STOPPED" in bench.offer([[0.1, 0.0]])
    bench.assert_within_limits()


def test_nan_measurements_count_as_none() -> None:
    bench = Bench().run()
    bench.measured = np.array([np.nan, 0.0])
    bench.tick(20, follow=False)
    assert bench.filter.reason == "joint states are stale"


def test_stop_is_latched_until_reset_and_arm() -> None:
    bench = Bench().run()
    bench.offer([[0.2, 0.0]])
    bench.tick(5)
    assert bench.filter.request("reset", bench.now) != ""  # moving
    bench.filter.request("stop", bench.now)
    for mode in ("run", "arm"):
        assert "STOPPED" in bench.filter.request(mode, bench.now)
    assert bench.tick(50).plan is not None or bench.plans  # it keeps holding
    assert bench.filter.request("reset", bench.now) == ""
    sent = len(bench.plans)
    bench.tick(10)
    assert len(bench.plans) == sent  # INACTIVE says nothing
    assert bench.filter.request("arm", bench.now) == ""


def test_estop_brakes_falls_silent_and_latches() -> None:
    bench = Bench().run()
    for k in range(4):
        bench.offer([[0.15 * (k + 1), 0.0]])
        bench.tick(10)
    bench.filter.set_estop(True, bench.now)
    bench.tick(30)
    bench.assert_within_limits()
    sent = len(bench.plans)
    bench.tick(20)
    assert len(bench.plans) == sent
    assert "pressed" in bench.filter.request("reset", bench.now)
    bench.filter.set_estop(False, bench.now)
    assert "ESTOP" in bench.filter.request("run", bench.now)
    assert bench.filter.request("reset", bench.now) == ""
    assert bench.filter.state is State.INACTIVE


def test_a_released_deadman_holds() -> None:
    bench = Bench(dataclasses.replace(CONFIG, deadman_required=True))
    bench.measure()
    assert "deadman" in bench.filter.request("arm", bench.now)
    bench.filter.set_deadman(True, bench.now)
    bench.run()
    bench.offer([[0.1, 0.0]])
    bench.tick(5)
    bench.filter.set_deadman(False, bench.now)
    bench.tick()
    assert bench.filter.state is State.HOLD


@pytest.mark.parametrize(
    ("position", "velocity", "obstacle", "reason"),
    [
        ([0.0, 2.5], [0, 0], "", "b stands at 2.500"),
        ([0.0, 0.0], [0.2, 0], "", "a moves"),
        ([0.0, 0.0], [0, 0], "nobody subscribes", "nobody subscribes"),
    ],
)
def test_arming_is_refused(position: list, velocity: list, obstacle: str, reason: str) -> None:
    safety = SafetyFilter(LIMITS, CONFIG)
    assert "stale" in safety.request("arm", 1.0)
    safety.measure(np.array(position), np.array(velocity, float), 1.0)
    assert reason in safety.request("arm", 1.0, obstacle)
    assert safety.state is State.INACTIVE
