"""Drive an environment and keep what a robot would have recorded: frames, joints, actions; no rewards."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.contracts.provenance import provenance
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.sim.evaluate import check_fits
from embodied.sim.render import RENDER_FLAGS
from embodied.sim.rollout import Behaviour, PolicyBehaviour, PolicyFactory, cached_environment, cached_policy, rollout
from embodied.sim.suites import environment
from embodied.sim.workers import run_tasks


def run_episode(env: Any, behaviour: Behaviour, seed: int) -> Episode:
    """One whole episode, frame-aligned, with its final observation."""
    name = behaviour.reset(seed)
    steps = list(rollout(env, behaviour, seed))
    frames = [step.observation for step in steps] + [steps[-1].next_observation]
    count = len(frames)
    last_step = np.arange(count) == count - 2
    return Episode(
        observations={key: np.stack([f[key] for f in frames]) for key in env.spec.observations},
        images={key: np.stack([f[f"images/{key}"] for f in frames]) for key in env.spec.images},
        action=np.stack([step.action for step in steps] + [np.zeros_like(steps[0].action)]),
        step_valid=np.arange(count) < count - 1,
        terminated=last_step & steps[-1].terminated,
        truncated=last_step & (steps[-1].truncated and not steps[-1].terminated),
        timestamp=np.arange(count) * env.spec.control_dt,  # simulated time: exact by construction
        success=any(step.success for step in steps) or steps[-1].success,
        source_id=f"{name}/{seed}",
    )


def _collect_one(
    env_id: str,
    policy: str | PolicyFactory,
    cameras: tuple[str, ...],
    image_size: int,
    writer_args: tuple,
    index: int,
    seed: int,
) -> int:
    env = cached_environment(env_id, cameras, image_size)
    behaviour = (
        environment(env_id).behaviours[policy](env)
        if isinstance(policy, str)
        else PolicyBehaviour(cached_policy(policy))
    )
    StoreWriter(*writer_args).write_episode(index, run_episode(env, behaviour, seed))
    return index


def collect(
    env_id: str,
    destination: Path,
    policy: str | PolicyFactory,
    episodes: int,
    cameras: tuple[str, ...] = ("wrist", "side"),
    image_size: int = 64,
    seed: int = 0,
    workers: int = 0,
    policy_id: str = "",
    inputs: Mapping[str, str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> EpisodeStore:
    """Collect `episodes` episodes into an EpisodeStore; episode i starts from seed + i.

    Interrupted at any point, the same call goes on at the first missing episode and ends with the same bytes.

    Args:
        policy: a behaviour of the environment (`scripted`, `expert`, `random`) or a factory of a learned policy.
        policy_id: what provenance calls the policy; the behaviour's name by default.
        inputs: name -> hash of what the policy was read from; another hash does not resume the same store.
        workers: simulator processes; 0 means one per core.

    Raises:
        InputError: unknown environment or behaviour, or no episodes. BundleError: the learned policy does not fit.
    """
    known = environment(env_id).behaviours
    if isinstance(policy, str) and policy not in known:
        raise InputError(f"--policy: {env_id} has no behaviour '{policy}', and no such bundle.{suggest(policy, known)}")
    if episodes < 1:
        raise InputError("--episodes: at least 1 is needed.")
    env = cached_environment(env_id, tuple(cameras), image_size)
    if not isinstance(policy, str):
        check_fits(cached_policy(policy), env)
    config = {
        "env": env_id,
        "policy": policy_id or str(policy),
        "episodes": episodes,
        "cameras": list(cameras),
        "image_size": image_size,
        "seed": seed,
        "render_flags": RENDER_FLAGS,
    }
    writer_args = (destination, env.spec, provenance("sim collect", config, inputs or {}), f"simulation: {env_id}")
    writer = StoreWriter(*writer_args)
    missing = [i for i in range(episodes) if not writer.has(i)]
    tasks = [(env_id, policy, tuple(cameras), image_size, writer_args, i, seed + i) for i in missing]
    done = episodes - len(missing)
    progress(done, episodes, "collecting")
    for _ in run_tasks(_collect_one, tasks, workers):
        done += 1
        progress(done, episodes, "collecting")
    return writer.finish(episodes)
