"""What only the wire has: other processes, which profiles match, what is refused, what is kept."""

import gc
import multiprocessing
import os
import re
import shutil
import signal
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

from embodied.contracts.errors import TransportError
from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import messages as m
from embodied.robot_bridge import parameters
from embodied.robot_bridge.carriers import carrier_class, carry, ros_type_name
from embodied.robot_bridge.dds_endpoints import from_dds, to_dds
from embodied.robot_bridge.qos import (
    COMMAND,
    DEFAULT,
    EVENTS,
    LATCHED,
    LATEST,
    SENSOR_DATA,
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
