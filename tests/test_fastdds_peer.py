"""Our wire against an independent one: Fast DDS and Fast CDR behind a small C++ program, over loopback, both ways."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.robot_bridge import messages as m
from embodied.robot_bridge.processes import free_domain
from embodied.robot_bridge.qos import LATCHED, QosProfile
from embodied.robot_bridge.transport_cyclone import CycloneTransport

SOURCE = Path(__file__).with_name("fastdds_peer.cpp")
PACKAGES = "g++ libfastrtps-dev libfastcdr-dev"
HEADERS = ("fastdds/dds/domain/DomainParticipant.hpp", "fastrtps/utils/IPLocator.h", "fastcdr/Cdr.h")
TYPES = {"joint_state": m.JOINT_STATE, "joint_trajectory": m.JOINT_TRAJECTORY}
RELIABILITY, DURABILITY = 11, 2  # policy ids of DDS
RNG = np.random.default_rng(6)


def wait(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.fixture(scope="module")
def program() -> Path:
    """The compiled peer, kept in the temporary folder under a hash of its source."""
    compiler = shutil.which("g++")
    question = "\n".join(f"#if !__has_include(<{name}>)\n#error\n#endif" for name in HEADERS)
    command = [compiler or "false", "-E", "-x", "c++", "-"]
    if subprocess.run(command, input=question, text=True, capture_output=True).returncode:
        pytest.skip(f"Fast DDS is not installed. Debian and Ubuntu: sudo apt-get install -y {PACKAGES}")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"embodied-fastdds-peer-{os.getuid()}-{digest}"
    if not built.exists():
        part = built.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O0", "-o", str(part), str(SOURCE), "-lfastrtps", "-lfastcdr", "-lpthread"]
        done = subprocess.run(["g++", *flags], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        part.replace(built)
    return built


class Peer:
    """The running program: `tell` it a command, look at its `events`."""

    def __init__(self, program: Path, domain: int) -> None:
        self.process = subprocess.Popen(
            [str(program), str(domain)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert wait(lambda: bool(self.events("ready", "")))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.append(json.loads(line))

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")

    def events(self, event: str, topic: str) -> list[dict[str, Any]]:
        return [e for e in list(self._events) if (e["event"], e["topic"]) == (event, topic)]

    def samples(self, event: str, topic: str) -> list[Any]:
        return [e["sample"] for e in self.events(event, topic)]

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(10)
        self._thread.join(5)
        return code


@pytest.fixture(scope="module")
def domain() -> int:
    return free_domain()


@pytest.fixture(scope="module")
def peer(program: Path, domain: int) -> Iterator[Peer]:
    running = Peer(program, domain)
    yield running
    running.process.kill()


@pytest.fixture(scope="module")
def ours(peer: Peer, domain: int) -> Iterator[CycloneTransport]:
    transport = CycloneTransport("ours", domain)
    yield transport
    transport.close()


def nanoseconds(stamp: Any) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


def as_json(data: bytes, message_type: str) -> dict[str, Any]:
    """Our reading of a sample, in the shape in which the peer prints its own."""
    message = m.decode(data, message_type)
    head = {"stamp_ns": nanoseconds(message.header.stamp), "frame_id": message.header.frame_id}
    if message_type == m.JOINT_STATE:
        arrays = {key: getattr(message, key).tolist() for key in ("position", "velocity", "effort")}
        return head | {"name": list(message.name)} | arrays
    points = [
        {
            "positions": point.positions.tolist(),
            "velocities": point.velocities.tolist(),
            "time_ns": nanoseconds(point.time_from_start),
        }
        for point in message.points
    ]
    return head | {"joint_names": list(message.joint_names), "points": points}


def assert_same(left: list[Any], right: list[Any]) -> None:
    """Equal to the last bit; NaN equals NaN."""
    assert len(left) == len(right)
    assert [json.dumps(sample, sort_keys=True) for sample in left] == [
        json.dumps(sample, sort_keys=True) for sample in right
    ]


def joint_state(number: int) -> bytes:
    """Names of every length, so that each alignment of what follows occurs; NaN and empty arrays."""
    names = ["j" * (1 + int(RNG.integers(9))) for _ in range(int(RNG.integers(1, 9)))]
    velocity = RNG.normal(size=len(names))
    velocity[RNG.random(len(names)) < 0.3] = np.nan
    return m.joint_state(number * 1_000_000_007, names, RNG.normal(size=len(names)), velocity)


def joint_trajectory(number: int, points: int) -> bytes:
    times = np.sort(RNG.random(points)).cumsum()
    positions = RNG.normal(size=(points, 7))
    velocities = positions[::-1] if number % 2 else None
    names = tuple(f"joint{j}" for j in range(7))
    return m.joint_trajectory(m.Trajectory(number, f"policy:run:{number}", names, times, positions, velocities))


@pytest.mark.parametrize("reliable", [True, False], ids=["reliable", "best_effort"])
@pytest.mark.parametrize("kind", ["joint_state", "joint_trajectory"])
def test_hundred_of_hundred_arrive_whole_in_both_directions(
    peer: Peer, ours: CycloneTransport, kind: str, reliable: bool
) -> None:
    word = "reliable" if reliable else "best_effort"
    there, back = f"/there/{kind}/{word}", f"/back/{kind}/{word}"
    got: list[bytes] = []
    qos = QosProfile(200, reliable)
    publisher = ours.publisher(there, TYPES[kind], qos)
    subscriber = ours.subscriber(back, TYPES[kind], qos, lambda data, at: got.append(data))
    peer.tell(f"reader {there} {kind} {word} volatile")
    peer.tell(f"writer {back} {kind} {word} volatile")
    assert wait(lambda: publisher.matched == 1 and subscriber.matched == 1)
    assert wait(lambda: all(peer.events("matched", topic) for topic in (there, back)))

    sent = [joint_state(k) if kind == "joint_state" else joint_trajectory(k, 1 + k % 16) for k in range(100)]
    for data in sent:
        publisher.write(data)
        time.sleep(0.002)
    peer.tell(f"write {back} 0 100 16")
    assert wait(lambda: len(peer.events("received", there)) >= 100 and len(got) >= 100)
    assert_same(peer.samples("received", there), [as_json(data, TYPES[kind]) for data in sent])
    assert_same([as_json(data, TYPES[kind]) for data in got], peer.samples("sent", back))
    assert peer.events("undecodable", there) == []


def test_samples_larger_than_a_packet_are_put_together_again(peer: Peer, ours: CycloneTransport) -> None:
    got: list[bytes] = []
    qos = QosProfile(20)
    publisher = ours.publisher("/large/there", m.JOINT_TRAJECTORY, qos)
    subscriber = ours.subscriber("/large/back", m.JOINT_TRAJECTORY, qos, lambda data, at: got.append(data))
    peer.tell("reader /large/there joint_trajectory reliable volatile")
    peer.tell("writer /large/back joint_trajectory reliable volatile")
    assert wait(lambda: publisher.matched == 1 and subscriber.matched == 1)
    assert wait(lambda: bool(peer.events("matched", "/large/there") and peer.events("matched", "/large/back")))
    sent = [joint_trajectory(k, 2000) for k in range(5)]
    assert len(sent[0]) > 2 * 65_536
    for data in sent:
        publisher.write(data)
    # A volatile reader of Cyclone takes part from the writer's first heartbeat on. Fast DDS sends that between the
    # fragments of the first large sample, which is lost therefore; every later one must come.
    peer.tell("write /large/back 0 6 2000")
    assert wait(lambda: len(peer.events("received", "/large/there")) == 5 and len(got) >= 5)
    assert_same(peer.samples("received", "/large/there"), [as_json(data, m.JOINT_TRAJECTORY) for data in sent])
    assert_same([as_json(data, m.JOINT_TRAJECTORY) for data in got[-5:]], peer.samples("sent", "/large/back")[-5:])


def test_latched_samples_reach_late_subscriptions_of_the_other_side(peer: Peer, ours: CycloneTransport) -> None:
    publisher = ours.publisher("/latched/there", m.JOINT_STATE, LATCHED)
    sent = [joint_state(k) for k in range(3)]
    for data in sent:
        publisher.write(data)
    peer.tell("writer /latched/back joint_state reliable latched")
    peer.tell("write /latched/back 0 3 1")
    assert wait(lambda: bool(peer.events("done", "/latched/back")))

    got: list[bytes] = []
    ours.subscriber("/latched/back", m.JOINT_STATE, LATCHED, lambda data, at: got.append(data))
    peer.tell("reader /latched/there joint_state reliable latched")
    assert wait(lambda: bool(got) and bool(peer.events("received", "/latched/there")))
    time.sleep(0.2)  # no second one comes
    assert_same([as_json(data, m.JOINT_STATE) for data in got], peer.samples("sent", "/latched/back")[-1:])
    assert_same(peer.samples("received", "/latched/there"), [as_json(sent[-1], m.JOINT_STATE)])


@pytest.mark.parametrize("kind", ["joint_state", "joint_trajectory"])
def test_malformed_samples_are_dropped_below_python(
    peer: Peer, ours: CycloneTransport, kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Truncated doubles, a string and a sequence longer than the payload: none delivered, and the next good one is."""
    topic, got = f"/malformed/{kind}", []
    subscriber = ours.subscriber(topic, TYPES[kind], QosProfile(200), lambda data, at: got.append(data))
    peer.tell(f"writer {topic} {kind} reliable volatile")
    assert wait(lambda: subscriber.matched == 1 and bool(peer.events("matched", topic)))
    peer.tell(f"malform {topic} 51")
    assert wait(lambda: len(peer.events("done", topic)) == 1)
    peer.tell(f"write {topic} 51 5 4")
    assert wait(lambda: len(got) >= 5)
    time.sleep(0.1)
    assert_same([as_json(data, TYPES[kind]) for data in got], peer.samples("sent", topic))
    assert capfd.readouterr().err.count("deserialization rt/malformed") == 51  # Cyclone's own note of each
    assert [r for r in caplog.records if r.exc_info] == []


@pytest.mark.parametrize(
    ("offered", "requested", "policy", "word"),
    [
        (("best_effort", "volatile"), ("reliable", "volatile"), RELIABILITY, "reliab"),
        (("reliable", "volatile"), ("reliable", "latched"), DURABILITY, "transient local"),
    ],
)
@pytest.mark.parametrize("we_publish", [True, False])
def test_mismatching_quality_of_service_is_reported_by_both_sides(
    peer: Peer, ours: CycloneTransport, offered: Any, requested: Any, policy: int, word: str, we_publish: bool
) -> None:
    topic, got = f"/mismatch/{policy}/{we_publish}".lower().replace("/2", "/two").replace("/11", "/eleven"), []
    mine, theirs = (offered, requested) if we_publish else (requested, offered)
    qos = QosProfile(1, mine[0] == "reliable", mine[1] == "latched")
    if we_publish:
        endpoint: Any = ours.publisher(topic, m.JOINT_STATE, qos)
    else:
        endpoint = ours.subscriber(topic, m.JOINT_STATE, qos, lambda data, at: got.append(data))
    peer.tell(f"{'reader' if we_publish else 'writer'} {topic} joint_state {theirs[0]} {theirs[1]}")
    assert wait(lambda: bool(peer.events("incompatible", topic)))
    assert peer.events("incompatible", topic)[0]["policy"] == policy
    assert wait(lambda: any(line.startswith(f"{topic}: ") for line in ours.problems()))
    (line,) = [line for line in ours.problems() if line.startswith(f"{topic}: ")]
    assert word in line
    if we_publish:
        endpoint.write(joint_state(0))
    else:
        peer.tell(f"write {topic} 0 1 1")
        assert wait(lambda: bool(peer.events("done", topic)))
    time.sleep(0.05)
    assert (endpoint.matched, got, peer.events("received", topic)) == (0, [], [])


def test_the_peer_reads_our_types_and_type_hashes(peer: Peer, ours: CycloneTransport) -> None:
    for kind, name in (("joint_state", "JointState"), ("joint_trajectory", "JointTrajectory")):
        ours.publisher(f"/seen/{kind}", TYPES[kind], QosProfile())
        assert wait(lambda topic=f"/seen/{kind}": bool(peer.events("discovered", topic)))
        (event,) = peer.events("discovered", f"/seen/{kind}")
        assert event["type"] == f"{TYPES[kind].split('/')[0]}::msg::dds_::{name}_"
        assert event["user_data"] == f"typehash={m.type_hash(TYPES[kind])};"


def test_we_see_the_endpoints_of_a_program_that_is_no_ros_node(peer: Peer, ours: CycloneTransport) -> None:
    peer.tell("writer /bare joint_state best_effort volatile")

    def bare() -> list[Any]:
        return [end for end in ours.graph().endpoints if end.topic == "/bare"]

    assert wait(lambda: bool(bare()))
    (end,) = bare()
    assert (end.message_type, end.node, end.publishes, end.type_hash) == (m.JOINT_STATE, "", True, "")
    assert (end.qos.reliable, end.qos.latched, end.qos.representations) == (False, False, ("xcdr1",))


def test_the_peer_listens_on_loopback_only(peer: Peer) -> None:
    inodes = set()
    for link in Path(f"/proc/{peer.process.pid}/fd").iterdir():
        inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    table = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    addresses = [row[1].split(":")[0] for row in table if row[9] in inodes]
    assert len(addresses) >= 2
    assert set(addresses) == {"0100007F"}  # 127.0.0.1, little endian


def test_a_peer_that_leaves_is_noticed_without_an_error(
    program: Path, ours: CycloneTransport, domain: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its writers' samples without data, which end their instances, are no message."""
    got: list[bytes] = []
    subscriber = ours.subscriber("/leaving", m.JOINT_STATE, QosProfile(), lambda data, at: got.append(data))
    second = Peer(program, domain)
    try:
        second.tell("writer /leaving joint_state reliable volatile")
        assert wait(lambda: subscriber.matched == 1 and bool(second.events("matched", "/leaving")))
        second.tell("write /leaving 0 2 1")
        assert wait(lambda: len(got) == 2)
        assert second.end() == 0
        assert wait(lambda: subscriber.matched == 0, 3.0)
        time.sleep(0.1)
        assert len(got) == 2
        assert [r for r in caplog.records if r.exc_info] == []
    finally:
        second.process.kill()
