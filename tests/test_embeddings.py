"""Stored embeddings: made once, the same bytes however they are made, honest about frames that cannot be read."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

from embodied.contracts.errors import ConfigError, InputError, LabelError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.vlm_rewards import embeddings
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.clip_reward import PromptReward
from embodied.vlm_rewards.embeddings import frame_embeddings
from embodied.vlm_rewards.label_store import label_clip
from embodied.vlm_rewards.train_clip import SmallClipConfig, build_model, write_folder

torch.set_num_threads(1)
LENGTHS, BLOCK = (70, 5, 41), 32
FRAMES = sum(LENGTHS)


def make_store(path: Path, without: int | None = None) -> EpisodeStore:
    """Action-free video of random pixels; the episode `without` has no pictures."""
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((40, 40, 3), "uint8")}, None), {})
    rng = np.random.default_rng(0)
    for index, length in enumerate(LENGTHS):
        no = np.zeros(length, bool)
        frames = rng.integers(0, 256, (length, 40, 40, 3), dtype=np.uint8)
        images: dict[str, Any] = {} if index == without else {"side": frames}
        writer.write_episode(index, Episode({}, images, None, no, no, no, np.arange(length) * 0.1))
    return writer.finish(len(LENGTHS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = SmallClipConfig(embedding_dim=16, image_width=8, text_width=8, text_layers=1, text_heads=2)
    path = tmp_path_factory.mktemp("clip") / "tiny"
    write_folder(build_model(config, 32, seed=0), config.open_clip_config(32), {}, path)
    return str(path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", BLOCK)


def arrays(store: EpisodeStore, kind: str) -> dict[str, bytes]:
    """Every file of the sets of a kind but zarr.json, which carries the date."""
    folder = Path(store.path) / kind
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "zarr.json"]
    assert files
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_second_prompt_never_runs_the_encoder(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s")
    label_clip(store, "first", "side", ["it is up"], model=folder)
    monkeypatch.setattr(ClipEncoder, "encode", lambda self, pixels: pytest.fail("the encoder ran again"))
    second = label_clip(store, "second", "side", ["it is down"], ["it is up"], 0.5, model=folder)
    monkeypatch.undo()
    encoder = ClipEncoder(folder)
    reward = PromptReward(encoder, ["it is down"], ["it is up"], 0.5)
    np.testing.assert_array_equal(second.score, reward.of(encoder.embed(store.frames("side"))))
    assert len(store.group_names("embeddings")) == 1
    assert second.provenance["config"]["embeddings"] == store.group_names("embeddings")[0]


def test_another_precision_or_camera_is_another_set(tmp_path: Path, folder: str) -> None:
    store = make_store(tmp_path / "s")
    label_clip(store, "a", "side", ["up"], model=folder)
    label_clip(store, "b", "side", ["up"], model=folder, precision="bf16")
    assert len(store.group_names("embeddings")) == 2


def test_workers_and_interruptions_give_the_same_bytes(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_store(tmp_path / "whole")
    label_clip(whole, "clip", "side", ["up"], ["down"], 0.5, model=folder)
    shared = make_store(tmp_path / "shared")
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "BLOCK", 256)  # a worker process does not see the test's smaller blocks
        label_clip(shared, "clip", "side", ["up"], ["down"], 0.5, model=folder, workers=2)
    assert arrays(shared, "embeddings") == arrays(whole, "embeddings")
    assert arrays(shared, "labels") == arrays(whole, "labels")
    broken = make_store(tmp_path / "broken")
    encoded, real = [0], ClipEncoder.encode

    def dies(self: ClipEncoder, pixels: torch.Tensor, after: int) -> np.ndarray:
        if encoded[0] >= after:
            raise KeyboardInterrupt
        encoded[0] += len(pixels)
        return real(self, pixels)

    for after in (40, 90):
        with monkeypatch.context() as patch:
            patch.setattr(ClipEncoder, "encode", lambda self, pixels, after=after: dies(self, pixels, after))
            with pytest.raises(KeyboardInterrupt):
                label_clip(broken, "clip", "side", ["up"], ["down"], 0.5, model=folder)
        assert broken.label_names() == []
    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "encode", lambda self, pixels: dies(self, pixels, 10_000))
        label_clip(broken, "clip", "side", ["up"], ["down"], 0.5, model=folder)
    assert arrays(broken, "embeddings") == arrays(whole, "embeddings")
    assert arrays(broken, "labels") == arrays(whole, "labels")
    assert encoded[0] <= FRAMES + 2 * BLOCK  # a block in flight per interruption, no frame more


def test_frames_that_cannot_be_read_are_counted_and_listed(tmp_path: Path, folder: str) -> None:
    store = make_store(tmp_path / "s")
    expected = label_clip(make_store(tmp_path / "whole"), "clip", "side", ["up"], model=folder).score
    shard = next(file for file in (tmp_path / "s" / "observation/images/side/c").rglob("*") if file.is_file())
    data = bytearray(shard.read_bytes())
    array = store.array("observation/images/side")
    assert array.shards is not None
    chunks = array.shards[0] // array.chunks[0]
    index = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8").reshape(chunks, 2)  # a shard ends with offsets and sizes
    at = int(index[5, 0])
    data[at : at + 16] = b"\xff" * 16  # the head of one compressed chunk
    shard.write_bytes(data)
    label = label_clip(EpisodeStore(store.path), "clip", "side", ["up"], model=folder)
    counts = label.provenance["counts"]
    assert counts["failures"] == len(counts["failed_frames"]) == array.chunks[0]
    bad = counts["failed_frames"]
    assert np.isfinite(label.score).all()
    good = np.setdiff1d(np.arange(FRAMES), bad)
    np.testing.assert_allclose(label.score[good], expected[good], atol=1e-6)
    assert np.flatnonzero(label.channels["confidence"] == 0).tolist() == bad
    assert label.score[bad[0]] == label.score[bad[0] - 1]  # the nearest frame that could be seen


def test_a_camera_that_episodes_lack_says_how_to_leave_them_out(tmp_path: Path, folder: str) -> None:
    store = make_store(tmp_path / "s", without=1)
    with pytest.raises(InputError, match=r"1 of 3 episodes have no pictures of 'side', first episode 1") as caught:
        label_clip(store, "clip", "side", ["up"], model=folder)
    assert "has_camera('side')" in str(caught.value)
    assert not (tmp_path / "s.embeddings-partial").exists()


def test_refusals(tmp_path: Path, folder: str) -> None:
    store = make_store(tmp_path / "s")
    with pytest.raises(ConfigError, match="workers is 0"):
        label_clip(store, "clip", "side", ["up"], model=folder, workers=0)
    label_clip(store, "clip", "side", ["up"], model=folder)
    with pytest.raises(LabelError, match="already"):
        label_clip(store, "clip", "side", ["down"], model=folder)
    encoder = ClipEncoder(folder)
    vectors, valid = frame_embeddings(store, "side", encoder, {})
    assert vectors.shape == (FRAMES, 16)
    assert valid.all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_ranks_of_a_torchrun_share_the_frames_and_one_writes(tmp_path: Path, folder: str) -> None:
    for name in ("alone", "shared"):
        make_store(tmp_path / name)
    command = ["-m", "embodied.cli", "label", "clip", "STORE", "--name", "clip", "--goal", "up", "--model", folder]
    command += ["--regularization", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (
        ("alone", []),
        ("shared", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]),
    ):
        words = [str(tmp_path / name) if word == "STORE" else word for word in command]
        program = [sys.executable, *start, *([sys.executable] if start else []), *words]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-2000:]
    alone, shared = EpisodeStore(tmp_path / "alone"), EpisodeStore(tmp_path / "shared")
    assert arrays(shared, "embeddings") == arrays(alone, "embeddings")
    assert arrays(shared, "labels") == arrays(alone, "labels")
    assert not list(tmp_path.glob("*partial*"))
