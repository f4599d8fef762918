"""Pre-training on several stores: read as one, block by block."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags
from embodied.datasets.goals import GoalSampler
from embodied.datasets.resident import ResidentFrames
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.policies.bundle import load_value, save_value
from embodied.policies.networks import EncoderConfig, ImageEncoder, MultilinearValue, generators
from embodied.pretrain import JoinedStores, Pretrain, pretrain
from embodied.progress import Progress
from embodied.train import learning_data


def make_store(
    path: Path, lengths: list[int], size: int = 8, first: int = 0, unseen: Sequence[int] = ()
) -> EpisodeStore:
    """Action-free video; frame n of the store is a picture of the one value `first` + n. No camera in `unseen`."""
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((size, size, 3), "uint8")}, None), {})
    for index, length in enumerate(lengths):
        value = first + sum(lengths[:index]) + np.arange(length, dtype=np.uint8)
        frames = np.broadcast_to(value[:, None, None, None], (length, size, size, 3)).copy()
        no = np.zeros(length, bool)
        seen = index not in unseen
        episode = Episode({}, {"side": frames} if seen else {}, None, no, no, no, np.arange(length) * 0.1)
        writer.write_episode(index, episode)
    return writer.finish(len(lengths))


def test_frames_and_episodes_of_several_stores_lie_end_to_end(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", [4, 3]), make_store(tmp_path / "b", [5], first=7)]
    joined = JoinedStores(stores, "side")
    assert joined.episode_start.tolist() == [0, 4, 7]
    assert joined.episode_length.tolist() == [4, 3, 5]
    for start in range(12):
        for stop in range(start + 1, 13):
            assert joined.frames("side", start, stop)[:, 0, 0, 0].tolist() == list(range(start, stop))
    for kept in (0, 5, 12):
        cache = ResidentFrames(joined, "side", limit=kept * 8 * 8 * 3)
        rows = np.array([11, 0, 7, 6, 3, 7])
        assert cache[rows][:, 3, 3, 1].tolist() == rows.tolist()
    batch = GoalSampler(joined).sample(0, 500)
    assert not {3, 6, 11} & set(batch["frame"].tolist())  # the last frames of their episodes


def test_stores_that_cannot_be_joined_are_refused(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", [2]), make_store(tmp_path / "b", [2], size=16)]
    with pytest.raises(InputError, match=r"b: pictures of 'side' are \(16, 16, 3\); those of .*a \(8, 8, 3\)"):
        JoinedStores(stores, "side")
    with pytest.raises(InputError, match=r"no camera 'wrist'.*side"):
        JoinedStores(stores, "wrist")


def test_episodes_without_the_camera_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    make_store(tmp_path / "a", [4, 9], size=16, unseen=[1])
    make_store(tmp_path / "b", [5], size=16, first=7)
    joined = JoinedStores([EpisodeStore(tmp_path / "a"), EpisodeStore(tmp_path / "b")], "side")
    assert joined.has_pictures.tolist() == [True, False, True]
    said = StringIO()
    settings = {"batch_size": 8, "hidden_sizes": "8"}
    config = Pretrain((tmp_path / "a", tmp_path / "b"), tmp_path / "out", "side", 2, settings=settings)
    result = pretrain(config, Progress(said))
    assert "1 episodes have no pictures of 'side' and are left out" in said.getvalue()
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    with safe_open(checkpoint, framework="np") as file:
        drawn = json.loads(file.metadata()["embodied"])["identity"]["first_batch"]
    assert {row for rows in drawn.values() for row in rows} <= {0, 1, 2, 3, 13, 14, 15, 16, 17}
    assert result["frames"] == 18
    value = load_value(Path(result["bundle"]))
    assert value.contract["camera"] == "side"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bundle", "checkpoint.safetensors", "metrics.jsonl"]


def test_a_policy_with_an_encoder_learns_from_episodes_that_have_the_camera(tmp_path: Path) -> None:
    spec = DatasetSpec({"a": ArraySpec((1,))}, {"side": ArraySpec((16, 16, 3), "uint8")}, ActionSpec((1,)))
    writer = StoreWriter(tmp_path / "s", spec, {})
    step_valid, terminated, truncated = end_flags(3, 4, False)
    for index in range(3):
        pictures = np.full((4, 16, 16, 3), 50 * index, np.uint8)
        writer.write_episode(
            index,
            Episode(
                {"a": np.full((4, 1), 10.0 * index, np.float32)},
                {} if index == 1 else {"side": pictures},
                np.zeros((4, 1), np.float32),
                step_valid,
                terminated,
                truncated,
                np.arange(4) * 0.1,
            ),
        )
    store = writer.finish(3)
    encoder = ImageEncoder(EncoderConfig((16, 16), (4, 8), 8), generators([1])[0])
    heads = MultilinearValue(generators([2])[0], 8, (16, 16))
    value = load_value(save_value(tmp_path / "value", heads, encoder, {"camera": "side"}, {}, {}))
    said = StringIO()
    data, contract = learning_data(store, (), None, value, Progress(said))
    assert data.frame.tolist() == [0, 1, 2, 8, 9, 10]
    assert "1 episodes have no pictures of 'side'" in said.getvalue()
    assert contract.normalizer["a"]["mean"].tolist() == [10.0]  # of 0 and 20: the episode without pictures not counted
    assert contract.normalizer["a"]["std"].tolist() == [10.0]
