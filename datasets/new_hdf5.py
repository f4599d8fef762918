"""A new HDF5 file that survives a full disk.

HDF5 keeps what it could not write, tries again while it closes and at the end of the process, and crashes there. So it
is given a file that never refuses: after the first error it keeps what comes in memory, and the error is raised by us.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py


@contextlib.contextmanager
def new_hdf5(path: Path, **more: Any) -> Iterator[tuple[Any, Callable[[], None]]]:
    """The file (h5py.File), and a function to call every few MB: it raises the OSError of a write that failed.

    Args:
        more: for h5py.File.
    """
    with open(path, "w+b", buffering=0) as stream:
        sink = _Sink(stream)
        with h5py.File(sink, "w", **more) as file:
            yield file, sink.check
        sink.check()


class _Sink:
    """What h5py needs of a file object."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._position = 0
        self._error: OSError | None = None
        self._kept: dict[int, bytes] = {}  # since the error: offset -> bytes, in the order they came

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            ends = [start + len(data) for start, data in self._kept.items()]
            offset += max([os.fstat(self._stream.fileno()).st_size, *ends])
        elif whence == os.SEEK_CUR:
            offset += self._position
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        done = 0
        try:
            self._stream.seek(self._position)
            while self._error is None and done < len(data):
                done += self._stream.write(data[done:])
        except OSError as error:
            self._error = error
        if done < len(data):
            self._kept.pop(self._position, None)
            self._kept[self._position] = bytes(data)
        self._position += len(data)
        return len(data)

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._stream.seek(self._position)
        count = 0
        while count < len(view) and (more := self._stream.readinto(view[count:])):
            count += more
        for start, data in self._kept.items():
            first, last = max(start, self._position), min(start + len(data), self._position + len(view))
            if first < last:
                view[first - self._position : last - self._position] = data[first - start : last - start]
                count = max(count, last - self._position)
        self._position += count
        return count

    def truncate(self, size: int) -> int:
        if self._error is None:
            try:
                self._stream.truncate(size)
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Nothing waits: the stream has no buffer."""
