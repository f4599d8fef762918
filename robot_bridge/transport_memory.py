"""The transport without a wire: one process, synchronous, deterministic. For tests and for trying faults.

A sample is delivered while it is written, unless a `Fault` on its topic delays it; then `MemoryBus.advance` delivers it
when its time has come. The same seed, writes and advances give the same deliveries.
"""

import collections
import dataclasses
import heapq
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from embodied.contracts.errors import TransportError
from embodied.robot_bridge import messages, parameters
from embodied.robot_bridge.qos import QosProfile, incompatibility
from embodied.robot_bridge.transport import Endpoint, Graph, Service, full_name, mismatch, resolve, unread

log = logging.getLogger(__name__)
Callback = Callable[[bytes, int], None]
Handler = Callable[[bytes], bytes]


class VirtualClock:
    """A monotonic clock that moves when it is told to; give it to a `MemoryBus`. `now_ns` [ns]."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to the samples of a topic, for each subscription by itself.

    Attributes:
        delay_s: every sample arrives later by this [s]; see `MemoryBus.advance`.
        jitter_s: and by up to this much more, evenly distributed [s]; samples may overtake each other.
        drop, duplicate, corrupt, cut: probability that a sample is lost, comes twice, comes with a byte altered or
            short of its end.
        reorder: probability that a sample waits until a later one has passed.
        freeze: nothing arrives, as from a stopped process. What the subscription's depth can hold comes at the end.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    cut: float = 0.0
    reorder: float = 0.0
    freeze: bool = False


class MemoryBus:
    """What the transports of several nodes share.

    Args:
        clock: the monotonic time of an arrival [ns]; a `VirtualClock` moves with `advance`.
        seed: of the random faults.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, seed: int = 0) -> None:
        self.clock = clock
        self.transports: list[MemoryTransport] = []
        self._seed, self._faults, self._random = seed, dict[str, Fault](), dict[str, random.Random]()
        self._late: list[tuple[int, int, MemorySubscriber, bytes]] = []
        self._order, self._lock = itertools.count(), threading.RLock()

    def publishers(self, topic: str) -> "list[MemoryPublisher]":
        return [p for transport in list(self.transports) for p in transport.publishers if p.topic == topic]

    def subscribers(self, topic: str) -> "list[MemorySubscriber]":
        return [s for transport in list(self.transports) for s in transport.subscribers if s.topic == topic]

    def server(self, name: str, service_type: str) -> "MemoryServer | None":
        found = [t.servers[name] for t in list(self.transports) if name in t.servers]
        return next((server for server in found if server.service_type == service_type), None)

    def inject(self, topic: str, fault: Fault) -> None:
        """Let `fault` act on a topic's samples from now on; `Fault()` ends all faults and lets go what was held."""
        with self._lock:
            self._faults[topic] = fault
        for subscriber in self.subscribers(topic):
            if not fault.freeze:
                self._release(subscriber.frozen, subscriber)
            if not fault.reorder:
                self._release(subscriber.overtaken, subscriber)

    def advance(self, to_ns: int) -> None:
        """Deliver what is due up to `to_ns`, in the order of its time, and set a virtual clock to it."""
        virtual = self.clock if isinstance(self.clock, VirtualClock) else None
        while True:
            with self._lock:
                if not self._late or self._late[0][0] > to_ns:
                    break
                due_ns, _, subscriber, data = heapq.heappop(self._late)
            if virtual is not None:
                virtual.now_ns = max(virtual.now_ns, due_ns)
            subscriber.receive(data)
        if virtual is not None:
            virtual.now_ns = max(virtual.now_ns, to_ns)

    def answers(self, name: str) -> bool:
        """Whether a fault on a service's name lets this call through."""
        with self._lock:
            fault = self._faults.get(name, Fault())
            return not fault.freeze and self._chance(name, fault.drop)

    def deliver(self, subscriber: "MemorySubscriber", data: bytes) -> None:
        """Pass one sample on to one subscription, through the topic's fault."""
        with self._lock:
            fault = self._faults.get(subscriber.topic)
        if fault is None:
            subscriber.receive(data)
            return
        if fault.freeze:
            subscriber.frozen.append(data)
            return
        with self._lock:
            arriving = self._alter(subscriber.topic, fault, data)
            waits = not self._chance(subscriber.topic, fault.reorder)
        if waits:
            subscriber.overtaken.extend(arriving)
            return
        for sample in arriving:
            self._send(subscriber, sample, fault)
        while arriving and subscriber.overtaken:
            self._send(subscriber, subscriber.overtaken.popleft(), fault)

    def _send(self, subscriber: "MemorySubscriber", data: bytes, fault: Fault) -> None:
        late_s = fault.delay_s + fault.jitter_s * self._generator(subscriber.topic).random()
        if late_s <= 0:
            subscriber.receive(data)
            return
        with self._lock:
            heapq.heappush(self._late, (self.clock() + round(late_s * 1e9), next(self._order), subscriber, data))

    def _alter(self, topic: str, fault: Fault, data: bytes) -> list[bytes]:
        if not self._chance(topic, fault.drop):
            return []
        generator = self._generator(topic)
        place = generator.randrange(4, max(5, len(data)))  # behind the encapsulation header
        if not self._chance(topic, fault.corrupt) and len(data) > place:
            data = data[:place] + bytes([data[place] ^ generator.randrange(1, 256)]) + data[place + 1 :]
        if not self._chance(topic, fault.cut):
            data = data[:place]
        return [data] if self._chance(topic, fault.duplicate) else [data, data]

    def _chance(self, topic: str, probability: float) -> bool:
        """True if what has `probability` does not happen."""
        return probability <= 0 or self._generator(topic).random() >= probability

    def _generator(self, topic: str) -> random.Random:
        if topic not in self._random:
            self._random[topic] = random.Random(f"{self._seed} {topic}")
        return self._random[topic]

    @staticmethod
    def _release(held: "collections.deque[bytes]", subscriber: "MemorySubscriber") -> None:
        while held:
            subscriber.receive(held.popleft())


class MemoryPublisher:
    """One publisher; `matched` counts the subscriptions it reaches."""

    def __init__(self, bus: MemoryBus, endpoint: Endpoint) -> None:
        self.topic, self.endpoint, self._bus = endpoint.topic, endpoint, bus
        self.history = collections.deque[bytes](maxlen=endpoint.qos.depth or None)
        self.closed = False

    @property
    def matched(self) -> int:
        return sum(not _reason(self, subscriber) for subscriber in self._bus.subscribers(self.topic))

    def write(self, data: bytes) -> None:
        if self.closed:
            raise TransportError(f"{self.topic}: node {self.endpoint.node} has left the graph.")
        self.history.append(data)
        for subscriber in self._bus.subscribers(self.topic):
            if not _reason(self, subscriber):
                self._bus.deliver(subscriber, data)


class MemorySubscriber:
    """One subscription; `matched` counts the publishers that reach it."""

    def __init__(self, bus: MemoryBus, endpoint: Endpoint, callback: Callback) -> None:
        self.topic, self.endpoint, self._bus, self._callback = endpoint.topic, endpoint, bus, callback
        self.frozen = collections.deque[bytes](maxlen=endpoint.qos.depth or None)
        self.overtaken = collections.deque[bytes]()
        self.closed = False

    @property
    def matched(self) -> int:
        return sum(not _reason(publisher, self) for publisher in self._bus.publishers(self.topic))

    def receive(self, data: bytes) -> None:
        if self.closed:
            return
        try:
            self._callback(data, self._bus.clock())
        except Exception:
            log.exception("callback of %s", self.topic)


class MemoryServer:
    """One service; requests are answered one at a time, on the caller's thread."""

    def __init__(self, service_type: str, handler: Handler) -> None:
        self.service_type, self._handler, self._lock = service_type, handler, threading.RLock()

    def answer(self, request: bytes) -> bytes:
        with self._lock:
            return self._handler(request)


def _reason(publisher: MemoryPublisher, subscriber: MemorySubscriber) -> str:
    offered, requested = publisher.endpoint, subscriber.endpoint
    if offered.message_type != requested.message_type:
        return f"the publisher sends {offered.message_type}, the subscription expects {requested.message_type}"
    return incompatibility(offered.qos, requested.qos)


class MemoryTransport:
    """One node's end of a `MemoryBus`; the interface of `embodied.contracts.protocols.Transport`."""

    services = True

    def __init__(self, bus: MemoryBus, node: str = "node", namespace: str = "/") -> None:
        self.full_name = full_name(node, namespace)
        self.node, self.namespace, self._bus = node, namespace, bus
        self.publishers: list[MemoryPublisher] = []
        self.subscribers: list[MemorySubscriber] = []
        self.servers: dict[str, MemoryServer] = {}
        bus.transports.append(self)

    def _endpoint(self, topic: str, message_type: str, publishes: bool, qos: QosProfile) -> Endpoint:
        name = resolve(topic, self.node, self.namespace)
        messages.message_class(message_type)  # an unknown type is an error here as on the wire
        return Endpoint(name, message_type, self.full_name, publishes, qos, messages.type_hash(message_type))

    def publisher(self, topic: str, message_type: str, qos: QosProfile) -> MemoryPublisher:
        self.publishers.append(MemoryPublisher(self._bus, self._endpoint(topic, message_type, True, qos)))
        return self.publishers[-1]

    def subscriber(self, topic: str, message_type: str, qos: QosProfile, callback: Callback | None) -> MemorySubscriber:
        subscriber = MemorySubscriber(self._bus, self._endpoint(topic, message_type, False, qos), callback or unread)
        self.subscribers.append(subscriber)
        if qos.latched:
            for publisher in self._bus.publishers(subscriber.topic):
                for data in [] if _reason(publisher, subscriber) else list(publisher.history):
                    self._bus.deliver(subscriber, data)
        return subscriber

    def service(self, name: str, service_type: str, handler: Handler) -> None:
        messages.message_class(f"{service_type}_Request")
        self.servers[resolve(name, self.node, self.namespace)] = MemoryServer(service_type, handler)

    def call(self, name: str, service_type: str, request: bytes, timeout_s: float) -> bytes:
        """The response; a server that is absent is said at once, since nothing can appear while this thread waits."""
        name = resolve(name, self.node, self.namespace)
        messages.message_class(f"{service_type}_Request")
        server = self._bus.server(name, service_type)
        if server is None:
            raise TransportError(f"{name}: no node serves {service_type}.")
        started = self._bus.clock()
        try:
            response = server.answer(request) if self._bus.answers(name) else None
        except Exception:
            log.exception("handler of %s", name)
            response = None
        if response is None or self._bus.clock() - started > timeout_s * 1e9:
            raise TransportError(f"{name}: no answer within {timeout_s:g} s.")
        return response

    def parameters(self, values: Mapping[str, Any], on_set: parameters.OnSet | None = None) -> Mapping[str, Any]:
        return parameters.serve(self, values, on_set)

    def graph(self) -> Graph:
        everyone = list(self._bus.transports)
        ends = [end.endpoint for t in everyone for end in (*t.publishers, *t.subscribers)]
        services = [Service(name, s.service_type, t.full_name) for t in everyone for name, s in t.servers.items()]
        return Graph(tuple(sorted(t.full_name for t in everyone)), tuple(ends), tuple(services))

    def problems(self) -> list[str]:
        """One line for every pair of endpoints of this node that does not match."""
        pairs = [(p, s) for s in self.subscribers for p in self._bus.publishers(s.topic)]
        pairs += [(p, s) for p in self.publishers for s in self._bus.subscribers(p.topic) if s not in self.subscribers]
        reasons = [(p, s, _reason(p, s)) for p, s in pairs]
        return [mismatch(p.endpoint, s.endpoint, reason) for p, s, reason in reasons if reason]

    def close(self) -> None:
        if self not in self._bus.transports:
            return
        self._bus.transports.remove(self)
        for end in (*self.publishers, *self.subscribers):
            end.closed = True
        self.publishers, self.subscribers, self.servers = [], [], {}
