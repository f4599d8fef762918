"""What preferences are worth: success of policies by data quality, reward and the annotator's error.

    python benchmarks/preference_effect.py --env metaworld/drawer-open --seeds 5
    python benchmarks/preference_effect.py --env robosuite/Lift --seeds 5
    python benchmarks/preference_effect.py --env metaworld/drawer-open --quick     # minutes: does everything run?

The experiment of offline RL-VLM-F with a scripted annotator. Data of three qualities are collected; each is labelled
with the true reward, with rewards learned from single-frame comparisons of which a share is wrong, and with the
dataset's average; IQL learns from each, and behaviour cloning from none. Each cell of the table is kept under --work
as soon as it is done, training at every checkpoint, so a killed run goes on where it was. When all cells are there,
benchmarks/results/preference_effect_<env>.json and a figure beside it (.png, .svg) are written.

A training seed stands for the whole chain: pairs, mistakes, reward model, policy. All seeds of a cell train as one
stack, each with its own rewards, and are evaluated in the same initial states, none of which is in the data.

Data (what each behaviour does stands in sim/):
    random   the hand goes from one random point to the next, and succeeds by accident, at times. In
             drawer-open these points lie around the drawer (`wander`); in Lift a third of them lie at the cube, and the
             gripper closes as it likes (`play`). Uniform actions never touch either object: no reward learns from them.
    medium   `scripted`: a mixture in which about a fifth succeeds, the rest misses, lets go, fumbles or wanders.
    expert   `expert`: the scripted policy under a small disturbance.

IQL is the paper's (expectile 0.7, discount 0.99, lr 3e-4, 256 x 2, no schedule) except for the scale of rewards: all
are brought to [-1, 0] by their 1 % and 99 % quantiles, so that one inverse temperature fits them; the paper's 3 for a
tanh, whose range is 2, is 6 for a range of 1. Episodes never terminate.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

from record import RESULTS, write_result

from embodied.contracts.provenance import hash_json, provenance
from embodied.datasets.store import EpisodeStore
from embodied.evaluate import bundle_loader
from embodied.progress import Progress
from embodied.sim.collect import collect
from embodied.sim.evaluate import evaluate
from embodied.sim.suites import true_reward
from embodied.statistics import difference, over_seeds

QUALITIES = ("random", "medium", "expert")
REWARDS = ("true", "error_0", "error_10", "error_25", "error_50", "average", "bc")
ORDER = ("true", "error_0", "bc", "average", "error_25", "error_50", "error_10")  # within a quality
FIRST_STATE = 1_000_000  # seed of the first initial state of evaluation; data have seeds below


@dataclasses.dataclass(frozen=True)
class Task:
    """What differs between environments. keys: what policy and reward model see; aimless: behaviour of random data."""

    keys: tuple[str, ...]
    sentence: str
    episodes: int
    aimless: str


LIFT_KEYS = ("joint_position", "joint_velocity", "gripper_position", "joint_target")
TASKS = {
    "metaworld/drawer-open": Task(("state",), "to open the drawer", 400, "wander"),
    "robosuite/Lift": Task(
        (*LIFT_KEYS, "cube_position", "eef_position", "cube_grasped"), "to lift the cube off the table", 1000, "play"
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a figure; cells of other settings lie in another folder."""

    env: str
    seeds: int = 5
    episodes: int = 400
    pairs: int = 1000
    steps: int = 50_000
    states: int = 100
    inputs: str = "state"
    image_size: int = 64
    expectile: float = 0.7
    inverse_temperature: float = 6.0
    discount: float = 0.99


def data_of(settings: Settings, quality: str, work: Path, workers: int, progress: Progress) -> EpisodeStore:
    """The store of one quality; pictures only where a reward model looks at them."""
    views, size = (("side",), settings.image_size) if settings.inputs == "pixels" else ((), 64)
    name = settings.env.replace("/", "_")
    path = work / "data" / f"{name}-{quality}-{settings.episodes}{'-pixels' if views else ''}"
    if path.exists():
        return EpisodeStore(path)
    first = QUALITIES.index(quality) * 100_000
    behaviour = {"random": TASKS[settings.env].aimless, "medium": "scripted", "expert": "expert"}[quality]
    return collect(settings.env, path, behaviour, settings.episodes, views, size, first, workers, progress=progress)


def learned_reward(
    settings: Settings, store: EpisodeStore, truth: np.ndarray, mistakes: float, seed: int, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """(F,) score of a reward model fitted to one draw of pairs and mistakes, and how good it is."""
    from embodied.datasets.preferences import preference_names, read_preferences
    from embodied.vlm_rewards.annotator_scripted import ScriptedAnnotator, ScriptedConfig
    from embodied.vlm_rewards.answer_log import AnswerLog
    from embodied.vlm_rewards.ask import AskConfig
    from embodied.vlm_rewards.prefer import CameraRows, PreferConfig, gather, label_by_preferences, state_rows
    from embodied.vlm_rewards.reward_model import RewardModelConfig

    pixels = settings.inputs == "pixels"
    keys = TASKS[settings.env].keys
    inputs = CameraRows(store, "side") if pixels else state_rows(store, keys)
    name = f"mistakes{round(100 * mistakes):02d}-pairs{settings.pairs}-{settings.inputs}-seed{seed}"
    if name in preference_names(store):
        preferences = read_preferences(store, name)
    else:
        source = f"true_reward of {store.fingerprint}"
        annotator = ScriptedAnnotator(truth, ScriptedConfig(mistakes=mistakes, seed=seed), source)
        # The annotator errs about a pair, not about an order: to ask again tells nothing.
        asking = AskConfig(both_orders=0.0, seed=seed)
        log = AnswerLog(Path(f"{store.path}.answers.sqlite"))
        sentence = TASKS[settings.env].sentence
        config = PreferConfig(settings.pairs, strategy="uniform", seed=seed)
        preferences = gather(store, name, sentence, "side" if pixels else "", annotator, config, asking, log)
    if name in store.label_names():
        label = store.label(name)
        fit = label.provenance["config"]["fit"]
    else:
        about = {"kind": "pixels", "camera": "side"} if pixels else {"kind": "state", "keys": list(keys)}
        config = RewardModelConfig(network="cnn" if pixels else "mlp", seed=seed)
        label, _, fit = label_by_preferences(store, name, preferences, inputs, about, config, report=progress)
    decided = preferences.decided
    better = truth[preferences.second] > truth[preferences.first]
    wrong = float(((preferences.answer == 1) != better)[decided].mean())
    held_out = fit["held_out"]
    correlation = float(np.corrcoef(_ranks(label.score), _ranks(truth))[0, 1])
    return label.score, {
        "wrong_answers": wrong,
        "held_out_accuracy": held_out["correct"] / held_out["pairs"] if held_out["pairs"] else None,
        "noisy": fit["noisy"],
        "epochs": fit["epochs"],
        "rank_correlation_with_truth": correlation,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def cell_rewards(
    settings: Settings, store: EpisodeStore, reward: str, next_frame: np.ndarray, progress: Progress
) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """(S, N) normalised reward of every transition for every seed, None for cloning; and about the labels."""
    from embodied.policies.normalize import normalize_rewards

    if reward == "bc":
        return None, []
    truth = true_reward(settings.env, store)
    if reward.startswith("error_"):
        mistakes = int(reward.removeprefix("error_")) / 100
        found = [learned_reward(settings, store, truth, mistakes, seed, progress) for seed in range(settings.seeds)]
        scores, about = [score for score, _ in found], [what for _, what in found]
    else:
        scores, about = [truth] * settings.seeds, []
    rewards = np.stack([normalize_rewards(score[next_frame], "quantile")[0] for score in scores])
    if reward == "average":
        rewards = np.repeat(rewards.mean(1, keepdims=True), rewards.shape[1], 1)
    return rewards.astype(np.float32), about


def train_cell(
    settings: Settings, store: EpisodeStore, reward: str, folder: Path, device: str, progress: Progress
) -> list[dict[str, Any]]:
    """Train all seeds as one stack, each on its own rewards, into `<folder>/seed_*`; what the labels were like."""
    import torch

    from embodied.datasets.resident import transition_batches
    from embodied.policies.bc import BC, BCConfig
    from embodied.policies.bundle import save_policy
    from embodied.policies.iql import IQL, IQLConfig
    from embodied.policies.loop import run_loop
    from embodied.train import learning_data

    torch.set_num_threads(1)
    data, contract = learning_data(store, TASKS[settings.env].keys, None, None, progress)
    rewards, about = cell_rewards(settings, store, reward, data.next_frame, progress)
    seeds = range(settings.seeds)
    if rewards is None:
        config: Any = BCConfig(cosine_actor=False)
        learner: Any = BC(config, seeds, data.observations.shape[1], data.actions.shape[1], settings.steps, device)
    else:
        config = IQLConfig(
            discount=settings.discount,
            expectile=settings.expectile,
            inverse_temperature=settings.inverse_temperature,
            cosine_actor=False,
        )
        learner = IQL(config, seeds, data.observations.shape[1], data.actions.shape[1], settings.steps, device)
    # A batch carries the number of each transition in the place of its reward; every seed looks its own reward up.
    numbers = np.arange(len(data.frame), dtype=np.float32)
    assert len(numbers) < 2**24, "float32 counts exactly up to 2**24 transitions"
    table = None if rewards is None else torch.from_numpy(rewards).to(device)
    identity = {"settings": dataclasses.asdict(settings), "reward": reward, "data": data.fingerprint()}
    identity["rewards"] = None if rewards is None else hash_json([row.tobytes().hex() for row in rewards])
    with transition_batches(data, numbers, list(seeds), config.batch_size, settings.steps, device) as batches:

        def batch(step: int) -> Any:
            found = batches(step)
            return found if table is None else {**found, "rewards": table.gather(1, found["rewards"].long())}

        run_loop(learner, batch, settings.steps, folder, identity, progress=progress)
    record = provenance("benchmarks/preference_effect.py", identity, {"dataset": store.fingerprint})
    for index, seed in enumerate(seeds):
        made_with = {"algorithm": "bc" if rewards is None else "iql", **dataclasses.asdict(config)}
        actor = learner.actor_state(index)
        save_policy(folder / f"seed_{seed:03d}", actor, contract, made_with, {**record, "seed": seed}, overwrite=True)
    return about


def evaluate_cell(settings: Settings, folder: Path, workers: int, progress: Progress) -> dict[str, Any]:
    """Success of every seed in every initial state."""
    policies = {str(seed): bundle_loader(str(folder / f"seed_{seed:03d}")) for seed in range(settings.seeds)}
    states = range(FIRST_STATE, FIRST_STATE + settings.states)
    found = evaluate(policies, settings.env, states, workers, progress)
    by_seed = {name: [r for r in found if r.policy == name] for name in policies}
    return {
        "success": [[int(r.success) for r in by_seed[name]] for name in policies],
        "mean_steps": float(np.mean([r.steps for r in found])),
    }


def run_cell(
    settings: Settings, quality: str, reward: str, work: Path, home: Path, workers: int, device: str, progress: Progress
) -> dict[str, Any]:
    """One cell, from its file where it is done."""
    folder = home / quality / reward
    done = folder / "cell.json"
    if done.exists():
        return json.loads(done.read_text())
    progress.prefix = f"{quality} {reward}: "
    start = time.perf_counter()
    store = data_of(settings, quality, work, workers, progress)
    collected = time.perf_counter()
    labels = train_cell(settings, store, reward, folder, device, progress)
    trained = time.perf_counter()
    found = evaluate_cell(settings, folder, workers, progress)
    found |= {
        "data_success": float(np.mean(store.success)),
        "labels": labels,
        "seconds": {  # of this run: a cell that was resumed took longer
            "collect": round(collected - start, 1),
            "label_and_train": round(trained - collected, 1),
            "evaluate": round(time.perf_counter() - trained, 1),
        },
    }
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(done)
    progress.close()
    interval = over_seeds(np.array(found["success"]))
    print(f"{quality:7s} {reward:9s} {interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]", flush=True)
    return found


def compare(cells: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What was expected before any cell was run (facts of the paper, section 2 d and f), and what came."""

    def outcomes(quality: str, reward: str) -> np.ndarray:
        return np.array(cells[quality][reward]["success"])

    found = []
    for other in ("average", "bc"):
        gap = difference(outcomes("random", "error_0"), outcomes("random", other))
        text = f"random data: learned reward without errors beats {other}"
        found.append({"expected": text, "difference": gap.to_json(), "holds": gap.low > 0})
    for quality in QUALITIES:
        interval = over_seeds(outcomes(quality, "error_50"))
        text = f"{quality} data: at 50 % error nothing works (at most 0.1)"
        found.append({"expected": text, "success": interval.to_json(), "holds": interval.estimate <= 0.1})
    rates = {reward: float(outcomes("expert", reward).mean()) for reward in REWARDS if reward != "error_50"}
    spread = max(rates.values()) - min(rates.values())
    text = "expert data: all within 0.05, 50 % error aside"
    found.append({"expected": text, "spread": spread, "holds": spread <= 0.05})
    return found


def figure(settings: Settings, rates: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Bars by data quality, one per reward, with 95 % intervals; .png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "embodied"
    names = {"true": "true reward", "average": "dataset average", "bc": "cloning (no reward)"}
    names |= {f"error_{p}": f"preferences, {p} % wrong" for p in (0, 10, 25, 50)}
    colours = ("#111827", "#1d4ed8", "#3b82f6", "#93c5fd", "#dbeafe", "#d97706", "#9ca3af")
    canvas, axes = pyplot.subplots(figsize=(9, 3.6))
    width = 0.8 / len(REWARDS)
    for index, (reward, colour) in enumerate(zip(REWARDS, colours, strict=True)):
        shown = [(place, rates[q][reward]) for place, q in enumerate(QUALITIES) if reward in rates.get(q, {})]
        x = [place + (index - (len(REWARDS) - 1) / 2) * width for place, _ in shown]
        y = np.array([rate["estimate"] for _, rate in shown])
        error = [[r["estimate"] - r["low"] for _, r in shown], [r["high"] - r["estimate"] for _, r in shown]]
        axes.bar(x, y, width * 0.92, yerr=error, color=colour, capsize=2, label=names[reward], error_kw={"lw": 0.9})
    axes.set_xticks(range(len(QUALITIES)), [f"{quality} data" for quality in QUALITIES])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("success")
    axes.set_title(
        f"{settings.env}: {settings.seeds} seeds x {settings.states} initial states, 95 % intervals", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for suffix in (".png", ".svg"):
        metadata = {"Date": None} if suffix == ".svg" else None
        canvas.savefig(path.with_suffix(suffix), dpi=150, bbox_inches="tight", metadata=metadata)
    pyplot.close(canvas)


def parse() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=TASKS, required=True)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/preference-effect"),
        help="keeps data and cells; another after a change of code",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, help="of each quality")
    parser.add_argument("--pairs", type=int, default=1000, help="asked about per seed")
    parser.add_argument("--steps", type=int, default=50_000, help="of training; the paper's are 200,000")
    parser.add_argument("--states", type=int, default=100, help="initial states that every seed is evaluated in")
    parser.add_argument("--inputs", choices=("state", "pixels"), default="state", help="of the reward model")
    parser.add_argument("--qualities", nargs="+", choices=QUALITIES, default=QUALITIES, help="run these only")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(ORDER), help="run these only")
    parser.add_argument("--workers", type=int, default=0, help="simulator processes; 0: one per core")
    parser.add_argument("--device", default="cpu", help="of training")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes no result, only what --work holds")
    args = parser.parse_args()
    sizes = {"episodes": args.episodes or TASKS[args.env].episodes}
    sizes |= {name: getattr(args, name) for name in ("seeds", "pairs", "steps", "states")}
    if args.quick:
        sizes = {"seeds": min(args.seeds, 2), "episodes": 12, "pairs": 60, "steps": 300, "states": 3}
    return args, Settings(args.env, inputs=args.inputs, **sizes)


def main() -> None:
    args, settings = parse()
    home = args.work / f"{settings.env.replace('/', '_')}-{hash_json(dataclasses.asdict(settings))[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    (home / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=1))
    progress = Progress()
    for quality in args.qualities:
        for reward in (name for name in ORDER if name in args.rewards):
            run_cell(settings, quality, reward, args.work, home, args.workers, args.device, progress)
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for quality in QUALITIES:
        files = {reward: home / quality / reward / "cell.json" for reward in REWARDS}
        cells[quality] = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    rates = {
        quality: {name: over_seeds(np.array(cell["success"])).to_json() for name, cell in found.items()}
        for quality, found in cells.items()
    }
    complete = all(len(found) == len(REWARDS) for found in cells.values())
    figures = {"settings": dataclasses.asdict(settings), "success": rates, "cells": cells}
    name = f"preference_effect_{settings.env.split('/')[1].lower().replace('-', '_')}"
    name += "_pixels" if settings.inputs == "pixels" else ""
    if complete:
        figures["expected"] = compare(cells)
    if complete and not args.quick:
        write_result(name, figures)
        figure(settings, rates, RESULTS / f"{name}.png")
    else:
        (home / "result.json").write_text(json.dumps(figures, indent=1))
        figure(settings, rates, home / f"{name}.png")
        print(f"{sum(map(len, cells.values()))} of {len(QUALITIES) * len(REWARDS)} cells, in {home}")


if __name__ == "__main__":
    main()
