"""`embodied data import`: recordings of another format into an EpisodeStore."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import Setting
from embodied.progress import Progress
from embodied.verbs import Touches

FINDINGS_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class DataImport:
    """Read recordings into an EpisodeStore, one episode at a time; interrupted, the same command goes on.

    Attributes:
        source: file, folder or URL to read.
        store: EpisodeStore to make, a folder or URL; must not exist.
        format: lerobot, robomimic, robosuite, d4rl, minari, rlds, rosbag2, rosbag1 or video; found out by default.
        options: for the format's reader, for example mapping FILE for bags, size 84x84 for videos: docs/formats.md.
        licence: of the recordings, kept with the store.
        drop_keys: observations and cameras to leave out.
        strict: refuse the source at its first bad episode; by default bad ones are left out and listed.
    """

    source: Positional[Path]
    store: Positional[Path]
    format: str | None = None
    options: dict[str, Setting] = dataclasses.field(default_factory=dict)
    licence: str = ""
    drop_keys: tuple[str, ...] = ()
    strict: bool = False


def touches(config: DataImport) -> Touches:
    return Touches((config.source,), (config.store,), (Path(f"{config.store}.partial"),))


def data_import(config: DataImport, progress: Progress) -> dict[str, Any]:
    from embodied.data_info import summary
    from embodied.datasets.importer import import_dataset

    store = import_dataset(
        config.source,
        config.store,
        config.format,
        config.options,
        config.licence,
        progress,
        config.drop_keys,
        config.strict,
    )
    return summary(store) | {"findings": [finding.to_json() for finding in store.findings]}


def as_text(result: dict[str, Any]) -> str:
    from embodied.datasets.finding import Finding

    facts = [f"{key}: {value}" for key, value in result.items() if key != "findings"]
    findings = [Finding.from_json(data) for data in result["findings"]]
    shown = [finding.as_text() for finding in findings[:FINDINGS_SHOWN]]
    more = [f"... and {len(findings) - len(shown)} more; --json or 'embodied data doctor' shows all"]
    return "\n".join([*facts, *shown, *(more if len(findings) > len(shown) else [])])
