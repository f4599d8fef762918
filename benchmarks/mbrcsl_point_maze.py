"""MBRCSL on its own point maze, in MuJoCo: is the short way found that nobody showed?

    python benchmarks/mbrcsl_point_maze.py

The task is `pointmaze/stitch` (sim/point_maze.py): the map, behaviours, horizon and reward of Zhou et al. 2023. Half of
the recorded episodes go down from the start and stay, a quarter goes by the left to the goal and stays, a quarter does
the same and then moves at random. The paper records 1000; here 300, in the same shares, for two CPU cores. Each of 4
seeds has data, dynamics and learners of its own, no learner's settings were tuned on the task. Dynamics, learners and
the evaluated bundles are those of the command line; what a policy of MBRCSL is still to earn follows its own estimate
of the rewards, since a bundle sees none.

Declared before the run, and not tuned on its seeds (a pilot used seed 100):
- stitched: an episode that is within 0.45 m of the goal sooner than the fastest recorded episode of its seed's data.
  The figure that decides, 50 initial states per seed, with 95 % intervals over seeds and states.
- also: within 0.45 m of the goal at all; true return over all 200 steps, paid by the simulator.
- claims: MBRCSL is stitched more often than cloning, than the flow that keeps both ways, than return-conditioning on
  the recorded episodes and than IQL, each by an interval of the difference that does not reach 0; and its mean return
  exceeds that of the best recorded episode (mean over seeds).

To read the figures by: a flow's bundle repeats its draws in every episode, so that the cloned flow goes one way in
nearly all initial states of a seed, where fresh draws would go either way.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result

from embodied.contracts.errors import InputError
from embodied.policies.bundle import load_policy
from embodied.policies.configure import configure
from embodied.policies.dynamics import PRESETS, Dynamics
from embodied.policies.dynamics_evaluation import evaluate_dynamics
from embodied.policies.dynamics_training import DynamicsData, DynamicsTraining, run_training, split_rows
from embodied.policies.loop import read_metrics
from embodied.policies.train import TransitionData, make_config, policy_inputs, train
from embodied.sim.point_maze import HORIZON, PointMazeEnv, Waypoints
from embodied.sim.rollout import PolicyBehaviour, rollout
from embodied.statistics import difference, over_seeds

SHARES = {"stay": 0.5, "detour": 0.25, "wander": 0.25}
EVALUATION_SEED = 50_000_000  # far from those of the data
DYNAMICS = {"members": 5, "elites": 3, "hidden_sizes": (128, 128, 128), "weight_decay": (2.5e-5, 5e-5, 7.5e-5, 1e-4)}
SIZES = {"hidden_sizes": (128, 128)}
# learner of the command line, gradient steps, settings
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "cloning": ("bc", 3000, SIZES),
    "cloning, flow": ("flow", 3000, SIZES | {"chunk": 1, "execute": 1}),
    "IQL": ("iql", 5000, SIZES | {"reward_normalization": "none", "discount": 0.99}),
    "return-conditioned, recorded": ("mbrcsl", 6000, SIZES | {"selection": "recorded"}),
    "MBRCSL": ("mbrcsl", 6000, SIZES | {"behaviour_hidden_sizes": (128, 128), "horizon": HORIZON}),
}


def collect(seed: int, episodes: int) -> dict[str, np.ndarray]:
    """states (E, 201, 4), actions (E, 200, 2), rewards (E, 200), reached (E, 200) bool."""
    env, rows = PointMazeEnv(), []
    for number, name in enumerate(name for name, share in SHARES.items() for _ in range(round(share * episodes))):
        behaviour, start = Waypoints(env, name), 10_000 * seed + number
        behaviour.reset(start)
        steps = list(rollout(env, behaviour, start))
        states = [steps[0].observation["state"], *(step.next_observation["state"] for step in steps)]
        rows.append((states, *zip(*((s.action, s.reward, s.success) for s in steps), strict=True)))
    columns = [np.stack([np.asarray(row[k]) for row in rows]) for k in range(4)]
    names = ("states", "actions", "rewards", "reached")
    return {name: x if x.dtype == bool else x.astype(np.float32) for name, x in zip(names, columns, strict=True)}


def first_step(reached: np.ndarray) -> np.ndarray:
    """(E, H) -> (E,) number of the first step at the goal, from 1; H + 1 where there is none."""
    return np.where(reached.any(1), reached.argmax(1) + 1, reached.shape[1] + 1)


def learning_data(recorded: dict[str, np.ndarray], normalization: str) -> tuple[TransitionData, Any]:
    """As `embodied train` makes them of a store."""
    count, horizon = recorded["rewards"].shape
    frames = np.arange(count * (horizon + 1)).reshape(count, -1)
    actions = np.zeros((count, horizon + 1, 2), np.float32)
    actions[:, :-1] = recorded["actions"]
    spec = PointMazeEnv().spec
    states = recorded["states"].reshape(-1, 4)
    observations, contract = policy_inputs(spec, {"state": states}, {}, normalization=normalization)
    data = TransitionData(
        observations,
        actions.reshape(-1, 2),
        frames[:, :-1].ravel(),
        frames[:, 1:].ravel(),
        recorded["rewards"].ravel(),
        np.ones(count * horizon, np.float32),  # nothing terminates
        np.repeat(np.arange(count), horizon),
    )
    return data, contract


def learn_dynamics(recorded: dict[str, np.ndarray], seed: int, epochs: int, folder: Path) -> tuple[Dynamics, Any]:
    """As `embodied train dynamics`, and the error of 5 open-loop steps relative to that of standing still."""
    count, horizon = recorded["rewards"].shape
    states = recorded["states"]
    data = DynamicsData(
        states[:, :-1].reshape(-1, 4),
        recorded["actions"].reshape(-1, 2),
        recorded["rewards"].ravel(),
        states[:, 1:].reshape(-1, 4),
        np.zeros(count * horizon, bool),
        np.repeat(np.arange(count), horizon),
        np.arange(count * (horizon + 1)).reshape(count, -1)[:, :-1].ravel(),
    )
    config = configure(PRESETS, "short", DYNAMICS | {"batch_size": 1024, "max_epochs": epochs}, "dynamics")
    split = split_rows(data, config)
    training = DynamicsTraining(config, [seed], data, split)
    run_training(training, folder, {"seed": seed})
    model = training.dynamics(0, "none")
    found = evaluate_dynamics(model, data.rows(split.test), 5)
    loop = found["open_loop"]
    return model, {"epochs": training.epoch, "open_loop_5": round(loop["error"][-1] / loop["no_change"][-1], 4)}


def evaluate(bundle: Path, states: int) -> dict[str, np.ndarray]:
    """first (N,) step at the goal and true return (N,) of the bundle from `states` initial states."""
    env, behaviour = PointMazeEnv(), PolicyBehaviour(load_policy(bundle))
    reached, returns = np.zeros((states, HORIZON), bool), np.zeros(states)
    for number in range(states):
        behaviour.reset(EVALUATION_SEED + number)
        for k, step in enumerate(rollout(env, behaviour, EVALUATION_SEED + number)):
            reached[number, k] = step.success
            returns[number] += step.reward
    return {"first": first_step(reached), "return": returns}


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Data, dynamics and every method of one seed."""
    clock = time.process_time()
    recorded = collect(seed, options.episodes)
    returns, fastest = recorded["rewards"].sum(1), int(first_step(recorded["reached"]).min())
    result: dict[str, Any] = {"seed": seed, "best_recorded_return": float(returns.max()), "fastest_recorded": fastest}
    result["cpu_seconds"] = {"data": round(time.process_time() - clock, 1)}
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        clock = time.process_time()
        model, result["dynamics"] = learn_dynamics(recorded, seed, options.epochs, Path(folder) / "dynamics")
        result["cpu_seconds"]["dynamics"] = round(time.process_time() - clock, 1)
        for number, (name, (learner, steps, settings)) in enumerate(METHODS.items()):
            clock = time.process_time()
            config = make_config(learner, overrides=settings)
            data, contract = learning_data(recorded, config.observation_normalization)
            out, steps = Path(folder) / str(number), round(steps * options.scale)
            try:
                train(
                    learner, data, config, [seed], steps, out, contract, log_every=steps // 10,
                    model=model if learner == "mbrcsl" else None,
                )  # fmt: skip
                tables[name] = evaluate(out / f"seed_{seed:03d}", options.states)
                last = read_metrics(out)[-1]
                if "accepted_share" in last:
                    keys = ("accepted_share", "rollouts", "kept", "target_return")
                    result[name] = {key: last[key][0] for key in keys}
            except InputError as error:
                result[name] = {"refused": str(error).splitlines()[0]}
            result["cpu_seconds"][name] = round(time.process_time() - clock, 1)
            print(f"seed {seed}, {name}: {result['cpu_seconds'][name]} s", flush=True)
    for name, table in tables.items():
        result.setdefault(name, {}).update(
            stitched=float((table["first"] < fastest).mean()),
            reached=float((table["first"] <= HORIZON).mean()),
            mean_return=round(float(table["return"].mean()), 2),
        )
    found = {name: {key: values.tolist() for key, values in table.items()} for name, table in tables.items()}
    return result | {"tables": found}


def kept_or_run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed's result from `--keep`, where it is, or run and kept there: seeds may run at different times."""
    path = options.keep / f"seed_{seed}.json" if options.keep else None
    if path and path.exists():
        return json.loads(path.read_text())
    result = one_seed(seed, options)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with 95 % intervals over seeds and initial states, and the claims."""
    methods, stitched = {}, {}
    for name in METHODS:
        found = [run["tables"][name] for run in runs if name in run["tables"]]
        if len(found) < len(runs):
            methods[name] = {"refused": len(runs) - len(found)}
            continue
        fastest = np.array([run["fastest_recorded"] for run in runs])[:, None]
        first, returns = (np.array([table[key] for table in found]) for key in ("first", "return"))
        stitched[name] = (first < fastest).astype(float)
        outcomes = {"stitched": stitched[name], "reached": (first <= HORIZON).astype(float), "return": returns}
        methods[name] = {key: over_seeds(values).to_json() for key, values in outcomes.items()}
    claims: dict[str, Any] = {}
    if "MBRCSL" in stitched:
        for name in stitched:
            if name != "MBRCSL":
                gap = difference(stitched["MBRCSL"], stitched[name])
                claims[f"stitched more often than {name}"] = {"holds": gap.low > 0, **gap.to_json()}
        best = float(np.mean([run["best_recorded_return"] for run in runs]))
        ours = methods["MBRCSL"]["return"]["estimate"]
        claims["returns more than the best recorded episode"] = {"holds": ours > best, "ours": ours, "recorded": best}
    else:
        claims["MBRCSL learns"] = {"holds": False}
    return {"methods": methods, "claims": claims}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=25, help="of the dynamics, at most")
    parser.add_argument("--states", type=int, default=50, help="initial states per seed")
    parser.add_argument("--scale", type=float, default=1.0, help="of every method's gradient steps")
    parser.add_argument("--keep", type=Path, help="folder for the results of single seeds, which a later run reads")
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [kept_or_run(seed, options) for seed in seeds]
    figures = summary(runs)
    figures["seeds"] = [{k: v for k, v in run.items() if k != "tables"} for run in runs]
    figures["cpu_seconds"] = round(sum(sum(run["cpu_seconds"].values()) for run in runs), 1)
    if options.dry:
        print(figures)
    else:
        write_result("mbrcsl_point_maze", figures)


if __name__ == "__main__":
    main()
