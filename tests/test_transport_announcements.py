"""What a ROS 2 node reads of us: names, type hashes, ids, who owns what, and services byte by byte."""

import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import fresh_domain, ignore, wait

from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import dds_discovery, dds_services
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.carriers import carry, service_class
from embodied.robot_bridge.dds_endpoints import take, to_dds
from embodied.robot_bridge.qos import (
    DEFAULT,
    LATEST,
    SERVICES,
    QosProfile,
)
from embodied.robot_bridge.transport_cyclone import CycloneTransport


def seen_endpoints(domain: int, topics: set[str], owners: set[bytes]) -> dict[str, Any]:
    """Endpoints of the participants `owners` by `topic` and kind, discovered by a participant of its own."""
    from cyclonedds import builtin
    from cyclonedds.domain import DomainParticipant

    found: dict[str, Any] = {}
    participant = DomainParticipant(domain)
    kinds = {"writer": builtin.BuiltinTopicDcpsPublication, "reader": builtin.BuiltinTopicDcpsSubscription}
    readers = {kind: builtin.BuiltinDataReader(participant, topic) for kind, topic in kinds.items()}
    people = builtin.BuiltinDataReader(participant, builtin.BuiltinTopicDcpsParticipant)

    def complete() -> bool:
        for kind, reader in readers.items():
            alive = [s for s in reader.take(N=200) if s.sample_info.valid_data]
            found.update({f"{s.topic_name} {kind}": s for s in alive if s.participant_key.bytes in owners})
        return topics <= set(found)

    assert wait(complete, 5.0), sorted(found)
    found["participants"] = [s for s in people.take(N=50) if s.sample_info.valid_data and s.key.bytes in owners]
    return found


def announced(endpoint: Any) -> dict[str, str]:
    from cyclonedds.core import Policy

    data = endpoint.qos[Policy.Userdata]
    text = bytes(data.data).decode() if data is not None else ""
    return dict(part.split("=", 1) for part in text.split(";") if part)


def test_endpoints_announce_what_a_ros_node_announces() -> None:
    domain = fresh_domain()
    node, client = CycloneTransport("arm_node", domain), CycloneTransport("client", domain)
    try:
        publisher = node.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
        subscriber = node.subscriber("/cmd", m.JOINT_TRAJECTORY, LATEST, ignore)
        others = client.publisher("/of_the_client", m.STRING, DEFAULT)
        node.service("/switch", m.SET_BOOL, lambda request: commands.outcome(True, ""))
        client.call("/switch", m.SET_BOOL, commands.set_bool_request(True), 5.0)
        wanted = {"rt/joint_states writer", "rt/cmd reader", "rq/switchRequest reader", "rr/switchReply reader"}
        owners = {end.entity.get_guid().bytes[:12] + b"\0\0\1\xc1" for end in (publisher, others)}
        found = seen_endpoints(domain, wanted, owners)
        names = {key: end.type_name for key, end in found.items() if key != "participants"}
        assert names["rt/joint_states writer"] == "sensor_msgs::msg::dds_::JointState_"
        assert names["rt/cmd reader"] == "trajectory_msgs::msg::dds_::JointTrajectory_"
        assert names["rq/switchRequest reader"] == "std_srvs::srv::dds_::SetBool_Request_"
        assert names["rr/switchReply writer"] == "std_srvs::srv::dds_::SetBool_Response_"
        assert names["ros_discovery_info writer"] == "rmw_dds_common::msg::dds_::ParticipantEntitiesInfo_"
        assert announced(found["rt/joint_states writer"]) == {"typehash": m.type_hash(m.JOINT_STATE)}
        assert announced(found["rt/cmd reader"]) == {"typehash": m.type_hash(m.JOINT_TRAJECTORY)}
        assert announced(found["ros_discovery_info writer"]) == {"typehash": m.type_hash(m.PARTICIPANT_INFO)}
        # One id on the two endpoints of a service, another on those of its client; each with its own type's hash.
        ids = []
        for key, request_end, response_end in (
            ("serviceid", "rq/switchRequest reader", "rr/switchReply writer"),
            ("clientid", "rq/switchRequest writer", "rr/switchReply reader"),
        ):
            request, response = announced(found[request_end]), announced(found[response_end])
            assert request["typehash"] == m.type_hash(f"{m.SET_BOOL}_Request")
            assert response["typehash"] == m.type_hash(f"{m.SET_BOOL}_Response")
            assert set(request) == set(response) == {key, "typehash"}
            assert request[key] == response[key]
            assert len(bytes(int(byte, 16) for byte in request[key].split("."))) == 16
            owner = found[request_end].participant_key.bytes
            assert bytes(int(byte, 16) for byte in request[key].split("."))[:12] == owner[:12]
            ids.append(request[key])
        assert ids[0] != ids[1]
        assert [announced(participant) for participant in found["participants"]] == [{"enclave": "/"}] * 2

        # What `ros2 node list` and `ros2 node info` read: latched, on the unmangled topic.
        infos = node_infos(domain)
        (arm,) = [info for info in infos if info.name == "arm_node"]
        assert arm.namespace == "/"
        assert publisher.entity.get_guid().bytes in arm.writers
        assert found["rr/switchReply writer"].key.bytes in arm.writers
        assert {subscriber.entity.get_guid().bytes, found["rq/switchRequest reader"].key.bytes} == set(arm.readers)
        (asker,) = [info for info in infos if info.name == "client"]
        assert set(asker.writers) == {found["rq/switchRequest writer"].key.bytes, others.entity.get_guid().bytes}
    finally:
        node.close()
        client.close()


def node_infos(domain: int, gid_size: int = 16) -> list[dds_discovery.NodeInfo]:
    """The newest announcement of every participant, read by a late reader."""
    from cyclonedds.domain import DomainParticipant
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic

    participant = DomainParticipant(domain)
    topic = Topic(participant, "ros_discovery_info", dds_discovery.info_class(gid_size))
    reader = DataReader(participant, topic, to_dds(QosProfile(0, latched=True), writer=False, user_data=""))
    newest: dict[bytes, list[dds_discovery.NodeInfo]] = {}
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        for sample, _ in take(reader):
            guid, nodes = dds_discovery.decode(sample.data, gid_size)
            newest[guid] = nodes
        time.sleep(0.02)
    return [node for nodes in newest.values() for node in nodes]


def test_discovery_info_is_what_the_codec_writes_and_reads() -> None:
    """Bytes by hand against rosbags', whose type hash for the message is rosidl's."""
    guids = [bytes(range(k, k + 16)) for k in range(5)]
    nodes = [
        dds_discovery.NodeInfo("/", "a", (guids[1],), (guids[2], guids[3])),
        dds_discovery.NodeInfo("/left/arm", "longer_name", (), (guids[4],)),
    ]
    data = dds_discovery.encode(guids[0], nodes, 16)

    def gid(value: bytes) -> Any:
        return m.new("rmw_dds_common/msg/Gid", np.frombuffer(value, np.uint8))

    listed = [
        m.new(
            "rmw_dds_common/msg/NodeEntitiesInfo", n.namespace, n.name, [*map(gid, n.readers)], [*map(gid, n.writers)]
        )
        for n in nodes
    ]
    assert data == m.encode(m.new(m.PARTICIPANT_INFO, gid(guids[0]), listed))
    assert dds_discovery.decode(data, 16) == (guids[0], nodes)
    old = dds_discovery.encode(guids[0], nodes, 24)
    assert len(old) - len(data) == 8 * (1 + 4)  # each Gid is 8 bytes longer
    assert dds_discovery.decode(old, 24) == (guids[0], nodes)
    for cut in range(4, len(data) - 1):
        with pytest.raises(Exception, match="that are no rmw_dds_common"):
            dds_discovery.decode(data[:cut], 16)


def test_humble_peers_are_spoken_to_in_their_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    for distro, size in (("humble", 24), ("iron", 16), ("jazzy", 16), ("rolling", 16), ("", 16)):
        monkeypatch.setenv("ROS_DISTRO", distro)
        assert dds_discovery.gid_bytes() == size
    domain = fresh_domain()
    monkeypatch.setenv("ROS_DISTRO", "humble")
    one, two = CycloneTransport("one", domain), CycloneTransport("two", domain, ros_distro="humble")
    new = CycloneTransport("new", domain, ros_distro="jazzy")
    try:
        publisher = one.publisher("/t", m.STRING, DEFAULT)
        got: list[bytes] = []
        new.subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
        assert wait(lambda: {"/one", "/two"} <= set(two.graph().nodes))
        assert {info.name for info in node_infos(domain, 24)} == {"one", "two"}
        assert wait(lambda: publisher.matched == 1)
        publisher.write(m.string("x"))
        assert wait(lambda: len(got) == 1)  # topics do not depend on it
        assert new.graph().nodes == ("/new",)
    finally:
        for node in (one, two, new):
            node.close()


def test_a_request_carries_client_id_and_sequence_and_the_reply_repeats_them() -> None:
    """As rmw_cyclonedds: a client written by hand against our server."""
    from cyclonedds.domain import DomainParticipant
    from cyclonedds.pub import DataWriter
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic

    body = commands.set_bool_request(True)
    assert (
        dds_services.pack(0x0102030405060708, 9, body).hex() == "00010000" + "0807060504030201" + "09" + "00" * 7 + "01"
    )
    big = b"\x00\x00\x00\x00" + struct.pack(">Qq", 5, 6) + b"\x01"
    assert dds_services.unpack(big) == (5, 6, b"\x00\x00\x00\x00\x01")
    assert dds_services.pack(5, 6, b"\x00\x00\x00\x00\x01") == big
    identity = dds_services.make_id(bytes(range(16)), 258)
    assert identity == bytes(range(12)) + b"\x00\x00\x01\x02"
    assert dds_services.id_text(identity) == "0.1.2.3.4.5.6.7.8.9.a.b.0.0.1.2"

    domain = fresh_domain()
    node = CycloneTransport("server", domain)
    try:
        node.service("/switch", m.SET_BOOL, lambda r: commands.outcome(commands.read_set_bool_request(r), "ok"))
        participant = DomainParticipant(domain)
        request, response = (service_class(f"{m.SET_BOOL}_{end}") for end in ("Request", "Response"))
        writer = DataWriter(
            participant, Topic(participant, "rq/switchRequest", request), to_dds(SERVICES, writer=True, user_data="")
        )
        reader = DataReader(
            participant, Topic(participant, "rr/switchReply", response), to_dds(SERVICES, writer=False, user_data="")
        )
        assert wait(lambda: bool(writer.get_matched_subscriptions()) and bool(reader.get_matched_publications()))
        client = 2**63 + 12345  # above what the wheel's signed handles hold
        writer.write(carry(request, dds_services.pack(client, 77, body)))
        replies: list[bytes] = []

        def arrived() -> bool:
            replies.extend(sample.data for sample, _ in take(reader))
            return bool(replies)

        assert wait(arrived)
        assert dds_services.unpack(replies[0])[:2] == (client, 77)
        assert commands.read_outcome(dds_services.unpack(replies[0])[2]) == (True, "ok")
    finally:
        node.close()


def test_a_server_waits_for_a_client_whose_reader_is_late() -> None:
    """rmw_cyclonedds's rule: up to 100 ms, or the first answer of a new client would be lost."""
    from cyclonedds.domain import DomainParticipant
    from cyclonedds.pub import DataWriter
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic

    domain = fresh_domain()
    node = CycloneTransport("server", domain)
    try:
        node.service("/switch", m.SET_BOOL, lambda request: commands.outcome(True, "late"))
        participant = DomainParticipant(domain)
        request, response = (service_class(f"{m.SET_BOOL}_{end}") for end in ("Request", "Response"))
        writer = DataWriter(
            participant,
            Topic(participant, "rq/switchRequest", request),
            to_dds(SERVICES, writer=True, user_data="clientid=1.2;"),
        )
        # Another client's reader is there; it must not be mistaken for this one's.
        topic = Topic(participant, "rr/switchReply", response)
        other = DataReader(participant, topic, to_dds(SERVICES, writer=False, user_data="clientid=9.9;"))
        assert wait(lambda: bool(writer.get_matched_subscriptions()) and bool(other.get_matched_publications()))
        writer.write(carry(request, dds_services.pack(1, 1, commands.set_bool_request(True))))
        time.sleep(0.04)
        reader = DataReader(participant, topic, to_dds(SERVICES, writer=False, user_data="clientid=1.2;"))
        assert wait(lambda: bool(list(take(reader))), 2.0)
    finally:
        node.close()
