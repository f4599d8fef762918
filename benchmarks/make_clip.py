"""Make the small CLIP that the package ships: vlm_rewards/clip-lift.

Renders Lift episodes of their own seeds (no dataset, quickstart or evaluation uses them), writes a sentence about each
frame from the simulator's state, and trains. The order of the stages is given to the loss as a grade; nothing else of
the simulator's state is.

    python benchmarks/make_clip.py --out vlm_rewards/clip-lift
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from embodied.datasets.store import EpisodeStore
from embodied.sim.captions import NUM_STAGES, stage, wordings
from embodied.sim.collect import collect
from embodied.sim.suites import environment
from embodied.vlm_rewards.train_clip import train_small_clip

FIRST_SEED = 9_000_000
EPISODES = {"scripted": 180, "expert": 60}


def report(done: int, total: int, text: str) -> None:
    if done % max(1, total // 20) == 0 or done == total:
        print(f"{text}: {done}/{total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=Path, help="keep the rendered scenes here and use them again")
    arguments = parser.parse_args()
    images, stages = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.scenes or Path(temporary)
        for number, (behaviour, episodes) in enumerate(EPISODES.items()):
            path, seed = folder / f"{behaviour}.zarr", FIRST_SEED + 100_000 * number
            if not path.exists():
                collect("robosuite/Lift", path, behaviour, episodes, cameras=("side",), seed=seed, progress=report)
            store = EpisodeStore(path)
            truth = {k: store.read(f"observation/{k}") for k in environment("robosuite/Lift").truth_keys}
            images.append(store.frames("side"))
            stages.append(stage(**truth))
        pictures, grades = np.concatenate(images), np.concatenate(stages)
    print(json.dumps({"frames": len(pictures), "per_stage": np.bincount(grades, minlength=NUM_STAGES).tolist()}))
    # Rare stages are repeated, so that each is seen about as often as the others.
    share = np.bincount(grades, minlength=NUM_STAGES)
    rng = np.random.Generator(np.random.Philox(key=[arguments.seed, 7]))
    chosen = rng.choice(len(pictures), size=len(pictures), p=(1 / share[grades]) / (1 / share[grades]).sum())
    captions = [list(wordings(int(s))) for s in grades[chosen]]
    train_small_clip(
        pictures[chosen],
        captions,
        arguments.out,
        steps=arguments.steps,
        seed=arguments.seed,
        grades=grades[chosen] / (NUM_STAGES - 1),
        progress=report,
    )


if __name__ == "__main__":
    main()
