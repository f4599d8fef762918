"""What a store holds, in a form that prints and that JSON takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.specs import ArraySpec
from embodied.datasets.finding import SEVERITIES
from embodied.datasets.location import is_remote
from embodied.datasets.statistics import QUANTILES, Statistics, store_statistics
from embodied.datasets.store import EpisodeStore

SHOWN = ("min", "max", "mean", "std", *QUANTILES)
INSTRUCTIONS_SHOWN = 20


def describe(store: EpisodeStore) -> dict[str, Any]:
    """Episodes, arrays with units, statistics and sizes, rates, success, labels, findings, origin.

    Reads every array but the images, in blocks.
    """
    lengths, success, spec = store.episode_length, store.success, store.spec
    instructions = list(dict.fromkeys(text for text in store.instructions if text))
    provenance = store.attributes.get("provenance", {})
    flags = ("step_valid", "terminated", "truncated", "timestamp")
    numbers = [name for name in store.names() if name not in flags and not name.startswith("observation/images/")]
    found = store_statistics(store, numbers)  # of actions and rewards: over the steps, as a final row is zero
    return {
        "path": store.path,
        "environment": spec.environment,
        "episodes": store.num_episodes,
        "frames": store.num_frames,
        "steps": int(np.count_nonzero(store.read("step_valid"))),
        "episode_length": _spread(lengths),
        "control_dt": spec.control_dt,
        "duration": _duration(store),
        "clock": _clock(store),
        "success": {
            "succeeded": int((success == 1).sum()),
            "failed": int((success == 0).sum()),
            "unknown": int((success < 0).sum()),
        },
        "terminated": int(np.count_nonzero(store.read("terminated"))),
        "truncated": int(np.count_nonzero(store.read("truncated"))),
        "instructions": instructions[:INSTRUCTIONS_SHOWN],
        "num_instructions": len(instructions),
        "observations": {key: _array(s, found.get(f"observation/{key}")) for key, s in spec.observations.items()},
        "cameras": {camera: _camera(store, camera) for camera in spec.images},
        "action": _action(store, found),
        "reward": _array(ArraySpec(()), found.get("reward")) if spec.has_reward else None,
        "labels": {name: _label(store, name) for name in store.label_names()},
        "bytes": _bytes(store),
        "sizes": {name: _size(store, name) for name in store.names()},
        "findings": {severity: sum(f.severity == severity for f in store.findings) for severity in SEVERITIES},
        "source": store.attributes.get("source", ""),
        "licence": store.attributes.get("licence", ""),
        "made_by": provenance.get("made_by", ""),
        "date": provenance.get("date", ""),
        "code_version": provenance.get("code_version", ""),
        "fingerprint": store.fingerprint,
    }


def _camera(store: EpisodeStore, camera: str) -> dict[str, Any]:
    """Shape and type of the array that is there, and how many episodes have pictures; its frames are not read."""
    array = store.array(f"observation/images/{camera}")
    episodes = int(np.count_nonzero(store.has_camera(camera)))
    return {"shape": list(array.shape[1:]), "dtype": str(array.dtype), "episodes": episodes}


def _action(store: EpisodeStore, found: Mapping[str, Statistics]) -> dict[str, Any] | None:
    action = store.spec.action
    if action is None:
        return None
    return _array(action, found.get("action")) | {"control_mode": action.control_mode, "scale": list(action.scale)}


def _array(spec: ArraySpec, found: Statistics | None) -> dict[str, Any]:
    """Shape, unit, names, and per element what `store_statistics` found; None where there is no finite number."""
    known = found is not None and bool((found.count > 0).all())
    values = (
        {"min": found.min, "max": found.max, "mean": found.mean, "std": found.std, **found.quantiles} if found else {}
    )
    return {
        "shape": list(spec.shape),
        "unit": spec.unit,
        "names": list(spec.names),
        "privileged": spec.privileged,
        **{name: np.asarray(values[name]).tolist() if known else None for name in SHOWN},
    }


def _label(store: EpisodeStore, name: str) -> dict[str, Any]:
    label = store.label(name)
    low, median, high = np.quantile(label.score, [0.01, 0.5, 0.99])
    return {
        "labeller": label.provenance["labeller"],
        "alignment": label.alignment,
        "q01": float(low),
        "median": float(median),
        "q99": float(high),
        "channels": sorted(label.channels),
        "date": label.provenance.get("date", ""),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _duration(store: EpisodeStore) -> float:
    """Recorded time over all episodes [s], from timestamps; 0 where the source had none."""
    times = store.read("timestamp")
    return float(times[store.episode_start + store.episode_length - 1].sum())


def _clock(store: EpisodeStore) -> dict[str, float] | None:
    """Seconds from frame to frame by the timestamps [s]: median, 1 % and 99 % quantile; None where there are none."""
    times = store.read("timestamp")
    within = np.ones(max(0, len(times) - 1), bool)
    within[store.episode_start[1:] - 1] = False
    steps = np.diff(times)[within]
    if not times.any() or not len(steps):
        return None
    low, median, high = np.quantile(steps, [0.01, 0.5, 0.99])
    return {"q01": float(low), "median": float(median), "q99": float(high)}


def _size(store: EpisodeStore, name: str) -> dict[str, int | None]:
    """Bytes of an array: as it is read, and compressed on disk (None for a remote store)."""
    disk = None if is_remote(store.path) else _folder_bytes(Path(store.path) / name)
    return {"raw": int(store.array(name).nbytes), "disk": disk}


def _bytes(store: EpisodeStore) -> int | None:
    """Size on disk [B]; None for a remote store."""
    return None if is_remote(store.path) else _folder_bytes(Path(store.path))


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
