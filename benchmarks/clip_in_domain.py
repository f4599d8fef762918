"""Does an in-domain CLIP score episodes it has never seen? On ten Meta-World sweep-into rollouts of known success.

    python benchmarks/clip_in_domain.py --data ../shared/data/video-metaworld-rollouts

Leave one episode out: for each of the ten a small CLIP is trained from scratch, by `embodied pretrain clip`, on the
captions of the other nine, and scores the tenth. Captions come from what the simulator recorded beside each video: the
block is in the hole (success), near it (at most NEAR from the target), or far from it. Prompts and regularization
were fixed before the first run: the caption of success against that of far, at `label clip`'s default.

What the figures do not say: the four successes are of one checkpoint, whose block starts 0.18 m from the target, and
five of the six failures are of another, with 0.23 m. Scores compared across episodes come from different models.
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
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.clip_reward import PromptReward
from embodied.vlm_rewards.label_checks import Episodes, check_label

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


def write_captions(path: Path, stages: list[np.ndarray], without: int) -> None:
    """Both wordings of every run of equal stages, of all episodes but one."""
    lines = []
    for episode, stage in enumerate(stages):
        edges = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist(), len(stage)]
        for start, stop in itertools.pairwise(edges) if episode != without else ():
            run = {"episode": episode, "start": start, "stop": stop}
            lines += [json.dumps({**run, "caption": caption}) for caption in (FAR, CLOSE, DONE)[stage[start]]]
    path.write_text("\n".join(lines) + "\n")


def summary(checks: dict[str, Any]) -> dict[str, Any]:
    return {"auc_final_frame": checks["final"], "spearman_with_step": checks["orientation"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", default="clip_in_domain", help="of the file in benchmarks/results")
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
        known = [
            told(arguments.data / Path(source).with_suffix(".npz"), int(length))
            for source, length in zip(store.source_ids, store.episode_length, strict=True)
        ]
        stages, success = [stage for stage, _ in known], np.array([won for _, won in known], np.int8)
        score, stage = np.zeros(store.num_frames, np.float32), np.concatenate(stages)
        for episode, (start, length) in enumerate(zip(store.episode_start, store.episode_length, strict=True)):
            captions, model = folder / f"{episode}.jsonl", folder / f"model-{episode}"
            write_captions(captions, stages, without=episode)
            config = PretrainClip(
                (Path(store.path),), str(captions), model, steps=arguments.steps, batch=arguments.batch, holdout=0.0
            )
            pretrain_clip(config, Progress())
            encoder = ClipEncoder(str(model))
            reward = PromptReward(encoder, [DONE[0]], [FAR[0]], REGULARIZATION)
            score[start : start + length] = reward.of(encoder.embed(store.frames("side", start, start + length)))
    episodes = Episodes(store.episode_start, store.episode_length, success)
    step = np.concatenate([np.arange(length) for length in store.episode_length])
    controls = {
        "in_domain_clip": score,
        "constant": np.zeros(store.num_frames),
        "random": np.random.default_rng(0).uniform(size=store.num_frames),
        "step_number": step.astype(np.float64),
        "stage_told_by_simulator": stage.astype(np.float64),
    }
    figures: dict[str, Any] = {name: summary(check_label(values, episodes)) for name, values in controls.items()}
    last = store.episode_start + store.episode_length - 1
    figures["episodes"] = [
        {"source": source, "success": bool(won), "first_score": float(score[a]), "final_score": float(score[b])}
        for source, won, a, b in zip(store.source_ids, success, store.episode_start, last, strict=True)
    ]
    figures["settings"] = {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "near_m": NEAR,
        "goal": DONE[0],
        "baseline": FAR[0],
        "regularization": REGULARIZATION,
        "seconds": time.perf_counter() - began,
    }
    write_result(arguments.name, figures)


if __name__ == "__main__":
    main()
