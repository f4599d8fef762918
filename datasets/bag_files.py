"""Recordings in a folder: which files belong to one bag, and where the bag's own metadata.yaml disagrees with them.

A folder with a metadata.yaml is one recording, split or not. Without one, files named after their folder and numbered,
`run/run_0.db3`, `run/run_1.db3`, are one recording that was split; any other file is a recording of its own.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from embodied.contracts.errors import InputError
from embodied.datasets.bag_items import ZSTD_MAGIC, Damage, Item
from embodied.datasets.bag_mcap import MCAP_MAGIC
from embodied.datasets.bag_ros1 import ROS1_MAGIC
from embodied.datasets.bag_sqlite import SQLITE_MAGIC
from embodied.datasets.bag_storage import read_items
from embodied.datasets.finding import Finding

ROSBAG2, ROSBAG1 = (".mcap", ".db3"), (".bag",)
METADATA = "metadata.yaml"
MAX_METADATA = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Recording:
    """One bag.

    Attributes:
        name: of the file, or of the folder of a split bag.
        files: in the order they were recorded.
        claims: what its metadata.yaml says; empty when it has none.
        findings: where the metadata's list of files is not what is there.
    """

    name: str
    files: tuple[Path, ...]
    claims: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()

    @property
    def path(self) -> Path:
        first = self.files[0]
        return first if len(self.files) == 1 else first.parent

    def items(self, wanted: Set[str] | None = None) -> Iterator[Item]:
        """Every file's topics and messages, one file after the other; see `read_items`.

        A file of a split bag that cannot be opened is a `Damage`; a recording of which no file opens is an InputError.
        """
        opened = 0
        for file in self.files:
            try:
                for item in read_items(file, wanted):
                    opened += 1
                    yield Damage(f"{file.name}: {item.reason}") if isinstance(item, Damage) else item
            except InputError as error:
                if len(self.files) == 1:
                    raise
                yield Damage(str(error))
        if not opened and len(self.files) > 1:
            raise InputError(f"{self.path}: none of its {len(self.files)} files holds anything.")


def find_recordings(path: Path, suffixes: Sequence[str]) -> list[Recording]:
    """The bags at `path`, a file or a folder, by name in natural order: episode_2 before episode_10."""
    if not path.is_dir():
        claims = _claims(path.parent) or {}
        alone = [Path(name).name for name in _file_names(claims)] == [path.name]
        return [Recording(path.name, (path,), claims if alone else {})]
    folders: dict[Path, list[Path]] = {}
    for file in bag_files(path, suffixes):
        folders.setdefault(file.parent, []).append(file)
    found = []
    for folder in sorted(folders, key=_natural):
        files = sorted(folders[folder], key=_natural)
        claims = _claims(folder)
        if claims:
            found.append(_listed(folder, files, claims))
            continue
        findings = [] if claims is None else [_stale(folder.name, "is no metadata of a rosbag2 recording")]
        split = re.compile(re.escape(folder.resolve().name) + r"_\d+(\.[^.]+)(\.zstd)?")
        groups: dict[str, list[Path]] = {}
        for file in files:
            match = split.fullmatch(file.name)
            groups.setdefault(match[1] if match else file.name, []).append(file)
        found += [Recording(_name(group), tuple(group), {}, tuple(findings)) for group in groups.values()]
    return found


def bag_files(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files under a folder that are bags by name, those in hidden folders left out."""
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.removesuffix(".zstd").endswith(tuple(suffixes)):
                yield Path(folder) / name


def looks_like(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file, or some file in a folder, is a bag by name or first bytes."""
    if path.is_dir():
        return next(bag_files(path, suffixes), None) is not None
    if not path.is_file():
        return False
    named = path.name.removesuffix(".zstd").endswith(tuple(suffixes))
    with open(path, "rb") as file:
        head = file.read(16)
    if suffixes == ROSBAG1:
        return head.startswith((ROS1_MAGIC, b"#ROSBAG V1")) or (named and head.startswith(ZSTD_MAGIC))
    return head.startswith(MCAP_MAGIC) or (named and head.startswith((SQLITE_MAGIC, ZSTD_MAGIC)))


def _name(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else files[0].resolve().parent.name


def _natural(path: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d{1,18})", str(path))]


def _claims(folder: Path) -> dict[str, Any] | None:
    """What a folder's metadata.yaml says about a bag; empty where it cannot be read as that, None without one."""
    file = folder / METADATA
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_METADATA:
            return {}
        claims = yaml.safe_load(file.read_text(errors="replace"))["rosbag2_bagfile_information"]
    except (yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _file_names(claims: Mapping[str, Any]) -> list[str]:
    named = claims.get("relative_file_paths")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _listed(folder: Path, files: list[Path], claims: Mapping[str, Any]) -> Recording:
    """A recording in the order its metadata lists the files; files are the truth, so those not listed belong to it."""
    findings = []
    # Version 2 wrote paths from the folder above; nothing outside the bag's own folder is ever read.
    order = [Path(name).name for name in _file_names(claims)]
    present = {file.name: file for file in files}
    listed = [present[name] for name in dict.fromkeys(order) if name in present]
    missing = [name for name in order if name not in present]
    others = [file for file in files if file not in listed]
    if missing:
        findings.append(
            Finding(
                "missing-files",
                "error",
                f"{folder.name}: metadata.yaml lists {len(missing)} files that are not there: {', '.join(missing[:5])}",
                "Copy them beside the others and import again; what is there is imported.",
            )
        )
    if others and order:
        names = ", ".join(file.name for file in others[:5])
        findings.append(_stale(folder.name, f"does not list {len(others)} files that are there: {names}"))
    together = tuple(listed + others)
    return Recording(_name(together), together, claims, tuple(findings))


def _stale(name: str, what: str) -> Finding:
    return Finding(
        "metadata-stale",
        "warning",
        f"{name}: metadata.yaml {what}",
        "The files were used. Renew it with ros2 bag reindex.",
    )


def stale_claims(recording: Recording, counts: Mapping[str, int], encodings: Mapping[str, str]) -> list[Finding]:
    """Where metadata.yaml says other numbers of messages, or another serialisation, than the files hold.

    Args:
        counts: topic -> messages found.
        encodings: topic -> serialisation that the files name.
    """
    findings, total = [], recording.claims.get("message_count")
    if isinstance(total, int) and total != sum(counts.values()):
        findings.append(_stale(recording.name, f"claims {total} messages; the files hold {sum(counts.values())}"))
    listed = recording.claims.get("topics_with_message_count")
    differing, formats = [], set()
    for entry in listed if isinstance(listed, list) else []:
        topic = entry.get("topic_metadata") if isinstance(entry, dict) else None
        if not isinstance(topic, dict):
            continue
        name, form = topic.get("name"), topic.get("serialization_format")
        if isinstance(name, str) and entry.get("message_count") != counts.get(name, 0):
            differing.append(f"{name} {entry.get('message_count')} (found {counts.get(name, 0)})")
        if isinstance(name, str) and name in encodings and form not in ("", None, encodings[name]):
            formats.add(f"'{form}' where the files say '{encodings[name]}'")
    if differing:
        findings.append(_stale(recording.name, f"counts other messages by topic: {', '.join(differing[:8])}"))
    if formats:
        findings.append(_stale(recording.name, f"claims the serialisation {', '.join(sorted(formats))}"))
    return findings
