"""Does an in-domain CLIP score episodes it has never seen? On ten Meta-World sweep-into rollouts of known success.

    python benchmarks/clip_in_domain.py --data ../shared/data/video-metaworld-rollouts --leave one
    python benchmarks/clip_in_domain.py --data ../shared/data/video-metaworld-rollouts --leave pair

Small CLIPs are trained from scratch, by `embodied pretrain clip`, on the captions of the other episodes, and score
those that were left out. Captions come from what the simulator recorded beside each video: the block is in the hole
(success), near it (at most NEAR from the target), or far from it. Prompts, regularization, steps and batch were fixed
before the first run: the caption of success against that of far, at `label clip`'s default.

`--leave one`, which was run first, compares scores of ten different models with each other, and each model has seen
one success less where it judges a success: that pulls an AUC below 0.5. `--leave pair` leaves every pair of a success
and a failure out in turn and compares the two under one model (leave-pair-out, Airola et al. 2011).

What the figures do not say: the four successes are of one checkpoint, whose block starts 0.18 m from the target, and
five of the six failures are of another, with 0.23 m.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result

from embodied.datasets.importer import import_dataset
from embodied.datasets.store import EpisodeStore
from embodied.pretrain_clip import PretrainClip, pretrain_clip
from embodied.progress import Progress
from embodied.statistics import mean_interval
from embodied.vlm_rewards.audit import spearman
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.clip_reward import PromptReward
from embodied.vlm_rewards.label_checks import Episodes, auc_interval, separation

NEAR = 0.15  # distance block-target [m]
DONE = ("the block is in the hole", "the block has been swept into the hole")
CLOSE = ("the block is near the hole", "the block is on its way to the hole")
FAR = ("the block is far from the hole", "the block lies far away from the hole")
REGULARIZATION = 0.5


def told(npz: Path, frames: int) -> tuple[np.ndarray, bool]:
    """Stage of each frame (0 far, 1 near, 2 in the hole), and whether the episode ends in success."""
    with np.load(npz, allow_pickle=False) as file:
        distance, success = file["obj_to_target"], file["success"]
    assert len(distance) == frames, f"{npz}: {len(distance)} steps for {frames} pictures"
    distance = np.where(np.isnan(distance), distance[1], distance)  # a reset step that was kept in front
    stage = np.where(success > 0, 2, np.where(distance <= NEAR, 1, 0))
    return stage, bool(success[-1] > 0)


def write_captions(path: Path, stages: list[np.ndarray], without: tuple[int, ...]) -> None:
    """Both wordings of every run of equal stages, of all episodes but some."""
    lines = []
    for episode, stage in enumerate(stages):
        edges = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist(), len(stage)]
        for start, stop in itertools.pairwise(edges) if episode not in without else ():
            run = {"episode": episode, "start": start, "stop": stop}
            lines += [json.dumps({**run, "caption": caption}) for caption in (FAR, CLOSE, DONE)[stage[start]]]
    path.write_text("\n".join(lines) + "\n")


def rises(rho: np.ndarray, success: np.ndarray) -> dict[str, Any]:
    """Mean over episodes of Spearman with step, by outcome, with a bootstrap interval over episodes."""
    groups = {"success": rho[success == 1], "failure": rho[success == 0]}
    return {name: {"episodes": len(values), **mean_interval(values).to_json()} for name, values in groups.items()}


def control(score: np.ndarray, rows: list[np.ndarray], success: np.ndarray) -> dict[str, Any]:
    rho = np.array([spearman(score[row], np.arange(len(row))) for row in rows])
    return {
        "auc_final_frame": separation(np.array([score[row[-1]] for row in rows]), success),
        "spearman_with_step": rises(rho, success),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--leave", choices=("one", "pair"), required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        import_dataset(arguments.data, folder / "store", "video", {"size": "64x64", "camera": "side"})
        store = EpisodeStore(folder / "store")
        rows = Episodes(store.episode_start, store.episode_length, store.success).rows()
        known = [
            told(arguments.data / Path(source).with_suffix(".npz"), len(row))
            for source, row in zip(store.source_ids, rows, strict=True)
        ]
        stages, success = [stage for stage, _ in known], np.array([won for _, won in known], np.int8)
        wins, losses = np.flatnonzero(success == 1).tolist(), np.flatnonzero(success == 0).tolist()
        pairs = list(itertools.product(wins, losses))
        splits: list[tuple[int, ...]] = [*pairs] if arguments.leave == "pair" else [(e,) for e in range(len(rows))]
        rho: dict[int, list[float]] = {episode: [] for episode in range(len(rows))}
        final: dict[int, list[float]] = {episode: [] for episode in range(len(rows))}
        seen, spans = [], []
        for number, left in enumerate(splits):
            captions, model = folder / f"{number}.jsonl", folder / f"model-{number}"
            write_captions(captions, stages, left)
            config = PretrainClip(
                (Path(store.path),), str(captions), model, steps=arguments.steps, batch=arguments.batch, holdout=0.0
            )
            pretrain_clip(config, Progress())
            encoder = ClipEncoder(str(model))
            reward = PromptReward(encoder, [DONE[0]], [FAR[0]], REGULARIZATION)
            for episode in left:
                score = reward.of(encoder.embed(store.read_rows("observation/images/side", rows[episode])))
                rho[episode].append(spearman(score, np.arange(len(score))))
                final[episode].append(float(score[-1]))
                spans.append(float(np.ptp(score)))
            last = np.array([row[-1] for row in rows])
            ends = reward.of(encoder.embed(store.read_rows("observation/images/side", last)))
            others = np.setdiff1d(np.arange(len(rows)), left)
            seen.append(separation(ends[others], success[others]))
    if arguments.leave == "pair":  # final[win] has one score per failure, in the order of `losses`, and so on
        ahead = [final[w][losses.index(f)] - final[f][wins.index(w)] for w, f in pairs]
        estimate = float(np.mean([(d > 0) + 0.5 * (d == 0) for d in ahead]))
        low, high = auc_interval(estimate, len(wins), len(losses))
        found: Any = {"auc": estimate, "low": low, "high": high, "successes": len(wins), "failures": len(losses)}
    else:
        found = separation(np.array([values[0] for values in final.values()]), success)
    steps = np.concatenate([np.arange(len(row)) for row in rows])
    controls = {
        "constant": np.zeros(len(steps)),
        "random": np.random.default_rng(0).uniform(size=len(steps)),
        "step_number": steps.astype(np.float64),
        "stage_told_by_simulator": np.concatenate(stages).astype(np.float64),
    }
    figures: dict[str, Any] = {
        "in_domain_clip": {
            "auc_final_frame": found,
            "spearman_with_step": rises(np.array([np.mean(values) for values in rho.values()]), success),
            "auc_final_frame_of_training_episodes": float(np.mean([s["auc"] for s in seen if s])),
            "median_span_of_scores_in_a_left_out_episode": float(np.median(spans)),
        },
        "controls": {name: control(score, rows, success) for name, score in controls.items()},
        "episodes": [
            {"source": source, "success": bool(won), "final_scores": final[e], "spearman_with_step": rho[e]}
            for e, (source, won) in enumerate(zip(store.source_ids, success, strict=True))
        ],
        "settings": {
            "models": len(splits),
            "steps": arguments.steps,
            "batch": arguments.batch,
            "near_m": NEAR,
            "goal": DONE[0],
            "baseline": FAR[0],
            "regularization": REGULARIZATION,
            "seconds": time.perf_counter() - began,
        },
    }
    write_result(f"clip_in_domain_leave_{arguments.leave}", figures)


if __name__ == "__main__":
    main()
