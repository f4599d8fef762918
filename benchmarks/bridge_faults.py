"""The bridge under random faults every few seconds: what the arm did, whether it came back, what memory it took.

    python benchmarks/bridge_faults.py --minutes 30 [--seed 0]

Robot, safety, policy and recorder are processes on Cyclone DDS over loopback; this one is the operator, with deadman
and e-stop. After each fault the operator brings the bridge back to RUNNING: stop, reset, arm, run. Exit status 1 if
any of these does not hold:

- position: commanded and measured joints are within the limits in every control step of the simulator's own log
  (slack 1e-3 rad and 0.02 rad: servos overshoot), whatever the fault;
- sent: what the safety process says it commanded (/bridge/command) keeps the position and velocity limits;
- speed: measured joint speed is at most 1.15 times the limit + 0.02 rad/s in every control step, and the commanded
  speed and acceleration over 0.1 s at most 1.4 times the limits + 0.02; but for two kinds of steps, which are counted
  and reported apart. Where the fault is that of the simulated robot itself, which then jumps to what it has missed (it
  holds the arm, refuses, loses or delays commands, or its process is stopped, or physics was skipped), and half a
  second after. And while a process was not scheduled, by its own clock: a control step that the robot came to more than
  15 ms late, three ticks or more that the safety process missed between two of its reports, and 0.3 s after; there by
  twice the limits at most. Commands that came late otherwise are judged like all others, and their worst is shown;
- stop: after a fault that must stop the arm, it is at rest (below 0.03 rad/s) within the time that the profile's
  deadlines promise, plus --slack, plus the time for which the robot's or the safety's process was not scheduled;
- recovery: RUNNING again within 15 s, 60 s where a process had to be started, and an arm joint moves at 0.2 rad/s or
  more before the next fault;
- memory: the median of the last tenth of each process's life is at most 2 % above that of the first tenth after
  warm-up, for every life of three times the warm-up or more (3 min; 1 min for safety and policy, which are killed now
  and then); threads and file descriptors do not grow.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bridge_faults_kinds import RECOVER, Faults
from bridge_faults_operator import Operator, Watcher, life
from bridge_faults_verdict import COMMAND_SLACK, Trial, by_fault, judge_motion, judge_stops, stood_still
from bridge_parts import picture_scene, swinging_bundle, swinging_profile
from record import machine, write_result

from embodied.contracts.errors import SafetyError
from embodied.robot_bridge.robot_log import read_robot_log

RECOVER_PROCESS = 60.0  # [s]
GROWTH = 1.02
WARM_UP = 60.0  # of processes that are killed now and then [s]
WHOLE_RUN = ("mujoco_robot", "recorder", "operator")


def run(operator: Operator, minutes: float, seed: int) -> list[Trial]:
    """Faults until the time is over."""
    random = np.random.default_rng(seed)
    faults, trials = Faults(operator, random), []
    end = time.monotonic() + 60 * minutes
    operator.next_bag()
    if operator.recover(RECOVER) is None:
        raise SafetyError(f"The bridge never came to RUNNING: {operator.state}.\nLogs: {operator.folder}")
    while time.monotonic() < end:
        operator.next_bag()
        time.sleep(float(random.uniform(1.0, 4.0)))
        name = faults.choose()
        trial = Trial(name, time.monotonic(), None)
        trials.append(trial)
        starts = sum(operator.starts.values())
        faults.own = False
        trial.bound = faults.kinds[name][1]()
        trial.own = faults.own
        trial.ended, trial.left_running = time.monotonic(), operator.state != "RUNNING"
        restarted = sum(operator.starts.values()) > starts
        trial.recovered_in = operator.recover(RECOVER_PROCESS if restarted else RECOVER)
        trial.recovered_at = time.monotonic()
        print(
            f"{len(trials):4d} {name:18} {'left RUNNING' if trial.left_running else '':12} "
            f"back in {trial.recovered_in if trial.recovered_in is None else round(trial.recovered_in, 2)} s",
            file=sys.stderr,
            flush=True,
        )
        for child in operator.children.values():
            child.check()
    return trials


@contextlib.contextmanager
def operating(folder: Path) -> Iterator[Operator]:
    parts = {"bundle": swinging_bundle(folder), "scene": picture_scene(folder / "scene", 64, 64)}
    safety = {"deadman_required": True, "estop_required": True}
    profile = swinging_profile(folder / "tiny.yaml", "jtc", safety)
    operator = Operator(folder, profile, parts)
    try:
        yield operator
    finally:
        operator.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slack", type=float, default=0.05, help="for the operator's and the wire's own time [s]")
    parser.add_argument("--keep", type=Path, default=None, help="folder for logs, otherwise they are removed")
    options = parser.parse_args()
    before = machine()["load_average"]
    warm_up = min(180.0, 15 * options.minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        with operating(folder) as operator:
            watcher = Watcher(lambda: operator.children)
            watcher.start()
            trials = run(operator, options.minutes, options.seed)
            watcher.closing.set()
            watcher.join()
            state, sent = dict(operator.deployment.state), dict(operator.sent)
        if options.keep:
            about: dict[str, Any] = {"trials": [dataclasses.asdict(trial) for trial in trials]}
            about["safety_late"] = operator.safety_late
            about["processes"] = [[*key, samples] for key, samples in watcher.lives.items()]
            (folder / "run.json").write_text(json.dumps(about))
        record = read_robot_log(operator.log)
        motion, violations = judge_motion(record, trials, operator.profile, operator.safety_late)
        violations += judge_stops(record, trials, len(operator.profile.joints), options.slack, operator.safety_late)
    still, starved = stood_still(record, trials, len(operator.profile.joints), operator.safety_late)
    violations += still
    if sent["position"] > COMMAND_SLACK or sent["velocity"] > 1.001:
        violations.append(f"sent: {sent}")
    violations += [f"{t.fault}: never RUNNING again" for t in trials if t.recovered_in is None]
    violations += [f"the safety process counts {key} {state[key]}" for key in ("violations", "bugs") if int(state[key])]
    lives = [
        {"process": name, **life(samples, warm_up if name in WHOLE_RUN else WARM_UP)}
        for (name, _), samples in watcher.lives.items()
        if len(samples) > 1
    ]
    for about in lives:
        if not about["judged"] or about["process"] == "operator":  # this process keeps the trials and every latency
            continue
        if about["rss_ratio"] > GROWTH:
            violations.append(f"memory of {about['process']}: {about['rss_ratio']} after {about['seconds']} s")
        for what in ("threads", "files"):
            if about[f"{what}_last"] > about[f"{what}_first"]:
                violations.append(f"{what} of {about['process']}: {about[f'{what}_first']} -> {about[f'{what}_last']}")
    write_result(
        "bridge_faults",
        {
            "minutes": options.minutes,
            "seed": options.seed,
            "slack_s": options.slack,
            "load_average_before": before,
            "faults": len(trials),
            "recovered": sum(trial.recovered_in is not None for trial in trials),
            "violations": violations,
            "excused": starved,
            "by_fault": by_fault(trials),
            "motion": motion,
            "sent_over_limit": {key: round(value, 6) for key, value in sent.items()},
            "processes": lives,
        },
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
