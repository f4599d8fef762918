"""Import recordings of any known format into an EpisodeStore."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from embodied.contracts.errors import InputError, suggest
from embodied.contracts.provenance import hash_file, provenance
from embodied.datasets import (
    read_d4rl,
    read_lerobot,
    read_minari,
    read_rlds,
    read_robomimic,
    read_robosuite,
    read_rosbag,
    read_rosbag1,
    read_video,
)
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.location import local_copy, location
from embodied.datasets.source import Source
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter

# A reader has `sniff(path) -> bool` and `read(path, options) -> Source`. A new format is one file and one line here.
FORMATS: dict[str, ModuleType] = {
    "robosuite": read_robosuite,  # before robomimic: the same groups, but no observations yet
    "robomimic": read_robomimic,
    "d4rl": read_d4rl,
    "rosbag2": read_rosbag,
    "rosbag1": read_rosbag1,
    "rlds": read_rlds,
    "minari": read_minari,
    "lerobot": read_lerobot,
    "video": read_video,  # last: a recording of another format may hold videos
}
RECORDING_SUFFIXES = (".hdf5", ".h5", ".mcap", ".db3", ".bag")


def import_dataset(
    source: str | Path,
    destination: str | Path,
    format: str | None = None,
    options: Mapping[str, Any] | None = None,
    licence: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    drop_keys: Sequence[str] = (),
    strict: bool = False,
) -> EpisodeStore:
    """Import `source` into a new store at `destination`; an interrupted import resumes.

    An episode that cannot be used is left out, and the store's findings say which and why.

    Args:
        source, destination: local paths or fsspec URLs; a remote source is copied to the cache folder first.
        format: a key of `FORMATS`; None to recognise it.
        options: for the reader; each reader's `read` says which it takes.
        progress: called with (episodes done, episodes in all, text).
        drop_keys: observations and cameras to leave out.
        strict: refuse the source at its first bad episode instead.

    Raises:
        InputError: `source` is absent, of no known format, damaged, or has no episode that can be learned from.
        StoreError: `destination` exists, or the disk refuses.
    """
    with local_copy(source) as path:
        if not path.exists():
            raise InputError(f"{path} does not exist.")
        name = recognise(path) if format is None else format
        if name not in FORMATS:
            raise InputError(f"Format '{name}' is unknown.{suggest(name, FORMATS)}")
        recording = without_keys(FORMATS[name].read(path, options or {}), drop_keys)
        record = provenance(
            "data import",
            {
                "format": name,
                "options": {key: str(value) for key, value in (options or {}).items()},
                "drop_keys": sorted(drop_keys),
                "strict": strict,
            },
            {"source": hash_source(path)},
            source_attributes=recording.attributes,
        )
        writer = StoreWriter(destination, recording.spec, record, source=location(source), licence=licence)
        try:
            for index in range(recording.num_episodes):
                if not writer.has(index):
                    _stage(writer, index, recording.load, strict)
                progress(index + 1, recording.num_episodes, "importing")
            return writer.finish(recording.num_episodes, recording.findings)
        except InputError:
            # Resuming would meet the same episode again, and a mended source is another one.
            writer.abandon()
            raise


def _stage(writer: StoreWriter, index: int, load: Callable[[int], Episode], strict: bool) -> None:
    try:
        writer.write_episode(index, load(index))
    except InputError as error:
        if strict:
            raise
        writer.skip_episode(index, skipped(index, error))


def skipped(index: int, error: InputError) -> Finding:
    """The finding for an episode of the source that is left out."""
    return Finding("episode-left-out", "error", f"left out: {error}", "Mend it in the source and import again.", index)


def without_keys(recording: Source, drop: Sequence[str]) -> Source:
    """The same recording without some observations and cameras. Raises InputError for one it does not have."""
    spec = recording.spec
    for key in drop:
        if key not in spec.observations and key not in spec.images:
            raise InputError(
                f"--drop-keys: the source has no '{key}'.{suggest(key, [*spec.observations, *spec.images])}"
            )
    if not drop:
        return recording

    def load(index: int) -> Episode:
        episode = recording.load(index)
        kept = {key: array for key, array in episode.observations.items() if key not in drop}
        images = {camera: pictures for camera, pictures in episode.images.items() if camera not in drop}
        return dataclasses.replace(episode, observations=kept, images=images)

    smaller = dataclasses.replace(
        spec,
        observations={key: array for key, array in spec.observations.items() if key not in drop},
        images={camera: array for camera, array in spec.images.items() if camera not in drop},
    )
    return dataclasses.replace(recording, spec=smaller, load=load)


def recognise(path: Path) -> str:
    """The format of `path`. Raises InputError when there is none, or when it is a folder of several recordings."""
    found = next((name for name, reader in FORMATS.items() if reader.sniff(path)), None)
    # A folder of LeRobot datasets holds videos too, but is no folder of videos.
    if found is not None and not (found == "video" and path.is_dir()):
        return found
    if inside := _recordings_inside(path):
        names = [f"{name} ({format})" for name, format in list(inside.items())[:3]]
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        raise InputError(f"{path} is a folder of recordings: {', '.join(names)}{more}.\nImport one of them at a time.")
    if found is not None:
        return found
    raise InputError(f"{path} is of no format known here. Known: {', '.join(FORMATS)}.\nName one with --format.")


def _recordings_inside(path: Path) -> dict[str, str]:
    """Recordings in a folder and its sub-folders, not videos: path below it -> format. Looks at 1,000 entries."""
    inside: dict[str, str] = {}
    if not path.is_dir():
        return inside
    for entry in itertools.islice(sorted(path.rglob("*")), 1000):
        below = entry.relative_to(path).as_posix()
        if any(below.startswith(f"{known}/") for known in inside):
            continue
        if entry.is_dir() or entry.suffix.lower() in RECORDING_SUFFIXES:
            for name, reader in FORMATS.items():
                with contextlib.suppress(InputError):
                    if name != "video" and reader.sniff(entry):
                        inside[below] = name
                        break
    return inside


def hash_source(path: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's files."""
    if path.is_file():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {hash_file(file)}\n".encode())
    return digest.hexdigest()
