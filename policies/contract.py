"""What a policy takes and gives, in words that travel with it: keys, order, units, rate, windows, normaliser."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import BundleError
from embodied.contracts.specs import ActionSpec, ArraySpec

WINDOWS = ("stack", "chunk", "execute")


@dataclasses.dataclass(frozen=True)
class PolicyContract:
    """What a policy takes and gives.

    Attributes:
        observations: low-dimensional keys in the order the network takes them.
        images: camera -> spec (H, W, 3) uint8; their embeddings follow the observations, in this order.
        action: names, unit, scale, control mode of the action.
        control_dt: period of the policy [s].
        normalizer: key -> {"mean", "std"}, each (D,) float32. Covers every observation key, and `images/<camera>` for
            the embedding of every camera; keys of the goal too.
        joint_names: joints of the robot in the order of the joint keys.
        environment: where the data came from; empty when unknown.
        stack: N, observations the network sees: the last N, oldest first, each normalised; at the start of an episode
            its first is repeated.
        chunk: H, actions that one inference gives: for now and the steps that follow. Trained on episodes padded with
            their last action; no chunk crosses an episode's end.
        execute: how many of a chunk are executed before the policy is asked again (receding horizon), at most H.
        goal: key -> spec of what the policy is to reach, in the order the network takes it, after the newest
            observation. Keys are observation keys, seen or not, and `images/<camera>`. Empty: it is told no goal.
    """

    observations: dict[str, ArraySpec]
    images: dict[str, ArraySpec]
    action: ActionSpec
    control_dt: float
    normalizer: dict[str, dict[str, np.ndarray]]
    joint_names: tuple[str, ...] = ()
    environment: str = ""
    stack: int = 1
    chunk: int = 1
    execute: int = 1
    goal: dict[str, ArraySpec] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stack < 1 or not 1 <= self.execute <= self.chunk:
            raise BundleError(
                f"A policy needs stack >= 1 and 1 <= execute <= chunk; found stack {self.stack}, "
                f"execute {self.execute}, chunk {self.chunk}."
            )

    def to_json(self) -> dict[str, Any]:
        return {
            # Lists, not objects: the order is part of the contract and must survive any JSON tool.
            "observations": [{"key": k, "spec": s.to_json()} for k, s in self.observations.items()],
            "images": [{"camera": k, "spec": s.to_json()} for k, s in self.images.items()],
            "action": self.action.to_json(),
            "control_dt": self.control_dt,
            "joint_names": list(self.joint_names),
            "environment": self.environment,
            # Left out where they are 1: such a bundle is read by versions that know no stacks or chunks.
            **{name: value for name in WINDOWS if (value := getattr(self, name)) != 1},
            **({"goal": [{"key": k, "spec": s.to_json()} for k, s in self.goal.items()]} if self.goal else {}),
            "normalizer": {
                key: {name: np.asarray(value, np.float32).ravel().tolist() for name, value in statistics.items()}
                for key, statistics in self.normalizer.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PolicyContract":
        return cls(
            observations={item["key"]: ArraySpec.from_json(item["spec"]) for item in data["observations"]},
            images={item["camera"]: ArraySpec.from_json(item["spec"]) for item in data["images"]},
            action=ActionSpec.from_json(data["action"]),  # type: ignore[arg-type]
            control_dt=float(data["control_dt"]),
            joint_names=tuple(data["joint_names"]),
            environment=data["environment"],
            **{name: int(data.get(name, 1)) for name in WINDOWS},
            goal={item["key"]: ArraySpec.from_json(item["spec"]) for item in data.get("goal", [])},
            normalizer={
                key: {name: np.asarray(value, np.float32) for name, value in statistics.items()}
                for key, statistics in data["normalizer"].items()
            },
        )

    def statistics(self, embedding_size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of one observation as the network takes it, (D,) each.

        Raises:
            BundleError: names the key that is missing or misfits.
        """
        images = {f"images/{camera}": spec for camera, spec in self.images.items()}
        return self._statistics({**self.observations, **images}, embedding_size, where)

    def goal_statistics(self, embedding_size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of the goal as the network takes it, (G,) each; BundleError as `statistics`."""
        return self._statistics(self.goal, embedding_size, where)

    def _statistics(
        self, specs: Mapping[str, ArraySpec], embedding_size: int, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        rows: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] for name in ("mean", "std")}
        for key, size in input_sizes(specs, embedding_size).items():
            if key not in self.normalizer:
                raise BundleError(
                    f"{where}: the normaliser has no statistics for '{key}'; unnormalised input is never passed on.\n"
                    "Train again, or copy the bundle anew from where it was trained."
                )
            for name, row in rows.items():
                value = self.normalizer[key].get(name, np.empty(0))
                if value.shape != (size,) or not np.isfinite(value).all() or (name == "std" and (value <= 0).any()):
                    raise BundleError(f"{where}: the normaliser's {name} of '{key}' must be {size} finite numbers.")
                row.append(value)
        return np.concatenate(rows["mean"]), np.concatenate(rows["std"])


def input_sizes(specs: Mapping[str, ArraySpec], embedding_size: int) -> dict[str, int]:
    """How many numbers each key is to a network; pictures (`images/<camera>`) are embeddings."""
    return {
        key: embedding_size if key.startswith("images/") else int(np.prod(spec.shape)) for key, spec in specs.items()
    }
