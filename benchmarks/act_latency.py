"""What one call of a state policy's `act` costs in a control loop.

    python benchmarks/act_latency.py

Bundles (observation 11, two layers of 256, action 3) are written, loaded and called 20,000 times with an observation of
their own each: a Gaussian's mean, and a flow of 10 steps to a chunk of 8 actions. Percentiles in microseconds of wall
and of CPU time, on one thread. Run it on a quiet machine: under load the tail is the scheduler's.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies.actors import FlowActor
from embodied.policies.bundle import PolicyContract, load_policy, save_policy
from embodied.policies.networks import Actor, generators


def bundle(kind: str, folder: Path) -> Path:
    statistics = {"mean": np.zeros(11, np.float32), "std": np.ones(11, np.float32)}
    keys = {"joint_position": ArraySpec((11,), unit="rad")}
    contract = PolicyContract(keys, {}, ActionSpec((3,)), 0.01, {"joint_position": statistics})
    if kind == "gaussian":
        actor = Actor(generators([0]), 11, 3, (256, 256))
        return save_policy(folder, actor.state_dict(), contract, {}, {})
    flow = FlowActor(generators([0]), 11, 8 * 3, (256, 256), steps=10)
    settings = {"kind": "flow", "steps": 10, "noise": "seeded", "noise_seed": 0}
    contract = dataclasses.replace(contract, chunk=8, execute=4)
    return save_policy(folder, flow.state_dict(), contract, {}, {}, kind=settings)


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{q:g}": round(float(np.percentile(values, q)) / 1e3, 1) for q in (50, 99, 99.9, 100)}


def measure(kind: str, calls: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(bundle(kind, Path(folder) / "policy"))
    observations = np.random.default_rng(0).normal(size=(calls, 11)).astype(np.float32)
    wall, cpu = np.empty(calls), np.empty(calls)
    for k in range(-200, calls):
        observation = {"joint_position": observations[k]}
        cpu_start, start = time.thread_time_ns(), time.perf_counter_ns()
        policy.act(observation)
        stop, cpu_stop = time.perf_counter_ns(), time.thread_time_ns()
        if k >= 0:
            wall[k], cpu[k] = stop - start, cpu_stop - cpu_start
    return {"calls": calls, "wall_us": percentiles(wall), "cpu_us": percentiles(cpu)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    figures = {kind: measure(kind, arguments.calls) for kind in ("gaussian", "flow")}
    print(figures) if arguments.dry else write_result("act_latency", figures)
