"""Decides what the robot is told: the state machine around the motion filter. No I/O and no clock of its own.

What a policy or an operator says passes, in this order, each stage counted in `SafetyFilter.counts`:

1. shape, names and finiteness: a chunk that fails is refused whole, and HOLD; nothing is mended;
2. time: old, late, repeated, reordered and future chunks are refused;
3. the path made of the chunks is sampled ahead of now, by as much as the filter lags behind it;
4. targets stay within `max_step` of the measured joints and in the position box;
5. where the arm would go, and come to rest, lies in the workspace, or else HOLD;
6. velocity, acceleration and jerk are limited, and so is the way to a stop, which every plan ends with;
7. what came out is checked again: an excess is a bug, nothing is sent, and STOPPED.

Every time is in seconds on one monotonic clock that the caller passes in. Same inputs, same outputs. This is software,
not a rated safety function: it must sit behind the robot's own limits and a physical stop.
"""

import dataclasses
import logging
import math

import numpy as np

from embodied.robot_bridge import machine as transitions
from embodied.robot_bridge.chunk import Chunk, Timeline, malformed, out_of_reach, schedule, untimely
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.machine import ACTIVE, Cause, Inputs, Machine, State
from embodied.robot_bridge.measured_arm import MeasuredArm
from embodied.robot_bridge.motion_filter import Motion, MotionFilter, Path, Plan
from embodied.robot_bridge.planner import Ahead, Box, Planner, Targets, later
from embodied.robot_bridge.profile import Safety

log = logging.getLogger("safety")

_COUNTS = ("runs", "chunks", "rejected", "malformed_chunks", "late", "repeated", "far", "clamped", "boxed", "workspace")
_COUNTS += ("tracking", "holds", "missed_ticks", "clock_jumps", "reseeded", "violations", "bugs")
_EARLIEST, _LATEST = 0.25, 1.75  # ticks after the last one a tick still counts as the next


@dataclasses.dataclass(frozen=True)
class Tick:
    """What one tick decided.

    Attributes:
        plan: for controllers that take trajectories: what to send now, or None. It holds until the next one.
        chunk: (run, sequence) of the chunk behind it, or None.
        events: state changes and refusals since the last tick, in words.
        motion: for controllers that take one command after another: where the arm is to be at the next tick, or None
            where nothing may be sent.
        heard_at: (J,) what the robot had been told when its joints were last heard; a robot that hangs has got no
            further. None before.
        silence: how long ago that was [s].
    """

    state: State
    reason: str
    plan: Plan | None
    chunk: tuple[str, int] | None
    events: tuple[str, ...]
    motion: Motion | None = None
    heard_at: np.ndarray | None = None
    silence: float = 0.0


class SafetyFilter:
    """Call `measure`, `offer`, `request`, `set_*` as inputs arrive and `tick` at `config.rate_hz`. None of them raises.

    Args:
        workspace: where the arm may be; None: anywhere.
        shadow: nothing of what is decided is sent. The command starts at the measured joints with every chunk, and an
            arm that does not follow is no fault.
        streaming: the robot gets `Tick.motion`, not `Tick.plan`: after a pause of the caller it stands still, instead
            of having finished the last plan.
        gripper: the last joint is one: it pushes against what it holds, and against its end, which is no fault.

    Attributes:
        counts: what each stage saw.
        motion: what the robot was last told, or None.
    """

    def __init__(
        self,
        limits: Limits,
        config: Safety,
        workspace: Box | None = None,
        shadow: bool = False,
        streaming: bool = False,
        gripper: bool = False,
    ) -> None:
        self.limits, self.config = limits, config
        self.filter = MotionFilter(limits, 1.0 / config.rate_hz)
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self.motion: Motion | None = None
        self._workspace, self._shadow, self._streaming = workspace, shadow, streaming
        watched = slice(-1 if gripper else None)  # joints that have to follow, and to be led within limits
        self._arm, self._planner = (
            MeasuredArm(limits, config, watched),
            Planner(self.filter, config, workspace, watched),
        )
        self._machine = Machine()
        self._path: Path | None = None
        self._now: float | None = None  # of the last tick
        self._grid = 0.0  # when the path's present row was due; ticks come a little earlier or later
        self._timeline: Timeline | None = None
        self._deadline = np.inf  # HOLD when it passes without a new chunk
        self._chunk: tuple[str, int] | None = None
        self._retired: list[str] = []  # policy runs that a newer one has replaced
        self._deadman_at = self._estop_at = -np.inf
        self._estop, self._clamped_since = False, np.inf
        self._yield: np.ndarray | None = None  # where to go in a HOLD because the arm did not follow
        self._dirty, self._silent, self._quiet, self._since_sent = False, False, False, 0
        self._events: list[str] = []
        self._prepared: Ahead | None = None

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def reason(self) -> str:
        return self._machine.reason

    @property
    def cause(self) -> Cause:
        return self._machine.cause

    def ages(self, now: float) -> dict[str, float]:
        """Seconds since each input was last heard; infinite before the first, and for a released deadman."""
        heard = {"joints": self._arm.heard_at, "deadman": self._deadman_at, "estop": self._estop_at}
        return {name: now - at for name, at in heard.items()}

    # ---- inputs

    def measure(self, position: np.ndarray, velocity: np.ndarray, received_at: float) -> None:
        """Measured joints (J,) in the limits' order. Unusable positions are ignored, hence become stale.

        A velocity that is not finite, which robots publish where they measure none, counts as zero.
        """
        self._arm.measure(position, velocity, received_at)

    def set_estop(self, pressed: bool, received_at: float) -> None:
        """The e-stop's state; any value is a heartbeat. Pressed, it latches ESTOP at once."""
        self._estop, self._estop_at = pressed, received_at
        if pressed and self.state is not State.ESTOP:
            self._set(transitions.enter(self._machine, State.ESTOP, Cause.ESTOP, "e-stop pressed", received_at))

    def set_deadman(self, held: bool, received_at: float) -> None:
        """The deadman's state, to be repeated while it is held."""
        self._deadman_at = received_at if held else -np.inf

    def clock_jumped(self, now: float) -> None:
        """The clock went back, to `now`: nothing that was stamped before counts any more, and HOLD.

        Joint states and the e-stop's heartbeat have to come again within their timeouts; the deadman must be held anew.
        """
        self.counts["clock_jumps"] += 1
        self._now, self._grid = now, now - self.filter.dt  # the next tick is one tick later
        self._arm.clock_jumped(now)
        self._estop_at, self._deadman_at, self._clamped_since = now, -np.inf, np.inf
        self._timeline, self._chunk = None, None
        self._machine = dataclasses.replace(self._machine, since=now)
        self.hold(Cause.CLOCK, "the clock jumped back", now)

    def request(self, mode: str, now: float, obstacle: str = "") -> str:
        """An operator's wish: arm, run, hold, stop or reset. Returns why it is refused; empty if granted.

        Args:
            obstacle: why the caller cannot drive the robot (no subscriber, ...); refuses `arm`.
        """
        before = self._machine
        inputs = self._inputs(now, self._standing() if mode == "arm" else "", moving=not self._at_rest)
        after, refusal = transitions.request(before, mode, inputs, self.config, obstacle)
        if refusal:
            self._events.append(f"{mode} refused: {refusal}")
            return refusal
        if after.state is not before.state or after.cause is not before.cause:
            self._set(after)
        if after.state is before.state:
            return ""
        if mode == "arm":
            assert self._arm.position is not None
            self._path = self.filter.rest(self.limits.clip_position(self._arm.position))
            self.motion = self.filter.motion(self._path)
            self._clamped_since, self._yield = np.inf, None
            self._arm.forget()
        elif mode == "run":
            self._chunk, self._yield, self._clamped_since = None, None, np.inf
            self._retired.clear()
            self._deadline = now + self.config.first_chunk_timeout
            self.counts["runs"] += 1
        elif mode == "reset":
            self._path = self.motion = self._yield = None
        return ""

    def offer(self, chunk: Chunk, now: float) -> str:
        """A chunk from the policy. Returns why it is refused; empty if it is executed."""
        try:
            return self._offer(chunk, now)
        except Exception as error:  # whatever arrives, it must not end the process that guards the arm
            return self._malformed(f"{type(error).__name__}: {error}", now)

    def _offer(self, chunk: Chunk, now: float) -> str:
        resuming = self.state is State.HOLD and self._machine.resumable
        if resuming and (refusal := transitions.why_not_resume(self._machine, self._inputs(now), self.config)):
            return refusal
        if self.state is not State.RUNNING and not resuming:
            return f"the state is {self.state}"
        if fault := malformed(chunk, self.limits.names):
            return self._malformed(fault, now)
        if refusal := self._replay(chunk, resuming):
            self.counts["repeated"] += 1
            return refusal
        self.counts["chunks"] += 1
        if fault := untimely(chunk, now, self.config):
            return self._reject("late", fault)
        positions = np.asarray(chunk.positions, np.float64)
        if chunk.names != self.limits.names:
            positions = positions[:, [chunk.names.index(name) for name in self.limits.names]]
        assert self._path is not None
        here = self._path.position[2]
        if self._shadow:
            assert self._arm.position is not None
            self._path = self.filter.coasting(self._arm.position, self._arm.velocity)
            here, self._timeline = self._path.position[2], None
        timeline = schedule(chunk, positions, now, here, self._timeline, self.config)
        takes_over = self._timeline is None or self._chunk is None or chunk.run != self._chunk[0]
        if takes_over and (fault := out_of_reach(chunk, positions, now, here, self.limits, self.config)):
            self.hold(Cause.TARGETS, f"chunk rejected: {fault}", now)
            return self._reject("far", fault)
        if self._chunk is not None and chunk.run != self._chunk[0]:
            self._retired.append(self._chunk[0])
        self._timeline, self._chunk = timeline, (chunk.run, chunk.sequence)
        self._deadline = timeline.end + self.config.chunk_timeout
        self._dirty = True
        if resuming:
            self._set(transitions.enter(self._machine, State.RUNNING, Cause.POLICY, "a chunk came again", now))
        return ""

    def _malformed(self, fault: str, now: float) -> str:
        self.counts["chunks"] += 1
        self.hold(Cause.POLICY, f"chunk rejected: {fault}", now)
        return self._reject("malformed_chunks", fault)

    def _reject(self, count: str, fault: str) -> str:
        self.counts[count] += 1
        self.counts["rejected"] += 1
        self._events.append(f"chunk rejected: {fault}")
        return fault

    def _replay(self, chunk: Chunk, resuming: bool) -> str:
        """Why a chunk is not newer than the last one, or comes from a policy that may not take over."""
        if chunk.run in self._retired:
            return "a chunk of a policy that another has replaced"
        if self._chunk is None:
            return ""
        if chunk.run == self._chunk[0]:
            return "an older or repeated chunk" if chunk.sequence <= self._chunk[1] else ""
        return "another policy's chunk cannot end a HOLD; an operator must say run" if resuming else ""

    def _standing(self) -> str:
        """Why the arm cannot be armed as it stands."""
        if fault := self._arm.standing():
            return fault
        assert self._arm.position is not None
        return self._workspace.outside(self._arm.position) if self._workspace else ""

    # ---- the tick

    def tick(self, now: float) -> Tick:
        """Watch the deadlines and move one tick; every `command_every` ticks, or when something changed, plan anew."""
        try:
            plan = self._tick(now)
        except Exception as error:  # a bug must end in a controlled stop, not in a dead process
            plan = None
            self.counts["bugs"] += 1
            self._stop_for_bug(f"bug: {type(error).__name__}: {error}", now)
        events, self._events, self._prepared = tuple(self._events), [], None
        motion = None if self.state is State.INACTIVE or self._silent else self.motion
        chunk, silence = self._chunk if self.state is State.RUNNING else None, now - self._arm.heard_at
        return Tick(self.state, self.reason, plan, chunk, events, motion, self._arm.told, silence)

    def _tick(self, now: float) -> Plan | None:
        if not math.isfinite(now):
            raise ValueError(f"the time is {now}")
        steps = self._elapsed_ticks(now)
        self._set(transitions.watch(self._machine, self._inputs(now), self.config))
        self._listen(now)
        self._silent = self.state is State.ESTOP and self._at_rest
        if self._path is None or self._silent or steps == 0:
            return None
        # One that is told positions or velocities tick by tick gets no further in a missed one; a plan goes on.
        rows = 1 if self._streaming else steps
        ahead = self._prepared
        prepared = ahead is not None and rows == 1 and ahead.before is self._path
        self._path = ahead.path if ahead is not None and prepared else self._path.advance(rows)
        if self._streaming and steps > self._planner.reach and self.motion is not None:
            self._path = self.filter.rest(self.motion.position)
        self._since_sent += steps
        # An arm whose joints are not heard follows blindly, or hangs and takes up the newest command when it wakes: for
        # both it is right to brake now, and wrong to add anything that reaches further ahead.
        quiet, before = self._arm.quiet(now), self._quiet
        self._quiet = quiet
        again = self._dirty or self._since_sent >= self.config.command_every
        due = quiet != before or (again and (not quiet or self._path.at_rest))
        plan = self._replan(now) if due else None
        self.motion = ahead.motion if ahead and self._path is ahead.ends else self.filter.motion(self._path)
        return plan

    def _elapsed_ticks(self, now: float) -> int:
        """How many rows of the path have passed since the last tick: 1 in general, more where ticks were missed."""
        if self._now is None:
            self._now, self._grid = now, now
            return 1
        if now < self._now - self.filter.dt:
            self.clock_jumped(now)
        self._now = max(self._now, now)
        # A loop whose phase lies half a tick beside the grid's must not count none and two by turns.
        elapsed = (now - self._grid) / self.filter.dt
        steps = 1 if _EARLIEST < elapsed < _LATEST else max(0, round(elapsed))
        self._grid += steps * self.filter.dt
        self.counts["missed_ticks"] += max(0, steps - 1)
        return steps

    def prepare(self) -> Plan | None:
        """Work the next tick out before it is due, as it would itself: it takes this over if all is still the same.

        Call it shortly before a tick, when there is time, or never: ticks decide the same either way. Returns the plan
        of a tick that is as late as the last was, if it is to plan.
        """
        self._prepared = None
        try:
            self._prepared = self._look_ahead()
        except Exception:  # the tick meets it again, and stops the arm in a controlled way
            log.exception("the next tick cannot be planned")
        planned = self._prepared.planned if self._prepared else None
        if planned is None or planned.fault or planned.outside or self._now is None:
            return None
        return later(planned.plan, self._now - self._grid)

    def _look_ahead(self) -> Ahead | None:
        if self.state is not State.RUNNING or self._path is None or self._timeline is None or self._quiet:
            return None
        assert self._arm.position is not None
        path, grid = self._path.advance(1), self._grid + self.filter.dt
        ends, planned = path, None
        if self._dirty or self._since_sent + 1 >= self.config.command_every:
            planned = self._planner.plan(path, grid, self._timeline, self._arm.position)
            ends = planned.followed
        return Ahead(self._path, path, grid, planned, ends, self.filter.motion(ends))

    def _replan(self, now: float) -> Plan | None:
        assert self._path is not None
        targets = self._targets()
        planned = self._prepared.planned if self._prepared and self._prepared.path is self._path else None
        if planned and targets is not planned.targets and not np.array_equal(targets.rows, planned.targets.rows):
            planned = None
        path = planned.followed if planned else self.filter.follow(self._path, targets.rows)
        outside = ""
        if len(targets.rows) and self.state is State.RUNNING:
            outside = planned.outside if planned else self._planner.leaves(path)
        if outside:
            self.counts["workspace"] += 1
            self.hold(Cause.WORKSPACE, outside, now)
            planned, path = None, self.filter.follow(self._path, self._planner.nowhere.rows)
        if fault := planned.fault if planned else self.filter.violation(path):
            self.counts["violations"] += 1
            self._stop_for_bug(f"bug: the filter broke the {fault}", now)
            return None
        self._clamped_since = min(self._clamped_since, now) if targets.clamped or targets.boxed else np.inf
        self._path, self._dirty, self._since_sent = path, False, 0
        late = now - self._grid
        return later(planned.plan, late) if planned else self.filter.plan(path, late)

    def _targets(self) -> Targets:
        """Where the ticks to come are led."""
        planner, timeline, measured = self._planner, self._timeline, self._arm.position
        if self._quiet:
            return planner.nowhere
        if self._yield is not None and self.state is State.HOLD:
            return Targets(np.array([self._yield] * planner.reach))
        if self.state is not State.RUNNING or timeline is None:
            return planner.nowhere
        assert self._path is not None
        assert measured is not None
        ahead = self._prepared
        planned = ahead.planned if ahead and ahead.grid == self._grid else None
        if planned and planned.timeline is not timeline:
            planned = None
        if ahead and planned and planned.measured is measured and ahead.path is self._path:
            targets = planned.targets
        else:
            wanted = planned.wanted if planned else planner.wanted(timeline, self._grid)
            targets = planner.within(wanted, measured, self._path.position[2])
        self.counts["clamped"] += targets.clamped * self._since_sent
        self.counts["boxed"] += targets.boxed * self._since_sent
        return targets

    @property
    def _at_rest(self) -> bool:
        return self._path is None or self._path.at_rest

    # ---- what is known

    def _inputs(self, now: float, standing: str = "", moving: bool = False) -> Inputs:
        config, estop, deadman, policy, targets = self.config, "", "", "", ""
        if self._estop:
            estop = "the e-stop is pressed"
        elif config.estop_required and not abs(now - self._estop_at) <= config.estop_timeout:
            estop = "the e-stop's heartbeat is missing"
        if config.deadman_required and not abs(now - self._deadman_at) <= config.deadman_timeout:
            deadman = "the deadman is not held"
        if now > self._deadline:
            policy = "no chunk from the policy"
        if now - self._clamped_since > config.max_clamped_time:
            targets = f"targets clamped for {now - self._clamped_since:.2f} s"
        tracking = ""
        if self.motion is not None and self.state in ACTIVE and not self._shadow:
            tracking = self._arm.tracking(now, self.motion)
        return Inputs(
            now,
            joint_age=abs(now - self._arm.heard_at),  # of the future is no better than of the past
            deadman=deadman,
            estop=estop,
            tracking=tracking,
            policy=policy,
            targets=targets,
            standing=standing,
            moving=moving,
        )

    def _listen(self, now: float) -> None:
        """Notes how far the robot has got; joints that are heard again after a gap may have to be taken up anew."""
        if not self._arm.heard(now, self.motion):
            return
        if self._arm.returns and not self._shadow:
            if self._arm.quiet(now):  # too old to say where the arm is
                return
            self._take_up(now)
        self._arm.note(self.motion)

    def _take_up(self, now: float) -> None:
        """A robot that hung meanwhile goes on from where it is: what was commanded lies ahead of it by the whole gap.

        One that followed blindly is no farther from what it was told than before, and is left alone. One that is
        elsewhere, restarted or with another zero, gets no command before it is armed again.
        """
        arm = self._arm
        assert arm.position is not None
        assert self.motion is not None
        if arm.elsewhere(self.motion):
            self.stop(Cause.TRACKING, "the arm is not where it was left", now)
            self._path = self.motion = None
        elif arm.left_behind(self.motion):
            # One that is told positions alone chases the last of them: its speed is not the path's.
            speed = np.zeros_like(arm.velocity) if self._streaming else arm.velocity
            self._path = self.filter.coasting(arm.position, speed)
            self.motion, self._dirty = self.filter.motion(self._path), True
            self.counts["reseeded"] += 1

    # ---- state changes

    def hold(self, cause: Cause, reason: str, now: float) -> None:
        """HOLD for a reason that the caller knows; only from ARMED or RUNNING, or from a HOLD that would end."""
        self._set(transitions.hold(self._machine, cause, reason, now))

    def stop(self, cause: Cause, reason: str, now: float) -> None:
        """STOPPED for a reason that the caller knows; only from ARMED, RUNNING or HOLD."""
        if self.state in ACTIVE:
            self._set(transitions.enter(self._machine, State.STOPPED, cause, reason, now))

    def _stop_for_bug(self, reason: str, now: float) -> None:
        """STOPPED. Nothing new is planned at this tick: the last plan, which ends at rest, goes on."""
        if self.state not in (State.STOPPED, State.ESTOP):
            self._set(transitions.enter(self._machine, State.STOPPED, Cause.BUG, reason, now))
        else:
            self._events.append(reason)
        if self._path is not None:
            self.motion = self.filter.motion(self._path)

    def _set(self, after: Machine) -> None:
        before = self._machine
        if after is before:
            return
        self._machine, self._dirty = after, True
        if after.state is not State.RUNNING:
            self._timeline = None
        if after.state is State.HOLD and before.state is not State.HOLD:
            self.counts["holds"] += 1
        if after.cause is Cause.TRACKING and before.cause is not Cause.TRACKING:
            self.counts["tracking"] += 1
            self._yield = self._where_to_yield()
        self._events.append(f"{before.state} -> {after.state}: {after.reason}")

    def _where_to_yield(self) -> np.ndarray | None:
        """The command goes back to where an arm that does not follow is, within the limits, so that it stops pushing.

        Not if the measurement is further away than a contact explains: then it may be the encoder that is wrong.
        """
        measured = self._arm.position
        assert measured is not None
        assert self.motion is not None
        reach = self.limits.max_step + self.limits.velocity * self.filter.stopping_time(self.limits.velocity)
        if (np.abs(self.motion.position - measured) > reach).any():
            return None
        return self.limits.clip_position(measured)
