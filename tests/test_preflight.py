"""Preflight: each thing that can be wrong is found by itself, said in words, and refuses before anything is sent."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from failure_rig import TICK, Rig

from embodied.contracts.errors import SafetyError
from embodied.policies.bundle import PolicyContract, load_policy
from embodied.robot_bridge import messages as m
from embodied.robot_bridge.preflight import Check, check, refuse, table
from embodied.robot_bridge.preflight_facts import Facts, collect
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, QosProfile

BUNDLE = "bundle-folder"


class Site:
    """A rig before arming, with what the policy process would have said."""

    def __init__(self, folder: Path, **profile: Any) -> None:
        safety = {"deadman_required": False, "tracking_error": 0.2} | profile.pop("safety", {})
        self.rig = Rig(folder, camera_policy=True, safety=safety, **profile)
        self.contract = load_policy(folder / "bundle").contract
        self.policy_events = self.rig.transport("policy_events").publisher("/bridge/event", m.STRING, EVENTS)
        self.said = {"event": "policy_ready", "bundle": BUNDLE, "profile": self.rig.profile.fingerprint}
        self.each_tick: Callable[[], None] = lambda: None
        self.simulated = True

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.each_tick()
            self.rig.run(TICK)

    def facts(self, **changes: Any) -> Facts:
        self.wait(0.2)
        self.policy_events.write(m.json_string(self.said))
        transport = self.rig.transport("preflight")
        facts = collect(
            self.rig.profile,
            self.contract,
            transport,
            bundle=BUNDLE,
            simulated=self.simulated,
            seconds=1.0,
            wait=self.wait,
            clock_ns=self.rig.clock.monotonic_ns,
            stamp=self.rig.clock.stamp,
        )
        transport.close()
        return dataclasses.replace(facts, **changes)

    def checks(self, **changes: Any) -> list[Check]:
        return check(self.facts(**changes))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def only(checks: list[Check], status: str = "failed") -> Check:
    """The one check with that status; every other is ok."""
    wrong = [line for line in checks if line.status != "ok"]
    assert [line.status for line in wrong] == [status], table(checks)
    return wrong[0]


def test_a_fitting_site_passes_and_nothing_was_sent(site: Site) -> None:
    checks = site.checks()
    assert all(line.status == "ok" for line in checks), table(checks)
    refuse(checks)
    assert site.rig.robot.counts["accepted"] == 0
    names = {line.name for line in checks}
    assert names >= {"bundle", "joint names", "joint rate", "camera eye", "initial pose", "normaliser", "limits"}
    assert names >= {"arm command", "QoS", "clock", "deadman", "e-stop", "safety process", "policy process"}


def test_a_failure_refuses_with_the_table(site: Site) -> None:
    site.said["profile"] = "another"
    with pytest.raises(SafetyError, match=r"Nothing was commanded: preflight failed in policy process\.") as refusal:
        refuse(site.checks())
    assert "wanted: one profile" in str(refusal.value)
    assert "do: restart it" in str(refusal.value)


# ---- what the robot sends


def test_no_joint_states(site: Site) -> None:
    site.rig.inject("freeze_state")
    site.wait(0.1)
    found = [line for line in site.checks() if line.status == "failed"]
    assert [line.name for line in found] == ["joint states"]
    assert "nothing on /joint_states" in found[0].found
    assert "/mujoco_robot publishes it" in found[0].found


def test_a_joint_is_missing(site: Site) -> None:
    joints = site.rig.profile.topics.joint_states
    facts = site.facts()
    stamp = site.rig.clock.stamp()
    sample = m.joint_state(stamp, ["shoulder", "wrist", "finger"], np.array([0.1, 0.0, 0.08]), np.zeros(3))
    stream = dataclasses.replace(facts.streams[joints], recent=(sample,))
    line = only(check(dataclasses.replace(facts, streams={**facts.streams, joints: stream})))
    assert line.name == "joint names"
    assert "has no elbow; it has shoulder, wrist, finger" in line.found


def test_another_order_of_joints_is_mapped_and_said(site: Site) -> None:
    joints = site.rig.profile.topics.joint_states
    facts = site.facts()
    sample = m.joint_state(0, ["finger", "elbow", "shoulder"], np.array([0.08, -0.2, 0.1]), np.zeros(3))
    stream = dataclasses.replace(facts.streams[joints], recent=(sample,))
    checks = check(dataclasses.replace(facts, streams={**facts.streams, joints: stream}))
    assert all(line.status == "ok" for line in checks), table(checks)
    assert next(line for line in checks if line.name == "joint names").found.endswith("mapped by name")


def test_nan_positions(site: Site) -> None:
    site.rig.inject("nan", joint="elbow")
    site.wait(0.8)
    line = only(site.checks())
    assert (line.name, line.found) == ("joint states", "NaN for elbow")


def test_joint_states_too_slow(site: Site) -> None:
    facts, joints = site.facts(), site.rig.profile.topics.joint_states
    stream = facts.streams[joints]
    slow = dataclasses.replace(stream, arrived=stream.arrived[::20])
    line = only(check(dataclasses.replace(facts, streams={**facts.streams, joints: slow})))
    assert line.name == "joint rate"
    assert line.found.startswith("5 Hz, longest silence 2")
    assert "safety.joint_timeout" in line.wanted


def test_a_gap_in_the_joint_states_is_warned_of(site: Site) -> None:
    facts, joints = site.facts(), site.rig.profile.topics.joint_states
    stream = facts.streams[joints]
    holed = dataclasses.replace(stream, arrived=np.delete(stream.arrived, slice(30, 45)))
    line = only(check(dataclasses.replace(facts, streams={**facts.streams, joints: holed})), "warning")
    assert "longest silence 160 ms" in line.found


def _replace_image(site: Site, facts: Facts, data: bytes) -> Facts:
    topic = site.rig.profile.topics.cameras["eye"]
    stream = dataclasses.replace(facts.streams[topic], recent=(data,))
    return dataclasses.replace(facts, streams={**facts.streams, topic: stream})


def test_camera_of_another_size(site: Site) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    facts = _replace_image(site, site.facts(), m.image(0, "", pixels))
    line = only(check(facts))
    assert line.name == "camera eye"
    assert line.found.startswith("80x48")
    assert line.wanted.startswith("64x64")
    resized = dataclasses.replace(facts.profile.policy, resize_images=True)
    profile = dataclasses.replace(facts.profile, policy=resized)
    checks = check(dataclasses.replace(facts, profile=profile))
    assert next(line for line in checks if line.name == "camera eye").status == "ok"


def test_camera_with_an_encoding_that_nobody_reads(site: Site) -> None:
    message = m.decode(m.image(0, "", np.zeros((64, 64, 3), np.uint8)), m.IMAGE)
    message.encoding = "yuv422"
    line = only(check(_replace_image(site, site.facts(), m.encode(message))))
    assert line.name == "camera eye"
    assert "yuv422" in line.found


def test_camera_that_sees_nothing(site: Site) -> None:
    line = only(check(_replace_image(site, site.facts(), m.image(0, "", np.zeros((64, 64, 3), np.uint8)))), "warning")
    assert "all of one colour" in line.found


def test_silent_camera(site: Site) -> None:
    site.rig.inject("freeze_cameras")
    site.wait(0.3)
    line = only(site.checks())
    assert line.name == "camera eye"
    assert "nothing on /camera/eye/image_raw" in line.found


def test_slow_camera(tmp_path: Path) -> None:
    site = Site(tmp_path, simulation={"cameras_hz": 5.0})
    line = only(site.checks())
    assert line.name == "camera eye"
    assert "at 5.0 Hz" in line.found
    assert "at 10 Hz" in line.wanted


def test_late_camera(site: Site) -> None:
    site.rig.inject("delay", of="cameras", seconds=0.4)
    site.wait(1.0)
    line = only(site.checks())
    assert line.name == "camera eye"
    assert "old on arrival" in line.found


# ---- where the arm stands


def _at(facts: Facts, position: list[float], velocity: list[float] | None = None) -> Facts:
    joints = facts.profile.topics.joint_states
    sample = m.joint_state(0, facts.limits.names, np.array(position), np.array(velocity or [0.0] * 3))
    stream = dataclasses.replace(facts.streams[joints], recent=(sample,))
    return dataclasses.replace(facts, streams={**facts.streams, joints: stream})


def test_outside_the_limits(site: Site) -> None:
    line = only(check(_at(site.facts(), [2.3, 0.0, 0.08])))
    assert line.name == "initial pose"
    assert "shoulder stands at 2.300" in line.found
    assert line.wanted.startswith("-1.900 to 1.900")


def test_degrees(site: Site) -> None:
    line = only(check(_at(site.facts(), [57.0, -20.0, 0.08])))
    assert line.name == "units"
    assert "degrees" in line.found


def test_moving(site: Site) -> None:
    line = only(check(_at(site.facts(), [0.1, 0.0, 0.08], [0.0, 0.3, 0.0])), "warning")
    assert "elbow moves at 0.300 rad/s" in line.found


def _with_statistics(contract: PolicyContract, key: str, mean: list[float], std: list[float]) -> PolicyContract:
    statistics = {"mean": np.array(mean, np.float32), "std": np.array(std, np.float32)}
    return dataclasses.replace(contract, normalizer={**contract.normalizer, key: statistics})


@pytest.mark.parametrize(("std", "status"), [(0.05, "ok"), (0.02, "warning"), (0.01, "failed")])
def test_far_from_the_training_data(site: Site, std: float, status: str) -> None:
    contract = _with_statistics(site.contract, "joint_position", [0.0, -0.2], [std, 1.0])  # the shoulder stands at 0.1
    checks = check(site.facts(contract=contract))
    line = next(line for line in checks if line.name == "normaliser")
    assert line.status == status
    assert f"{0.1 / std:.1f} standard deviations" in line.found
    if status != "ok":
        assert only(checks, status).found.startswith("joint_position of shoulder is 0.100")


def test_normaliser_without_a_key(site: Site) -> None:
    normalizer = {key: value for key, value in site.contract.normalizer.items() if key != "joint_velocity"}
    checks = check(site.facts(contract=dataclasses.replace(site.contract, normalizer=normalizer)))
    found = [line for line in checks if line.status == "failed"]
    assert [(line.name, line.found) for line in found] == [("normaliser", "no statistics for joint_velocity")]


# ---- bundle, profile, limits


@pytest.mark.parametrize(
    ("names", "order", "said"),
    [
        (("elbow", "shoulder", "finger"), None, "elbow, shoulder, finger"),
        (None, ("elbow", "shoulder"), "in the order elbow, shoulder"),
    ],
)
def test_joints_of_another_robot_or_order(site: Site, names: Any, order: Any, said: str) -> None:
    contract = site.contract
    if names:
        contract = dataclasses.replace(contract, action=dataclasses.replace(contract.action, names=names))
    if order:
        contract = dataclasses.replace(contract, joint_names=order)
    line = only(site.checks(contract=contract))
    assert line.name == "bundle"
    assert said in line.found


def test_actions_that_no_adapter_takes(site: Site) -> None:
    action = dataclasses.replace(site.contract.action, control_mode="end_effector_delta")
    line = only(site.checks(contract=dataclasses.replace(site.contract, action=action)))
    assert "end_effector_delta" in line.found


def test_a_bundle_in_degrees(site: Site) -> None:
    action = dataclasses.replace(site.contract.action, unit="deg")
    line = only(site.checks(contract=dataclasses.replace(site.contract, action=action)))
    assert (line.name, line.wanted) == ("units", "rad and m, as ROS")


def test_actions_faster_than_the_limits(tmp_path: Path) -> None:
    site = Site(tmp_path, limit_scale=0.3)
    line = only(site.checks(), "warning")
    assert line.name == "limits"
    assert "shoulder 1.00 of 0.60" in line.found
    assert "--speed" in line.advice


# ---- the graph


def test_nobody_listens_to_commands(site: Site) -> None:
    robot = next(t for t in site.rig.bus.transports if t.node == "mujoco_robot")
    robot.subscribers = [s for s in robot.subscribers if s.topic != site.rig.profile.topics.command]
    line = only(site.checks())
    assert line.name == "arm command"
    assert "nobody subscribes to /joint_trajectory_controller/joint_trajectory" in line.found
    assert "list_controllers" in line.advice


def test_somebody_else_commands(site: Site) -> None:
    site.rig.transport("teleop").publisher(site.rig.profile.topics.command, m.JOINT_TRAJECTORY, DEFAULT)
    line = only(site.checks())
    assert line.name == "arm command"
    assert line.found.startswith("/teleop publishes")


def test_qos_that_does_not_match_names_both_profiles(site: Site) -> None:
    topic = site.rig.profile.topics.command
    latched = QosProfile(depth=1, latched=True)
    site.rig.transport("controller").subscriber(topic, m.JOINT_TRAJECTORY, latched, lambda data, at: None)
    line = only(site.checks())
    assert line.name == f"QoS {topic}"
    assert "/safety offers reliable, volatile" in line.found
    assert "/controller requests reliable, transient local" in line.found


def test_another_type_on_a_topic(site: Site) -> None:
    site.rig.transport("driver").publisher("/joint_states", m.FLOAT_ARRAY, DEFAULT)
    line = next(line for line in site.checks() if line.status == "failed")
    assert line.name == "QoS /joint_states"
    assert "/driver sends std_msgs/msg/Float64MultiArray" in line.found


def test_strangers_that_do_not_match_each_other_are_only_mentioned(site: Site) -> None:
    latched = QosProfile(depth=1, latched=True)
    site.rig.transport("rviz").subscriber("/joint_states", m.JOINT_STATE, latched, lambda data, at: None)
    line = only(site.checks(), "warning")
    assert line.name == "QoS /joint_states"


# ---- clocks


@pytest.mark.parametrize(("seconds", "ok"), [(0.05, True), (0.5, False), (-3600.0, False)])
def test_clock_skew(site: Site, seconds: float, ok: bool) -> None:
    site.contract = dataclasses.replace(site.contract, images={})  # pictures would be late as well
    site.rig.inject("clock_jump", seconds=seconds)
    site.wait(0.1)
    checks = site.checks()
    line = next(line for line in checks if line.name == "clock")
    assert line.status == ("ok" if ok else "failed")
    arrive = float(line.found.split("arrive ")[1].split(" ms")[0])
    assert arrive == pytest.approx(-1000 * seconds, abs=10)
    if not ok:
        assert "chrony" in only(checks).advice


def test_a_simulator_whose_clock_is_not_followed(site: Site) -> None:
    site.contract = dataclasses.replace(site.contract, images={})
    clock = site.rig.transport("gazebo").publisher("/clock", m.CLOCK, DEFAULT)
    site.each_tick = lambda: clock.write(m.clock(1_000_000_000))
    site.rig.inject("clock_jump", seconds=-1e5)
    site.wait(0.1)
    assert only(site.checks()).advice == "--use-sim-time"


@pytest.mark.parametrize("running", [True, False])
def test_simulation_time_needs_a_running_clock(site: Site, running: bool) -> None:
    clock = site.rig.transport("gazebo").publisher("/clock", m.CLOCK, DEFAULT)
    site.each_tick = lambda: clock.write(m.clock(site.rig.clock.stamp() if running else 10**9))
    checks = site.checks(sim_time=True)
    if running:
        assert all(line.status == "ok" for line in checks), table(checks)
    else:
        assert only(checks).found == "/clock: it stands still"


# ---- people and processes


def test_deadman_that_nobody_holds(tmp_path: Path) -> None:
    site = Site(tmp_path, safety={"deadman_required": True})
    line = only(site.checks())
    assert (line.name, line.found) == ("deadman", "nobody sends it")
    site.rig.deadman = False  # sent, and not held: arming will tell
    assert all(line.status == "ok" for line in site.checks())


def test_a_real_robot_without_a_deadman_is_warned_of(site: Site) -> None:
    site.simulated = False
    line = only(site.checks(), "warning")
    assert line.name == "deadman"
    assert "physical stop" in line.advice


def test_estop(tmp_path: Path) -> None:
    site = Site(tmp_path, safety={"estop_required": True})
    found = [line for line in site.checks() if line.status == "failed"]
    assert [line.name for line in found] == ["e-stop"]
    site.rig.estop_heartbeat = True
    site.wait(0.3)
    assert not [line for line in site.checks() if line.status == "failed"]
    latched = site.rig.transport("button").publisher("/bridge/estop", m.BOOL, LATCHED)
    site.rig.estop_heartbeat = False
    site.each_tick = lambda: latched.write(m.boolean(True))
    assert next(line for line in site.checks() if line.status == "failed").found == "it is pressed"


def test_processes_that_run_something_else(site: Site) -> None:
    site.said["bundle"] = "/another/bundle"
    line = only(site.checks())
    assert (line.name, line.found, line.wanted) == ("policy process", "it runs /another/bundle", BUNDLE)
    assert only(site.checks(policy={})).found == "no word from the policy process"
    other = {**site.facts().safety, "profile": "0123"}
    site.said["bundle"] = BUNDLE
    assert "it runs profile 0123" in only(site.checks(safety=other)).found


def test_a_second_safety_process(site: Site) -> None:
    site.rig.transport("safety").publisher(site.rig.profile.topics.command, m.JOINT_TRAJECTORY, COMMAND)
    line = only(site.checks())
    assert "a second safety process publishes" in line.found
