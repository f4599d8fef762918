"""`embodied data info`: what a store holds."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Print what a store holds: episodes, arrays with units and ranges, labels, where it came from.

    Attributes:
        store: an EpisodeStore.
    """

    store: Positional[Path]


def touches(config: DataInfo) -> Touches:
    return Touches(reads=(config.store,))


def data_info(config: DataInfo, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.info import describe
    from embodied.datasets.store import EpisodeStore

    return describe(EpisodeStore(config.store))


def summary(store: Any) -> dict[str, Any]:
    """The few facts that a verb which made a store reports."""
    success = store.success
    return {
        "store": store.path,
        "episodes": store.num_episodes,
        "frames": store.num_frames,
        "successful": int((success == 1).sum()),
        "success_unknown": int((success < 0).sum()),
        "cameras": list(store.spec.images),
        "fingerprint": store.fingerprint,
    }


def label_summary(label: Any) -> dict[str, Any]:
    """The few facts that a verb which made a label set reports."""
    return {
        "label": label.name,
        "frames": len(label.score),
        "score": {
            "min": float(label.score.min()),
            "mean": float(label.score.mean()),
            "max": float(label.score.max()),
        },
        "alignment": label.alignment,
        "labeller": label.provenance["labeller"],
    }
