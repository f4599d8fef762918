"""Pre-training on several stores: read as one, block by block."""

from pathlib import Path

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.goals import GoalSampler
from embodied.datasets.resident import frame_array
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.pretrain import JoinedStores


def make_store(path: Path, lengths: list[int], size: int = 8, first: int = 0) -> EpisodeStore:
    """Action-free video; frame number n of the store is a picture of the one value `first` + n."""
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((size, size, 3), "uint8")}, None), {})
    for index, length in enumerate(lengths):
        value = first + sum(lengths[:index]) + np.arange(length, dtype=np.uint8)
        frames = np.broadcast_to(value[:, None, None, None], (length, size, size, 3)).copy()
        no = np.zeros(length, bool)
        writer.write_episode(index, Episode({}, {"side": frames}, None, no, no, no, np.arange(length) * 0.1))
    return writer.finish(len(lengths))


def test_frames_and_episodes_of_several_stores_lie_end_to_end(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", [4, 3]), make_store(tmp_path / "b", [5], first=7)]
    joined = JoinedStores(stores, "side")
    assert joined.episode_start.tolist() == [0, 4, 7]
    assert joined.episode_length.tolist() == [4, 3, 5]
    for start in range(12):
        for stop in range(start + 1, 13):
            assert joined.frames("side", start, stop)[:, 0, 0, 0].tolist() == list(range(start, stop))
    large = frame_array(joined, "side", tmp_path / "cache", limit=100)  # more than the limit: kept in a file
    assert isinstance(large, np.memmap)
    assert large[:, 3, 3, 1].tolist() == list(range(12))
    batch = GoalSampler(joined).sample(0, 500)
    assert not {3, 6, 11} & set(batch["frame"].tolist())  # the last frames of their episodes


def test_stores_that_cannot_be_joined_are_refused(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", [2]), make_store(tmp_path / "b", [2], size=16)]
    with pytest.raises(InputError, match=r"b: pictures of 'side' are \(16, 16, 3\); those of .*a \(8, 8, 3\)"):
        JoinedStores(stores, "side")
    with pytest.raises(InputError, match=r"no camera 'wrist'.*side"):
        JoinedStores(stores, "wrist")
