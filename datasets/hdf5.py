"""Reading HDF5 files that nobody vouches for.

What such a file declares is a claim. A dataset of 100 GB costs a few bytes, a gzip chunk of 1 MB inflates to 1 GB (the
filter stops at no declared size), and a link, an external or a virtual dataset reads any other file of this machine.
Everything here refuses those with an InputError, so that readers only handle numbers that are there.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5l  # type: ignore[attr-defined]

from embodied.contracts.errors import EmbodiedError, InputError

EPISODE_BYTES = 256 << 20  # of one episode's arrays without pictures, as stored: an hour at 1 kHz of 9 float64
BLOCK_BYTES = 8 << 20  # of pictures that are read together
CHUNK_BYTES = 128 << 20  # HDF5 decodes a chunk whole
ATTRIBUTE_BYTES = 16 << 20
CHUNKS_AT_ONCE = 20_000  # HDF5 keeps about 1 kB for each chunk that one read touches
DEFLATE, COMPRESSORS = 1, {1, 4, 32000}  # filter numbers of gzip; of gzip, szip and LZF
RATIO = {DEFLATE: 1032, 4: 64, 32000: 90}  # the most that one stored byte can grow to
HEAP = b"GCOL\1\0\0\0"  # begins a collection of texts of any length
SMALL = 64 << 20  # bytes that a dataset may declare whatever it stores


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
    """Turns whatever h5py raises on damaged bytes into an InputError that names the file."""
    try:
        yield
    except EmbodiedError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        size = os.path.getsize(path)
        text = clean(str(error)) or type(error).__name__
        raise InputError(
            f"{path} cannot be read: {text[:300]}.\nIt is truncated or damaged ({size} bytes): copy it again."
        ) from error


def find(group: Any, name: str) -> Any | None:
    """The group or dataset `name` (`a/b` for one in a group) below `group`, or None. Raises InputError for a link out
    of the file: it would read whatever the file's maker names."""
    return _find(group, name, 8)


def _find(group: Any, name: str, links_left: int) -> Any | None:
    item = group.file["/"] if name.startswith("/") else group
    for part in filter(None, name.split("/")):
        # h5py's own `in` and `get` open the other file of an external link.
        key = part.encode(errors="surrogateescape")
        if not isinstance(item, h5py.Group) or not item.id.links.exists(key):
            return None
        kind = item.id.links.get_info(key).type
        if kind == h5l.TYPE_HARD:
            item = item[part]
        elif kind == h5l.TYPE_SOFT and links_left:
            item = _find(item, item.id.links.get_val(key).decode(errors="surrogateescape"), links_left - 1)
        else:
            raise InputError(f"'{clean(name)}' is a link out of the file or in a circle: it is not followed.")
    return item


def group_at(group: Any, name: str) -> Any | None:
    """The group `name`, or None where there is none or a dataset."""
    found = find(group, name)
    return found if isinstance(found, h5py.Group) else None


def members(group: Any | None) -> list[str]:
    """Names in a group that can be keys of a store, in HDF5's order; none of None."""
    names: list[str] = list(group) if isinstance(group, h5py.Group) else []  # type: ignore[arg-type]
    return [name for name in names if is_key(name)]


def is_key(name: str) -> bool:
    """Whether a name found in a file can name an array of a store: no path, nothing unprintable."""
    return name.isprintable() and not re.search(r"[/\\]|^\.+$|^$|^__|^zarr\.json$|^images$", name)


@dataclasses.dataclass(frozen=True)
class NumberArray:
    """A numeric dataset whose claims were checked: `array_at` gives it.

    Attributes:
        dataset: h5py.Dataset, (N, ...) of bool, integers or floats.
        filters: numbers of its filters, in the order in which they were applied.
        suspects: place in the array, filter mask and stored bytes of each chunk that could inflate to too much.
        inflated: places of those that were found to inflate to what they declare.
    """

    dataset: Any
    filters: list[int]
    suspects: list[tuple[tuple[int, ...], int, int]]
    inflated: set[tuple[int, ...]]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dataset.shape)

    @functools.cached_property
    def dtype(self) -> np.dtype:
        return self.dataset.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop), (n, ...) in the file's dtype. Raises InputError: absent, too large or a bomb."""
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"'{self.dataset.name}' has {len(self)} rows; {start} to {stop} are asked for.")
        if (stop - start) * self.row_bytes > EPISODE_BYTES:
            raise InputError(
                f"'{self.dataset.name}': {stop - start} rows are {_mib((stop - start) * self.row_bytes)}, "
                f"more than {_mib(EPISODE_BYTES)} at once."
            )
        step = self._rows_at_once
        if stop - start <= step:
            self._check_chunks(start, stop)
            return self.dataset[start:stop]
        found = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            self._check_chunks(first, last)
            found[first - start : last - start] = self.dataset[first:last]
        return found

    def float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """`rows` as float32; what does not fit is inf, which no store takes."""
        with np.errstate(over="ignore"):
            return np.asarray(self.rows(start, stop), np.float32)

    def blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows [start, stop) in blocks of about 8 MB that end where chunks end: no chunk is decoded twice."""
        rows = max(1, BLOCK_BYTES // max(1, self.row_bytes))
        if self.dataset.chunks:
            chunk = self.dataset.chunks[0]
            rows = max(chunk, rows - rows % chunk)
        while start < stop:
            end = min(stop, start - start % rows + rows)
            yield self.rows(start, end)
            start = end

    @functools.cached_property
    def _rows_at_once(self) -> int:
        if not self.dataset.chunks:
            return max(1, len(self))
        wide = math.prod(-(-size // chunk) for size, chunk in zip(self.shape[1:], self.dataset.chunks[1:], strict=True))
        if wide > CHUNKS_AT_ONCE:
            raise InputError(f"'{self.dataset.name}' has {wide} chunks in one row.")
        return CHUNKS_AT_ONCE // max(1, wide) * self.dataset.chunks[0]

    def _check_chunks(self, start: int, stop: int) -> None:
        """Raise InputError where a stored chunk of these rows inflates to more than it declares."""
        if not self.suspects:
            return
        chunks, declared = self.dataset.chunks, math.prod(self.dataset.chunks) * self.dtype.itemsize
        for place, mask, size in self.suspects:
            if place in self.inflated or place[0] >= stop or place[0] + chunks[0] <= start:
                continue
            if size > declared * 1.1 + 4096:
                raise InputError(f"'{self.dataset.name}': a chunk of {declared} bytes is stored in {size}.")
            if DEFLATE in self.filters:
                if not mask >> self.filters.index(DEFLATE) & 1:
                    self._inflate(self.dataset.id.read_direct_chunk(place)[1], declared)
            elif size * _growth(self.filters) > 4 * CHUNK_BYTES:
                raise InputError(f"'{self.dataset.name}' has compressed chunks of {_mib(size)}: too large to trust.")
            self.inflated.add(place)

    def _inflate(self, data: bytes, declared: int) -> None:
        stream, size = zlib.decompressobj(), 0
        try:
            while data and not stream.eof and size <= declared:
                size += len(stream.decompress(data, 1 << 20))
                data = stream.unconsumed_tail
        except zlib.error as error:
            raise InputError(f"'{self.dataset.name}' holds a chunk that is no gzip: {error}.") from error
        if size > declared:
            raise InputError(
                f"'{self.dataset.name}' is a decompression bomb: a chunk inflates beyond {declared} bytes."
            )


def array_at(group: Any, name: str) -> NumberArray:
    """The numeric array `name` below `group`.

    Raises:
        InputError: it is absent, a group, no array of numbers, kept in another file, or declares what is not there.
    """
    dataset = find(group, name)
    if dataset is None:
        raise InputError(f"'{name}' is absent.")
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"'{name}' is a group, not an array.")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"'{name}' keeps its values in another file: other files are not read.")
    if dataset.shape is None or dataset.ndim == 0 or dataset.dtype.kind not in "fiub":
        raise InputError(f"'{name}' is {_type_name(dataset)} {dataset.shape}, not an array of numbers.")
    check_claim(dataset)
    filters, suspects = _filters(dataset), []
    growth = _growth(filters)

    def suspect(chunk: Any) -> None:
        if chunk.size * growth > CHUNK_BYTES:
            suspects.append((tuple(chunk.chunk_offset), chunk.filter_mask, chunk.size))

    if dataset.chunks and dataset.id.get_storage_size() * growth > CHUNK_BYTES:
        dataset.id.chunk_iter(suspect)
    return NumberArray(dataset, filters, suspects, set())


def check_claim(dataset: Any) -> None:
    """Raise InputError where a dataset declares sizes that its bytes in the file cannot hold."""
    shape, chunks, stored = dataset.shape, dataset.chunks, dataset.id.get_storage_size()
    declared = math.prod(shape) * dataset.dtype.itemsize
    if stored > os.path.getsize(dataset.file.filename):
        raise InputError(f"'{dataset.name}' claims {_mib(stored)}, more than the file has.")
    filters = _filters(dataset)
    if sum(number in COMPRESSORS for number in filters) > 1:
        raise InputError(f"'{dataset.name}' is compressed twice: a decompression bomb.")
    if declared > SMALL and declared > 1100 * stored:
        raise InputError(
            f"'{dataset.name}' declares {shape} ({_mib(declared)}) and stores {stored} bytes: "
            "never written, or a decompression bomb."
        )
    if chunks and math.prod(chunks) * dataset.dtype.itemsize > CHUNK_BYTES:
        raise InputError(f"'{dataset.name}' has chunks {chunks}, over {_mib(CHUNK_BYTES)} each: too large to decode.")


def check_episode_bytes(arrays: Iterable[NumberArray], num_rows: int) -> None:
    """Raise InputError where one episode's arrays, pictures apart, are too large for memory."""
    size = sum(array.row_bytes for array in arrays) * num_rows
    if size > EPISODE_BYTES:
        raise InputError(f"its arrays have {_mib(size)}; one episode may have {_mib(EPISODE_BYTES)}. Split it.")


def texts(group: Any, name: str) -> list[str]:
    """A list of names stored as strings of any kind, `mask/train` for instance; none where it is absent."""
    dataset = find(group, name)
    if dataset is None:
        return []
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external or dataset.shape is None:
        raise InputError(f"'{name}' is no list of names.")
    if dataset.dtype.kind not in "SO" or math.prod(dataset.shape) * dataset.dtype.itemsize > ATTRIBUTE_BYTES:
        raise InputError(f"'{name}' is {_type_name(dataset)} {dataset.shape}, not a list of names.")
    check_claim(dataset)
    check_heaps(dataset.file.filename)
    return [as_text(value) for value in np.asarray(dataset[()], object).reshape(-1)]


def check_heaps(path: str) -> None:
    """Raise InputError where a heap of texts is damaged: libhdf5 2.0 loops forever on an object that takes no space."""
    facts = os.stat(path)
    if (at := _damaged_heap(path, facts.st_size, facts.st_mtime_ns)) is not None:
        raise InputError(f"the texts at byte {at} are damaged.")


@functools.lru_cache(maxsize=16)
def _damaged_heap(path: str, size: int, modified_ns: int) -> int | None:
    """Where the first damaged heap of the file as it is begins; reads the whole file once, in blocks."""
    found, kept = [], b""
    with open(path, "rb") as file:
        for start in range(0, size, BLOCK_BYTES):
            block = kept + file.read(BLOCK_BYTES)
            at = block.find(HEAP)
            while at >= 0:
                found.append(start - len(kept) + at)
                at = block.find(HEAP, at + 1)
            kept = block[1 - len(HEAP) :]
        for at in found:
            file.seek(at + 8)
            length = int.from_bytes(file.read(8), "little")
            if length > size - at:
                continue  # libhdf5 refuses it
            if not 16 <= length <= SMALL or not _walks(file.read(length - 16)):
                return at
    return None


def _walks(objects: bytes) -> bool:
    """Whether the objects of a heap, 16 bytes of header each, follow one another to its end."""
    at = 0
    while len(objects) - at >= 16:
        is_free = objects[at : at + 2] == b"\0\0"
        length = int.from_bytes(objects[at + 8 : at + 16], "little")
        step = length if is_free else 16 + length + -length % 8
        if not 16 <= step <= len(objects) - at:
            return False
        at += step
    return True


def attribute(item: Any, name: str, default: Any = None) -> Any:
    """An attribute as JSON can hold it: text, number, bool, list. `default` where it is absent or of another kind."""
    if name not in item.attrs:
        return default
    identifier = item.attrs.get_id(name)
    if identifier.get_space().get_simple_extent_npoints() * identifier.get_type().get_size() > ATTRIBUTE_BYTES:
        return default
    if identifier.dtype.hasobject:
        check_heaps(item.file.filename)
    return _plain(item.attrs[name], default)


def attributes(item: Any) -> dict[str, Any]:
    """All attributes that JSON can hold; others as a note on their type."""
    return {clean(name): attribute(item, name, "of a type that is not read") for name in item.attrs}


def _plain(value: Any, default: Any) -> Any:
    if isinstance(value, np.ndarray):
        # A list of one is how some writers store a scalar; it stays a list, as it was written.
        return [_plain(each, default) for each in value.tolist()] if value.dtype.kind in "fiubSO" else default
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes | str):
        return as_text(value)
    return value if isinstance(value, bool | int | float | list) else default


def as_text(value: Any) -> str:
    """An HDF5 string, whether h5py gives bytes or str, with what is no UTF-8 replaced."""
    return value.decode(errors="replace") if isinstance(value, bytes) else clean(str(value))


def clean(text: str) -> str:
    """Text that can be written as UTF-8: h5py gives undecodable bytes as lone surrogates."""
    return text.encode(errors="replace").decode()


def with_final_row(rows: np.ndarray, final: np.ndarray | None) -> np.ndarray:
    """(N, ...) -> (N + 1, ...): the final observation, or a repeat of the last row where the source has none.

    A repeat is not learned from: `step_valid` is False there, and the importer's attributes name the key.
    """
    return np.concatenate([rows, (rows[-1] if final is None else final)[None]])


def _filters(dataset: Any) -> list[int]:
    """Numbers of the dataset's filters, in the order in which they were applied."""
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]


def _growth(filters: list[int]) -> int:
    return max((RATIO[number] for number in filters if number in COMPRESSORS), default=1)


def _type_name(dataset: Any) -> str:
    return "text" if h5py.check_string_dtype(dataset.dtype) else str(dataset.dtype)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
