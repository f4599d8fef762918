"""label_store: order, resuming to the same bytes, provenance, and refusals; then CLIP through the same path."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import InputError, LabelError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.vlm_rewards.label_store import label_clip, label_frames

LENGTHS = (7, 5, 11)
CAMERA = "side"


def make_store(path: Path, size: int = 8) -> EpisodeStore:
    """Action-free video of random pixels."""
    spec = DatasetSpec(
        observations={}, images={CAMERA: ArraySpec((size, size, 3), "uint8")}, action=None, control_dt=0.1
    )
    writer = StoreWriter(path, spec, {"config": {}, "inputs": {}})
    rng = np.random.default_rng(0)
    for index, length in enumerate(LENGTHS):
        before_last = np.arange(length) == length - 2
        episode = Episode(
            observations={},
            images={CAMERA: rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8)},
            action=None,
            step_valid=np.arange(length) < length - 1,
            terminated=np.zeros(length, bool),
            truncated=before_last,
            timestamp=np.arange(length) * 0.1,
        )
        writer.write_episode(index, episode)
    return writer.finish(len(LENGTHS))


class Brightness:
    """A labeller without weights; can be made to die, as a killed process does, or to go wrong."""

    def __init__(self, dies_at: int | None = None, poison: int | None = None) -> None:
        self.calls, self.dies_at, self.poison = 0, dies_at, poison

    def score(self, frames: np.ndarray) -> np.ndarray:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        scores = frames.mean((1, 2, 3)).astype(np.float32)
        if self.calls == self.poison:
            scores[2] = np.nan
        self.calls += 1
        return scores


def label(store: EpisodeStore, labeller: Brightness, block: int = 4, name: str = "bright"):
    return label_frames(store, name, CAMERA, labeller, "brightness", {"unit": "grey levels"}, block=block)


def array_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of the label set but zarr.json, which carries the date."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "zarr.json"]
    assert files
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("block", [1, 4, 23, 100])
def test_scores_stand_at_their_frames_for_any_block(tmp_path: Path, block: int) -> None:
    store = make_store(tmp_path / "s")
    written = label(store, Brightness(), block)
    np.testing.assert_array_equal(written.score, store.frames(CAMERA).mean((1, 2, 3)).astype(np.float32))
    assert written.alignment == "post"
    assert store.label_names() == ["bright"]


def test_interrupted_labelling_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = make_store(tmp_path / "whole"), make_store(tmp_path / "cut")
    label(whole, Brightness())
    with pytest.raises(KeyboardInterrupt):
        label(cut, Brightness(dies_at=3))
    assert cut.label_names() == []
    again = Brightness()
    label(cut, again)
    assert again.calls == 3  # blocks 3, 4 and 5 of 6
    first, second = (array_bytes(tmp_path / name / "labels" / "bright") for name in ("whole", "cut"))
    assert first == second


def test_progress_counts_what_was_done_before(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        label(store, Brightness(dies_at=3))
    calls: list[tuple[int, int, str]] = []
    label_frames(
        store, "bright", CAMERA, Brightness(), "brightness", {"unit": "grey levels"}, 4, lambda *c: calls.append(c)
    )
    assert [(done, total) for done, total, _ in calls] == [(16, 23), (20, 23), (23, 23)]


def test_provenance_says_what_made_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    record = label(store, Brightness()).provenance
    assert record["labeller"] == "brightness"
    assert record["config"] == {"unit": "grey levels", "camera": CAMERA}
    assert record["dataset_fingerprint"] == store.fingerprint
    assert record["code_version"]
    assert record["counts"] == {"frames": 23}


def test_refusals(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with pytest.raises(InputError, match=r"no camera 'wrist'.* Valid: side"):
        label_frames(store, "x", "wrist", Brightness(), "brightness", {})
    with pytest.raises(LabelError, match="at least 1 frame"):
        label(store, Brightness(), block=0)
    label(store, Brightness())
    with pytest.raises(LabelError, match="already"):
        label(store, Brightness())
    with pytest.raises(LabelError, match="frame 6 is nan"):
        label(store, Brightness(poison=1), name="bad")
    assert store.label_names() == ["bright"]


# CLIP


@pytest.fixture
def clip_folder(tmp_path: Path) -> str:
    pytest.importorskip("open_clip")
    from embodied.vlm_rewards.train_clip import SmallClipConfig, build_model, write_folder

    torch.set_num_threads(1)
    config = SmallClipConfig(embedding_dim=16, image_width=8, text_width=8, text_layers=1, text_heads=2)
    write_folder(build_model(config, 32, seed=0), config.open_clip_config(32), {}, tmp_path / "clip")
    return str(tmp_path / "clip")


def test_label_clip_writes_what_the_labeller_scores(tmp_path: Path, clip_folder: str) -> None:
    from embodied.vlm_rewards.clip_encoder import ClipEncoder
    from embodied.vlm_rewards.clip_reward import PromptReward

    store = make_store(tmp_path / "s", size=40)
    written = label_clip(store, "clip", CAMERA, ["it is up"], ["it is down"], 0.5, model=clip_folder)
    encoder = ClipEncoder(clip_folder)
    reward = PromptReward(encoder, ["it is up"], ["it is down"], 0.5)
    np.testing.assert_array_equal(written.score, reward.of(encoder.embed(store.frames(CAMERA))))
    assert np.ptp(written.score) > 0
    settings = written.provenance["config"]
    assert settings["goals"] == ["it is up"]
    assert settings["baselines"] == ["it is down"]
    assert settings["regularization"] == 0.5
    assert settings["camera"] == CAMERA
    assert settings["weights_hash"] == encoder.identity["weights_hash"]
    assert settings["preprocess"]["size"] == 32


def test_label_clip_refuses_an_unknown_camera_before_loading_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="no camera 'front'"):
            label_clip(make_store(tmp_path / "s"), "clip", "front", ["up"], model="/no/such/model")


def test_another_configuration_does_not_resume_a_labelling(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        label(store, Brightness(dies_at=2))
    with pytest.raises(LabelError, match="another configuration"):
        label_frames(store, "bright", CAMERA, Brightness(), "brightness", {"unit": "per cent"}, block=4)
