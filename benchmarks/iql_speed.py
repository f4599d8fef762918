"""IQL updates a second on a CPU, ours beside others, in windows taken in turns; and ten seeds in a process per core.

    python benchmarks/iql_speed.py [--corl iql.py] [--unifloral iql.py --jax-python PYTHON] [--d3rlpy PYTHON]

Observation 11, action 3, batch 256, two layers of 256, a million transitions; one thread each, drawing of batches
included, no evaluation. Every variant is a process; windows of all of them alternate, forwards and backwards, and the
median window counts. `cpu_per_s` divides by CPU time, which other processes disturb less. Needs a quiet machine.

- `one_seed`: ours in fp32 and with bf16 products (where the CPU has them), and the peers named.
- `ten_seeds`: updates a second in sum of `train_many` with ten seeds in a process per core, and of the same ten seeds
  one after another in one process, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from iql_peers import A, D, N, Window, serve, transitions
from record import write_result

from embodied.contracts.errors import ConfigError
from embodied.datasets.resident import ResidentTransitions
from embodied.policies.iql import IQL, PRESETS
from embodied.policies.loop import _keep_freed_memory
from embodied.policies.many import train_many
from embodied.policies.relu_network import set_precision
from embodied.policies.train import TransitionData

CONFIG = PRESETS["locomotion"]
SINGLE = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}


def random_data(size: int = N) -> TransitionData:
    found = transitions(size)
    rows = np.arange(size - 1)
    return TransitionData(
        found["observations"],
        found["actions"],
        rows,
        rows + 1,
        found["rewards"][:-1],
        np.ones(size - 1, np.float32),
        rows // 1000,
    )


def ours(precision: str) -> None:
    """A variant's process."""
    torch.set_num_threads(1)
    _keep_freed_memory()
    set_precision(precision)
    data = random_data()
    batches, learner = ResidentTransitions(data, data.reward, [0], CONFIG.batch_size), IQL(CONFIG, [0], D, A, N)

    def update(count: int) -> None:
        for _ in range(count):
            learner.update(batches(learner.step))

    serve(update)


class Variant:
    """A process that runs windows on request; pinned to one core, so that no variant gets a second one."""

    def __init__(self, command: list[str]) -> None:
        core = sorted(os.sched_getaffinity(0))[-1]
        self._process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **SINGLE, "JAX_PLATFORMS": "cpu"},
        )
        self._expect("ready")

    def _expect(self, word: str = "") -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word or "{"):
                return line
        raise SystemExit(f"{self._process.args}: ended with {self._process.wait()}")

    def window(self, seconds: float) -> Window:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return Window(**json.loads(self._expect()))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def one_seed(commands: dict[str, list[str]], rounds: int, seconds: float) -> dict[str, Any]:
    variants = {name: Variant(command) for name, command in commands.items()}
    windows: dict[str, list[Window]] = {name: [] for name in variants}
    try:
        for turn in range(rounds):
            for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
                windows[name].append(variants[name].window(seconds))
    finally:
        for variant in variants.values():
            variant.end()
    result: dict[str, Any] = {}
    for name, found in windows.items():
        wall, cpu = ([w.updates / getattr(w, kind) for w in found] for kind in ("wall", "cpu"))
        result[name] = {
            "per_s": round(statistics.median(wall), 1),
            "range": [round(min(wall), 1), round(max(wall), 1)],
            "cpu_per_s": round(statistics.median(cpu), 1),
        }
    for name in result:
        if not name.startswith("ours"):
            mine = {key: result[key]["cpu_per_s"] for key in result if key.startswith("ours")}
            result[name]["ratio_by_cpu"] = {k: round(v / result[name]["cpu_per_s"], 2) for k, v in mine.items()}
    return result


def ten_seeds(rounds: int, steps: int) -> dict[str, Any]:
    data = random_data(100_000)
    cores = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], cores: []}
    for turn in range(rounds):
        for workers in (1, cores) if turn % 2 == 0 else (cores, 1):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                train_many("iql", data, CONFIG, range(10), steps, Path(folder) / "run", workers=workers)
                rates[workers].append(10 * steps / (time.perf_counter() - start))
    medians = {workers: round(statistics.median(found), 1) for workers, found in rates.items()}
    return {
        "steps_per_seed": steps,
        "one_after_another_per_s": medians[1],
        "workers": cores,
        "workers_per_s": medians[cores],
        "ratio": round(medians[cores] / medians[1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corl", help="algorithms/offline/iql.py of CORL")
    parser.add_argument("--unifloral", help="algorithms/iql.py of unifloral")
    parser.add_argument("--jax-python", default=sys.executable, help="a Python with jax, flax, optax, distrax, tyro")
    parser.add_argument("--d3rlpy", metavar="PYTHON", help="a Python with d3rlpy")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window")
    parser.add_argument("--steps", type=int, default=1000, help="of each of the ten seeds")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        return ours(arguments.ours)
    peers = str(Path(__file__).with_name("iql_peers.py"))
    commands = {"ours_fp32": [sys.executable, __file__, "--ours", "fp32"]}
    try:
        set_precision("bf16")
        set_precision("fp32")
        commands["ours_bf16"] = [sys.executable, __file__, "--ours", "bf16"]
    except ConfigError as error:
        print(error, file=sys.stderr)
    if arguments.corl:
        commands["corl"] = [sys.executable, peers, "corl", arguments.corl]
    if arguments.unifloral:
        commands["unifloral"] = [arguments.jax_python, peers, "unifloral", arguments.unifloral]
    if arguments.d3rlpy:
        commands["d3rlpy"] = [arguments.d3rlpy, peers, "d3rlpy"]
    figures = {
        "one_seed": one_seed(commands, arguments.rounds, arguments.seconds),
        "ten_seeds": ten_seeds(3, arguments.steps),
    }
    print(figures) if arguments.dry else write_result("iql_speed", figures)


if __name__ == "__main__":
    main()
