"""`embodied data export`: an EpisodeStore in the format of another library."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import Setting
from embodied.progress import Progress
from embodied.verbs import Touches

FILES_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class DataExport:
    """Write a store in another library's format, whole or not at all; what the format cannot hold is listed.

    Attributes:
        store: an EpisodeStore.
        out: what to make, a folder (lerobot, minari) or a file (robomimic, d4rl, progress); must not exist.
        format: lerobot (v3.0), robomimic, minari, d4rl, or progress: a label set as LeRobot's sarm_progress.parquet.
        label: label set to write as reward instead of the recorded one, or as progress.
        options: of the format, see docs/formats.md; lerobot takes: images embedded, codec av1, fps 30, ...
    """

    store: Positional[Path]
    out: Positional[Path]
    format: str
    label: str | None = None
    options: dict[str, Setting] = dataclasses.field(default_factory=dict)


def touches(config: DataExport) -> Touches:
    from embodied.datasets.exporter import staging

    labels = () if config.label is None else (config.store / "labels" / config.label,)
    return Touches((config.store, *labels), (config.out,), (staging(config.out),))


def data_export(config: DataExport, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.exporter import export_dataset

    return export_dataset(config.store, config.out, config.format, config.options, config.label, progress)


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{key}: {result[key]}" for key in ("format", "out", "episodes", "steps", "label") if result[key] is not None
    ]
    files = list(result["files"].items())
    lines.append(f"files: {len(files)}, {sum(result['files'].values()) / 1e6:.1f} MB")
    lines += [f"  {name}  {size / 1e6:.3f} MB" for name, size in files[:FILES_SHOWN]]
    lines += [f"  ... and {len(files) - FILES_SHOWN} more; --json lists all"] if len(files) > FILES_SHOWN else []
    return "\n".join([*lines, "not in it:", *(f"  {left['what']}: {left['reason']}" for left in result["left_out"])])
