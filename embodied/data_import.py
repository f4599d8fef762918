"""`embodied data import`: recordings of another format into an EpisodeStore."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import Setting
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class DataImport:
    """Read recordings into an EpisodeStore, one episode at a time; interrupted, the same command goes on.

    Attributes:
        source: file or folder to read.
        store: EpisodeStore to make; must not exist.
        format: robomimic, d4rl or rosbag2; found out from the source by default.
        options: for the format's reader; rosbag2 takes: contract BUNDLE/contract.json.
        licence: of the recordings, kept with the store.
    """

    source: Positional[Path]
    store: Positional[Path]
    format: str | None = None
    options: dict[str, Setting] = dataclasses.field(default_factory=dict)
    licence: str = ""


def touches(config: DataImport) -> Touches:
    return Touches((config.source,), (config.store,), (Path(f"{config.store}.partial"),))


def data_import(config: DataImport, progress: Progress) -> dict[str, Any]:
    from embodied.data_info import summary
    from embodied.datasets.importer import import_dataset

    return summary(import_dataset(config.source, config.store, config.format, config.options, config.licence, progress))
