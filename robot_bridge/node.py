"""What every process of the bridge shares: flags, a node on the graph, its time, a clean end, a steady rate."""

import argparse
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embodied.contracts.errors import EmbodiedError, InputError
from embodied.contracts.protocols import Transport
from embodied.robot_bridge import messages
from embodied.robot_bridge import transport as transports
from embodied.robot_bridge.profile import Profile, load_profile
from embodied.robot_bridge.qos import CLOCK, EVENTS

EVENT_TOPIC = "/bridge/event"


def now_ns() -> int:
    """ROS time: the system clock [ns]."""
    return time.time_ns()


class RosTime:
    """The node's time: the system's clocks, or with `use_sim_time` what /clock says, 0 before it says anything.

    Args:
        topic: of the clock.
        wall: monotonic seconds, never simulated.

    Attributes:
        jumps: how often simulated time went backwards.
    """

    def __init__(
        self,
        transport: Transport,
        use_sim_time: bool,
        topic: str = "/clock",
        wall: Callable[[], float] = time.monotonic,
    ) -> None:
        self.simulated, self.jumps = use_sim_time, 0
        self._sim_ns, self._wall, self._heard = 0, wall, -math.inf
        if use_sim_time:
            transport.subscriber(topic, messages.CLOCK, CLOCK, self._on_clock)

    def _on_clock(self, data: bytes, _: int) -> None:
        try:
            stamp = messages.read_clock(data)
        except InputError as error:
            logging.getLogger("clock").warning("%s", error)
            return
        self.jumps += stamp < self._sim_ns
        self._sim_ns, self._heard = stamp, self._wall()

    def now_ns(self) -> int:
        """ROS time, for stamps [ns]."""
        return self._sim_ns if self.simulated else now_ns()

    def seconds(self) -> float:
        """For ages and periods [s]: monotonic, or simulated, which may jump back."""
        return self._sim_ns * 1e-9 if self.simulated else self._wall()

    def silent_for(self) -> float:
        """Wall-clock seconds since /clock last came, infinite before it does; 0 without `use_sim_time`."""
        return self._wall() - self._heard if self.simulated else 0.0


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every process takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--profile", required=True, help="robot profile: a name or a YAML file")
    parser.add_argument("--domain", type=int, default=None, help="ROS domain, default ROS_DOMAIN_ID")
    parser.add_argument(
        "--transport", default="auto", choices=transports.KINDS, help="auto: rclpy where ROS 2 is sourced, else dds"
    )
    parser.add_argument(
        "--discovery",
        default="localhost",
        choices=transports.DISCOVERY,
        help="localhost: nothing leaves this host; subnet: it may, as the ROS environment says",
    )
    parser.add_argument("--namespace", default="/", help="of the node")
    parser.add_argument("--use-sim-time", action="store_true", help="take the time from /clock")
    parser.add_argument("--parent", type=int, default=None, help="end when this process id is gone")
    return parser


class Stop:
    """Set by SIGTERM, SIGINT or the parent's death; `wait` sleeps until then at most."""

    def __init__(self, parent: int | None = None) -> None:
        self._event, self._parent = threading.Event(), parent
        self._checked = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._event.set())

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        if self._parent is not None and time.monotonic() - self._checked > 0.5:
            self._checked = time.monotonic()
            if os.getppid() != self._parent:
                self._event.set()
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(max(0.0, seconds)) or self.is_set()


class Rate:
    """A loop's steady period. A late tick is counted and never made up for by a burst."""

    def __init__(self, hz: float) -> None:
        self.period = 1.0 / hz
        self.missed_deadlines = 0
        self._next = time.monotonic() + self.period

    def sleep(self, stop: Stop, prepare: Callable[[], None] | None = None, lead: float = 0.0) -> bool:
        """Until the next tick; True if the process should end.

        Args:
            prepare: called `lead` seconds before it, unless it is already that late.
        """
        now = time.monotonic()
        if now - self._next > self.period / 2:
            self.missed_deadlines += 1
            self._next = max(self._next, now - self.period)
        if prepare is not None and self._next - lead > now:
            if stop.wait(self._next - lead - now):
                return True
            prepare()
            now = time.monotonic()
        ended = stop.wait(self._next - now)
        self._next += self.period
        return ended


def open_transport(node: str, options: argparse.Namespace) -> Transport:
    """The node on the graph that the flags ask for."""
    return transports.open_transport(node, options.transport, options.domain, options.discovery, options.namespace)


class EventLog:
    """Publishes JSON events on /bridge/event, stamped in ROS time, and mirrors them to the process's log."""

    def __init__(self, transport: Transport, source: str, stamp: Callable[[], int] = now_ns) -> None:
        self._publisher = transport.publisher(EVENT_TOPIC, messages.STRING, EVENTS)
        self._source, self._stamp, self._log = source, stamp, logging.getLogger(source)

    @property
    def matched(self) -> int:
        return self._publisher.matched

    def write(self, event: str, **fields: Any) -> None:
        record: Mapping[str, Any] = {"event": event, "source": self._source, "stamp_ns": self._stamp(), **fields}
        self._publisher.write(messages.json_string(record))
        self._log.info("%s", json.dumps({k: v for k, v in record.items() if k not in ("source", "contract")}))


def run_process(
    main: Callable[[argparse.Namespace, Profile, Stop], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse flags, run `main` until SIGTERM, and exit: 0, or 2 with the message of an EmbodiedError."""
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("OpenGL").setLevel(logging.WARNING)
    try:
        main(options, load_profile(options.profile), Stop(options.parent))
    except EmbodiedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
