"""`embodied info`: what a bug report needs."""

import dataclasses
import os
import platform
from typing import Any

from embodied.contracts.provenance import code_version, package_versions
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions and devices, for bug reports."""


def touches(config: Info) -> Touches:
    del config
    return Touches()


def info(config: Info, progress: Any) -> dict[str, Any]:
    """Versions of this package and of those that matter, the machine, and the accelerators PyTorch sees."""
    del config, progress
    import torch

    return {
        "embodied": code_version(),
        "packages": package_versions(),
        "system": platform.platform(),
        "processor": {
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": _memory_gb(),
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "rendering": os.environ.get("MUJOCO_GL", "egl"),
    }


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
