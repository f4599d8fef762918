"""A node's time, its end, and its flags."""

import logging
import time

import pytest

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.node import EVENT_TOPIC, EventLog, Rate, RosTime, Stop, arguments, now_ns
from embodied.robot_bridge.qos import DEFAULT, EVENTS
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport, VirtualClock


def test_system_time_is_the_systems() -> None:
    node = RosTime(MemoryTransport(MemoryBus()), False)
    before = time.time_ns()
    assert before <= node.now_ns() <= time.time_ns()
    assert abs(node.seconds() - time.monotonic()) < 0.1
    assert node.silent_for() == 0.0


def test_simulated_time_is_what_the_clock_topic_says() -> None:
    bus, wall = MemoryBus(VirtualClock()), VirtualClock()
    node = RosTime(MemoryTransport(bus), True, "/sim/clock", lambda: wall() * 1e-9)
    publisher = MemoryTransport(bus, "sim").publisher("/sim/clock", m.CLOCK, DEFAULT)
    assert publisher.matched == 1
    assert (node.now_ns(), node.seconds()) == (0, 0.0)
    assert node.silent_for() == float("inf")
    publisher.write(m.clock(3_500_000_000))
    assert (node.now_ns(), node.seconds(), node.jumps) == (3_500_000_000, 3.5, 0)
    wall.now_ns = 2 * 10**9
    assert node.silent_for() == 2.0
    assert node.now_ns() == 3_500_000_000  # it stands while /clock is silent
    publisher.write(m.clock(4_000_000_000))
    assert (node.silent_for(), node.jumps) == (0.0, 0)
    publisher.write(m.clock(1_000_000_000))
    assert (node.seconds(), node.jumps) == (1.0, 1)


def test_a_malformed_clock_is_not_time(caplog: pytest.LogCaptureFixture) -> None:
    bus = MemoryBus()
    node = RosTime(MemoryTransport(bus), True)
    publisher = MemoryTransport(bus, "sim").publisher("/clock", m.CLOCK, DEFAULT)
    publisher.write(m.clock(10**9))
    publisher.write(m.clock(2 * 10**9)[:6])
    assert node.now_ns() == 10**9
    assert "no rosgraph_msgs/msg/Clock" in caplog.text


def test_events_are_stamped_in_the_nodes_time(caplog: pytest.LogCaptureFixture) -> None:
    bus, got = MemoryBus(), []
    MemoryTransport(bus).subscriber(EVENT_TOPIC, m.STRING, EVENTS, lambda data, at: got.append(m.read_json(data)))
    with caplog.at_level(logging.INFO):
        EventLog(MemoryTransport(bus), "test", lambda: 7).write("hello", value=3)
    assert got == [{"event": "hello", "source": "test", "stamp_ns": 7, "value": 3}]
    assert '"hello"' in caplog.text


def test_a_late_tick_is_counted_and_not_made_up_for() -> None:
    rate, stop = Rate(100.0), Stop()
    time.sleep(0.08)  # five ticks pass
    started = time.monotonic()
    for _ in range(4):
        assert not rate.sleep(stop)
    assert rate.missed_deadlines == 1
    assert 0.015 < time.monotonic() - started < 0.2  # at most one at once, the others a period apart
    stop.set()
    assert rate.sleep(stop)


def test_flags_default_to_this_host_and_system_time() -> None:
    options = arguments("a test").parse_args(["--profile", "x"])
    assert (options.transport, options.discovery, options.domain, options.namespace) == ("auto", "localhost", None, "/")
    assert options.use_sim_time is False
    options = arguments("a test").parse_args(
        ["--profile", "x", "--transport", "dds", "--use-sim-time", "--namespace", "/left"]
    )
    assert (options.transport, options.use_sim_time, options.namespace) == ("dds", True, "/left")
    with pytest.raises(SystemExit):
        arguments("a test").parse_args(["--profile", "x", "--discovery", "everywhere"])


def test_now_is_an_integer_of_nanoseconds() -> None:
    assert isinstance(now_ns(), int)
    assert now_ns() > 10**18
