"""The paper's headline on Hopper: what happens to offline model-based learners as their dynamics become exact?

    python benchmarks/true_dynamics.py --data .../hopper-replay.hdf5 --work /tmp/true_dynamics
    python benchmarks/true_dynamics.py --data .../hopper-replay.hdf5 --work /tmp/true_dynamics --device cuda  # larger

Sims et al. 2024: penalties for a model's doubt vanish with the doubt, and what they held down appears: values of
states that only last steps of rollouts lead to are never trained, and the policy follows them. Three learners, each in
dynamics that were learned and in the simulator itself, on 5 seeds:

    penalty  MOPO: two critics, reward less lambda times the model's doubt
    base     two critics, no penalty, no diversity: what is left of MOPO when nothing is doubted
    ravl     ten diverse critics, their minimum, no penalty

Figures: how far the values of recorded states are above what true rollouts of the policy from there return (entropy
counted on both sides), and the return of 20 episodes from the start, with 95 % intervals of Student's t over seeds.

Sized for 2 cores in under three hours, or with --device cuda for a GPU; every cell (learner, dynamics, seed) goes on
where it was killed and is kept in --work. Ours, where the paper trains 3 million updates: sizes and steps. The dynamics
are one ensemble for all seeds, its targets not standardised, for which lambda 2.5 was published (OfflineRL-Kit,
hopper-medium-replay).
"""

import argparse
import dataclasses
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result
from scipy.stats import t as student

from embodied.cli import main as embodied
from embodied.datasets.store import EpisodeStore
from embodied.policies.bundle import load_policy
from embodied.policies.reach import true_values
from embodied.policies.train import make_config, train
from embodied.policies.trained import load_trained
from embodied.progress import Progress
from embodied.rollout_model import rollout_model
from embodied.sim.oracle import Oracle
from embodied.sim.rollout import PolicyBehaviour, cached_environment, rollout
from embodied.train import learning_data

ENV = "Hopper-v5"
LEARNERS = ("penalty", "base", "ravl")
DYNAMICS = ("learned", "true")


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a cell, and of the dynamics' training."""

    steps: int
    hidden_sizes: str
    rollouts: int
    updates_per_epoch: int
    members: int
    epochs: int
    states: int
    episodes: int
    seeds: int


FULL = Size(30_000, "128,128", 2000, 500, 10, 40, 200, 20, 5)
LARGE = Size(300_000, "256,256", 20_000, 1000, 10, 100, 500, 50, 5)
QUICK = Size(60, "16,16", 50, 30, 3, 1, 5, 1, 2)


def settings(learner: str, size: Size) -> tuple[str, dict[str, Any]]:
    """A learner's name and what is changed of its preset `short`. All share the rest."""
    shared = {
        "discount": 0.99,
        "hidden_sizes": size.hidden_sizes,
        "rollouts": size.rollouts,
        "updates_per_epoch": size.updates_per_epoch,
        "reward_normalization": "none",
        "observation_normalization": "standard",
    }
    if learner == "penalty":
        return "mopo", shared | {"penalty_coefficient": 2.5, "penalty": "aleatoric"}
    if learner == "base":
        return "ravl", shared | {"members": 2, "diversity": 0.0}
    return "ravl", shared | {"members": size.members, "diversity": 1.0}


def prepare(data: Path, work: Path, size: Size, device: str, learned: bool = True) -> None:
    """The store and, if they are needed, the learned dynamics."""
    store, dynamics = work / "hopper.zarr", work / "dynamics"
    if not store.exists():
        check(embodied(["data", "import", str(data), str(store)]))
    if learned and not (dynamics / "seed_000" / "hashes.json").exists():
        change = ["standardize_targets", "False", "max_epochs", str(size.epochs)]
        change += ["hidden_sizes", "16,16", "weight_decay", "0,0,0"] if size is QUICK else []
        command = ["train", "dynamics", str(store), "--reward", "source", "--out", str(dynamics), "--device", device]
        check(embodied([*command, "--settings", *change]))


def check(code: int) -> None:
    if code:
        raise SystemExit(code)


def cell(work: Path, learner: str, dynamics: str, seed: int, size: Size, device: str) -> dict[str, Any]:
    """Train one policy, or go on, and measure it; kept in `<work>/<learner>-<dynamics>-<seed>/cell.json`."""
    folder = work / f"{learner}-{dynamics}-{seed}"
    kept = folder / "cell.json"
    if kept.exists():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    began = time.process_time()
    store = EpisodeStore(work / "hopper.zarr")
    source = Path(f"env:{ENV}") if dynamics == "true" else work / "dynamics" / "seed_000"
    name, changes = settings(learner, size)
    config = make_config(name, "short", changes)
    model, keys = rollout_model(store, source, "source", None, (), device, Progress())
    data, contract = learning_data(store, keys, "source", None, Progress(), config.observation_normalization)
    named = {"contract": contract, "provenance": {"config": {}}, "model": model, "device": device}
    train(name, data, config, [seed], size.steps, folder, **named)
    trained_in = time.process_time() - began
    rng = np.random.default_rng(seed)
    mean, std = contract.statistics(0, "the policy")
    rows = data.frame[rng.permutation(len(data.frame))[: size.states]]
    states = (data.observations[rows] * std + mean).astype(np.float32)
    said, true, _ = true_values(load_trained(folder / f"seed_{seed:03d}"), Oracle(ENV, threads=1), states, rng)
    found = {
        "learner": learner,
        "dynamics": dynamics,
        "seed": seed,
        "said": float(said.mean()),
        "true": float(true.mean()),
        "over": float((said - true).mean()),
        "return": episodes_return(folder / f"seed_{seed:03d}", size.episodes),
        "cpu_seconds_training": round(trained_in, 1),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(kept)
    return found


def episodes_return(bundle: Path, count: int) -> float:
    """Mean undiscounted return of the deployed policy over `count` episodes of the environment."""
    env, behaviour, returns = cached_environment(ENV, (), 64), PolicyBehaviour(load_policy(bundle)), []
    for seed in range(count):
        behaviour.reset(seed)
        returns.append(sum(step.reward for step in rollout(env, behaviour, seed)))
    return float(np.mean(returns))


def interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds and Student's 95 % interval."""
    mean, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": round(mean, 2), "low": round(mean - half, 2), "high": round(mean + half, 2)}


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Per learner and dynamics the intervals, and what the paper says of them, each true or not."""
    table: dict[str, Any] = {}
    for learner in LEARNERS:
        for dynamics in DYNAMICS:
            own = [c for c in cells if (c["learner"], c["dynamics"]) == (learner, dynamics)]
            if own:
                figures = {name: interval([c[name] for c in own]) for name in ("over", "said", "true", "return")}
                table[f"{learner}, {dynamics}"] = {**figures, "seeds": len(own)}
    claims = {}
    if len(table) == len(LEARNERS) * len(DYNAMICS):
        over = {name: row["over"] for name, row in table.items()}
        returns = {name: row["return"] for name, row in table.items()}
        claims = {
            "base overestimates under true dynamics": over["base, true"]["low"] > 0,
            "penalty overestimates under true dynamics": over["penalty, true"]["low"] > 0,
            "penalty overestimates more as dynamics become exact": over["penalty, true"]["low"]
            > over["penalty, learned"]["high"],
            "ravl does not overestimate under true dynamics": over["ravl, true"]["low"] <= 0,
            "ravl returns more than base under true dynamics": returns["ravl, true"]["low"]
            > returns["base, true"]["high"],
            "ravl returns more than penalty under true dynamics": returns["ravl, true"]["low"]
            > returns["penalty, true"]["high"],
        }
    return {"table": table, "claims": claims, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="hopper-replay.hdf5, D4RL's layout")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="sizes that show only that it runs; nothing is recorded")
    parser.add_argument("--cell", nargs=3, metavar=("LEARNER", "DYNAMICS", "SEED"), help="one cell alone")
    arguments = parser.parse_args()
    name, device = "quick" if arguments.quick else "large" if arguments.device == "cuda" else "full", arguments.device
    size, work = {"quick": QUICK, "full": FULL, "large": LARGE}[name], arguments.work / name
    work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.data, work, size, device, learned=not arguments.cell or arguments.cell[1] == "learned")
    if arguments.cell:
        learner, dynamics, seed = arguments.cell
        print(json.dumps(cell(work, learner, dynamics, int(seed), size, device), indent=1))
        return
    todo = [
        (work, learner, dynamics, seed, size, device)
        for seed in range(size.seeds)
        for learner in LEARNERS
        for dynamics in DYNAMICS
    ]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        cells = [one.result() for one in [pool.submit(cell, *task) for task in todo]]
    figures = {"size": dataclasses.asdict(size), **summary(cells)}
    if arguments.quick:
        print(json.dumps(figures, indent=1))
    else:
        write_result("true_dynamics" + ("_large" if size is LARGE else ""), figures)


if __name__ == "__main__":
    main()
