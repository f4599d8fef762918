"""Train a learner on transitions, many seeds in one process, and write one bundle per seed."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.goals import Goals
from embodied.datasets.resident import transition_batches
from embodied.policies import bc, cql, edac, flow_bc, iql, mbrcsl, mopo, ravl, rebrac, td3bc
from embodied.policies.bundle import PolicyContract, save_policy
from embodied.policies.configure import configure
from embodied.policies.critics import with_support
from embodied.policies.hindsight import settle, towards_the_end
from embodied.policies.loggers import loggers
from embodied.policies.loop import Progress, run_loop
from embodied.policies.networks import ImageEncoder
from embodied.policies.normalize import apply_statistics, fit_statistics, normalize_rewards
from embodied.policies.probe import Probe, watches
from embodied.policies.relu_network import set_precision
from embodied.policies.returns import returns_to_go
from embodied.policies.rollouts import roll_out

# name -> learner, its configuration, its presets, the preset used when none is named
LEARNERS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "bc": (bc.BC, bc.BCConfig, bc.PRESETS, bc.DEFAULT_PRESET),
    "flow": (flow_bc.FlowBC, flow_bc.FlowBCConfig, flow_bc.PRESETS, flow_bc.DEFAULT_PRESET),
    "iql": (iql.IQL, iql.IQLConfig, iql.PRESETS, iql.DEFAULT_PRESET),
    "td3bc": (td3bc.TD3BC, td3bc.TD3BCConfig, td3bc.PRESETS, td3bc.DEFAULT_PRESET),
    "rebrac": (rebrac.ReBRAC, rebrac.ReBRACConfig, rebrac.PRESETS, rebrac.DEFAULT_PRESET),
    "cql": (cql.CQL, cql.CQLConfig, cql.PRESETS, cql.DEFAULT_PRESET),
    "edac": (edac.EDAC, edac.EDACConfig, edac.PRESETS, edac.DEFAULT_PRESET),
    "ravl": (ravl.RAVL, ravl.RAVLConfig, ravl.PRESETS, ravl.DEFAULT_PRESET),
    "mbrcsl": (mbrcsl.MBRCSL, mbrcsl.MBRCSLConfig, mbrcsl.PRESETS, mbrcsl.DEFAULT_PRESET),
    "mopo": (mopo.MOPO, mopo.MOPOConfig, mopo.PRESETS, mopo.DEFAULT_PRESET),
}


@dataclasses.dataclass(frozen=True)
class TransitionData:
    """Transitions as indices into frames, resident in memory.

    Attributes:
        observations: (F, D) float32, normalised: low-dimensional keys, then embeddings, in the contract's order.
        actions: (F, A) float32; learners clip them to [-1, 1], see `clipped_share`.
        frame, next_frame: (N,) int64 rows of the arrays above.
        reward: (N,) float32 as labelled; the learner's configuration says how it is normalised.
        masks: (N,) float32, 1 - terminated: what multiplies the bootstrap.
        episode: (N,) int64; needed by reward normalisation `return_range` only.
        goals: of goal-conditioned learning; the network's input ends with a goal, and rewards are made for it.
    """

    observations: np.ndarray
    actions: np.ndarray
    frame: np.ndarray
    next_frame: np.ndarray
    reward: np.ndarray
    masks: np.ndarray
    episode: np.ndarray | None = None
    goals: Goals | None = None

    @property
    def input_size(self) -> int:
        """Numbers that a policy takes: D, and those of a goal."""
        return self.observations.shape[1] + (0 if self.goals is None else self.goals.values.shape[1])

    def check(self) -> None:
        """Raise InputError unless shapes agree, indices are rows, and everything is finite."""
        if len(self.frame) == 0:
            raise InputError("There is no transition to train on.")
        if len(self.observations) != len(self.actions) or self.observations.ndim != 2 or self.actions.ndim != 2:
            raise InputError(
                f"Observations {self.observations.shape} and actions {self.actions.shape} must be (F, D) and (F, A)."
            )
        for name in ("next_frame", "reward", "masks", "episode"):
            value = getattr(self, name)
            if value is not None and value.shape != self.frame.shape:
                raise InputError(f"'{name}' has shape {value.shape}; there are {len(self.frame)} transitions.")
        for name in ("frame", "next_frame"):
            value = getattr(self, name)
            if value.min() < 0 or value.max() >= len(self.observations):
                raise InputError(f"'{name}' points outside the {len(self.observations)} frames.")
        for name in ("observations", "actions", "reward", "masks"):
            value = getattr(self, name)
            if not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise InputError(f"'{name}' holds NaN or inf in row {row}. Mend or drop it in the source.")
        if self.goals is not None and len(self.goals.values) != len(self.observations):
            raise InputError(f"There are goals of {len(self.goals.values)} frames and {len(self.observations)} frames.")
        if self.goals is not None and not np.isfinite(self.goals.values).all():
            raise InputError("The goals hold NaN or inf. Mend or drop it in the source.")

    def clipped_share(self) -> float:
        """Share of the transitions with an action outside [-1, 1]: what a policy learns there is not what was done."""
        return float((np.abs(self.actions[self.frame]) > 1.0).any(-1).mean())

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bytes."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Goals):
                digest.update(repr(value.hindsight).encode())
                value = np.concatenate([value.values, value.scale[None]])
            if value is not None:
                digest.update(f"{field.name}{value.shape}{value.dtype}".encode())
                digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()


def policy_inputs(
    spec: DatasetSpec,
    values: Mapping[str, np.ndarray],
    embeddings: Mapping[str, np.ndarray],
    joint_names: Sequence[str] = (),
    rows: np.ndarray | None = None,
    normalization: str = "standard",
) -> tuple[np.ndarray, PolicyContract]:
    """The network's input for every frame, and the contract that repeats it on the robot. One place fixes the order.

    Args:
        values: low-dimensional keys in the wanted order, (F, ...) each, SI units.
        embeddings: camera -> (F, E), from `encode_frames`.
        joint_names: of the joint keys; by default the names in the spec of the first key that has some.
        rows: frames the statistics are taken over (those trained on); all by default.
        normalization: of every key, see `fit_statistics`; embeddings and SI units stay as they are with `none`.

    Returns:
        (F, D) float32 normalised observations, and the contract.

    Raises:
        InputError: a key or camera the spec does not have, or a dataset without actions.
    """
    if spec.action is None:
        raise InputError("These episodes have no actions: they can be pre-trained on, not cloned or improved.")
    for name, known in [(k, spec.observations) for k in values] + [(c, spec.images) for c in embeddings]:
        if name not in known:
            raise InputError(f"The dataset has no '{name}'.{suggest(name, known)}")
    arrays = {**values, **{f"images/{camera}": array for camera, array in embeddings.items()}}
    seen = slice(None) if rows is None else rows
    normalizer = {key: fit_statistics(array[seen], normalization) for key, array in arrays.items()}
    columns = [apply_statistics(array.reshape(len(array), -1), normalizer[key]) for key, array in arrays.items()]
    if not joint_names:
        joint_names = next((spec.observations[key].names for key in values if spec.observations[key].names), ())
    contract = PolicyContract(
        observations={key: spec.observations[key] for key in values},
        images={camera: spec.images[camera] for camera in embeddings},
        action=spec.action,
        control_dt=spec.control_dt,
        normalizer=normalizer,
        joint_names=tuple(joint_names),
        environment=spec.environment,
    )
    return np.concatenate(columns, 1), contract


def make_config(learner: str, preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration of a learner: a preset, some fields replaced. ConfigError on an unknown name, with a hint."""
    _, _, presets, default = _find(learner)
    return configure(presets, preset or default, overrides or {}, learner)


def train(
    learner_name: str,
    data: TransitionData,
    config: Any,
    seeds: Sequence[int],
    steps: int,
    out: str | Path,
    contract: PolicyContract | None = None,
    encoder: ImageEncoder | None = None,
    provenance: Mapping[str, Any] | None = None,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    progress: Progress | None = None,
    device: str = "cpu",
    model: Any = None,
    precision: str = "fp32",
    log: Sequence[str] = (),
    run_names: Sequence[str] = (),
) -> Path:
    """Train `seeds` together for `steps` updates; resumes what `out` holds.

    Args:
        config: of the learner's own class, see `make_config`.
        contract, encoder: written into the bundles. Without a contract no bundle is written.
        provenance: dataset fingerprint, label set and so on; seed, steps and reward normalisation are added.
        progress: called with (done, total, text) at each log.
        precision: of products on a CPU, see `relu_network.set_precision`.
        log: tools that get the metrics too, see `loggers`; the runs are called `run_names`, by default as the bundles.
        model: what a model-based learner rolls out in, `Dynamics` or another `rollouts.Model`.

    Returns:
        `<out>/train.json`, which lists the bundles `<out>/seed_000/` ... and names `metrics.jsonl`.

    Raises:
        ConfigError, InputError: before anything is trained. TrainingError: the loss is not finite, or Q diverges.
    """
    out = Path(out)
    set_precision(precision, device)
    learner_class, config_class, _, _ = _find(learner_name)
    if not isinstance(config, config_class):
        raise ConfigError(f"{learner_name} takes a {config_class.__name__}; found {type(config).__name__}.")
    seeds = checked_seeds(seeds)
    data.check()
    if contract is not None and (wanted := (getattr(config, "chunk", 1), getattr(config, "execute", 1))) != (
        contract.chunk,
        contract.execute,
    ):
        raise ConfigError(
            f"chunk and execute are {wanted}, but the data were made for {(contract.chunk, contract.execute)}: "
            "they cannot be varied in one run."
        )
    reward, reward_record = data.reward, {"method": "unused"}
    needs_dynamics = getattr(learner_class, "needs_dynamics", False)
    if data.goals is not None:
        data, config, reward_record = settle(learner_name, data, config, needs_dynamics or model is not None)
    elif hasattr(config, "reward_normalization"):
        reward, reward_record = normalize_rewards(
            data.reward, config.reward_normalization, data.episode, config.reward_quantiles
        )
        config = with_support(config, reward, data)
    learner = learner_class(config, seeds, data.input_size, data.actions.shape[1], steps, device)
    if needs_dynamics:
        wrap = getattr(learner_class, "roll_out", roll_out)
        learner = wrap(learner, model, data, contract, reward_record, seeds, device)
    identity = {
        "learner": learner_name,
        "config": dataclasses.asdict(config),
        "seeds": seeds,
        "steps": steps,
        "data": data.fingerprint(),
        "precision": precision,
        **({"model": getattr(model, "fingerprint", "")} if model is not None else {}),
    }
    wanted, returns = getattr(learner, "optional_keys", ()), None
    if "returns" in wanted:
        returns = returns_to_go(reward, data.masks, data.frame, data.next_frame, config.discount)
    options: dict[str, Any] = {"returns": returns, "next_actions": "next_actions" in wanted, "goals": data.goals}
    options["discount"] = getattr(config, "discount", 0.0)
    with transition_batches(data, reward, seeds, config.batch_size, steps, device, **options) as batch:
        batch = learner.mixed(batch) if hasattr(learner, "mixed") else batch
        probe = None
        if watches(learner):
            seen = (data, reward) if data.goals is None else towards_the_end(data, config.discount)
            probe = Probe(learner, *seen, config.discount, len(seeds), device)
        with loggers(log, out, run_names or _names(seeds), dataclasses.asdict(config)) as write:
            run_loop(
                learner, batch, steps, out, identity, log_every, checkpoint_every, progress, probe=probe, log=write
            )
    names = []
    if contract is not None:
        record = {**(provenance or {}), "steps": steps, "reward_normalization": reward_record}
        settings = {"algorithm": learner_name, **dataclasses.asdict(config)}
        names = _save_bundles(out, learner, seeds, contract, settings, record, encoder)
    summary = {
        **identity,
        "reward_normalization": reward_record,
        "clipped_share": data.clipped_share(),
        "bundles": names,
        "metrics": "metrics.jsonl",
    }
    partial = out / "train.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    return partial.rename(out / "train.json")


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds; ConfigError unless they are distinct non-negative numbers."""
    numbers = [int(seed) for seed in seeds]
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise ConfigError(f"Seeds must be distinct non-negative numbers; found {numbers}.")
    return numbers


def _names(seeds: Sequence[int]) -> list[str]:
    return [f"seed_{seed:03d}" for seed in seeds]


def _save_bundles(
    out: Path,
    learner: Any,
    seeds: Sequence[int],
    contract: PolicyContract,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
    encoder: ImageEncoder | None,
) -> list[str]:
    """One bundle per seed; the names of their folders in `out`."""
    names = _names(seeds)
    for index, (seed, name) in enumerate(zip(seeds, names, strict=True)):
        actor = learner.actor_state(index)
        record = {**record, "seed": seed}
        kind: Any = getattr(learner, "actor_kind", None)
        kind = kind(index) if callable(kind) else kind
        save_policy(out / name, actor, contract, settings, record, encoder, overwrite=True, kind=kind)
    return names


def _find(learner: str) -> tuple[Any, Any, dict[str, Any], str]:
    if learner not in LEARNERS:
        raise ConfigError(f"Unknown learner '{learner}'.{suggest(learner, LEARNERS)}")
    return LEARNERS[learner]
