"""Data kept for random reads: the resident table gives what the indices say, on the device or beside it."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.contracts.batch import Batch
from embodied.contracts.errors import InputError
from embodied.contracts.specs import ArraySpec
from embodied.datasets.draws import Stream, philox
from embodied.datasets.prefetch import Prefetcher
from embodied.datasets.resident import ResidentFrames, ResidentTransitions, transition_batches


@dataclasses.dataclass(frozen=True)
class Arrays:
    observations: np.ndarray
    actions: np.ndarray
    frame: np.ndarray
    next_frame: np.ndarray
    masks: np.ndarray


def arrays(frames: int = 200, gaps: bool = True) -> tuple[Arrays, np.ndarray]:
    """Transitions from every frame but each fifth, the last of its episode; some are terminal without a successor."""
    rng = np.random.default_rng(0)
    frame = np.flatnonzero(np.arange(frames) % 5 < (4 if gaps else 5))
    masks = (rng.random(len(frame)) > 0.2).astype(np.float32)
    next_frame = np.where((masks == 0) & (rng.random(len(frame)) > 0.5), frame, np.minimum(frame + 1, frames - 1))
    observations, actions = rng.normal(size=(frames, 5)), rng.normal(size=(frames, 2))
    rewards = rng.normal(size=len(frame)).astype(np.float32)
    return Arrays(observations.astype(np.float32), actions.astype(np.float32), frame, next_frame, masks), rewards


def expected(data: Arrays, rewards: np.ndarray, seed: int, step: int, size: int) -> dict[str, np.ndarray]:
    """One seed's batch, from the arrays."""
    draws = philox(seed, step // 64, Stream.BATCHES).integers(len(data.frame), size=(64, size))[step % 64]
    return {
        "observations": data.observations[data.frame[draws]],
        "actions": data.actions[data.frame[draws]],
        "rewards": rewards[draws],
        "masks": data.masks[draws],
        "next_observations": data.observations[data.next_frame[draws]],
    }


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return dict(batch)  # type: ignore[arg-type]


@given(step=st.integers(0, 300), seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_what_the_indices_say_whatever_was_drawn_before(step: int, seeds: list[int], size: int) -> None:
    data, rewards = arrays()
    batches = ResidentTransitions(data, rewards, seeds, size)
    for wanted in (step, 70, step):
        batch = batches(wanted)
        for number, seed in enumerate(seeds):
            for key, value in expected(data, rewards, seed, wanted, size).items():
                np.testing.assert_array_equal(batch[key][number].numpy(), value)


def test_the_table_is_one_contiguous_tensor_and_batches_are_float32() -> None:
    data, rewards = arrays()
    batches = ResidentTransitions(data, rewards, [0, 1], 8)
    assert batches._table.shape == (200, 5 + 2 + 2)
    assert batches._table.is_contiguous()
    batch = tensors(batches(0))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "observations": (2, 8, 5),
        "actions": (2, 8, 2),
        "rewards": (2, 8),
        "masks": (2, 8),
        "next_observations": (2, 8, 5),
    }
    assert {value.dtype for value in batch.values()} == {torch.float32}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_above_the_limit_the_same_batches_come_from_the_host(device: str) -> None:
    data, rewards = arrays()
    size = 200 * 9 * 4
    with transition_batches(data, rewards, [3, 4], 16, 100, device, limit=size) as inside:
        assert isinstance(inside, ResidentTransitions)
        with transition_batches(data, rewards, [3, 4], 16, 100, device, limit=size - 1) as beside:
            assert isinstance(beside, Prefetcher)
            for step in range(60, 70):
                for key, value in tensors(inside(step)).items():
                    assert beside(step)[key].device == value.device == torch.device(device)
                    if device == "cpu":
                        assert torch.equal(beside(step)[key], value)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_batches_of_the_cpu() -> None:
    data, rewards = arrays()
    here = ResidentTransitions(data, rewards, [0, 5], 16)
    for limit in (None, 0):
        with transition_batches(data, rewards, [0, 5], 16, 100, "cuda", limit) as there:
            for step in range(100):
                for key, value in tensors(there(step)).items():
                    assert torch.equal(value.cpu(), here(step)[key])


def test_two_transitions_of_one_frame_are_refused() -> None:
    data, rewards = arrays()
    data.frame[1] = data.frame[0]
    with pytest.raises(InputError, match="Frame 0 begins more than one transition"):
        ResidentTransitions(data, rewards, [0], 4)


def store_of(frames: np.ndarray, reads: list[int]) -> SimpleNamespace:
    """A store in memory that notes which rows are read at random."""

    def read_rows(name: str, rows: np.ndarray) -> np.ndarray:
        assert name == "observation/images/side"
        reads.extend(rows.tolist())
        return frames[rows]

    images = {"side": ArraySpec(frames.shape[1:], "uint8")}
    return SimpleNamespace(
        path="store",
        num_frames=len(frames),
        spec=SimpleNamespace(images=images),
        frames=lambda camera, start, stop: frames[start:stop],
        read_rows=read_rows,
    )


@pytest.mark.parametrize("kept", [0, 1, 300, 599, 600, 10_000])
def test_frames_are_the_same_whatever_the_limit_and_it_is_kept(kept: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (600, 4, 5, 3), dtype=np.uint8)
    reads: list[int] = []
    found = ResidentFrames(store_of(frames, reads), "side", limit=kept * 60 + 59)
    assert found._kept.nbytes == min(kept, 600) * 60
    assert (found.shape, found.ndim, found.dtype, len(found)) == (frames.shape, 4, frames.dtype, 600)
    rows = np.array([599, 0, 5, 599, 256, 255, 1, 300, 299])
    np.testing.assert_array_equal(found[rows], frames[rows])
    assert reads == [row for row in rows if row >= kept]  # what is kept is not read again
    np.testing.assert_array_equal(found[np.arange(600)], frames)


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"no camera 'sid'. Did you mean 'side'"):
        ResidentFrames(store_of(np.zeros((10, 4, 4, 3), np.uint8), []), "sid")
