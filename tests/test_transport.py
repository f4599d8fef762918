"""One conformance suite over every transport; then what only the wire has."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, EmbodiedError, InputError
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.processes import free_domain
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST, SENSOR_DATA
from embodied.robot_bridge.transport_cyclone import CycloneTransport, default_domain
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport

DOMAIN = free_domain()
SAMPLE = m.joint_state(5, ["a", "b"], np.array([1.0, 2.0]), np.array([0.5, np.nan]))


def wait(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(params=["memory", "cyclone"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """A factory of transports that can reach each other."""
    bus, opened = MemoryBus(), []

    def factory(node: str) -> Any:
        opened.append(MemoryTransport(bus, node) if request.param == "memory" else CycloneTransport(node, DOMAIN))
        return opened[-1]

    yield factory
    for transport in opened:
        transport.close()


def test_samples_arrive_once_in_order_and_unchanged(make: Callable[[str], Any]) -> None:
    got: list[bytes] = []
    subscriber = make("in").subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
    publisher = make("out").publisher("/t", m.STRING, DEFAULT)
    assert wait(lambda: publisher.matched == 1 and subscriber.matched == 1)
    sent = [m.string(f"sample {k}") for k in range(50)]
    for data in sent:
        publisher.write(data)
        time.sleep(0.002)
    assert wait(lambda: len(got) == 50)
    assert [m.read_string(data) for data in got] == [m.read_string(data) for data in sent]


def test_receive_time_is_monotonic_now(make: Callable[[str], Any]) -> None:
    got: list[int] = []
    make("in").subscriber("/t", m.JOINT_STATE, DEFAULT, lambda data, at: got.append(at))
    publisher = make("out").publisher("/t", m.JOINT_STATE, DEFAULT)
    assert wait(lambda: publisher.matched == 1)
    before = time.monotonic_ns()
    publisher.write(SAMPLE)
    assert wait(lambda: bool(got))
    assert before <= got[0] <= time.monotonic_ns()


def test_late_subscriber_gets_what_is_latched(make: Callable[[str], Any]) -> None:
    sender = make("out")
    for topic, qos in (("/latched", LATCHED), ("/events", EVENTS), ("/volatile", DEFAULT)):
        publisher = sender.publisher(topic, m.STRING, qos)
        for k in range(3):
            publisher.write(m.string(str(k)))
    got: dict[str, list[str]] = {"/latched": [], "/events": [], "/volatile": []}
    receiver = make("in")
    for topic, qos in (("/latched", LATCHED), ("/events", EVENTS), ("/volatile", DEFAULT)):
        receiver.subscriber(topic, m.STRING, qos, lambda data, _, topic=topic: got[topic].append(m.read_string(data)))
    assert wait(lambda: len(got["/latched"]) == 1 and len(got["/events"]) == 3)
    assert got == {"/latched": ["2"], "/events": ["0", "1", "2"], "/volatile": []}


def test_incompatible_endpoints_stay_silent_and_say_so(make: Callable[[str], Any]) -> None:
    got: list[bytes] = []
    receiver, sender = make("in"), make("out")
    receiver.subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
    publisher = sender.publisher("/t", m.STRING, SENSOR_DATA)
    assert wait(lambda: bool(receiver.problems()) and bool(sender.problems()))
    publisher.write(m.string("x"))
    time.sleep(0.05)
    assert (got, publisher.matched) == ([], 0)
    assert "/t: " in receiver.problems()[0]


def test_closing_is_noticed_at_once(make: Callable[[str], Any]) -> None:
    receiver = make("in")
    receiver.subscriber("/t", m.STRING, LATEST, lambda data, at: None)
    publisher = make("out").publisher("/t", m.STRING, COMMAND)
    assert wait(lambda: publisher.matched == 1)
    receiver.close()
    assert wait(lambda: publisher.matched == 0, 2.0)


def test_memory_faults_drop_duplicate_and_corrupt() -> None:
    bus, got = MemoryBus(clock=lambda: 7), []
    MemoryTransport(bus).subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append((data, at)))
    publisher = MemoryTransport(bus).publisher("/t", m.STRING, DEFAULT)
    bus.fault = lambda topic, data: (data, data[:-1])
    publisher.write(b"abcd")
    bus.fault = lambda topic, data: ()
    publisher.write(b"efgh")
    assert got == [(b"abcd", 7), (b"abc", 7)]


# ---- the wire


def echo(domain: int) -> None:
    """Child process: sends every image back on another topic until told to end."""
    transport, ended = CycloneTransport("echo", domain), []
    publisher = transport.publisher("/back", m.IMAGE, SENSOR_DATA)
    transport.subscriber("/there", m.IMAGE, SENSOR_DATA, lambda data, at: publisher.write(data))
    transport.subscriber("/end", m.BOOL, DEFAULT, lambda data, at: ended.append(1))
    wait(lambda: bool(ended), 20.0)
    transport.close()


def test_vga_images_cross_two_processes_whole() -> None:
    child = multiprocessing.get_context("spawn").Process(target=echo, args=(DOMAIN,))
    child.start()
    transport, got = CycloneTransport("main", DOMAIN), []
    try:
        transport.subscriber("/back", m.IMAGE, SENSOR_DATA, lambda data, at: got.append(data))
        publisher = transport.publisher("/there", m.IMAGE, SENSOR_DATA)
        end = transport.publisher("/end", m.BOOL, DEFAULT)
        assert wait(lambda: publisher.matched == 1 and end.matched == 1, 20.0)
        wait(lambda: False, 0.2)  # the way back is matched a little later
        pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        for k in range(10):
            publisher.write(m.image(k, "cam", pixels))
            time.sleep(0.03)
        assert wait(lambda: len(got) >= 9, 5.0)  # best effort: one may be lost on a busy machine
        np.testing.assert_array_equal(m.read_image(got[-1])[1], pixels)
        end.write(m.boolean(True))
        child.join(10)
        assert child.exitcode == 0
    finally:
        child.kill()
        transport.close()


def test_endpoints_look_like_those_of_a_ros_node() -> None:
    from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsPublication, BuiltinTopicDcpsSubscription
    from cyclonedds.core import Policy
    from cyclonedds.domain import DomainParticipant

    infos: list[Any] = []
    transport = CycloneTransport("arm_node", DOMAIN)
    observer = CycloneTransport("observer", DOMAIN)
    try:
        publisher = transport.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
        transport.subscriber("/cmd", m.JOINT_TRAJECTORY, LATEST, lambda data, at: None)
        observer.subscriber("/joint_states", m.JOINT_STATE, LATEST, lambda data, at: None)
        assert wait(lambda: publisher.matched == 1)
        found: dict[str, Any] = {}
        participant = DomainParticipant(DOMAIN)
        readers = [
            BuiltinDataReader(participant, t) for t in (BuiltinTopicDcpsPublication, BuiltinTopicDcpsSubscription)
        ]

        def seen() -> bool:
            for reader in readers:
                for sample in reader.take(N=100):
                    found[f"{sample.topic_name} {sample.type_name}"] = sample.qos
            return len(found) >= 4

        wait(seen, 3.0)
        qos = found["rt/joint_states sensor_msgs::msg::dds_::JointState_"]
        assert f"typehash={m.type_hash(m.JOINT_STATE)};".encode() in qos[Policy.Userdata].data
        assert "rt/cmd trajectory_msgs::msg::dds_::JointTrajectory_" in found
        assert "ros_discovery_info rmw_dds_common::msg::dds_::ParticipantEntitiesInfo_" in found

        # What `ros2 node list` reads: latched, on the unmangled topic.
        from cyclonedds.sub import DataReader

        from embodied.robot_bridge.transport_cyclone import _dds_qos

        topic = observer._topic("ros_discovery_info", m.PARTICIPANT_INFO)
        reader = DataReader(observer._participant, topic, _dds_qos(EVENTS, writer=False, message_type=None))

        def arm_node() -> bool:
            infos.extend(m.decode(s.data, m.PARTICIPANT_INFO) for s in reader.take(N=100) if hasattr(s, "data"))
            return any(node.node_name == "arm_node" for info in infos for node in info.node_entities_info_seq)

        assert wait(arm_node, 3.0)
        node = [n for i in infos for n in i.node_entities_info_seq if n.node_name == "arm_node"][-1]
        assert node.node_namespace == "/"
        gid = bytes(node.writer_gid_seq[0].data)
        assert gid == publisher.entity.get_guid().bytes
        assert len(node.reader_gid_seq) == 1
    finally:
        transport.close()
        observer.close()


def test_malformed_bytes_are_refused_before_the_wire() -> None:
    transport = CycloneTransport("bad", DOMAIN)
    try:
        publisher = transport.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
        with pytest.raises(EmbodiedError, match=r"/joint_states: Cyclone DDS refused a sample of 8 bytes"):
            publisher.write(b"\x00\x01\x00\x00zzzz")
        with pytest.raises(InputError, match="no message type"):
            transport.publisher("/x", "sensor_msgs/msg/Nonsense", DEFAULT)
    finally:
        transport.close()


def test_domains_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        CycloneTransport("x", 233)
    with pytest.raises(ConfigError, match="discovery"):
        CycloneTransport("x", DOMAIN, discovery="everywhere")
    monkeypatch.setenv("ROS_DOMAIN_ID", "seven")
    with pytest.raises(ConfigError, match="ROS_DOMAIN_ID"):
        default_domain()
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    assert default_domain() == 42


def test_only_loopback_is_advertised() -> None:
    """Every socket that Cyclone opens sends to and announces 127.0.0.1."""
    code = (
        "import sys; from embodied.robot_bridge.transport_cyclone import CycloneTransport as T\n"
        f"t = T('x', {DOMAIN}); t.close()"
    )
    environment = os.environ | {"CYCLONEDDS_URI": "<Tracing><Verbosity>config</Verbosity><Out>stdout</Out></Tracing>"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1" in done.stdout
    assert "selected interfaces: lo" in done.stdout
