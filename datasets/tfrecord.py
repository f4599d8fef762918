"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A record is length (8 bytes), masked CRC-32C of the length, data, masked CRC-32C of the data. An Example is a protobuf
message of fixed depth: Example > Features > map entry (name, Feature) > BytesList, FloatList or Int64List, so nothing
here recurses. Every length is checked against the bytes that are there before anything is allocated.
"""

import array
import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from embodied.contracts.errors import InputError

RECORD_BYTES = 512 << 20  # one record is read whole; protobuf itself stops at 2 GiB
NUM_VALUES = 1 << 24  # of one feature of one record: 128 MiB as int64
NUM_FIELDS = 1 << 16  # that one feature's numbers may be spread over
HEADER, FOOTER = 12, 4  # [bytes]
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
KINDS = {1: "bytes", 2: "float", 3: "int64"}  # field numbers of Feature


@dataclasses.dataclass(frozen=True)
class Records:
    """Where the records of one file lie.

    Attributes:
        offset: (n,) int64, of each record's data [bytes].
        length: (n,) int64 [bytes].
        damage: why the file could not be followed to its end; empty when it could.
    """

    offset: np.ndarray
    length: np.ndarray
    damage: str = ""

    def __len__(self) -> int:
        return len(self.offset)


def index_records(path: Path) -> Records:
    """Follow the records' headers through a file, without reading the data. Raises InputError when it is unreadable."""
    found = array.array("q")  # 16 bytes a record
    at, damage = 0, ""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        while at < size and not damage:
            header = os.pread(file.fileno(), HEADER, at)
            length, crc = struct.unpack("<QI", header) if len(header) == HEADER else (0, 0)
            if len(header) < HEADER:
                damage = f"ends within a header at byte {at}"
            elif crc != _masked_checksum(header[:8]):
                damage = f"has a damaged header at byte {at}"
            elif length > size - at - HEADER - FOOTER:
                damage = f"ends within a record at byte {at}, which is {length} bytes long"
            else:
                found.extend((at + HEADER, length))
                at += HEADER + length + FOOTER
    table = np.array(found, np.int64).reshape(-1, 2)
    if damage:
        damage = f"{damage}; {size - at} of {size} bytes are lost"
    return Records(table[:, 0].copy(), table[:, 1].copy(), damage)


def read_record(path: Path, offset: int, length: int) -> bytes:
    """One record's data. Raises InputError: its checksum does not fit, it is cut off or over 512 MiB."""
    if length > RECORD_BYTES:
        raise InputError(f"it has {length >> 20} MiB; one record may have {RECORD_BYTES >> 20} MiB.")
    record = read_part(path, offset, length)
    if int.from_bytes(read_part(path, offset + length, FOOTER), "little") != _masked_checksum(record):
        raise InputError(f"the checksum of {path.name} at byte {offset} does not fit: its data is damaged.")
    return record


def read_part(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of a file. Raises InputError: it has become shorter, or cannot be opened."""
    with _opened(path) as file:
        data = os.pread(file.fileno(), length, offset)
    if len(data) < length:
        raise InputError(f"{path} ends at byte {offset + len(data)}: it became shorter while it was read.")
    return data


@dataclasses.dataclass(frozen=True)
class Feature:
    """One named list of an Example, decoded when asked for.

    Attributes:
        kind: `bytes`, `float`, `int64`, or `` for a list that was never set.
        record: the Example it lies in.
        start, stop: the list's message in `record` [bytes].
    """

    kind: str
    record: bytes
    start: int
    stop: int

    def spans(self) -> np.ndarray:
        """(n, 2) int64: start and stop in the record of each byte string. Raises InputError: it holds numbers."""
        if self.kind not in ("bytes", ""):
            raise InputError(f"it holds {self.kind} values where byte strings are expected.")
        found = [(start, stop) for field, wire, start, stop in self._fields() if (field, wire) == (1, BYTES)]
        return np.array(found, np.int64).reshape(-1, 2)

    def strings(self) -> Iterator[bytes]:
        """The byte strings. Raises InputError: it holds numbers."""
        for start, stop in self.spans():
            yield self.record[start:stop]

    def numbers(self) -> np.ndarray:
        """(n,) float32 or int64. Raises InputError: it holds byte strings, or more than 16 million values."""
        if self.kind == "bytes":
            raise InputError("it holds byte strings where numbers are expected.")
        floats = self.kind == "float"
        parts = [np.zeros(0, np.float32 if floats else np.int64)]
        for field, wire, start, stop in self._fields():
            # Packed in one field, or one field each, as older writers do.
            if field == 1 and wire in (BYTES, FIXED32 if floats else VARINT):
                parts.append(self._floats(start, stop) if floats else self._varints(start, stop))
            if len(parts) > NUM_FIELDS:
                raise InputError(f"it holds more than {NUM_FIELDS} values one by one.")
        if sum(map(len, parts)) > NUM_VALUES:
            raise InputError(f"it holds more than {NUM_VALUES} values.")
        return np.concatenate(parts)

    def _fields(self) -> Iterator[tuple[int, int, int, int]]:
        return _fields(self.record, self.start, self.stop)

    def _floats(self, start: int, stop: int) -> np.ndarray:
        if (stop - start) % 4:
            raise InputError(f"its {stop - start} bytes are no list of float32.")
        return np.frombuffer(self.record, "<f4", (stop - start) // 4, start)

    def _varints(self, start: int, stop: int) -> np.ndarray:
        data = np.frombuffer(self.record, np.uint8, stop - start, start)
        if int(np.count_nonzero(data < 128)) > NUM_VALUES:
            raise InputError(f"it holds more than {NUM_VALUES} values.")
        last = np.flatnonzero(data < 128)  # the byte that ends each number
        if (last[-1] + 1 if len(last) else 0) != len(data):
            raise InputError("its last integer is cut off.")
        first = np.concatenate([np.zeros(min(1, len(last)), np.int64), last[:-1] + 1])
        width = last - first + 1
        if len(width) and width.max() > 10:
            raise InputError("it holds an integer of more than 10 bytes.")
        values = np.zeros(len(last), np.uint64)
        for place in range(int(width.max()) if len(width) else 0):
            longer = np.flatnonzero(width > place)
            bits = (data[first[longer] + place] & 127).astype(np.uint64)
            values[longer] |= bits << np.uint64(7 * place)  # bits beyond 64 fall off, as in every protobuf reader
        return values.view(np.int64)


def read_example(record: bytes) -> dict[str, Feature]:
    """Name -> Feature of one Example. Raises InputError where it is no such message."""
    found: dict[str, Feature] = {}
    for field, wire, start, stop in _fields(record, 0, len(record)):
        if (field, wire) != (1, BYTES):
            continue
        for field_in, wire_in, entry_start, entry_stop in _fields(record, start, stop):
            if (field_in, wire_in) == (1, BYTES):
                name, feature = _entry(record, entry_start, entry_stop)
                found[name] = feature
    return found


def _entry(record: bytes, start: int, stop: int) -> tuple[str, Feature]:
    name, feature = "", Feature("", record, 0, 0)
    for field, wire, value_start, value_stop in _fields(record, start, stop):
        if (field, wire) == (1, BYTES):
            name = record[value_start:value_stop].decode(errors="replace")
        elif (field, wire) == (2, BYTES):
            for kind, kind_wire, list_start, list_stop in _fields(record, value_start, value_stop):
                if kind in KINDS and kind_wire == BYTES:
                    feature = Feature(KINDS[kind], record, list_start, list_stop)
    return name, feature


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, stop of its value) of each field of the message in data[at:stop]."""
    while at < stop:
        tag, at = _varint(data, at, stop)
        wire, start = tag & 7, at
        if wire == VARINT:
            _, at = _varint(data, at, stop)
        elif wire == BYTES:
            length, start = _varint(data, at, stop)
            at = start + length
        elif wire in (FIXED64, FIXED32):
            at += 8 if wire == FIXED64 else 4
        else:
            raise InputError(f"it is no tf.train.Example: wire type {wire} at byte {start}.")
        if at > stop:
            raise InputError(f"it is no tf.train.Example: a field at byte {start} runs {at - stop} bytes too far.")
        yield tag >> 3, wire, start, at


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The integer at `at`, and where the next byte is."""
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise InputError(f"it is no tf.train.Example: an integer at byte {at} does not end.")


def _opened(path: Path):
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror} ({path})") from error


def _masked_checksum(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord stores it: data that holds its own checksum does not weaken it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
