"""What only the wire has: other processes, what a ROS 2 node reads of us, what is refused, and what leaves the host."""

import gc
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import SAMPLE, fresh_domain, ignore, wait

from embodied.contracts.errors import ConfigError, TransportError
from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import dds_discovery, dds_services, parameters
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.carriers import carrier_class, carry, ros_type_name, service_class
from embodied.robot_bridge.dds_domain import configuration, default_domain
from embodied.robot_bridge.dds_endpoints import from_dds, take, to_dds
from embodied.robot_bridge.qos import (
    COMMAND,
    DEFAULT,
    EVENTS,
    LATCHED,
    LATEST,
    SENSOR_DATA,
    SERVICES,
    QosProfile,
    incompatibility,
)
from embodied.robot_bridge.transport_cyclone import CycloneTransport

DOMAIN = fresh_domain()
XCDR2 = QosProfile(representations=("xcdr2",))


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[CycloneTransport, CycloneTransport]]:
    pair = CycloneTransport("near", DOMAIN), CycloneTransport("observer", DOMAIN)
    yield pair
    for node in pair:
        node.close()


# ---- another process


@pytest.fixture(scope="module")
def near() -> Iterator[CycloneTransport]:
    """A node, and in another process the peer of dds_peer.py."""
    domain = fresh_domain()
    peer = subprocess.Popen([sys.executable, str(Path(__file__).with_name("dds_peer.py")), str(domain)])
    node = CycloneTransport("near", domain)
    try:
        end = node.publisher("/end", m.BOOL, DEFAULT)
        assert wait(lambda: "/far/peer" in node.graph().nodes and end.matched == 1, 30.0)
        yield node
        end.write(m.boolean(True))
        assert peer.wait(10) == 0
    finally:
        peer.kill()
        node.close()


def test_vga_images_cross_processes_whole(near: CycloneTransport) -> None:
    got: list[bytes] = []
    back = near.subscriber("/image/back", m.IMAGE, SENSOR_DATA, lambda data, at: got.append(data))
    publisher = near.publisher("/image/there", m.IMAGE, SENSOR_DATA)
    assert wait(lambda: publisher.matched == 1 and back.matched == 1)
    time.sleep(0.2)  # the peer matches a little later
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    for k in range(10):
        publisher.write(m.image(k, "cam", pixels))
        time.sleep(0.03)
    assert wait(lambda: len(got) >= 9, 5.0)  # best effort: one may be lost on a busy machine
    np.testing.assert_array_equal(m.read_image(got[-1])[1], pixels)


def test_joint_states_cross_processes_unchanged(near: CycloneTransport) -> None:
    got: list[bytes] = []
    back = near.subscriber("/joint_states/back", m.JOINT_STATE, DEFAULT, lambda data, at: got.append(data))
    publisher = near.publisher("/joint_states/there", m.JOINT_STATE, COMMAND)
    assert wait(lambda: publisher.matched == 1 and back.matched == 1)
    time.sleep(0.2)
    for _ in range(20):
        publisher.write(SAMPLE)
        time.sleep(0.005)
    assert wait(lambda: len(got) >= 18)
    assert {data[: len(SAMPLE)] for data in got} == {SAMPLE}
    assert {len(data) - len(SAMPLE) for data in got} <= {0, 1, 2, 3}  # padded to four bytes, as CDR is


def test_latched_samples_services_and_parameters_cross_processes(near: CycloneTransport) -> None:
    about: list[str] = []
    near.subscriber("/about", m.STRING, LATCHED, lambda data, at: about.append(m.read_string(data)))
    assert wait(lambda: about == ["peer"])
    answer = near.call("/far/peer/switch", m.SET_BOOL, commands.set_bool_request(True), 10.0)
    assert commands.read_outcome(answer) == (False, "far")
    near.service("/near/trigger", m.TRIGGER, lambda request: commands.outcome(True, "near"))
    answer = near.call("/far/peer/ask_back", m.TRIGGER, commands.trigger_request(), 10.0)
    assert commands.read_outcome(answer) == (True, "near")
    assert parameters.set_remote(near, "/far/peer", {"rate": 20.0}, 10.0) == {"rate": ""}
    assert parameters.get_remote(near, "/far/peer", ["rate", "joints"], 10.0) == [20.0, ["a", "b"]]


def test_two_processes_meet_where_there_is_only_a_loopback_without_multicast() -> None:
    """In a network namespace of their own, which has nothing but `lo`."""
    if shutil.which("ip") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("needs `ip` and the right to make a network namespace")
    code = (
        "import sys, time; from embodied.robot_bridge.transport_cyclone import CycloneTransport as T\n"
        "node, end = T(sys.argv[1], 1), time.monotonic() + 20\n"
        "while '/' + sys.argv[2] not in node.graph().nodes and time.monotonic() < end: time.sleep(0.01)\n"
        "print(*node.graph().nodes); time.sleep(2); node.close()"  # so that the other sees this one too
    )
    shell = 'ip link set lo up; ip -o link show; "$0" -c "$1" one two & "$0" -c "$1" two one; wait'
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", shell, sys.executable, code], capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert "LOOPBACK" in lines[0]
    assert "MULTICAST" not in lines[0]
    assert lines[1:] == ["/one /two"] * 2, done.stderr


def test_the_graph_knows_the_other_process(near: CycloneTransport) -> None:
    graph = near.graph()
    (about,) = [end for end in graph.endpoints if end.topic == "/about" and end.publishes]
    assert (about.node, about.message_type, about.type_hash) == ("/far/peer", m.STRING, m.type_hash(m.STRING))
    assert about.qos == LATCHED
    offered = {service.name for service in graph.services if service.node == "/far/peer"}
    assert {"/far/peer/switch", "/far/peer/get_parameters", "/far/peer/set_parameters_atomically"} <= offered
    assert len([name for name in offered if "parameter" in name]) == 6  # all six, or the command line waits for ever


def silent_reader(domain: int, ready: Any) -> None:
    node = CycloneTransport("hung", domain)
    node.subscriber("/command", m.JOINT_STATE, DEFAULT, ignore)
    ready.set()
    time.sleep(60)


def test_a_hung_reliable_subscriber_does_not_block_the_command_writer() -> None:
    context, domain = multiprocessing.get_context("spawn"), fresh_domain()
    ready = context.Event()
    child = context.Process(target=silent_reader, args=(domain, ready), daemon=True)
    child.start()
    node = CycloneTransport("commander", domain)
    try:
        assert ready.wait(30)
        publisher = node.publisher("/command", m.JOINT_STATE, COMMAND)
        assert wait(lambda: publisher.matched == 1, 20.0)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        longest = 0.0
        for _ in range(500):
            started = time.perf_counter()
            publisher.write(SAMPLE)
            longest = max(longest, time.perf_counter() - started)
            time.sleep(0.001)
        assert longest < 0.1
        assert publisher.matched == 1  # nobody has noticed
    finally:
        child.kill()
        node.close()


# ---- what a ROS 2 node reads of us


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


# ---- what matches on the wire (facts: offered -> requested), and that the static rules say the same

MATRIX = [
    (SENSOR_DATA, DEFAULT, "best effort"),
    (DEFAULT, LATCHED, "transient local"),
    (DEFAULT, QosProfile(deadline_s=0.5), "deadline"),
    (QosProfile(deadline_s=1.0), QosProfile(deadline_s=0.5), "deadline"),
    (DEFAULT, QosProfile(manual_liveliness=True), "liveliness"),
    (QosProfile(lease_s=2.0), QosProfile(lease_s=1.0), "lease"),
    (XCDR2, DEFAULT, "xcdr2"),
    (DEFAULT, XCDR2, "xcdr1"),
    (DEFAULT, SENSOR_DATA, ""),
    (LATCHED, DEFAULT, ""),
    (EVENTS, LATCHED, ""),
    (SENSOR_DATA, LATEST, ""),
    (QosProfile(deadline_s=0.5), QosProfile(deadline_s=1.0), ""),
    (QosProfile(deadline_s=0.5), DEFAULT, ""),
    (QosProfile(manual_liveliness=True, lease_s=1.0), QosProfile(lease_s=2.0), ""),
    (XCDR2, QosProfile(representations=("xcdr1", "xcdr2")), ""),
]


@pytest.mark.parametrize("number", range(len(MATRIX)))
def test_the_wire_matches_as_the_rules_say(number: int, nodes: tuple[CycloneTransport, CycloneTransport]) -> None:
    (one, two), (offered, requested, word) = nodes, MATRIX[number]
    topic = f"/matrix/pair_{number}"
    publisher = one.publisher(topic, m.STRING, offered)
    subscriber = two.subscriber(topic, m.STRING, requested, ignore)
    said = incompatibility(offered, requested)
    assert bool(said) == bool(word)
    assert word in said
    if not word:
        assert wait(lambda: publisher.matched == 1 and subscriber.matched == 1)
        assert not [line for line in two.problems() if line.startswith(f"{topic}:")]
        return
    assert wait(lambda: all(any(line.startswith(f"{topic}:") for line in node.problems()) for node in nodes))
    assert wait(lambda: bool(publisher.incompatible) and bool(subscriber.incompatible))  # Cyclone's own count
    assert (publisher.matched, subscriber.matched) == (0, 0)
    (line,) = [line for line in two.problems() if line.startswith(f"{topic}:")]
    assert said in line
    assert offered.describe() in line
    assert requested.describe() in line


@pytest.mark.parametrize(
    "qos", [DEFAULT, SENSOR_DATA, EVENTS, QosProfile(0), QosProfile(3, deadline_s=0.5, lease_s=2.0)]
)
@pytest.mark.parametrize("writer", [True, False])
def test_profiles_survive_dds_and_back(qos: QosProfile, writer: bool) -> None:
    assert from_dds(to_dds(qos, writer, "")) == qos


def test_writers_and_readers_offer_plain_cdr_only_and_never_dispose() -> None:
    from cyclonedds.core import Policy

    for writer in (True, False):
        representation = to_dds(DEFAULT, writer, "")[Policy.DataRepresentation]
        assert representation.use_cdrv0_representation
        assert not representation.use_xcdrv2_representation
    assert to_dds(DEFAULT, True, "")[Policy.WriterDataLifecycle].autodispose is False
    kept = to_dds(EVENTS, True, "")[Policy.DurabilityService]
    assert kept.history == Policy.History.KeepLast(100)  # or latched samples beyond the first are lost


def test_type_names_go_both_ways() -> None:
    for name in (m.JOINT_STATE, "std_srvs/srv/SetBool_Request", "control_msgs/action/GripperCommand_FeedbackMessage"):
        assert ros_type_name(carrier_class(name).__idl_typename__.replace(".", "::")) == name
    assert ros_type_name("some::other::Type") == "some::other::Type"


# ---- what is refused


def test_malformed_bytes_are_refused_before_the_wire(nodes: tuple[CycloneTransport, CycloneTransport]) -> None:
    publisher = nodes[0].publisher("/malformed", m.JOINT_STATE, DEFAULT)
    good = m.joint_state(1, ["joint"], np.zeros(1), np.zeros(1))
    for data in (b"\x00\x01\x00\x00zzzz", b"", good[:-9], b"\x00\x07" + good[2:]):
        with pytest.raises(TransportError, match=rf"/malformed: Cyclone DDS refused a sample of {len(data)} bytes"):
            publisher.write(data)
    publisher.write(good)


def test_a_call_from_a_callback_is_refused(nodes: tuple[CycloneTransport, CycloneTransport]) -> None:
    near, observer = nodes
    near.service("/refused/service", m.TRIGGER, lambda request: commands.outcome(True, ""))
    said: list[str] = []

    def callback(data: bytes, received_ns: int) -> None:
        try:
            observer.call("/refused/service", m.TRIGGER, commands.trigger_request(), 5.0)
        except TransportError as error:
            said.append(str(error))

    observer.subscriber("/refused/topic", m.STRING, DEFAULT, callback)
    publisher = near.publisher("/refused/topic", m.STRING, DEFAULT)
    assert wait(lambda: publisher.matched == 1)
    publisher.write(m.string("x"))
    assert wait(lambda: bool(said), 2.0)
    assert "cannot be called from a topic's callback" in said[0]


def test_a_slow_service_handler_stops_no_topic(nodes: tuple[CycloneTransport, CycloneTransport]) -> None:
    near, observer = nodes
    started, release, got = threading.Event(), threading.Event(), []

    def slow(request: bytes) -> bytes:
        started.set()
        release.wait(10)
        return commands.outcome(True, "slow")

    near.service("/slow", m.TRIGGER, slow)
    near.subscriber("/meanwhile", m.STRING, DEFAULT, lambda data, at: got.append(data))
    near.service("/quick", m.TRIGGER, lambda request: commands.outcome(True, "quick"))
    publisher = observer.publisher("/meanwhile", m.STRING, DEFAULT)
    assert wait(lambda: publisher.matched == 1)
    answers: list[bytes] = []
    caller = threading.Thread(
        target=lambda: answers.append(observer.call("/slow", m.TRIGGER, commands.trigger_request(), 10.0))
    )
    caller.start()
    assert started.wait(5)
    for k in range(20):
        publisher.write(m.string(str(k)))
        time.sleep(0.002)
    assert wait(lambda: len(got) == 20, 2.0)
    assert commands.read_outcome(observer.call("/quick", m.TRIGGER, commands.trigger_request(), 5.0))[1] == "quick"
    assert answers == []
    release.set()
    caller.join(5)
    assert commands.read_outcome(answers[0]) == (True, "slow")


@pytest.mark.parametrize(
    ("qos", "kept"), [(LATEST, [9]), (QosProfile(4, reliable=False), [6, 7, 8, 9]), (EVENTS, None)]
)
def test_a_busy_subscription_keeps_the_newest_to_its_depth(
    qos: QosProfile, kept: list[int] | None, nodes: tuple[CycloneTransport, CycloneTransport]
) -> None:
    near, observer = nodes
    topic = f"/busy/depth_{qos.depth}"
    entered, release, got = threading.Event(), threading.Event(), []

    def callback(data: bytes, received_ns: int) -> None:
        got.append(int(m.read_string(data)))
        entered.set()
        release.wait(10)

    near.subscriber(topic, m.STRING, qos, callback)
    publisher = observer.publisher(topic, m.STRING, EVENTS)
    assert wait(lambda: publisher.matched == 1)
    publisher.write(m.string("-1"))
    assert entered.wait(5)
    for k in range(10):
        publisher.write(m.string(str(k)))
    time.sleep(0.2)
    release.set()
    assert wait(lambda: bool(got) and got[-1] == 9)
    assert got == [-1, *(range(10) if kept is None else kept)]


def test_a_foreign_writer_that_disposes_and_leaves_is_no_sample(
    nodes: tuple[CycloneTransport, CycloneTransport], caplog: pytest.LogCaptureFixture
) -> None:
    """DDS programs other than ROS 2 nodes dispose by default: their reader is then handed a sample without data."""
    from cyclonedds.core import Policy, Qos
    from cyclonedds.domain import DomainParticipant
    from cyclonedds.pub import DataWriter
    from cyclonedds.topic import Topic

    node, got = nodes[0], []
    subscriber = node.subscriber("/foreign", m.STRING, LATEST, lambda data, at: got.append(m.read_string(data)))
    participant, cls = DomainParticipant(node.domain), carrier_class(m.STRING)
    plain = Policy.DataRepresentation(use_cdrv0_representation=True, use_xcdrv2_representation=False)
    for text in ("one", "two"):
        writer = DataWriter(participant, Topic(participant, "rt/foreign", cls), Qos(plain))
        assert wait(lambda: subscriber.matched == 1)
        writer.write(carry(cls, m.string(text)))
        assert wait(lambda text=text: got[-1:] == [text])
        writer.dispose(carry(cls, m.string(text)))
        del writer
        gc.collect()
        assert wait(lambda: subscriber.matched == 0)
        time.sleep(0.1)
    assert got == ["one", "two"]
    assert "Traceback" not in caplog.text


def test_a_thousand_calls_leave_the_memory_as_it_was(nodes: tuple[CycloneTransport, CycloneTransport]) -> None:
    near, observer = nodes
    near.service("/flat", m.TRIGGER, lambda request: commands.outcome(True, ""))

    def resident_kb() -> int:
        gc.collect()
        return int(re.search(r"Rss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text()).group(1))  # type: ignore[union-attr]

    def ask(times: int) -> None:
        for _ in range(times):
            observer.call("/flat", m.TRIGGER, commands.trigger_request(), 10.0)

    ask(200)
    before = resident_kb()
    ask(1000)
    assert resident_kb() - before < 70  # 280 kB if server and client look at their peers at every call, 140 if one does


def test_nothing_is_made_on_a_node_that_has_left() -> None:
    node = CycloneTransport("gone", DOMAIN)
    publisher = node.publisher("/t", m.STRING, DEFAULT)
    node.close()
    with pytest.raises(TransportError, match="gone has left the graph"):
        node.subscriber("/t", m.STRING, DEFAULT, ignore)
    with pytest.raises(TransportError):
        publisher.write(m.string("x"))
    assert node.problems() == []


def test_domains_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for domain in (-1, 233):
        with pytest.raises(ConfigError, match="out of range; it must be from 0 to 232"):
            CycloneTransport("x", domain)
    CycloneTransport("x", 232).close()
    with pytest.raises(ConfigError, match="discovery 'everywhere' is unknown"):
        CycloneTransport("x", fresh_domain(), discovery="everywhere")
    CycloneTransport("x", DOMAIN).close()
    with pytest.raises(ConfigError, match="already open in this process with discovery 'localhost'"):
        CycloneTransport("x", DOMAIN, discovery="subnet")
    for text in ("seven", "233", "-1"):
        monkeypatch.setenv("ROS_DOMAIN_ID", text)
        with pytest.raises(ConfigError, match="ROS_DOMAIN_ID"):
            default_domain()
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    assert default_domain() == 42


# ---- what leaves the host


def test_the_environment_alone_does_not_open_the_host(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    plain = configuration("localhost", {})
    file = tmp_path / "cyclone.xml"
    file.write_text(
        '<?xml version="1.0"?><CycloneDDS xmlns="https://cdds.io/config"><Domain><General><AllowMulticast>true'
        "</AllowMulticast></General><Tracing><Verbosity>warning</Verbosity></Tracing></Domain></CycloneDDS>"
    )
    for environment, said in (
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}, ""),
        ({"ROS_STATIC_PEERS": "192.0.2.1;robot.local"}, "ROS_STATIC_PEERS names 192.0.2.1, robot.local"),
        ({"CYCLONEDDS_URI": "<General><Interfaces/></General>"}, "CYCLONEDDS_URI sets General"),
        ({"CYCLONEDDS_URI": '<Discovery><Peers><Peer Address="192.0.2.1"/></Peers></Discovery>'}, "sets Discovery"),
    ):
        caplog.clear()
        assert configuration("localhost", environment) == plain
        assert said in caplog.text
    assert "--discovery subnet" in caplog.text
    caplog.clear()
    mixed = configuration("localhost", {"CYCLONEDDS_URI": f"<Sizing/>,file://{file}"})
    assert mixed.startswith(plain)
    assert "Multicast>true" not in mixed
    assert "<Sizing" in mixed
    assert "<Verbosity>warning</Verbosity>" in mixed
    assert "CYCLONEDDS_URI sets General" in caplog.text


def test_with_permission_the_environment_is_read_as_ros_does() -> None:
    assert "127.0.0.1" not in configuration("subnet", {})
    assert "SocketReceiveBufferSize" in configuration("subnet", {})  # pictures come in many small packets there
    peers = configuration("subnet", {"ROS_STATIC_PEERS": "192.0.2.1; robot.local"})
    assert '<Peer Address="192.0.2.1"/><Peer Address="robot.local"/>' in peers
    uri = "<General><Interfaces/></General>"
    assert configuration("subnet", {"CYCLONEDDS_URI": uri}).endswith(f",{uri}")
    for narrow in ({"ROS_LOCALHOST_ONLY": "1"}, {"ROS_AUTOMATIC_DISCOVERY_RANGE": "localhost"}):
        assert configuration("subnet", narrow) == configuration("localhost", {})
    assert f"<Tag>ros_discovery_off_{os.getpid()}</Tag>" in configuration(
        "subnet", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}
    )
    assert "<Tag>" in configuration("localhost", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"})
    with pytest.raises(ConfigError, match=r"ROS_AUTOMATIC_DISCOVERY_RANGE is 'HOST'.*Valid: LOCALHOST, OFF, SUBNET"):
        configuration("localhost", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "host"})
    with pytest.raises(ConfigError, match="which is no address"):
        configuration("subnet", {"ROS_STATIC_PEERS": "<Peer/>"})
    for uri in ("<General>", "file:///no/such/file.xml"):
        with pytest.raises(ConfigError, match="CYCLONEDDS_URI cannot be read"):
            configuration("localhost", {"CYCLONEDDS_URI": uri})


def locators(packet: bytes) -> dict[int, list[tuple[int, str]]]:
    """Of an RTPS participant announcement: parameter id -> (kind, address) of its locators."""
    assert packet[:4] == b"RTPS"
    place, found = 20, dict[int, list[tuple[int, str]]]()
    while place + 4 <= len(packet):
        kind, flags = packet[place], packet[place + 1]
        order = "<" if flags & 1 else ">"
        (size,) = struct.unpack_from(f"{order}H", packet, place + 2)
        if kind == 0x15:  # DATA, its payload a list of parameters
            at = place + 4 + 20 + 4
            while at + 4 <= len(packet):
                parameter, length = struct.unpack_from(f"{order}HH", packet, at)
                if parameter == 1:
                    break
                if parameter in (0x2F, 0x30, 0x31, 0x32, 0x33, 0x48):
                    (locator,) = struct.unpack_from(f"{order}i", packet, at + 4)
                    found.setdefault(parameter, []).append((locator, socket.inet_ntoa(packet[at + 24 : at + 28])))
                at += 4 + length
        place += 4 + size if size else len(packet)
    return found


def test_every_advertised_locator_is_of_this_host() -> None:
    """Reads the announcement off the wire, with an environment that asks for more."""
    domain = fresh_domain()
    code = (
        "import time; from embodied.robot_bridge.transport_cyclone import CycloneTransport as T\n"
        f"t = T('x', {domain}); t.publisher('/t', 'std_msgs/msg/String', __import__('embodied.robot_bridge.qos', "
        "fromlist=['x']).DEFAULT); time.sleep(3); t.close()"
    )
    wider = {
        "CYCLONEDDS_URI": "<General><Interfaces><NetworkInterface autodetermine='true'/></Interfaces>"
        "<AllowMulticast>true</AllowMulticast></General>",
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",
        "ROS_STATIC_PEERS": "192.0.2.1",
    }
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 7400 + 250 * domain + 10 + 2 * 9))  # where the tenth participant would listen
        ear.settimeout(20)
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | wider)
        try:
            found: dict[int, list[tuple[int, str]]] = {}
            while not found:
                packet, (sender, _) = ear.recvfrom(65536)
                found = locators(packet)
        finally:
            child.kill()
            child.wait()
    assert sender == "127.0.0.1"
    everything = [locator for listed in found.values() for locator in listed]
    assert {address for _, address in everything} == {"127.0.0.1"}  # a multicast group would stand here too
    assert {0x31, 0x32} <= set(found)  # where data and where discovery is to be sent
