"""Faults that the simulated robot shows on request, one at a time; `/sim/fault` takes them as JSON.

    {"fault": "none"}                                          ends the fault
    {"fault": "freeze_state"}                                  joint states stop; the arm goes on
    {"fault": "freeze_cameras"}                                pictures stop
    {"fault": "camera_black", "camera": "wrist"}               a picture of zeros; every camera without "camera"
    {"fault": "nan", "joint": "j1"}                            NaN in the positions; in all of them without "joint"
    {"fault": "joint_jump", "joint": "j1", "by": 0.5}          an encoder that is off by so much; all without "joint"
    {"fault": "drop", "of": "joint_states", "probability": 0.5}  lost messages; "of": joint_states, cameras or command
    {"fault": "delay", "of": "cameras", "seconds": 0.1}        late messages, of the same three
    {"fault": "clock_jump", "seconds": -1.0}                   the robot's clock, and every stamp, steps by so much
    {"fault": "clock_stop"}                                    it stands still; /clock is silent
    {"fault": "reject_commands"}                               commands are refused
    {"fault": "contact", "joint": "j1", "torque": 50.0}        something pushes [N·m]; without "torque" it holds the
                                                               joint where it is, and every joint without "joint"

Each may have "for_s": it ends by itself after so many seconds of physics.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest

STREAMS = ("joint_states", "cameras", "command")
# Parameters and their defaults; a default of None means that it may be absent.
FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "freeze_state": {},
    "freeze_cameras": {},
    "camera_black": {"camera": ""},
    "nan": {"joint": ""},
    "joint_jump": {"joint": "", "by": 0.5},
    "drop": {"of": "joint_states", "probability": 1.0},
    "delay": {"of": "joint_states", "seconds": 0.1},
    "clock_jump": {"seconds": -1.0},
    "clock_stop": {},
    "reject_commands": {},
    "contact": {"joint": "", "torque": None},
}
# Smallest and largest value of a number, by parameter or by fault and parameter.
BOUNDS = {"probability": (0.0, 1.0), "for_s": (0.0, 1e6), "delay seconds": (0.0, 60.0)}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault with its parameters; `until` is on the physics clock [s]."""

    name: str = "none"
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    until: float = np.inf

    def is_on(self, name: str, **values: str) -> bool:
        """Whether this is the fault `name`, for that camera or stream if it names one."""
        return self.name == name and all(self.values.get(key) in ("", value) for key, value in values.items())


def read_fault(wish: Mapping[str, Any], now: float, joints: Sequence[str]) -> Fault:
    """A fault from its JSON. InputError names what is unknown or of the wrong type."""
    name = wish.get("fault")
    if name not in FAULTS:
        raise InputError(f"fault '{name}' is unknown.{suggest(str(name), FAULTS)}")
    known = {**FAULTS[name], "for_s": np.inf}
    for key, value in wish.items():
        if key == "fault":
            continue
        if key not in known:
            raise InputError(f"fault {name} takes no '{key}'.{suggest(key, known)}")
        wanted = str if isinstance(known[key], str) else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise InputError(f"fault {name}: '{key}' is {value!r}")
        low, high = BOUNDS.get(key, BOUNDS.get(f"{name} {key}", (-1e6, 1e6)))
        if not isinstance(value, str) and not low <= value <= high:
            raise InputError(f"fault {name}: '{key}' is {value}; it must lie between {low:g} and {high:g}")
    values = known | {key: value for key, value in wish.items() if key != "fault"}
    if values.get("joint") and values["joint"] not in joints:
        raise InputError(f"fault {name}: '{values['joint']}' is no joint.{suggest(values['joint'], joints)}")
    if values.get("of", STREAMS[0]) not in STREAMS:
        raise InputError(f"fault {name}: 'of' is '{values['of']}'.{suggest(values['of'], STREAMS)}")
    return Fault(name, values, now + values["for_s"])


def distort(fault: Fault, names: Sequence[str], position: np.ndarray) -> np.ndarray:
    """The positions (J,) that a robot with this fault reports."""
    if fault.name not in ("nan", "joint_jump"):
        return position
    chosen = np.array([fault.values["joint"] in ("", name) for name in names])
    return np.where(chosen, np.nan if fault.name == "nan" else position + fault.values["by"], position)
