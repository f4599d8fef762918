"""`embodied label import`: LeRobot's progress sidecar as a label set."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from embodied.contracts.errors import InputError
from embodied.label_files import label_writes
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelImport:
    """Read a label set from LeRobot's progress sidecar; its rows are joined by episode and frame number.

    Attributes:
        store: an EpisodeStore.
        name: of the new label set.
        file: the sidecar, sarm_progress.parquet beside a LeRobot dataset.
        column: of the sidecar.
    """

    store: Positional[Path]
    name: str
    file: Path
    column: Literal["progress_sparse", "progress_dense"] = "progress_sparse"


def touches(config: LabelImport) -> Touches:
    return Touches((config.store, config.file), *label_writes(config.store, config.name))


def label_import(config: LabelImport, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import hash_file
    from embodied.data_info import label_summary
    from embodied.datasets.progress_sidecar import read_progress
    from embodied.datasets.store import EpisodeStore
    from embodied.vlm_rewards.label_store import write_scores

    store = EpisodeStore(config.store)
    scores = read_progress(config.file, store, config.column)
    # LeRobot has no rows for final observations. The last step is paid the score of one: progress stays where it was.
    last = store.episode_start + store.episode_length - 1
    final = last[~store.read("step_valid")[last] & (store.episode_length > 1)]
    carried = final[np.isnan(scores[final])]
    scores[carried] = scores[carried - 1]
    if missing := int(np.isnan(scores).sum()):
        first = int(np.argmax(np.isnan(scores)))
        episode = int(np.searchsorted(store.episode_start, first, side="right")) - 1
        raise InputError(
            f"{config.file} has no '{config.column}' for {missing} of {store.num_frames} frames of {config.store}, "
            f"first episode {episode}, frame {first - int(store.episode_start[episode])}.\n"
            "A label set has a score for every frame: make the sidecar for this dataset."
        )
    settings = {"column": config.column, "file": config.file.name, "carried_final_observations": len(carried)}
    label = write_scores(store, config.name, "progress sidecar", settings, scores, file=hash_file(config.file))
    progress(store.num_frames, store.num_frames, "frames labelled")
    return {**label_summary(label), "carried_final_observations": len(carried)}
