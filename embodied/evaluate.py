"""`embodied eval`: success, or return, in simulation, from the same initial states for every policy and seed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import check_result_path, write_result
from embodied.contracts.errors import BundleError, InputError
from embodied.progress import Progress
from embodied.statistics import mean_interval, mean_over_seeds, over_seeds, wilson
from embodied.verbs import Touches

FILMED = 3  # initial states shown in a film
Seeds = list[tuple[int | None, str]]  # training seed (None: a single policy) and bundle or behaviour


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Run policies in simulation from the same initial states; success, or return, with 95 % intervals.

    Attributes:
        policies: each [NAME=]WHAT: a bundle, a folder of bundles (one per training seed), or a behaviour of the
            environment (scripted, expert, random).
        env: environment, robosuite/Lift for example, or an id of Gymnasium: Hopper-v5.
        episodes: initial states.
        seed: of the first initial state; keep it apart from the seeds of the data.
        out: JSON file to write the result to.
        film: mp4 to write of the first policy's first seed, in the first three initial states.
        goal: what policies that take goals are to reach: a store (last frames of successful episodes, one per initial
            state in turn), or a .json or .npz file; by default the environment's own.
        workers: simulator processes; 0 is one per core.
    """

    policies: Positional[tuple[str, ...]]
    env: str
    episodes: int = 50
    seed: int = 1_000_000
    out: Path | None = None
    film: Path | None = None
    goal: Path | None = None
    workers: int = 0


def touches(config: Evaluate) -> Touches:
    folders = [Path(_split(text)[1]) for text in config.policies]
    # A behaviour's name has no folder; a folder that an earlier stage will make is not there yet, but has a parent.
    reads = tuple(folder for folder in folders if folder.exists() or len(folder.parts) > 1)
    reads += (config.goal,) if config.goal else ()
    return Touches(reads, tuple(path for path in (config.out, config.film) if path))


def evaluate(config: Evaluate, progress: Progress) -> dict[str, Any]:
    from embodied.sim.evaluate import evaluate as run_episodes
    from embodied.sim.suites import environment

    if config.episodes < 1 or not config.policies:
        raise InputError("eval needs at least one policy and --episodes of at least 1.")
    for path in (config.out, config.film):
        check_result_path(path)
    behaviours = environment(config.env).behaviours
    tasks: dict[str, str | Callable[[], Any]] = {}
    groups: dict[str, Seeds] = {}
    for text in config.policies:
        name, what = _split(text)
        if name in groups:
            raise InputError(f"Two policies are called '{name}'. Name them: NAME={what}")
        if what in behaviours and not Path(what).is_dir():
            found: Seeds = [(None, what)]
        else:
            found = bundles(Path(what), behaviours)
        groups[name] = found
        for seed, source in found:
            tasks[_task(name, seed)] = source if source in behaviours else bundle_loader(source, config.goal)
    seeds = range(config.seed, config.seed + config.episodes)
    results = run_episodes(tasks, config.env, seeds, workers=config.workers, progress=progress)
    by_task: dict[str, list[Any]] = {}
    for item in results:
        by_task.setdefault(item.policy, []).append(item)
    judged = all(item.success is not None for item in results)  # one measure for all that is set side by side
    report = {
        "env": config.env,
        "initial_seeds": list(seeds),
        **({"goal": str(config.goal)} if config.goal else {}),
        "policies": {
            name: _summary(found, [by_task[_task(name, s)] for s, _ in found], judged) for name, found in groups.items()
        },
    }
    if config.film:
        report["film"] = _film(tasks, config, progress)
    if config.out:
        write_result(config.out, report)
    return report


def bundles(folder: Path, behaviours: Any = ()) -> Seeds:
    """(training seed, path) of the bundle in `folder`, or of each bundle in its `seed_*` folders."""
    if not folder.is_dir():
        names = ", ".join(behaviours)
        raise InputError(
            f"There is no bundle at {folder}" + (f", and no behaviour of that name ({names})." if names else ".")
        )
    if (folder / "hashes.json").exists():
        return [(None, str(folder))]
    names = [path.parent.name for path in sorted(folder.glob("seed_*/hashes.json"))]
    found: Seeds = [(int(name[5:]), str(folder / name)) for name in names if name[5:].isdecimal()]
    if names and not found:  # of `train --vary`: seeds under different settings are no sample of one policy
        raise InputError(f"{folder} holds variations of settings: {', '.join(names)}. Name one of them.")
    if not found:
        raise BundleError(f"{folder} is no bundle and holds none (seed_000, ...). Is its training finished?")
    return found


def _split(text: str) -> tuple[str, str]:
    name, equals, what = text.partition("=")
    return (name, what) if equals else (Path(text).name, text)


def _task(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}/{seed}"


@dataclasses.dataclass(frozen=True)
class BundleLoader:
    """Loads a bundle in a simulator's process. Two are equal when the bundle's files and its goals' source are."""

    folder: str
    content: str
    goal: Path | None = None

    def __call__(self) -> Any:
        from embodied.goals import goals_of
        from embodied.policies.bundle import load_policy

        policy = load_policy(self.folder)
        if self.goal is not None and policy.goal_spec:
            policy.give_goals(*goals_of(self.goal, policy.goal_spec))
        return policy


def bundle_loader(folder: str, goal: Path | None = None) -> BundleLoader:
    """A loader of a bundle that is sound: a bad one is refused here, in one line, not in a simulator's process.

    Args:
        goal: see `goals_of`; for a policy that takes goals.
    """
    from embodied.contracts.provenance import hash_file

    BundleLoader(folder, "", goal)()
    return BundleLoader(folder, hash_file(Path(folder) / "hashes.json"), goal)


def _summary(found: Seeds, runs: list[list[Any]], judged: bool = True) -> dict[str, Any]:
    """One policy: an interval per training seed, and one over seeds and initial states together.

    Of the success rate; of the return where success was not `judged`.
    """
    returns = np.array([[item.episode_return for item in run] for run in runs], np.float64)
    outcomes = np.array([[bool(item.success) for item in run] for run in runs], np.int64)
    intervals = [
        wilson(int(won.sum()), len(won)) if judged else mean_interval(paid)
        for won, paid in zip(outcomes, returns, strict=True)
    ]
    per_seed = [
        {
            "seed": seed,
            "source": source,
            **({"success": won.tolist()} if judged else {}),
            "episode_return": paid.tolist(),
            "steps": [int(item.steps) for item in run],
            "interval": interval.to_json(),
        }
        for (seed, source), won, paid, run, interval in zip(found, outcomes, returns, runs, intervals, strict=True)
    ]
    # One policy alone: its episodes are the only source of chance.
    if not judged:
        return {"episode_return": mean_over_seeds(returns).to_json(), "seeds": per_seed}
    pooled = over_seeds(outcomes) if len(outcomes) > 1 else intervals[0]
    return {"success": pooled.to_json(), "seeds": per_seed}


def _film(tasks: dict[str, Any], config: Evaluate, progress: Progress) -> dict[str, Any]:
    from embodied.sim.evaluate import film
    from embodied.sim.rollout import cached_environment
    from embodied.sim.suites import environment
    from embodied.video import write_mp4

    assert config.film is not None
    name, policy = next(iter(tasks.items()))
    scenes, outcomes = [], []
    count = min(FILMED, config.episodes)
    for index in range(count):
        frames, success = film(policy, config.env, config.seed + index)
        scenes.append(np.concatenate([frames, np.repeat(frames[-1:], 5, axis=0)]))  # half a second to see how it ended
        outcomes.append(success)
        progress(index + 1, count, "filming")
    control_dt = environment(config.env).make(cameras=()).spec.control_dt
    cached_environment.cache_clear()  # its GL context must go while the interpreter still stands
    write_mp4(config.film, np.concatenate(scenes), fps=1 / control_dt)
    return {"path": str(config.film), "policy": name, "success": outcomes}


def as_text(result: dict[str, Any]) -> str:
    from embodied.compare import measure, table
    from embodied.compare_read import MEASURES

    what = MEASURES[measure(result["policies"])]
    lines = [f"{result['env']}, {len(result['initial_seeds'])} initial states, {what} with 95 % intervals", ""]
    return "\n".join(lines + table(result["policies"]))
