"""Specs: the name, shape, dtype, unit and bounds of one array per step, and of a dataset's or a policy's arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of one step, without the leading frame axis.

    Attributes:
        shape: shape of one step, `()` for a scalar.
        dtype: NumPy name, for example `float32`.
        unit: SI unit, `rad`, `m`, or `` where there is none.
        names: one name per element of the last axis (joint names, for instance); empty when unnamed.
        low, high: bounds per element; empty when unbounded or unknown.
        privileged: known to the simulator only; never an input of a policy unless asked for by name.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: str = ""
    names: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    privileged: bool = False

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ArraySpec":
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)

    def check(self, name: str, array: np.ndarray, leading: int = 1) -> None:
        """Raise InputError unless `array` has `leading` free axes, then this spec's shape, and holds no NaN or inf."""
        if tuple(array.shape[leading:]) != self.shape:
            raise InputError(f"'{name}' has shape {tuple(array.shape[leading:])} per step; the spec says {self.shape}.")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0]
            raise InputError(
                f"'{name}' holds {array[tuple(bad)]} at index {tuple(int(i) for i in bad)}.\n"
                "Mend or drop this episode in the source; NaN is never learned from."
            )


@dataclasses.dataclass(frozen=True)
class ActionSpec(ArraySpec):
    """The action, with what it means to the controller.

    Attributes:
        control_mode: `joint_position_delta` (targets = the last joint targets + scale * action), `end_effector_delta`,
            `raw` (whatever the source's environment takes), ...
        scale: physical size of action 1.0 per element, in `unit`; empty for `raw`.
    """

    control_mode: str = "raw"
    scale: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What an EpisodeStore holds per frame.

    Attributes:
        observations: key -> spec of each `observation/<key>`, float32.
        images: camera -> spec of each `observation/images/<camera>`, uint8 (H, W, 3).
        action: None for action-free video.
        control_dt: seconds between two actions [s]; 0 when the source does not say.
        environment: identifier of the environment or robot, empty when unknown.
        has_reward: whether the source carries its own reward.
    """

    observations: dict[str, ArraySpec]
    images: dict[str, ArraySpec]
    action: ActionSpec | None
    control_dt: float = 0.0
    environment: str = ""
    has_reward: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "observations": {k: s.to_json() for k, s in self.observations.items()},
            "images": {k: s.to_json() for k, s in self.images.items()},
            "action": self.action.to_json() if self.action else None,
            "control_dt": self.control_dt,
            "environment": self.environment,
            "has_reward": self.has_reward,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DatasetSpec":
        return cls(
            observations={k: ArraySpec.from_json(s) for k, s in data["observations"].items()},
            images={k: ArraySpec.from_json(s) for k, s in data["images"].items()},
            action=ActionSpec.from_json(data["action"]) if data["action"] else None,  # type: ignore[arg-type]
            control_dt=data["control_dt"],
            environment=data["environment"],
            has_reward=data["has_reward"],
        )
