"""How long the bridge takes from a joint state to the command that the simulated arm applies, and its parts.

    python benchmarks/bridge_latency.py [--seconds 60] [--runs 3] [--image 64|640x480]

Robot (joint states at 200 Hz, camera at 30 Hz), safety (200 Hz) and policy (10 Hz) are processes on Cyclone DDS over
loopback; a fourth plays the operator. Each adapter runs `--runs` times. The safety and the policy process are the
shipped ones with a notebook at their edges: which joint state was the last to be read before a command was written,
when a chunk arrived, when the policy was asked. When the arm applied a command stands in the simulator's own log: the
end of the first control step (4 ms) in which it counts. All clocks are of one host. Run it on an idle machine.

With --image 640x480 the simulator draws large pictures in software, which takes most of a core by itself.
"""

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bridge_parts import child_environment, picture_scene, swinging_bundle, swinging_profile
from bridge_stream import codec
from record import machine, write_result

from embodied.policies import bundle
from embodied.robot_bridge import node, tick_messages
from embodied.robot_bridge.deployment import Deployment
from embodied.robot_bridge.robot_log import read_robot_log
from embodied.robot_bridge.safety_node import CHUNK_TOPIC

ADAPTERS = ("forward_position", "jtc")
WARM_UP = 3.0  # after `run`, not counted [s]
WINDOW = 10.0  # over which the safety process itself keeps its figures [s]
# A tick begins before it looks at what arrived. `tick_to_command` ends when the command is written, in the ticks that
# send one; `tick` ends after everything else that a tick does (what was sent, for the recorder; the state; events).
TICK_FIGURES = tuple(
    f"{part}_{share}_ms" for part in ("tick_to_command", "tick", "lateness") for share in ("p50", "p99")
)


# ---- in the processes of the bridge


class Notebook:
    """A transport that notes when messages on some topics come and go; anything else is the transport's own."""

    def __init__(self, transport: Any, command: str, rows: dict[str, list[tuple[int, int]]], seen: list[int]) -> None:
        self._transport, self._command, self._rows, self._seen = transport, command, rows, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def publisher(self, topic: str, kind: str, qos: Any) -> Any:
        publisher = self._transport.publisher(topic, kind, qos)
        if topic not in (self._command, CHUNK_TOPIC):
            return publisher
        if topic == CHUNK_TOPIC:
            return NotedPublisher(publisher, self._rows["chunk"], header_stamp)
        return NotedPublisher(publisher, self._rows["command"], lambda _: self._seen[0])

    def subscriber(self, topic: str, kind: str, qos: Any, callback: Callable[[bytes, int], None]) -> Any:
        if topic != CHUNK_TOPIC:
            return self._transport.subscriber(topic, kind, qos, callback)

        def noted(data: bytes, received_ns: int) -> None:
            arrived = time.time_ns() - (time.monotonic_ns() - received_ns)
            self._rows["chunk"].append((arrived, header_stamp(data)))
            callback(data, received_ns)

        return self._transport.subscriber(topic, kind, qos, noted)


class NotedPublisher:
    """Notes (time of writing, the observation's stamp) [ns]."""

    def __init__(self, publisher: Any, rows: list[tuple[int, int]], observed: Callable[[bytes], int]) -> None:
        self._publisher, self._rows, self._observed = publisher, rows, observed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)

    def write(self, data: bytes) -> None:
        self._rows.append((time.time_ns(), self._observed(data)))
        self._publisher.write(data)


def header_stamp(data: bytes) -> int:
    """Of a little-endian message that begins with a header [ns]."""
    seconds, nanoseconds = np.frombuffer(data, "<i4", 2, 4)
    return int(seconds) * 10**9 + int(nanoseconds)


def noted_process(module: str, out: Path, command: str, flags: list[str]) -> None:
    """Run a process of the bridge with a notebook; the notes are written when it ends."""
    rows: dict[str, list[tuple[int, int]]] = {"command": [], "chunk": [], "act": []}
    seen = [0]  # stamp of the newest joint state that was read [ns]
    open_transport, read, load = node.open_transport, tick_messages.JointStateReader.read, bundle.load_policy

    def reading(self: Any, data: bytes) -> Any:
        sample = read(self, data)
        seen[0] = sample.stamp_ns
        return sample

    def loading(folder: Any, **options: Any) -> Any:
        policy = load(folder, **options)
        act = policy.act

        def acting(observation: Any) -> Any:
            began = time.time_ns()
            action = act(observation)
            rows["act"].append((began, time.time_ns()))
            return action

        policy.act = acting
        return policy

    def opening(name: str, options: Any) -> Any:
        return Notebook(open_transport(name, options), command, rows, seen)

    node.open_transport, tick_messages.JointStateReader.read, bundle.load_policy = opening, reading, loading
    sys.argv = [module, *flags]
    try:
        runpy.run_module(f"embodied.robot_bridge.{module}", run_name="__main__")
    finally:
        notes = {name: np.array(values, np.int64).reshape(-1, 2) for name, values in rows.items()}
        np.savez(out, command=notes["command"], chunk=notes["chunk"], act=notes["act"])


# ---- in the benchmark's own


def with_notebooks(deployment: Deployment, folder: Path) -> dict[str, Path]:
    """Replace safety and policy by the same processes with notebooks; returns their files."""
    files = {}
    for module in ("safety_node", "policy_node"):
        child, files[module] = deployment.children[module], folder / f"{module}.npz"
        child.end()
        words = ["--module", module, "--notes", str(files[module]), "--command", deployment.profile.topics.command]
        flags = [*deployment._flags[module], "--parent", str(os.getpid())]
        if module == "policy_node":
            deployment.contract = None
        else:
            deployment.state = {}
        with open(child.log_path, "ab") as log:
            child.process = subprocess.Popen(
                [sys.executable, __file__, *words, "--", *flags],
                stdout=log,
                stderr=log,
                env=child_environment(),
                start_new_session=True,
            )
    deployment._await_ready()
    return files


def spread(values_s: np.ndarray) -> dict[str, float]:
    """Median, p99 and maximum [ms]."""
    ms = np.asarray(values_s) * 1e3
    return {
        "samples": len(ms),
        "median_ms": round(float(np.median(ms)), 3),
        "p99_ms": round(float(np.quantile(ms, 0.99)), 3),
        "max_ms": round(float(ms.max()), 3),
    }


def applied_after(log: Path, commands: np.ndarray, began_ns: int, ended_ns: int) -> tuple[np.ndarray, int]:
    """Stamp of the joint state behind each command -> end of the first control step that used it [s]; and how many
    commands were replaced by a newer one before any control step, or lost."""
    record = read_robot_log(log)
    applied = record.stamp_ns[np.flatnonzero(np.diff(record.accepted.astype(np.int64)) > 0) + 1]
    applied = applied[(applied >= began_ns) & (applied < ended_ns)]
    written, used = commands.T
    newest = np.searchsorted(written, applied, side="right") - 1
    inside = ((written >= began_ns) & (written < ended_ns)).sum()
    return (applied - used[newest]) * 1e-9, max(0, int(inside) - len(np.unique(newest)))


def measure(parts: dict[str, Path], adapter: str, seconds: float) -> dict[str, Any]:
    """One run: figures by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        safety = {"deadman_required": False}
        profile = swinging_profile(folder / "tiny.yaml", adapter, safety, policy=POLICY)
        ticks: list[dict[str, float]] = []
        with Deployment(parts["bundle"], profile, parts["scene"], log_folder=folder, transport="dds") as deployment:
            files = with_notebooks(deployment, folder)
            deployment.reset(None)
            deployment.request("arm", "ARMED")
            deployment.request("run", "RUNNING")
            time.sleep(WARM_UP)
            began_ns, load = time.time_ns(), []
            for _ in range(max(1, round(seconds / WINDOW))):
                time.sleep(min(WINDOW, seconds))
                load.append(os.getloadavg()[0])
                ticks.append({key: float(deployment.state[key]) for key in TICK_FIGURES})
            ended_ns, state = time.time_ns(), dict(deployment.state)
            deployment.request("stop", "STOPPED")
            time.sleep(0.3)
        assert deployment.robot_log is not None
        notes = {module: dict(np.load(path)) for module, path in files.items()}

        def within(rows: np.ndarray) -> np.ndarray:
            return rows[(rows[:, 0] >= began_ns) & (rows[:, 0] < ended_ns)]

        chunks = within(notes["safety_node"]["chunk"])
        acted, sent = notes["policy_node"]["act"], within(notes["policy_node"]["chunk"])
        commands = within(notes["safety_node"]["command"])
        latency, replaced = applied_after(deployment.robot_log, notes["safety_node"]["command"], began_ns, ended_ns)
        last = np.searchsorted(acted[:, 0], sent[:, 0]) - 1  # what the policy was asked before it sent each chunk
        return {
            "state_at_end": state["state"],
            "holds": int(state["holds"]),
            "missed_ticks": int(state["missed_ticks"]),
            "joint_state_to_applied_command": spread(latency),
            "joint_state_to_command_written": spread((commands[:, 0] - commands[:, 1]) * 1e-9),
            "commands_replaced_or_lost": replaced,
            "observation_to_chunk_in_safety": spread((chunks[:, 0] - chunks[:, 1]) * 1e-9),
            "image_age_when_used": spread((acted[last, 0] - sent[:, 1]) * 1e-9),
            "inference": spread((acted[last, 1] - acted[last, 0]) * 1e-9),
            "safety_process_per_10_s": ticks,
            "load_average_1_min": [round(min(load), 2), round(max(load), 2)],
        }


POLICY: dict[str, Any] = {"image_timeout": 0.3, "resize_images": True}
FIGURES = (
    "joint_state_to_applied_command",
    "joint_state_to_command_written",
    "observation_to_chunk_in_safety",
    "image_age_when_used",
    "inference",
)


def across(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range over the runs of every quantile."""
    summary: dict[str, Any] = {}

    def add(name: str, values: list[float]) -> None:
        summary[name] = {"median": round(statistics.median(values), 3), "range": [min(values), max(values)]}

    for figure in FIGURES:
        for quantile in ("median_ms", "p99_ms", "max_ms"):
            add(f"{figure}_{quantile}", [run[figure][quantile] for run in runs])
    for key in runs[0]["safety_process_per_10_s"][0]:
        add(f"safety_{key}", [window[key] for run in runs for window in run["safety_process_per_10_s"]])
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run that count")
    parser.add_argument("--runs", type=int, default=3, help="of each adapter")
    parser.add_argument("--image", default="64", choices=["64", "640x480"], help="what the camera draws")
    parser.add_argument("--module", help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--command", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.module:
        noted_process(options.module, options.notes, options.command, options.flags)
        return
    width, height = (64, 64) if options.image == "64" else (640, 480)
    before = machine()["load_average"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"bundle": swinging_bundle(folder), "scene": picture_scene(folder / "scene", width, height)}
        figures: dict[str, Any] = {
            "image": [width, height],
            "seconds_per_run": options.seconds,
            "load_average_before": before,
            "image_codec_640x480_us": [codec() for _ in range(options.runs)],
        }
        for adapter in ADAPTERS:
            runs = [measure(parts, adapter, options.seconds) for _ in range(options.runs)]
            figures[adapter] = {"summary": across(runs), "runs": runs}
    write_result("bridge_latency" if options.image == "64" else f"bridge_latency_{options.image}", figures)


if __name__ == "__main__":
    main()
