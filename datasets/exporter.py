"""Export an EpisodeStore to another library's format, whole or not at all. docs/formats.md says what each can hold."""

import dataclasses
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError, StoreError, suggest
from embodied.datasets import progress_sidecar, write_d4rl, write_lerobot, write_minari, write_robomimic
from embodied.datasets.location import is_remote
from embodied.datasets.outgoing import Outgoing, Progress, Writer
from embodied.datasets.store import EpisodeStore

# A writer has `write(outgoing, path, options, progress) -> list of LeftOut`. A new format: one file, one line here.
EXPORTERS: dict[str, Writer] = {
    "lerobot": write_lerobot,
    "robomimic": write_robomimic,
    "minari": write_minari,
    "d4rl": write_d4rl,
    "progress": progress_sidecar,
}


def staging(out: str | Path) -> Path:
    """Where an export is written before it is renamed to `out`."""
    out = Path(out)
    return out.with_name(f"{out.name}.export-partial")


def export_dataset(
    store_path: str | Path,
    out: str | Path,
    format: str,
    options: Mapping[str, Any] | None = None,
    label: str | None = None,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Write the store at `store_path` as `out`: a folder (lerobot, minari) or a file (robomimic, d4rl, progress).

    One episode's low-dimensional arrays are in memory at a time; pictures pass in blocks.

    Args:
        format: a key of `EXPORTERS`.
        options: for the writer; each writer's `write` says which it takes.
        label: the label set to write as reward, or as progress.
        progress: called with (episodes done, episodes in all, text).

    Returns:
        `format`, `out`, `episodes`, `steps`, `label`, `files` (name -> bytes) and `left_out`: a list of `what` was not
        written, or was written as something else, each with the `reason`.

    Raises:
        InputError: `out` exists or is remote, an unknown format, or the store has not what the format needs.
        StoreError: no store is there, or the disk refuses; nothing of the export is left behind.
    """
    if format not in EXPORTERS:
        raise InputError(f"Format '{format}' is unknown.{suggest(format, EXPORTERS)}")
    if is_remote(out):
        raise InputError(f"{out} is remote; exports are written to a local path. Copy it from there.")
    path, temporary = Path(out), staging(out)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already.\nExports never overwrite: delete it or name another.")
    outgoing = Outgoing(EpisodeStore(store_path), label)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # what a killed export left: it is written anew
        left_out = EXPORTERS[format].write(outgoing, temporary, dict(options or {}), progress)
        files = _files(temporary, path.name)
        os.rename(temporary, path)
    except OSError as error:
        raise StoreError(_disk_message(error, path)) from error
    finally:
        _remove(temporary)
    return {
        "format": format,
        "out": str(path),
        "episodes": outgoing.store.num_episodes,
        "steps": int(outgoing.counts.sum()),
        "label": label,
        "files": files,
        "left_out": [dataclasses.asdict(entry) for entry in left_out],
    }


def _files(path: Path, name: str) -> dict[str, int]:
    """Bytes of every written file, by the name it is going to have."""
    if path.is_file():
        return {name: path.stat().st_size}
    return {
        file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _disk_message(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"No space left while writing {path}.\nNothing of it was kept: free some and run the same command."
    return f"Cannot write {path}: {error.strerror or error}."
