"""The transport without a wire: one process, synchronous, deterministic. For tests and for trying faults."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from embodied.robot_bridge.qos import QosProfile, incompatibility

Callback = Callable[[bytes, int], None]


class MemoryBus:
    """What the transports of several nodes share.

    Attributes:
        clock: returns the monotonic time of an arrival [ns].
        fault: (topic, data) -> the samples that arrive instead: none drops, two duplicate, other bytes corrupt.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self.fault: Callable[[str, bytes], Iterable[bytes]] = lambda topic, data: (data,)
        self.publishers: dict[str, list[MemoryPublisher]] = defaultdict(list)
        self.subscribers: dict[str, list[MemorySubscriber]] = defaultdict(list)


class MemoryPublisher:
    """One publisher; `matched` counts the subscriptions it reaches."""

    def __init__(self, bus: MemoryBus, topic: str, message_type: str, qos: QosProfile) -> None:
        self.topic, self.message_type, self.qos, self._bus = topic, message_type, qos, bus
        self.history: deque[bytes] = deque(maxlen=qos.depth)
        bus.publishers[topic].append(self)

    @property
    def matched(self) -> int:
        return sum(_match(self, subscriber) for subscriber in self._bus.subscribers[self.topic])

    def write(self, data: bytes) -> None:
        self.history.append(data)
        for subscriber in list(self._bus.subscribers[self.topic]):
            if _match(self, subscriber):
                subscriber.deliver(data)


class MemorySubscriber:
    """One subscription; `matched` counts the publishers that reach it."""

    def __init__(self, bus: MemoryBus, topic: str, message_type: str, qos: QosProfile, callback: Callback) -> None:
        self.topic, self.message_type, self.qos, self._bus, self._callback = topic, message_type, qos, bus, callback
        bus.subscribers[topic].append(self)
        if qos.latched:
            for publisher in bus.publishers[topic]:
                for data in list(publisher.history) if _match(publisher, self) else ():
                    self.deliver(data)

    @property
    def matched(self) -> int:
        return sum(_match(publisher, self) for publisher in self._bus.publishers[self.topic])

    def deliver(self, data: bytes) -> None:
        for arriving in self._bus.fault(self.topic, data):
            self._callback(arriving, self._bus.clock())


def _match(publisher: MemoryPublisher, subscriber: MemorySubscriber) -> bool:
    same_type = publisher.message_type == subscriber.message_type
    return same_type and not incompatibility(publisher.qos, subscriber.qos)


class MemoryTransport:
    """One node's end of a `MemoryBus`; the interface of `embodied.contracts.protocols.Transport`."""

    def __init__(self, bus: MemoryBus, node: str = "node") -> None:
        self.node, self._bus = node, bus
        self._publishers: list[MemoryPublisher] = []
        self._subscribers: list[MemorySubscriber] = []

    def publisher(self, topic: str, message_type: str, qos: QosProfile) -> MemoryPublisher:
        self._publishers.append(MemoryPublisher(self._bus, topic, message_type, qos))
        return self._publishers[-1]

    def subscriber(self, topic: str, message_type: str, qos: QosProfile, callback: Callback) -> MemorySubscriber:
        self._subscribers.append(MemorySubscriber(self._bus, topic, message_type, qos, callback))
        return self._subscribers[-1]

    def problems(self) -> list[str]:
        """One line for every pair of endpoints of this node that does not match."""
        pairs = [(p, s) for s in self._subscribers for p in self._bus.publishers[s.topic]]
        pairs += [(p, s) for p in self._publishers for s in self._bus.subscribers[p.topic]]
        reasons = [(p.topic, incompatibility(p.qos, s.qos)) for p, s in pairs]
        return [f"{topic}: {reason}" for topic, reason in reasons if reason]

    def close(self) -> None:
        for publisher in self._publishers:
            self._bus.publishers[publisher.topic].remove(publisher)
        for subscriber in self._subscribers:
            self._bus.subscribers[subscriber.topic].remove(subscriber)
        self._publishers, self._subscribers = [], []
