"""`embodied train`: a policy from a store's transitions, many seeds in one process, one bundle per seed."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import Setting, to_json, torch_device
from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.goals import REWARD, check_goal_flags, with_goals
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class TrainClone:
    """Train by behaviour cloning, several seeds at once, one policy bundle per seed; resumes what --out holds.

    Attributes:
        store: EpisodeStore to learn from.
        out: folder for bundles, metrics, checkpoint.
        encoder: of 'pretrain'; it sees its camera.
        keys: what it sees; empty: all a robot knows.
        stack: last observations the policy sees.
        goal: keys to reach, images/CAMERA too.
        hindsight: how: future 0.8 random 0.2 tolerance 0.01.
        seeds: how many policies.
        seed: of the first; the others follow.
        steps: gradient steps.
        preset: the learner's default by default.
        settings: changes to the preset: chunk 8 execute 4.
        device: cpu or cuda.
        vary: settings to try with all seeds: expectile 0.7,0.9.
        workers: processes on a CPU; 0: one per core.
        precision: fp32, or bf16 products where the CPU has them.
        log: tensorboard, wandb or trackio too.
    """

    store: Positional[Path]
    out: Path
    encoder: Path | None = None
    keys: tuple[str, ...] = ()
    stack: int = 1
    goal: tuple[str, ...] = ()
    hindsight: dict[str, float] = dataclasses.field(default_factory=dict)
    seeds: int = 5
    seed: int = 0
    steps: int = 5000
    preset: str | None = None
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    vary: dict[str, str] = dataclasses.field(default_factory=dict)
    workers: int = 0
    precision: str = "fp32"
    log: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainReward:
    """Train on the rewards of a label set, several seeds at once, one policy bundle per seed; resumes.

    Attributes:
        store: EpisodeStore to learn from.
        reward: label set, `source`, or `hindsight`.
        out: folder for bundles, metrics, checkpoint.
        encoder: of 'pretrain'; it sees its camera.
        keys: what it sees; empty: all a robot knows.
        stack: last observations the policy sees.
        goal: keys to reach, images/CAMERA too.
        hindsight: how: future 0.8 random 0.2 tolerance 0.01.
        seeds: how many policies.
        seed: of the first; the others follow.
        steps: gradient steps.
        preset: learned-reward (default), locomotion, antmaze, ...: docs/learners.md.
        settings: changes to the preset: discount 0.99.
        device: cpu or cuda.
        vary: settings to try with all seeds: expectile 0.7,0.9.
        workers: processes on a CPU; 0: one per core.
        precision: fp32, or bf16 products where the CPU has them.
        log: tensorboard, wandb or trackio too.
    """

    store: Positional[Path]
    reward: str
    out: Path
    encoder: Path | None = None
    keys: tuple[str, ...] = ()
    stack: int = 1
    goal: tuple[str, ...] = ()
    hindsight: dict[str, float] = dataclasses.field(default_factory=dict)
    seeds: int = 5
    seed: int = 0
    steps: int = 5000
    preset: str | None = None
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    vary: dict[str, str] = dataclasses.field(default_factory=dict)
    workers: int = 0
    precision: str = "fp32"
    log: tuple[str, ...] = ()


def touches(config: TrainClone | TrainReward) -> Touches:
    reads = [config.store, *([config.encoder] if config.encoder else [])]
    if isinstance(config, TrainReward) and config.reward not in ("source", REWARD):
        reads.append(config.store / "labels" / config.reward)
    return Touches(tuple(reads), (config.out,), resumable=True)


def train_bc(config: TrainClone, progress: Progress) -> dict[str, Any]:
    return run_training("bc", config, None, progress)


def train_flow(config: TrainClone, progress: Progress) -> dict[str, Any]:
    return run_training("flow", config, None, progress)


def train_iql(config: TrainReward, progress: Progress) -> dict[str, Any]:
    return run_training("iql", config, config.reward, progress)


def train_td3bc(config: TrainReward, progress: Progress) -> dict[str, Any]:
    return run_training("td3bc", config, config.reward, progress)


def train_rebrac(config: TrainReward, progress: Progress) -> dict[str, Any]:
    return run_training("rebrac", config, config.reward, progress)


def train_cql(config: TrainReward, progress: Progress) -> dict[str, Any]:
    return run_training("cql", config, config.reward, progress)


def run_training(
    learner: str, config: Any, reward: str | None, progress: Progress, model: Any = None
) -> dict[str, Any]:
    """Train by a learner of `policies.train.LEARNERS`; the verb's result.

    Args:
        config: of a verb: `TrainReward`, or another with its fields.
        model: what a model-based learner rolls out in.
    """
    from embodied.contracts.provenance import provenance
    from embodied.datasets.store import EpisodeStore
    from embodied.policies.bundle import load_value
    from embodied.policies.loop import read_metrics
    from embodied.policies.many import train_many
    from embodied.policies.train import make_config

    settings = make_config(learner, config.preset, config.settings)
    options = _options(config)
    goal, hindsight = getattr(config, "goal", ()), getattr(config, "hindsight", {})
    check_goal_flags(goal, hindsight, reward)
    cloning, reward = reward is None, None if goal else reward
    store = EpisodeStore(config.store)
    inputs = {"dataset": store.fingerprint}
    if reward not in (None, "source"):
        inputs[f"label/{reward}"] = hashlib.sha256(store.label(reward).score.tobytes()).hexdigest()
    if model is not None:
        inputs["dynamics"] = model.fingerprint
    value = load_value(config.encoder) if config.encoder else None
    if value is not None:
        inputs["encoder"] = value.fingerprint
    data, contract = learning_data(
        store,
        config.keys,
        reward,
        value,
        progress,
        settings.observation_normalization,
        getattr(config, "stack", 1),
        getattr(settings, "chunk", 1),
        getattr(settings, "execute", 1),
    )
    if goal:
        data, contract = with_goals(store, data, contract, goal, hindsight, cloning, settings.observation_normalization)
    if clipped := data.clipped_share():
        progress.say(f"{100 * clipped:.1f} % of the steps have an action outside [-1, 1], which is clipped to it")
    summary = train_many(
        learner,
        data,
        settings,
        list(range(config.seed, config.seed + config.seeds)),
        config.steps,
        config.out,
        contract=contract,
        encoder=value.encoder if value else None,
        provenance=provenance(f"train {learner}", to_json(config), inputs),
        progress=progress,
        device=torch_device(config.device),
        model=model,
        **options,
    )
    last = read_metrics(config.out)[-1]
    return {
        "out": str(config.out),
        "summary": str(summary),
        "transitions": len(data.frame),
        "clipped_share": clipped,
        "inputs": {
            "observations": list(contract.observations),
            "cameras": list(contract.images),
            **({"goal": list(contract.goal)} if goal else {}),
        },
        "last": {name: float(np.mean(values)) for name, values in last.items()},
    }


def _options(config: Any) -> dict[str, Any]:
    """What a verb says about how to run, for `train_many`; refused before any data is read."""
    from embodied.policies.loggers import check
    from embodied.policies.relu_network import set_precision

    precision, log = getattr(config, "precision", "fp32"), getattr(config, "log", ())
    set_precision(precision, torch_device(config.device))
    check(log)
    vary = {name: _numbers(name, text) for name, text in getattr(config, "vary", {}).items()}
    return {"vary": vary, "workers": getattr(config, "workers", 0), "precision": precision, "log": log}


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in str(text).strip("[]() ").split(",")]
    except ValueError:
        raise ConfigError(f"--vary {name}: expected numbers such as 0.7,0.8,0.9; found '{text}'.") from None


def learning_data(
    store: Any,
    keys: tuple[str, ...],
    reward: str | None,
    value: Any,
    progress: Progress,
    normalization: str = "standard",
    stack: int = 1,
    chunk: int = 1,
    execute: int = 1,
) -> tuple:
    """A store's transitions in memory, normalised, and the contract of a policy that learns from them.

    Args:
        keys: observation keys in the order the network takes them; empty: all that are not privileged.
        reward: label set, `source` or None.
        value: `ValueBundle` whose frozen encoder sees the camera it was trained on, or None.
        normalization: of the observations, as the learner's configuration names it.
        stack, chunk, execute: see `PolicyContract`; observations and actions are then (F, stack * D), (F, chunk * A).

    Returns:
        (`TransitionData`, `PolicyContract`).
    """
    from embodied.datasets.transitions import observation_matrix, transitions
    from embodied.policies.encode import encode_frames
    from embodied.policies.history import chunk_actions, stack_observations
    from embodied.policies.train import TransitionData, policy_inputs

    spec = store.spec
    if spec.action is None:
        raise InputError(f"{store.path} has no actions; a policy cannot be trained on it. 'embodied pretrain' can.")
    keys = keys or tuple(key for key, array in spec.observations.items() if not array.privileged)
    for key in keys:
        if key not in spec.observations:
            raise InputError(f"--keys: {store.path} has no observation '{key}'.{suggest(key, spec.observations)}")
    seen, embeddings = np.ones(store.num_episodes, bool), {}
    if value is not None:
        camera = value.contract["camera"]
        embeddings[camera] = encode_frames(value, store, camera, progress=progress)
        seen = store.has_camera(camera)
        if unseen := int((~seen).sum()):
            progress.say(f"{unseen} episodes have no pictures of '{camera}' and are left out")
    if not keys and not embeddings:
        raise InputError(f"{store.path} has no observation that a robot could know; give --encoder or --keys.")
    joints = spec.observations["joint_position"].names if "joint_position" in spec.observations else ()
    values = {key: observation_matrix(store, [key]) for key in keys}
    rows = None if seen.all() else np.flatnonzero(np.repeat(seen, store.episode_length))
    observations, contract = policy_inputs(spec, values, embeddings, joints, rows, normalization)
    contract = dataclasses.replace(contract, stack=stack, chunk=chunk, execute=execute)
    index = transitions(store, reward).of_episodes(np.flatnonzero(seen))
    data = TransitionData(
        observations=stack_observations(observations, store, stack),
        actions=chunk_actions(store.read("action"), index, chunk),
        frame=index.frame,
        next_frame=index.next_frame,
        reward=index.reward,
        masks=index.masks,
        episode=index.episode,
    )
    return data, contract
