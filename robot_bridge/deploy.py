"""Runs a bundle on a robot for some episodes: preflight, then one episode after the other, then what came of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embodied.contracts.errors import EmbodiedError, SafetyError
from embodied.robot_bridge.deployment import Deployment, EpisodeOutcome, Success
from embodied.robot_bridge.preflight import Check, refuse


@dataclasses.dataclass(frozen=True)
class DeploymentResult:
    """All episodes, and how long the wire took.

    Attributes:
        checks: what preflight found.
        observation_to_chunk_s: stamp of the newest image (or joint state) -> the chunk made from it has arrived [s].
        observation_to_command_s: the same stamp -> the first command from that chunk was sent [s].
        safety: the safety process's last counters (chunks, rejected, clamped, holds, missed_deadlines, ...).
        control_dt: period of the policy [s].
        limit_scale: factor on velocity, acceleration and jerk limits.
        shadow: nothing was sent to the robot.
        interrupted: ended by Ctrl-C.
    """

    episodes: tuple[EpisodeOutcome, ...]
    checks: tuple[Check, ...]
    observation_to_chunk_s: tuple[float, ...]
    observation_to_command_s: tuple[float, ...]
    safety: dict[str, str]
    control_dt: float
    limit_scale: float
    shadow: bool
    domain: int
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_deployment(
    bundle: str | Path,
    profile: str | Path = "panda-mujoco",
    *,
    scene: str | Path | None = None,
    initial_states: Sequence[Mapping[str, Sequence[float]] | None] = (None,),
    horizon_s: float = 5.0,
    success: Success | None = None,
    instruction: str = "",
    record: str | Path | None = None,
    domain: int | None = None,
    discovery: str = "localhost",
    log_folder: str | Path | None = None,
    transport: str = "auto",
    shadow: bool = False,
    speed: float | None = None,
    use_sim_time: bool = False,
    goal: str | Path | None = None,
    check_only: bool = False,
    confirm: Callable[[str], bool] | None = None,
    view: Callable[[Deployment], contextlib.AbstractContextManager[Callable[[], None]]] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> DeploymentResult:
    """Run a bundle for one episode per initial state, at wall-clock speed. Ctrl-C ends it in order.

    Args:
        bundle: policy bundle folder.
        profile: name of a shipped robot profile, or a YAML file.
        scene: scene folder: a MuJoCo robot is started with it. None: the robot is on the graph already, and
            initial states are ignored.
        initial_states: per episode {"qpos": [...], "qvel": [...], "ctrl": [...]}, or None for the scene's own.
        horizon_s: length of an episode from the first chunk on [s].
        success: called about 50 times a second with the latest ground-truth poses, name -> (7,) position [m] and
            quat_xyzw; True ends the episode. None: every episode runs to the horizon.
        record: folder that gets one bag per episode (`episode_0000`, ...).
        domain: ROS domain; None picks one that nobody on this host uses.
        discovery: `localhost`, or `subnet` to leave this host.
        log_folder: logs of the processes, and a simulated arm's (`robot_log.py`); None: a temporary folder.
        transport: `auto`, `dds` or `rclpy`.
        shadow: everything runs, nothing is sent to the robot.
        speed: replaces the profile's `limit_scale`.
        use_sim_time: time comes from /clock.
        goal: .json or .npz file with what a policy that pursues goals is to reach.
        check_only: preflight and nothing else; what failed is in the result's checks.
        confirm: asked before each episode on a robot that is no simulation of ours; False ends the deployment. It
            must be given for such a robot: nothing moves unless somebody says so.
        view: shows the deployment while episodes run: a context manager that gives a function to call often.

    Raises:
        SafetyError: preflight failed, or nobody can confirm. The message holds the table.
        EmbodiedError: a process ended or did not answer in time; the message holds the end of its log.
    """
    if scene is None and confirm is None and not check_only and not shadow:
        raise SafetyError("A robot that is no simulation moves only when somebody confirms it: pass `confirm`.")
    outcomes: list[EpisodeOutcome] = []
    checks: list[Check] = []
    total, interrupted = len(initial_states), False
    progress(0, total, "starting the processes")
    with Deployment(
        bundle, profile, scene, record, domain, discovery, log_folder, transport, shadow, speed, use_sim_time, goal
    ) as deployment:
        try:
            if scene is not None:
                deployment.reset(initial_states[0])
            progress(0, total, "preflight")
            checks = deployment.preflight()
            if not check_only:
                refuse(checks)
                for index, state in enumerate(initial_states):
                    if scene is None and confirm and not confirm(_question(deployment, index, total)):
                        break
                    with view(deployment) if view else contextlib.nullcontext(lambda: None) as deployment.poll:
                        outcomes.append(deployment.run_episode(index, state, horizon_s, success, instruction))
                    progress(len(outcomes), total, outcomes[-1].end)
                    if interrupted := outcomes[-1].end == "interrupted":
                        break
        except KeyboardInterrupt:
            interrupted = True
        return _result(deployment, outcomes, checks, interrupted)


def _question(deployment: Deployment, index: int, total: int) -> str:
    profile = deployment.profile
    doing = "watch (shadow: nothing is sent)" if deployment.shadow else "move"
    return (
        f"Episode {index + 1} of {total}: {profile.name} will {doing} at {profile.limit_scale:g} of its limits. "
        "Hand on the physical stop?"
    )


def _result(
    deployment: Deployment, outcomes: Sequence[EpisodeOutcome], checks: Sequence[Check], interrupted: bool
) -> DeploymentResult:
    if deployment.contract is None:
        raise EmbodiedError("The policy process sent no contract.")
    chunk, command = deployment.latencies()
    return DeploymentResult(
        tuple(outcomes),
        tuple(checks),
        chunk,
        command,
        dict(deployment.state),
        float(deployment.contract["control_dt"]),
        deployment.profile.limit_scale,
        deployment.shadow,
        deployment.domain,
        interrupted,
    )
