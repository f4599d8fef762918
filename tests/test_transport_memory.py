"""Virtual time and faults of the memory bus: what is lost, late, doubled or altered, and that a seed repeats it."""

import threading
import time

import pytest

from embodied.contracts.errors import TransportError
from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.qos import DEFAULT, LATEST, QosProfile
from embodied.robot_bridge.transport_memory import Fault, MemoryBus, MemoryPublisher, MemoryTransport, VirtualClock

MS = 1_000_000


def line(bus: MemoryBus, topic: str = "/t", qos: QosProfile = DEFAULT) -> tuple[MemoryPublisher, list[tuple[str, int]]]:
    """A publisher, and what its one subscription gets: text and arrival [ms]."""
    got: list[tuple[str, int]] = []

    def keep(data: bytes, received_ns: int) -> None:
        got.append((data.decode("latin1"), received_ns // MS))

    MemoryTransport(bus, "listener").subscriber(topic, m.STRING, qos, keep)
    return MemoryTransport(bus, "talker").publisher(topic, m.STRING, DEFAULT), got


def send(publisher: MemoryPublisher, bus: MemoryBus, count: int, every_ms: int = 10) -> None:
    """`count` samples, the k-th at k * every_ms, then time to arrive."""
    for k in range(count):
        bus.advance(k * every_ms * MS)
        publisher.write(f"HEAD{k}".encode())
    bus.advance(count * every_ms * MS + 10_000 * MS)


def texts(got: list[tuple[str, int]]) -> list[int]:
    return [int(text[4:]) for text, _ in got]


def test_time_stands_still_between_advances() -> None:
    clock = VirtualClock(5 * MS)
    bus = MemoryBus(clock)
    publisher, got = line(bus)
    publisher.write(b"HEAD0")
    time.sleep(0.01)
    publisher.write(b"HEAD1")
    assert got == [("HEAD0", 5), ("HEAD1", 5)]
    bus.advance(9 * MS)
    assert clock() == 9 * MS
    bus.advance(7 * MS)
    assert clock() == 9 * MS  # never backwards


def test_delay_is_exact_and_arrival_time_is_when_it_was_due() -> None:
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus)
    bus.inject("/t", Fault(delay_s=0.025))
    send(publisher, bus, 4)
    assert got == [(f"HEAD{k}", 10 * k + 25) for k in range(4)]


def test_nothing_arrives_before_its_time() -> None:
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus)
    bus.inject("/t", Fault(delay_s=0.025))
    publisher.write(b"HEAD0")
    bus.advance(24 * MS)
    assert got == []
    bus.advance(25 * MS)
    assert got == [("HEAD0", 25)]


def test_jitter_lets_samples_overtake_within_its_bounds() -> None:
    bus = MemoryBus(VirtualClock(), seed=3)
    publisher, got = line(bus)
    bus.inject("/t", Fault(delay_s=0.005, jitter_s=0.05))
    send(publisher, bus, 100)
    order, late = texts(got), [at - 10 * k for k, at in zip(texts(got), [at for _, at in got], strict=True)]
    assert sorted(order) == list(range(100))
    assert order != sorted(order)
    assert min(late) >= 5
    assert max(late) <= 55
    assert [at for _, at in got] == sorted(at for _, at in got)


@pytest.mark.parametrize(("fault", "low", "high"), [(Fault(drop=0.3), 600, 800), (Fault(duplicate=0.3), 1200, 1400)])
def test_drops_and_duplicates_come_at_their_rate(fault: Fault, low: int, high: int) -> None:
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus)
    bus.inject("/t", fault)
    send(publisher, bus, 1000)
    assert low < len(got) < high
    assert texts(got) == sorted(texts(got))


def test_reordering_loses_nothing() -> None:
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus)
    bus.inject("/t", Fault(reorder=0.3))
    send(publisher, bus, 200)
    bus.inject("/t", Fault())  # lets go of one that still waits
    assert sorted(texts(got)) == list(range(200))
    swapped = sum(a > b for a, b in zip(texts(got), texts(got)[1:], strict=False))
    assert 20 < swapped < 80


def test_corruption_alters_one_byte_behind_the_header_and_cuts_shorten() -> None:
    bus, got = MemoryBus(VirtualClock()), []
    MemoryTransport(bus).subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
    publisher = MemoryTransport(bus).publisher("/t", m.STRING, DEFAULT)
    bus.inject("/t", Fault(corrupt=1.0))
    whole = bytes(range(64))
    for _ in range(200):
        publisher.write(whole)
    assert {len(data) for data in got} == {64}
    assert {sum(a != b for a, b in zip(data, whole, strict=True)) for data in got} == {1}
    assert {data[:4] for data in got} == {whole[:4]}
    assert len(set(got)) > 100
    got.clear()
    bus.inject("/t", Fault(cut=1.0))
    for _ in range(200):
        publisher.write(whole)
    assert all(whole.startswith(data) and 4 <= len(data) < 64 for data in got)
    assert len(set(got)) > 30


@pytest.mark.parametrize(("qos", "kept"), [(LATEST, [4]), (QosProfile(3), [2, 3, 4]), (DEFAULT, [0, 1, 2, 3, 4])])
def test_a_frozen_topic_comes_back_with_what_the_depth_holds(qos: QosProfile, kept: list[int]) -> None:
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus, qos=qos)
    bus.inject("/t", Fault(freeze=True))
    send(publisher, bus, 5)
    assert got == []
    bus.inject("/t", Fault())
    assert texts(got) == kept
    assert {at for _, at in got} == {10_050}  # old samples, new arrivals: what stale-data checks must notice
    publisher.write(b"HEAD5")
    assert texts(got) == [*kept, 5]


def test_a_fault_leaves_other_topics_alone_and_each_subscription_has_its_own_luck() -> None:
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus)
    _, other = line(bus)
    clean, unharmed = line(bus, "/clean")
    bus.inject("/t", Fault(drop=0.5))
    send(publisher, bus, 100)
    send(clean, bus, 100)
    assert len(unharmed) == 100
    assert texts(got) != texts(other)


def everything(seed: int) -> list[tuple[str, int]]:
    bus = MemoryBus(VirtualClock(), seed)
    publisher, got = line(bus)
    bus.inject("/t", Fault(0.01, 0.05, drop=0.1, duplicate=0.1, corrupt=0.1, cut=0.1, reorder=0.1))
    send(publisher, bus, 300)
    return got


def test_a_seed_repeats_every_fault() -> None:
    assert everything(1) == everything(1)
    assert everything(1) != everything(2)


def test_the_wall_clock_needs_no_advance_and_any_clock_can_drive_delays() -> None:
    now = [0]
    bus = MemoryBus(lambda: now[0])
    publisher, got = line(bus)
    bus.inject("/t", Fault(delay_s=0.02))
    publisher.write(b"HEAD0")
    now[0] = 30 * MS
    bus.advance(now[0])
    assert got == [("HEAD0", 30)]


def test_a_closed_node_gets_nothing_that_was_under_way() -> None:
    bus, got = MemoryBus(VirtualClock()), []
    listener = MemoryTransport(bus, "listener")
    listener.subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
    publisher = MemoryTransport(bus).publisher("/t", m.STRING, DEFAULT)
    bus.inject("/t", Fault(delay_s=0.01))
    publisher.write(b"HEAD0")
    listener.close()
    bus.advance(100 * MS)
    assert got == []


def test_a_frozen_service_does_not_answer() -> None:
    bus = MemoryBus(VirtualClock())
    MemoryTransport(bus, "server").service("/s", m.TRIGGER, lambda request: commands.outcome(True, ""))
    client = MemoryTransport(bus, "client")
    bus.inject("/s", Fault(freeze=True))
    with pytest.raises(TransportError, match="/s: no answer within 1 s"):
        client.call("/s", m.TRIGGER, commands.trigger_request(), 1.0)
    bus.inject("/s", Fault())
    assert commands.read_outcome(client.call("/s", m.TRIGGER, commands.trigger_request(), 1.0))[0]


def test_ten_thousand_samples_through_every_fault_take_under_two_seconds() -> None:
    started = time.perf_counter()
    bus = MemoryBus(VirtualClock())
    publisher, got = line(bus)
    bus.inject("/t", Fault(0.01, 0.05, drop=0.1, duplicate=0.1, corrupt=0.1, cut=0.1, reorder=0.1))
    send(publisher, bus, 10_000)
    assert 8000 < len(got) < 11_000
    assert time.perf_counter() - started < 2.0


def test_writers_in_several_threads_share_a_bus() -> None:
    bus, got = MemoryBus(), []
    MemoryTransport(bus).subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
    publisher = MemoryTransport(bus).publisher("/t", m.STRING, DEFAULT)
    bus.inject("/t", Fault(drop=0.5))
    threads = [threading.Thread(target=lambda: [publisher.write(b"HEAD0") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 800 < len(got) < 1200
