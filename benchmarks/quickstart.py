"""The quickstart's figures, from the folder that `make quickstart` filled.

make quickstart && python benchmarks/quickstart.py quickstart-out
"""

import argparse
import json
from pathlib import Path

import numpy as np
from record import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--total-seconds", type=float, help="of the whole command, installation included")
    arguments = parser.parse_args()
    out = arguments.out
    stages = {p.stem: json.loads(p.read_text()) for p in (out / ".stages").glob("*.json")}
    comparison = json.loads((out / "results/comparison.json").read_text())
    success = json.loads((out / "results/success.json").read_text())
    audit = json.loads((out / "results/audit.json").read_text())["labels"]["clip"]["progress"]
    wire = json.loads((out / "results/deployment.json").read_text())
    rank = np.array([v for v in audit["per_episode"] if v is not None], dtype=float)
    figures = {
        "total_seconds_with_installation": arguments.total_seconds,
        "stage_seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
        "peak_memory_gb": max(max(stage["peak_memory_gb"].values()) for stage in stages.values()),
        "success": comparison["success"],
        "success_per_training_seed": {
            name: [seed["interval"]["estimate"] for seed in policy["seeds"]]
            for name, policy in success["policies"].items()
        },
        "against_clip_labels": comparison["against"],
        "initial_states": len(success["initial_seeds"]),
        "label_spearman": {
            "mean": audit["mean"],
            "low": audit["low"],
            "high": audit["high"],
            "median": float(np.median(rank)),
            "share_of_episodes_at_least_0.7": float((rank >= 0.7).mean()),
            "least": float(rank.min()),
            "episodes": len(rank),
        },
        "wire": {
            "success": wire["success"],
            "episodes": len(wire["episodes"]),
            "latency_ms": {
                name: {"median": float(np.median(values)), "p99": float(np.quantile(values, 0.99))}
                for name, values in wire["latency_ms"].items()
            },
            "safety": wire["events"],
        },
    }
    write_result("quickstart", figures)


if __name__ == "__main__":
    main()
