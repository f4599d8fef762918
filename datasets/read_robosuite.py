"""Raw robosuite demonstrations: `data/demo_<i>` with simulator states and actions, and the model as XML.

The states are replayed in MuJoCo to recover what robosuite would have observed: joints by name, the hand, objects.
robosuite keeps successful demonstrations only and says neither so nor anything of rewards in the file; both stay
unknown. State i was recorded before action i; the state after the last action is not in the file.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.contracts.provenance import hash_json
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, Frames, end_flags, padded_last
from embodied.datasets.finding import Finding
from embodied.datasets.hdf5 import (
    array_at,
    as_text,
    attribute,
    attributes,
    check_episode_bytes,
    find,
    group_at,
    is_hdf5,
    is_key,
    open_hdf5,
    readable,
)
from embodied.datasets.read_robomimic import demo_names
from embodied.datasets.replay_robosuite import XML_BYTES, drawable, replayer, skeleton
from embodied.datasets.source import Source, check_options

ROBOT = re.compile(
    r"(robot|gripper|mount|base|fixed_mount|mobilebase)\d+_"
)  # names that robosuite gives a robot's parts
HINGE, SLIDE = 3, 2  # MuJoCo's numbers of joint types
MODELS_TRIED = 20  # demos whose model is tried before the file counts as one without
MAX_SIZE = 2048  # [px]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is recovered from a model's states; equal for all demos of a dataset.

    Attributes:
        width: numbers in a state: time, positions, velocities.
        specs: observation -> spec.
        columns: observation -> columns of the state, for joints.
        bodies, sites: observation -> (body's or site's name, index in the model, `pos` or `quat`).
        cameras: names that the model has.
    """

    width: int
    specs: dict[str, ArraySpec]
    columns: dict[str, tuple[int, ...]]
    bodies: dict[str, tuple[str, int, str]]
    sites: dict[str, tuple[str, int, str]]
    cameras: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Cameras to render, and the size of their pictures [px]."""

    cameras: tuple[str, ...]
    height: int
    width: int


def sniff(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with readable(path), open_hdf5(path) as file:
        demos = demo_names(file)
        first = group_at(file, f"data/{demos[0]}") if demos else None
        if first is None or find(first, "obs") is not None:
            return False
        return isinstance(find(first, "states"), h5py.Dataset) and "model_file" in first.attrs


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open raw robosuite demonstrations.

    Args:
        options: `cameras`: names separated by commas, rendered at `size` HEIGHTxWIDTH; none by default, because
            rendering without a graphics card takes about 10 ms a picture. `size`: 84x84 by default.

    Raises:
        ConfigError: an option that is none, or a camera that the models lack.
        InputError: truncated, or no demo with states and actions.
        MissingExtraError: mujoco is not installed, or robosuite for `cameras`.
    """
    check_options("robosuite", options, ("cameras", "size"))
    pictures = _pictures(options)
    file = open_hdf5(path)
    with readable(path):
        demos = demo_names(file)
        data = group_at(file, "data")
        if not demos or data is None:
            raise InputError(f"{path} has no group 'data/demo_1': it is not in robosuite's layout.")
        reference, plan, reason = _reference(path, file, demos)
        absent = [camera for camera in pictures.cameras if plan is None or camera not in plan.cameras]
        if plan is None and absent:
            raise InputError(f"{path}: no camera can be rendered: {reason}.")
        if plan is not None and absent:
            raise ConfigError(f"cameras: the model has no '{absent[0]}'.{suggest(absent[0], plan.cameras)}")
        remembered = attributes(data)
        spec = _spec(file, reference, plan, pictures, remembered)
        environment = {"attributes": {key: _short(value) for key, value in remembered.items()}}
        model_files = {demo: _model_hash(path, file, demo) for demo in demos}
    findings = []
    if plan is None:
        text = f"states and actions only, because no model can be replayed: {reason}"
        advice = "Import the file with the robosuite version that recorded it, converted to robomimic's layout."
        findings.append(Finding("not-replayed", "warning", text, advice))
    return Source(
        spec,
        len(demos),
        lambda index: _load(path, file, demos[index], spec, plan, pictures),
        environment
        | {
            "models": model_files,
            "rendering": dataclasses.asdict(pictures) if pictures.cameras else {},
            "timestamps": "simulation time of the states",
            "success": "not in the file: robosuite keeps successful demonstrations only",
        },
        tuple(findings),
    )


def _load(path: Path, file: Any, demo: str, spec: DatasetSpec, plan: Plan | None, pictures: Pictures) -> Episode:
    name = f"{path.name}/{demo}"
    try:
        with readable(path):
            states, actions = _recorded(file, demo)
            xml = _xml(path, file, demo) if plan else ""
        vectors, timestamp = _observations(states, xml, plan)
        images: dict[str, np.ndarray | Frames] = {}
        for camera in pictures.cameras:
            images[camera] = _frames(name, drawable(xml), states, camera, pictures)
    except InputError as error:
        raise InputError(f"Episode '{name}': {error}") from None
    rows = len(states)
    step_valid, terminated, truncated = end_flags(len(actions), rows, terminated=False)
    return Episode(
        observations=vectors,
        images=images,
        action=padded_last(actions, rows),
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=timestamp,
        source_id=name,
    )


def _recorded(file: Any, demo: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, W) float64 states and (N, A) float32 actions; n is N, or N + 1 with a final state."""
    group = group_at(file, f"data/{demo}")
    if group is None:
        raise InputError("it is no group.")
    states, actions = array_at(group, "states"), array_at(group, "actions")
    for key, array in (("states", states), ("actions", actions)):
        if len(array.shape) != 2 or 0 in array.shape:
            raise InputError(f"'{key}' must be numbers (N, D); found {array.shape}.")
    if len(states) not in (len(actions), len(actions) + 1):
        raise InputError(f"arrays differ in length: states {len(states)}, actions {len(actions)}.")
    check_episode_bytes([states, actions], len(states))
    return np.asarray(states.rows(), np.float64), actions.float32()


def _observations(states: np.ndarray, xml: str, plan: Plan | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The episode's observations and timestamps [s]."""
    found = {"state": states}
    if plan is not None:
        bare = skeleton(xml)
        own = _plan(replayer().model(bare), states.shape[1])
        if own != dataclasses.replace(plan, cameras=own.cameras):
            raise InputError("its model has other joints, bodies or sites than that of the first demo.")
        poses = replayer().poses(bare, states)
        for key, columns in plan.columns.items():
            found[key] = states[:, columns]
        for key, (_, index, kind) in plan.bodies.items():
            quat_xyzw = np.roll(poses["body_quat_wxyz"][:, index], -1, axis=1)
            found[key] = poses["body_pos"][:, index] if kind == "pos" else quat_xyzw
        for key, (_, index, _) in plan.sites.items():
            found[key] = poses["site_pos"][:, index]
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is inf, which no store takes
        return {key: rows.astype(np.float32) for key, rows in found.items()}, states[:, 0] - states[0, 0]


def _frames(name: str, xml: str, states: np.ndarray, camera: str, pictures: Pictures) -> Frames:
    height, width = pictures.height, pictures.width

    def blocks() -> Iterator[np.ndarray]:
        try:
            yield from replayer().pictures(xml, states, camera, height, width)
        except InputError as error:
            raise InputError(f"Episode '{name}': {error}") from None

    return Frames((len(states), height, width, 3), blocks)


def _reference(path: Path, file: Any, demos: Sequence[str]) -> tuple[str, Plan | None, str]:
    """The first demo whose model can be replayed, and what that gives; else the first with states, and why not."""
    usable, reasons = [], []
    for demo in demos:
        try:
            with readable(path):
                states, _ = _recorded(file, demo)
        except InputError as error:
            reasons.append(InputError(f"Episode '{path.name}/{demo}': {error}"))
            continue
        usable.append(demo)
        try:
            with readable(path):
                xml = _xml(path, file, demo)
            plan = _plan(replayer().model(skeleton(xml)), states.shape[1])
        except InputError as error:
            reasons.append(error)
            if len(usable) == MODELS_TRIED:
                break
            continue
        cameras = tuple(re.findall(r"<camera[^>]*?\sname=\"([^\"]+)\"", xml))
        return demo, dataclasses.replace(plan, cameras=tuple(filter(is_key, cameras))), ""
    if not usable:
        raise reasons[0]
    return usable[0], None, str(reasons[-1])


def _plan(model: dict[str, Any], width: int) -> Plan:
    """What to recover with a model. Raises InputError unless states of `width` numbers are its states."""
    if width != 1 + model["nq"] + model["nv"]:
        raise InputError(f"its states have {width} numbers; its model needs {1 + model['nq'] + model['nv']}")
    specs = {"state": ArraySpec((width,), privileged=True)}
    columns: dict[str, tuple[int, ...]] = {}
    bodies: dict[str, tuple[str, int, str]] = {}
    sites: dict[str, tuple[str, int, str]] = {}
    for robot in sorted({m[1] for m in (re.match(r"robot(\d+)_", joint[0]) for joint in model["joints"]) if m}):
        arms = [arm for arm in ("right_", "left_") if f"robot{robot}_{arm}hand" in model["bodies"]]
        groups = {f"robot{robot}_joint": rf"robot{robot}_"}
        for arm in arms:
            named = f"robot{robot}_{arm if len(arms) > 1 else ''}"
            prefix = rf"gripper{robot}_{arm if len(arms) > 1 else '(right_|left_)?'}"
            groups[f"{named}gripper"] = prefix
            body = f"robot{robot}_{arm}hand"
            bodies[f"{named}eef_quat"] = (body, model["bodies"].index(body), "quat")
            grip = [i for i, site in enumerate(model["sites"]) if re.fullmatch(rf"{prefix}grip_site", site)]
            if grip:
                sites[f"{named}eef_pos"] = (model["sites"][grip[0]], grip[0], "pos")
        for key, prefix in groups.items():
            joints = [j for j in model["joints"] if re.match(prefix, j[0]) and j[2] in (HINGE, SLIDE)]
            if joints:
                names = tuple(joint[0] for joint in joints)
                position, velocity = ("pos", "vel") if key.endswith("joint") else ("qpos", "qvel")
                slides = {joint[2] for joint in joints}
                unit = "rad" if slides == {HINGE} else "m" if slides == {SLIDE} else ""
                columns[f"{key}_{position}"] = tuple(1 + joint[3] for joint in joints)
                columns[f"{key}_{velocity}"] = tuple(1 + model["nq"] + joint[4] for joint in joints)
                specs[f"{key}_{position}"] = ArraySpec((len(joints),), unit=unit, names=names)
                specs[f"{key}_{velocity}"] = ArraySpec((len(joints),), unit=unit and f"{unit}/s", names=names)
    for index in dict.fromkeys(joint[1] for joint in model["joints"] if not ROBOT.match(joint[0])):
        body = model["bodies"][index] or f"body{index}"
        if is_key(f"{body}_pos"):
            bodies |= {f"{body}_pos": (body, index, "pos"), f"{body}_quat": (body, index, "quat")}
    for key, (_, _, kind) in (bodies | sites).items():
        names = ("x", "y", "z") if kind == "pos" else ("x", "y", "z", "w")
        moved = not key.startswith("robot")
        specs[key] = ArraySpec((len(names),), unit="m" if kind == "pos" else "", names=names, privileged=moved)
    return Plan(width, specs, columns, bodies, sites, ())


def _spec(file: Any, reference: str, plan: Plan | None, pictures: Pictures, remembered: dict[str, Any]) -> DatasetSpec:
    states, actions = _recorded(file, reference)
    steps = np.diff(states[:, 0])
    # The step of the first demo, if all its steps are equal: each row's time is recorded beside it anyway.
    regular = len(steps) and np.isfinite(steps).all() and steps.min() > 0 and np.ptp(steps) < 1e-6
    info = _json(remembered.get("env_info")) or _json(remembered.get("env_args"))
    name = remembered.get("env") or info.get("env_name")
    return DatasetSpec(
        observations=plan.specs if plan else {"state": ArraySpec((states.shape[1],), privileged=True)},
        images={camera: ArraySpec((pictures.height, pictures.width, 3), "uint8") for camera in pictures.cameras},
        action=ActionSpec(actions.shape[1:], control_mode="raw"),
        control_dt=round(float(np.median(steps)), 9) if regular else 0.0,
        environment=name if isinstance(name, str) else "",
    )


def _xml(path: Path, file: Any, demo: str) -> str:
    """The demo's model: its attribute holds the XML, or (robosuite 1.0) the name of a file in `models/`."""
    group = group_at(file, f"data/{demo}")
    found = attribute(group, "model_file") if group is not None else None
    if not isinstance(found, str) or not found:
        raise InputError("it has no 'model_file'")
    if "<" in found:
        return found
    beside = path.parent / "models"
    if not re.fullmatch(r"[\w-][\w.-]{0,200}\.xml", found) or (beside / found).is_symlink():
        raise InputError(f"its model file '{found[:80]}' is not in the folder 'models' beside the file")
    try:
        if (beside / found).stat().st_size > XML_BYTES:
            raise InputError(f"its model file '{found}' is too large")
        return (beside / found).read_text(errors="replace")
    except OSError as error:
        raise InputError(f"its model file 'models/{found}' cannot be read: {error.strerror}") from error


def _model_hash(path: Path, file: Any, demo: str) -> str:
    try:
        with readable(path):
            return hash_json(_xml(path, file, demo))[:16]
    except InputError:
        return ""  # loading the demo gives the reason


def _pictures(options: Mapping[str, Any]) -> Pictures:
    cameras = tuple(dict.fromkeys(filter(None, (c.strip() for c in str(options.get("cameras", "")).split(",")))))
    size = re.fullmatch(r"(\d{1,4})x(\d{1,4})", str(options.get("size", "84x84")))
    if size is None or not all(8 <= int(n) <= MAX_SIZE for n in size.groups()):
        raise ConfigError(f"size is HEIGHTxWIDTH in pixels, 8 to {MAX_SIZE}, such as 84x84; found {options['size']!r}.")
    return Pictures(cameras, int(size[1]), int(size[2]))


def _json(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(as_text(text)) if text is not None else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> Any:
    return value[:4000] if isinstance(value, str) else value
