"""Decides what the robot is told: a state machine around the motion filter. No I/O and no clock of its own.

    INACTIVE --arm--> ARMED --run--> RUNNING <--> HOLD --stop--> STOPPED (latched) --reset--> INACTIVE
                                        any state --estop--> ESTOP (latched) --reset--> INACTIVE

HOLD keeps commanding the position at which the arm came to rest, and ends by itself if its cause is gone soon; STOPPED
does so until an operator resets it; ESTOP falls silent after braking. This is software, not a rated safety function:
it must sit behind the robot's own limits and a physical stop.

Every time is in seconds on one monotonic clock that the caller passes in. Same inputs, same outputs.
"""

import dataclasses
import enum

import numpy as np

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.motion_filter import Motion, MotionFilter, Plan
from embodied.robot_bridge.profile import Safety


class State(enum.StrEnum):
    INACTIVE = "INACTIVE"
    ARMED = "ARMED"
    RUNNING = "RUNNING"
    HOLD = "HOLD"
    STOPPED = "STOPPED"
    ESTOP = "ESTOP"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Absolute joint targets from a policy.

    Attributes:
        run, sequence: sequence rises within a run.
        observed_at: when the newest observation was made [s].
        received_at: when the chunk arrived [s].
        times: (K,) seconds after `observed_at`, strictly rising.
        positions: (K, J) [rad, m], columns named by `names` in any order.
    """

    run: str
    sequence: int
    observed_at: float
    received_at: float
    names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tick:
    """What one tick decided.

    Attributes:
        plan: what to send now, or None.
        chunk: (run, sequence) of the chunk behind it, or None.
        events: state changes and refusals since the last tick, in words.
    """

    state: State
    reason: str
    plan: Plan | None
    chunk: tuple[str, int] | None
    events: tuple[str, ...]


class _Reference:
    """A piecewise linear path through knots; constant before the first and after the last."""

    @property
    def end(self) -> float:
        return float(self.times[-1])

    def __init__(self, times: np.ndarray, positions: np.ndarray) -> None:
        self.times, self.positions = times, positions

    def at(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity (J,)."""
        k = int(np.searchsorted(self.times, time))
        if k == 0 or k == len(self.times):
            position = self.positions[min(k, len(self.times) - 1)]
            return position, np.zeros_like(position)
        velocity = (self.positions[k] - self.positions[k - 1]) / (self.times[k] - self.times[k - 1])
        return self.positions[k - 1] + velocity * (time - self.times[k - 1]), velocity


class SafetyFilter:
    """Call `measure`, `offer`, `request`, `set_*` as inputs arrive and `tick` at `config.rate_hz`."""

    def __init__(self, limits: Limits, config: Safety) -> None:
        self.limits, self.config = limits, config
        self.filter = MotionFilter(limits, 1.0 / config.rate_hz)
        self.state, self.reason = State.INACTIVE, "started"
        self.motion: Motion | None = None
        self.counts = {"runs": 0, "chunks": 0, "rejected": 0, "clamped": 0, "holds": 0}
        self._measured: tuple[np.ndarray, np.ndarray] | None = None
        self._measured_at = self._deadman_at = -np.inf
        self._estop = False
        self._reference: _Reference | None = None
        self._deadline = np.inf  # HOLD when it passes without a new chunk
        self._chunk: tuple[str, int] | None = None
        self._hold_since, self._resumable = -np.inf, False
        self._clamps_in_row, self._error_since = 0, np.inf
        self._since_sent, self._events = 0, []

    # ---- inputs

    def measure(self, position: np.ndarray, velocity: np.ndarray, received_at: float) -> None:
        """Measured joints (J,) in the limits' order. Non-finite positions are ignored, hence become stale."""
        if np.isfinite(position).all() and np.isfinite(velocity).all():
            self._measured, self._measured_at = (position, velocity), received_at

    def set_estop(self, pressed: bool) -> None:
        self._estop = pressed
        if pressed and self.state is not State.ESTOP:
            self._change(State.ESTOP, "e-stop pressed")

    def set_deadman(self, held: bool, received_at: float) -> None:
        self._deadman_at = received_at if held else -np.inf

    def request(self, mode: str, now: float, obstacle: str = "") -> str:
        """An operator's wish: arm, run, hold, stop or reset. Returns why it is refused; empty if granted.

        Args:
            obstacle: why the caller cannot drive the robot (no subscriber, ...); refuses `arm`.
        """
        refusal = self._request(mode, now, obstacle)
        if refusal:
            self._events.append(f"{mode} refused: {refusal}")
        return refusal

    def _request(self, mode: str, now: float, obstacle: str) -> str:
        moving = self.motion is not None and not self.motion.at_rest
        if mode == "arm":
            if self.state is State.ARMED:
                return ""
            return self._why_not_arm(now, obstacle) or self._arm()
        if mode == "run":
            if self.state not in (State.ARMED, State.HOLD, State.RUNNING):
                return f"the state is {self.state}, not ARMED or HOLD"
            if self.state is not State.RUNNING:
                if cause := self._input_fault(now):
                    return cause
                self._reference, self._chunk = None, None
                self._deadline = now + self.config.first_chunk_timeout
                self.counts["runs"] += 1
                self._change(State.RUNNING, "operator")
            return ""
        if mode == "hold":
            if self.state in (State.ARMED, State.RUNNING):
                self._hold("operator", now, resumable=False)
            return ""
        if mode == "stop":
            if self.state in (State.ARMED, State.RUNNING, State.HOLD):
                self._change(State.STOPPED, "operator")
            return ""
        if mode == "reset":
            if self.state is State.RUNNING or moving:
                return "the arm is moving; stop it first"
            if self._estop:
                return "the e-stop is pressed"
            self.motion = None
            self._change(State.INACTIVE, "operator")
            return ""
        return f"'{mode}' is none of arm, run, hold, stop, reset"

    def _why_not_arm(self, now: float, obstacle: str) -> str:
        if self.state is not State.INACTIVE:
            return f"the state is {self.state}, not INACTIVE"
        if cause := obstacle or self._input_fault(now):
            return cause
        assert self._measured is not None
        position, velocity = self._measured
        fastest = int(np.argmax(np.abs(velocity)))
        if np.abs(velocity[fastest]) > self.config.arm_max_velocity:
            return f"{self.limits.names[fastest]} moves at {velocity[fastest]:.3f} rad/s"
        outside = np.abs(position - self.limits.clip_position(position))
        if outside.max() > 0.01:
            worst = int(np.argmax(outside))
            return f"{self.limits.names[worst]} stands at {position[worst]:.3f}, outside its limits"
        return ""

    def _arm(self) -> str:
        assert self._measured is not None
        self.motion = self.filter.rest(self.limits.clip_position(self._measured[0]))
        self._clamps_in_row, self._error_since = 0, np.inf
        self._change(State.ARMED, "operator")
        return ""

    def offer(self, chunk: Chunk, now: float) -> str:
        """A chunk from the policy. Returns why it is refused; empty if it is executed."""
        resuming = self.state is State.HOLD and self._resumable and now - self._hold_since <= self.config.hold_resume
        if self.state is not State.RUNNING and not resuming:
            return f"the state is {self.state}"
        if self._chunk is not None and chunk.run == self._chunk[0] and chunk.sequence <= self._chunk[1]:
            return "an older or repeated chunk"
        self.counts["chunks"] += 1
        if fault := self._malformed(chunk):
            self._hold(f"chunk rejected: {fault}", now)
            return self._reject(fault)
        if fault := self._untimely(chunk, now) or (resuming and self._input_fault(now)):
            return self._reject(fault)
        order = [chunk.names.index(name) for name in self.limits.names]
        positions = np.asarray(chunk.positions, np.float64)[:, order]
        if self._reference is None or resuming:
            assert self.motion is not None
            jump = np.abs(positions[0] - self.motion.position) - self.limits.max_step
            if (jump > 0).any():
                fault = f"the first target of {self.limits.names[int(np.argmax(jump))]} is too far away"
                self._hold(f"chunk rejected: {fault}", now, resumable=False)
                return self._reject(fault)
        self._reference = self._timeline(chunk, positions, now)
        self._chunk = (chunk.run, chunk.sequence)
        self._since_sent = self.config.command_every  # send at the next tick
        self._deadline = self._reference.times[-1] + self.config.chunk_timeout
        if resuming:
            self._change(State.RUNNING, "a chunk came again")
        return ""

    def _reject(self, fault: str) -> str:
        self.counts["rejected"] += 1
        self._events.append(f"chunk rejected: {fault}")
        return fault

    def _malformed(self, chunk: Chunk) -> str:
        if sorted(chunk.names) != sorted(self.limits.names):
            return f"its joints are {', '.join(chunk.names)}"
        times, positions = np.asarray(chunk.times), np.asarray(chunk.positions)
        if times.ndim != 1 or not len(times) or positions.shape != (len(times), len(chunk.names)):
            return f"its positions have shape {positions.shape} for {len(times)} times"
        if not (np.isfinite(times).all() and np.isfinite(positions).all()):
            return "it is not finite"
        if times[0] < 0 or (np.diff(times) <= 0).any():
            return "its times do not rise"
        return ""

    def _untimely(self, chunk: Chunk, now: float) -> str:
        age = now - chunk.observed_at
        if age < -self.config.clock_skew_max:
            return f"its stamp lies {-age:.3f} s in the future"
        if age > self.config.chunk_max_age:
            return f"its observation is {age:.3f} s old"
        if age - chunk.times[-1] > self.config.chunk_timeout:
            return f"its last point passed {age - chunk.times[-1]:.3f} s ago"
        return ""

    def _timeline(self, chunk: Chunk, positions: np.ndarray, now: float) -> _Reference:
        """From where the reference is now through the chunk's coming points, up to the chunk horizon."""
        assert self.motion is not None
        running = self._reference is not None and self.state is State.RUNNING
        here = self._reference.at(now)[0] if running and self._reference else self.motion.position
        times = chunk.observed_at + np.asarray(chunk.times, np.float64) + self.config.action_delay
        path = _Reference(times, positions)
        end = min(times[-1], chunk.received_at + self.config.chunk_horizon)
        inside = (times > now + 1e-3) & (times < end)
        knots = [now, *times[inside], max(end, now + 1e-3)]
        return _Reference(np.array(knots), np.stack([here, *positions[inside], path.at(end)[0]]))

    # ---- the tick

    def tick(self, now: float) -> Tick:
        """Watch the deadlines, move one tick, and every `command_every` ticks, or at a new chunk, plan what to send."""
        self._watch(now)
        plan = None
        if self.motion is not None and self.state is not State.INACTIVE:
            plan = self._move(now)
        events, self._events = tuple(self._events), []
        chunk = self._chunk if self.state is State.RUNNING else None
        return Tick(self.state, self.reason, plan, chunk, events)

    def _watch(self, now: float) -> None:
        if self.state not in (State.ARMED, State.RUNNING, State.HOLD):
            return
        if now - self._measured_at > self.config.joint_stop:
            self._change(State.STOPPED, f"no joint states for {self.config.joint_stop} s")
        elif self.state is not State.HOLD:
            if cause := self._input_fault(now) or self._tracking_fault(now):
                self._hold(cause, now)
            elif self.state is State.RUNNING and now > self._deadline:
                self._hold("no chunk from the policy", now)
            elif self._clamps_in_row > self.config.max_consecutive_clamps:
                self._hold(f"targets clamped {self._clamps_in_row} times in a row", now, resumable=False)

    def _input_fault(self, now: float) -> str:
        if self._estop:
            return "the e-stop is pressed"
        if self.config.deadman_required and now - self._deadman_at > self.config.deadman_timeout:
            return "the deadman is not held"
        if now - self._measured_at > self.config.joint_timeout:
            return "joint states are stale"
        return ""

    def _tracking_fault(self, now: float) -> str:
        assert self.motion is not None
        assert self._measured is not None
        error = np.abs(self.motion.position - self._measured[0])
        if (error <= self.config.tracking_error).all():
            self._error_since = np.inf
        elif self._error_since == np.inf:
            self._error_since = now
        elif now - self._error_since > self.config.tracking_time:
            return f"{self.limits.names[int(np.argmax(error))]} does not follow: {error.max():.3f} rad off"
        return ""

    def _target(self, time: float) -> tuple[np.ndarray | None, bool]:
        """Where the filter should be able to stop (J,), and whether clamping changed it; None: brake.

        The filter always plans to stop at its target. A target ahead of the reference by the distance that stopping
        from the reference's velocity takes makes it follow without lag; at the end of the path it brakes.
        """
        assert self._reference is not None
        assert self._measured is not None
        if time > self._reference.end:
            return None, False
        position, velocity = self._reference.at(time)
        velocity = np.clip(velocity, -self.limits.velocity, self.limits.velocity)
        wanted = position + velocity * np.abs(velocity) / (2 * self.limits.acceleration)
        step = self.limits.max_step
        target = np.clip(wanted, self._measured[0] - step, self._measured[0] + step)
        clamped = bool(np.abs(target - wanted).max() > 1e-9)
        return self.limits.clip_position(target), clamped or bool(
            (position != self.limits.clip_position(position)).any()
        )

    def _move(self, now: float) -> Plan | None:
        following = self.state is State.RUNNING and self._reference is not None
        target = None
        if following:
            target, clamped = self._target(now + self.filter.dt)
            self._clamps_in_row = self._clamps_in_row + 1 if clamped else 0
            self.counts["clamped"] += clamped
        before = self.motion
        assert before is not None
        after = self.filter.step(before, target)
        if fault := self.filter.violation(before, after):
            self._change(State.STOPPED, f"bug: the filter broke the {fault}")
            self.motion = self.filter.rest(before.position)
            return None
        self.motion = after
        if self.state is State.ESTOP and before.at_rest:
            return None
        self._since_sent += 1
        if self._since_sent < self.config.command_every:
            return None
        self._since_sent = 0
        count = 2 * self.config.command_every - 1 if following else 0
        targets = [self._target(now + (k + 2) * self.filter.dt)[0] for k in range(count)]
        return self.filter.plan(after, targets, self.config.command_every)

    # ---- state changes

    def _hold(self, reason: str, now: float, resumable: bool = True) -> None:
        if self.state in (State.ARMED, State.RUNNING):
            # Nothing was running when ARMED: a chunk may not start motion on its own.
            self._resumable = resumable and self.state is State.RUNNING
            self._hold_since = now
            self.counts["holds"] += 1
            self._change(State.HOLD, reason)

    def _change(self, state: State, reason: str) -> None:
        if state is not State.RUNNING:
            self._reference = None
        self._events.append(f"{self.state} -> {state}: {reason}")
        self.state, self.reason = state, reason
