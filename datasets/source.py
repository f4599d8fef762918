"""What a reader hands to the importer: a spec, and episodes by number, each read only when asked for."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding


@dataclasses.dataclass(frozen=True)
class Source:
    """A recording, opened.

    Attributes:
        spec: what its frames hold.
        num_episodes: episodes that `load` gives.
        load: index -> Episode. One at a time bounds the memory, and a resumed import skips what it has. Raises
            InputError for an episode that cannot be used: the importer leaves it out and says so.
        attributes: what the store should remember: environment arguments, filter keys, what was left out and why.
        findings: where files and metadata disagree, and other things a user should know. Files are the truth.
    """

    spec: DatasetSpec
    num_episodes: int
    load: Callable[[int], Episode]
    attributes: dict[str, Any]
    findings: tuple[Finding, ...] = ()


def check_options(format: str, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raise ConfigError naming the first option that a reader does not take."""
    for key in options:
        if key not in known:
            takes = suggest(key, known) if known else " It takes none."
            raise ConfigError(f"{format} has no option '{key}'.{takes}")


def is_hdf5(path: Path) -> bool:
    """Whether `path` is a file with HDF5's signature; it may still be truncated."""
    with readable(path):
        return path.is_file() and bool(h5py.is_hdf5(path))


def open_hdf5(path: Path) -> Any:  # h5py.File, whose items are typed as a union that no use satisfies
    """An HDF5 file for reading. Raises InputError where it is truncated or damaged.

    Readers keep it open while they load: HDF5's cache of decoded chunks lives as long as file and dataset object, and a
    chunk may hold many short episodes (1,394 episodes in 160,000 steps: 21 s opened per episode, 4 s kept open).
    """
    with readable(path):
        return h5py.File(path, "r", rdcc_nbytes=16 << 20)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns HDF5's errors inside the block into an InputError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        size = os.path.getsize(path)
        raise InputError(
            f"{path} cannot be read: {error}.\nIt is truncated or damaged ({size} bytes): copy it again."
        ) from error


def with_final_row(rows: np.ndarray, final: np.ndarray | None) -> np.ndarray:
    """(N, ...) -> (N + 1, ...): the final observation, or a repeat of the last row where the source has none.

    A repeat is not learned from: `step_valid` is False there, and the importer's attributes name the key.
    """
    return np.concatenate([rows, (rows[-1] if final is None else final)[None]])


def as_text(value: Any) -> str:
    """An HDF5 string attribute, whether h5py gives bytes or str."""
    return value.decode() if isinstance(value, bytes) else str(value)


def is_image(shape: Sequence[int], dtype: np.dtype) -> bool:
    """Whether (N, ...) rows are camera pictures: (N, H, W, 3) uint8."""
    return len(shape) == 4 and shape[-1] == 3 and dtype == np.uint8
