"""`embodied deploy`: a bundle drives a robot over ROS 2 topics, through the safety filter, and is recorded."""

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

import embodied
from embodied.config import check_result_path, to_json, write_result
from embodied.contracts.errors import InputError, SafetyError
from embodied.evaluate import bundles
from embodied.goals import goals_of
from embodied.progress import Progress
from embodied.statistics import wilson
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class Deploy:
    """Run a policy bundle on the ROS 2 graph, through a safety filter; record a rosbag2 MCAP per episode.

    Before anything moves, preflight compares bundle and profile with the live graph, and refuses what does not fit.
    This is software, not a rated safety function: keep the robot's own limits and a physical stop.

    Attributes:
        bundle: policy bundle, or a training folder, whose first seed is taken.
        robot: robot profile: a shipped name or a YAML file.
        env: environment to simulate; without it the robot must be on the graph.
        episodes: how many.
        seed: of the first initial state, as in 'embodied eval'.
        horizon: seconds per episode, instead of the environment's.
        check: preflight only, no commands.
        shadow: run everything, send nothing to the robot.
        speed: limit_scale instead of the profile's, which is 0.3 unless it says.
        yes: do not ask before each episode.
        record: folder for the bags.
        out: JSON file for the result.
        transport: auto, dds or rclpy.
        domain: ROS domain, instead of a free one.
        discovery: localhost, or subnet to reach other hosts.
        use_sim_time: take the time from /clock.
        logs: folder for logs, a simulated arm's too.
        goal: to reach: .json, .npz or a store.
    """

    bundle: Positional[Path]
    robot: str = "panda-mujoco"
    env: str | None = None
    episodes: int = 10
    seed: int = 1_000_000
    horizon: float | None = None
    check: bool = False
    shadow: bool = False
    speed: float | None = None
    yes: bool = False
    record: Path | None = None
    out: Path | None = None
    transport: str = "auto"
    domain: int | None = None
    discovery: str = "localhost"
    use_sim_time: bool = False
    logs: Path | None = None
    goal: Path | None = None


def touches(config: Deploy) -> Touches:
    shipped = Path(embodied.__file__).parent / "robot_bridge" / f"{config.robot}.yaml"
    profile = Path(config.robot) if Path(config.robot).is_file() else shipped
    reads = (config.bundle, profile, *([config.goal] if config.goal else []))
    return Touches(reads, tuple(path for path in (config.out, config.record) if path))


def deploy(config: Deploy, progress: Progress) -> dict[str, Any]:
    from embodied.policies.bundle import load_policy
    from embodied.robot_bridge.deploy import run_deployment

    if config.episodes < 1:
        raise InputError("--episodes: at least 1 is needed.")
    if config.horizon is not None and not 0 < config.horizon < math.inf:
        raise InputError(f"--horizon: a number of seconds above 0 is needed; found {config.horizon}.")
    check_result_path(config.out)
    bundle = Path(bundles(config.bundle)[0][1])
    policy = load_policy(bundle)
    if bool(config.goal) != bool(policy.goal_spec):
        keys = ", ".join(policy.goal_spec)
        raise InputError(f"--goal: {bundle} {f'pursues a goal ({keys}): name one' if keys else 'knows no goals'}.")
    with tempfile.TemporaryDirectory(prefix="embodied-scene-") as folder:
        simulation: dict[str, Any] = {"initial_states": [None] * config.episodes}
        if config.goal:
            chosen = goals_of(config.goal, policy.goal_spec)[0]
            policy.give_goals(chosen)  # refused here, in one line, not in the policy's process
            simulation["goal"] = Path(folder) / "goal.npz"
            np.savez(simulation["goal"], **chosen)  # type: ignore[arg-type]
        horizon = config.horizon or 10.0
        if config.env:
            size = next(iter(policy.image_spec.values())).shape[0] if policy.image_spec else 64
            from embodied.sim.suites import environment  # a robot computer has no simulator

            task = environment(config.env)
            horizon = config.horizon or task.duration
            simulation |= {
                "scene": task.export_scene(Path(folder), tuple(policy.image_spec), size),
                "initial_states": task.initial_states(range(config.seed, config.seed + config.episodes)),
                "success": task.succeeded,
            }
        else:
            simulation["confirm"] = _confirm(config, progress)
        result = run_deployment(
            bundle,
            config.robot,
            horizon_s=horizon,
            record=config.record,
            domain=config.domain,
            discovery=config.discovery,
            log_folder=config.logs,
            transport=config.transport,
            shadow=config.shadow,
            speed=config.speed,
            use_sim_time=config.use_sim_time,
            check_only=config.check,
            view=_live if sys.stdout.isatty() and "--json" not in sys.argv else None,
            progress=progress,
            **simulation,
        )
    report = _report(config, bundle, result)
    if config.out:
        write_result(config.out, report)
    return report


def _confirm(config: Deploy, progress: Progress) -> Callable[[str], bool]:
    """Asks on the terminal before a real robot moves; SafetyError where nobody could answer."""
    if config.yes or config.check:
        return lambda question: True
    if not sys.stdin.isatty():
        raise SafetyError(
            "A robot that is on the graph already moves only when somebody says so, and there is no terminal to ask on."
            "\nAdd --yes, with a hand on the physical stop; or --env ID for a simulation, --check to look only."
        )

    def ask(question: str) -> bool:
        progress.close()
        print(f"{question} Type 'run': ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip() == "run"

    return ask


@contextlib.contextmanager
def _live(deployment: Any) -> Iterator[Callable[[], None]]:
    """The terminal view; space, q and escape stop the arm and end the deployment, as Ctrl-C does."""
    from embodied.robot_bridge.watch import LiveView

    with LiveView(deployment.profile, deployment.transport) as view:

        def poll() -> None:
            if view.refresh() in ("space", "q", "escape"):
                raise KeyboardInterrupt

        yield poll


def _report(config: Deploy, bundle: Path, result: Any) -> dict[str, Any]:
    verdicts = [episode.success for episode in result.episodes]
    judged = [bool(verdict) for verdict in verdicts if verdict is not None]
    numbers = {key: value for key, value in result.safety.items() if _is_count(value)}
    return {
        "bundle": str(bundle),
        "robot": config.robot,
        "env": config.env,
        "checks": [to_json(check) for check in result.checks],
        "limit_scale": result.limit_scale,
        "shadow": result.shadow,
        "interrupted": result.interrupted,
        "checked_only": config.check,
        "initial_seeds": list(range(config.seed, config.seed + config.episodes)) if config.env else [],
        "success": wilson(sum(judged), len(judged)).to_json() if judged else None,
        "episodes": [to_json(episode) for episode in result.episodes],
        "latency_ms": {
            "observation_to_command": [1000 * s for s in result.observation_to_command_s],
            "observation_to_chunk": [1000 * s for s in result.observation_to_chunk_s],
        },
        "events": numbers,
        "control_dt": result.control_dt,
        "bags": [episode.bag for episode in result.episodes if episode.bag],
    }


def _is_count(value: str) -> bool:
    return value.replace(".", "", 1).isdigit()


def exit_code(result: dict[str, Any]) -> int:
    return int(result["checked_only"] and any(check["status"] == "failed" for check in result["checks"]))


def as_text(result: dict[str, Any]) -> str:
    from embodied.robot_bridge.preflight import Check, table

    checks = [Check(**check) for check in result["checks"]]
    if result["checked_only"]:
        failed = sum(check.status == "failed" for check in checks)
        verdict = f"{failed} of {len(checks)} checks failed" if failed else "nothing stands in the way"
        return f"{table(checks)}\n{result['bundle']} on {result['robot']}: {verdict}; nothing was commanded"
    lines = [f"{result['bundle']} on {result['robot']}: {len(result['episodes'])} episodes"]
    lines[0] += " (interrupted)" if result["interrupted"] else ""
    lines[0] += ", shadow: nothing was sent" if result["shadow"] else ""
    lines += [f"preflight: {check.name}: {check.found}" for check in checks if check.status == "warning"]
    if result["success"]:
        s = result["success"]
        lines.append(f"success {100 * s['estimate']:.0f} %  [{100 * s['low']:.0f}, {100 * s['high']:.0f}]")
    for name, values in result["latency_ms"].items():
        if values:
            median, slow = np.quantile(values, [0.5, 0.99])
            lines.append(f"{name.replace('_', ' ')}: median {median:.1f} ms, 99 % {slow:.1f} ms")
    lines += [f"recorded {bag}" for bag in result["bags"]]
    return "\n".join(lines)
