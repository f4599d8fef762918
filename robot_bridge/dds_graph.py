"""What is on the graph: nodes, endpoints, services, and which of ours can never match, from DDS discovery."""

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from embodied.contracts.errors import InputError
from embodied.robot_bridge import dds_discovery
from embodied.robot_bridge.carriers import ros_type_name
from embodied.robot_bridge.dds_endpoints import HANDLE, CyclonePublisher, CycloneSubscriber, from_dds, read_condition
from embodied.robot_bridge.qos import incompatibility
from embodied.robot_bridge.transport import Endpoint, Graph, Service, mismatch

log = logging.getLogger(__name__)

_ALIVE = 16  # DDS_ALIVE_INSTANCE_STATE
_HASH = re.compile(rb"typehash=(RIHS01_[0-9a-f]{64})")


def join(namespace: str, name: str) -> str:
    return f"{namespace.rstrip('/')}/{name}"


class GraphView:
    """Follows discovery. `update` runs on the dispatcher's thread, everything else on any.

    Args:
        participant: of DDS.
        gid_size: bytes of a Gid; see dds_discovery.py.
    """

    def __init__(self, participant: Any, gid_size: int) -> None:
        from cyclonedds import builtin

        self._gid_size, self._lock = gid_size, threading.Lock()
        kinds = (builtin.BuiltinTopicDcpsPublication, builtin.BuiltinTopicDcpsSubscription)
        self._readers = [(builtin.BuiltinDataReader(participant, kind), i == 0) for i, kind in enumerate(kinds)]
        self._participants = builtin.BuiltinDataReader(participant, builtin.BuiltinTopicDcpsParticipant)
        self.conditions = [read_condition(r) for r, _ in self._readers] + [read_condition(self._participants)]
        self._alive: set[bytes] = set()
        self._endpoints: dict[bytes, tuple[int, Any, bool]] = {}
        self._nodes: dict[bytes, Sequence[dds_discovery.NodeInfo]] = {}
        self._cached: dict[bytes, Endpoint] = {}
        self._owned: dict[bytes, str] | None = None  # endpoint -> node, made when it is asked for

    def update(self) -> None:
        """Take in what discovery has found or lost."""
        for reader, publishes in self._readers:
            while samples := reader.take(N=64):
                with self._lock:
                    for sample in samples:
                        self._take_endpoint(sample, publishes)
        while samples := self._participants.take(N=64):
            with self._lock:
                for sample in samples:
                    key = sample.key.bytes
                    if sample.sample_info.instance_state == _ALIVE:
                        self._alive.add(key)
                    else:
                        self._alive.discard(key)
                        self._nodes.pop(key, None)
                    self._forget_owners()

    def _take_endpoint(self, sample: Any, publishes: bool) -> None:
        key = sample.key.bytes
        self._cached.pop(key, None)
        if sample.sample_info.instance_state != _ALIVE or not sample.sample_info.valid_data:
            self._endpoints.pop(key, None)
        else:
            self._endpoints[key] = (sample.sample_info.instance_handle & HANDLE, sample, publishes)

    def read_info(self, data: bytes, _: int = 0) -> None:
        """Take in a sample of `ros_discovery_info`."""
        try:
            participant, nodes = dds_discovery.decode(data, self._gid_size)
        except InputError as error:
            log.warning("%s: %s", dds_discovery.TOPIC, error)
            return
        with self._lock:
            self._nodes[participant] = nodes
            self._forget_owners()

    def _forget_owners(self) -> None:
        self._cached.clear()
        self._owned = None

    def graph(self) -> Graph:
        """Everything that is known now."""
        with self._lock:
            nodes = [join(n.namespace, n.name) for infos in self._living() for n in infos]
            ends = [self._endpoint(key) for key in self._endpoints]
            requests = [
                (sample.topic_name, sample.type_name, key)
                for key, (_, sample, publishes) in self._endpoints.items()
                if not publishes and sample.topic_name.startswith("rq/")
            ]
            services = [
                Service(topic[2:].removesuffix("Request"), _service_type(kind), self._owner(key))
                for topic, kind, key in requests
            ]
        return Graph(tuple(sorted(nodes)), tuple(end for end in ends if end is not None), tuple(services))

    def _living(self) -> Iterator[Sequence[dds_discovery.NodeInfo]]:
        return (infos for participant, infos in self._nodes.items() if participant in self._alive)

    def _owner(self, key: bytes) -> str:
        if self._owned is None:
            self._owned = {
                end: join(node.namespace, node.name)
                for infos in self._living()
                for node in infos
                for end in (*node.readers, *node.writers)
            }
        return self._owned.get(key, "")

    def _endpoint(self, key: bytes) -> Endpoint | None:
        """The endpoint with this GUID; None if it belongs to no ROS topic."""
        _, sample, publishes = self._endpoints[key]
        if not sample.topic_name.startswith("rt/"):
            return None
        if key not in self._cached:
            from cyclonedds.core import Policy

            data = sample.qos[Policy.Userdata]
            found = _HASH.search(bytes(data.data)) if data is not None else None
            self._cached[key] = Endpoint(
                sample.topic_name[2:],
                ros_type_name(sample.type_name),
                self._owner(key),
                publishes,
                from_dds(sample.qos),
                found.group(1).decode() if found else "",
            )
        return self._cached[key]

    def problems(self, publishers: Sequence[CyclonePublisher], subscribers: Sequence[CycloneSubscriber]) -> list[str]:
        """One line for every pair of one of these endpoints and a living one that can never match it."""
        ours: Mapping[bytes, Any] = {end.entity.get_guid().bytes: end for end in (*publishers, *subscribers)}
        topics = {f"rt{end.topic}" for end in ours.values()}
        with self._lock:
            known = [
                (key, handle, end, publishes)
                for key, (handle, sample, publishes) in self._endpoints.items()
                if sample.topic_name in topics and (end := self._endpoint(key)) is not None
            ]
        writers = [(key, handle, end) for key, handle, end, publishes in known if publishes]
        readers = [(key, handle, end) for key, handle, end, publishes in known if not publishes]
        found = []
        for writer_key, writer_handle, writer in writers:
            for reader_key, reader_handle, reader in readers:
                if writer.topic != reader.topic or not {writer_key, reader_key} & set(ours):
                    continue
                reason = _reason(writer, reader)
                if not reason:
                    own, other = (
                        (ours[writer_key], reader_handle) if writer_key in ours else (ours[reader_key], writer_handle)
                    )
                    # Discovery names no cause here; the middleware counted one.
                    if own.incompatible and other not in own.matches():
                        reason = f"the two do not match in their {own.incompatible}"
                if reason:
                    found.append(mismatch(writer, reader, reason))
        return found


def _reason(writer: Endpoint, reader: Endpoint) -> str:
    if writer.message_type != reader.message_type:
        return f"the publisher sends {writer.message_type}, the subscription expects {reader.message_type}"
    return incompatibility(writer.qos, reader.qos)


def _service_type(dds_name: str) -> str:
    return ros_type_name(dds_name).removesuffix("_Request")
