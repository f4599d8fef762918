"""What model-based learning costs on a CPU, ours beside CORL's EDAC and OfflineRL-Kit, in windows taken in turns.

    python benchmarks/model_based_speed.py --corl-edac FILE --offlinerl-kit DIR [--dry]

FILE is algorithms/offline/edac.py of corl-team/CORL, DIR a checkout of yihaosun1124/OfflineRL-Kit: fetched by whoever
measures, and no part of this repository. Observation 17, action 6 (HalfCheetah), random data, one thread. Every variant
is a process pinned to the same core; windows alternate, forwards and backwards. Ratios are of median windows, by CPU
time and by wall time; for the latter the machine must be quiet.

- `edac_10`, `edac_50`: updates of EDAC with N critics, three layers of 256, batch 256, its drawing included.
- `training`: member-transitions of a dynamics ensemble, 7 x 4 x 200, batch 256: an epoch over bootstraps, and the
  error on a holdout of 1,024. The kit's drawing of a new order, which is not a method of its own, is left out there.
  `training_bf16`: ours with `precision bf16`, where the CPU has it, against the same kit.
- `rollouts`: transitions of 10,000 rollouts of 5 steps, actor, ensemble and buffer. Rewards without a penalty; `mopo`:
  with the ensemble's largest spread as a penalty, for which every member is evaluated at every row; `mopo_bf16`:
  ours with `--precision bf16` against the same kit.
- `memory`: the peak of a process that keeps five epochs of 50,000 rollouts of 5 steps, and makes a sixth.
"""

import argparse
import importlib
import json
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from iql_peers import Window, _module
from iql_speed import Variant
from record import write_result

from embodied.contracts.errors import ConfigError
from embodied.datasets.resident import ResidentTransitions
from embodied.policies.dynamics import Dynamics, DynamicsConfig, DynamicsNetwork, fit_scales
from embodied.policies.dynamics_training import DynamicsData, DynamicsTraining, split_rows
from embodied.policies.edac import EDAC, EDACConfig
from embodied.policies.loop import _keep_freed_memory
from embodied.policies.mopo import MOPOConfig
from embodied.policies.networks import generators
from embodied.policies.ravl import RAVLConfig
from embodied.policies.relu_network import product_type, set_precision
from embodied.policies.rollouts import Rollouts
from embodied.policies.squashed import SquashedActor
from embodied.policies.train import TransitionData

D, A, B = 17, 6, 256
RECORDED = 200_000
EPISODES, LENGTH = 11, 1024  # of the dynamics' data; one episode is held out
ROLLOUTS, STEPS = 10_000, 5
HIDDEN = (256, 256)  # of the rollouts' actor
PENALTY = 0.5
DECAYS = DynamicsConfig().weight_decay
Work = Callable[[], int]  # does some, and says how many units they were


def arrays(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((rows, D), np.float32),
        "actions": rng.uniform(-1, 1, (rows, A)).astype(np.float32),
        "rewards": rng.standard_normal(rows, np.float32),
        "next_observations": rng.standard_normal((rows, D), np.float32),
        "terminals": np.zeros(rows, np.float32),
    }


def our_updates(members: int) -> Work:
    found, rows = arrays(RECORDED), np.arange(RECORDED - 1)
    ones = np.ones(len(rows), np.float32)
    data = TransitionData(found["observations"], found["actions"], rows, rows + 1, found["rewards"][:-1], ones)
    batches = ResidentTransitions(data, data.reward, [0], B)
    learner = EDAC(EDACConfig(members=members), [0], D, A, 10**6)

    def work() -> int:
        learner.update(batches(learner.step))
        return 1

    return work


def corl_updates(path: str, members: int) -> Work:
    peer = _module(path, ("d4rl", "gym", "pyrallis", "wandb"))
    buffer = peer.ReplayBuffer(D, A, RECORDED, "cpu")
    buffer.load_d4rl_dataset(arrays(RECORDED))
    actor, critic = peer.Actor(D, A, 256), peer.VectorizedCritic(D, A, 256, members)
    adams = (torch.optim.Adam(network.parameters(), lr=3e-4) for network in (actor, critic))
    trainer = peer.EDAC(actor, next(adams), critic, next(adams), alpha_learning_rate=3e-4)

    def work() -> int:
        trainer.update(buffer.sample(B))
        return 1

    return work


def our_training(precision: str = "fp32") -> Work:
    found, rows = arrays(EPISODES * LENGTH), np.arange(EPISODES * LENGTH)
    data = DynamicsData(
        **{k: v for k, v in found.items() if k != "terminals"},
        terminated=np.zeros(len(rows), bool),
        episode=rows // LENGTH,
        frame=rows,
    )
    config = DynamicsConfig(holdout_share=1 / EPISODES, test_share=0.0, standardize_targets=False, precision=precision)
    training = DynamicsTraining(config, [0], data, split_rows(data, config))

    def work() -> int:
        training.done = [False]
        training.update(training.epoch)
        return config.members * (EPISODES - 1) * LENGTH

    return work


def kit_training(folder: str) -> Work:
    dynamics = kit_dynamics(folder, 0.0)
    found = arrays(EPISODES * LENGTH)
    found["rewards"] = found["rewards"][:, None]
    inputs, targets = dynamics.format_samples_for_training(found)
    dynamics.scaler.fit(inputs[LENGTH:])
    inputs = dynamics.scaler.transform(inputs)
    train, held = (inputs[LENGTH:], targets[LENGTH:]), (inputs[:LENGTH], targets[:LENGTH])
    rows = np.random.default_rng(0).integers(len(train[0]), size=(7, len(train[0])))

    def work() -> int:
        dynamics.learn(train[0][rows], train[1][rows], B, 0.01)
        dynamics.validate(*held)
        return rows.size

    return work


def our_model() -> Dynamics:
    network = DynamicsNetwork(generators([0]), D, A, DynamicsConfig().hidden_sizes, 7)
    found = arrays(10_000)
    inputs = np.concatenate([found["observations"], found["actions"]], 1)
    scales = fit_scales(inputs, np.zeros((10, D + 1), np.float32), False)
    return Dynamics(network, scales, range(5), "halfcheetah")


def our_buffer(config: Any) -> tuple[Rollouts, Any]:
    actor = SquashedActor(generators([0]), D, A, config.hidden_sizes)
    seen, units = arrays(RECORDED)["observations"], (np.zeros(D, np.float32), np.ones(D, np.float32))
    return Rollouts(our_model(), actor, seen, np.arange(RECORDED), *units, {}, config, [0], A), actor


def our_rollouts(penalty: float, precision: str = "fp32") -> Work:
    set_precision(precision)
    kind = MOPOConfig(penalty_coefficient=penalty) if penalty else RAVLConfig()
    sizes = {"rollouts": ROLLOUTS, "rollout_length": STEPS, "hidden_sizes": HIDDEN}
    buffer, actor = our_buffer(type(kind)(**(vars(kind) | sizes)))
    state = actor.state_dict()
    epochs = iter(range(10**6))

    def work() -> int:
        buffer.fill(next(epochs), state)
        return ROLLOUTS * STEPS

    return work


def kit_dynamics(folder: str, penalty: float) -> Any:
    sys.path.insert(0, folder)
    for name in ("gym", "gym.envs", "gym.envs.mujoco", "torch.utils.tensorboard"):
        sys.modules[name] = _Absent(name)
    modules, dynamics, scaler, rules = (
        importlib.import_module(f"offlinerlkit.{name}")
        for name in ("modules", "dynamics", "utils.scaler", "utils.termination_fns")
    )
    network = modules.EnsembleDynamicsModel(D, A, (200,) * 4, weight_decays=DECAYS)
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    rule = rules.get_termination_fn("halfcheetah")
    return dynamics.EnsembleDynamics(network, adam, scaler.StandardScaler(), rule, penalty)


def kit_rollouts(folder: str, penalty: float) -> Work:
    dynamics = kit_dynamics(folder, penalty)
    nets, modules, policies, buffers = (
        importlib.import_module(f"offlinerlkit.{name}") for name in ("nets", "modules", "policy", "buffer")
    )
    body = nets.MLP(D, HIDDEN)
    spread = modules.TanhDiagGaussian(body.output_dim, A, unbounded=True, conditioned_sigma=True)
    critics = [modules.Critic(nets.MLP(D + A, HIDDEN)) for _ in range(2)]
    policy = policies.MOPOPolicy(dynamics, modules.ActorProb(body, spread), *critics, None, None, None)  # type: ignore[arg-type]
    recorded = arrays(RECORDED)
    dynamics.scaler.fit(np.concatenate([recorded["observations"], recorded["actions"]], 1))
    buffer = buffers.ReplayBuffer(5 * ROLLOUTS * STEPS, (D,), np.float32, A, np.float32)
    rng = np.random.default_rng(0)

    def work() -> int:  # as in MBPolicyTrainer.train
        starts = recorded["observations"][rng.integers(RECORDED, size=ROLLOUTS)]
        made, facts = policy.rollout(starts, STEPS)
        buffer.add_batch(**made)
        return facts["num_transitions"]

    return work


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        return _Anything(name, (), {})


class _Absent(types.ModuleType):
    """A package that only simulators and loggers of the kit need: its names are empty classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def serve(work: Work) -> None:
    """Answer each line `seconds` on standard input with one of JSON: units, wall and CPU seconds."""
    work()
    print("ready", flush=True)
    for line in sys.stdin:
        count, limit = 0, float(line)
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < limit:
            count += work()
        print(json.dumps(vars(Window(count, time.perf_counter() - wall, time.process_time() - cpu))), flush=True)


def memory() -> None:
    """Six epochs of edge-of-reach's default in this process: peak and what was there before, in MB of 10^6 bytes."""

    def peak() -> float:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)

    print("ready", flush=True)
    before, config = peak(), RAVLConfig()
    buffer, actor = our_buffer(config)
    for epoch in range(config.epochs_kept + 1):
        buffer.fill(epoch, actor.state_dict())
        buffer.batch(epoch * config.updates_per_epoch, B)
    rows = config.rollouts * config.rollout_length * config.epochs_kept
    if buffer.counts.sum() != rows:
        raise SystemExit(f"{buffer.counts.sum()} rows of {rows} are held")
    table = round(buffer.table.numel() * buffer.table.element_size() / 1e6)
    print(json.dumps({"transitions": rows, "table_mb": table, "imports_mb": before, "peak_mb": peak()}), flush=True)


WORKS: dict[str, tuple[Callable[[], Work], Callable[[Any], Work]]] = {
    "edac_10": (lambda: our_updates(10), lambda paths: corl_updates(paths.corl_edac, 10)),
    "edac_50": (lambda: our_updates(50), lambda paths: corl_updates(paths.corl_edac, 50)),
    "training": (our_training, lambda paths: kit_training(paths.offlinerl_kit)),
    "training_bf16": (lambda: our_training("bf16"), lambda paths: kit_training(paths.offlinerl_kit)),
    "rollouts": (lambda: our_rollouts(0.0), lambda paths: kit_rollouts(paths.offlinerl_kit, 0.0)),
    "mopo": (lambda: our_rollouts(PENALTY), lambda paths: kit_rollouts(paths.offlinerl_kit, PENALTY)),
    "mopo_bf16": (lambda: our_rollouts(PENALTY, "bf16"), lambda paths: kit_rollouts(paths.offlinerl_kit, PENALTY)),
}


def compare(name: str, paths: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    variants = {
        side: Variant([sys.executable, __file__, "--serve", name, "--side", side, *paths]) for side in ("ours", "peer")
    }
    windows: dict[str, list[Window]] = {side: [] for side in variants}
    try:
        for turn in range(rounds):
            for side in list(variants)[:: 1 if turn % 2 == 0 else -1]:
                windows[side].append(variants[side].window(seconds))
    finally:
        for variant in variants.values():
            variant.end()
    result: dict[str, Any] = {}
    for kind, key in (("cpu", "per_cpu_s"), ("wall", "per_s")):
        rates = {side: [w.updates / getattr(w, kind) for w in found] for side, found in windows.items()}
        for side, found in rates.items():
            result.setdefault(side, {})[key] = [
                float(f"{x:.4g}") for x in (statistics.median(found), min(found), max(found))
            ]
        ours, peer = (statistics.median(rates[side]) for side in ("ours", "peer"))
        result[f"ratio_{kind}"] = round(ours / peer, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corl-edac", metavar="FILE", required=True)
    parser.add_argument("--offlinerl-kit", metavar="DIR", required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window")
    parser.add_argument("--only", nargs="*", choices=[*WORKS, "memory"], help="implies --dry")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--serve", choices=[*WORKS, "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        torch.set_num_threads(1)
        if arguments.side == "ours":
            _keep_freed_memory()  # as training does
        if arguments.serve == "memory":
            return memory()
        ours, peer = WORKS[arguments.serve]
        return serve(ours() if arguments.side == "ours" else peer(arguments))
    paths = ["--corl-edac", str(Path(arguments.corl_edac).resolve())]
    paths += ["--offlinerl-kit", str(Path(arguments.offlinerl_kit).resolve())]
    chosen = arguments.only or [*WORKS, "memory"]
    try:
        product_type("bf16")
    except ConfigError as error:
        print(error, file=sys.stderr)
        chosen = [name for name in chosen if not name.endswith("_bf16")]
    figures: dict[str, Any] = {}
    for name in (n for n in WORKS if n in chosen):
        figures[name] = compare(name, paths, arguments.rounds, arguments.seconds)
    if "memory" in chosen:
        alone = Variant([sys.executable, __file__, "--serve", "memory", "--side", "ours", *paths])
        figures["memory"] = json.loads(alone._expect())
        alone.end()
    if arguments.dry or arguments.only:
        print(json.dumps(figures, indent=1))
    else:
        write_result("model_based_speed", figures)


if __name__ == "__main__":
    main()
