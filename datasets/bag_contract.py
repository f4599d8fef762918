"""Bags recorded by `embodied deploy`: one per episode, what the robot saw and what it was told.

The clock is the policy's: one row per /bridge/chunk, at the stamp of the observation that the chunk answers. Each row
takes from every topic the last sample not after that stamp, as the policy did. Bags without chunks get a grid of the
control period that starts half a period before the first command.

The action of a row is what was executed, not what the policy asked for: the last target in /bridge/command on behalf of
its chunk minus the one before that chunk took over, divided by the action's scale and clipped to [-1, 1]. A gripper's
action is its direction, as in `sim`: positive closes; where it does not move, it is the sign that keeps it there.

What the numbers mean (joint names, order, scale, control period) comes from the policy's `contract.json`, which the
recorder puts into the bag as the metadata record `embodied_contract` or as an event with a field `contract`. Option
`contract=FILE` supplies it for other bags. Events that are read: any with `success`, `instruction` or `terminated`; an
`episode_start` and an `episode_end` bound the episode.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.bag import STRING, Bag, Series, closed, scan
from embodied.datasets.bag_files import Recording
from embodied.datasets.bag_images import frames, picture
from embodied.datasets.bag_items import Message, Metadata
from embodied.datasets.bag_types import message_type
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.source import Source

CHUNK, COMMAND, POSE_PREFIX = "/bridge/chunk", "/bridge/command", "/sim/pose/"
MEASURED = ("joint_position", "joint_velocity", "gripper_position")
MAX_ROWS = 5_000_000  # of an episode; more is a damaged stamp
MAX_GAP = 1.5  # control periods between two rows; a longer silence is not a step
MAX_AGE_S = 0.3  # a row whose newest sample of some topic is older [s] is not a step


@dataclasses.dataclass(frozen=True)
class Contract:
    """The part of a policy's contract that a bag needs."""

    observations: dict[str, ArraySpec]
    images: dict[str, ArraySpec]
    action: ActionSpec
    control_dt: float
    environment: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Contract":
        try:
            action = ActionSpec.from_json(data["action"])
            assert isinstance(action, ActionSpec)
            joints = tuple(data.get("joint_names", ())) or action.names
            contract = cls(
                {
                    i["key"]: _named(i["key"], ArraySpec.from_json(i["spec"]), action, joints)
                    for i in data["observations"]
                },
                {item["camera"]: ArraySpec.from_json(item["spec"]) for item in data["images"]},
                action,
                float(data["control_dt"]),
                str(data.get("environment", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: the policy's contract cannot be read: {error!r}.") from error
        if action.control_mode != "joint_position_delta" or not action.names or len(action.scale) != len(action.names):
            raise InputError(f"{where}: actions are '{action.control_mode}'; bags of 'joint_position_delta' are read.")
        return contract


def _named(key: str, spec: ArraySpec, action: ActionSpec, joints: tuple[str, ...]) -> ArraySpec:
    """The spec with joint names: a contract may leave them out where they are the action's, in its order."""
    if spec.names or not spec.shape:
        return spec
    others = tuple(name for name in action.names if name not in joints)
    names = {
        "joint_position": joints,
        "joint_velocity": joints,
        "gripper_position": others,
        "joint_target": action.names,
    }
    found = names.get(key, ())
    return dataclasses.replace(spec, names=found) if len(found) == spec.shape[0] else spec


def contract_source(recordings: Sequence[Recording], contract: Contract) -> Source:
    """Every recording as an episode; the cameras and poses are those of the first that can be read.

    Raises:
        InputError: joint states, commands or a camera are missing.
    """
    first, bag = _first_bag(recordings)
    cameras = _cameras(bag, contract)
    poses = {topic: f"{topic.removeprefix(POSE_PREFIX)}_position" for topic in bag.poses if POSE_PREFIX in topic}
    shapes = {topic: _shape(bag, topic) for topic in cameras}
    spec = DatasetSpec(
        observations=dict(contract.observations)
        | {key: ArraySpec((3,), unit="m", names=("x", "y", "z"), privileged=True) for key in poses.values()},
        images={name: ArraySpec(shapes[topic], "uint8") for topic, name in cameras.items()},
        action=contract.action,
        control_dt=contract.control_dt,
        environment=contract.environment,
    )
    attributes = {
        "cameras": {name: topic for topic, name in cameras.items()},
        "timestamps": "observation stamps of the policy's chunks",
        "max_age_s": MAX_AGE_S,
    }

    def load(index: int) -> Episode:
        return _episode(bag if index == first else scan(recordings[index]), spec, cameras, poses)

    findings = [finding for recording in recordings for finding in recording.findings]
    findings += [_cut(recording, index) for index, recording in enumerate(recordings) if not closed(recording)]
    return Source(spec, len(recordings), load, attributes, tuple(findings))


def _first_bag(recordings: Sequence[Recording]) -> tuple[int, Bag]:
    failed: list[InputError] = []
    for index, recording in enumerate(recordings):
        try:
            return index, scan(recording)
        except InputError as error:
            failed.append(error)
    raise failed[0]


def _shape(bag: Bag, topic: str) -> tuple[int, int, int]:
    first = bag.first_pictures[topic]
    try:
        height, width, _ = picture(first.topic, first.data).shape
    except InputError as error:
        raise InputError(f"{bag.path}: {topic}: {error}.") from error
    return height, width, 3


def _cut(recording: Recording, index: int) -> Finding:
    message = f"{recording.name} ends in the middle: its recorder was killed"
    return Finding("bag-damaged", "warning", message, "What came before is imported.", index)


def _episode(bag: Bag, spec: DatasetSpec, cameras: dict[str, str], poses: dict[str, str]) -> Episode:
    assert spec.action is not None
    where = bag.path.name
    events = [event for series in bag.events.values() for event in series.values]
    commands = _topic(bag.trajectories, COMMAND, where, "no actions: nothing was commanded")
    clock = _clock(bag, commands, spec.control_dt)
    joints = _joint_series(bag, spec)
    series = [joints, *(_topic(bag.images, topic, where, "no images") for topic in cameras)]
    series += [_topic(bag.poses, topic, where, "no poses") for topic in poses]
    stamps, has_final = _rows(clock.stamps, series, len(cameras), spec.control_dt)
    steps = len(stamps) - has_final
    skipped = len(clock.stamps) - steps
    picked = [np.array([s.last_not_after(stamp) for stamp in stamps]) for s in series]
    targets = _targets(clock, commands, joints, spec.action)[skipped:]  # (steps + 1, A): before row 0, after each row

    action = np.zeros((len(stamps), len(spec.action.names)), np.float32)
    action[:steps] = _actions(targets, spec)
    fresh = (
        np.stack([stamps - s.stamp_ns[rows] for s, rows in zip(series, picked, strict=True)]).max(0) < MAX_AGE_S * 1e9
    )
    step_valid = np.zeros(len(stamps), bool)
    step_valid[:-1] = fresh[:-1] & (np.diff(stamps) < MAX_GAP * spec.control_dt * 1e9)
    ends = np.zeros((2, len(stamps)), bool)
    terminated = any(event.get("terminated") is True for event in events)
    ends[0 if terminated else 1, steps - 1] = True
    step_valid[steps - 1] |= terminated
    observations = _observations(joints, picked[0], targets, spec)
    observations |= {
        key: np.stack([bag.poses[topic].values[row] for row in rows])
        for (topic, key), rows in zip(poses.items(), picked[1 + len(cameras) :], strict=True)
    }
    wanted = dict(zip(cameras, picked[1 : 1 + len(cameras)], strict=True))
    success = [event["success"] for event in events if isinstance(event.get("success"), bool)]
    return Episode(
        observations={key: observations[key].astype(np.float32) for key in spec.observations},
        images={
            cameras[topic]: frames(
                bag.recording, bag.first_pictures[topic].topic, rows, spec.images[cameras[topic]].shape, None
            )
            for topic, rows in wanted.items()
        },
        action=action,
        step_valid=step_valid,
        terminated=ends[0],
        truncated=ends[1],
        timestamp=(stamps - stamps[0]) * 1e-9,
        instruction=next((str(e["instruction"]) for e in events if e.get("instruction")), ""),
        success=success[-1] if success else None,
        source_id=where,
    )


@dataclasses.dataclass(frozen=True)
class _Clock:
    """Rows of an episode: stamp of the observation [ns], and when the command that answers it could start [ns, log]."""

    stamps: np.ndarray
    starts: np.ndarray
    frames: list[str]


def _clock(bag: Bag, commands: Series, control_dt: float) -> _Clock:
    begin, end = _bounds(bag)
    chunks = bag.trajectories.get(CHUNK)
    if chunks is not None:
        inside = np.flatnonzero((chunks.log_ns >= begin) & (chunks.log_ns <= end))
        # A chunk sent anew for the same observation is not a new step: the last one counts.
        inside = inside[np.append(np.diff(chunks.stamp_ns[inside]) > 0, True)[: len(inside)]]
        clock = _Clock(chunks.stamp_ns[inside], chunks.log_ns[inside], [chunks.values[i][0] for i in inside])
    else:
        period = round(control_dt * 1e9)
        sent = commands.log_ns[(commands.log_ns >= begin) & (commands.log_ns <= end)]
        if len(sent) and (sent[-1] - sent[0]) // max(1, period) > MAX_ROWS:
            raise InputError(f"Episode '{bag.path.name}': its commands claim to span {sent[0]} to {sent[-1]} ns.")
        grid = np.arange(sent[0] - period // 2, sent[-1], period) if len(sent) else np.zeros(0, np.int64)
        clock = _Clock(grid, grid, [""] * len(grid))
    if len(clock.stamps) < 1:
        raise InputError(f"Episode '{bag.path.name}' has no actions: the policy sent none. Remove the file.")
    return clock


def _bounds(bag: Bag) -> tuple[int, int]:
    """Receive times [ns] of the `episode_start` and `episode_end` events, or everything."""
    begin, end = 0, np.iinfo(np.int64).max
    for series in bag.events.values():
        for event, log_ns in zip(series.values, series.log_ns, strict=True):
            if event.get("event") == "episode_start":
                begin = int(log_ns)
            elif event.get("event") == "episode_end":
                end = int(log_ns)
    return begin, end


def _rows(stamps: np.ndarray, series: list[Series], num_cameras: int, control_dt: float) -> tuple[np.ndarray, int]:
    """Stamps of the rows, from the first at which every topic has a sample; 1 if a final observation was added.

    Args:
        series: joint states, then the cameras, then the rest.
    """
    first = max(int(s.stamp_ns[0]) for s in series)
    rows = stamps[stamps >= first]
    if len(rows) == 0:
        raise InputError("No action came after the first joint state and image. Remove the file.")
    # One period after the last action, if every topic went on until about then; at a picture, where there are any.
    last, period = int(rows[-1]), round(control_dt * 1e9)
    final = last + period
    if num_cameras:
        cameras = series[1 : 1 + num_cameras]
        final = max(int(s.stamp_ns[s.last_not_after(final + period // 4)]) for s in cameras)
    newest = [int(s.stamp_ns[s.last_not_after(final)]) for s in series]
    return (np.append(rows, final), 1) if min(newest) > last + period // 2 else (rows, 0)


def _targets(clock: _Clock, commands: Series, joints: Series, action: ActionSpec) -> np.ndarray:
    """(rows + 1, A): the target commanded before the first row, then the last one commanded on behalf of each row.

    A row's commands are those that name its chunk, until the first that names a later one.
    """
    order = _order(commands.values[0][1], action.names, "/bridge/command")
    positions = np.stack([value[2] for value in commands.values])[:, order]
    first_of: dict[str, int] = {}
    last_of: dict[str, int] = {}
    for index, (frame, _, _) in enumerate(commands.values):
        if frame:
            first_of.setdefault(frame, index)
            last_of[frame] = index
    # A chunk that the safety filter refused is named by no command: then the time it came decides.
    came = np.searchsorted(commands.log_ns, clock.starts)
    begins = [first_of.get(frame, int(index)) for frame, index in zip(clock.frames, came, strict=True)]
    ends = [*(begin - 1 for begin in begins), last_of.get(clock.frames[-1], len(positions) - 1)]
    names, position, _ = joints.values[max(0, joints.last_not_after(int(clock.stamps[0])))]
    measured = position[_order(names, action.names, "the joint states")]  # nothing was commanded yet
    return np.stack([positions[index] if index >= 0 else measured for index in ends])


def _actions(targets: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(N, A) in [-1, 1] from targets (N + 1, A)."""
    assert spec.action is not None
    scale = np.asarray(spec.action.scale)
    actions = np.clip(np.diff(targets, axis=0) / scale, -1.0, 1.0)
    gripper = spec.observations.get("gripper_position")
    for column, name in enumerate(spec.action.names):
        if gripper is None or name not in gripper.names:
            continue
        actions[:, column] = 0.0 - actions[:, column]  # a closing gripper's opening shrinks
        if gripper.low and gripper.high:
            middle = (gripper.low[0] + gripper.high[0]) / 2
            still = np.where(targets[1:, column] < middle, 1.0, -1.0)
            moves = np.abs(actions[:, column]) > 0.05
            actions[:, column] = np.where(moves, np.sign(actions[:, column]), still)
    return actions.astype(np.float32)


def _observations(joints: Series, rows: np.ndarray, targets: np.ndarray, spec: DatasetSpec) -> dict[str, np.ndarray]:
    """Measured keys by joint name, and `joint_target`: the target commanded before each row."""
    assert spec.action is not None
    out: dict[str, np.ndarray] = {}
    for key, array in spec.observations.items():
        if key in MEASURED:
            order = _order(joints.values[0][0], array.names, "the joint states")
            field = 2 if key == "joint_velocity" else 1
            out[key] = np.stack([joints.values[row][field][order] for row in rows])
        elif key == "joint_target":
            order = _order(spec.action.names, array.names, "the action")
            out[key] = targets[np.minimum(np.arange(len(rows)), len(targets) - 1)][:, order]
        elif not array.privileged:
            raise InputError(
                f"The policy observes '{key}', which a bag does not hold. It holds: {', '.join(MEASURED)}."
            )
    return out


def _joint_series(bag: Bag, spec: DatasetSpec) -> Series:
    """The messages, over all JointState topics, that name every joint the spec needs. Joints are matched by name."""
    needed = {name for key in MEASURED if key in spec.observations for name in spec.observations[key].names}
    needed |= set(spec.action.names) if spec.action else set()
    for series in bag.joint_states.values():
        whole = [
            i for i, value in enumerate(series.values) if needed <= set(value[0]) and len(value[2]) == len(value[1])
        ]
        if whole:
            order = series.values[whole[0]][0]
            same = [_reordered(series.values[i], order) for i in whole]
            return Series(series.stamp_ns[whole], series.log_ns[whole], same)
    raise InputError(f"Episode '{bag.path.name}': no joint states name all of {', '.join(sorted(needed))}.")


def _reordered(value: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
    if value[0] == names:
        return value
    order = _order(value[0], names, "the joint states")
    return names, value[1][order], value[2][order]


def _order(found: tuple[str, ...], wanted: tuple[str, ...], where: str) -> list[int]:
    try:
        return [found.index(name) for name in wanted]
    except ValueError:
        missing = [name for name in wanted if name not in found]
        raise InputError(f"{', '.join(missing)} is not among {where}: {', '.join(found)}.") from None


def _cameras(bag: Bag, contract: Contract) -> dict[str, str]:
    """Topic -> camera name, for every Image topic: `/camera/wrist/image_raw` is the camera `wrist`."""
    names = {}
    for topic in sorted(bag.images):
        parts = [part for part in topic.split("/") if part not in ("", "camera", "image_raw", "image")]
        names[topic] = next((p for p in parts if p in contract.images), "_".join(parts) or "camera")
    for camera in contract.images:
        if camera not in names.values():
            raise InputError(f"{bag.path.name} has no images of camera '{camera}'.{suggest(camera, names.values())}")
    return names


def find_contract(recordings: Sequence[Recording], file: str | Path | None) -> Contract | None:
    """The contract in a file, or else the first that a recording holds; None when there is none.

    Raises:
        InputError: it cannot be read, or its actions are not those of a bag.
    """
    if file is not None:
        try:
            return Contract.from_json(json.loads(Path(file).read_text()), str(file))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as a contract: {error}.") from error
    for recording in recordings:
        try:
            found = _embedded(recording)
        except InputError:
            continue  # it is met again, and told of, when it is read
        if found is not None:
            return Contract.from_json(found, str(recording.path))
    return None


def _embedded(recording: Recording) -> Mapping[str, Any] | None:
    for item in recording.items():
        text, key = "", ""
        if isinstance(item, Metadata) and item.name == "embodied_contract":
            text = next(iter(item.values.values()), "")
        elif isinstance(item, Message) and item.topic.kind == STRING and b'"contract"' in item.data:
            text, key = message_type(item.topic).decode(item.data).data, "contract"
        try:
            found = json.loads(text) if text else None
        except (ValueError, RecursionError):
            continue
        found = found.get(key) if key and isinstance(found, dict) else found
        if isinstance(found, dict):
            return found
    return None


def _topic(topics: dict[str, Series], name: str, where: str, otherwise: str) -> Series:
    if name not in topics:
        raise InputError(f"Episode '{where}' has {otherwise} ({name} is absent).")
    return topics[name]
