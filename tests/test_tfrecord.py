import hashlib
import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.errors import InputError
from embodied.datasets.tfrecord import index_records, read_example, read_record

sys.path.insert(0, str(Path(__file__).parent))
from tfrecord_files import example, field, framed, masked, varint

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "rlds-bridge-debug"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_checksum_is_the_one_in_tensorflows_own_files():
    # CRC-32C of "123456789" is 0xe3069283 (RFC 3720); masked: rotated right by 15, plus 0xa282ead8.
    crc = 0xE3069283
    assert masked(b"123456789") == struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def test_records_are_found_by_their_headers(tmp_path):
    records = [b"first", b"", b"x" * 300]
    path = write(tmp_path / "f", b"".join(map(framed, records)))
    found = index_records(path)
    assert found.offset.tolist() == [12, 33, 49]
    assert found.length.tolist() == [5, 0, 300]
    assert found.damage == ""
    assert [read_record(path, *at) for at in zip(found.offset, found.length, strict=True)] == records


@pytest.mark.parametrize(
    ("damage", "kept", "message"),
    [
        (lambda data: data[:-1], 1, "ends within a record at byte 21"),
        (lambda data: data[:27], 1, "ends within a header at byte 21"),
        (lambda data: data[:21] + b"\x01" + data[22:], 1, "damaged header at byte 21"),
        (lambda data: data[:21] + (length := struct.pack("<Q", 2**63)) + masked(length), 1, "9223372036854775808"),
        (lambda data: b"\x1f\x8b" + data[2:], 0, "damaged header at byte 0"),
    ],
)
def test_what_follows_a_lost_frame_is_lost(tmp_path, damage, kept, message):
    path = write(tmp_path / "f", damage(framed(b"first") + framed(b"second")))
    found = index_records(path)
    assert len(found) == kept
    assert message in found.damage


def test_a_record_with_a_flipped_bit_is_refused_and_the_next_is_read(tmp_path):
    path = write(tmp_path / "f", framed(b"first") + framed(b"second"))
    path.write_bytes(path.read_bytes().replace(b"first", b"fIrst"))
    found = index_records(path)
    with pytest.raises(InputError, match="checksum of f at byte 12 does not fit"):
        read_record(path, *map(int, (found.offset[0], found.length[0])))
    assert read_record(path, int(found.offset[1]), int(found.length[1])) == b"second"


def test_a_file_that_shrinks_is_refused(tmp_path):
    path = write(tmp_path / "f", framed(b"first"))
    path.write_bytes(path.read_bytes()[:14])
    with pytest.raises(InputError, match="became shorter"):
        read_record(path, 12, 5)
    with pytest.raises(InputError, match="cannot be opened"):
        index_records(tmp_path / "absent")


NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.lists(st.floats(width=32, allow_nan=False)), st.lists(st.binary(max_size=200)), st.text())
def test_an_example_comes_back(integers, floats, texts, name):
    found = read_example(
        example({name + "i": np.array(integers, np.int64), name + "f": np.array(floats, np.float32), name + "b": texts})
    )
    assert found[name + "i"].numbers().tolist() == integers
    assert found[name + "f"].numbers().tolist() == floats
    assert list(found[name + "b"].strings()) == texts


def test_lists_that_are_not_packed_unset_or_given_twice():
    floats = field(2, b"".join(varint(1 << 3 | 5) + struct.pack("<f", x) for x in (1, 2.5)))
    integers = field(3, varint(1 << 3) + varint(7) + field(1, varint(-1) + varint(300)))
    entries = [
        field(1, b"f") + field(2, floats),
        field(1, b"i") + field(2, integers),
        field(1, b"none") + field(2, b""),
    ]
    twice = field(1, b"f") + field(2, field(3, field(1, varint(4))))
    unknown = varint(9 << 3) + varint(5) + varint(8 << 3 | 1) + bytes(8) + varint(7 << 3 | 5) + bytes(4)
    found = read_example(unknown + field(1, b"".join(field(1, entry) for entry in entries)))
    assert found["f"].numbers().tolist() == [1, 2.5]
    assert found["i"].numbers().tolist() == [7, -1, 300]
    assert found["none"].numbers().tolist() == []
    assert list(found["none"].strings()) == []
    again = read_example(field(1, b"".join(field(1, entry) for entry in (*entries, twice))))
    assert again["f"].numbers().tolist() == [4], "the last one counts, as in every map of protobuf"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\x0a\xff\xff\xff\xff\x0f", "runs 4294967295 bytes too far"),
        (b"\x0a" + b"\xff" * 12, "does not end"),
        (b"\x0a", "does not end"),
        (b"\x0b", "wire type 3"),
        (b"\x09\x00", "7 bytes too far|6 bytes too far"),
        (field(1, b"\x0a\x05\x0a"), "too far"),
    ],
)
def test_bytes_that_are_no_example_are_refused(record, message):
    with pytest.raises(InputError, match=message):
        read_example(record)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (field(2, field(1, b"12345")), "no list of float32"),
        (field(3, field(1, b"\x80")), "cut off"),
        (field(3, field(1, b"\x80" * 10 + b"\x01")), "more than 10 bytes"),
        (field(1, field(1, b"text")), "byte strings where numbers are expected"),
        (field(3, field(1, bytes((1 << 24) + 1))), "more than 16777216 values"),
        (field(3, (varint(1 << 3) + varint(1)) * ((1 << 16) + 1)), "one by one"),
    ],
)
def test_lists_that_are_no_numbers_are_refused_soon(values, message):
    start = time.monotonic()
    feature = read_example(field(1, field(1, field(1, b"x") + field(2, values))))["x"]
    with pytest.raises(InputError, match=message):
        feature.numbers()
    assert time.monotonic() - start < 5


def test_numbers_where_texts_are_expected_are_refused():
    with pytest.raises(InputError, match="int64 values where byte strings are expected"):
        read_example(example({"x": np.arange(3)}))["x"].spans()


@pytest.mark.skipif(not DATA.exists(), reason="real data is not here")
def test_tensorflows_own_file():
    (path,) = DATA.glob("*.tfrecord-*")
    found = index_records(path)
    assert len(found) == 25
    assert found.damage == ""
    assert int(found.length.sum()) == 3_474_742, "numBytes of dataset_info.json"
    records = [read_record(path, *at) for at in zip(found.offset.tolist(), found.length.tolist(), strict=True)]
    digests = b"".join(sorted(hashlib.sha256(record).digest() for record in records))
    assert hashlib.sha256(digests).hexdigest() == json.loads((DATA / "facts.json").read_text())["sha256_sorted"]
    assert {len(read_example(record)["steps/action"].numbers()) for record in records} == {70}
