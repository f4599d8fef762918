"""Bundles: folders that hold everything needed to act, or to give frames a value. No training code, no pickle.

    config.json        kind, architecture, the learner's configuration
    model.safetensors  actor (or value heads) and image encoder
    contract.json      observation keys in order, cameras, action, control period, joint names, normaliser
    provenance.json    dataset, label set, code version, seed
    hashes.json        SHA-256 of the other four

A bundle appears whole or not at all. Loading refuses what does not match; it never falls back to "unnormalised".
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embodied.contracts.errors import BundleError, InputError
from embodied.contracts.provenance import hash_file
from embodied.contracts.specs import ArraySpec
from embodied.datasets.draws import Stream, philox
from embodied.policies.actors import FlowActor, ReturnActor, actor_settings, make_actor, observation_size
from embodied.policies.contract import PolicyContract
from embodied.policies.goal import GoalInput, Pursuer, read_goal
from embodied.policies.history import History
from embodied.policies.networks import EncoderConfig, ImageEncoder, MultilinearValue, generators

SCHEMA = 1
FILES = ("config.json", "contract.json", "model.safetensors", "provenance.json")


class BundlePolicy(Pursuer[GoalInput]):
    """A policy read from a bundle. `act` takes NumPy arrays and gives NumPy arrays."""

    def __init__(
        self,
        contract: PolicyContract,
        actor: nn.Module,
        encoder: ImageEncoder | None,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        where: str,
    ) -> None:
        self.contract = contract
        self.observation_spec = contract.observations
        self.image_spec = contract.images
        self.action_spec = contract.action
        self.control_dt = contract.control_dt
        self.config = config
        self.provenance = provenance
        self.execute = contract.execute
        self.goal_spec = contract.goal
        self._actor = actor.eval()
        self._encoder = encoder.eval() if encoder else None
        size = encoder.config.embedding_size if encoder else 0
        mean, std = contract.statistics(size, where)
        self._mean, self._std = torch.from_numpy(mean), torch.from_numpy(std)
        self._goal = GoalInput(contract, self._encoder, size, where)
        self.reset()

    def reset(self) -> None:
        """A new episode begins: forget what was seen and paid, and repeat the draws of an actor that draws."""
        self._history, self._asked = History(self.contract.stack), 0
        self._wanted = self._actor.target_return if isinstance(self._actor, ReturnActor) else 0.0

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """See one step without acting: a step that a former chunk covers. Only a stack of observations remembers it."""
        if self.contract.stack > 1:
            self._history.append(self._rows({key: np.asarray(value)[None] for key, value in observation.items()}))

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The actions for this step and those that follow.

        Args:
            observation: keys of `observation_spec` in SI units, and `images/<camera>` uint8 (H, W, 3). More is ignored.

        Returns:
            (chunk, A) float32 in [-1, 1], clipped: a Gaussian's mean, what a flow makes of its next noise, or what
            leads to the return still wanted.

        Raises:
            InputError: a key is missing, has another shape, or holds NaN, or a policy that pursues goals has none.
        """
        rows = self._rows({key: np.asarray(value)[None] for key, value in observation.items()})
        self._history.append(rows)
        chunk = self._infer(self._goal.append(self._history.stacked(), observation))[0]
        return chunk.reshape(self.contract.chunk, -1).numpy()

    def act_batch(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """First actions of B observations that stand alone: values (B, ...) -> actions (B, A).

        Raises:
            InputError: as `act`, or a policy that sees stacks or wants a return: one observation is not enough.
        """
        if isinstance(self._actor, ReturnActor):
            raise InputError("This policy follows the return still wanted in an episode; ask it step by step.")
        if self.contract.stack > 1:
            raise InputError(f"This policy sees the last {self.contract.stack} observations; ask it step by step.")
        actions = self._infer(self._goal.append(self._rows(observations), {}))
        return actions[:, : int(np.prod(self.action_spec.shape))].numpy()

    def _rows(self, observations: Mapping[str, np.ndarray]) -> Tensor:
        """(B, D) normalised input of single observations."""
        parts = [
            torch.from_numpy(value.reshape(len(value), -1).astype(np.float32, copy=False))
            for value in (_take(observations, key, spec) for key, spec in self.observation_spec.items())
        ]  # (B, D_key) each
        with torch.inference_mode():
            for camera, spec in self.image_spec.items():
                assert self._encoder is not None
                images = np.ascontiguousarray(_take(observations, f"images/{camera}", spec))  # (B, H, W, 3)
                parts.append(self._encoder(torch.from_numpy(images)))
            return (torch.cat(parts, -1) - self._mean) / self._std

    def _infer(self, x: Tensor) -> Tensor:
        """(B, N * D + G) -> (B, H * A) in [-1, 1]."""
        with torch.inference_mode():
            if isinstance(self._actor, FlowActor):
                shape, seed = (1, len(x), self._actor.size), self._actor.noise_seed
                noise = philox(seed, self._asked, Stream.FLOW_ACTING).standard_normal(shape, dtype=np.float32)
                self._asked += 1
                actions = self._actor.generate(x[None], torch.from_numpy(noise))
            elif isinstance(self._actor, ReturnActor):
                actions = self._actor(x[None], torch.full((1, len(x)), self._wanted))
                self._wanted -= self._actor.pays(x[None], actions).item()
            else:
                actions, _ = self._actor(x[None])
            return actions[0].clamp(-1.0, 1.0)


class ValueBundle:
    """An image encoder and ICVF value heads read from a bundle; or heads over states, when it was trained on states."""

    def __init__(
        self,
        heads: MultilinearValue,
        encoder: ImageEncoder | None,
        contract: Mapping[str, Any],
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.heads = heads.eval()
        self.encoder = encoder.eval() if encoder else None
        self.contract = contract
        self.config = config
        self.provenance = provenance
        self.fingerprint = fingerprint

    @property
    def embedding_size(self) -> int:
        return self.encoder.config.embedding_size if self.encoder else self.heads.feature_size

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Frames (B, H, W, 3) uint8 -> embeddings (B, D) float32; states (B, D) pass unchanged."""
        if self.encoder is None:
            return np.asarray(observations, np.float32)
        size = self.encoder.config.image_size
        if observations.dtype != np.uint8 or observations.shape[1:] != (*size, 3):
            raise InputError(
                f"This encoder takes uint8 frames of {size[0]}x{size[1]}x3; found {observations.dtype} "
                f"{'x'.join(map(str, observations.shape[1:]))}.\nPretrain on this camera, or use the one it knows."
            )
        with torch.inference_mode():
            return self.encoder(torch.from_numpy(np.ascontiguousarray(observations))).numpy()

    def value(self, state: np.ndarray, goal: np.ndarray, intent: np.ndarray | None = None) -> np.ndarray:
        """Mean over the heads of V(s, g, z): embeddings (B, D) from `encode` -> (B,). Without an intent, z = g."""
        s, g = torch.from_numpy(state), torch.from_numpy(goal)
        z = g if intent is None else torch.from_numpy(intent)
        with torch.inference_mode():
            return self.heads(s, g, z).mean(0).numpy()


def save_policy(
    folder: str | Path,
    actor: Mapping[str, Tensor],
    contract: PolicyContract,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    encoder: ImageEncoder | None = None,
    overwrite: bool = False,
    kind: Mapping[str, Any] | None = None,
) -> Path:
    """Write one policy bundle.

    Args:
        actor: state dict of an `Actor` with a stack of one (see `unstack`).
        config: the learner's configuration, for the reader; the network's sizes are taken from `actor`.
        encoder: required when the contract names cameras.
        overwrite: replace a bundle that stands there.
        kind: of actor and how it acts, see `actors.ACTORS`; by default an `Actor`.

    Raises:
        BundleError: the folder exists, the normaliser misses a key, or sizes disagree.
    """
    folder = Path(folder)
    sizes = _mlp_sizes(actor, "mlp.layers")
    _check_fit(contract, sizes, encoder, folder, actor_settings(kind, str(folder)))
    architecture = {"sizes": sizes, "encoder": dataclasses.asdict(encoder.config) if encoder else None}
    if kind is not None:
        architecture["actor"] = dict(kind)
    tensors = {f"actor.{k}": v for k, v in actor.items()} | _encoder_tensors(encoder)
    head = {"kind": "policy", "schema": SCHEMA, "architecture": architecture, "learner": dict(config)}
    return write_bundle(folder, head, contract.to_json(), tensors, provenance, overwrite)


def load_policy(folder: str | Path, threads: int = 1, goal: str | Path | None = None) -> BundlePolicy:
    """Read a policy bundle.

    Args:
        goal: file with what the policy is to reach, see `read_goal`.
        threads: torch threads of this process from here on. One is fastest for networks of this size, and the only
            number that keeps its latency when another process is busy.

    Raises:
        BundleError: missing or altered file, another kind of bundle, normaliser that does not cover a key, networks
            that do not take and give what the contract says. InputError: the goal is not one of this policy's.
    """
    folder = Path(folder)
    torch.set_num_threads(threads)
    with readable(folder):
        config, contract_json, tensors, provenance = read_bundle(folder, "policy")
        contract = PolicyContract.from_json(contract_json)
        sizes = config["architecture"]["sizes"]
        kind = actor_settings(config["architecture"].get("actor"), str(folder))
        actor = make_actor(kind, sizes)
        load_tensors(actor, tensors, "actor.", folder)
        encoder = _load_encoder(config, tensors, folder)
        _check_fit(contract, sizes, encoder, folder, kind)
        policy = BundlePolicy(contract, actor, encoder, config, provenance, str(folder))
    if goal is not None:
        policy.give_goals(read_goal(goal))
    return policy


def save_value(
    folder: str | Path,
    heads: MultilinearValue,
    encoder: ImageEncoder | None,
    contract: Mapping[str, Any],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a value bundle: ICVF heads and, for frames, their encoder. `contract` is kept as given (the camera)."""
    sizes = _mlp_sizes(heads.state_dict(), "phi.layers")
    architecture = {
        "sizes": sizes,
        "heads": heads.heads,
        "layer_norm": len(heads.phi.norms) > 0,
        "encoder": dataclasses.asdict(encoder.config) if encoder else None,
    }
    tensors = {f"heads.{k}": v for k, v in heads.state_dict().items()} | _encoder_tensors(encoder)
    head = {"kind": "value", "schema": SCHEMA, "architecture": architecture, "learner": dict(config)}
    return write_bundle(Path(folder), head, dict(contract), tensors, provenance, overwrite)


def load_value(folder: str | Path) -> ValueBundle:
    """Read a value bundle; also from the folder that `pretrain` wrote it into (`<folder>/bundle`)."""
    folder = Path(folder)
    if not (folder / "hashes.json").exists() and (folder / "bundle" / "hashes.json").exists():
        folder = folder / "bundle"
    with readable(folder):
        config, contract, tensors, provenance = read_bundle(folder, "value")
        shape = config["architecture"]
        heads = MultilinearValue(
            generators([0])[0], shape["sizes"][0], shape["sizes"][1:], shape["heads"], shape["layer_norm"]
        )
        load_tensors(heads, tensors, "heads.", folder)
        encoder = _load_encoder(config, tensors, folder)
        return ValueBundle(heads, encoder, contract, config, provenance, hash_file(folder / "model.safetensors"))


def unstack(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Entry `index` of a stacked state dict, as a stack of one, copied to the CPU."""
    return {key: value[index : index + 1].detach().cpu().clone() for key, value in state.items()}


def _check_fit(
    contract: PolicyContract, sizes: list[int], encoder: ImageEncoder | None, folder: Path, kind: Mapping[str, Any]
) -> None:
    """BundleError unless the networks take and give what the contract says. Holds when saving and when loading."""
    pictures = contract.images | {k.removeprefix("images/"): s for k, s in contract.goal.items() if "images/" in k}
    if pictures and encoder is None:
        raise BundleError(
            f"{folder}: the contract names cameras {list(pictures)}, but there is no encoder to see with."
        )
    for camera, spec in pictures.items():
        assert encoder is not None
        if spec.shape != (*encoder.config.image_size, 3):
            raise BundleError(
                f"{folder}: camera '{camera}' is {spec.shape}; the encoder takes {encoder.config.image_size}."
            )
    size = encoder.config.embedding_size if encoder else 0
    mean, goal = contract.statistics(size, str(folder))[0], contract.goal_statistics(size, str(folder))[0]
    actions, inputs = int(np.prod(contract.action.shape)) * contract.chunk, len(mean) * contract.stack + len(goal)
    taken = observation_size(kind, sizes)
    if taken != inputs or sizes[-1] != actions:
        raise BundleError(
            f"{folder}: the actor maps {taken} numbers to {sizes[-1]}; the contract says {inputs} to {actions}."
        )


def _take(observations: Mapping[str, np.ndarray], key: str, spec: ArraySpec) -> np.ndarray:
    if key not in observations:
        raise InputError(
            f"The observation lacks '{key}', which this policy was trained on. It has: {sorted(observations)}."
        )
    value = observations[key]
    spec.check(key, value)
    if spec.dtype == "uint8" and value.dtype != np.uint8:
        raise InputError(f"'{key}' is {value.dtype}; this policy takes uint8 images.")
    return value


def _mlp_sizes(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Input, hidden and output sizes of a StackedMLP, read off its weights."""
    weights = []
    while f"{prefix}.{len(weights)}.weight" in state:
        weights.append(state[f"{prefix}.{len(weights)}.weight"].shape)
    return [int(weights[0][1]), *(int(shape[2]) for shape in weights)]


def _encoder_tensors(encoder: ImageEncoder | None) -> dict[str, Tensor]:
    return {f"encoder.{k}": v for k, v in encoder.state_dict().items()} if encoder else {}


def _load_encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> ImageEncoder | None:
    shape = config["architecture"]["encoder"]
    if shape is None:
        return None
    encoder = ImageEncoder(EncoderConfig(tuple(shape["image_size"]), tuple(shape["channels"]), shape["embedding_size"]))
    load_tensors(encoder, tensors, "encoder.", folder)
    return encoder


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], prefix: str, folder: Path) -> None:
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise BundleError(f"{folder}: model.safetensors does not fit config.json: {reason}") from error


def write_bundle(
    folder: Path,
    config: Mapping[str, Any],
    contract: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    overwrite: bool,
) -> Path:
    """All files into a folder beside, flushed, then renamed."""
    if folder.exists() and not (overwrite and (folder / "hashes.json").is_file()):  # never replace what is no bundle
        raise BundleError(f"{folder} exists. Name another folder, or remove it first.")
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, value in (("config.json", config), ("contract.json", contract), ("provenance.json", provenance)):
            (partial / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / "model.safetensors")
        hashes = {name: hash_file(partial / name) for name in FILES}
        (partial / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own class
        shutil.rmtree(partial, ignore_errors=True)
        raise BundleError(f"{folder}: could not write the bundle: {error}.") from error
    return folder


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what damaged or foreign files cause inside the block into a BundleError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BundleError(
            f"{folder} cannot be read as a bundle: {type(error).__name__}: {error}.\n"
            "Copy the bundle again from where it was trained."
        ) from error


def read_bundle(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """config, contract, tensors, provenance, after every file's hash was compared."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder.")
    if not (folder / "hashes.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/hashes.json"))
        hint = f" Bundles in it: {', '.join(inner)}." if inner else ""
        raise BundleError(f"{folder} is not a bundle: it has no hashes.json.{hint}")
    hashes = _read_json(folder / "hashes.json")
    for name in FILES:
        if not (folder / name).is_file():
            raise BundleError(f"{folder}: {name} is missing. Copy the whole bundle again.")
        if hashes.get(name) != hash_file(folder / name):
            raise BundleError(
                f"{folder}: {name} was altered after the bundle was written: its SHA-256 is not that in hashes.json.\n"
                "Copy the bundle again from where it was trained."
            )
    config = _read_json(folder / "config.json")
    if config.get("kind") != kind:
        raise BundleError(f"{folder} is a {config.get('kind')} bundle; a {kind} bundle is needed here.")
    if config.get("schema") != SCHEMA:
        raise BundleError(f"{folder}: schema {config.get('schema')}; this version of embodied reads schema {SCHEMA}.")
    tensors = load_file(folder / "model.safetensors")
    return config, _read_json(folder / "contract.json"), tensors, _read_json(folder / "provenance.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error
