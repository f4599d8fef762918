"""`embodied train dynamics`: an ensemble that predicts what an action leads to, what it pays and whether it ends."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import Setting, to_json, torch_device
from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches

SUSPECT = 0.01  # share of the transitions where a rule may disagree with recorded ends before it is said aloud


@dataclasses.dataclass(frozen=True)
class TrainDynamics:
    """Train a probabilistic ensemble of the dynamics with a reward; writes one dynamics bundle per seed; resumes.

    Attributes:
        store: EpisodeStore to learn from.
        reward: label set whose reward the model predicts, or `source` for the store's own.
        out: folder to write: seed_000/ ... (bundles), metrics.jsonl, a checkpoint.
        keys: observation keys of the state; by default all that a real robot could know.
        termination: a rule's name (hopper, walker2d, ..., none), learned, or auto: by the environment's name.
        horizon: steps of the open-loop error.
        seeds: how many ensembles.
        seed: of the first; the others follow.
        preset: short (ours, for a CPU), edge-of-reach, offlinerl-kit.
        settings: changes to the preset, for example max_epochs 50 members 5.
        device: cpu or cuda.
    """

    store: Positional[Path]
    reward: str
    out: Path
    keys: tuple[str, ...] = ()
    termination: str = "auto"
    horizon: int = 5
    seeds: int = 1
    seed: int = 0
    preset: str = "short"
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    device: str = "cpu"


def touches(config: TrainDynamics) -> Touches:
    labels = [] if config.reward == "source" else [config.store / "labels" / config.reward]
    return Touches((config.store, *labels), (config.out,), resumable=True)


def train_dynamics(config: TrainDynamics, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import provenance
    from embodied.datasets.store import EpisodeStore
    from embodied.policies import dynamics
    from embodied.policies.configure import configure
    from embodied.policies.dynamics_bundle import input_contract, save_dynamics
    from embodied.policies.dynamics_evaluation import evaluate_dynamics
    from embodied.policies.dynamics_training import DynamicsTraining, run_training, split_rows
    from embodied.policies.terminations import LEARNED, choose, find_rule

    if config.seeds < 1 or config.seed < 0 or config.horizon < 1:
        raise InputError("--seeds and --horizon must be at least 1, and --seed at least 0.")
    settings = configure(dynamics.PRESETS, config.preset, config.settings, "train dynamics")
    store = EpisodeStore(config.store)
    data, contract = dynamics_data(store, config.keys, config.reward, progress)
    termination = config.termination
    if termination == "auto":
        termination = choose(contract.environment, bool(data.terminated.any()))
        progress.say(f"termination: {termination}")
    if termination != LEARNED:
        find_rule(termination, data.observations.shape[1])
    split = split_rows(data, settings)
    if not split.tested:
        progress.say(
            "too few episodes to keep some for testing: figures are of the holdout, which also chose when to stop"
        )
    seeds = list(range(config.seed, config.seed + config.seeds))
    device = torch_device(config.device)
    training = DynamicsTraining(settings, seeds, data, split, termination == LEARNED, device)
    inputs = {"dataset": store.fingerprint}
    if config.reward != "source":
        inputs[f"label/{config.reward}"] = hashlib.sha256(store.label(config.reward).score.tobytes()).hexdigest()
    identity = {
        "learner": "dynamics",
        "config": dataclasses.asdict(settings),
        "seeds": seeds,
        "inputs": inputs,
        "keys": list(contract.observations),
        "termination": termination,
    }
    run_training(training, config.out, identity, progress)
    contract = input_contract(contract, training.scales.to("cpu"))
    names = observation_names(contract)
    figures = {}
    for index, seed in enumerate(seeds):
        ensemble = training.dynamics(index, termination)
        found = evaluate_dynamics(ensemble, data.rows(split.test), config.horizon, names=names)
        found["evaluated_on"] = "test episodes" if split.tested else "holdout"
        found["epochs"] = training.epoch
        record = provenance("train dynamics", to_json(config), inputs, seed=seed)
        name = f"seed_{seed:03d}"
        save_dynamics(config.out / name, ensemble, settings, contract, config.reward, found, record, overwrite=True)
        figures[name] = found
    wrong = figures[f"seed_{seeds[0]:03d}"]["termination"]
    if wrong["only_rule"] + wrong["only_recorded"] > SUSPECT * len(split.test):
        progress.say(
            f"termination '{termination}' disagrees with the data in {wrong['only_rule'] + wrong['only_recorded']} of "
            f"{len(split.test)} transitions: is the observation in the environment's own units and order?"
        )
    return {
        "out": str(config.out),
        "transitions": len(data),
        "trained_on": len(split.train),
        "termination": termination,
        "bundles": figures,
    }


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['transitions']} transitions, {result['trained_on']} trained on; termination {result['termination']}"
    ]
    for name, found in result["bundles"].items():
        lines.append(f"{name}: {found['epochs']} epochs, figures of {found['evaluated_on']}")
        lines.append("  output                 rmse  / spread  inside 95 %")
        for output, row in found["outputs"].items():
            relative = "     -" if row["relative"] is None else f"{row['relative']:6.3f}"
            lines.append(f"  {output:18s} {row['rmse']:8.4g}    {relative}       {100 * row['coverage_95']:5.1f} %")
        if loop := found["open_loop"]:
            for step, (error, low, high, still) in enumerate(
                zip(loop["error"], loop["low"], loop["high"], loop["no_change"], strict=True), 1
            ):
                lines.append(
                    f"  {step} steps: error {error:.3f} [{low:.3f}, {high:.3f}]; if nothing changed {still:.3f}"
                )
    return "\n".join(lines)


def dynamics_data(store: Any, keys: tuple[str, ...], reward: str, progress: Progress) -> tuple:
    """A store's transitions in their own units, and the contract of what goes in: (`DynamicsData`, `PolicyContract`).

    A terminal step whose successor was not recorded is left out: its change of state is unknown.
    """
    from embodied.datasets.transitions import observation_matrix
    from embodied.policies.dynamics_training import DynamicsData
    from embodied.train import learning_data

    learned, contract = learning_data(store, keys, reward, None, progress)
    observations = observation_matrix(store, list(contract.observations))
    known = learned.next_frame != learned.frame
    if lost := int((~known).sum()):
        progress.say(f"{lost} terminal steps have no recorded successor and are left out")
    frame, following = learned.frame[known], learned.next_frame[known]
    if len(frame) == 0:
        raise InputError(f"{store.path} has no step with a recorded successor.")
    data = DynamicsData(
        observations=observations[frame],
        actions=np.clip(learned.actions[frame], -1.0, 1.0),
        rewards=learned.reward[known],
        next_observations=observations[following],
        terminated=learned.masks[known] == 0,
        episode=learned.episode[known],
        frame=frame,
    )
    return data, contract


def observation_names(contract: Any) -> tuple[str, ...]:
    """One name per number of the observation, `key.joint` or `key[i]`."""
    names: list[str] = []
    for key, spec in contract.observations.items():
        size = int(np.prod(spec.shape))
        named = spec.names if len(spec.names) == size else ()
        names += [f"{key}.{named[i]}" if named else f"{key}[{i}]" for i in range(size)]
    return tuple(names)
