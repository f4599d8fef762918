"""The doctor of the graph: every fault by itself on a memory bus, and one look over the wire."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import Clock, tiny_profile

from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.graph_doctor import Examination, Finding, as_text, diagnose, examine
from embodied.robot_bridge.processes import free_domain
from embodied.robot_bridge.qos import DEFAULT, LATCHED, SENSOR_DATA, QosProfile
from embodied.robot_bridge.transport import open_transport
from embodied.robot_bridge.transport_memory import MemoryBus, MemoryTransport
from embodied.robot_doctor import RobotDoctor, exit_code, robot_doctor

NAMES = ("shoulder", "elbow", "finger")


class Ward:
    """A driver with joint states at 100 Hz and a controller, on a memory bus under virtual time."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.bus = MemoryBus(self.clock.monotonic_ns)
        self.profile = tiny_profile(folder, topics={"cameras": {}})
        self.driver = self.node("driver")
        self.states = self.driver.publisher("/joint_states", m.JOINT_STATE, DEFAULT)
        controller = self.node("controller")
        self.command = self.profile.topics.command
        controller.subscriber(self.command, m.JOINT_TRAJECTORY, DEFAULT, lambda data, at: None)
        self.skew, self.position = 0.0, np.zeros(3)
        self.each_tick: Any = lambda: None

    def node(self, name: str) -> MemoryTransport:
        return MemoryTransport(self.bus, name)

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 100)):
            self.clock.seconds += 0.01
            stamp = self.clock.stamp() + round(self.skew * 1e9)
            if self.states is not None:
                self.states.write(m.joint_state(stamp, NAMES, self.position, np.zeros(3)))
            self.each_tick()

    def look(self, profile: bool = True) -> tuple[Examination, list[Finding]]:
        doctor = self.node("robot_doctor")
        seen = examine(
            doctor, self.profile if profile else None, 2.0, self.wait, self.clock.monotonic_ns, self.clock.stamp
        )
        doctor.close()
        return seen, diagnose(seen)


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def wrong(findings: list[Finding]) -> Finding:
    """The one thing that is wrong."""
    bad = [finding for finding in findings if finding.level == "wrong"]
    assert len(bad) == 1, bad
    return bad[0]


def test_a_healthy_graph(ward: Ward) -> None:
    seen, findings = ward.look()
    assert not [finding for finding in findings if finding.level == "wrong"]
    assert seen.graph.nodes == ("/controller", "/driver")  # not the doctor itself
    (report,) = [report for report in seen.topics() if report.topic == "/joint_states"]
    assert report.publishers == ("/driver",)
    assert report.subscriptions == ()
    assert report.count == 200
    assert report.rate_hz == pytest.approx(100, rel=0.01)
    assert report.age_ms == pytest.approx(0.0, abs=0.1)
    assert report.longest_gap_ms == pytest.approx(10, abs=0.1)
    size = len(m.joint_state(0, NAMES, np.zeros(3), np.zeros(3)))
    assert report.size_bytes == size
    assert report.kilobytes_per_second == pytest.approx(size * 0.1, rel=0.02)
    text = as_text(seen, findings)
    assert text.startswith("2 nodes: /controller, /driver")
    assert text.endswith("Nothing is wrong.")


def test_an_empty_graph(tmp_path: Path) -> None:
    ward = Ward(tmp_path)
    for transport in list(ward.bus.transports):
        transport.close()
    ward.states = None  # type: ignore[assignment]
    finding = wrong(ward.look(profile=False)[1])
    assert finding.text == "nobody is there"
    assert "ROS_DOMAIN_ID" in finding.advice


def test_qos_that_does_not_match(ward: Ward) -> None:
    camera = ward.node("camera").publisher("/image", m.IMAGE, SENSOR_DATA)
    ward.node("viewer").subscriber("/image", m.IMAGE, DEFAULT, lambda data, at: None)
    ward.each_tick = lambda: camera.write(m.image(ward.clock.stamp(), "", np.zeros((2, 2, 3), np.uint8)))
    seen, findings = ward.look()
    finding = wrong(findings)
    assert finding.about == "/image"
    assert finding.text == (
        "/camera and /viewer exchange nothing: the publisher offers best effort, the subscription requests reliable"
    )
    assert "do: give both the same reliability and durability" in as_text(seen, findings)


def test_types_that_differ(ward: Ward) -> None:
    ward.node("logger").subscriber("/joint_states", m.STRING, DEFAULT, lambda data, at: None)
    assert "disagree on the type" in wrong(ward.look()[1]).text


def test_definitions_that_differ(ward: Ward) -> None:
    endpoint = ward.driver.publishers[0].endpoint
    ward.driver.publishers[0].endpoint = dataclasses.replace(endpoint, type_hash="RIHS01_" + "0" * 64)
    finding = wrong(ward.look()[1])
    assert "definitions of sensor_msgs/msg/JointState differ" in finding.text
    assert "/driver: RIHS01_00000000" in finding.text


def test_two_commanders(ward: Ward) -> None:
    for name in ("safety", "teleop"):
        ward.node(name).publisher(ward.command, m.JOINT_TRAJECTORY, DEFAULT)
    for with_profile in (True, False):
        finding = wrong(ward.look(with_profile)[1])
        assert finding.about == ward.command
        assert finding.text == "2 publishers command the robot: /safety, /teleop"


def test_two_nodes_of_one_name(ward: Ward) -> None:
    ward.node("driver")
    finding = wrong(ward.look()[1])
    assert (finding.about, finding.text) == ("/driver", "2 nodes have this name")


@pytest.mark.parametrize(
    ("skew", "text"), [(3.0, "stamps of /driver lie 3.0"), (-60.0, "stamps of /driver are 60.0 s old")]
)
def test_clock_skew(ward: Ward, skew: float, text: str) -> None:
    ward.skew = skew
    finding = wrong(ward.look()[1])
    assert text in finding.text
    assert "chrony" in finding.advice


def test_simulation_time_is_no_skew_while_clock_tells_it(ward: Ward) -> None:
    ward.skew = -ward.clock.stamp() * 1e-9 + 5.0
    assert "old on arrival" in wrong(ward.look()[1]).text
    clock = ward.node("gazebo").publisher("/clock", m.CLOCK, DEFAULT)
    ward.each_tick = lambda: clock.write(m.clock(ward.clock.stamp() + round(ward.skew * 1e9)))
    assert not [finding for finding in ward.look()[1] if finding.level == "wrong"]
    ward.each_tick = lambda: clock.write(m.clock(10**9))
    assert any(finding.text == "it stands still" for finding in ward.look()[1])


def test_positions_that_are_no_numbers(ward: Ward) -> None:
    ward.position = np.array([0.0, np.nan, 0.0])
    assert wrong(ward.look()[1]).text == "position of elbow is not a number"


def test_what_the_profile_misses(ward: Ward, tmp_path: Path) -> None:
    topics = {"cameras": {"eye": "/eye"}, "command": "/other/joint_trajectory"}
    ward.profile = tiny_profile(tmp_path, topics=topics, joints=["shoulder", "wrist"], limits=_limits_for_wrist())
    found = {finding.about: finding.text for finding in ward.look()[1] if finding.level == "wrong"}
    assert found == {
        "/eye": "profile tiny needs it, and nothing came",
        "/joint_states": "no wrist; it has shoulder, elbow, finger",
        "/other/joint_trajectory": "nobody listens to the arm's commands",
    }


def _limits_for_wrist() -> dict[str, Any]:
    from bridge_fixtures import PROFILE

    limits: Any = PROFILE["limits"]
    return {"shoulder": limits["shoulder"], "wrist": limits["elbow"], "finger": limits["finger"]}


def test_silence_and_gaps_are_worth_a_look(ward: Ward) -> None:
    ward.node("lidar").publisher("/scan", m.IMAGE, SENSOR_DATA)
    ward.node("viewer").subscriber("/nobody", m.IMAGE, SENSOR_DATA, lambda data, at: None)
    states, ticks = ward.states, iter(range(10_000))

    def pause() -> None:
        k = next(ticks)
        ward.states = None if 150 < k < 190 else states  # type: ignore[assignment]

    ward.each_tick = pause
    notes = {finding.about: finding.text for finding in ward.look()[1] if finding.level == "note"}
    assert notes["/scan"] == "nothing came in 2 s, though /lidar publishes it"
    assert notes["/nobody"] == "/viewer listens, nobody publishes"
    assert notes["/joint_states"].startswith("100 Hz, but once silent for 4")


def test_latched_topics_are_heard_though_they_were_sent_before(ward: Ward) -> None:
    latched = ward.node("state").publisher("/robot_description", m.STRING, LATCHED)
    latched.write(m.string("<robot/>"))
    seen, _ = ward.look()
    assert next(report for report in seen.topics() if report.topic == "/robot_description").count == 1


def test_over_the_wire() -> None:
    """The verb itself, with a camera that a viewer cannot receive."""
    domain = free_domain()
    camera, viewer = (open_transport(name, "dds", domain) for name in ("camera", "viewer"))
    try:
        image = camera.publisher("/image", m.IMAGE, SENSOR_DATA)
        viewer.subscriber("/image", m.IMAGE, QosProfile(depth=1), lambda data, at: None)
        del image
        result = robot_doctor(RobotDoctor(seconds=0.5, transport="dds", domain=domain), Progress())
    finally:
        camera.close()
        viewer.close()
    assert result["nodes"] == ["/camera", "/viewer"]
    bad = [finding for finding in result["findings"] if finding["level"] == "wrong"]
    assert [finding["about"] for finding in bad] == ["/image"]
    assert "best effort" in bad[0]["text"]
    assert exit_code(result) == 1
    with pytest.raises(InputError, match="--seconds"):
        robot_doctor(RobotDoctor(seconds=0.0), Progress())
