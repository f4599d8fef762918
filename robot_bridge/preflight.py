"""Compares a bundle and a profile with the live graph before anything moves; a failed check refuses.

`preflight_facts.collect` listens for a second or two and sends nothing; `check` is a pure function of what it found;
`table` says it in words. The safety process checks again what can change later: the pose, a second publisher, a silent
deadman. This is software, not a rated safety function.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import BundleError, InputError, SafetyError
from embodied.robot_bridge import messages
from embodied.robot_bridge.graph_survey import publishers, subscriptions
from embodied.robot_bridge.policy_node import check_fits
from embodied.robot_bridge.preflight_facts import Facts, command_topics
from embodied.robot_bridge.qos import incompatibility
from embodied.robot_bridge.safety_node import ESTOP_TOPIC

FAR, FARTHER = 4.0, 8.0  # standard deviations from the training data's mean: warned of, refused
OWN_NODES = ("/safety", "/policy", "/recorder", "/operator", "/preflight")


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table. `status` is `ok`, `warning` or `failed`; `wanted` and `advice` are empty when ok."""

    name: str
    status: str
    found: str
    wanted: str = ""
    advice: str = ""


# ---- bundle against profile and limits


def _bundle(facts: Facts) -> Iterator[Check]:
    contract, profile = facts.contract, facts.profile
    like_policy = types.SimpleNamespace(
        action_spec=contract.action, observation_spec=contract.observations, image_spec=contract.images
    )
    wanted = f"joints {', '.join(profile.all_joints)}"
    name = "bundle"
    try:
        check_fits(like_policy, profile)  # type: ignore[arg-type]
    except BundleError as error:
        text = str(error).replace("\n", " ")
        yield Check(name, "failed", text, wanted, "deploy a bundle of this robot, or the profile of the bundle's robot")
    else:
        if contract.joint_names and tuple(contract.joint_names) != profile.joints:
            found = f"the bundle was trained with joints in the order {', '.join(contract.joint_names)}"
            advice = "list `joints` in the profile in the bundle's order"
            yield Check(name, "failed", found, wanted, advice)
        else:
            rate = 1 / contract.control_dt
            yield Check(name, "ok", f"{len(profile.all_joints)} joints in the profile's order, {rate:g} Hz")
    strange = [key for key, spec in contract.observations.items() if spec.unit and "deg" in spec.unit]
    if "deg" in contract.action.unit or strange:
        found = f"the bundle speaks degrees ({', '.join(strange) or 'action'})"
        yield Check("units", "failed", found, "rad and m, as ROS", "convert the data and train again")
    missing = [key for key in [*contract.observations, *(f"images/{c}" for c in contract.images)]
               if key not in contract.normalizer]  # fmt: skip
    if missing:
        found = f"no statistics for {', '.join(missing)}"
        yield Check("normaliser", "failed", found, "mean and std of every input", "train or export the bundle again")


def _limits(facts: Facts) -> Iterator[Check]:
    limits, contract, profile = facts.limits, facts.contract, facts.profile
    notes = "; ".join(getattr(limits, "notes", ()))
    slow = []
    if len(contract.action.scale) == len(limits.names):
        fastest = np.asarray(contract.action.scale) / contract.control_dt  # (J,)
        slow = [
            f"{name} {wish:.2f} of {limit:.2f}"
            for name, wish, limit in zip(limits.names, fastest, limits.velocity, strict=True)
            if wish > limit * 1.001
        ]
    if slow:
        yield Check(
            "limits",
            "warning",
            f"action 1.0 asks for more speed than the limits give: {', '.join(slow)} rad/s (scale "
            f"{profile.limit_scale:g}){'; ' + notes if notes else ''}",
            "limits above what the actions ask for",
            "expect a slower arm than in training; raise --speed step by step once it is seen to behave",
        )
    else:
        yield Check("limits", "ok", f"scale {profile.limit_scale:g}{'; ' + notes if notes else ''}")
    arm = len(profile.joints)
    if profile.policy.max_lead > limits.max_step[:arm].min() + 1e-9:
        found = f"policy.max_lead {profile.policy.max_lead:g} is above max_step {limits.max_step[:arm].min():g} rad"
        advice = "lower policy.max_lead to what the training data used"
        yield Check("lead", "warning", found, "targets that the step clamp leaves alone", advice)


# ---- what the robot sends


def _joint_states(facts: Facts) -> Iterator[Check]:
    topic, profile = facts.profile.topics.joint_states, facts.profile
    stream, timeout = facts.streams[topic], facts.profile.safety.joint_timeout
    if not stream.count:
        offers = publishers(facts.graph, topic)
        found = f"nothing on {topic} in {stream.duration:.1f} s; {_who(offers) or 'nobody publishes it'}"
        advice = "start the robot's driver and its joint_state_broadcaster; check the domain and the topic's name"
        yield Check("joint states", "failed", found, f"JointState every {timeout:g} s at least", advice)
        return
    joints = facts.joints
    if joints.malformed:
        yield Check("joint states", "failed", joints.malformed, "as many positions as names", "mend the driver")
        return
    missing = [name for name in profile.all_joints if name not in joints.position]
    if missing:
        found = f"{topic} has no {', '.join(missing)}; it has {', '.join(joints.position)}"
        yield Check("joint names", "failed", found, "every joint of the profile", "write the robot's names into it")
    else:
        ours = [[name for name in order if name in profile.all_joints] for order in joints.orders]
        same = ours == [list(profile.all_joints)]
        yield Check("joint names", "ok", "all there" + ("" if same else ", in another order: mapped by name"))
    nan = [name for name in profile.all_joints if not np.isfinite(joints.position.get(name, 0.0))]
    if nan:
        yield Check("joint states", "failed", f"NaN for {', '.join(nan)}", "numbers", "is the joint's driver active?")
    rate = f"{stream.rate_hz:.0f} Hz, longest silence {1000 * stream.longest_gap:.0f} ms"
    wanted = f"a sample every {1000 * timeout:.0f} ms at least (safety.joint_timeout)"
    if stream.rate_hz * timeout < 1:
        yield Check("joint rate", "failed", rate, wanted, "raise the broadcaster's rate, or the timeout with care")
    elif stream.longest_gap > timeout:
        yield Check("joint rate", "warning", rate, wanted, "the safety process would HOLD in such a gap; look for load")
    else:
        yield Check("joint rate", "ok", rate)


def _cameras(facts: Facts) -> Iterator[Check]:
    for camera, spec in facts.contract.images.items():
        topic = facts.profile.topics.cameras.get(camera)
        if topic is None:  # the bundle does not fit; said above
            continue
        height, width = spec.shape[:2]
        stream, name = facts.streams[topic], f"camera {camera}"
        wanted_hz = 1 / facts.contract.control_dt
        wanted = f"{width}x{height} in 8-bit colour at {wanted_hz:g} Hz"
        if not stream.count:
            offers = _who(publishers(facts.graph, topic)) or "nobody publishes it"
            found = f"nothing on {topic} in {stream.duration:.1f} s; {offers}"
            yield Check(name, "failed", found, wanted, "start the camera; check the topic's name in the profile")
            continue
        try:
            read = messages.read_image if stream.message_type == messages.IMAGE else messages.read_compressed_image
            pixels = read(stream.recent[-1])[1]
        except InputError as error:
            yield Check(name, "failed", str(error), wanted, "set the driver's encoding")
            continue
        found = f"{pixels.shape[1]}x{pixels.shape[0]} at {stream.rate_hz:.1f} Hz"
        timeout, age = facts.profile.policy.image_timeout, float(np.nanmedian(stream.age))
        if pixels.shape[:2] != (height, width) and not facts.profile.policy.resize_images:
            advice = "set the camera to the size of the training data, or policy.resize_images: true"
            yield Check(name, "failed", found, wanted, advice)
        elif stream.rate_hz < 0.6 * wanted_hz:
            yield Check(name, "failed", found, wanted, "raise the camera's frame rate")
        elif age > timeout:
            found = f"{found}, {1000 * age:.0f} ms old on arrival"
            wanted = f"{wanted}, at most {1000 * timeout:.0f} ms old (policy.image_timeout)"
            yield Check(name, "failed", found, wanted, "synchronise the clocks (chrony), or shorten the camera's path")
        elif stream.rate_hz < 0.9 * wanted_hz:
            yield Check(name, "warning", found, wanted, "the policy will act less often than in training")
        elif pixels.std() < 1.0:
            yield Check(name, "warning", f"{found}, all of one colour", wanted, "lens cap, exposure, light?")
        else:
            yield Check(name, "ok", found)


def _pose(facts: Facts) -> Iterator[Check]:
    """Where the arm stands: units, limits, the training data's range."""
    profile, limits, joints = facts.profile, facts.limits, facts.joints
    position = np.array([joints.position.get(name, np.nan) for name in limits.names])
    if not np.isfinite(position).all():
        return
    velocity = np.array([joints.velocity.get(name, 0.0) for name in limits.names])
    outside = np.abs(position - limits.clip_position(position))
    worst = int(np.argmax(outside))
    place = f"{limits.names[worst]} stands at {position[worst]:.3f}"
    wanted = f"{limits.low[worst]:.3f} to {limits.high[worst]:.3f} rad or m"
    in_radians = np.deg2rad(position[: len(profile.joints)])
    if outside.max() > 0.01:
        arm = slice(0, len(profile.joints))
        degrees = np.abs(position[arm]).max() > 2 * np.pi and (
            (in_radians >= limits.low[arm] - 0.1) & (in_radians <= limits.high[arm] + 0.1)
        ).all()  # fmt: skip
        if degrees:
            yield Check("units", "failed", f"{place}: these look like degrees", "rad", "let the driver send radians")
        else:
            yield Check("initial pose", "failed", place, wanted, "move the arm inside its limits by its own means")
        return
    fastest = int(np.argmax(np.abs(velocity)))
    if np.abs(velocity[fastest]) > profile.safety.arm_max_velocity:
        found = f"{limits.names[fastest]} moves at {velocity[fastest]:.3f} rad/s"
        yield Check("initial pose", "warning", found, "an arm at rest", "arming will be refused until it stands still")
    else:
        yield Check("initial pose", "ok", "inside the limits, at rest")
    yield from _training_range(facts, position, velocity)


def _training_range(facts: Facts, position: np.ndarray, velocity: np.ndarray) -> Iterator[Check]:
    arm = len(facts.profile.joints)
    live = {
        "joint_position": (position[:arm], facts.profile.joints),
        "joint_velocity": (velocity[:arm], facts.profile.joints),
        "gripper_position": (position[arm:], facts.limits.names[arm:]),
        "joint_target": (position, facts.limits.names),
    }
    farthest = (0.0, "")
    for key in facts.contract.observations:
        statistics = facts.contract.normalizer.get(key)
        if statistics is None or key not in live or len(live[key][0]) != statistics["mean"].size:
            continue
        value, names = live[key]
        far = np.abs(value - statistics["mean"].ravel()) / statistics["std"].ravel()
        k = int(np.argmax(far))
        text = f"{key} of {names[k]} is {value[k]:.3f}, {far[k]:.1f} standard deviations from the training data"
        farthest = max(farthest, (float(far[k]), text))
    distance, text = farthest
    advice = "move the arm to where the episodes of the training data start"
    wanted = f"within {FAR:g} standard deviations"
    if distance > FARTHER:
        yield Check("normaliser", "failed", text, wanted, advice)
    elif distance > FAR:
        yield Check("normaliser", "warning", text, wanted, advice)
    elif text:
        yield Check("normaliser", "ok", f"live values within {distance:.1f} standard deviations of the training data")


# ---- the graph


def _commands(facts: Facts) -> Iterator[Check]:
    for topic, whose in command_topics(facts.profile).items():
        name = f"{whose} command"
        rivals = [end for end in publishers(facts.graph, topic) if end.node != "/safety"]
        own = [end for end in publishers(facts.graph, topic) if end.node == "/safety"]
        listeners = [end for end in subscriptions(facts.graph, topic) if end.node not in OWN_NODES]
        if rivals or len(own) > 1:
            found = f"{_who(rivals) or 'a second safety process publishes'} on {topic}"
            yield Check(name, "failed", found, "the safety process alone", "end the other one first")
        elif not listeners:
            advice = "activate the controller ('ros2 control list_controllers'); check the topic's name in the profile"
            yield Check(name, "failed", f"nobody subscribes to {topic}", "the robot's controller", advice)
        else:
            yield Check(name, "ok", f"{', '.join(sorted({end.node for end in listeners}))} listens on {topic}")


def _qos(facts: Facts) -> Iterator[Check]:
    profile = facts.profile
    topics = {profile.topics.joint_states, *profile.topics.cameras.values(), *command_topics(profile)}
    topics |= {end.topic for end in facts.graph.endpoints if end.topic.startswith("/bridge/")}
    bad = False
    for topic in sorted(topics):
        for offer in publishers(facts.graph, topic):
            for request in subscriptions(facts.graph, topic):
                ours = {offer.node, request.node} & {"/safety", "/policy"}
                if offer.message_type != request.message_type:
                    found = f"{offer.node} sends {offer.message_type}, {request.node} wants {request.message_type}"
                    advice = "give the topic in the profile that has the wanted type"
                elif incompatibility(offer.qos, request.qos):
                    found = (
                        f"{offer.node} offers {offer.qos.describe()}; {request.node} requests {request.qos.describe()}"
                    )
                    advice = "change the reliability or durability of one of the two: they exchange nothing"
                else:
                    continue
                bad = True
                yield Check(f"QoS {topic}", "failed" if ours else "warning", found, "a matching pair", advice)
    if not bad:
        yield Check("QoS", "ok", f"every pair on {len(topics)} topics matches")


def _clock(facts: Facts) -> Iterator[Check]:
    profile = facts.profile
    clock, joints = facts.streams[profile.topics.clock], facts.streams[profile.topics.joint_states]
    if facts.sim_time:
        moving = clock.count > 1 and float(clock.stamp[-1]) > float(clock.stamp[0])
        if not moving:
            found = "it stands still" if clock.count else "nothing came"
            advice = "start or unpause the simulator, or leave --use-sim-time out"
            yield Check("clock", "failed", f"{profile.topics.clock}: {found}", "a running simulation clock", advice)
            return
    if not joints.count:
        return
    age = float(np.nanmedian(joints.age))
    found = f"joint states arrive {1000 * age:.0f} ms after their stamps"
    ahead, behind = profile.safety.clock_skew_max, max(profile.policy.joint_timeout, profile.policy.image_timeout)
    wanted = f"{-1000 * ahead:.0f} to {1000 * behind:.0f} ms"
    if -ahead <= age <= behind:
        yield Check("clock", "ok", f"{found}{' (simulation time)' if facts.sim_time else ''}")
    elif clock.count and not facts.sim_time:
        yield Check("clock", "failed", f"{found}, and {profile.topics.clock} is published", wanted, "--use-sim-time")
    else:
        yield Check("clock", "failed", found, wanted, "synchronise the clocks of both computers (chrony)")


# ---- people and processes


def _operator(facts: Facts) -> Iterator[Check]:
    safety = facts.profile.safety
    for name, topic, required, timeout in (
        ("deadman", facts.profile.topics.deadman, safety.deadman_required, safety.deadman_timeout),
        ("e-stop", ESTOP_TOPIC, safety.estop_required, safety.estop_timeout),
    ):
        stream = facts.streams[topic]
        wanted = f"a message every {timeout:g} s on {topic}"
        if stream.count and name == "e-stop" and messages.read_bool(stream.recent[-1]):
            yield Check(name, "failed", "it is pressed", "released", "release it, then send 'reset' on /bridge/mode")
        elif required and (not stream.count or stream.longest_gap > timeout):
            found = f"silent for {stream.longest_gap:.2f} s" if stream.count else "nobody sends it"
            yield Check(name, "failed", found, wanted, f"start the node that reads the {name} switch")
        elif stream.count:
            yield Check(name, "ok", f"{stream.rate_hz:.0f} Hz")
        elif not facts.simulated and name == "deadman":
            advice = "set safety.deadman_required: true, and keep a hand on the physical stop"
            yield Check(name, "warning", "not asked for, on a robot that is no simulation of ours", wanted, advice)
        else:
            yield Check(name, "ok", "not asked for by the profile")


def _processes(facts: Facts) -> Iterator[Check]:
    mine = facts.profile.fingerprint
    for name, said in (("safety", facts.safety), ("policy", facts.policy)):
        process = f"{name} process"
        if not said:
            found = f"no word from the {name} process"
            yield Check(process, "failed", found, "running", f"start embodied.robot_bridge.{name}_node; see its log")
        elif said.get("profile") != mine:
            found = f"it runs profile {said.get('profile')}, this command {mine}"
            yield Check(process, "failed", found, "one profile", "restart it with the same profile and --speed")
        elif name == "policy" and facts.bundle and said.get("bundle") != facts.bundle:
            found = f"it runs {said.get('bundle')}"
            yield Check(process, "failed", found, facts.bundle, "restart it with this bundle")
        elif name == "safety" and said.get("state") == "ESTOP":
            yield Check(process, "warning", f"ESTOP: {said.get('reason')}", "INACTIVE", "release the e-stop, reset")
        else:
            yield Check(process, "ok", f"{said.get('state', 'ready')}, profile {mine}")


CHECKS: tuple[Callable[[Facts], Iterator[Check]], ...] = (
    _bundle,
    _joint_states,
    _cameras,
    _pose,
    _limits,
    _commands,
    _qos,
    _clock,
    _operator,
    _processes,
)


def check(facts: Facts) -> list[Check]:
    """Every check, in the order in which a person would set things right."""
    return [line for part in CHECKS for line in part(facts)]


def table(checks: Sequence[Check]) -> str:
    """The checks in words, one line each; what is wrong gets two more: what is wanted, and what to do."""
    width = max((len(line.name) for line in checks), default=0)
    rows = []
    for line in checks:
        status = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}[line.status]
        rows.append(f"{status}  {line.name:{width}s}  {line.found}")
        if line.status != "ok":
            rows.append(f"{'':9s}{'':{width}s}  wanted: {line.wanted}")
            rows.append(f"{'':9s}{'':{width}s}  do: {line.advice}")
    return "\n".join(rows)


def refuse(checks: Sequence[Check]) -> None:
    """SafetyError with the table if a check failed."""
    failed = [line.name for line in checks if line.status == "failed"]
    if failed:
        raise SafetyError(f"Nothing was commanded: preflight failed in {', '.join(failed)}.\n{table(checks)}")


def _who(endpoints: Sequence[Any]) -> str:
    nodes = sorted({end.node or "(an unnamed node)" for end in endpoints})
    return f"{', '.join(nodes)} publishes it" if nodes else ""
