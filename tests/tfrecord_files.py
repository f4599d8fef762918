"""TFRecord files and TFDS datasets, written by hand: what TensorFlow would write, byte by byte."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image


def varint(value: int) -> bytes:
    """A protobuf integer; negative ones in two's complement, 10 bytes."""
    value %= 1 << 64
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def field(number: int, data: bytes) -> bytes:
    """A field of bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values: Any) -> bytes:
    """A tf.train.Feature: byte strings, floats or integers, packed."""
    if isinstance(values, list | tuple):
        return field(1, b"".join(field(1, text) for text in values))
    values = np.asarray(values).reshape(-1)
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in values)))


def example(features: dict[str, Any]) -> bytes:
    entries = [field(1, field(1, name.encode()) + field(2, feature(values))) for name, values in features.items()]
    return field(1, b"".join(entries))


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def framed(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def tensor(shape: tuple[int, ...] = (), dtype: str = "float32", encoding: str = "none") -> dict[str, Any]:
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {"pythonClassName": "t.Tensor", "tensor": {"shape": dimensions, "dtype": dtype, "encoding": encoding}}


def image(shape: tuple[int, ...], format: str = "jpeg", dtype: str = "uint8") -> dict[str, Any]:
    dimensions = {"dimensions": [str(size) for size in shape]}
    return {"pythonClassName": "t.Image", "image": {"shape": dimensions, "dtype": dtype, "encodingFormat": format}}


TEXT: dict[str, Any] = {"pythonClassName": "t.Text", "text": {}}


def tree(**features: Any) -> dict[str, Any]:
    return {"pythonClassName": "t.FeaturesDict", "featuresDict": {"features": features}}


def steps(**features: Any) -> dict[str, Any]:
    return {"pythonClassName": "t.Dataset", "sequence": {"feature": tree(**features), "length": "-1"}}


def write_dataset(
    folder: Path, features: Any, splits: dict[str, list[list[bytes]]], info: dict[str, Any] | None = None
) -> Path:
    """A dataset folder: features.json, dataset_info.json and one shard per list of records."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(features))
    claims = [
        {
            "name": name,
            "shardLengths": [str(len(records)) for records in shards],
            "numBytes": str(sum(len(record) for records in shards for record in records)),
            "filepathTemplate": "../../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for name, shards in splits.items()
    ]
    described = {"name": "toy", "version": "1.0.0", "fileFormat": "tfrecord", "splits": claims}
    (folder / "dataset_info.json").write_text(json.dumps(described | (info or {})))
    for name, shards in splits.items():
        for number, records in enumerate(shards):
            path = folder / f"toy-{name}.tfrecord-{number:05d}-of-{len(shards):05d}"
            path.write_bytes(b"".join(map(framed, records)))
    return folder


def encoded(pictures: np.ndarray, format: str = "PNG") -> list[bytes]:
    """Each of (n, H, W[, C]) uint8 as a file."""
    found = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format)
        found.append(file.getvalue())
    return found
