"""Pictures of a bag, decoded when they are asked for: a second pass over the file, a block of pictures at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.datasets.bag_files import Recording
from embodied.datasets.bag_items import Message, Topic
from embodied.datasets.bag_types import message_type
from embodied.datasets.episode import Frames
from embodied.datasets.pictures import decode_picture

IMAGE, COMPRESSED_IMAGE = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
# Encoding -> channels, and which of them are red, green, blue. 8UC3 and 8UC4 are OpenCV's, so BGR.
ENCODINGS = {
    "rgb8": (3, [0, 1, 2]),
    "bgr8": (3, [2, 1, 0]),
    "rgba8": (4, [0, 1, 2]),
    "bgra8": (4, [2, 1, 0]),
    "mono8": (1, [0, 0, 0]),
    "8UC1": (1, [0, 0, 0]),
    "8UC3": (3, [2, 1, 0]),
    "8UC4": (4, [2, 1, 0]),
}
MAX_PIXELS = 1 << 26
BLOCK_BYTES = 1 << 22


def picture(topic: Topic, data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 of an Image or CompressedImage message, resized to `size` (height, width) if given.

    Raises:
        InputError: it is damaged, or of an encoding that is no colour or grey of 8 bits: depth, Bayer, 16 bits.
    """
    message = message_type(topic).decode(data)
    if topic.kind == IMAGE:
        pixels = _raw(message)
    else:
        pixels = decode_picture(bytes(message.data), f"a picture of format '{message.format[:60]}'")
    return pixels if size is None or pixels.shape[:2] == size else _resized(pixels, size)


def _raw(message: Any) -> np.ndarray:
    if message.encoding not in ENCODINGS:
        raise InputError(f"its encoding '{message.encoding[:40]}' is none of {', '.join(ENCODINGS)}")
    channels, order = ENCODINGS[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    if step < width * channels or height * step > len(message.data) or not 0 < height * width <= MAX_PIXELS:
        raise InputError(f"a picture of {height}x{width} {message.encoding} cannot have {len(message.data)} bytes")
    rows = message.data[: height * step].reshape(height, step)[:, : width * channels]
    return np.ascontiguousarray(rows.reshape(height, width, channels)[..., order])


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "formats", "Resizing pictures") from error
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BOX))


def frames(
    recording: Recording, topic: Topic, rows: np.ndarray, shape: tuple[int, ...], size: tuple[int, int] | None
) -> Frames:
    """One picture per row, decoded lazily.

    Args:
        rows: (n,) which message of the topic each row shows, counted from 0 in file order; never decreasing.
        shape: (H, W, 3) of every picture.
        size: (height, width) to resize to, or None.
    """

    def blocks() -> Iterator[np.ndarray]:
        most = max(1, BLOCK_BYTES // int(np.prod(shape)))
        block: list[np.ndarray] = []
        done = 0
        for number, data in _numbered(recording, topic):
            if done == len(rows):
                break
            if rows[done] != number:
                continue
            pixels = _checked(recording, topic, data, shape, size)
            while done < len(rows) and rows[done] == number:  # a slow camera is shown in several rows
                block.append(pixels)
                done += 1
                if len(block) == most:
                    yield np.stack(block)
                    block = []
        if block:
            yield np.stack(block)
        if done < len(rows):
            raise InputError(f"{recording.path}: {topic.name} ends after {done} of {len(rows)} pictures; it changed.")

    height, width, channels = shape
    return Frames((len(rows), height, width, channels), blocks)


def _numbered(recording: Recording, topic: Topic) -> Iterator[tuple[int, bytes]]:
    number = 0
    for item in recording.items({topic.name}):
        if isinstance(item, Message) and item.topic.kind == topic.kind:
            yield number, item.data
            number += 1


def _checked(
    recording: Recording, topic: Topic, data: bytes, shape: tuple[int, ...], size: tuple[int, int] | None
) -> np.ndarray:
    try:
        pixels = picture(topic, data, size)
    except InputError as error:
        raise InputError(f"{recording.path}: {topic.name}: {error}.") from error
    if pixels.shape != shape:
        raise InputError(
            f"{recording.path}: {topic.name} has pictures of {pixels.shape[0]}x{pixels.shape[1]} among those of "
            f"{shape[0]}x{shape[1]}. Give it a size in the mapping."
        )
    return pixels
