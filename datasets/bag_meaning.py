"""What a bag of `embodied deploy` says its numbers mean: joint names, order, scale, control period.

It comes from the policy's `contract.json`, which the recorder puts into the bag as the metadata record
`embodied_contract` or as an event with a field `contract`. Option `contract=FILE` supplies it for other bags.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets.bag import STRING
from embodied.datasets.bag_actions import CONTROL_MODES
from embodied.datasets.bag_files import Recording
from embodied.datasets.bag_items import Message, Metadata
from embodied.datasets.bag_types import message_type

CONTRACT_RECORD, RECORDING_RECORD = "embodied_contract", "embodied_recording"


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
        if action.control_mode not in CONTROL_MODES:
            raise InputError(f"{where}: actions are '{action.control_mode}'; read are {', '.join(CONTROL_MODES)}.")
        if not action.names or len(action.scale) not in (0, len(action.names)):
            raise InputError(f"{where}: the action has {len(action.names)} names and {len(action.scale)} scales.")
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
        if isinstance(item, Metadata) and item.name == CONTRACT_RECORD:
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


def recorders_word(recording: Recording) -> dict[str, Any]:
    """What the recorder says of the robot and of itself, before the first message; {} where it says nothing."""
    try:
        for item in recording.items():
            if isinstance(item, Message):
                break
            if isinstance(item, Metadata) and item.name == RECORDING_RECORD:
                found = json.loads(next(iter(item.values.values()), ""))
                return found if isinstance(found, dict) else {}
    except (InputError, ValueError, RecursionError):
        pass
    return {}
