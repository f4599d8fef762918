"""Does the shipped clip-lift score scenes it has never seen? On fresh Lift episodes of the quickstart's mixture.

    python benchmarks/clip_held_out.py

Prompts, regularization, camera and behaviour are the quickstart's. The episodes' seeds belong to nothing else: not to
the scenes that clip-lift was trained on, to the quickstart's data or to any evaluation. Success is robosuite's.
Against it stand a constant score, a random one, the step's number, and the simulator's own progress as a ceiling.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from clip_in_domain import control, rises
from record import write_result

from embodied.datasets.store import EpisodeStore
from embodied.pipeline import load_yaml
from embodied.progress import Progress
from embodied.sim.collect import collect
from embodied.sim.suites import true_progress
from embodied.vlm_rewards.audit import spearman
from embodied.vlm_rewards.label_checks import Episodes, separation
from embodied.vlm_rewards.label_store import label_clip

ENV, CAMERA, FIRST_SEED = "robosuite/Lift", "side", 7_000_000
QUICKSTART = Path(__file__).parents[1] / "embodied" / "quickstart.yaml"


def quickstart_prompts() -> dict[str, Any]:
    """Goals, baselines and regularization, in this order, of the quickstart's `label clip`."""
    stage = load_yaml(QUICKSTART)["stages"]["label_clip"]
    return {key: stage[key] for key in ("goal", "baseline", "regularization")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=150)
    arguments = parser.parse_args()
    prompts = quickstart_prompts()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "held_out.zarr"
        collect(ENV, path, "scripted", arguments.episodes, (CAMERA,), seed=FIRST_SEED, progress=Progress())
        store = EpisodeStore(path)
        score = label_clip(store, "clip", CAMERA, *prompts.values()).score
        progress = true_progress(ENV, store)
        rows = Episodes(store.episode_start, store.episode_length, store.success).rows()
        success = np.asarray(store.success, np.int8)
    steps = np.concatenate([np.arange(len(row)) for row in rows])
    rho = np.array([spearman(score[row], np.arange(len(row))) for row in rows])
    ranks = np.array([spearman(score[row], progress[row]) for row in rows])
    controls = {
        "constant": np.zeros(len(steps)),
        "random": np.random.default_rng(0).uniform(size=len(steps)),
        "step_number": steps.astype(np.float64),
        "progress_told_by_simulator": progress.astype(np.float64),
    }
    write_result(
        "clip_held_out",
        {
            "clip_lift": {
                "auc_final_frame": separation(np.array([score[row[-1]] for row in rows]), success),
                "spearman_with_step": rises(rho, success),
                "spearman_with_progress": rises(ranks, success),
            },
            "controls": {name: control(values, rows, success) for name, values in controls.items()},
            "settings": {"episodes": len(rows), "first_seed": FIRST_SEED, "camera": CAMERA, **prompts},
        },
    )


if __name__ == "__main__":
    main()
