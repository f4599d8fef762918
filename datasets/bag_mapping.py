"""The YAML that says what the topics of a bag mean: which become observations, cameras and the action.

    clock: {topic: /camera/image_raw}   # one row per message of this topic; or {rate: 10}, rows on a grid [Hz]
    stamps: header                      # times of the messages: `header` (default), or `received` by the recorder
    max_age: 0.3                        # [s]; rows with an older source are dropped; a source may set its own
    observations:
      joint_position: {topic: /joint_states, field: position, joints: [panda_joint1, panda_joint2], unit: rad}
      gripper: {topic: /joint_states, field: position, joints: [panda_finger_joint1], max_age: 0.1}
      tool_position: {topic: /ee_pose, field: pose.position, unit: m}
    images:
      wrist: {topic: /camera/image_raw, size: [84, 84]}  # [height, width], resized; as recorded without
    action: {topic: /controller/joint_trajectory, field: points.-1.positions, joints: [panda_joint1, panda_joint2],
             mode: joint_position}      # or {next: joint_position}: the position measured in the next row
    instruction: stack the cubes        # or {topic: /task}
    success: true                       # or {topic: /success}, a Bool or a String with JSON {"success": ...}

`field` is a dotted path into the message; a number takes one entry of a list (`-1`: the last); without `field` all
numbers of the message are taken. `joints` are matched with the names in the message, wherever they stand; a message
that lacks one keeps the joint's last value, which ages. Ages are kept as privileged observations `age_<key>` [s].

The action of a row is the first command after it, up to the next row; without one, the command still in force, unless
older than the action's `max_age`. `--options mapping FILE` names the file; `embodied_mapping.yaml` in the bag's folder
is found without.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.datasets.bag_items import Topic
from embodied.datasets.bag_types import message_type

FILE_NAME = "embodied_mapping.yaml"
MAX_FILE = 1 << 18  # bytes
MODES = (
    "raw",
    "joint_position",
    "joint_velocity",
    "joint_effort",
    "joint_position_delta",
    "end_effector_pose",
    "end_effector_velocity",
    "end_effector_delta",
    "base_velocity",
)
IMAGE, COMPRESSED_IMAGE = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINT_STATE, JOINT_TRAJECTORY = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
POSE_STAMPED = "geometry_msgs/msg/PoseStamped"
COMMANDS = {
    "std_msgs/msg/Float64MultiArray": ("data", "joint_position"),
    "geometry_msgs/msg/TwistStamped": ("twist", "end_effector_velocity"),
    "geometry_msgs/msg/Twist": ("", "base_velocity"),
}

Key = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class ClockTopic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly one of the two: a topic whose messages are the rows, or a grid [Hz]."""

    topic: str = ""
    rate: Annotated[float, msgspec.Meta(ge=0.001, le=10_000)] | None = None


class NumbersFrom(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topic: str
    field: str = ""
    joints: tuple[str, ...] = ()
    max_age: Seconds | None = None
    unit: str = ""
    privileged: bool = False


class PicturesFrom(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topic: str
    max_age: Seconds | None = None
    size: tuple[Pixels, Pixels] | None = None


class ActionFrom(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A topic of commands, or `next`: the key of an observation whose value in the next row is the action."""

    topic: str = ""
    next: str = ""
    field: str = ""
    joints: tuple[str, ...] = ()
    mode: str = "raw"
    max_age: Seconds | None = None
    unit: str = ""


class FromTopic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topic: str


class BagMapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    clock: ClockTopic
    observations: dict[Key, NumbersFrom]
    images: dict[Key, PicturesFrom] = {}
    action: ActionFrom | None = None
    stamps: str = "header"
    max_age: Seconds = 0.3
    instruction: str | FromTopic = ""
    success: bool | FromTopic | None = None
    environment: str = ""

    def topics(self) -> set[str]:
        """Every topic that it names."""
        named = {source.topic for source in [*self.observations.values(), *self.images.values()]}
        named |= {part.topic for part in (self.instruction, self.success) if isinstance(part, FromTopic)}
        return (named | {self.clock.topic, self.action.topic if self.action else ""}) - {""}

    def to_json(self) -> dict[str, Any]:
        return msgspec.json.decode(msgspec.json.encode(self))


def read_mapping(file: Path) -> BagMapping:
    """Read and check a mapping. Raises ConfigError naming the key that is wrong, and the valid ones."""
    try:
        if file.stat().st_size > MAX_FILE:
            raise ConfigError(f"{file} has more than {MAX_FILE} bytes; it is no mapping.")
        data = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold keys such as clock, observations and action.")
    _check_keys(file, "", data, BagMapping)
    for key, kind in (("clock", ClockTopic), ("action", ActionFrom)):
        _check_keys(file, key, data.get(key), kind)
    for key, kind in (("observations", NumbersFrom), ("images", PicturesFrom)):
        for name, part in data[key].items() if isinstance(data.get(key), dict) else ():
            _check_keys(file, f"{key}.{name}", part, kind)
    try:
        mapping = msgspec.convert(data, BagMapping)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{file}: {error}.") from error
    _check_meaning(file, mapping)
    return mapping


def _check_keys(file: Path, where: str, part: Any, kind: type[msgspec.Struct]) -> None:
    for key in part if isinstance(part, Mapping) else ():
        if key not in kind.__struct_fields__:
            inside = f" in '{where}'" if where else ""
            raise ConfigError(f"{file}: unknown key '{key}'{inside}.{suggest(str(key), kind.__struct_fields__)}")


def _check_meaning(file: Path, mapping: BagMapping) -> None:
    action = mapping.action
    if bool(mapping.clock.topic) == (mapping.clock.rate is not None):
        raise ConfigError(f"{file}: clock takes either a topic or a rate [Hz].")
    if mapping.stamps not in ("header", "received"):
        raise ConfigError(
            f"{file}: unknown stamps '{mapping.stamps}'.{suggest(mapping.stamps, ('header', 'received'))}"
        )
    if not mapping.observations and not mapping.images:
        raise ConfigError(f"{file} names no observations and no images: nothing would be imported.")
    for key in mapping.observations:
        if key.startswith("age_") or key == "images":
            raise ConfigError(f"{file}: an observation cannot be called '{key}'; that name is used by the store.")
    if set(mapping.observations) & set(mapping.images):
        raise ConfigError(
            f"{file}: '{min(set(mapping.observations) & set(mapping.images))}' is observation and camera."
        )
    if action is None:
        return
    if action.mode not in MODES:
        raise ConfigError(f"{file}: unknown mode '{action.mode}' of the action.{suggest(action.mode, MODES)}")
    if bool(action.topic) == bool(action.next):
        raise ConfigError(f"{file}: action takes either a topic of commands or 'next' with an observation's key.")
    if action.next and action.next not in mapping.observations:
        raise ConfigError(
            f"{file}: action: no observation '{action.next}'.{suggest(action.next, mapping.observations)}"
        )
    if action.next and (action.field or action.joints or action.max_age):
        raise ConfigError(f"{file}: action: with 'next' it has the observation's field and joints; leave them out.")


def draft_mapping(topics: Iterable[tuple[Topic, int, float, tuple[str, ...]]]) -> str:
    """A mapping to start from, as YAML.

    Args:
        topics: (topic, messages, rate [Hz], joint names of its first message) of a recording.
    """
    found = [entry for entry in topics if entry[1] > 1]
    pictures = {_key(entry[0].name): entry for entry in found if entry[0].kind in (IMAGE, COMPRESSED_IMAGE)}
    joints = [entry for entry in found if entry[0].kind == JOINT_STATE and entry[3]]
    observations: dict[str, Any] = {}
    for number, (topic, _, _, names) in enumerate(joints):
        key = "joint_position" if number == 0 else f"{_key(topic.name)}_position"
        observations[key] = {"topic": topic.name, "field": "position", "joints": list(names)}
    for topic, *_ in found:
        if topic.kind == POSE_STAMPED:
            observations[_key(topic.name)] = {"topic": topic.name, "field": "pose"}
        elif topic.kind not in COMMANDS and _all_numbers(topic):
            observations[_key(topic.name)] = {"topic": topic.name}
    draft: dict[str, Any] = {"clock": _draft_clock(list(pictures.values()) or joints), "stamps": "header"}
    used = [entry for entry in found if entry[0].name in {source["topic"] for source in observations.values()}]
    slowest = min([entry[2] for entry in [*used, *pictures.values()] if entry[2] > 0], default=10.0)
    draft["max_age"] = round(min(2.0, max(0.3, 3 / slowest)), 3)  # three periods of the slowest source
    draft["observations"] = observations
    if pictures:
        draft["images"] = {key: {"topic": entry[0].name} for key, entry in pictures.items()}
    action = _draft_action(found, observations)
    draft |= ({"action": action} if action else {}) | {"instruction": ""}
    named = {
        source["topic"]
        for source in [*observations.values(), *draft.get("images", {}).values(), action or {}]
        if "topic" in source
    }
    others = [f"#   {topic.name}: {topic.kind}, {_fields(topic)}" for topic, *_ in found if topic.name not in named]
    head = "# A draft from the topics found: check every line. What the keys mean: embodied.datasets.bag_mapping.\n"
    tail = "\n".join(["# Not used, with the fields that hold numbers:", *others, ""]) if others else ""
    return head + yaml.safe_dump(draft, sort_keys=False, width=120) + tail


def _draft_clock(candidates: list[tuple[Topic, int, float, tuple[str, ...]]]) -> dict[str, Any]:
    """The slowest camera, or else joint states; a grid of 10 Hz where there is neither."""
    timed = [entry for entry in candidates if entry[2] > 0]
    return {"topic": min(timed, key=lambda entry: entry[2])[0].name} if timed else {"rate": 10.0}


def _all_numbers(topic: Topic) -> bool:
    """Whether a message is nothing but a few numbers, each with a name."""
    try:
        return 0 < len(message_type(topic).leaf_names("")) <= 32
    except InputError:
        return False


def _draft_action(found: list[Any], observations: Mapping[str, Any]) -> dict[str, Any] | None:
    for topic, _, _, names in found:
        if topic.kind == JOINT_TRAJECTORY:
            field = {"topic": topic.name, "field": "points.-1.positions"}
            return field | ({"joints": list(names)} if names else {}) | {"mode": "joint_position"}
    for topic, *_ in found:
        if topic.kind in COMMANDS:
            field, mode = COMMANDS[topic.kind]
            return {"topic": topic.name} | ({"field": field} if field else {}) | {"mode": mode}
    return {"next": "joint_position", "mode": "joint_position"} if "joint_position" in observations else None


def _key(topic: str) -> str:
    parts = [part for part in topic.split("/") if part not in ("", "image_raw", "image", "compressed", "camera")]
    key = "".join(c if c.isalnum() or c == "_" else "_" for c in "_".join(parts)).strip("_")[:60]
    return key or "camera"


def _fields(topic: Topic) -> str:
    try:
        paths = message_type(topic).number_paths()
    except InputError as error:
        return str(error)
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") if paths else "no numbers"
