"""What products in bfloat16 change of a learned dynamics' steps, beside the error that the dynamics have anyway.

    python benchmarks/step_precision.py --dynamics dynamics/seed_000 --store hopper.zarr

5,000 recorded steps, drawn with seed 0, through the same elites with the same noise in fp32 and in bf16. Per number of
the next observation, in units of the spread of its recorded change: root mean square of what bf16 moves it by, and of
the elites' mean prediction's error in fp32. The steps are among those trained on, so that error is on the small side.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from record import write_result

from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import observation_matrix
from embodied.policies.dynamics_bundle import load_dynamics
from embodied.policies.relu_network import set_precision

STEPS = 5000


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(0).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamics", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, store = load_dynamics(arguments.dynamics), EpisodeStore(arguments.store)
    seen = torch.from_numpy(observation_matrix(store, list(model.facts["contract"].observations)))
    rows = np.random.default_rng(0).choice(np.flatnonzero(store.read("step_valid")), STEPS, replace=False)
    now, following = seen[rows], seen[rows + 1]
    actions = torch.from_numpy(store.read("action")[rows]).clamp(-1, 1)
    found = {}
    for precision in ("fp32", "bf16"):
        set_precision(precision)
        found[precision] = model.step(now, actions, np.random.default_rng(1), "aleatoric")
    set_precision("fp32")
    mean, _ = model.predict(now, actions)
    spread = (following - now).std(0)
    moved = rms(found["bf16"][0] - found["fp32"][0]) / spread
    error = rms(mean[list(model.elites), :, :-1].mean(0) - following) / spread
    doubt = (found["bf16"][3] / found["fp32"][3] - 1.0).abs()
    figures = {
        "steps": STEPS,
        "moved": [round(float(x), 4) for x in moved],
        "error": [round(float(x), 4) for x in error],
        "largest_share_of_error": round(float((moved / error).max()), 2),
        "doubt_mean_relative": round(float(doubt.mean()), 4),
    }
    print(json.dumps(figures, indent=1)) if arguments.dry else write_result("step_precision", figures)


if __name__ == "__main__":
    main()
