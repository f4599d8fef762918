"""`embodied select`: rank checkpoints and seeds without a simulator, and say last, best and interval together."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import Setting, check_result_path, torch_device, write_result
from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class Select:
    """Judge policies on a store's transitions by fitted Q evaluation: last, best and their intervals.

    Attributes:
        paths: bundles, or folders of them (seed_000, ...), in the order of training; and one EpisodeStore.
        reward: label set to judge by, or `source` for the store's own reward.
        out: JSON file to write the result to.
        keys: what the judge sees; by default every observation key of the store, privileged ones too.
        seed: of resamples, batches and weights.
        preset: default, or quick.
        settings: changes to the preset, for example discount 0.98 steps 20000 members 10.
        device: cpu or cuda.
    """

    paths: Positional[tuple[Path, ...]]
    reward: str
    out: Path | None = None
    keys: tuple[str, ...] = ()
    seed: int = 0
    preset: str | None = None
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    device: str = "cpu"


def touches(config: Select) -> Touches:
    reads = list(config.paths)
    if config.reward != "source":
        reads += [path / "labels" / config.reward for path in config.paths if is_store(path)]
    return Touches(tuple(reads), (config.out,) if config.out else ())


def is_store(path: Path) -> bool:
    return (path / "zarr.json").exists()


def select(config: Select, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.store import EpisodeStore
    from embodied.evaluate import bundles
    from embodied.policies.bundle import load_policy
    from embodied.policies.configure import configure
    from embodied.policies.fqe import DEFAULT_PRESET, PRESETS, fitted_q_evaluation, store_actions
    from embodied.policies.fqe import select as rule
    from embodied.train import learning_data

    stores = [path for path in config.paths if is_store(path)]
    folders = [path for path in config.paths if path not in stores]
    if len(stores) != 1 or not folders:
        raise InputError(
            f"select takes bundles and one store; found {len(folders)} and {len(stores)}.\n"
            "For example: embodied select out/policies/mine out/train --reward source"
        )
    check_result_path(config.out)
    settings = configure(PRESETS, config.preset or DEFAULT_PRESET, config.settings, "select")
    sources = [source for folder in folders for _, source in bundles(folder)]
    policies = [load_policy(source) for source in sources]
    store = EpisodeStore(stores[0])
    keys = config.keys or tuple(store.spec.observations)
    data, _ = learning_data(store, keys, config.reward, None, progress)
    for source, policy in zip(sources, policies, strict=True):
        size = int(np.prod(policy.action_spec.shape))
        if size != data.actions.shape[1]:
            raise InputError(f"{source} gives {size} numbers; an action of {store.path} has {data.actions.shape[1]}.")
    actions = store_actions(policies, store, progress=progress)
    estimates = fitted_q_evaluation(data, actions, settings, config.seed, progress, torch_device(config.device))
    steps = {place: int(policy.provenance.get("steps", 0)) for place, policy in enumerate(policies)}
    found = rule(estimates, steps)
    result = {
        "store": str(store.path),
        "reward": config.reward,
        "discount": settings.discount,
        "keys": list(keys),
        "settings": dataclasses.asdict(settings),
        "seed": config.seed,
        "policies": [described(source, estimates, place, steps[place]) for place, source in enumerate(sources)],
        "ranking": [sources[place] for place in found["ranking"]],
        "last": described(sources[found["last"]], estimates, found["last"], steps[found["last"]]),
        "best": described(sources[found["best"]], estimates, found["best"], steps[found["best"]]),
        "best_minus_last": found["best_minus_last"],
        "resolved": found["resolved"],
        "members_that_agree": found["members_that_agree"],
        "mean_of_all": found["mean_of_all"],
        "recorded": estimates.recorded,
    }
    if config.out:
        write_result(config.out, result)
    return result


def described(source: str, estimates: Any, place: int, steps: int) -> dict[str, Any]:
    """One policy: its value with interval, and how much of it rests on actions that nobody took."""
    from embodied.policies.fqe import MOST_OUTSIDE

    outside = float(estimates.outside[place])
    return {
        "policy": source,
        "steps": steps,
        **estimates.interval(place),
        "outside": outside,
        "drift": float(estimates.drift[place]),
        "settled": estimates.settled(place),
        "trusted": outside <= MOST_OUTSIDE and estimates.settled(place),
    }


def as_text(result: dict[str, Any]) -> str:
    by_name = {item["policy"]: item for item in result["policies"]}
    width = max(map(len, by_name)) + 2
    head = f"return of '{result['reward']}' from the initial states, discount {result['discount']:g}"
    lines = [f"{head}, by fitted Q evaluation; 95 % intervals", ""]
    lines += [f"{name:{width}s}{_value(by_name[name])}" for name in result["ranking"]]
    gap = result["best_minus_last"]
    verdict = "resolved" if result["resolved"] else "not resolved: chance may have chosen the best"
    lines += [
        "",
        f"last  {result['last']['policy']}  {_value(result['last'])}",
        f"best  {result['best']['policy']}  {_value(result['best'])}",
        f"best - last  {gap['estimate']:+.4g} [{gap['low']:+.4g}, {gap['high']:+.4g}], {verdict}; "
        f"{100 * result['members_that_agree']:.0f} % of the members choose the same best",
        f"mean of all {len(by_name)}  {result['mean_of_all']:.4g}; recorded episodes earned {result['recorded']:.4g}",
        "Report last, best and interval together: the best alone is the greatest of several noisy numbers.",
    ]
    return "\n".join(lines)


def _value(item: dict[str, Any]) -> str:
    text = f"{item['estimate']:.4g} [{item['low']:.4g}, {item['high']:.4g}]"
    if not item["settled"]:
        return f"{text}  not settled: give more steps, or a lower discount"
    if not item["trusted"]:
        return f"{text}  not to be trusted: {100 * item['outside']:.0f} % of its actions are unlike any recorded"
    return text
