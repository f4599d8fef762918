"""Import recordings of any known format into an EpisodeStore."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from embodied.contracts.errors import InputError, suggest
from embodied.contracts.provenance import hash_file, provenance
from embodied.datasets import read_d4rl, read_robomimic, read_rosbag
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

# A reader has `sniff(path) -> bool` and `read(path, options) -> Source`. A new format is one file and one line here.
FORMATS: dict[str, ModuleType] = {
    "robomimic": read_robomimic,
    "d4rl": read_d4rl,
    "rosbag2": read_rosbag,
}


def import_dataset(
    source: str | Path,
    destination: str | Path,
    format: str | None = None,
    options: Mapping[str, Any] | None = None,
    licence: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> EpisodeStore:
    """Import `source` into a new store at `destination`; an interrupted import resumes.

    Args:
        format: a key of `FORMATS`; None to recognise it.
        options: for the reader; each reader's `read` says which it takes.
        progress: called with (episodes done, episodes in all, text).

    Raises:
        InputError: `source` is absent, of no known format, damaged, or has an episode that cannot be learned from.
        StoreError: `destination` exists, or the disk refuses.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    name = recognise(path) if format is None else format
    if name not in FORMATS:
        raise InputError(f"Format '{name}' is unknown.{suggest(name, FORMATS)}")
    recording = FORMATS[name].read(path, options or {})
    record = provenance(
        "data import",
        {"format": name, "options": {key: str(value) for key, value in (options or {}).items()}},
        {"source": hash_source(path)},
        source_attributes=recording.attributes,
    )
    writer = StoreWriter(destination, recording.spec, record, source=str(path), licence=licence)
    for index in range(recording.num_episodes):
        try:
            if not writer.has(index):
                writer.write_episode(index, recording.load(index))
        except InputError:
            # Resuming would meet the same episode again, and a mended source is another one.
            writer.abandon()
            raise
        progress(index + 1, recording.num_episodes, "importing")
    return writer.finish(recording.num_episodes)


def recognise(path: Path) -> str:
    """The format of `path`. Raises InputError when there is none or the file is damaged."""
    for name, reader in FORMATS.items():
        if reader.sniff(path):
            return name
    raise InputError(f"{path} is of no format known here. Known: {', '.join(FORMATS)}.\nName one with --format.")


def hash_source(path: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's files."""
    if path.is_file():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {hash_file(file)}\n".encode())
    return digest.hexdigest()
