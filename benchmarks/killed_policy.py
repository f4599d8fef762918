"""How soon the simulated Panda stands still after its policy process is killed while it moves.

    python benchmarks/killed_policy.py quickstart-out/policies/clip-labels/seed_000

Each trial arms and runs the policy over ROS 2 topics, sends SIGKILL to its process while a joint moves at 0.25 rad/s or
more, and takes the last moment at which any measured joint speed is 0.03 rad/s or more.
"""

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
from record import write_result

from embodied.robot_bridge import messages
from embodied.robot_bridge.deployment import Deployment
from embodied.robot_bridge.qos import LATEST
from embodied.sim.suites import environment

MOVING, STILL = 0.25, 0.03  # [rad/s]


def trial(deployment: Deployment, speeds: list[tuple[float, float]], state: dict) -> tuple[float, float]:
    """(speed when killed [rad/s], seconds until still)."""
    deployment.reset(state)
    speeds.clear()
    deployment.request("arm", "ARMED")
    deployment.request("run", "RUNNING")
    deadline = time.monotonic() + 4
    while (not speeds or speeds[-1][1] < MOVING) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed_at, speed = time.monotonic(), speeds[-1][1]
    os.kill(deployment.children["policy_node"].process.pid, signal.SIGKILL)
    time.sleep(1.0)
    moving = [at - killed_at for at, value in speeds if at > killed_at and value >= STILL]
    deployment.restart("policy_node")
    return speed, max(moving, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--trials", type=int, default=10)
    arguments = parser.parse_args()
    task = environment("robosuite/Lift")
    speeds: list[tuple[float, float]] = []

    def keep(data: bytes, at: int) -> None:
        speeds.append((at * 1e-9, float(np.abs(messages.read_joint_state(data).velocity[:7]).max())))

    with tempfile.TemporaryDirectory() as folder:
        scene = task.export_scene(Path(folder), ("wrist",), 64)
        with Deployment(arguments.bundle, "panda-mujoco", scene, log_folder=Path(folder)) as deployment:
            deployment.transport.subscriber("/joint_states", messages.JOINT_STATE, LATEST, keep)
            states = task.initial_states(range(2_000_000, 2_000_000 + arguments.trials))
            results = [trial(deployment, speeds, state) for state in states]
    stops = [seconds for _, seconds in results]
    write_result(
        "killed_policy",
        {
            "trials": len(results),
            "speed_when_killed_rad_s": [round(speed, 3) for speed, _ in results],
            "seconds_until_below_0.03_rad_s": [round(seconds, 3) for seconds in stops],
            "median_s": float(np.median(stops)),
            "max_s": float(np.max(stops)),
        },
    )


if __name__ == "__main__":
    main()
