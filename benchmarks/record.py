"""Where a benchmark writes what it measured: benchmarks/results/<name>.json, with machine, versions and commit."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from embodied.contracts.provenance import code_version, package_versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "load_average": [round(x, 1) for x in os.getloadavg()],
    }


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures beside what they were measured with; returns the file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]  # not where it lay
    record = {
        "command": " ".join(["python", *words]),
        "commit": commit.stdout.strip(),
        "code_version": code_version(),
        "machine": machine(),
        "packages": package_versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return path
