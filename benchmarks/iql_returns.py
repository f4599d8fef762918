"""What IQL's policies earn, ours beside CORL's: the same transitions, seeds, settings, updates and initial states.

    python benchmarks/iql_returns.py --data hopper-replay.hdf5 --corl iql.py     # 20,000 updates, five seeds
    python benchmarks/iql_returns.py --data hopper-replay.hdf5 --corl iql.py --steps 200 --seeds 2 --episodes 2 --dry
    embodied sim collect robosuite/Lift lift.zarr --cameras
    python benchmarks/iql_returns.py --data lift.zarr --corl iql.py

A run is one seed of one implementation: ours with products in fp32 and (where the CPU has it) in bf16, and
algorithms/offline/iql.py of CORL, fetched by whoever measures. Each is a process of its own with one thread, --parallel
at a time, seed by seed; what a run earned is kept under --work, so a killed command goes on. Batches are each
implementation's own, and so are first weights: ours orthogonal, as the authors', CORL's `torch.nn.Linear`'s. The arm
`ours_uniform`, in fp32, starts as CORL does: what is left between these two is the implementation.

Data: D4RL layout of Gymnasium's --env; or a store that `sim collect` made: the keys that a robot would see in one row,
a step paid by the simulator's shaped reward of its next frame, episodes judged in that simulator. Observations are
(x - mean) / (std + 0.001), rewards 1000 r / (largest - smallest return of a complete episode), as CORL does; for both
expectile 0.7, inverse temperature 3, discount 0.99, targets 0.005, batch 256, two layers of 256, Adam at 3e-4, the
actor's along a cosine to 0. Evaluated once, after the last update: the mean action from --episodes initial states,
seeds 10,000 and up, undiscounted returns.

The result holds every seed's mean return, and the probability that a run of the first earns more than one of the second
(ties one half) with its 95 % bootstrap interval over seeds, as `embodied compare` computes it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
from iql_peers import corl_trainer
from record import write_result

from embodied.compare_aggregate import improvement
from embodied.contracts.errors import ConfigError
from embodied.contracts.provenance import hash_json
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.store import EpisodeStore
from embodied.policies.bundle import load_policy
from embodied.policies.contract import PolicyContract
from embodied.policies.iql import IQLConfig
from embodied.policies.relu_network import set_precision
from embodied.policies.train import TransitionData, train
from embodied.sim.rollout import cached_environment, rollout
from embodied.sim.suites import true_reward

ARMS = {  # precision, initialization
    "ours_fp32": ("fp32", "orthogonal"),
    "ours_bf16": ("bf16", "orthogonal"),
    "ours_uniform": ("fp32", "uniform"),
}
FIRST_STATE = 10_000
HORIZON = 1000
Act = Callable[[np.ndarray], np.ndarray]


KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def seen(spec: DatasetSpec) -> list[str]:
    """The keys that a robot would see."""
    return [key for key, array in spec.observations.items() if not array.privileged]


def recorded(path: str) -> dict[str, np.ndarray]:
    """KEYS of a file in D4RL's layout, or of a store."""
    if not Path(path).is_dir():
        with h5py.File(path) as file:
            return {key: np.asarray(file[key]) for key in KEYS}
    store = EpisodeStore(path)
    frames = np.concatenate(
        [store.read(f"observation/{key}").reshape(store.num_frames, -1) for key in seen(store.spec)], 1
    )
    begins = np.flatnonzero(store.read("step_valid"))
    rewards = true_reward(store.spec.environment, store)[begins + 1]
    ends = [store.read(name)[begins] for name in ("terminated", "truncated")]
    rows = (frames[begins], store.read("action")[begins], rewards, frames[begins + 1], *ends)
    return dict(zip(KEYS, rows, strict=True))


def transitions(path: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The arrays as both are given them, and mean and scale of the observations."""
    data = recorded(path)
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    returns = [float(part.sum(dtype=np.float64)) for part in np.split(data["rewards"], ends)[: len(ends)]]
    data["rewards"] = (data["rewards"] * (HORIZON / (max(returns) - min(returns)))).astype(np.float32)
    mean, scale = data["observations"].mean(0), data["observations"].std(0) + 1e-3
    for key in ("observations", "next_observations"):
        data[key] = ((data[key] - mean) / scale).astype(np.float32)
    data["terminals"] = data["terminals"].astype(np.float32)
    return data, mean.astype(np.float32), scale.astype(np.float32)


def ours(arguments: argparse.Namespace, arm: str, seed: int, folder: Path) -> Act:
    precision, initialization = ARMS[arm]
    data, mean, scale = transitions(arguments.data)
    count, size = data["observations"].shape
    rows = np.arange(count)
    arrays = TransitionData(
        np.concatenate([data["observations"], data["next_observations"]]),
        np.concatenate([data["actions"], np.zeros_like(data["actions"])]),
        rows,
        rows + count,  # a final observation begins no step
        data["rewards"],
        1.0 - data["terminals"],
    )
    contract = PolicyContract(
        {"state": ArraySpec((size,))},
        {},
        ActionSpec((data["actions"].shape[1],)),
        0.008,
        {"state": {"mean": mean, "std": scale}},
        environment=arguments.env,
    )
    config = IQLConfig(observation_normalization="none", reward_normalization="none", initialization=initialization)
    train("iql", arrays, config, [seed], arguments.steps, folder, contract, log_every=1000, precision=precision)
    policy = load_policy(folder / f"seed_{seed:03d}")
    return lambda observation: policy.act({"state": observation.astype(np.float32)})[0]


def corl(arguments: argparse.Namespace, seed: int) -> Act:
    data, mean, scale = transitions(arguments.data)
    update, actor = corl_trainer(arguments.corl, data, seed, arguments.steps)
    update(arguments.steps)
    actor.eval()
    return lambda observation: actor.act((observation - mean) / scale)


class Actor:
    """What drives an episode of `rollout`."""

    def __init__(self, act: Act, keys: list[str]) -> None:
        self._act, self._keys = act, keys

    def reset(self, seed: int) -> str:
        return "policy"

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._act(np.concatenate([observation[key].ravel() for key in self._keys]))


def returns(act: Act, env_id: str, episodes: int) -> list[float]:
    env = cached_environment(env_id, (), 64)
    actor = Actor(act, seen(env.spec))
    return [sum(step.reward for step in rollout(env, actor, s)) for s in range(FIRST_STATE, FIRST_STATE + episodes)]


def run(arguments: argparse.Namespace, arm: str, seed: int, folder: Path) -> None:
    """A run's process: trains, evaluates, and leaves `<folder>.json`."""
    torch.set_num_threads(1)
    start = time.process_time()
    act = corl(arguments, seed) if arm == "corl" else ours(arguments, arm, seed, folder)
    trained = time.process_time()
    found = returns(act, arguments.env, arguments.episodes)
    figures = {
        "returns": [round(value, 2) for value in found],
        "training_cpu_s": round(trained - start, 1),
        "evaluation_cpu_s": round(time.process_time() - trained, 1),
    }
    partial = folder.with_suffix(".partial")
    partial.write_text(json.dumps(figures) + "\n")
    partial.rename(folder.with_suffix(".json"))


def run_all(arms: list[str], work: Path, seeds: int, parallel: int) -> None:
    """Every run that `work` does not hold yet."""
    waiting = [(arm, seed) for seed in range(seeds) for arm in arms if not (work / f"{arm}-{seed}.json").exists()]
    running: dict[subprocess.Popen, tuple[str, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                arm, seed = waiting.pop(0)
                command = [sys.executable, __file__, *sys.argv[1:], "--run", arm, str(seed), str(work)]
                running[subprocess.Popen(command, stdout=subprocess.DEVNULL)] = (arm, seed)
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                arm, seed = running.pop(process)
                if process.returncode:
                    raise SystemExit(f"{arm}, seed {seed}: ended with {process.returncode}")
                print(f"{arm}, seed {seed}: {(work / f'{arm}-{seed}.json').read_text()}", end="", file=sys.stderr)
    finally:
        for process in running:
            process.kill()
            process.wait()


def table(arms: list[str], work: Path, seeds: int) -> dict[str, Any]:
    found = {arm: [json.loads((work / f"{arm}-{seed}.json").read_text()) for seed in range(seeds)] for arm in arms}
    means = {arm: np.array([np.mean(figures["returns"]) for figures in runs]) for arm, runs in found.items()}
    result: dict[str, Any] = {
        arm: {
            "returns": means[arm].round(1).tolist(),
            "mean": round(float(means[arm].mean()), 1),
            "std_ddof_1": round(float(means[arm].std(ddof=1)), 1) if seeds > 1 else None,
            "training_cpu_s": round(float(np.mean([figures["training_cpu_s"] for figures in runs])), 1),
            "evaluation_cpu_s": round(float(np.mean([figures["evaluation_cpu_s"] for figures in runs])), 1),
        }
        for arm, runs in found.items()
    }
    pairs = [(a, b) for i, a in enumerate(arms) for b in arms[i + 1 :]]
    for first, second in [*(pair for pair in pairs if "corl" in pair), *((b, a) for a, b in pairs if b != "corl")]:
        chance = improvement([means[first]], [means[second]], f"{first} {second}")
        result[f"probability_{first}_above_{second}"] = {
            key: None if value is None else round(value, 3) for key, value in chance.items()
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="HDF5 file in D4RL's layout, or a store of `sim collect`")
    parser.add_argument("--corl", help="algorithms/offline/iql.py of CORL; without it, ours alone")
    parser.add_argument("--env", default="Hopper-v5", help="of Gymnasium; a store knows its own")
    parser.add_argument("--steps", type=int, default=20_000, help="updates of a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--work", type=Path, default=Path("iql_returns"), help="what is done is kept here")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    stored = Path(arguments.data).is_dir()
    if stored:
        arguments.env = EpisodeStore(arguments.data).spec.environment
    if arguments.run:
        arm, seed, work = arguments.run
        return run(arguments, arm, int(seed), Path(work) / f"{arm}-{seed}")
    arms = ["ours_fp32"]
    try:
        set_precision("bf16")
        arms.append("ours_bf16")
    except ConfigError as error:
        print(error, file=sys.stderr)
    arms += ["ours_uniform", *(["corl"] if arguments.corl else [])]
    settings = {
        "env": arguments.env,
        "steps": arguments.steps,
        "episodes": arguments.episodes,
        "data": Path(arguments.data).name,
    }
    work = arguments.work / hash_json(settings)[:12]  # runs of other settings lie in another folder
    work.mkdir(parents=True, exist_ok=True)
    run_all(arms, work, arguments.seeds, arguments.parallel)
    figures = {**settings, "seeds": arguments.seeds, **table(arms, work, arguments.seeds)}
    name = "iql_returns" + (f"_{arguments.env.split('/')[-1].lower()}" if stored else "")
    print(json.dumps(figures, indent=1)) if arguments.dry else write_result(name, figures)


if __name__ == "__main__":
    main()
