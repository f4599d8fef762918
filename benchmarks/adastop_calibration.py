"""How often AdaStop calls equal agents different, and how many runs it takes where they differ.

    python benchmarks/adastop_calibration.py [--repeats 2000] [--out benchmarks/results/adastop_calibration.json]

Normal scores; 5 runs per look, alpha 0.05, 2,000 permutations. A few seconds on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from embodied.adastop import adastop


def wrong_rate(agents: int, looks: int, repeats: int) -> float:
    """Share of experiments with equal agents in which some pair is called different."""
    rng = np.random.default_rng([agents, looks])
    wrong = 0
    for repeat in range(repeats):
        scores = {str(agent): rng.normal(size=5 * looks) for agent in range(agents)}
        found = adastop(scores, 5, looks, 0.05, 2000, seed=repeat % 20)
        wrong += any(decision.verdict in ("first", "second") for decision in found.decisions)
    return wrong / repeats


def power(gap: float, repeats: int) -> tuple[float, float]:
    """Share of experiments that find a difference of `gap` standard deviations, and mean runs per agent of 25."""
    rng = np.random.default_rng(int(100 * gap))
    right, runs = 0, 0
    for repeat in range(repeats):
        scores = {"better": rng.normal(gap, 1, 25), "worse": rng.normal(0, 1, 25)}
        found = adastop(scores, 5, 5, 0.05, 2000, seed=repeat % 20)
        right += found.decisions[0].verdict == "first"
        runs += found.runs_used["better"]
    return right / repeats, runs / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adastop_calibration.json")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    result = {
        "repeats": repeats,
        "standard_error_at_0.05": round(float(np.sqrt(0.05 * 0.95 / repeats)), 4),
        "wrong": {
            f"{agents} agents, {looks} looks": wrong_rate(agents, looks, repeats)
            for agents, looks in ((2, 1), (2, 5), (3, 5), (4, 3))
        },
        "differences": {
            f"{gap:g} sd": dict(zip(("found", "runs"), power(gap, repeats), strict=True))
            for gap in (0.5, 1.0, 2.0, 3.0)
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
