"""What is on the ROS 2 graph, and what is wrong with it, in plain words. Listens only.

`examine` looks for a few seconds; `diagnose` is a pure function of what was seen.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.graph_survey import WATCH, Stream, Survey, publishers, read_joints, subscriptions
from embodied.robot_bridge.interfaces import typestore
from embodied.robot_bridge.node import now_ns
from embodied.robot_bridge.preflight_facts import command_topics, image_type, joint_topics
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import incompatibility
from embodied.robot_bridge.transport import Graph

DISCOVER = 1.0  # what announcing oneself and hearing of the others takes [s]
SKEW, OLD = 0.1, 1.0  # stamps further in the future, and older on arrival, are wrong [s]
_COMMAND_TYPES = (messages.JOINT_TRAJECTORY, messages.FLOAT_ARRAY, messages.JOINT_JOG, messages.TWIST_STAMPED)


@dataclasses.dataclass(frozen=True)
class Finding:
    """`wrong` needs mending before a robot is run; a `note` may be meant."""

    level: str
    about: str
    text: str
    advice: str


@dataclasses.dataclass(frozen=True)
class TopicReport:
    """One topic. Times in ms; None where nothing came, or where the type has no stamp."""

    topic: str
    message_type: str
    publishers: tuple[str, ...]
    subscriptions: tuple[str, ...]
    count: int
    rate_hz: float | None
    age_ms: float | None
    longest_gap_ms: float | None
    size_bytes: int | None
    kilobytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Examination:
    """What `examine` saw: the graph without the doctor itself, and the samples of every topic of a known type."""

    graph: Graph
    streams: Mapping[str, Stream]
    seconds: float
    profile: Profile | None

    def topics(self) -> list[TopicReport]:
        """Every topic, by name."""
        names = sorted({end.topic for end in self.graph.endpoints})
        return [self._report(name) for name in names]

    def _report(self, topic: str) -> TopicReport:
        offers, requests = publishers(self.graph, topic), subscriptions(self.graph, topic)
        stream = self.streams.get(topic)
        came = stream is not None and stream.count > 0
        timed = stream is not None and stream.count > 1
        stamped = came and bool(np.isfinite(stream.age).any())  # type: ignore[union-attr]
        return TopicReport(
            topic,
            (offers or requests)[0].message_type,
            tuple(end.node for end in offers),
            tuple(end.node for end in requests),
            stream.count if stream else 0,
            stream.rate_hz if stream and timed else None,
            1000 * float(np.nanmedian(stream.age)) if stream and stamped else None,
            1000 * stream.longest_gap if stream and timed else None,
            int(np.median(stream.size)) if stream and came else None,
            stream.bytes_per_second / 1000 if stream else 0.0,
        )


def examine(
    transport: Any,
    profile: Profile | None = None,
    seconds: float = 3.0,
    wait: Callable[[float], None] = time.sleep,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    stamp: Callable[[], int] = now_ns,
) -> Examination:
    """Listen to every topic whose type is known, on a transport of the doctor's own.

    Args:
        wait: lets so many seconds pass.
        clock_ns: the clock of the transport's arrival times [ns].
        stamp: ROS time [ns].
    """
    wait(DISCOVER)
    before, known = transport.graph(), typestore().fielddefs
    topics = {}
    for end in before.endpoints:
        offers = publishers(before, end.topic)
        if offers and offers[0].message_type in known:
            latched = all(offer.qos.latched for offer in offers)  # what was sent before we came is of interest
            qos = dataclasses.replace(WATCH, latched=latched, reliable=all(offer.qos.reliable for offer in offers))
            topics[end.topic] = (offers[0].message_type, qos)
    survey = Survey(transport, topics, clock_ns, stamp)
    wait(seconds)
    streams, graph = survey.read(), transport.graph()
    own = f"{transport.namespace.rstrip('/')}/{transport.node}"
    ends = tuple(end for end in graph.endpoints if end.node != own)
    return Examination(
        Graph(tuple(name for name in graph.nodes if name != own), ends, graph.services), streams, seconds, profile
    )


def diagnose(seen: Examination) -> list[Finding]:
    """Everything that is wrong or worth a word; what is wrong comes first."""
    parts = (_nodes, _pairs, _hashes, _commanders, _silence, _clocks, _joints, _gaps, _profile)
    found = [finding for part in parts for finding in part(seen)]
    return sorted(found, key=lambda finding: finding.level != "wrong")


def _nodes(seen: Examination) -> Iterator[Finding]:
    if not seen.graph.endpoints:
        text = "nobody is there"
        advice = "check the domain (ROS_DOMAIN_ID, --domain); other hosts are seen with --discovery subnet"
        yield Finding("wrong", "graph", text, advice)
    for name, same in itertools.groupby(sorted(seen.graph.nodes)):
        if (count := len(list(same))) > 1:
            advice = "end the one that was left over: both answer to the same name"
            yield Finding("wrong", name, f"{count} nodes have this name", advice)


def _pairs(seen: Examination) -> Iterator[Finding]:
    """Publishers and subscriptions that will never exchange a message; DDS says nothing about it."""
    for topic in sorted({end.topic for end in seen.graph.endpoints}):
        for offer, request in itertools.product(publishers(seen.graph, topic), subscriptions(seen.graph, topic)):
            names = f"{_name(offer.node)} and {_name(request.node)}"
            if offer.message_type != request.message_type:
                text = f"{names} disagree on the type: {offer.message_type} and {request.message_type}"
                yield Finding("wrong", topic, text, "rename one of the topics")
            elif reason := incompatibility(offer.qos, request.qos):
                text = f"{names} exchange nothing: {reason}"
                yield Finding("wrong", topic, text, "give both the same reliability and durability")


def _hashes(seen: Examination) -> Iterator[Finding]:
    known = typestore().fielddefs
    for topic in sorted({end.topic for end in seen.graph.endpoints}):
        ends = [end for end in seen.graph.endpoints if end.topic == topic and end.type_hash]
        for kind in sorted({end.message_type for end in ends}):
            by_hash: dict[str, set[str]] = {}
            for end in ends:
                if end.message_type == kind:
                    by_hash.setdefault(end.type_hash, set()).add(_name(end.node))
            mine = messages.type_hash(kind) if kind in known else ""
            if len(by_hash) > 1 or (mine and set(by_hash) != {mine}):
                who = "; ".join(f"{', '.join(sorted(nodes))}: {text[:15]}..." for text, nodes in by_hash.items())
                text = f"definitions of {kind} differ ({who}{'; ours: ' + mine[:15] + '...' if mine else ''})"
                advice = "build every node against the same version of the message package"
                yield Finding("wrong", topic, text, advice)


def _commanders(seen: Examination) -> Iterator[Finding]:
    commands = set(command_topics(seen.profile)) if seen.profile else set()
    for topic in sorted({end.topic for end in seen.graph.endpoints if not end.topic.startswith("/bridge/")}):
        offers = publishers(seen.graph, topic)
        is_command = topic in commands or (not seen.profile and offers and offers[0].message_type in _COMMAND_TYPES)
        if is_command and len(offers) > 1:
            text = f"{len(offers)} publishers command the robot: {', '.join(_name(end.node) for end in offers)}"
            yield Finding("wrong", topic, text, "end all but one")


def _silence(seen: Examination) -> Iterator[Finding]:
    for report in seen.topics():
        if report.topic.startswith(("/bridge/", "/sim/")) or report.topic in ("/rosout", "/parameter_events"):
            continue
        listened = report.topic in seen.streams
        if report.subscriptions and not report.publishers:
            who = ", ".join(map(_name, report.subscriptions))
            yield Finding("note", report.topic, f"{who} listens, nobody publishes", "start the publisher, if it is due")
        elif listened and not report.count and report.message_type not in _COMMAND_TYPES:
            text = f"nothing came in {seen.seconds:g} s, though {', '.join(map(_name, report.publishers))} publishes it"
            yield Finding("note", report.topic, text, "is the device behind it running?")


def _clocks(seen: Examination) -> Iterator[Finding]:
    clock = seen.streams.get(seen.profile.topics.clock if seen.profile else "/clock")
    sim_now = float(clock.stamp[-1]) if clock is not None and clock.count else None
    if clock is not None and clock.count > 1 and clock.stamp[-1] <= clock.stamp[0]:
        yield Finding("wrong", "/clock", "it stands still", "unpause the simulator; nodes with use_sim_time wait")
    for topic, stream in sorted(seen.streams.items()):
        if not np.isfinite(stream.age).any() or stream.message_type == messages.CLOCK:
            continue
        if not float(stream.stamp[-1]):
            yield Finding("note", topic, "its stamps are 0", "a node with use_sim_time that hears no /clock yet?")
            continue
        if any(end.qos.latched for end in publishers(seen.graph, topic)):
            continue
        age = float(np.nanmedian(stream.age))
        if sim_now is not None and abs(float(stream.stamp[-1]) - sim_now) < OLD < abs(age):
            continue  # stamped with simulation time, and right by it
        who = ", ".join(_name(end.node) for end in publishers(seen.graph, topic))
        if age < -SKEW:
            text = f"stamps of {who} lie {-age:.3f} s in the future"
            yield Finding("wrong", topic, text, "synchronise the clocks of both computers (chrony)")
        elif age > OLD:
            text = f"stamps of {who} are {age:.1f} s old on arrival"
            advice = "synchronise the clocks (chrony); or is it simulation time without a /clock?"
            yield Finding("wrong", topic, text, advice)


def _joints(seen: Examination) -> Iterator[Finding]:
    for topic, stream in sorted(seen.streams.items()):
        if stream.message_type != messages.JOINT_STATE or not stream.count:
            continue
        joints = read_joints([stream])
        if joints.malformed:
            yield Finding("wrong", topic, joints.malformed, "mend the driver")
        bad = [name for name, value in joints.position.items() if not np.isfinite(value)]
        if bad:
            text = f"position of {', '.join(bad)} is not a number"
            yield Finding("wrong", topic, text, "is the joint's hardware interface active?")


def _gaps(seen: Examination) -> Iterator[Finding]:
    for report in seen.topics():
        if report.rate_hz and report.longest_gap_ms and report.count > 10 and report.rate_hz > 5:
            period = 1000 / report.rate_hz
            if report.longest_gap_ms > max(10 * period, 100.0):
                text = f"{report.rate_hz:.0f} Hz, but once silent for {report.longest_gap_ms:.0f} ms"
                yield Finding("note", report.topic, text, "look for load, Wi-Fi or a slow disk")


def _profile(seen: Examination) -> Iterator[Finding]:
    """What the profile's robot should show."""
    profile = seen.profile
    if profile is None:
        return
    wanted = {topic: messages.JOINT_STATE for topic in joint_topics(profile)}
    wanted |= {topic: image_type(topic) for topic in profile.topics.cameras.values()}
    for topic, kind in wanted.items():
        stream = seen.streams.get(topic)
        if stream is None or not stream.count:
            advice = "start its driver; check the name in the profile"
            yield Finding("wrong", topic, f"profile {profile.name} needs it, and nothing came", advice)
        elif stream.message_type != kind:
            text = f"it carries {stream.message_type}; profile {profile.name} expects {kind}"
            yield Finding("wrong", topic, text, "name another topic in the profile")
    streams = [seen.streams[topic] for topic in joint_topics(profile) if topic in seen.streams]
    if any(stream.count for stream in streams):
        joints = read_joints(streams)
        missing = [name for name in profile.all_joints if name not in joints.position]
        if missing:
            text = f"no {', '.join(missing)}; it has {', '.join(joints.position)}"
            yield Finding("wrong", profile.topics.joint_states, text, "write the robot's joint names into the profile")
    for topic, whose in command_topics(profile).items():
        if not [end for end in subscriptions(seen.graph, topic) if end.node != "/safety"]:
            text = f"nobody listens to the {whose}'s commands"
            advice = "activate the controller ('ros2 control list_controllers')"
            yield Finding("wrong", topic, text, advice)


def _name(node: str) -> str:
    return node or "(a node without a name)"


def as_text(seen: Examination, findings: Sequence[Finding]) -> str:
    """Nodes, a table of topics, then what is wrong and what to do."""
    lines = [f"{len(seen.graph.nodes)} nodes: {', '.join(seen.graph.nodes) or '(none)'}", ""]
    reports = seen.topics()
    width = max((len(report.topic) for report in reports), default=5)
    kind_width = max((len(report.message_type) for report in reports), default=4)
    head = f"{'topic':{width}s}  {'type':{kind_width}s}  pub sub      Hz  age ms  gap ms    bytes     kB/s"
    lines += [head] if reports else []
    for r in reports:
        cells = [_cell(r.rate_hz, 8), _cell(r.age_ms, 8), _cell(r.longest_gap_ms, 8), _cell(r.size_bytes, 9)]
        counts = f"{len(r.publishers):3d} {len(r.subscriptions):3d}"
        row = f"{r.topic:{width}s}  {r.message_type:{kind_width}s}  {counts}{''.join(cells)}"
        lines.append(f"{row}{r.kilobytes_per_second:9.1f}")
    wrong = [finding for finding in findings if finding.level == "wrong"]
    notes = [finding for finding in findings if finding.level != "wrong"]
    for title, group in (("wrong", wrong), ("worth a look", notes)):
        if group:
            lines += ["", f"{title}:"]
            lines += [f"  {f.about}: {f.text}\n    do: {f.advice}" for f in group]
    lines += ["", f"{len(wrong)} things are wrong." if wrong else "Nothing is wrong."]
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{0 if abs(value) >= 100 else 1}f}"
