"""Encoding and valuing the frames of a store, a block at a time."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ArraySpec
from embodied.policies.bundle import ValueBundle, load_value, save_value
from embodied.policies.encode import encode_frames, goal_values
from embodied.policies.networks import EncoderConfig, ImageEncoder, MultilinearValue, generators

torch.set_num_threads(1)
FRAMES = np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def bundle(tmp_path: Path) -> ValueBundle:
    encoder = ImageEncoder(EncoderConfig((16, 16), (4, 8), 8), generators([1])[0])
    heads = MultilinearValue(generators([2])[0], 8, (16, 16))
    return load_value(save_value(tmp_path / "value", heads, encoder, {}, {}, {}))


def store_of(frames: np.ndarray, reads: list[tuple[int, int]]) -> SimpleNamespace:
    def read(camera: str, start: int, stop: int) -> np.ndarray:
        reads.append((start, stop))
        return frames[start:stop]

    images = {"wrist": ArraySpec(frames.shape[1:], "uint8")}
    return SimpleNamespace(path="store", num_frames=len(frames), spec=SimpleNamespace(images=images), frames=read)


def test_blocks_give_what_one_pass_gives(bundle: ValueBundle) -> None:
    reads: list[tuple[int, int]] = []
    seen: list[int] = []
    result = encode_frames(
        bundle, store_of(FRAMES, reads), "wrist", batch=10, progress=lambda done, total, text: seen.append(done)
    )
    assert reads == [(0, 10), (10, 20), (20, 23)]
    assert seen == [10, 20, 23]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, bundle.encode(FRAMES), atol=1e-6)


def test_goal_values_are_the_mean_over_goals(bundle: ValueBundle) -> None:
    one, two = (goal_values(bundle, FRAMES, bundle.encode(FRAMES[i : i + 1])) for i in (3, 4))
    both = goal_values(bundle, FRAMES, bundle.encode(FRAMES[3:5]))
    assert one.shape == (23,)
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-4, atol=1e-4)
    embedding = bundle.encode(FRAMES)
    np.testing.assert_allclose(one, bundle.value(embedding, np.repeat(embedding[3:4], 23, 0)), rtol=1e-4, atol=1e-4)


def test_wrong_camera_and_wrong_size(bundle: ValueBundle) -> None:
    with pytest.raises(InputError, match=r"no camera 'wrst'. Did you mean 'wrist'"):
        encode_frames(bundle, store_of(FRAMES, []), "wrst")
    with pytest.raises(InputError, match="16x16"):
        encode_frames(bundle, store_of(np.zeros((4, 8, 8, 3), np.uint8), []), "wrist")
