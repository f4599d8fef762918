"""The rclpy transport: the conformance suite and real ROS nodes in a sourced ROS 2; elsewhere, what needs none.

source /opt/ros/<distro>/setup.bash && python -m pytest tests/test_transport_rclpy.py
"""

# pyright: reportMissingImports=false

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from transport_conformance import Make, TransportConformance, fresh_domain, ignore, wait

from embodied.contracts.errors import ConfigError, InputError, TransportError
from embodied.contracts.protocols import Transport
from embodied.robot_bridge import command_messages as commands
from embodied.robot_bridge import messages as m
from embodied.robot_bridge import parameters
from embodied.robot_bridge.qos import DEFAULT, LATCHED, QosProfile
from embodied.robot_bridge.ros_installation import environment_of
from embodied.robot_bridge.transport_cyclone import CycloneTransport
from embodied.robot_bridge.transport_rclpy import RclpyTransport

SOURCED = importlib.util.find_spec("rclpy") is not None
needs_ros = pytest.mark.skipif(
    not SOURCED, reason="no rclpy: source a ROS 2 installation (it is not on PyPI) and run this file with its Python"
)
NEEDS_CYCLONE = "the dds transport reaches services on RMW_IMPLEMENTATION=rmw_cyclonedds_cpp only"


def on_cyclone() -> bool:
    if not SOURCED:
        return False
    import rclpy

    return rclpy.get_rmw_implementation_identifier() == "rmw_cyclonedds_cpp"


# ---- without ROS


def test_without_rclpy_the_message_says_to_source_ros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(ConfigError, match=r"cannot import rclpy[^\n]*\nSource it \(source /opt/ros/<distro>"):
        RclpyTransport("node", 5)


def test_names_and_domains_are_checked_first() -> None:
    with pytest.raises(ConfigError, match="no node name"):
        RclpyTransport("1node", 5)
    with pytest.raises(ConfigError, match="domain 233 is out of range"):
        RclpyTransport("node", 233)


ROS_VARIABLES = ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_STATIC_PEERS", "ROS_LOCALHOST_ONLY", "CYCLONEDDS_URI")


@pytest.mark.parametrize(
    ("humble", "range_before", "expected"),
    [
        (False, "SUBNET", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}),
        (False, None, {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}),
        (False, "off", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}),
        (True, None, {"ROS_LOCALHOST_ONLY": "1"}),
    ],
)
def test_nothing_in_the_environment_opens_the_host_unless_a_flag_does(
    humble: bool, range_before: str | None, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ROS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = {
        "ROS_STATIC_PEERS": "10.0.0.2",
        "FASTDDS_DEFAULT_PROFILES_FILE": "/profiles.xml",
        "CYCLONEDDS_URI": "<General><AllowMulticast>true</AllowMulticast></General>",
    }
    before |= {"ROS_AUTOMATIC_DISCOVERY_RANGE": range_before} if range_before else {}
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    found = dict(os.environ)
    with environment_of("localhost", humble):
        inside = {name: os.environ[name] for name in ROS_VARIABLES if name in os.environ}
        cyclone = inside.pop("CYCLONEDDS_URI")
        assert "FASTDDS_DEFAULT_PROFILES_FILE" not in os.environ
        assert "127.0.0.1" in cyclone
        assert "true" not in cyclone
        if not humble:
            assert inside == expected
        else:
            assert inside.items() >= expected.items()
            assert "ROS_STATIC_PEERS" not in inside
    assert dict(os.environ) == found
    with environment_of("subnet", humble):
        assert dict(os.environ) == found


# ---- the conformance suite


def transports(kind: Callable[[int], Any]) -> Iterator[Make]:
    opened: list[Any] = []
    domain = fresh_domain()

    def factory(node: str, namespace: str = "/") -> Transport:
        opened.append(kind(len(opened))(node, domain, namespace=namespace))
        return opened[-1]

    yield factory
    for node in opened:
        node.close()


@needs_ros
class TestRclpy(TransportConformance):
    @pytest.fixture
    def make(self) -> Iterator[Make]:
        yield from transports(lambda k: RclpyTransport)


@needs_ros
@pytest.mark.skipif(
    not on_cyclone(), reason="services reach the dds transport on RMW_IMPLEMENTATION=rmw_cyclonedds_cpp"
)
@pytest.mark.parametrize("rclpy_first", [True, False], ids=["rclpy_to_dds", "dds_to_rclpy"])
class TestRclpyWithDds(TransportConformance):
    """The nodes of each test take turns: one of the ROS 2 installation, one of ours without."""

    @pytest.fixture
    def make(self, rclpy_first: bool) -> Iterator[Make]:
        kinds = (RclpyTransport, CycloneTransport) if rclpy_first else (CycloneTransport, RclpyTransport)
        yield from transports(lambda k: kinds[k % 2])


# ---- a plain ROS node, as its author writes it: message classes, rclpy's own parameters


@pytest.fixture
def domain() -> int:
    return fresh_domain()


@pytest.fixture(params=["rclpy", "dds"])
def ours(request: pytest.FixtureRequest, domain: int) -> Iterator[Any]:
    if request.param == "dds" and not on_cyclone():
        pytest.skip(NEEDS_CYCLONE)
    kind = RclpyTransport if request.param == "rclpy" else CycloneTransport
    transport = kind("ours", domain)
    yield transport
    transport.close()


@pytest.fixture
def ros_node(domain: int) -> Iterator[Any]:
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.parameter import Parameter

    context = rclpy.context.Context()
    with environment_of("localhost", importlib.util.find_spec("rclpy.event_handler") is None):
        rclpy.init(args=[], context=context, domain_id=domain)
        overrides = [Parameter("use_sim_time", value=True)]
        node = rclpy.create_node("theirs", context=context, parameter_overrides=overrides)
    node.declare_parameter("gain", 0.5)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def spin() -> None:
        try:
            executor.spin()
        except ExternalShutdownException:
            return

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    yield node
    executor.shutdown()
    thread.join(5)
    node.destroy_node()
    context.try_shutdown()


@needs_ros
def test_joint_states_of_a_ros_node_and_ours_are_the_same_numbers(ours: Any, ros_node: Any) -> None:
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import JointState

    rng = np.random.default_rng(0)
    got, told = [], []
    publisher = ours.publisher("/there", m.JOINT_STATE, QosProfile(200))
    subscriber = ours.subscriber("/back", m.JOINT_STATE, QosProfile(200), lambda data, at: got.append(data))
    ros_node.create_subscription(JointState, "/there", told.append, 200)
    ros_publisher = ros_node.create_publisher(JointState, "/back", 200)
    assert wait(lambda: publisher.matched == 1 and subscriber.matched == 1)
    time.sleep(0.3)  # a volatile subscription takes part from the publisher's first heartbeat on
    sent = []
    for k in range(100):
        names = [f"joint{'x' * (k % 5)}{j}" for j in range(1 + k % 8)]
        position, velocity = rng.normal(size=(2, len(names)))
        sent.append(m.joint_state(k * 10**8 + 1, names, position, velocity))
        publisher.write(sent[-1])
        message = JointState(name=names, position=position.tolist(), velocity=velocity.tolist())
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(k * 10**8 + 1, 10**9)
        assert bytes(serialize_message(message)) == sent[-1]
        ros_publisher.publish(message)
        time.sleep(0.002)
    assert wait(lambda: len(got) == 100 and len(told) == 100)
    assert got == sent
    assert [bytes(serialize_message(message)) for message in told] == sent


@needs_ros
def test_latched_topics_reach_a_late_ros_node_and_us(ours: Any, ros_node: Any) -> None:
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from std_msgs.msg import String

    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    ours.publisher("/robot_description", m.STRING, LATCHED).write(m.string("<robot/>"))
    ros_node.create_publisher(String, "/map", latched).publish(String(data="map"))
    got, told = [], []
    ours.subscriber("/map", m.STRING, LATCHED, lambda data, at: got.append(m.read_string(data)))
    ros_node.create_subscription(String, "/robot_description", told.append, latched)
    assert wait(lambda: got == ["map"] and [message.data for message in told] == ["<robot/>"])


@needs_ros
def test_services_of_a_ros_node_and_ours_answer_each_other(ours: Any, ros_node: Any) -> None:
    from std_srvs.srv import SetBool

    def answer(request: Any, response: Any) -> Any:
        response.success, response.message = not request.data, "theirs"
        return response

    ros_node.create_service(SetBool, "/theirs/switch", answer)
    ours.service("~/switch", m.SET_BOOL, lambda r: commands.outcome(not commands.read_set_bool_request(r), "ours"))
    for value in (True, False):
        data = ours.call("/theirs/switch", m.SET_BOOL, commands.set_bool_request(value), 10.0)
        assert commands.read_outcome(data) == (not value, "theirs")
    client = ros_node.create_client(SetBool, "/ours/switch")
    assert client.wait_for_service(10.0)
    for value in (True, False):
        future = client.call_async(SetBool.Request(data=value))
        assert wait(future.done)
        assert (future.result().success, future.result().message) == (not value, "ours")


@needs_ros
def test_parameters_of_a_ros_node_are_read_and_set(ours: Any, ros_node: Any) -> None:
    assert parameters.get_remote(ours, "/theirs", ["gain", "use_sim_time"], 10.0) == [0.5, True]
    assert parameters.set_remote(ours, "/theirs", {"gain": 2.0}, 10.0) == {"gain": ""}
    assert ros_node.get_parameter("gain").value == 2.0
    assert parameters.set_remote(ours, "/theirs", {"gain": "high"}, 10.0)["gain"] != ""


@needs_ros
def test_a_ros_node_on_simulated_time_follows_our_clock(ours: Any, ros_node: Any) -> None:
    assert ros_node.get_clock().now().nanoseconds == 0
    publisher = ours.publisher("/clock", m.CLOCK, DEFAULT)
    assert wait(lambda: publisher.matched == 1)
    for stamp in (5 * 10**9, 5 * 10**9 + 123, 7 * 10**9):

        def follows(stamp: int = stamp) -> bool:
            publisher.write(m.clock(stamp))
            return ros_node.get_clock().now().nanoseconds == stamp

        assert wait(follows)


@needs_ros
def test_a_ros_node_sees_our_endpoints_under_our_name_with_their_hashes(ours: Any, ros_node: Any) -> None:
    ours.publisher("/seen", m.JOINT_TRAJECTORY, DEFAULT)
    assert wait(lambda: [i.node_name for i in ros_node.get_publishers_info_by_topic("/seen")] == ["ours"])
    (info,) = ros_node.get_publishers_info_by_topic("/seen")
    assert (info.node_namespace, info.topic_type) == ("/", m.JOINT_TRAJECTORY)
    if hasattr(info, "topic_type_hash"):  # from Iron on
        assert str(info.topic_type_hash) == m.type_hash(m.JOINT_TRAJECTORY)
    assert wait(lambda: {"/ours", "/theirs"} <= set(ours.graph().nodes))


@needs_ros
def test_a_ros_node_in_its_default_settings_meets_ours_that_started_before() -> None:
    domain = fresh_domain()
    transport = CycloneTransport("ours", domain)
    code = (
        f"import rclpy, time; rclpy.init(args=[], domain_id={domain}); node = rclpy.create_node('theirs')\n"
        "end = time.monotonic() + 15\n"
        "while 'ours' not in node.get_node_names() and time.monotonic() < end: time.sleep(0.02)\n"
        "print(15 - (end - time.monotonic())); node.destroy_node(); rclpy.shutdown()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ROS_VARIABLES}
    try:
        time.sleep(2.0)  # past what a participant announces in its first moments
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert float(done.stdout) < 5.0, done.stderr
    finally:
        transport.close()


# ---- what only rclpy needs


@needs_ros
def test_bytes_that_are_no_sample_are_refused_before_the_wire() -> None:
    node = RclpyTransport("node", fresh_domain())
    try:
        publisher = node.publisher("/t", m.JOINT_STATE, DEFAULT)
        with pytest.raises(TransportError, match=r"/t: refused a sample of 8 bytes that are no sensor_msgs"):
            publisher.write(b"\x00\x01\x00\x00zzzz")
        with pytest.raises(InputError, match="4 bytes that are no std_srvs"):
            node.call("/x", m.SET_BOOL, b"\x00\x01\x00\x00", 0.1)
    finally:
        node.close()


@needs_ros
@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise ValueError"])
def test_a_process_that_forgets_to_close_ends_as_it_meant_to(ending: str) -> None:
    code = (
        "from embodied.robot_bridge import messages as m\n"
        "from embodied.robot_bridge.qos import DEFAULT\n"
        "from embodied.robot_bridge.transport_rclpy import RclpyTransport\n"
        f"node = RclpyTransport('node', {fresh_domain()})\n"
        f"node.subscriber('/t', m.STRING, DEFAULT, print)\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3, "raise ValueError": 1}[ending], done.stderr


@needs_ros
def test_types_that_the_installation_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trajectory_msgs.msg", None)
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    node = RclpyTransport("node", fresh_domain())
    try:
        with pytest.raises(ConfigError, match="apt-get install ros-jazzy-trajectory-msgs"):
            node.subscriber("/t", m.JOINT_TRAJECTORY, DEFAULT, ignore)
    finally:
        node.close()


@needs_ros
def test_other_representations_are_refused() -> None:
    node = RclpyTransport("node", fresh_domain())
    try:
        with pytest.raises(ConfigError, match="xcdr1"):
            node.publisher("/t", m.STRING, QosProfile(representations=("xcdr2",)))
    finally:
        node.close()


@needs_ros
def test_a_slow_service_holds_up_neither_topics_nor_other_services() -> None:
    node, got, started, go_on = RclpyTransport("node", fresh_domain()), [], threading.Event(), threading.Event()

    def slow(request: bytes) -> bytes:
        started.set()
        assert go_on.wait(10)
        return commands.outcome(True, "slow")

    answers: list[Any] = []

    def ask() -> None:
        answers.append(commands.read_outcome(node.call("~/slow", m.TRIGGER, commands.trigger_request(), 20.0)))

    asking = threading.Thread(target=ask)
    try:
        node.service("~/slow", m.TRIGGER, slow)
        node.service("~/quick", m.TRIGGER, lambda request: commands.outcome(True, "quick"))
        node.subscriber("/t", m.STRING, DEFAULT, lambda data, at: got.append(data))
        publisher = node.publisher("/t", m.STRING, DEFAULT)
        assert wait(lambda: publisher.matched == 1)
        asking.start()
        assert started.wait(10)
        for k in range(3):
            publisher.write(m.string("x"))
            assert wait(lambda k=k: len(got) == k + 1)
        quick = node.call("~/quick", m.TRIGGER, commands.trigger_request(), 10.0)
        assert commands.read_outcome(quick) == (True, "quick")
        assert answers == []
        go_on.set()
        asking.join(10)
        assert answers == [(True, "slow")]
    finally:
        go_on.set()
        node.close()
