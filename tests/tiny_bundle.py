"""A small policy bundle with random weights, for tests that need one. Put this folder on `sys.path` to import it."""

from pathlib import Path

import numpy as np
import torch

from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies.bundle import PolicyContract, save_policy
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, generators

JOINTS = tuple(f"joint{i + 1}" for i in range(7))


def tiny_contract(joints: tuple[str, ...] = JOINTS, cameras: tuple[str, ...] = ("wrist",)) -> PolicyContract:
    """Joint position, velocity and gripper of `joints`, cameras of 64 x 64, joint deltas of 0.1 rad, 10 Hz."""
    n = len(joints)
    observations = {
        "joint_position": ArraySpec((n,), unit="rad", names=joints),
        "joint_velocity": ArraySpec((n,), unit="rad/s", names=joints),
        "gripper_position": ArraySpec((1,), unit="m"),
    }
    normalizer = {
        key: {"mean": np.full(spec.shape, 0.1, np.float32), "std": np.full(spec.shape, 0.5, np.float32)}
        for key, spec in observations.items()
    }
    for camera in cameras:
        normalizer[f"images/{camera}"] = {"mean": np.zeros(16, np.float32), "std": np.ones(16, np.float32)}
    action = ActionSpec(
        (n + 1,),
        unit="rad",
        names=(*joints, "gripper"),
        low=(-1.0,) * (n + 1),
        high=(1.0,) * (n + 1),
        control_mode="joint_position_delta",
        scale=(0.1,) * n + (1.0,),
    )
    images = {camera: ArraySpec((64, 64, 3), "uint8") for camera in cameras}
    return PolicyContract(observations, images, action, 0.1, normalizer, joints, "test")


def make_tiny_bundle(
    folder: Path,
    joints: tuple[str, ...] = JOINTS,
    cameras: tuple[str, ...] = ("wrist",),
    constant_action: np.ndarray | None = None,
) -> Path:
    """Write a bundle that acts at random, or always gives `constant_action` (A,) in (-1, 1)."""
    contract = tiny_contract(joints, cameras)
    size = 2 * len(joints) + 1 + 16 * len(cameras)
    actor = Actor(generators([0]), size, len(joints) + 1, (32,))
    if constant_action is not None:
        with torch.no_grad():
            last = actor.mlp.layers[-1]
            last.weight.zero_()
            last.bias.copy_(torch.atanh(torch.as_tensor(constant_action, dtype=torch.float32)))
    encoder = None
    if cameras:
        encoder = ImageEncoder(EncoderConfig(channels=(4, 4, 4), embedding_size=16), generators([1])[0])
    return save_policy(folder, actor.state_dict(), contract, {"algorithm": "test"}, {"made_by": "test"}, encoder)
