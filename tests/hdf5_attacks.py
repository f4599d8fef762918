"""Structured damage to an HDF5 file: what a hostile or broken writer could leave, in a file that opens."""

import functools
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

DTYPES = ["f2", "f8", ">f4", "i1", ">i8", "u8", "c8", "S3", "?", "u1", [("x", "f4"), ("y", "i2")], ("f4", (3,))]


def attack(target: Path, rng: np.random.Generator) -> str:
    """Change one thing of `target` in place. Returns what."""
    with h5py.File(target, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = str(rng.choice(sorted(names)))
        change = ATTACKS[int(rng.integers(len(ATTACKS)))]
        change(file, name, rng)
        return f"{change.__name__} of {name}"


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file[name].shape or ()) if isinstance(file[name], h5py.Dataset) else (5, 3)


def other_dtype(file: Any, name: str, rng: np.random.Generator) -> None:
    shape = _shape(file, name)
    del file[name]
    file.create_dataset(name, shape, np.dtype(DTYPES[int(rng.integers(len(DTYPES)))]))


def objects(file: Any, name: str, rng: np.random.Generator) -> None:
    kinds = [
        h5py.string_dtype(),
        h5py.vlen_dtype("f4"),
        h5py.ref_dtype,
        h5py.regionref_dtype,
        h5py.opaque_dtype("M8[s]"),
    ]
    shape = _shape(file, name)
    del file[name]
    file.create_dataset(name, shape, kinds[int(rng.integers(len(kinds)))])


def other_shape(file: Any, name: str, rng: np.random.Generator) -> None:
    shape = _shape(file, name)
    rows = shape[0] if shape else 1
    shapes = [(), (0,), (rows, 0), (rows, 1), (rows + 1, *shape[1:]), (max(0, rows - 1), *shape[1:]), (1, *shape)]
    shapes += [(rows, 4, 4, 3), (rows, 3, 8, 8), (rows, 8, 8, 1), (rows, 8, 8, 4), (rows, *[2] * 20)]
    del file[name]
    wanted = shapes[int(rng.integers(len(shapes)))]
    file[name] = rng.integers(0, 2, wanted).astype(rng.choice(["u1", "f4"]))


def absurd_length(file: Any, name: str, rng: np.random.Generator) -> None:
    rows = int(rng.choice([2**20, 2**31, 2**40, 2**62]))
    dtype = rng.choice(["f4", "u1"])
    width = _shape(file, name)[1:] if rows < 2**40 else ()
    del file[name]
    if rng.random() < 0.5:
        chunks = min(rows, int(rng.choice([1, 1000, 2**27])))
        file.create_dataset(name, (rows, *width), dtype, chunks=(chunks, *[1] * len(width)), maxshape=None)
    else:
        file.create_dataset(name, (min(rows, 2**40), *width), dtype)


def bomb(file: Any, name: str, rng: np.random.Generator) -> None:
    """A chunk of 1 MB that inflates to 256 MB; or zeros of 2 GB, each chunk a few bytes."""
    shape = _shape(file, name)
    del file[name]
    if rng.random() < 0.5:
        dataset = file.create_dataset(name, (max(1, shape[0] if shape else 1),), "f4", chunks=(1,), compression="gzip")
        packed = _zeros(2**28)
    else:
        dataset = file.create_dataset(name, (2**29,), "f4", chunks=(2**24,), compression="gzip")
        packed = _zeros(2**26)
    dataset.id.write_direct_chunk((0,), packed)


@functools.cache
def _zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


def link(file: Any, name: str, rng: np.random.Generator) -> None:
    targets = [
        h5py.ExternalLink("/etc/passwd", "/"),
        h5py.ExternalLink(file.filename, f"/{name}"),
        h5py.ExternalLink("../../../secret.hdf5", "/data"),
        h5py.SoftLink("/etc/passwd"),
        h5py.SoftLink(f"/{name}"),
        h5py.SoftLink("/"),
        h5py.SoftLink("../../.."),
    ]
    del file[name]
    file[name] = targets[int(rng.integers(len(targets)))]


def hard_link_in_a_circle(file: Any, name: str, rng: np.random.Generator) -> None:
    parent = name.rpartition("/")[0]
    del file[name]
    file[name] = file[parent or "/"]


def groups_in_each_other(file: Any, name: str, rng: np.random.Generator) -> None:
    groups = [found for found in ("data/demo_0/obs", "data/demo_1", "infos", "/") if found in file]
    group: Any = file[groups[0]]
    for number in range(40):
        group[f"again_{number}"] = group


def other_file(file: Any, name: str, rng: np.random.Generator) -> None:
    shape = _shape(file, name) or (5,)
    del file[name]
    if rng.random() < 0.5:
        file.create_dataset(name, shape, "u1", external=[("/etc/passwd", 0, int(np.prod(shape)))])
    else:
        layout = h5py.VirtualLayout(shape, "f4")
        layout[...] = h5py.VirtualSource("/etc/passwd", "x", shape)
        file.create_virtual_dataset(name, layout)


def swapped_kind(file: Any, name: str, rng: np.random.Generator) -> None:
    group = isinstance(file[name], h5py.Group)
    del file[name]
    if group:
        file[name] = np.zeros((5, 3), np.float32)
    else:
        file.create_group(name).create_group("inner")


def no_numbers(file: Any, name: str, rng: np.random.Generator) -> None:
    shape = _shape(file, name)
    del file[name]
    file[name] = np.full(shape, rng.choice([np.nan, np.inf, -np.inf, 1e300, -1.0, 255.0]))


def empty(file: Any, name: str, rng: np.random.Generator) -> None:
    del file[name]
    file[name] = h5py.Empty("f4")


def absent(file: Any, name: str, rng: np.random.Generator) -> None:
    del file[name]


def odd_name(file: Any, name: str, rng: np.random.Generator) -> None:
    parent = name.rpartition("/")[0]
    odd = [b"..", b"\xff\xfe", b"a\\b", b"new\nline", b"zarr.json", b"images", b"demo_" + b"9" * 400, b"x" * 5000]
    new = (parent.encode() + b"/" if parent else b"") + odd[int(rng.integers(len(odd)))]
    file.id.links.move(name.encode(), file.id, new)


def odd_attribute(file: Any, name: str, rng: np.random.Generator) -> None:
    item = file[name if rng.random() < 0.5 else (name.partition("/")[0])]
    known = [*item.attrs, "success", "num_samples", "total", "env_args", "instruction", "model_file", "env_info"]
    values: list[Any] = [h5py.Empty("f4"), file.ref, np.zeros((3, 3)), "x" * 30000, b"\xff\xfe", -1, 2**63 - 1, np.nan]
    values += ['{"a": "\\ud800"}', "[" * 30000, '{"env_kwargs": {"control_freq": 1e999}}', np.bytes_(b"true"), 1j]
    values += [["a", "b"], '{"env_kwargs": 3, "env_name": [1]}', '{"env_kwargs": {"control_freq": "20"}}', "true"]
    item.attrs[str(rng.choice(known))] = values[int(rng.integers(len(values)))]


ATTACKS = [
    other_dtype,
    objects,
    other_shape,
    absurd_length,
    bomb,
    link,
    hard_link_in_a_circle,
    groups_in_each_other,
    other_file,
    swapped_kind,
    no_numbers,
    empty,
    absent,
    odd_name,
    odd_attribute,
]
