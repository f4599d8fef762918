"""Ten thousand random streams of chunks, operators, measurements and pauses: limits hold, motion ends, nothing raises.

What is checked is what the robot would execute: each plan as a joint_trajectory_controller interpolates it, a cubic
between points, from the state in which the plan before left it; and, for the adapters that stream, every motion.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.machine import Cause
from embodied.robot_bridge.motion_filter import Motion, Plan
from embodied.robot_bridge.profile import Safety
from embodied.robot_bridge.safety import Chunk, SafetyFilter, State, Tick

SEQUENCES = 10_000
SLACK = 1.001
SENDS = (State.ARMED, State.RUNNING, State.HOLD, State.STOPPED, State.ESTOP)


@dataclasses.dataclass
class Segments:
    """Pieces of cubics with the limits that apply, collected to be checked all at once."""

    rows: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(
        self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray, start_bend: np.ndarray, limits: Limits
    ) -> None:
        """Knots (K,), (K, J), (K, J) and the acceleration (J,) with which the robot arrives at the first."""
        h = np.diff(times)[:, None]
        p, v0, v1 = np.diff(positions, axis=0) / h, velocities[:-1], velocities[1:]
        bend0, bend1 = (6 * p - 4 * v0 - 2 * v1) / h, (2 * v0 + 4 * v1 - 6 * p) / h
        jerk = (bend1 - bend0) / h
        turn = np.divide(-bend0, jerk, out=np.zeros_like(jerk), where=jerk != 0)
        top = np.where((turn > 0) & (turn < h), v0 + bend0 * turn / 2, 0.0)
        speed = np.maximum(np.maximum(np.abs(v0), np.abs(v1)), np.abs(top))
        leap = np.abs(bend0 - np.vstack([start_bend, bend1[:-1]]))
        joints = np.ones((len(h), 1))
        self.rows.append(
            np.stack(
                [
                    speed - limits.velocity * SLACK,
                    np.maximum(np.abs(bend0), np.abs(bend1)) - limits.acceleration * SLACK,
                    np.abs(jerk) - limits.jerk * SLACK,
                    leap - 1e-3 * limits.acceleration - 1e-6 / h,  # acceleration is continuous
                    joints * limits.low - positions[1:] - 1e-6,
                    positions[1:] - joints * limits.high - 1e-6,
                ]
            ).reshape(6, -1)
        )

    def worst(self) -> np.ndarray:
        """(6,) the largest excess of velocity, acceleration, jerk, continuity, and both ends of the box."""
        return np.concatenate(self.rows, axis=1).max(axis=1)


class Controller:
    """Executes plans; keeps what it did for the check."""

    def __init__(self, limits: Limits, position: np.ndarray) -> None:
        self.limits, still = limits, np.zeros_like(position)
        self.plan, self.at = Plan(np.array([0.0, 1e-3]), np.stack([position] * 2), np.zeros((2, len(still)))), -1.0

    def state(self, now: float) -> Motion:
        """Where the plan has led by `now`."""
        plan, since = self.plan, now - self.at
        if since >= plan.times[-1] - 1e-9:
            still = np.zeros_like(plan.velocities[-1])
            return Motion(plan.positions[-1], still, still)
        k = max(0, int(np.searchsorted(plan.times, since + 1e-9, side="right")) - 1)
        h = plan.times[k + 1] - plan.times[k]
        s = since - plan.times[k]
        p0, v0, v1 = plan.positions[k], plan.velocities[k], plan.velocities[k + 1]
        mean = (plan.positions[k + 1] - p0) / h
        bend, jerk = (6 * mean - 4 * v0 - 2 * v1) / h, (6 * v0 + 6 * v1 - 12 * mean) / h**2
        return Motion(p0 + s * (v0 + s * (bend / 2 + s * jerk / 6)), v0 + s * (bend + s * jerk / 2), bend + s * jerk)

    def take(self, plan: Plan, now: float, segments: Segments) -> None:
        here = self.state(now)
        assert (np.diff(plan.times) > 0).all()
        assert plan.times[0] > 0
        assert not plan.velocities[-1].any()
        times = np.concatenate([[0.0], plan.times])
        positions, velocities = np.vstack([here.position, plan.positions]), np.vstack([here.velocity, plan.velocities])
        segments.add(times, positions, velocities, here.acceleration, self.limits)
        self.plan, self.at = Plan(times, positions, velocities), now


def pick(rng: np.random.Generator, *options: Any) -> Any:
    """One of the options; much faster than `rng.choice`."""
    return options[int(rng.random() * len(options))]


class HalfSpace:
    """A workspace: the weighted sum of the joints stays below a bound."""

    def __init__(self, weights: np.ndarray, bound: float) -> None:
        self.weights, self.bound = weights, bound

    def outside(self, q: np.ndarray) -> str:
        return "the tool leaves the workspace" if self.weights @ q > self.bound else ""


class World:
    """A random robot, policy and operator around one filter, drawn from `rng` alone."""

    def __init__(self, rng: np.random.Generator, segments: Segments) -> None:
        self.rng, self.segments = rng, segments
        joints = int(rng.integers(1, 4))
        self.names = tuple(f"j{k}" for k in range(joints))
        low = rng.uniform(-2, -0.1, joints)
        self.limits = Limits(
            self.names,
            low,
            low + rng.uniform(0.1, 3, joints),
            velocity=10 ** rng.uniform(-1, 0.7, joints),
            acceleration=10 ** rng.uniform(-0.3, 1.8, joints),
            jerk=10 ** rng.uniform(1.0, 4.3, joints),
            max_step=rng.uniform(0.02, 0.5, joints),
        )
        self.config = Safety(
            rate_hz=pick(rng, 50.0, 100.0, 200.0),
            command_every=int(rng.integers(1, 5)),
            action_delay=pick(rng, 0.0, 0.03),
            chunk_horizon=pick(rng, 0.1, 0.3),
            chunk_blend=pick(rng, 0.0, 0.05),
            tracking_error=0.03,
            tracking_time=0.001,
            stop_after_hold=0.05,
            max_clamped_time=0.1,
            deadman_required=bool(rng.random() < 0.3),
            estop_required=bool(rng.random() < 0.2),
        )
        self.dt, self.now = 1.0 / self.config.rate_hz, pick(rng, 0.0, 100.0, 1e6)
        self.streaming = bool(rng.random() < 0.3)
        start = rng.uniform(self.limits.low, self.limits.high)
        self.workspace = HalfSpace(rng.uniform(-1, 1, joints), 0.0) if rng.random() < 0.3 else None
        if self.workspace is not None:
            self.workspace.bound = float(self.workspace.weights @ start) + rng.uniform(0.0, 0.05)
        self.filter = SafetyFilter(self.limits, self.config, self.workspace, streaming=self.streaming)
        self.measured, self.controller = start, Controller(self.limits, start)
        self.follows, self.sequence, self.streamed, self.measuring = True, 0, [start], True
        self.operator(pressed=False)
        self.measure()
        self.digest, self.states = hashlib.sha256(), set[State]()

    def operator(self, pressed: bool, held: bool = True) -> None:
        self.filter.set_estop(pressed, self.now)
        self.filter.set_deadman(held, self.now)

    def measure(self) -> None:
        self.filter.measure(self.measured, np.zeros_like(self.measured), self.now)

    def chunk(self) -> Chunk:
        """Mostly sound and near; else anything."""
        rng, joints = self.rng, len(self.names)
        count, kind = int(rng.integers(1, 6)), rng.random()
        times = np.cumsum(rng.uniform(0.005, 0.1, count))
        reach = pick(rng, 0.02, 0.1, 1.0)
        positions = self.measured + np.cumsum(rng.uniform(-reach, reach, (count, joints)), axis=0)
        age, self.sequence = pick(rng, 0.0, 0.01, 0.05), self.sequence + 1
        chunk = Chunk("r", self.sequence, self.now - age, self.now, self.names, times, positions)
        if kind < 0.7:
            return chunk
        where = (int(rng.integers(count)), int(rng.integers(joints)))
        if kind < 0.76:
            positions[where] = pick(rng, np.nan, np.inf, -np.inf, 1e9, -1e300)
        elif kind < 0.82:
            positions[where] += pick(rng, -3.0, 3.0)
        else:
            changes = (
                lambda: {"observed_at": self.now - rng.uniform(0.1, 2.0)},
                lambda: {"observed_at": self.now + rng.uniform(0.01, 1.0)},
                lambda: {"sequence": self.sequence - pick(rng, 0, 1, 2)},
                lambda: {"run": pick(rng, "r", "s", "t")},
                lambda: {"names": ("other", *self.names[1:])},
                lambda: {"names": self.names[::-1]},
                lambda: {"positions": positions[:, :-1]},
                lambda: {"positions": positions[:-1]},
                lambda: {"times": times[::-1]},
                lambda: {"times": times * pick(rng, 0.0, -1.0, np.nan, 1e9)},
                lambda: {"times": np.array("x"), "positions": np.array(["a"], object)},
                lambda: {"observed_at": np.nan},
            )
            chunk = dataclasses.replace(chunk, **pick(rng, *changes)())
        return chunk

    def disturb(self) -> None:
        """Something that an operator, a robot or the computer does."""
        rng, now = self.rng, self.now
        what = int(rng.integers(10))
        if what < 2:
            self.request(str(pick(rng, "arm", "run", "hold", "stop", "reset", "x")))
        elif what == 2:
            self.operator(pressed=bool(rng.random() < 0.5), held=bool(rng.random() < 0.5))
        elif what == 3:
            self.follows = not self.follows
        elif what == 4:
            self.measured = self.measured + rng.uniform(-0.3, 0.3, len(self.names))
        elif what == 5:
            self.filter.measure(self.measured * np.nan, self.measured, now)
        elif what == 6:
            self.filter.measure(self.measured[:-1], self.measured, now)
        elif what == 7:
            self.now += self.dt * int(rng.integers(1, 60))  # the process stood still
            self.streamed = []
        elif what == 8 and rng.random() < 0.3:
            self.filter.clock_jumped(now)
        elif what == 9:
            self.hang()

    def hang(self) -> None:
        """The robot does nothing and says nothing, until its joint states are stale; it goes on from where it is."""
        for _ in range(int((self.config.joint_timeout + 0.02) / self.dt)):
            self.measuring, follows, self.follows = False, self.follows, False
            self.tick()
            self.measuring, self.follows = True, follows

    def advance(self) -> None:
        """Go on as an operator would: a stopped arm is reset, armed and run again."""
        if self.filter.state in (State.INACTIVE, State.STOPPED, State.ESTOP, State.ARMED, State.HOLD):
            self.operator(pressed=False)
            self.measure()
            for mode in ("reset", "arm", "run") if self.filter.state is not State.HOLD else ("run",):
                if mode != "run" or self.rng.random() < 0.95:
                    self.request(mode)

    def request(self, mode: str) -> None:
        was = self.filter.state
        if not self.filter.request(mode, self.now) and mode == "arm" and was is State.INACTIVE:
            assert self.filter.motion is not None
            self.controller, self.streamed = Controller(self.limits, self.filter.motion.position), []

    def late(self) -> float:
        """How long after its time a tick comes [s]."""
        return 0.0

    def tick(self) -> Tick:
        if self.measuring and self.rng.random() < 0.9:
            self.measure()
        before, reseeded = self.filter.state, self.filter.counts["reseeded"]
        tick = self.filter.tick(self.now + self.late())
        if self.filter.counts["reseeded"] > reseeded:  # as after arming, all begins where the robot is
            start = self.limits.clip_position(self.measured)
            self.controller, self.streamed = Controller(self.limits, start), []
        self.states.add(tick.state)
        for array in (tick.plan.times, tick.plan.positions, tick.plan.velocities) if tick.plan else ():
            self.digest.update(array.tobytes())
        if tick.motion:
            self.digest.update(tick.motion.position.tobytes())
        self.digest.update("".join(tick.events).encode())
        assert tick.state is State.INACTIVE or before in SENDS or tick.state in SENDS
        if tick.state is State.INACTIVE:
            assert tick.plan is None
            assert tick.motion is None
        elif self.streaming:
            if tick.motion is not None:
                self.streamed.append(tick.motion.position)
        elif tick.plan is not None:
            self.controller.take(tick.plan, self.now, self.segments)
        self.now += self.dt
        if self.follows and tick.motion is not None:
            self.measured = tick.motion.position
        return tick


class Late(World):
    """The same, but every tick is up to a tenth of a tick late."""

    def late(self) -> float:
        return 0.1 * self.dt * (len(self.filter.counts) * self.sequence % 7) / 7


class Prepared(Late):
    """The same, with ticks that are planned ahead, sometimes before what they depend on has changed."""

    taken_over = 0

    def tick(self) -> Tick:
        soon = round(self.now / self.dt) % 3
        if soon:
            self.filter.prepare()
        ahead = self.filter._prepared
        tick = super().tick()
        self.taken_over += bool(ahead and ahead.planned and self.filter._path is ahead.ends)
        if not soon or soon == 2:
            self.filter.prepare()  # a chunk, an operator or the robot may come before the tick
        return tick


def run_sequence(seed: int, segments: Segments, kind: type[World] = World) -> World:
    """Five to seven chunks with what happens between them; returns the world after it."""
    rng = np.random.default_rng(seed)
    world = kind(rng, segments)
    for _ in range(int(rng.integers(5, 8))):
        world.advance()
        world.filter.offer(world.chunk(), world.now)
        for _ in range(int(rng.integers(1, 3))):
            if rng.random() < 0.12:
                world.disturb()
            world.tick()
    return world


def check_streamed(world: World) -> None:
    if len(world.streamed) > 3:
        path = np.array(world.streamed)
        for order, bound in enumerate((world.limits.velocity, world.limits.acceleration, world.limits.jerk), start=1):
            assert (np.abs(np.diff(path, order, axis=0)) <= bound * world.dt**order * SLACK + 1e-9).all()
        assert (path >= world.limits.low - 1e-6).all()
        assert (path <= world.limits.high + 1e-6).all()


def test_ten_thousand_random_streams_keep_every_limit() -> None:
    counts: dict[str, int] = {}
    states: set[State] = set()
    for block in range(0, SEQUENCES, 500):
        segments = Segments()
        for seed in range(block, block + 500):
            world = run_sequence(seed, segments)
            check_streamed(world)
            states |= world.states
            assert not world.filter.counts["bugs"], (seed, world.filter.reason)
            assert not world.filter.counts["violations"], (seed, world.filter.reason)
            for name, count in world.filter.counts.items():
                counts[name] = counts.get(name, 0) + count
        assert (segments.worst() <= 0).all(), (block, segments.worst())
    # The streams did reach what they are meant to reach.
    assert states == set(State)
    for name in counts.keys() - {"bugs", "violations"}:
        assert counts[name] > 20, name


def test_the_same_inputs_give_the_same_bytes() -> None:
    for seed in range(60):
        first, second = (run_sequence(seed, Segments()) for _ in range(2))
        assert first.digest.digest() == second.digest.digest()
        assert first.filter.counts == second.filter.counts


def test_ticks_that_are_planned_ahead_decide_the_same() -> None:
    taken_over = ticks = 0
    for seed in range(1000):
        plain, prepared = (run_sequence(seed, Segments(), kind) for kind in (Late, Prepared))
        assert plain.digest.digest() == prepared.digest.digest(), seed
        assert plain.filter.counts == prepared.filter.counts, seed
        assert isinstance(prepared, Prepared)
        taken_over, ticks = taken_over + prepared.taken_over, ticks + prepared.filter.counts["chunks"]
    assert taken_over > 0.2 * ticks  # most of the rest had nothing to plan


def frozen(world: World) -> None:
    """Nothing arrives any more, nobody says anything; ticks go on."""
    world.filter.tick(world.now)
    world.now += world.dt


def ticks_to_stop(safety: SafetyFilter) -> int:
    """Speed over deceleration and deceleration over jerk, after the acceleration has been led to zero; and four ticks.

    The generator is two ticks ahead of what is told, and the spline is at rest two ticks after the generator.
    """
    limits, motion = safety.limits, safety.motion
    assert motion is not None
    bend = np.abs(motion.acceleration)
    peak = np.abs(motion.velocity) + bend**2 / (2 * limits.jerk)
    longest = bend / limits.jerk + peak / limits.acceleration + limits.acceleration / limits.jerk
    return int(np.ceil(longest.max() * safety.config.rate_hz)) + 4


def test_with_frozen_inputs_everything_stops_in_the_computed_time() -> None:
    checked = 0
    for seed in range(400):
        world = run_sequence(seed, Segments())
        safety, config = world.filter, world.config
        # The longest wait for a cause: the end of the path and then the policy's silence, or the joint states'.
        silence = config.chunk_horizon + config.chunk_timeout + config.action_delay + config.joint_timeout + 0.5
        for _ in range(int(silence / world.dt)):
            before = safety.state
            frozen(world)
            # An arm that does not follow is no stop: the command goes back to where it is.
            stops = safety.state not in (before, State.INACTIVE) and safety.cause is not Cause.TRACKING
            if before in (State.RUNNING, State.ARMED) and stops:
                for _ in range(ticks_to_stop(safety)):
                    frozen(world)
                assert safety.motion is not None
                assert safety.motion.at_rest or safety.cause is Cause.TRACKING, seed
                checked += 1
        assert safety.motion is None or safety.motion.at_rest
        assert safety.state is not State.RUNNING
    assert checked > 100


def test_an_operators_stop_and_estop_end_in_the_computed_time_too() -> None:
    checked = 0
    for seed in range(400, 700):
        world = run_sequence(seed, Segments())
        safety, motion = world.filter, world.filter.motion
        if safety.state is not State.RUNNING or motion is None or motion.at_rest:
            continue
        if seed % 2:
            safety.request("stop", world.now)
        else:
            safety.set_estop(True, world.now)
        for _ in range(ticks_to_stop(safety)):
            world.measure()
            frozen(world)
        assert safety.motion is not None
        assert safety.motion.at_rest
        last = safety.tick(world.now)
        if safety.state is State.ESTOP:
            assert last.plan is None
            assert last.motion is None
        else:
            assert last.motion is not None
        checked += 1
    assert checked > 30
