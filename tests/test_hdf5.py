import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.datasets import hdf5
from embodied.datasets.hdf5_pictures import PictureForm, frames, picture_form

SECRET = "not to be read"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file whose every item claims something that is not so."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    path = tmp_path / "hostile.hdf5"
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["secret"] = np.arange(5.0)
    (tmp_path / "text").write_text(SECRET)
    with h5py.File(path, "w") as file:
        file["numbers"] = np.arange(5.0)
        file["group/inner"] = np.arange(3)
        file["soft"] = h5py.SoftLink("/numbers")
        file["circle"] = h5py.SoftLink("/circle")
        file["out"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "/secret")
        file["out_softly"] = h5py.SoftLink("/out")
        file.create_dataset("raw", (10,), "u1", external=[(str(tmp_path / "text"), 0, 10)])
        layout = h5py.VirtualLayout((5,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "secret", (5,))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("absurd", (2**40,), "f4", chunks=(1024,))
        file.create_dataset("unwritten", (2**36,), "f4")
        file.create_dataset("wide_chunks", (2**28,), "f4", chunks=(2**28,), compression="gzip")
        bomb = file.create_dataset("bomb", (2**20,), "u1", chunks=(2**20,), compression="gzip")
        bomb.id.write_direct_chunk((0,), zlib.compress(bytes(2**28), 9))
        file.create_dataset("many_chunks", (4, 100_000), "u1", chunks=(1, 1))
        file["text"] = "words"
        file["compound"] = np.zeros(3, [("a", "f4")])
        file["complex"] = np.zeros(3, "c8")
        file["scalar"] = 3.0
        file["empty"] = h5py.Empty("f4")
    return hdf5.open_hdf5(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "is absent"),
        ("group", "is a group, not an array"),
        ("circle", "out of the file or in a circle"),
        ("out", "out of the file or in a circle"),
        ("out_softly", "out of the file or in a circle"),
        ("raw", "in another file"),
        ("virtual", "in another file"),
        ("absurd", "stores 0 bytes: never written, or a decompression bomb"),
        ("unwritten", "stores 0 bytes: never written, or a decompression bomb"),
        ("wide_chunks", "never written|too large to decode"),
        ("bomb", "bomb: a chunk inflates beyond 1048576 bytes"),
        ("many_chunks", "100000 chunks in one row"),
        ("text", "not an array of numbers"),
        ("compound", "not an array of numbers"),
        ("complex", "not an array of numbers"),
        ("scalar", "not an array of numbers"),
        ("empty", "not an array of numbers"),
    ],
)
def test_claims_that_are_not_so_are_refused(hostile, name, reason):
    with pytest.raises(InputError, match=reason):
        hdf5.array_at(hostile, name).rows(0, 3)


def test_what_is_there_is_read(hostile):
    assert hdf5.array_at(hostile, "soft").rows(1, 3).tolist() == [1, 2]
    assert hdf5.array_at(hostile, "group/inner").float32().tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="has 5 rows; 3 to 9 are asked for"):
        hdf5.array_at(hostile, "numbers").rows(3, 9)


def test_errors_of_the_library_name_the_file(tmp_path):
    path = tmp_path / "x.hdf5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    assert hdf5.is_hdf5(path)
    with pytest.raises(InputError, match=r"x\.hdf5 cannot be read: (?s:.*)58 bytes"):
        hdf5.open_hdf5(path)
    for error in (KeyError("a"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), MemoryError()):
        with pytest.raises(InputError, match=r"x\.hdf5 cannot be read"), hdf5.readable(path):
            raise error


def test_rows_and_pictures_are_the_arrays_rows(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (700, 60, 80, 3), np.uint8)
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        file.create_dataset("chunked", data=pictures, chunks=(100, 30, 80, 3), compression="gzip", compression_opts=1)
        file["plain"] = pictures
        file.create_dataset("rows", data=np.arange(50_000.0)[:, None], chunks=(1, 1))
    file = hdf5.open_hdf5(tmp_path / "p.hdf5")
    for name in ("chunked", "plain"):
        array = hdf5.array_at(file, name)
        seen = frames(tmp_path / "p.hdf5", array, 50, 690, (array, 3))
        blocks = list(seen.blocks())
        assert seen.shape == (641, 60, 80, 3)
        assert max(block.nbytes for block in blocks) <= hdf5.BLOCK_BYTES + 100 * 60 * 80 * 3
        assert len(blocks) > 1
        np.testing.assert_array_equal(np.concatenate(blocks), pictures[[*range(50, 690), 3]])
    assert [len(block) for block in list(frames(Path(), hdf5.array_at(file, "chunked"), 50, 690).blocks())] == [
        450,
        190,
    ]
    assert hdf5.array_at(file, "rows").rows(10, 50_000)[:, 0].tolist() == list(range(10, 50_000))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p, lambda p: p),
        (lambda p: np.moveaxis(p, 3, 1), lambda p: p),
        (lambda p: p[..., :1], lambda p: np.repeat(p[..., :1], 3, 3)),
        (lambda p: np.concatenate([p, p[..., :1]], 3), lambda p: p),
        (lambda p: (p / 255).astype(np.float32), lambda p: p),
        (lambda p: np.moveaxis(p / 255, 3, 1).astype(np.float16), lambda p: p),
    ],
)
def test_pictures_are_converted_where_it_is_plainly_right(tmp_path, make, expected):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 10, 12, 3), np.uint8)
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        file["p"] = make(pictures)
    array = hdf5.array_at(hdf5.open_hdf5(tmp_path / "p.hdf5"), "p")
    np.testing.assert_array_equal(np.asarray(frames(tmp_path, array, 0, 3)), expected(pictures))


@pytest.mark.parametrize(
    "rows",
    [
        np.random.default_rng(0).normal(size=(3, 10, 12, 3)),
        np.random.default_rng(0).uniform(size=(3, 10, 12, 3)),
        np.ones((3, 10, 12, 1), np.float32),
        np.ones((3, 10, 12, 3), np.int32),
        np.ones((3, 10, 12, 5), np.uint8),
        np.ones((3, 10, 0, 3), np.uint8),
        np.ones((3, 10, 3), np.uint8),
    ],
)
def test_other_arrays_are_no_pictures(tmp_path, rows):
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        file["p"] = rows
    form = picture_form(hdf5.array_at(hdf5.open_hdf5(tmp_path / "p.hdf5"), "p"))
    assert not isinstance(form, PictureForm)
    assert str(rows.dtype) in form


def test_floats_that_turn_out_to_be_no_bytes_are_refused_when_read(tmp_path):
    with h5py.File(tmp_path / "p.hdf5", "w") as file:
        file["p"] = np.concatenate([np.zeros((1, 4, 4, 3)), np.full((1, 4, 4, 3), 0.3)])
    seen = frames(tmp_path, hdf5.array_at(hdf5.open_hdf5(tmp_path / "p.hdf5"), "p"), 0, 2)
    with pytest.raises(InputError, match="no bytes divided by 255"):
        list(seen.blocks())


def test_attributes_are_what_json_takes(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["x"] = np.arange(3)
        values = {"list": np.arange(2), "flag": np.bool_(True), "bytes": b"a\xff", "text": "é", "texts": ["q", "w"]}
        file.attrs.update(values | {"reference": file["x"].ref, "none": h5py.Empty("f4"), "number": np.float32(0.5)})
        file["names"] = ["demo_1", "demo_2"]
    file = hdf5.open_hdf5(tmp_path / "a.hdf5")
    unread = "of a type that is not read"
    assert hdf5.attributes(file) == {
        "list": [0, 1],
        "flag": True,
        "bytes": "a?",
        "text": "é",
        "texts": ["q", "w"],
        "reference": unread,
        "none": unread,
        "number": 0.5,
    }
    assert hdf5.texts(file, "names") == ["demo_1", "demo_2"]
    assert hdf5.texts(file, "absent") == []
    with pytest.raises(InputError, match="not a list of names"):
        hdf5.texts(file, "x")


def test_a_damaged_heap_of_texts_is_refused_instead_of_read_forever(tmp_path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs["text"] = "words"
    data = bytearray(path.read_bytes())
    at = data.find(hdf5.HEAP)
    assert at > 0
    free = at + 16 + 16 + 8  # header; the object "words", padded
    assert data[free : free + 2] == b"\0\0"
    data[free + 8 : free + 16] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"the texts at byte {at} are damaged"):
        hdf5.attributes(hdf5.open_hdf5(path))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "new\nline", "images", "zarr.json", "__x", "\udcff"])
def test_names_that_cannot_be_keys(name):
    assert not hdf5.is_key(name)
    assert hdf5.is_key("robot0_eef_pos")
    assert hdf5.is_key("Größe 1.x")
