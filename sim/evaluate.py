"""Run policies in simulation: every policy starts from the same initial states."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import BundleError, InputError
from embodied.contracts.protocols import GoalPolicy, Policy
from embodied.sim.render import FastRenderer
from embodied.sim.rollout import Behaviour, PolicyBehaviour, PolicyFactory, cached_environment, cached_policy, rollout
from embodied.sim.suites import environment
from embodied.sim.workers import run_tasks


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """What one episode came to.

    Attributes:
        policy: name under which the policy was given.
        seed: of the initial state.
        success: the environment's own rule, at any step; None where it has none.
        episode_return: undiscounted sum of the true shaped reward up to success or the end; in Gymnasium's environments
            to the end, as published scores are.
        steps: so many control steps.
    """

    policy: str
    seed: int
    success: bool | None
    episode_return: float
    steps: int


def check_fits(policy: Policy, env: Any) -> None:
    """Refuse a policy whose contract is not this environment's: keys, shapes, order, rate."""
    for kind, wanted, offered in (
        ("observation", policy.observation_spec, env.spec.observations),
        ("camera", policy.image_spec, env.spec.images),
    ):
        for key, spec in wanted.items():
            if key not in offered or tuple(offered[key].shape) != tuple(spec.shape):
                have = {k: tuple(s.shape) for k, s in offered.items()}
                raise BundleError(
                    f"The policy needs {kind} '{key}' of shape {tuple(spec.shape)}; {env.spec.environment} has {have}."
                )
    wanted = policy.goal_spec if isinstance(policy, GoalPolicy) and not policy.goals_given else {}
    for key in wanted:
        if f"goal/{key}" not in env.spec.observations:
            raise BundleError(
                f"The policy pursues a goal, '{key}', and {env.spec.environment} states none ('goal/{key}').\n"
                "Name some: --goal STORE, whose last frames are goals, or a .json or .npz file."
            )
    if tuple(policy.action_spec.names) != tuple(env.spec.action.names):
        raise BundleError(
            f"The policy's action is {list(policy.action_spec.names)};\n"
            f"{env.spec.environment} takes {list(env.spec.action.names)}."
        )
    rates = policy.control_dt, env.spec.control_dt  # 0 where a source, or Gymnasium, does not say
    if all(rates) and abs(rates[0] - rates[1]) > 1e-9:
        raise BundleError(
            f"The policy acts every {policy.control_dt} s; {env.spec.environment} steps every {env.spec.control_dt} s."
        )


def _make(env_id: str, policy: str | PolicyFactory) -> tuple[Any, Any]:
    """Environment and behaviour; only the cameras that the policy looks through are rendered."""
    if isinstance(policy, str):
        env = cached_environment(env_id, (), 64)
        return env, environment(env_id).behaviours[policy](env)
    learned = cached_policy(policy)
    sizes = {spec.shape[0] for spec in learned.image_spec.values()} or {64}
    env = cached_environment(env_id, tuple(learned.image_spec), sizes.pop())
    check_fits(learned, env)
    return env, PolicyBehaviour(learned)


def _run(env: Any, behaviour: Behaviour, seed: int) -> tuple[bool | None, float, int]:
    behaviour.reset(seed)
    total, won, count = 0.0, False, 0
    for step in rollout(env, behaviour, seed):
        total, won, count = total + step.reward, won or bool(step.success), count + 1
        if won and getattr(env, "ends_at_success", True):
            break
    return won or step.success, total, count


def _evaluate_some(env_id: str, name: str, policy: str | PolicyFactory, seeds: tuple[int, ...]) -> list[EpisodeResult]:
    env, behaviour = _make(env_id, policy)
    return [EpisodeResult(name, seed, *_run(env, behaviour, seed)) for seed in seeds]


def evaluate(
    policies: Mapping[str, str | PolicyFactory],
    env_id: str,
    seeds: Sequence[int],
    workers: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[EpisodeResult]:
    """Evaluate each policy once from each initial state; results sorted by policy, then seed.

    Args:
        policies: name -> a behaviour's name, or a picklable factory of a learned policy,
            equal to its copies so that a process loads it once.
        seeds: initial states, the same for every policy.
    """
    chunk = 5
    tasks = [
        (env_id, name, policy, tuple(seeds[i : i + chunk]))
        for name, policy in policies.items()
        for i in range(0, len(seeds), chunk)
    ]
    results: list[EpisodeResult] = []
    total = len(policies) * len(seeds)
    progress(0, total, "evaluating")
    for part in run_tasks(_evaluate_some, tasks, workers):
        results.extend(part)
        progress(len(results), total, "evaluating")
    order = {name: i for i, name in enumerate(policies)}
    return sorted(results, key=lambda r: (order[r.policy], r.seed))


def film(
    policy: str | PolicyFactory, env_id: str, seed: int, camera: str = "side", size: int = 240
) -> tuple[np.ndarray, bool | None]:
    """(T, size, size, 3) uint8 pictures of one episode, one per control step, and whether it succeeded.

    Args:
        camera: the environment's first where it has none of that name.
    """
    env, behaviour = _make(env_id, policy)
    if not env.camera_names:
        raise InputError(f"--film: {env_id} has no camera.")
    renderer = FastRenderer(env.model, size, size)
    view = env.camera_names.get(camera) or next(iter(env.camera_names.values()))
    behaviour.reset(seed)
    frames, success = [], False
    for step in rollout(env, behaviour, seed):
        frames.append(renderer.render(env.data, view))
        if success := step.success:
            break
    renderer.close()
    return np.stack(frames), success
