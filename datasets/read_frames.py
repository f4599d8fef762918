"""Rows of a sharded Zarr array, straight from its shards: one open, one index and one decode per picture.

At 84x84 this reads 51,000 random pictures/s, TensorStore 28,000, Zarr's own reader and zarrs some hundreds
(benchmarks/frame_reads.py). TensorStore also aborts a process that forks after using it, as PyTorch's DataLoader does.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numcodecs.blosc
import numpy as np
import zarr

PIECE_BYTES = 64_000_000  # of pictures that are fetched at once, and the bound of the index cache
ABSENT = np.uint64(2**64 - 1)


class ShardFiles(Protocol):
    """Where the shards of one array lie. `shard` counts along the rows."""

    def present(self) -> frozenset[int]:
        """The shards that are there."""
        ...

    def tails(self, shards: Sequence[int], size: int) -> list[tuple[bytes, int]]:
        """The last `size` bytes of each shard, and its length."""
        ...

    def ranges(self, shards: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> Iterator[bytes]:
        """Bytes `starts[i]` to `stops[i]` of shard `shards[i]`, in that order."""
        ...


class LocalShards:
    """Shards in a folder. No file stays open between two reads: safe for threads, forks and any number of shards."""

    def __init__(self, folder: Path, dimensions: int) -> None:
        self._folder, self._rest = str(folder / "c"), "/0" * (dimensions - 1)

    def present(self) -> frozenset[int]:
        try:
            return frozenset(int(name) for name in os.listdir(self._folder))
        except FileNotFoundError:
            return frozenset()

    def tails(self, shards: Sequence[int], size: int) -> list[tuple[bytes, int]]:
        found = []
        for shard in shards:
            file = os.open(self._path(shard), os.O_RDONLY)
            try:
                length = os.fstat(file).st_size
                found.append((os.pread(file, size, max(0, length - size)), length))
            finally:
                os.close(file)
        return found

    def ranges(self, shards: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> Iterator[bytes]:
        current, file = -1, -1
        try:
            for shard, start, stop in zip(shards, starts, stops, strict=True):
                if shard != current:
                    if file >= 0:
                        os.close(file)
                        file = -1
                    file = os.open(self._path(shard), os.O_RDONLY)
                    current = shard
                yield os.pread(file, stop - start, start)
        finally:
            if file >= 0:
                os.close(file)

    def _path(self, shard: int) -> str:
        return f"{self._folder}/{shard}{self._rest}"


class RemoteShards:
    """Shards behind fsspec; the ranges of one call are fetched together, concurrently where the file system can."""

    def __init__(self, open_filesystem: Callable[[], tuple[Any, str]], dimensions: int) -> None:
        self._open, self._rest = open_filesystem, "/0" * (dimensions - 1)

    def present(self) -> frozenset[int]:
        filesystem, path = self._open()
        prefix = f"{path}/c/"
        try:
            names = filesystem.find(prefix)
        except FileNotFoundError:
            return frozenset()
        return frozenset(int(name.rpartition("/c/")[2].split("/")[0]) for name in names)

    def tails(self, shards: Sequence[int], size: int) -> list[tuple[bytes, int]]:
        filesystem, path = self._open()
        paths = [self._path(path, shard) for shard in shards]
        lengths = [int(length) for length in filesystem.sizes(paths)]
        starts = [max(0, length - size) for length in lengths]
        return list(zip(filesystem.cat_ranges(paths, starts, lengths, on_error="raise"), lengths, strict=True))

    def ranges(self, shards: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> Iterator[bytes]:
        filesystem, path = self._open()
        paths = [self._path(path, shard) for shard in shards]
        yield from filesystem.cat_ranges(paths, list(starts), list(stops), on_error="raise")

    def _path(self, path: str, shard: int) -> str:
        return f"{path}/c/{shard}{self._rest}"


class ShardReader:
    """Reads rows of an array that `write_store` sharded.

    What is kept between reads: the index of each shard that was met, up to 64 MB.

    Args:
        array: uint8, sharded along its rows, its chunks whole rows in Blosc (see `readable`).
        files: where its shards lie.
    """

    def __init__(self, array: zarr.Array, files: ShardFiles) -> None:
        assert array.shards is not None
        self._files, self._shape = files, array.shape
        self.decode: Callable[[memoryview, np.ndarray], None] = decode
        self._rows = array.chunks[0]
        self._per_shard = array.shards[0] // self._rows
        self._row_bytes = int(np.prod(array.shape[1:], dtype=np.int64))
        self._present = files.present()
        self._indexes: dict[int, np.ndarray] = {}
        self._most_indexes = max(1, PIECE_BYTES // (16 * self._per_shard))

    @property
    def num_rows(self) -> int:
        return self._shape[0]

    @property
    def num_chunks(self) -> int:
        """Chunks of the shards that are there, as `zarr.Array.nchunks_initialized` counts them."""
        return len(self._present) * self._per_shard

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows by index, in any order: (B,) int64, all of them in the array -> (B, ...) uint8, in `out` if it is given.

        Raises:
            OSError, ValueError, RuntimeError: a shard is gone, cut off or damaged.
        """
        if out is None:
            out = np.empty((len(rows), *self._shape[1:]), np.uint8)
        step = max(1, PIECE_BYTES // max(1, self._row_bytes))
        for start in range(0, len(rows), step):
            self._fill(rows[start : start + step], out[start : start + step])
        return out

    def _fill(self, rows: np.ndarray, out: np.ndarray) -> None:
        chunks, member = np.unique(rows // self._rows, return_inverse=True)
        order = np.argsort(member, kind="stable")
        edges = np.searchsorted(member[order], np.arange(len(chunks) + 1))
        shards, spans = self._spans(chunks)
        absent = spans[:, 0] == ABSENT
        for chunk in np.flatnonzero(absent):
            out[order[edges[chunk] : edges[chunk + 1]]] = 0
        found = np.flatnonzero(~absent)
        scratch = np.empty((self._rows, *self._shape[1:]), np.uint8)
        for chunk, data in zip(found.tolist(), self._fetch(shards[found], spans[found].astype(np.int64)), strict=True):
            where = order[edges[chunk] : edges[chunk + 1]]
            target = out[where[0]] if self._rows == 1 else scratch
            self.decode(data, target)
            if self._rows > 1:
                out[where] = scratch[rows[where] - chunks[chunk] * self._rows]
            elif len(where) > 1:
                out[where[1:]] = target

    def _spans(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each chunk: its shard (C,), and its first byte and length there (C, 2), ABSENT if it is all zeros."""
        shards, within = np.divmod(chunks, self._per_shard)
        needed = [shard for shard in np.unique(shards).tolist() if shard in self._present]
        indexes = self._indexes  # another thread may replace it meanwhile, which costs a second look-up at most
        new = [shard for shard in needed if shard not in indexes]
        if new:
            if len(indexes) + len(new) > self._most_indexes:
                indexes = {shard: indexes[shard] for shard in needed if shard in indexes}
            size = 16 * self._per_shard + 4
            for shard, (tail, length) in zip(new, self._files.tails(new, size), strict=True):
                indexes[shard] = parse_index(tail, length, self._per_shard)
            self._indexes = indexes
        spans = np.full((len(chunks), 2), ABSENT, np.uint64)
        for shard in needed:
            first, last = np.searchsorted(shards, [shard, shard + 1])
            spans[first:last] = indexes[shard][within[first:last]]
        return shards, spans

    def _fetch(self, shards: np.ndarray, spans: np.ndarray) -> Iterator[memoryview]:
        """The bytes of each chunk; chunks that lie one behind the other are fetched as one range."""
        if not len(shards):
            return
        starts, stops = spans[:, 0], spans.sum(1)
        breaks = np.flatnonzero((shards[1:] != shards[:-1]) | (starts[1:] != stops[:-1])) + 1
        first, last = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(shards)]])
        runs = self._files.ranges(shards[first].tolist(), starts[first].tolist(), stops[last - 1].tolist())
        begin, end = starts.tolist(), stops.tolist()
        for data, one, other in zip(runs, first.tolist(), last.tolist(), strict=True):
            if len(data) != end[other - 1] - begin[one]:
                raise ValueError(f"shard {shards[one]} is cut off")
            view = memoryview(data)
            for chunk in range(one, other):
                yield view[begin[chunk] - begin[one] : end[chunk] - begin[one]]


def readable(array: zarr.Array) -> bool:
    """Whether `ShardReader` reads this array: uint8, sharded and chunked by rows, Blosc, a CRC behind its index."""
    codecs: Any = array.metadata.to_dict()["codecs"]
    if (
        array.dtype != np.uint8
        or array.fill_value != 0
        or array.shards is None
        or codecs[0]["name"] != "sharding_indexed"
    ):
        return False
    sharding = codecs[0]["configuration"]
    return (
        array.shards[1:] == array.chunks[1:] == array.shape[1:]
        and [codec["name"] for codec in sharding["codecs"]] == ["bytes", "blosc"]
        and [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
        and sharding["index_location"] == "end"
    )


def parse_index(tail: bytes, length: int, chunks: int) -> np.ndarray:
    """(chunks, 2) uint64: first byte and length of each chunk of a shard of `length` bytes. Raises ValueError."""
    if len(tail) != 16 * chunks + 4:
        raise ValueError("a shard is cut off")
    if google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise ValueError("the index of a shard is damaged")
    index = np.frombuffer(tail, "<u8", 2 * chunks).reshape(chunks, 2)
    there = index[index[:, 0] != ABSENT]
    if (there > length).any() or (there.sum(1) > length).any():
        raise ValueError("the index of a shard points outside it")
    return index


def shard_index(lengths: Sequence[int]) -> bytes:
    """The index of a shard whose chunks, of `lengths` bytes, lie one behind the other; 0 for one that is not kept."""
    nbytes = np.array(lengths, np.uint64)
    first = np.cumsum(nbytes, dtype=np.uint64) - nbytes
    index = np.where((nbytes > 0)[:, None], np.stack([first, nbytes], 1), ABSENT).astype("<u8").tobytes()
    return index + google_crc32c.value(index).to_bytes(4, "little")


def decode(data: memoryview, out: np.ndarray) -> None:
    """Decompress one chunk into `out`. Raises RuntimeError or ValueError."""
    if len(data) < 16:
        raise ValueError("a chunk is cut off")
    nbytes, _, cbytes = struct.unpack_from("<III", data, 4)  # Blosc itself would read past what is there
    if nbytes != out.nbytes or cbytes != len(data):
        raise ValueError(
            f"a chunk says that it holds {nbytes} bytes in {cbytes}; it should be {out.nbytes} in {len(data)}"
        )
    numcodecs.blosc.decompress(data, out)
