"""The small robot, policy and profile that the benchmarks of the bridge drive: two joints, a gripper and a camera."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied.policies.bundle import load_policy, save_policy
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, generators

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from bridge_fixtures import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    PROFILE,
    SCENE_XML,
    write_bundle,
    write_profile,
    write_scene,
)

RATES = {"joint_states_hz": 200.0, "cameras_hz": 30.0}
FORWARD_TOPIC = "/forward_position_controller/commands"
REACH = 0.6  # of the joints' limits to either side of MIDDLE: less than the policy would swing [rad]
MIDDLE = np.array([0.1, -0.2])  # what the joints swing about [rad]


def swinging_bundle(folder: Path) -> Path:
    """A policy with a camera that swings both arm joints for ever, by about 0.9 rad to either side of MIDDLE.

    tanh(3 velocity - 3 (position - MIDDLE) + 0.3): it goes on in the direction in which it moves until it is too far
    out, and starts by itself from any position.
    """
    contract = load_policy(write_bundle(folder / "constant", np.zeros(3))).contract
    columns, start = {}, 0
    for key, spec in contract.observations.items():
        columns[key], start = start, start + int(np.prod(spec.shape))
    actor = Actor(generators([0]), start + 8, 3, (8,))
    first, last = actor.mlp.layers
    with torch.no_grad():
        for parameter in (*first.parameters(), *last.parameters()):
            parameter.zero_()
        for joint in range(2):
            for hidden, sign in ((2 * joint, 1.0), (2 * joint + 1, -1.0)):
                _weight(first)[columns["joint_velocity"] + joint, hidden] = 3.0 * sign
                _weight(first)[columns["joint_position"] + joint, hidden] = -3.0 * sign
                first.bias[..., hidden] = sign * (3.0 * float(MIDDLE[joint]) + 0.3)
                _weight(last)[hidden, joint] = sign
        last.bias[..., 2] = 1.0  # the gripper closes
    encoder = ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=8), generators([1])[0])
    return save_policy(
        folder / "bundle", actor.state_dict(), contract, {"algorithm": "test"}, {"made_by": "benchmark"}, encoder
    )


def _weight(layer: Any) -> torch.Tensor:
    """(in, out) of the only network in the stack."""
    return layer.weight[0]


def picture_scene(folder: Path, width: int, height: int) -> Path:
    """The scene with a camera of that size."""
    camera = {"eye": {"camera": "eye", "width": width, "height": height}}
    write_scene(folder, cameras=camera)
    size = f'offwidth="{width}" offheight="{height}"'
    (folder / "scene.xml").write_text(SCENE_XML.replace('offwidth="64" offheight="64"', size))
    return folder


def swinging_profile(path: Path, adapter: str, safety: dict[str, Any], **changes: Any) -> Path:
    """Joint states and safety at 200 Hz, the camera at 30 Hz; limits that the policy would exceed."""
    limits = {"finger": PROFILE["limits"]["finger"]}
    for joint, middle in zip(PROFILE["joints"], MIDDLE.tolist(), strict=True):
        position = [middle - REACH, middle + REACH]
        limits[joint] = {"position": position, "velocity": 0.7, "acceleration": 4.0, "jerk": 100.0, "max_step": 0.3}
    topics = dict(PROFILE["topics"])
    if adapter == "forward_position":
        topics["command"] = FORWARD_TOPIC
    return write_profile(
        path,
        adapter=adapter,
        topics=topics,
        limits=limits,
        simulation=RATES,
        safety={"rate_hz": 200.0, **safety},
        **changes,
    )


def child_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
