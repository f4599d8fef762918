"""What the bridge is doing, for a person at a terminal.

    with LiveView(profile, transport) as view:
        while running:
            key = view.refresh()        # call it as often as you like: it draws at most five times a second

`refresh` returns a key that was pressed ("" for none, "space", "escape", or the character), one per call, the most
urgent first, so that the caller decides what a key does. Where standard output is no terminal it prints a line per
second and per change of state; where standard input is none no key is ever pressed. The view has subscriptions of its
own on the caller's transport; messages are counted as they arrive, and decoded when they are due to be shown.
"""

import collections
import contextlib
import os
import re
import select
import sys
import termios
import time
import tty
from typing import Any, TextIO

from embodied.contracts.errors import MissingExtraError
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.watch_snapshot import Monitor, Snapshot

DRAW_EVERY, LINE_EVERY = 0.2, 1.0  # [s]
URGENT = ("escape", "space")
# What arrow and function keys send; an escape that begins none of them is the escape key.
_SEQUENCE = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]")


class Keys:
    """Keys of a terminal, without waiting and without echo; the terminal is as it was afterwards."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._pressed: collections.deque[str] = collections.deque(maxlen=200)
        self._saved: list[Any] | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not a file
            self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
            if os.isatty(self._descriptor):
                self._saved = termios.tcgetattr(self._descriptor)
                tty.setcbreak(self._descriptor)

    def take(self) -> str:
        """A key that was pressed, the most urgent first; "" for none."""
        if self._saved is not None:
            while select.select([self._descriptor], [], [], 0)[0] and (data := os.read(self._descriptor, 1024)):
                self._pressed.extend(decode_keys(data))
        for key in URGENT:
            if key in self._pressed:
                self._pressed.remove(key)
                return key
        return self._pressed.popleft() if self._pressed else ""

    def close(self) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._saved)
            self._saved = None


def decode_keys(data: bytes) -> list[str]:
    """Names of the keys in what a terminal sent."""
    names = {" ": "space", "\x1b": "escape"}
    text = _SEQUENCE.sub(b"", data).decode(errors="replace")
    return [names.get(character, character) for character in text]


class LiveView:
    """Shows the bridge on a terminal, and reads its keys. See the head of this file.

    Args:
        keys: the last line: what which key does.
        cameras: count pictures too.
        out: standard output unless given.

    Attributes:
        note: shown beside the robot's name; the caller may set it.
    """

    def __init__(
        self,
        profile: Profile,
        transport: Any,
        keys: str = "space stop · q quit",
        cameras: bool = False,
        out: TextIO | None = None,
    ) -> None:
        self.monitor = Monitor(profile, transport, cameras)
        self.note = ""
        self._help, self._out = keys, out or sys.stdout
        self._drawn, self._last_state = 0.0, ""
        self._keys: Keys | None = None
        self._live: Any = None

    def __enter__(self) -> "LiveView":
        self._keys = Keys()
        if self._out.isatty():
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError as error:
                self._keys.close()
                raise MissingExtraError("rich", "ros", "the terminal view") from error
            console = Console(file=self._out, highlight=False)
            self._live = Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._keys is not None:
            self._keys.close()

    def refresh(self) -> str:
        """Draw if it is time to, and return a key that was pressed, if any."""
        now = time.monotonic()
        if now - self._drawn >= DRAW_EVERY:
            self._show(self.monitor.snapshot(), now)
        return self._keys.take() if self._keys is not None else ""

    def _show(self, snapshot: Snapshot, now: float) -> None:
        from embodied.robot_bridge import watch_screen

        if self._live is not None:
            size = self._live.console.size
            shown = watch_screen.screen(snapshot, size.width, size.height, self._help, self.note)
            self._live.update(shown, refresh=True)
            self._drawn = now
        elif now - self._drawn >= LINE_EVERY or snapshot.state != self._last_state:
            print(watch_screen.line(snapshot), file=self._out, flush=True)
            self._drawn = now
        self._last_state = snapshot.state
