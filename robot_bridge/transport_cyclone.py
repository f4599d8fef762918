"""The ROS 2 wire through Cyclone DDS from PyPI; no ROS installation.

A ROS 2 node sees ordinary nodes: topic and type names are mangled as rmw does, endpoints carry their type hash, and
`ros_discovery_info` attributes them to a node, so that `ros2 node list` and `ros2 topic info -v` work.
By default nothing leaves the host: only the loopback interface is advertised. (Cyclone still binds its two UDP ports
on all interfaces.)
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, EmbodiedError, MissingExtraError
from embodied.robot_bridge import messages
from embodied.robot_bridge.carriers import carrier_class, carry
from embodied.robot_bridge.qos import QosProfile

log = logging.getLogger(__name__)
Callback = Callable[[bytes, int], None]

MAX_DOMAIN = 232  # above it the UDP port exceeds 65535
MAX_BLOCKING_NS = 10_000_000  # a hung reliable reader costs a writer at most this [ns]
# Large fragments: with the default size a third of the best-effort VGA images is lost on loopback.
LOCALHOST_XML = """
<CycloneDDS><Domain Id="any">
  <General>
    <Interfaces><NetworkInterface name="lo" multicast="false"/></Interfaces>
    <AllowMulticast>false</AllowMulticast>
    <MaxMessageSize>65500B</MaxMessageSize><FragmentSize>63000B</FragmentSize>
  </General>
  <Discovery>
    <ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>32</MaxAutoParticipantIndex>
    <Peers><Peer Address="127.0.0.1"/></Peers>
  </Discovery>
</Domain></CycloneDDS>"""
SUBNET_XML = "<CycloneDDS/>"
DISCOVERY = {"localhost": LOCALHOST_XML, "subnet": SUBNET_XML}

_domains: dict[int, tuple[str, Any]] = {}  # a process may configure a domain once


def default_domain() -> int:
    """ROS_DOMAIN_ID, or 0."""
    text = os.environ.get("ROS_DOMAIN_ID", "") or "0"
    if not text.isdigit() or int(text) > MAX_DOMAIN:
        raise ConfigError(f"ROS_DOMAIN_ID is '{text}'; it must be a number from 0 to {MAX_DOMAIN}.")
    return int(text)


def _configure(domain: int, discovery: str) -> None:
    try:
        from cyclonedds.domain import Domain
    except ImportError as error:
        raise MissingExtraError("cyclonedds", "ros", "the ROS 2 bridge") from error
    if not 0 <= domain <= MAX_DOMAIN:
        raise ConfigError(f"ROS domain {domain} is out of range; it must be from 0 to {MAX_DOMAIN}.")
    if discovery not in DISCOVERY:
        raise ConfigError(f"discovery '{discovery}' is unknown. Valid: {', '.join(DISCOVERY)}.")
    if domain in _domains:
        if _domains[domain][0] != discovery:
            raise ConfigError(f"domain {domain} is already open in this process with '{_domains[domain][0]}'.")
        return
    parts = [DISCOVERY[discovery].strip(), os.environ.get("CYCLONEDDS_URI", "")]
    _domains[domain] = (discovery, Domain(domain, ",".join(part for part in parts if part)))


def _dds_qos(qos: QosProfile, writer: bool, message_type: str | None) -> Any:
    """The wheel's Qos of a profile; `message_type` puts the type hash into the endpoint's user data."""
    from cyclonedds.core import Policy, Qos

    policies = [
        Policy.History.KeepLast(qos.depth),
        Policy.Reliability.Reliable(MAX_BLOCKING_NS) if qos.reliable else Policy.Reliability.BestEffort,
        Policy.Durability.TransientLocal if qos.latched else Policy.Durability.Volatile,
    ]
    if qos.latched:
        policies.append(Policy.DurabilityService(0, Policy.History.KeepLast(qos.depth), -1, -1, -1))
    if message_type is not None:
        policies.append(Policy.Userdata(f"typehash={messages.type_hash(message_type)};".encode()))
    if writer:
        policies.append(Policy.WriterDataLifecycle(autodispose=False))
        policies.append(Policy.DataRepresentation(use_cdrv0_representation=True, use_xcdrv2_representation=False))
    return Qos(*policies)


class CyclonePublisher:
    """One DDS writer; `matched` counts the subscriptions it reaches."""

    def __init__(self, topic: str, writer: Any, cls: Any) -> None:
        self.topic, self.entity, self._class = topic, writer, cls

    @property
    def matched(self) -> int:
        return len(self.entity.get_matched_subscriptions())

    def write(self, data: bytes) -> None:
        """Send CDR bytes. Raises EmbodiedError if they are no sample of the topic's type."""
        from cyclonedds.core import DDSException

        try:
            self.entity.write(carry(self._class, data))
        except DDSException as error:
            if error.code == DDSException.DDS_RETCODE_TIMEOUT:
                log.warning("%s: a reliable subscriber is not keeping up; a sample waits", self.topic)
                return
            raise EmbodiedError(f"{self.topic}: Cyclone DDS refused a sample of {len(data)} bytes: {error}") from None


class CycloneSubscriber:
    """One DDS reader; `matched` counts the publishers that reach it."""

    def __init__(self, topic: str, reader: Any, callback: Callback) -> None:
        from cyclonedds.core import InstanceState, ReadCondition, SampleState, ViewState

        self.topic, self.entity, self.callback = topic, reader, callback
        self.condition = ReadCondition(reader, SampleState.Any | ViewState.Any | InstanceState.Any)

    @property
    def matched(self) -> int:
        return len(self.entity.get_matched_publications())

    def drain(self) -> None:
        """Hand every waiting sample to the callback."""
        from cyclonedds.internal import InvalidSample

        while samples := self.entity.take(N=64):
            received = time.monotonic_ns()
            for sample in samples:
                if isinstance(sample, InvalidSample):  # its writer went away
                    continue
                try:
                    self.callback(sample.data, received)
                except Exception:
                    log.exception("callback of %s", self.topic)


class CycloneTransport:
    """One node on the ROS 2 graph; the interface of `embodied.contracts.protocols.Transport`.

    Callbacks run on one dispatcher thread per transport: enqueue only.

    Args:
        node: node name as `ros2 node list` shows it.
        domain: ROS domain, 0 to 232; None takes ROS_DOMAIN_ID.
        discovery: `localhost` (nothing leaves the host) or `subnet` (Cyclone's defaults, with multicast).
    """

    def __init__(
        self, node: str, domain: int | None = None, discovery: str = "localhost", namespace: str = "/"
    ) -> None:
        self.domain = default_domain() if domain is None else domain
        _configure(self.domain, discovery)
        from cyclonedds.core import GuardCondition, Policy, Qos, WaitSet
        from cyclonedds.domain import DomainParticipant

        self.node, self.namespace = node, namespace
        self._participant = DomainParticipant(self.domain, Qos(Policy.Userdata(b"enclave=/;")))
        self._publishers: list[CyclonePublisher] = []
        self._subscribers: list[CycloneSubscriber] = []
        self._topics: dict[str, Any] = {}
        self._lock, self._closing = threading.Lock(), False
        self._waitset, self._guard = WaitSet(self._participant), GuardCondition(self._participant)
        self._waitset.attach(self._guard)
        self._discovery = self._writer(
            "ros_discovery_info", messages.PARTICIPANT_INFO, QosProfile(1, latched=True), hashed=False
        )
        self._announce()
        self._thread = threading.Thread(target=self._dispatch, name=f"dds-{node}", daemon=True)
        self._thread.start()

    def _topic(self, name: str, message_type: str) -> Any:
        from cyclonedds.topic import Topic

        if name not in self._topics:
            self._topics[name] = Topic(self._participant, name, carrier_class(message_type))
        return self._topics[name]

    def _writer(self, name: str, message_type: str, qos: QosProfile, hashed: bool = True) -> CyclonePublisher:
        from cyclonedds.pub import DataWriter

        topic = self._topic(name, message_type)
        settings = _dds_qos(qos, writer=True, message_type=message_type if hashed else None)
        return CyclonePublisher(
            name.removeprefix("rt"), DataWriter(self._participant, topic, settings), carrier_class(message_type)
        )

    def publisher(self, topic: str, message_type: str, qos: QosProfile) -> CyclonePublisher:
        """A publisher on the absolute ROS topic name `topic`."""
        with self._lock:
            self._publishers.append(self._writer(f"rt{topic}", message_type, qos))
            self._announce()
            return self._publishers[-1]

    def subscriber(self, topic: str, message_type: str, qos: QosProfile, callback: Callback) -> CycloneSubscriber:
        """A subscription; `callback(data, received_monotonic_ns)` runs on the dispatcher thread."""
        from cyclonedds.sub import DataReader

        with self._lock:
            settings = _dds_qos(qos, writer=False, message_type=message_type)
            reader = DataReader(self._participant, self._topic(f"rt{topic}", message_type), settings)
            subscriber = CycloneSubscriber(topic, reader, callback)
            self._subscribers.append(subscriber)
            self._waitset.attach(subscriber.condition)
            self._announce()
            return subscriber

    def _announce(self) -> None:
        """Publish which endpoints belong to this node (whole message at every change, as rmw does)."""
        new = messages.message_class
        gid_class = new("rmw_dds_common/msg/Gid")

        def gid(entity: Any) -> Any:
            return gid_class(np.frombuffer(entity.get_guid().bytes, np.uint8))

        readers = [gid(s.entity) for s in self._subscribers]
        writers = [gid(p.entity) for p in self._publishers]
        node = new("rmw_dds_common/msg/NodeEntitiesInfo")(self.namespace, self.node, readers, writers)
        self._discovery.write(messages.encode(new(messages.PARTICIPANT_INFO)(gid(self._participant), [node])))

    def _dispatch(self) -> None:
        second = 1_000_000_000
        while not self._closing:
            self._waitset.wait(second)
            with self._lock:
                subscribers = list(self._subscribers)
            for subscriber in subscribers:
                if self._closing:
                    return
                subscriber.drain()

    def problems(self) -> list[str]:
        """One line for every endpoint that met a peer with incompatible quality of service."""
        names = {2: "durability", 4: "deadline", 8: "liveliness", 11: "reliability", 25: "data representation"}
        found = []
        for p in self._publishers:
            status = p.entity.get_offered_incompatible_qos_status()
            if status.total_count:
                policy = names.get(status.last_policy_id, status.last_policy_id)
                found.append(f"{p.topic}: a subscription requests another {policy} than is offered")
        for s in self._subscribers:
            status = s.entity.get_requested_incompatible_qos_status()
            if status.total_count:
                policy = names.get(status.last_policy_id, status.last_policy_id)
                found.append(f"{s.topic}: a publisher offers another {policy} than is requested")
        return found

    def close(self) -> None:
        """Leave the graph; peers notice at once."""
        if self._closing:
            return
        self._closing = True
        self._guard.set(True)
        self._thread.join(timeout=3)
        # Deleting the participant deletes its entities; the wheel's objects then only forget their handles.
        self._participant._delete(self._participant._ref)  # type: ignore[operator]
