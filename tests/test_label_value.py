"""`label value`: the value function's own numbers at their frames, as a score and as a potential."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.cli import main
from embodied.contracts.errors import InputError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.policies.bundle import ValueBundle, load_value, save_value
from embodied.policies.networks import EncoderConfig, ImageEncoder, MultilinearValue, generators
from embodied.vlm_rewards.goal_frames import goal_frames

torch.set_num_threads(1)
LENGTHS, DISCOUNT = (300, 4, 7), 0.9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "s"
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((16, 16, 3), "uint8")}, None), {})
    for index, length in enumerate(LENGTHS):
        frames = rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
        no = np.zeros(length, bool)
        success = index != 1
        episode = Episode({}, {"side": frames}, None, no, no, no, np.arange(length) * 0.1, success=success)
        writer.write_episode(index, episode)
    return writer.finish(len(LENGTHS))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = ImageEncoder(EncoderConfig((16, 16), (4, 8), 8), generators([1])[0])
    heads = MultilinearValue(generators([2])[0], 8, (16, 16))
    folder = tmp_path_factory.mktemp("bundle") / "value"
    return save_value(folder, heads, encoder, {"camera": "side"}, {"discount": DISCOUNT}, {})


def value_of(bundle: ValueBundle, frames: np.ndarray, goals: np.ndarray) -> np.ndarray:
    states = bundle.encode(frames)
    return np.mean([bundle.value(states, np.repeat(g[None], len(states), 0)) for g in bundle.encode(goals)], axis=0)


def test_value_is_the_mean_over_the_ends_of_the_successes(store: EpisodeStore, bundle: Path, capsys: Any) -> None:
    assert main(["label", "value", store.path, "--name", "v", "--bundle", str(bundle)]) == 0
    label = EpisodeStore(store.path).label("v")
    frames = store.frames("side")
    expected = value_of(load_value(bundle), frames, frames[[299, 310]])
    np.testing.assert_allclose(label.score, expected, rtol=1e-4, atol=1e-4)
    assert label.provenance["config"]["goals"] == ["episode 0 frame 299", "episode 2 frame 6"]
    assert label.provenance["inputs"]["bundle"] == load_value(bundle).fingerprint


def test_potential_telescopes_and_starts_at_zero(store: EpisodeStore, bundle: Path, capsys: Any) -> None:
    """Discounted and summed, the shaping of an episode is discount^n V(last) - V(first), also across blocks."""
    command = ["label", "value", store.path, "--name", "p", "--bundle", str(bundle), "--form", "potential"]
    assert main([*command, "--goals", "1:2"]) == 0
    score = EpisodeStore(store.path).label("p").score.astype(np.float64)
    frames = store.frames("side")
    values = value_of(load_value(bundle), frames, frames[[302]]).astype(np.float64)
    for start, length in zip(store.episode_start, store.episode_length, strict=True):
        assert score[start] == 0.0
        steps = np.arange(length - 1)
        shaped = (DISCOUNT**steps * score[start + 1 : start + length]).sum()
        ends = DISCOUNT ** (length - 1) * values[start + length - 1] - values[start]
        assert shaped == pytest.approx(ends, rel=1e-3, abs=1e-3)


def test_goal_pictures(store: EpisodeStore, tmp_path: Path) -> None:
    from PIL import Image

    frames = store.frames("side")
    Image.fromarray(frames[5]).save(tmp_path / "goal.png")
    pictures, said = goal_frames(store, "side", ["0:3", "1", str(tmp_path / "goal.png")])
    np.testing.assert_array_equal(pictures, frames[[3, 303, 5]])
    assert said == ["episode 0 frame 3", "episode 1 frame 3", "goal.png"]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for goal, message in [
        ("7", "no pictures of camera 'side' in episode 7"),
        ("1:4", "episode 1 has frames 0 to 3"),
        ("x", "neither EPISODE"),
        (str(tmp_path / "bad.png"), "cannot be read as a picture"),
    ]:
        with pytest.raises(InputError, match=message):
            goal_frames(store, "side", [goal])


def test_a_camera_that_episodes_lack_is_refused(tmp_path: Path, store: EpisodeStore, bundle: Path, capsys: Any) -> None:
    """Its frames are black there, and a value of black means nothing."""
    writer = StoreWriter(tmp_path / "s", store.spec, {})
    writer.write_episode(0, store.episode(0))
    writer.write_episode(1, dataclasses.replace(store.episode(1), images={}))
    writer.finish(2)
    assert main(["label", "value", str(tmp_path / "s"), "--name", "v", "--bundle", str(bundle)]) == 2
    assert "1 of 2 episodes have no pictures of 'side'" in capsys.readouterr().err


def test_no_success_and_no_goal_says_what_to_name(tmp_path: Path, store: EpisodeStore) -> None:
    writer = StoreWriter(tmp_path / "s", store.spec, {})
    writer.write_episode(0, store.episode(1))
    with pytest.raises(InputError, match=r"Name goal pictures: --goals"):
        goal_frames(writer.finish(1), "side")
