"""ICVF: a value V(s, g, z) of reaching outcome g while acting as one who wants z, from video without actions.

Ghosh, Bhateja, Levine 2023 ("Reinforcement Learning from Passive Data via Latent Intentions"); equations and order
after `icvf_learner.py`, `icvf_networks.py` and `gc_dataset.py` of its release. Policies use the encoder afterwards.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import InputError
from embodied.datasets.draws import Stream, philox
from embodied.datasets.prefetch import Prefetcher
from embodied.policies.bundle import save_value
from embodied.policies.configure import Count, Positive, Share, Sizes, WholeNumber
from embodied.policies.loop import (
    Adam,
    Progress,
    load_module,
    module_tensors,
    run_loop,
    update_target,
)
from embodied.policies.losses import icvf_advantage, icvf_loss, success_reward, td_target
from embodied.policies.networks import EncoderConfig, ImageEncoder, MultilinearValue, generators


@dataclasses.dataclass(frozen=True)
class ICVFConfig:
    """Attributes:
    discount, expectile, target_update_rate: of the value.
    learning_rate, epsilon: of Adam.
    batch_size: B.
    hidden_sizes: of phi, psi and T; 256 costs a third more time per step than 128.
    heads: J value heads over the one encoder.
    layer_norm: in the heads.
    crop_pad: independent random crops of s, s', g and z after padding by this many pixels; 0 for none.
    encoder: of images; unused for states.
    """

    discount: Share = 0.98
    expectile: Share = 0.9
    target_update_rate: Share = 0.02
    learning_rate: Positive = 1e-3
    epsilon: Positive = 1e-8
    batch_size: Count = 64
    hidden_sizes: Sizes = (128, 128)
    heads: Count = 2
    layer_norm: bool = False
    crop_pad: WholeNumber = 0
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)


PRESETS: dict[str, ICVFConfig] = {
    # Thousands of steps on a CPU: the published learning and target rates hardly move V in that time.
    "short": ICVFConfig(),
    "paper-images": ICVFConfig(
        0.99, target_update_rate=0.005, learning_rate=5e-5, epsilon=3.125e-4, hidden_sizes=(256, 256)
    ),  # a million steps
    "paper-states": ICVFConfig(
        0.99, target_update_rate=0.005, learning_rate=3e-4, batch_size=256, hidden_sizes=(256, 256)
    ),
}


class Frames(Protocol):
    """Frames (F, H, W, 3) or states (F, D): an array, or for instance `embodied.datasets.resident.ResidentFrames`."""

    shape: Any
    dtype: Any
    ndim: Any

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


class Sampler(Protocol):
    """Goals and intents, for instance `embodied.datasets.goals.GoalSampler`."""

    def sample(self, step: int, batch: int) -> Mapping[str, np.ndarray]:
        """frame, next_frame, goal, intent: (B,) int64 each, a function of the step alone."""
        ...


class ICVFNetwork(torch.nn.Module):
    """Encoder (identity for states) and value heads."""

    def __init__(self, config: ICVFConfig, seed: int, state_size: int | None) -> None:
        super().__init__()
        generator = generators([seed])[0]
        self.encoder: torch.nn.Module = torch.nn.Identity()
        if state_size is None:
            self.encoder = ImageEncoder(config.encoder, generator)
        size = config.encoder.embedding_size if state_size is None else state_size
        self.heads = MultilinearValue(generator, size, config.hidden_sizes, config.heads, config.layer_norm)


class ICVF:
    """Online and target network, one optimiser."""

    def __init__(self, config: ICVFConfig, seed: int, state_size: int | None = None, device: str = "cpu") -> None:
        """`state_size` None: images. Otherwise states (F, state_size), without an encoder."""
        self.config = config
        self.online = ICVFNetwork(config, seed, state_size).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = Adam(self.online, config.learning_rate, config.epsilon)

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch and what to log.

        Reads: online network for V(s, g, z); target network for both bootstraps and the whole advantage.

        Args:
            batch: `observations` (U, ...), the first `online` of which are all that s, g and z need; `rows` (4, B)
                positions in it of s, s', g, z; `frame`, `goal`, `intent` (B,) dataset indices: equality is success.
        """
        discount = self.config.discount
        s, s_next, g, z = batch["rows"]
        target = self.target.heads
        with torch.no_grad():
            x = self.target.encoder(batch["observations"])  # (U, D)
            phi, phi_next = target.state(x[s]), target.state(x[s_next])  # (J, B, d)
            psi_g, psi_z = target.outcome(x[g]), target.outcome(x[z])
            t = target.transition(psi_z)
            reward_g, mask_g = success_reward(batch["frame"], batch["goal"], x.dtype)  # (B,)
            reward_z, mask_z = success_reward(batch["frame"], batch["intent"], x.dtype)
            y = td_target(reward_g, mask_g, target.combine(phi_next, psi_g, t), discount)  # (J, B)
            next_value_z, value_z = target.combine(phi_next, psi_z, t), target.combine(phi, psi_z, t)
            advantage = icvf_advantage(reward_z, mask_z, next_value_z, value_z, discount)  # (B,)
        x = self.online.encoder(batch["observations"][: batch["online"]])
        value = self.online.heads(x[s], x[g], x[z])  # (J, B)
        loss = icvf_loss(value, y, advantage, self.config.expectile)
        metrics = {
            "loss": loss.detach(),
            "value": value.detach().mean(),
            "advantage": advantage.mean(),
            "advantage_positive": (advantage >= 0).to(x.dtype).mean(),
        }
        return loss, metrics

    def update(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """One step: gradient at the old weights, target from the *old* online weights (as released), then Adam."""
        loss, metrics = self.loss(batch)
        gradients = torch.autograd.grad(loss, list(self.online.parameters()))
        update_target(self.target, self.online, self.config.target_update_rate)
        self.optimizer.step(list(gradients))
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        return (
            module_tensors("online", self.online)
            | module_tensors("target", self.target)
            | self.optimizer.tensors("optimizer")
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_module("online", self.online, state)
        load_module("target", self.target, state)
        self.optimizer.load("optimizer", state)


def gather(
    observations: Frames,
    indices: Mapping[str, np.ndarray],
    crop_pad: int = 0,
    rng: np.random.Generator | None = None,
) -> dict[str, Any]:
    """The batch of `ICVF.loss` from frames (F, H, W, 3) or states (F, D) and sampled indices.

    Without augmentation every frame is taken once, however often it occurs as s, s', g or z: a quarter less to encode.
    With it, s, s', g and z are cropped independently, even where they are the same frame.
    """
    order = [indices[name] for name in ("frame", "goal", "intent", "next_frame")]
    size = len(order[0])
    flat = np.concatenate(order)  # (4B,)
    if crop_pad:
        assert rng is not None
        online, rows = 3 * size, np.arange(4 * size)
        images = _crop(observations, flat, crop_pad, rng)
    else:
        first, rows_first = np.unique(flat[: 3 * size], return_inverse=True)
        only_next = np.setdiff1d(flat[3 * size :], first)
        taken = np.concatenate([first, only_next])
        position = np.argsort(taken)
        rows_next = position[np.searchsorted(taken, flat[3 * size :], sorter=position)]
        online, rows = len(first), np.concatenate([rows_first.reshape(-1), rows_next])
        images = observations[taken]
    frame, goal, intent, next_frame = rows.reshape(4, size)
    batch = {name: torch.from_numpy(np.asarray(indices[name])) for name in ("frame", "goal", "intent")}
    batch["observations"] = torch.from_numpy(np.ascontiguousarray(images))
    batch["rows"] = torch.from_numpy(np.stack([frame, next_frame, goal, intent]).astype(np.int64))
    return {**batch, "online": online}


def _crop(frames: Frames, index: np.ndarray, pad: int, rng: np.random.Generator) -> np.ndarray:
    """frames[index] shifted by up to `pad` pixels each way, edges repeated: (N, H, W, 3)."""
    height, width = frames.shape[1:3]
    shift = rng.integers(0, 2 * pad + 1, (len(index), 2))
    padded = np.pad(frames[index], ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    out = np.empty((len(index), *frames.shape[1:]), frames.dtype)
    for n, (y, x) in enumerate(shift):
        out[n] = padded[n, y : y + height, x : x + width]
    return out


def pretrain(
    observations: Frames,
    sampler: Sampler,
    config: ICVFConfig,
    seed: int,
    steps: int,
    out: str | Path,
    contract: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    log_every: int = 50,
    checkpoint_every: int = 500,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Path:
    """Train an ICVF and write `<out>/bundle`, `<out>/metrics.jsonl` and a checkpoint; resumes what `out` holds.

    Args:
        observations: (F, H, W, 3) uint8 frames (see `ResidentFrames`) or (F, D) float32 states.
        sampler: indices of s, s', g, z for each step.
        contract: kept in the bundle, for instance {"camera": ..., "dataset": ...}.
        provenance: kept in the bundle; a checkpoint made from other `inputs` in it is refused.
        progress: called with (done, total, text) at each log.

    Returns:
        The folder of the value bundle.
    """
    out = Path(out)
    images = observations.ndim == 4
    if (observations.dtype == np.uint8) != images:
        found = f"{observations.dtype} of {observations.ndim} axes"
        raise InputError(f"Expected uint8 frames (F, H, W, 3) or float32 states (F, D); found {found}.")
    if images:
        encoder_config = dataclasses.replace(config.encoder, image_size=observations.shape[1:3])
        config = dataclasses.replace(config, encoder=encoder_config)
    learner = ICVF(config, seed, None if images else observations.shape[1], device)

    def batch(step: int) -> dict[str, Any]:
        indices = sampler.sample(step, config.batch_size)
        rng = philox(seed, step, Stream.CROPS) if config.crop_pad else None
        return gather(observations, indices, config.crop_pad if images else 0, rng)

    record = {**(provenance or {}), "seed": seed, "steps": steps}
    identity = {
        "learner": "icvf",
        "config": dataclasses.asdict(config),
        "seed": seed,
        "steps": steps,
        "data": _signature(observations),
        "inputs": record.get("inputs", {}),
        "first_batch": {k: np.asarray(v).tolist() for k, v in sampler.sample(0, 8).items()},
    }
    with Prefetcher(batch, steps, device=device) as batches:
        run_loop(learner, batches, steps, out, identity, log_every, checkpoint_every, progress)
    learner.online.cpu()
    encoder = learner.online.encoder
    kept = encoder if isinstance(encoder, ImageEncoder) else None
    settings = dataclasses.asdict(config)
    return save_value(out / "bundle", learner.online.heads, kept, contract or {}, settings, record, overwrite=True)


def _signature(array: Frames) -> str:
    """Tells two datasets apart without reading all frames: shape, and up to 256 evenly spaced rows."""
    digest = hashlib.sha256(str((array.shape, array.dtype.str)).encode())
    rows = np.unique(np.linspace(0, len(array) - 1, 256).astype(np.int64))
    digest.update(np.ascontiguousarray(array[rows]).data)
    return digest.hexdigest()
