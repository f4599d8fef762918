"""The ROS 2 wire through Cyclone DDS from PyPI; no ROS installation.

A ROS 2 node sees an ordinary node: topic, service and type names are mangled as rmw does, endpoints carry their type
hash, and `ros_discovery_info` attributes them to a node, so that `ros2 node list`, `ros2 topic info -v`, `ros2 service
call` and `ros2 param` work. Services and parameters reach peers on rmw_cyclonedds only; topics reach every DDS.
What leaves the host, and how to allow it, is said in dds_domain.py.
"""

import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from embodied.contracts.errors import TransportError
from embodied.robot_bridge import dds_discovery, messages, parameters
from embodied.robot_bridge.carriers import carrier_class, service_class
from embodied.robot_bridge.dds_domain import default_domain, open_domain
from embodied.robot_bridge.dds_endpoints import Callback, CyclonePublisher, CycloneSubscriber, to_dds
from embodied.robot_bridge.dds_graph import GraphView
from embodied.robot_bridge.dds_services import Client, Handler, Server, make_id, user_data
from embodied.robot_bridge.qos import KEEP_ALL, SERVICES, QosProfile
from embodied.robot_bridge.transport import Graph, full_name, resolve, unread

log = logging.getLogger(__name__)


class CycloneTransport:
    """One node on the ROS 2 graph; the interface of `embodied.contracts.protocols.Transport`.

    Callbacks run on one dispatcher thread per transport: enqueue only. Service handlers have threads of their own.

    Args:
        node: node name as `ros2 node list` shows it.
        domain: ROS domain, 0 to 232; None takes ROS_DOMAIN_ID.
        discovery: `localhost` (nothing leaves the host) or `subnet`.
        namespace: `/` or `/a/b`.
        ros_distro: of the peers, where the wire depends on it; None takes ROS_DISTRO.
    """

    services = True

    def __init__(
        self,
        node: str,
        domain: int | None = None,
        discovery: str = "localhost",
        namespace: str = "/",
        ros_distro: str | None = None,
    ) -> None:
        full_name(node, namespace)  # refuses a bad name
        self.domain = default_domain() if domain is None else domain
        open_domain(self.domain, discovery)
        from cyclonedds.core import GuardCondition, Policy, Qos, WaitSet
        from cyclonedds.domain import DomainParticipant

        self.node, self.namespace = node, namespace
        self._participant = DomainParticipant(self.domain, Qos(Policy.Userdata(b"enclave=/;")))
        self._guid = self._participant.get_guid().bytes
        self._publishers: list[CyclonePublisher] = []
        self._subscribers: list[CycloneSubscriber] = []
        self._servers: list[Server] = []
        self._clients: dict[tuple[str, str], Client] = {}
        self._topics: dict[str, Any] = {}
        self._ids = itertools.count(1)
        # Held while endpoints are made and announced, never while a callback runs.
        self._lock, self._closing = threading.RLock(), False
        self._waitset, self._guard = WaitSet(self._participant), GuardCondition(self._participant)
        self._waitset.attach(self._guard)
        self._gid_size = dds_discovery.gid_bytes(ros_distro)
        self._view = GraphView(self._participant, self._gid_size)
        for condition in self._view.conditions:
            self._waitset.attach(condition)
        info = dds_discovery.info_class(self._gid_size)
        # Without it every peer from Iron on logs a warning; Humble, whose message is another, knows no hashes.
        known = f"typehash={_hash(messages.PARTICIPANT_INFO)};" if self._gid_size == dds_discovery.GUID_BYTES else ""
        self._info = self._writer(dds_discovery.TOPIC, info, QosProfile(1, latched=True), known)
        everyone = QosProfile(KEEP_ALL, latched=True)
        nodes = self._reader(dds_discovery.TOPIC, info, everyone, known, self._view.read_info)
        self._sources: list[CycloneSubscriber | Server | Client] = [nodes]
        self._waitset.attach(nodes.condition)
        self._announce()
        self._thread = threading.Thread(target=self._dispatch, name=f"dds {node}", daemon=True)
        self._thread.start()

    def _topic(self, name: str, cls: Any) -> Any:
        from cyclonedds.topic import Topic

        key = f"{name} {cls.__idl_typename__}"
        if key not in self._topics:
            self._topics[key] = Topic(self._participant, name, cls)
        return self._topics[key]

    def _writer(self, name: str, cls: Any, qos: QosProfile, announced: str) -> CyclonePublisher:
        from cyclonedds.pub import DataWriter

        settings = to_dds(qos, writer=True, user_data=announced)
        writer = DataWriter(self._participant, self._topic(name, cls), settings)
        return CyclonePublisher(name.removeprefix("rt"), writer, cls)

    def _reader(self, name: str, cls: Any, qos: QosProfile, announced: str, callback: Callback) -> CycloneSubscriber:
        from cyclonedds.sub import DataReader

        settings = to_dds(qos, writer=False, user_data=announced)
        reader = DataReader(self._participant, self._topic(name, cls), settings)
        return CycloneSubscriber(name.removeprefix("rt"), reader, callback)

    def _listen(self, source: "CycloneSubscriber | Server | Client") -> None:
        self._sources.append(source)
        self._waitset.attach(source.condition)
        self._announce()

    def _check_open(self) -> None:
        if self._closing:
            raise TransportError(f"node {self.node} has left the graph.")

    def publisher(self, topic: str, message_type: str, qos: QosProfile) -> CyclonePublisher:
        with self._lock:
            self._check_open()
            name = f"rt{resolve(topic, self.node, self.namespace)}"
            announced = f"typehash={_hash(message_type)};"
            self._publishers.append(self._writer(name, carrier_class(message_type), qos, announced))
            self._announce()
            return self._publishers[-1]

    def subscriber(
        self, topic: str, message_type: str, qos: QosProfile, callback: Callback | None
    ) -> CycloneSubscriber:
        """A subscription; `callback(data, received_monotonic_ns)` runs on the dispatcher thread."""
        with self._lock:
            self._check_open()
            name = f"rt{resolve(topic, self.node, self.namespace)}"
            announced = f"typehash={_hash(message_type)};"
            subscriber = self._reader(name, carrier_class(message_type), qos, announced, callback or unread)
            self._subscribers.append(subscriber)
            if callback is None:  # nothing wakes the dispatcher; what comes is replaced by what comes next
                self._announce()
            else:
                self._listen(subscriber)
            return subscriber

    def service(self, name: str, service_type: str, handler: Handler) -> None:
        with self._lock:
            self._check_open()
            name = resolve(name, self.node, self.namespace)
            requests, responses = self._service_ends(name, service_type, "serviceid", serves=True)
            server = Server(name, service_type, requests, responses, handler)
            self._servers.append(server)
            self._listen(server)

    def _service_ends(
        self, name: str, service_type: str, key: str, serves: bool
    ) -> tuple[CycloneSubscriber, CyclonePublisher]:
        """The reader and the writer of a service (of requests and responses) or of a client (the other way)."""
        identity = make_id(self._guid, next(self._ids))
        kinds = [f"{service_type}_Request", f"{service_type}_Response"]
        topics = [f"rq{name}Request", f"rr{name}Reply"]
        read, write = (0, 1) if serves else (1, 0)
        announced = [user_data(key, identity, kind) for kind in (_known(kinds[0]), kinds[1])]
        writer = self._writer(topics[write], service_class(kinds[write]), SERVICES, announced[write])
        reader = self._reader(topics[read], service_class(kinds[read]), SERVICES, announced[read], unread)
        return reader, writer

    def call(self, name: str, service_type: str, request: bytes, timeout_s: float) -> bytes:
        if threading.current_thread() is self._thread:
            raise TransportError(
                f"{name}: a service cannot be called from a topic's callback, which would wait on itself."
            )
        name = resolve(name, self.node, self.namespace)
        with self._lock:
            self._check_open()
            client = self._clients.get((name, service_type))
            if client is None:
                responses, requests = self._service_ends(name, service_type, "clientid", serves=False)
                client = self._clients[name, service_type] = Client(name, requests, responses)
                self._listen(client)
        return client.call(request, timeout_s)

    def parameters(self, values: Mapping[str, Any], on_set: parameters.OnSet | None = None) -> Mapping[str, Any]:
        return parameters.serve(self, values, on_set)

    def _announce(self) -> None:
        """Publish which endpoints belong to this node (the whole message at every change, as rmw does)."""
        services = (*self._servers, *self._clients.values())
        readers = [*self._subscribers, *(s.requests if isinstance(s, Server) else s.responses for s in services)]
        writers = [*self._publishers, *(s.responses if isinstance(s, Server) else s.requests for s in services)]
        node = dds_discovery.NodeInfo(self.namespace, self.node, _guids(readers), _guids(writers))
        self._info.write(dds_discovery.encode(self._guid, [node], self._gid_size))

    def _dispatch(self) -> None:
        second = 1_000_000_000
        while not self._closing:
            self._waitset.wait(second)
            with self._lock:
                sources = list(self._sources)
            for take_in in (self._view.update, *(source.drain for source in sources)):
                if self._closing:
                    return
                try:
                    take_in()
                except Exception:  # one reader's trouble is not the others'
                    log.exception("node %s", self.node)

    def graph(self) -> Graph:
        return self._view.graph()

    def problems(self) -> list[str]:
        """One line for every pair of endpoints, one of them this node's, that can never match."""
        with self._lock:
            if self._closing:
                return []
            ends = list(self._publishers), list(self._subscribers)
        return self._view.problems(*ends)

    def close(self) -> None:
        """Leave the graph; peers notice at once."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for server in self._servers:
            server.close()
        self._guard.set(True)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=3)
        # Deleting the participant deletes its entities; the wheel's objects must not do it a second time, when they are
        # collected, by numbers that may be others' by then.
        _let_go(self._participant._ref)
        self._participant._delete(self._participant._ref)  # type: ignore[operator]


def _let_go(participant: int) -> None:
    """Make the wheel's objects of a participant and of all that belongs to it end without deleting anything."""
    from cyclonedds.core import Entity

    entities: Any = Entity._entities
    for entity in list(entities.values()):
        if entity._get_participant(entity._ref) == participant:  # type: ignore[operator]
            entities.pop(entity._ref, None)


def _known(message_type: str) -> str:
    messages.message_class(message_type)  # says which name is wrong
    return message_type


def _hash(message_type: str) -> str:
    return messages.type_hash(_known(message_type))


def _guids(ends: Sequence[Any]) -> tuple[bytes, ...]:
    return tuple(end.entity.get_guid().bytes for end in ends)
