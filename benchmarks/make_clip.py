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

from embodied.pretrain_clip import PretrainClip, pretrain_clip
from embodied.progress import Progress
from embodied.sim.collect import collect

FIRST_SEED = 9_000_000
EPISODES = {"scripted": 180, "expert": 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=Path, help="keep the rendered scenes here and use them again")
    arguments = parser.parse_args()
    progress = Progress()
    with tempfile.TemporaryDirectory() as temporary:
        folder, stores = arguments.scenes or Path(temporary), []
        for number, (behaviour, episodes) in enumerate(EPISODES.items()):
            path, seed = folder / f"{behaviour}.zarr", FIRST_SEED + 100_000 * number
            if not path.exists():
                collect("robosuite/Lift", path, behaviour, episodes, cameras=("side",), seed=seed, progress=progress)
            stores.append(path)
        # Nothing is held out: the figures that are quoted come from scenes of the quickstart, which this never sees.
        config = PretrainClip(
            tuple(stores), "simulator", arguments.out, steps=arguments.steps, seed=arguments.seed, holdout=0.0
        )
        print(json.dumps(pretrain_clip(config, progress)))


if __name__ == "__main__":
    main()
