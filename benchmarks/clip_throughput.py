"""CLIP labels from frames in a store to scores in a store: ours, and the way open_clip is usually called, in one run.

    python benchmarks/clip_throughput.py                           768 frames, 3 rounds: about ten minutes on one core
    python benchmarks/clip_throughput.py --frames 64 --rounds 1    a quick look
    python benchmarks/clip_throughput.py --again                   further prompts over 3,072 frames

ViT-B-32 with random weights: what an encoder costs does not depend on them, what its labels mean does, so nothing is
said of that. Frames are 256 x 256: smooth random fields that drift, with a sensor's noise. The usual way reads the same
store, transforms each picture with open_clip's own PIL transform, encodes batches of 32 and writes the same label set.
Both load the model first. One torch thread. Contenders take turns; medians over the rounds.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import open_clip
import torch
from PIL import Image
from record import write_result
from safetensors.torch import save_file
from scipy.stats import spearmanr

from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.label_store import label_clip, write_scores

MODEL, SIDE, EPISODE = "ViT-B-32", 256, 64
GOAL, BASELINE = "a robot arm holding a mug", "a robot arm"


def make_store(path: Path, frames: int) -> None:
    """Episodes of 64 pictures: a smooth random field that drifts, with a sensor's noise."""
    spec = DatasetSpec({}, {"side": ArraySpec((SIDE, SIDE, 3), "uint8")}, None)
    writer = StoreWriter(path, spec, {})
    rng = np.random.default_rng(0)
    for index, start in enumerate(range(0, frames, EPISODE)):
        length = min(EPISODE, frames - start)
        coarse = rng.uniform(0, 255, (9, 9, 3)).astype(np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC))
        rows = [picture[t : t + SIDE, 2 * t : 2 * t + SIDE] for t in range(length)]
        noisy = np.stack(rows) + rng.normal(0, 2, (length, SIDE, SIDE, 3))
        no = np.zeros(length, bool)
        pictures = noisy.clip(0, 255).astype(np.uint8)
        writer.write_episode(index, Episode({}, {"side": pictures}, None, no, no, no, np.arange(length) * 0.1))
    writer.finish(-(-frames // EPISODE))


def usual(store: EpisodeStore, weights: str, name: str) -> np.ndarray:
    """Per-picture PIL transform, batches of 32, fp32; the same reward and the same label set as ours."""
    model, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(MODEL)
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(tokenizer([GOAL, BASELINE]), normalize=True).double().numpy()
        parts = []
        for start in range(0, store.num_frames, 32):
            frames = store.frames("side", start, min(start + 32, store.num_frames))
            pixels = torch.stack([transform(Image.fromarray(frame)) for frame in frames])  # type: ignore[operator]
            parts.append(model.encode_image(pixels, normalize=True).numpy())
    from embodied.vlm_rewards.clip_reward import goal_baseline_reward

    scores = goal_baseline_reward(np.concatenate(parts), text[0], text[1], 0.5).astype(np.float32)
    write_scores(store, name, "usual", {"model": MODEL}, scores)
    return scores


class Busy:
    """Adds up the time that the encoder is at work."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._real = ClipEncoder.encode

    def __enter__(self) -> "Busy":
        def timed(encoder: ClipEncoder, pixels: torch.Tensor) -> np.ndarray:
            start = time.perf_counter()
            found = self._real(encoder, pixels)
            self.seconds += time.perf_counter() - start
            return found

        ClipEncoder.encode = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        ClipEncoder.encode = self._real  # type: ignore[method-assign]


def again(folder: Path, weights: str, frames: int, rounds: int) -> dict[str, Any]:
    """Seconds of a first prompt, which runs the encoder, and of further prompts, which read what it kept."""
    make_store(folder / "store", frames)
    store = EpisodeStore(folder / "store")
    settings: dict[str, Any] = {"model": MODEL, "pretrained": weights}
    taken = []
    for number in range(1 + rounds):
        goal = [GOAL, "a mug on the table", "a mug in the sink", "an open drawer", "a closed door"][number]
        start = time.perf_counter()
        label_clip(store, f"prompt_{number}", "side", [goal], [BASELINE], 0.5, **settings)
        taken.append(time.perf_counter() - start)
        print(f"prompt {number}: {taken[-1]:.2f} s", flush=True)
    return {
        "model": MODEL,
        "frames": frames,
        "first_prompt_seconds": taken[0],
        "further_prompts_seconds": taken[1:],
        "speedup": taken[0] / statistics.median(taken[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="time further prompts over the same frames only")
    arguments = parser.parse_args()
    arguments.frames = arguments.frames or (3072 if arguments.again else 768)
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {"usual fp32": [], "ours fp32": [], "ours bf16": [], "second prompt": []}
    busy: dict[str, list[float]] = {"ours fp32": [], "ours bf16": []}
    scores: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        weights = str(folder / "open_clip_model.safetensors")
        save_file({k: v.contiguous() for k, v in open_clip.create_model(MODEL).state_dict().items()}, weights)
        if arguments.again:
            write_result("clip_second_prompt", again(folder, weights, arguments.frames, min(arguments.rounds, 4)))
            return
        make_store(folder / "store", arguments.frames)
        for number in range(arguments.rounds):
            for name in list(taken)[:: 1 if number % 2 == 0 else -1]:
                if name == "second prompt":
                    continue
                copy = folder / f"{name.replace(' ', '_')}_{number}"
                shutil.copytree(folder / "store", copy)
                store = EpisodeStore(copy)
                start = time.perf_counter()
                if name == "usual fp32":
                    scores[name] = usual(store, weights, "clip")
                    taken[name].append(time.perf_counter() - start)
                else:
                    settings: dict[str, Any] = {"model": MODEL, "pretrained": weights, "precision": name.split()[1]}
                    with Busy() as encoder:
                        scores[name] = label_clip(store, "clip", "side", [GOAL], [BASELINE], 0.5, **settings).score
                    taken[name].append(time.perf_counter() - start)
                    busy[name].append(encoder.seconds / taken[name][-1])
                    if name == "ours fp32":
                        start = time.perf_counter()
                        label_clip(store, "again", "side", ["a mug on the table"], [BASELINE], 0.25, **settings)
                        taken["second prompt"].append(time.perf_counter() - start)
                shutil.rmtree(copy)
                print(f"round {number} {name}: {taken[name][-1]:.1f} s", flush=True)
    median = {name: statistics.median(values) for name, values in taken.items()}
    rank: Any = spearmanr(scores["ours fp32"], scores["ours bf16"])
    figures = {
        "model": MODEL,
        "frames": arguments.frames,
        "rounds": arguments.rounds,
        "seconds": {name: [round(value, 2) for value in values] for name, values in taken.items()},
        "frames_per_second": {
            name: arguments.frames / median[name] for name in ("usual fp32", "ours fp32", "ours bf16")
        },
        "ours_over_usual_fp32": median["usual fp32"] / median["ours fp32"],
        "ours_bf16_over_usual_fp32": median["usual fp32"] / median["ours bf16"],
        "second_prompt_speedup": median["ours fp32"] / median["second prompt"],
        "encoder_busy": {name: statistics.median(values) for name, values in busy.items()},
        "largest_score_difference_usual_ours": float(np.abs(scores["usual fp32"] - scores["ours fp32"]).max()),
        "spearman_fp32_bf16": float(rank.statistic),
        "bf16_units": sorted(flag for flag in ("amx_bf16", "avx512_bf16") if flag in Path("/proc/cpuinfo").read_text()),
    }
    write_result("clip_throughput", figures)


if __name__ == "__main__":
    main()
