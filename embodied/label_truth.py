"""`embodied label truth`: the simulator's own shaped reward as a label set, the yardstick for every other label."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.label_files import label_writes
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelTruth:
    """Write the simulator's true shaped reward as a label set, to compare other labels with.

    Attributes:
        store: an EpisodeStore made by 'embodied sim collect'.
        name: of the new label set.
        env: environment; the store's own by default.
    """

    store: Positional[Path]
    name: str = "truth"
    env: str | None = None


def touches(config: LabelTruth) -> Touches:
    return Touches((config.store,), *label_writes(config.store, config.name))


def label_truth(config: LabelTruth, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import provenance
    from embodied.data_info import label_summary
    from embodied.datasets.labels import LabelWriter
    from embodied.datasets.store import EpisodeStore
    from embodied.sim.suites import true_reward

    store = EpisodeStore(config.store)
    env = config.env or store.spec.environment
    scores = true_reward(env, store)
    record = provenance("label truth", {"env": env}, {"dataset": store.fingerprint})
    record |= {"labeller": "truth", "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, config.name, record)
    for index, start, stop in writer.blocks():
        writer.write_block(index, scores[start:stop])
        progress(stop, store.num_frames, "frames labelled with the true reward")
    return label_summary(writer.finish(frames=store.num_frames))
