"""Pictures in HDF5 arrays: which arrays are pictures, and reading them a few MB at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.episode import Frames
from embodied.datasets.hdf5 import NumberArray, readable


@dataclasses.dataclass(frozen=True)
class PictureForm:
    """How an array holds pictures.

    Attributes:
        shape: (H, W, 3) of one picture in the store.
        convert: (k, ...) rows of the file -> (k, H, W, 3) uint8. Raises InputError where they are not what they seemed.
    """

    shape: tuple[int, int, int]
    convert: Callable[[np.ndarray], np.ndarray]


def picture_form(array: NumberArray) -> PictureForm | str:
    """How `array` holds RGB pictures, or why it is none.

    Converted where it is plainly right: channels first, one grey channel, a fourth (alpha) channel, and floats that are
    bytes divided by 255.
    """
    shape, dtype = array.shape, array.dtype
    found = f"{dtype} {shape[1:]} per step"
    if len(shape) != 4 or 0 in shape[1:]:
        return f"{found}: neither a vector nor a picture"
    first = shape[1] in (1, 3, 4) and shape[3] not in (1, 3, 4)
    channels, size = (shape[1], shape[2:]) if first else (shape[3], shape[1:3])
    scaled = dtype.kind == "f" and channels == 3 and len(array) > 0 and _are_bytes(array.rows(0, 1))
    if channels not in (1, 3, 4) or not (dtype == np.uint8 or scaled):
        return f"{found}: no RGB picture of bytes"

    def convert(rows: np.ndarray) -> np.ndarray:
        if scaled:
            if not _are_bytes(rows):
                raise InputError(f"'{array.dataset.name}' holds pictures with values that are no bytes divided by 255.")
            rows = np.rint(rows * 255).astype(np.uint8)
        rows = np.moveaxis(rows, 1, 3) if first else rows
        return np.repeat(rows, 3, axis=3) if channels == 1 else np.ascontiguousarray(rows[..., :3])

    return PictureForm((int(size[0]), int(size[1]), 3), convert)


def _are_bytes(rows: np.ndarray) -> bool:
    tolerance = 0.13 if rows.dtype.itemsize == 2 else 0.01  # of a byte: float16 has eleven bits
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = rows.astype(np.float32) * 255
        return bool(((np.abs(scaled - np.rint(scaled)) < tolerance) & (scaled > -0.5) & (scaled < 255.5)).all())


def frames(
    path: Path,
    array: NumberArray,
    start: int,
    stop: int,
    final: tuple[NumberArray, int] | None = None,
) -> Frames:
    """Pictures of rows [start, stop), read when asked for, about 8 MB at a time.

    Args:
        path: the file, for messages.
        final: array and row of one more picture: the final observation.

    Raises:
        InputError: at once, where the array holds no pictures; from `blocks`, where they cannot be decoded.
    """
    form = picture_form(array)
    if isinstance(form, str):
        raise InputError(f"'{array.dataset.name}' is {form}.")
    if stop > len(array) or (final is not None and final[0].shape[1:] != array.shape[1:]):
        raise InputError(f"'{array.dataset.name}' has {len(array)} pictures of {array.shape[1:]}; {stop} are needed.")

    def blocks() -> Iterator[np.ndarray]:
        with readable(path):
            for rows in array.blocks(start, stop):
                yield form.convert(rows)
            if final is not None:
                yield form.convert(final[0].rows(final[1], final[1] + 1))

    return Frames((stop - start + (final is not None), *form.shape), blocks)
