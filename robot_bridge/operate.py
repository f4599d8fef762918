"""An operator at a terminal: arm, run, hold, stop, e-stop, the deadman, and when an episode is recorded.

    a  arm          r  run (held: deadman)   d  deadman, while held     h  hold       space  stop     x  reset
    escape  e-stop  c  clear the e-stop      b  begin a recording       s, f  end it: success, failure

A terminal tells of keys that repeat, not of keys that are held: the first press counts for as long as a keyboard takes
to begin repeating, and a key that repeats counts as let go when a repeat is missing. A joystick's button has no such
doubt: prefer one. Everything goes out from one loop, so that a program that hangs holds nothing: the deadman and the
e-stop's heartbeat fall silent. This is no rated safety function: keep a hand on the physical stop.
"""

import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.node import EventLog
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, LATCHED
from embodied.robot_bridge.safety_node import ESTOP_TOPIC, MODE_TOPIC

HELP = (
    "a arm · r run, held · d deadman, held · h hold · space stop · x reset\n"
    "escape E-STOP · c clear it · b record · s f end it: success, failure · q quit"
)
MODES = {"a": "arm", "r": "run", "h": "hold", "space": "stop", "x": "reset"}
FIRST_REPEAT = 0.75  # a keyboard begins to repeat a held key after 0.25 to 0.7 s [s]
NEXT_REPEAT = 0.2  # and then does so 15 times a second or more [s]
HEARTBEAT = 0.05  # of deadman and e-stop [s]


class HeldKey:
    """Whether a key is held, told from its repeats. Of several that are held a terminal repeats the last one only."""

    def __init__(self) -> None:
        self._key, self._last, self._repeats = "", -1e9, False

    def press(self, key: str, now: float) -> bool:
        """Whether this press is a repeat of the one before."""
        self._repeats = key == self._key and self.held(now)
        self._key, self._last = key, now
        return self._repeats

    def held(self, now: float) -> bool:
        return now - self._last < (NEXT_REPEAT if self._repeats else FIRST_REPEAT)


class Joystick:
    """A button of a joystick of Linux, such as /dev/input/js0. One that was unplugged is not held.

    Raises:
        InputError: it cannot be opened.
    """

    _EVENT = struct.Struct("<IhBB")  # time, value, kind, number

    def __init__(self, path: Path, button: int) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"--joystick {path}: {error.strerror}.") from None
        self._button, self._held, self.lost = button, False, False

    def held(self) -> bool:
        while not self.lost:
            try:
                data = os.read(self._descriptor, self._EVENT.size)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if len(data) < self._EVENT.size:
                self.lost = True
                break
            _, value, kind, number = self._EVENT.unpack(data)
            if kind & 0x7F == 1 and number == self._button:  # 0x80 marks the state it starts with
                self._held = bool(value)
        return self._held and not self.lost

    def close(self) -> None:
        os.close(self._descriptor)


class Operator:
    """Sends what the operator's keys say. Call `tick` at 20 Hz or more.

    Args:
        clock: monotonic seconds.

    Attributes:
        estopped: the e-stop was pressed and not cleared.
    """

    def __init__(
        self,
        profile: Profile,
        transport: Any,
        joystick: Joystick | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = transport.publisher(MODE_TOPIC, messages.STRING, DEFAULT)
        self._estop = transport.publisher(ESTOP_TOPIC, messages.BOOL, LATCHED)
        self._deadman = None  # a topic of Joy comes from the joystick's own node
        if profile.safety.deadman_button < 0:
            self._deadman = transport.publisher(profile.topics.deadman, messages.BOOL, COMMAND)
        self._events = EventLog(transport, "operator")
        self._profile, self._joystick, self._clock = profile, joystick, clock
        self._key, self._sent, self._bag = HeldKey(), -1e9, ""
        self.estopped = False

    @property
    def held(self) -> bool:
        """Whether the deadman is held."""
        return self._joystick.held() if self._joystick is not None else self._key.held(self._clock())

    @property
    def note(self) -> str:
        """What the operator should know at a glance."""
        parts = [
            "E-STOP" if self.estopped else "",
            "deadman held" if self.held else "",
            self._bag and f"rec {self._bag}",
        ]
        if self._joystick is not None and self._joystick.lost:
            parts.append("the joystick is gone")
        return " · ".join(part for part in parts if part)

    def press(self, key: str, contract: Mapping[str, Any] | None = None) -> None:
        """Do what a key says; others are passed by.

        Args:
            contract: the policy's, for a recording that begins.
        """
        now = self._clock()
        repeated = key in ("a", "r", "d") and not self.estopped and self._key.press(key, now)
        if key in ("escape", "c"):
            self.estopped = key == "escape"
            self._send(now)
        elif key in MODES and not repeated:
            self._send(now)  # the deadman arrives before what needs it
            self._mode.write(messages.string(MODES[key]))
        elif key == "b" and not self._bag:
            self._bag = time.strftime("%Y%m%d-%H%M%S")
            about = {"contract": contract} if contract else {}
            self._events.write("episode_start", bag=self._bag, profile=self._profile.name, **about)
        elif key in ("s", "f"):
            self._end_recording(success=key == "s")

    def tick(self) -> None:
        """The heartbeats."""
        now = self._clock()
        if now - self._sent >= HEARTBEAT:
            self._send(now)

    def _send(self, now: float) -> None:
        self._sent = now
        self._estop.write(messages.boolean(self.estopped))
        if self._deadman is not None:
            self._deadman.write(messages.boolean(self.held and not self.estopped))

    def _end_recording(self, success: bool | None) -> None:
        if self._bag:
            self._events.write("episode_end", bag=self._bag, success=success)
            self._bag = ""

    def leave(self) -> None:
        """Stop the robot and end the recording before falling silent."""
        self._mode.write(messages.string("stop"))
        self._end_recording(success=None)
