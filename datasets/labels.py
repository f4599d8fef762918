"""Writing label sets: one score per frame, never without provenance."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import LabelError
from embodied.datasets.frame_sets import FrameSetWriter
from embodied.datasets.store import EpisodeStore, Label

PASS = ("labeller", "config", "dataset_fingerprint")
REQUIRED_PROVENANCE = (*PASS, "code_version")


class LabelWriter(FrameSetWriter):
    """Writes the label set `name` of a store, as `FrameSetWriter` does.

    Args:
        store: local or remote.
        name: letters, digits, `_`, `-`, `.`.
        provenance: must have `labeller`, `config`, `dataset_fingerprint`, `code_version`; the first three decide
            whether blocks found on disk belong to the same pass.
        block: frames per block.
        alignment: `post` (the reward of the step at frame t is score[t + 1]) or `pre` (score[t]).

    Raises:
        LabelError: the name is taken, provenance is missing or of another dataset, or another pass was interrupted.
    """

    def __init__(
        self, store: EpisodeStore, name: str, provenance: Mapping[str, Any], block: int = 4096, alignment: str = "post"
    ) -> None:
        if missing := [key for key in REQUIRED_PROVENANCE if not provenance.get(key) and provenance.get(key) != {}]:
            raise LabelError(f"Label set '{name}' is refused: its provenance lacks {', '.join(missing)}.")
        if alignment not in ("post", "pre"):
            raise LabelError(f"Alignment '{alignment}' is unknown. Valid: post, pre.")
        super().__init__(store, "labels", name, provenance, PASS, block, {"alignment": alignment})

    def write_block(self, index: int, scores: np.ndarray, **channels: np.ndarray) -> None:
        """Stage one block: scores (frames of the block,), and further channels (frames, ...) by name.

        Raises:
            LabelError: a score or channel is not finite (names the frame), has a wrong length, or the disk refuses.
        """
        if np.ndim(scores) != 1:
            raise LabelError(f"'score' of block {index} has shape {np.shape(scores)}; each frame needs one number.")
        self.write_arrays(index, score=scores, **channels)

    def finish(self, **counts: Any) -> Label:
        """Join the blocks, put the label set in the store and read it; arguments as `FrameSetWriter.finish`."""
        super().finish(**counts)
        return self.store.label(self.name)
