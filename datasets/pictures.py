"""JPEG and PNG pictures that lie inside other files, decoded a block at a time.

A picture of a few kB may declare any size: its header is compared with what the dataset says before it is decoded.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.datasets.episode import Frames

NUM_PIXELS = 1 << 24  # of one picture: 4096 x 4096, 48 MiB decoded
BLOCK_BYTES = 4 << 20  # of pictures that are decoded together
MODES = ("L", "LA", "P", "RGB", "RGBA", "CMYK", "1")  # 8 bits per channel or fewer: RGB loses nothing but alpha


def picture_shape(data: bytes, name: str) -> tuple[int, int, int]:
    """(H, W, 3) that a picture declares; nothing is decoded. Raises InputError: as `decode_picture`."""
    return _declared(_opened(data, name), name)


def decode_picture(data: bytes, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(H, W, 3) uint8; grey is repeated, alpha dropped.

    Args:
        data: a JPEG or PNG file.
        name: for messages.
        shape: (H, W, 3) that it must have; None for any.

    Raises:
        InputError: it is damaged, of another shape, over 16 million pixels or of more than 8 bits per channel.
    """
    picture = _opened(data, name)
    found = _declared(picture, name)
    if shape is not None and found != tuple(shape):
        raise InputError(f"{name} is a picture of {found[:2]}; {tuple(shape[:2])} is expected.")
    try:
        return np.array(picture.convert("RGB"))
    except Exception as error:  # Pillow raises nearly every built-in exception on damaged bytes
        raise InputError(f"{name} cannot be decoded: {str(error)[:200]}.") from error


def lazy_pictures(
    shape: tuple[int, int, int, int], encoded: Callable[[int, int], Iterator[bytes]], name: str
) -> Frames:
    """Pictures that are decoded when asked for.

    Args:
        shape: (n, H, W, 3).
        encoded: (start, stop) -> the files of these pictures.
        name: for messages.
    """
    rows = max(1, BLOCK_BYTES // max(1, int(np.prod(shape[1:], dtype=np.int64))))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            pictures = [
                decode_picture(data, f"{name} {start + place}", shape[1:])
                for place, data in enumerate(encoded(start, stop))
            ]
            yield np.stack(pictures)

    return Frames(shape, blocks)


def _opened(data: bytes, name: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "formats", "Decoding pictures") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # NUM_PIXELS is stricter
            return Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except Exception as error:
        raise InputError(f"{name} is no JPEG or PNG picture ({len(data)} bytes).") from error


def _declared(picture: Any, name: str) -> tuple[int, int, int]:
    width, height = picture.size
    if width * height > NUM_PIXELS:
        raise InputError(f"{name} declares {height} x {width} pixels; at most {NUM_PIXELS} are decoded.")
    if picture.mode not in MODES:
        raise InputError(f"{name} is a picture of mode {picture.mode}, not RGB with 8 bits per channel.")
    return height, width, 3
