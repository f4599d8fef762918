"""Writing the arrays of a store: how rows are cut into chunks and shards, and compressed."""

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec

from embodied.contracts.errors import InputError
from embodied.contracts.provenance import canonical_json
from embodied.datasets.read_frames import shard_index

CHUNK_BYTES = 200_000
# Chosen by benchmarks/frame_reads.py: random batches of 256, one thread, pictures as rendered and with sensor noise.
# - One picture in a chunk from 84x84 on: 51,000 pictures/s against 33,000 with two. Whole passes lose nothing by it, as
#   `read_frames` takes neighbours in one read.
# - Shards of 1.6, 6.4 and 25.6 MB read alike; the largest makes the fewest files.
# - No codec suits all pictures. lz4 with its bits shuffled decodes fast and makes noise smaller than gzip does, but
#   flat pictures twice as large; of those lz4hc decodes three times as fast as zstd, where it is small enough.
PICTURE_CHUNK_BYTES = 40_000
SHARD_BYTES = 25_600_000
# Blosc's cname, clevel, shuffle.
PICTURE_CODECS = (("lz4", 5, "bitshuffle"), ("lz4hc", 6, "noshuffle"), ("zstd", 1, "noshuffle"))
GZIP_RATIO = 1.28  # of the size that gzip makes, at most: the first codec that keeps to it is taken
THREADS_FROM = 1_000_000  # bytes of pictures


class ArrayStream:
    """Appends rows to a new Zarr array in a local folder, chunk by chunk: the same bytes in every run.

    Pictures go into shards, which bound the number of files, and `read_frames` reads them. Small arrays have few files.

    Args:
        group: parent group.
        name: array name, `/` between groups.
        shape: full shape, rows first.
        dtype: NumPy name.
        codec: one of PICTURE_CODECS, for pictures.

    Attributes:
        num_waiting: rows taken and not yet compressed; less than a chunk between two appends.
    """

    def __init__(
        self,
        group: zarr.Group,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        codec: tuple[str, int, str] = PICTURE_CODECS[0],
    ) -> None:
        itemsize = np.dtype(dtype).itemsize
        row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
        pictures = len(shape) == 4 and dtype == "uint8"
        self._chunk = _power_of_two((PICTURE_CHUNK_BYTES if pictures else CHUNK_BYTES) / row_bytes)
        per_shard = _power_of_two(SHARD_BYTES / (self._chunk * row_bytes))
        nbytes = self._chunk * row_bytes
        codec = codec if pictures else ("lz4", 5, "shuffle" if itemsize > 1 else "noshuffle")
        self._array = group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(self._chunk, *shape[1:]),
            shards=(self._chunk * per_shard, *shape[1:]) if pictures else None,
            compressors=_blosc(codec, itemsize, nbytes),
        )
        self._shards = ShardStream(_folder(self._array), self._array.ndim, per_shard, codec) if pictures else None
        self._dtype = np.dtype(dtype)
        self._digest = hashlib.sha256(canonical_json([name, list(shape), dtype]).encode())
        self._waiting = np.empty((0, *shape[1:]), self._dtype)
        self._written = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def append(self, rows: np.ndarray) -> None:
        """Add (n, ...) rows."""
        rows = np.ascontiguousarray(rows, self._dtype)
        self._digest.update(rows.data)
        self._take(rows)

    def _take(self, rows: np.ndarray) -> None:
        if len(self._waiting):
            rows = np.concatenate([self._waiting, rows])
        whole = len(rows) - len(rows) % self._chunk
        if whole:
            self._write(rows[:whole])
        self._waiting = rows[whole:].copy()

    def skip(self, rows: int) -> None:
        """Add rows of zeros that are neither kept on disk nor read back as bytes: for pictures that are missing."""
        self._digest.update(f"{rows} rows are missing".encode())
        head = min(rows, -self.num_waiting % self._chunk)
        self._take(np.zeros((head, *self._array.shape[1:]), self._dtype))
        chunks, tail = divmod(rows - head, self._chunk)
        if self._shards:
            self._shards.skip(chunks)
        self._written += chunks * self._chunk
        self._take(np.zeros((tail, *self._array.shape[1:]), self._dtype))

    def close(self) -> str:
        """Write what is left. Returns the SHA-256 over name, shape, dtype and the rows' bytes in order."""
        if self.num_waiting:
            self._write(self._waiting)
        if self._shards:
            self._shards.close()
        if self._written != self._array.shape[0]:
            raise InputError(f"'{self._array.name}': {self._written} rows came, {self._array.shape[0]} were announced.")
        return self._digest.hexdigest()

    def _write(self, rows: np.ndarray) -> None:
        if self._shards is None:
            for start in range(0, len(rows), self._chunk):
                chunk = rows[start : start + self._chunk]
                self._array[self._written + start : self._written + start + len(chunk)] = chunk
        else:
            missing = -len(rows) % self._chunk  # at the array's end; on disk a chunk is whole
            padding = np.zeros((missing, *rows.shape[1:]), rows.dtype)
            padded = np.concatenate([rows, padding]) if missing else rows
            self._shards.append(padded.reshape(-1, self._chunk, *rows.shape[1:]))
        self._written += len(rows)


class ShardStream:
    """Writes the shards of one array, chunk by chunk; holds the compressed bytes of one shard.

    Zarr writes the same shards at a fifth of the speed where a chunk is one picture.

    Args:
        folder: the array's.
        dimensions: of the array; it is sharded along the first.
        per_shard: chunks in a shard.
        codec: one of PICTURE_CODECS.
    """

    def __init__(self, folder: Path, dimensions: int, per_shard: int, codec: tuple[str, int, str]) -> None:
        self._folder, self._rest, self._per_shard = folder / "c", ["0"] * (dimensions - 1), per_shard
        self._codec = codec
        self._chunks: list[bytes] = []  # b"": all zeros, not kept
        self._shard = 0

    def append(self, chunks: np.ndarray) -> None:
        """Add (n, rows of a chunk, ...) chunks; compressed on all cores where that is worth the threads."""
        threads = min(len(os.sched_getaffinity(0)), len(chunks)) if chunks.nbytes >= THREADS_FROM else 1
        if threads == 1:
            parts = [self._compress(chunks)]
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(self._compress, np.array_split(chunks, threads)))
        for part in parts:
            for chunk in part:
                self._add(chunk)

    def _compress(self, chunks: np.ndarray) -> list[bytes]:
        return [compress(chunk, self._codec) if chunk.any() else b"" for chunk in chunks]

    def skip(self, chunks: int) -> None:
        """Add chunks of zeros."""
        for _ in range(chunks):
            self._add(b"")

    def close(self) -> None:
        """Write the last shard, whose missing chunks lie behind the array's end."""
        self.skip(-len(self._chunks) % self._per_shard)

    def _add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        if len(self._chunks) == self._per_shard:
            if any(self._chunks):
                file = self._folder.joinpath(str(self._shard), *self._rest)
                file.parent.mkdir(parents=True)
                with open(file, "wb") as stream:
                    stream.writelines([*self._chunks, shard_index([len(c) for c in self._chunks])])
            self._shard += 1
            self._chunks = []


def compress(rows: np.ndarray, codec: tuple[str, int, str]) -> bytes:
    """One chunk of pictures as one Blosc block: with several and threads, their order in the file would vary."""
    name, level, shuffle = codec
    how = numcodecs.blosc.BITSHUFFLE if shuffle == "bitshuffle" else numcodecs.blosc.NOSHUFFLE
    return numcodecs.blosc.compress(rows.reshape(-1), name.encode(), level, how, rows.nbytes, 1)


def choose_codec(sample: np.ndarray) -> tuple[str, int, str]:
    """The first of PICTURE_CODECS that makes of some pictures at most GZIP_RATIO times what gzip makes of them.

    Which one that is depends on the pictures: a sensor's noise needs bits shuffled, flat rendered areas long matches.
    """
    gzip = sum(len(zlib.compress(picture.tobytes(), 4)) for picture in sample)
    for codec in PICTURE_CODECS[:-1]:
        if sum(len(compress(picture, codec)) for picture in sample) <= GZIP_RATIO * gzip:
            return codec
    return PICTURE_CODECS[-1]


def _blosc(codec: tuple[str, int, str], itemsize: int, nbytes: int) -> BloscCodec:
    name, level, shuffle = codec
    return BloscCodec(cname=name, clevel=level, shuffle=shuffle, typesize=itemsize, blocksize=nbytes)  # type: ignore[arg-type]


def _folder(array: zarr.Array) -> Path:
    """Where the chunks of an array in a local folder are."""
    store: Any = array.store_path.store
    return Path(store.root) / array.store_path.path


def _power_of_two(value: float) -> int:
    """The largest power of two not above `value`, at least 1."""
    return 1 << max(0, int(np.log2(max(1.0, value))))
