"""What preflight looks at: bundle, profile, graph, and what passed on the topics while it listened. Sends nothing."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from embodied.contracts.errors import InputError
from embodied.policies.bundle import PolicyContract
from embodied.robot_bridge import messages
from embodied.robot_bridge.graph_survey import WATCH, Joints, Stream, Survey, read_joints
from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.node import EVENT_TOPIC, now_ns
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import EVENTS, LATCHED
from embodied.robot_bridge.safety_node import ESTOP_TOPIC, STATE_TOPIC
from embodied.robot_bridge.transport import Graph

LISTEN = 1.5  # [s]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the checks look at.

    Attributes:
        graph: nodes and endpoints (`transport.graph()`).
        streams: topic -> what arrived on it while listening.
        safety: the safety process's last state, by name; empty if it said nothing.
        policy: the policy process's `policy_ready` event; empty if it said nothing.
        bundle: the folder that should run.
        simulated: the robot is a simulation that this command started.
        sim_time: time comes from /clock.
    """

    profile: Profile
    limits: Limits
    contract: PolicyContract
    graph: Graph
    streams: Mapping[str, Stream]
    safety: Mapping[str, str]
    policy: Mapping[str, Any]
    bundle: str
    simulated: bool
    sim_time: bool

    @property
    def joints(self) -> Joints:
        """What the last joint states say, arm and gripper together."""
        return read_joints([self.streams[topic] for topic in joint_topics(self.profile)])


def joint_topics(profile: Profile) -> tuple[str, ...]:
    """The arm's joint states, and the gripper's where they come on a topic of their own."""
    gripper = profile.gripper.joint_states if profile.gripper else ""
    return tuple(dict.fromkeys(topic for topic in (profile.topics.joint_states, gripper) if topic))


def image_type(topic: str) -> str:
    """The message type of a camera's topic, by its name."""
    return messages.COMPRESSED_IMAGE if topic.endswith("/compressed") else messages.IMAGE


def command_topics(profile: Profile) -> dict[str, str]:
    """What the safety process commands the robot on: topic -> whose."""
    gripper = profile.gripper
    found = {profile.topics.command: "arm"}
    if gripper and gripper.adapter == "forward_position":
        found[gripper.topic] = "gripper"
    return found


def collect(
    profile: Profile,
    contract: PolicyContract,
    transport: Any,
    *,
    bundle: str = "",
    simulated: bool = False,
    sim_time: bool = False,
    seconds: float = LISTEN,
    wait: Callable[[float], None] = time.sleep,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    stamp: Callable[[], int] = now_ns,
) -> Facts:
    """Listen on `transport` (a node of its own, closed by the caller) for `seconds`.

    Args:
        wait: lets so many seconds pass.
        clock_ns: the clock of the transport's arrival times [ns].
        stamp: ROS time [ns].
    """
    safety: dict[str, str] = {}
    policy: dict[str, Any] = {}

    def on_event(data: bytes, _: int) -> None:
        try:
            event = messages.read_json(data)
        except InputError:
            return
        if event.get("event") == "policy_ready":
            policy.clear()
            policy.update(event)

    def on_state(data: bytes, _: int) -> None:
        safety.update(messages.read_diagnostics(data))

    transport.subscriber(EVENT_TOPIC, messages.STRING, EVENTS, on_event)
    transport.subscriber(STATE_TOPIC, messages.DIAGNOSTIC_ARRAY, LATCHED, on_state)
    topics = {profile.topics.clock: messages.CLOCK, ESTOP_TOPIC: messages.BOOL}
    topics[profile.topics.deadman] = messages.BOOL if profile.safety.deadman_button < 0 else messages.JOY
    topics |= {topic: messages.JOINT_STATE for topic in joint_topics(profile)}
    for camera in contract.images:
        if camera in profile.topics.cameras:
            topics[profile.topics.cameras[camera]] = image_type(profile.topics.cameras[camera])
    survey = Survey(transport, {topic: (kind, WATCH) for topic, kind in topics.items()}, clock_ns, stamp)
    wait(seconds)
    streams, graph = survey.read(), transport.graph()
    return Facts(
        profile,
        profile.read_limits(),
        contract,
        graph,
        streams,
        dict(safety),
        dict(policy),
        bundle,
        simulated,
        sim_time,
    )
