"""Bags recorded by `embodied deploy`: one per episode, what the robot saw and what it was told.

The clock is the policy's: one row per /bridge/chunk, at the stamp of the observation that the chunk answers. Each row
takes from every topic the last sample not after that stamp, as the policy did. Bags without chunks get a grid of the
control period that starts half a period before the first command.

The action of a row is what was executed, not what the policy asked for: it comes from the last target in
/bridge/command on behalf of its chunk and the one before that chunk took over (`bag_actions`). What a shadow run would
have sent was not executed and is not read.

A row is no step where any source is older than its limit, which the recording states (0.3 s where it does not). Ages
are kept as privileged observations `age_joints` and `age_<camera>` [s].

What the numbers mean comes from the policy's contract (`bag_meaning`). What the recorder says of itself (robot, joints,
hashes of the limits, code version) and the cameras' calibrations become attributes of the store. Events that are read:
any with `success`, `instruction` or `terminated`; an `episode_start` and an `episode_end` bound the episode.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.bag import Bag, Series, closed, scan
from embodied.datasets.bag_actions import actions_of
from embodied.datasets.bag_files import Recording
from embodied.datasets.bag_images import frames, picture
from embodied.datasets.bag_joints import Joints, joints_of
from embodied.datasets.bag_meaning import Contract, recorders_word
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.source import Source

CHUNK, COMMAND, POSE_PREFIX = "/bridge/chunk", "/bridge/command", "/sim/pose/"
MEASURED = ("joint_position", "joint_velocity", "gripper_position")
MAX_ROWS = 5_000_000  # of an episode; more is a damaged stamp
MAX_GAP = 1.5  # control periods between two rows; a longer silence is not a step
MAX_AGE_S = 0.3  # a row whose newest sample of some source is older [s] is not a step, unless the bag says otherwise


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
        | {key: ArraySpec((3,), unit="m", names=("x", "y", "z"), privileged=True) for key in poses.values()}
        | {f"age_{key}": ArraySpec((), unit="s", privileged=True) for key in ("joints", *cameras.values())},
        images={name: ArraySpec(shapes[topic], "uint8") for topic, name in cameras.items()},
        action=contract.action,
        control_dt=contract.control_dt,
        environment=contract.environment,
    )
    recording = recorders_word(recordings[first])
    limits = _limits(recording, cameras)
    attributes = {
        "cameras": {name: topic for topic, name in cameras.items()},
        "calibrations": bag.calibrations,
        "timestamps": "observation stamps of the policy's chunks",
        "max_age_s": limits,
        "recording": recording,
    }

    def load(index: int) -> Episode:
        return _episode(bag if index == first else scan(recordings[index]), spec, cameras, poses, limits)

    findings = [finding for recording in recordings for finding in recording.findings]
    findings += [_cut(recording, index) for index, recording in enumerate(recordings) if not closed(recording)]
    return Source(spec, len(recordings), load, attributes, tuple(findings))


def _limits(recording: Mapping[str, Any], cameras: Mapping[str, str]) -> dict[str, float]:
    """Source -> age beyond which a row is no step [s]."""
    said = recording.get("max_age_s")
    said = said if isinstance(said, Mapping) else {}
    found = {"joints": said.get("joint_states"), **dict.fromkeys(cameras.values(), said.get("images"))}
    return {key: float(age) if isinstance(age, int | float) and age > 0 else MAX_AGE_S for key, age in found.items()}


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


def _episode(
    bag: Bag, spec: DatasetSpec, cameras: dict[str, str], poses: dict[str, str], limits: Mapping[str, float]
) -> Episode:
    assert spec.action is not None
    where = bag.path.name
    events = [event for series in bag.events.values() for event in series.values]
    commands = _executed(_topic(bag.trajectories, COMMAND, where, "no actions: nothing was commanded"), where)
    clock = _clock(bag, commands, spec.control_dt)
    joints = joints_of(bag, _needed(spec))
    seen = {name: _topic(bag.images, topic, where, "no images") for topic, name in cameras.items()}
    series = [joints, *seen.values(), *(_topic(bag.poses, topic, where, "no poses") for topic in poses)]
    stamps, has_final = _rows(clock.stamps, series, len(cameras), spec.control_dt)
    steps = len(stamps) - has_final
    skipped = len(clock.stamps) - steps
    picked = [np.array([s.last_not_after(stamp) for stamp in stamps]) for s in series]
    targets = _targets(clock, commands, joints, spec.action)[skipped:]  # (steps + 1, A): before row 0, after each row

    action = np.zeros((len(stamps), len(spec.action.names)), np.float32)
    action[:steps] = actions_of(targets, spec)
    shown = zip(seen.items(), picked[1:], strict=False)  # the poses come after the cameras
    ages = {"joints": stamps - joints.oldest_ns[picked[0]]}
    ages |= {name: stamps - source.stamp_ns[rows] for (name, source), rows in shown}
    fresh = np.all([age <= limits[key] * 1e9 for key, age in ages.items()], axis=0)
    step_valid = np.zeros(len(stamps), bool)
    step_valid[:-1] = fresh[:-1] & (np.diff(stamps) < MAX_GAP * spec.control_dt * 1e9)
    ends = np.zeros((2, len(stamps)), bool)
    terminated = any(event.get("terminated") is True for event in events)
    ends[0 if terminated else 1, steps - 1] = True
    step_valid[steps - 1] |= terminated
    observations = _observations(joints, picked[0], targets, spec)
    observations |= {f"age_{key}": age * 1e-9 for key, age in ages.items()}
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


def _executed(commands: Series, where: str) -> Series:
    """The commands without those that a shadow run only told of."""
    sent = [i for i, value in enumerate(commands.values) if not value[0].startswith("shadow:")]
    if not sent:
        raise InputError(f"Episode '{where}' has no actions: it was a shadow run, nothing was sent to the robot.")
    return Series(commands.stamp_ns[sent], commands.log_ns[sent], [commands.values[i] for i in sent])


def _needed(spec: DatasetSpec) -> tuple[str, ...]:
    """Joints that the observations and the action name."""
    assert spec.action is not None
    names = [name for key in MEASURED if key in spec.observations for name in spec.observations[key].names]
    return tuple(dict.fromkeys([*names, *spec.action.names]))


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


def _rows(stamps: np.ndarray, series: list[Any], num_cameras: int, control_dt: float) -> tuple[np.ndarray, int]:
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


def _targets(clock: _Clock, commands: Series, joints: Joints, action: ActionSpec) -> np.ndarray:
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
    now = max(0, joints.last_not_after(int(clock.stamps[0])))
    measured = joints.position[now][_order(joints.names, action.names, "the joint states")]  # nothing was commanded yet
    return np.stack([positions[index] if index >= 0 else measured for index in ends])


def _observations(joints: Joints, rows: np.ndarray, targets: np.ndarray, spec: DatasetSpec) -> dict[str, np.ndarray]:
    """Measured keys by joint name, and `joint_target`: the target commanded before each row."""
    assert spec.action is not None
    out: dict[str, np.ndarray] = {}
    for key, array in spec.observations.items():
        if key in MEASURED:
            order = _order(joints.names, array.names, "the joint states")
            out[key] = (joints.velocity if key == "joint_velocity" else joints.position)[rows][:, order]
        elif key == "joint_target":
            order = _order(spec.action.names, array.names, "the action")
            out[key] = targets[np.minimum(np.arange(len(rows)), len(targets) - 1)][:, order]
        elif not array.privileged:
            raise InputError(
                f"The policy observes '{key}', which a bag does not hold. It holds: {', '.join(MEASURED)}."
            )
    return out


def _order(found: tuple[str, ...], wanted: tuple[str, ...], where: str) -> list[int]:
    try:
        return [found.index(name) for name in wanted]
    except ValueError:
        missing = [name for name in wanted if name not in found]
        raise InputError(f"{', '.join(missing)} is not among {where}: {', '.join(found)}.") from None


def _cameras(bag: Bag, contract: Contract) -> dict[str, str]:
    """Topic -> camera name, for every topic of pictures: `/camera/wrist/image_raw` is the camera `wrist`."""
    names = {}
    for topic in sorted(bag.images):
        if topic.endswith("/compressed") and topic.removesuffix("/compressed") in bag.images:
            continue  # the same pictures
        parts = [part for part in topic.split("/") if part not in ("", "camera", "image_raw", "image", "compressed")]
        names[topic] = next((p for p in parts if p in contract.images), "_".join(parts) or "camera")
    for camera in contract.images:
        if camera not in names.values():
            raise InputError(f"{bag.path.name} has no images of camera '{camera}'.{suggest(camera, names.values())}")
    return names


def _topic(topics: dict[str, Series], name: str, where: str, otherwise: str) -> Series:
    if name not in topics:
        raise InputError(f"Episode '{where}' has {otherwise} ({name} is absent).")
    return topics[name]
