"""What an MP4 header announces, checked before libav believes it.

libav builds an index of every sample that a header announces (24 bytes each) before it reads one, and once more for
each edit of an edit list: some forged bytes would cost gigabytes, or minutes.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from embodied.contracts.errors import InputError

HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf"}
MAX_DEPTH = 8
MAX_BOXES = 1_000_000
MAX_EDITED = 20_000_000  # samples times edits of one file


def check_mp4(path: Path) -> None:
    """Raise InputError where an MP4 or MOV announces more samples than it has bytes; other files pass."""
    size = path.stat().st_size
    samples = edits = 0
    with open(path, "rb") as file:
        for kind, start, stop in _boxes(file, 0, size, 0):
            head = _head(file, start, stop)
            if kind == b"stsz" and len(head) >= 12:
                each, count = struct.unpack(">II", head[4:12])
                samples += count * max(1, each) if each else count
            elif kind == b"trun" and len(head) >= 8:
                samples += struct.unpack(">I", head[4:8])[0]
            elif kind == b"elst" and len(head) >= 8:
                edits += struct.unpack(">I", head[4:8])[0]
            if samples > size or samples * edits > MAX_EDITED:
                raise InputError(
                    f"{path} is damaged: it announces {samples:,} samples in {edits:,} edits, in {size:,} bytes."
                )


def _boxes(file: BinaryIO, start: int, stop: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and stop of the contents of each box; those inside others follow theirs."""
    for _ in range(MAX_BOXES):
        if stop - start < 8:
            return
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        contents = start + 8
        if size == 1:
            wide = file.read(8)
            size = int.from_bytes(wide, "big")
            contents += 8
        end = min(stop if size == 0 else start + size, stop)
        if end < contents or not kind.isascii():
            return
        yield kind, contents, end
        if kind in HOLDERS and depth < MAX_DEPTH:
            yield from _boxes(file, contents, end, depth + 1)
        start = end


def _head(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(min(12, stop - start))
