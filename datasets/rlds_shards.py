"""The TFRecord shards of one TFDS dataset: which there are, where their records lie, what dataset_info.json claims.

Shards are found by their names, `<name>-<split>.tfrecord-00000-of-00004`; the file's own path template is not followed.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.datasets.finding import Finding
from embodied.datasets.json_file import read_json
from embodied.datasets.tfrecord import Records, index_records, read_record

SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>[0-9]{5,9})-of-(?P<count>[0-9]{5,9})")
COPY = "Copy it again from where it came; what could be read is imported."


@dataclasses.dataclass(frozen=True)
class Shards:
    """Records of all shards, numbered through.

    Attributes:
        paths: the files, by split and number.
        splits: the split of each.
        records: where the records of each lie.
        start: (files + 1,) int64: number of each file's first record; last, how many there are.
    """

    paths: tuple[Path, ...]
    splits: tuple[str, ...]
    records: tuple[Records, ...]
    start: np.ndarray

    def __len__(self) -> int:
        return int(self.start[-1])

    def locate(self, index: int) -> tuple[Path, int, int]:
        """File, offset and length [bytes] of record `index`."""
        shard, place = self._place(index)
        records = self.records[shard]
        return self.paths[shard], int(records.offset[place]), int(records.length[place])

    def name(self, index: int) -> str:
        """`<file>/record <n>`: the file's name says which split."""
        shard, place = self._place(index)
        return f"{self.paths[shard].name}/record {place}"

    def read(self, index: int) -> bytes:
        """Record `index`. Raises InputError: damaged or too large."""
        return read_record(*self.locate(index))

    def episodes_of_splits(self) -> dict[str, list[int]]:
        """Split -> [first, one past the last) episode."""
        found: dict[str, list[int]] = {}
        for split, first, stop in zip(self.splits, self.start[:-1], self.start[1:], strict=True):
            found.setdefault(split, [int(first), int(stop)])[1] = int(stop)
        return found

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.start, index, "right")) - 1
        return shard, index - int(self.start[shard])


def dataset_folders(path: Path) -> Iterator[Path]:
    """Folders with a features.json: `path` itself, or `<version>` or `<config>/<version>` in it."""
    for pattern in ("features.json", "*/features.json", "*/*/features.json"):
        yield from (file.parent for file in sorted(path.glob(pattern)))


def has_shards(folder: Path) -> bool:
    return os.access(folder, os.R_OK) and any(SHARD.fullmatch(file.name) for file in folder.iterdir())


def dataset_folder(path: Path) -> Path:
    """The one dataset at or below `path`. Raises InputError: none, or several."""
    found = list(dataset_folders(path)) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{path} has no features.json, nor has a folder in it: it is no dataset of TFDS.")
    names = ", ".join(str(folder.relative_to(path)) for folder in found[:8])
    raise InputError(f"{path} holds {len(found)} datasets: {names}.\nName the folder of one of them.")


def open_shards(folder: Path, split: str | None) -> tuple[Shards, list[Finding]]:
    """The shards of a dataset (of one split, where it is given), and what is wrong with them.

    Raises:
        InputError: there is none, no such split, or not one record.
    """
    files: dict[tuple[str, str, int], dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := SHARD.fullmatch(file.name):
            key = (match["split"], match["name"], int(match["count"]))
            files.setdefault(key, {})[int(match["number"])] = file
    if not files:
        raise InputError(
            f"{folder} has no files <name>-<split>.tfrecord-00000-of-00001; other formats of TFDS are not read."
        )
    names = sorted({key[0] for key in files})
    if split is not None and split not in names:
        raise InputError(f"{folder} has no split '{split}'.{suggest(split, names)}")
    kept = {key: shards for key, shards in sorted(files.items()) if split in (None, key[0])}
    findings = [finding for key, shards in kept.items() for finding in _missing(key, shards)]
    paths = [(path, key[0]) for key, shards in kept.items() for _, path in sorted(shards.items())]
    records = []
    for path, _ in paths:
        try:
            records.append(index_records(path))
        except InputError as error:
            records.append(Records(np.zeros(0, np.int64), np.zeros(0, np.int64), str(error)))
        if damage := records[-1].damage:
            message = f"{path.name} {damage}. Its first {len(records[-1])} records are read."
            findings.append(Finding("damaged-shard", "error", message, COPY))
    start = np.concatenate([[0], np.cumsum([len(found) for found in records])]).astype(np.int64)
    shards = Shards(tuple(path for path, _ in paths), tuple(name for _, name in paths), tuple(records), start)
    if not len(shards):
        raise InputError(f"{folder}: not one record can be read. {findings[0].message if findings else ''}".rstrip())
    return shards, findings


def _missing(key: tuple[str, str, int], shards: dict[int, Path]) -> Iterator[Finding]:
    split, name, count = key
    absent = itertools.islice((number for number in range(count) if number not in shards), 5)
    missing = count - sum(number < count for number in shards)
    if missing:
        which = ", ".join(f"{number:05d}" for number in absent) + (", ..." if missing > 5 else "")
        message = f"{missing} of the {count} shards of {name}-{split} are missing: {which}."
        yield Finding("missing-shard", "error", message, COPY)


def read_description(folder: Path, shards: Shards, split: str | None) -> tuple[dict[str, str], list[Finding]]:
    """Name, version and licence from dataset_info.json, and where its counts differ from the shards.

    The file is a claim: without it, or where it is damaged, the shards are read all the same.
    """
    path = folder / "dataset_info.json"
    if not path.exists():
        return {}, []
    try:
        info = read_json(path)
    except InputError as error:
        return {}, [Finding("metadata-damaged", "warning", str(error), "The shards are read without it.")]
    info = info if isinstance(info, dict) else {}
    terms = info.get("redistributionInfo")
    known = {"name": info.get("name"), "version": info.get("version")}
    known["licence"] = terms.get("license") if isinstance(terms, dict) else None
    claims = info.get("splits")
    named = {
        str(claim["name"])[:100]: claim
        for claim in (claims if isinstance(claims, list) else [])
        if isinstance(claim, dict) and "name" in claim and split in (None, str(claim["name"]))
    }
    findings = [finding for name, claim in named.items() for finding in _differences(name, claim, shards)]
    return {key: str(value)[:200] for key, value in known.items() if value is not None}, findings


def _differences(split: str, claim: dict[str, Any], shards: Shards) -> Iterator[Finding]:
    claimed = claim.get("shardLengths")
    lengths = [_integer(length) for length in claimed] if isinstance(claimed, list) else []
    records = [found for found, name in zip(shards.records, shards.splits, strict=True) if name == split]
    if not records:
        message = f"dataset_info.json lists a split '{split}' of {sum(lengths)} episodes; no file of it is here."
        yield Finding("missing-split", "warning", message, "Copy its shards too, if they are wanted.")
        return
    present = sum(map(len, records))
    if present != sum(lengths):
        message = f"dataset_info.json says {sum(lengths)} episodes in split '{split}'; its files hold {present}."
        yield Finding("episode-count", "warning", message, "The files count; see whether shards are missing or stale.")
        return
    size = sum(int(found.length.sum()) for found in records)
    if "numBytes" in claim and size != _integer(claim["numBytes"]):
        message = f"dataset_info.json says {claim['numBytes']!s:.30} bytes in split '{split}'; its files hold {size}."
        yield Finding("data-size", "note", message, "The dataset may have been rewritten since.")


def _integer(value: Any) -> int:
    """A count, which this file writes as text; 0 for what is none."""
    return int(value) if re.fullmatch("[0-9]{1,18}", str(value)) else 0
