"""`pretrain clip`: captions from three sources, whole episodes held out, pictures streamed, open_clip's own format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.cli import _split_verb, main
from embodied.contracts.errors import ConfigError, EmbodiedError, InputError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.pretrain_clip import Captioned, PretrainClip, _evenly, _from_file, _from_simulator, pretrain_clip
from embodied.progress import Progress
from embodied.vlm_rewards.caption_pairs import CaptionedFrames, index_captions, retrieval, squashed
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.label_store import label_clip
from embodied.vlm_rewards.train_clip import SmallClipConfig, build_model, train_small_clip, write_folder

open_clip = pytest.importorskip("open_clip")
torch.set_num_threads(1)
LENGTHS = (9, 7, 8, 6, 9, 8, 7, 6)
SAID = ("the lamp is red", "the lamp is blue")
TINY: dict[str, Any] = {"embedding_dim": 16, "image_width": 8, "text_width": 16, "text_layers": 1, "text_heads": 2}
SETTINGS = {**TINY, "learning_rate": 3e-3}


def make_store(path: Path, size: int = 32, instructions: tuple[str, ...] = SAID, without: int | None = None) -> Any:
    """Red pictures in even episodes, blue ones in odd, with noise; the episode `without` has no pictures."""
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((size, size, 3), "uint8")}, None), {})
    rng = np.random.default_rng(0)
    for index, length in enumerate(LENGTHS):
        frames = rng.integers(0, 60, (length, size, size, 3)).astype(np.uint8)
        frames[..., 0 if index % 2 == 0 else 2] += 150
        no = np.zeros(length, bool)
        images: dict[str, Any] = {} if index == without else {"side": frames}
        said = instructions[index % len(instructions)]
        writer.write_episode(index, Episode({}, images, None, no, no, no, np.arange(length) * 0.1, instruction=said))
    return writer.finish(len(LENGTHS))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return make_store(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny model, with a text table that knows every word."""
    config = SmallClipConfig(**TINY)
    path = tmp_path_factory.mktemp("clip") / "tiny"
    write_folder(build_model(config, 32, seed=0), config.open_clip_config(32), {}, path)
    return path


def train(store: EpisodeStore, out: Path, captions: str = "instruction", **changes: Any) -> dict[str, Any]:
    values = {"steps": 40, "batch": 16, "holdout": 0.25, "image_size": 32, "settings": SETTINGS} | changes
    return pretrain_clip(PretrainClip((Path(store.path),), captions, out, **values), Progress())


# The verb's name


def test_the_two_word_verb_is_preferred_and_the_one_word_verb_remains() -> None:
    assert _split_verb(["pretrain", "clip", "s", "--out", "o"]) == ("pretrain clip", ["s", "--out", "o"])
    assert _split_verb(["pretrain", "s", "--out", "o"]) == ("pretrain", ["s", "--out", "o"])
    assert _split_verb(["pretrain", "./clip"]) == ("pretrain", ["./clip"])
    assert _split_verb(["pretrain", "--help"]) == ("pretrain", ["--help"])
    assert _split_verb(["data", "imprt"]) == ("data imprt", [])
    assert _split_verb(["data"]) == ("data", [])
    assert _split_verb(["info"]) == ("info", [])


def test_pretrain_of_a_store_still_runs_icvf(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "/nowhere/store", "--out", "/nowhere/o"]) == 2
    assert "/nowhere/store does not exist" in capsys.readouterr().err


# Retrieval


def test_retrieval_by_hand() -> None:
    """Pictures at angles 0, 10, 80, 90 degrees, sentences at 0 and 90; the second is said to be of the other."""
    captions = index_captions(["a", "b", "b", ["b", "a"]], None)
    frames = np.array([0, 10, 80, 90], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    pairs = CaptionedFrames(lambda numbers: frames[numbers], captions, None, np.array([0, 0, 0, 1]))

    def at(angles: Any) -> torch.Tensor:
        radians = np.deg2rad(np.asarray(angles, np.float64))
        return torch.from_numpy(np.stack([np.cos(radians), np.sin(radians)], 1))

    found = retrieval(lambda batch: at(batch[:, 0, 0, 0]), lambda said: at([0, 90]), pairs)
    assert (found["images"], found["episodes"], found["sentences"]) == (4, 2, 2)
    assert found["image_to_text"]["mean"] == pytest.approx((2 / 3 + 1) / 2)  # right: 0, 80 of three; and 90
    assert found["image_to_text"]["chance"] == pytest.approx(5 / 8)
    assert found["text_to_image"] == {"mean": 1.0, "chance": pytest.approx(5 / 8)}  # 'a' finds 0, 'b' finds 90
    swapped = retrieval(lambda batch: at(batch[:, 0, 0, 0]), lambda said: at([90, 0]), pairs)
    assert swapped["text_to_image"]["mean"] == 0.5  # 'a' finds 90, which it fits; 'b' finds 0


# From scratch


def test_instructions_teach_a_small_model_what_held_out_episodes_show(store: EpisodeStore, tmp_path: Path) -> None:
    result = train(store, tmp_path / "m", steps=120)
    after = result["retrieval"]["after"]
    assert after["image_to_text"]["mean"] == 1.0
    assert after["text_to_image"]["mean"] == 1.0
    assert result["retrieval"]["before"]["image_to_text"]["mean"] < 1.0
    assert after["image_to_text"]["chance"] == 0.5
    assert result["episodes"] == {"train": 6, "held_out": 2}
    record = json.loads((tmp_path / "m" / "provenance.json").read_text())
    (split,) = record["trained_on"]["stores"]
    assert split["fingerprint"] == store.fingerprint
    assert sorted(split["train"] + split["held_out"]) == list(range(8))
    assert record["retrieval"] == result["retrieval"]
    assert record["captions"] == sorted(SAID)
    assert result["frames"] == sum(LENGTHS[e] for e in split["train"])
    label = label_clip(store, "red", "side", [SAID[0]], model=str(tmp_path / "m"))
    red = np.repeat(np.arange(8) % 2 == 0, LENGTHS)
    assert label.score[red].min() > label.score[~red].max()


def test_streamed_training_has_the_bytes_of_training_from_memory(store: EpisodeStore, tmp_path: Path) -> None:
    train(store, tmp_path / "streamed", steps=4, holdout=0.0, seed=3)
    captions = [SAID[e % 2] for e in np.repeat(np.arange(8), LENGTHS)]
    train_small_clip(store.frames("side"), captions, tmp_path / "memory", 4, 16, 3, None, SmallClipConfig(**SETTINGS))
    files = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("streamed", "memory")]
    assert files[0] == files[1]


def test_pictures_are_read_a_batch_at_a_time(
    store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, read_rows, frames = [], EpisodeStore.read_rows, EpisodeStore.frames
    monkeypatch.setattr(
        EpisodeStore, "read_rows", lambda self, name, rows: sizes.append(len(rows)) or read_rows(self, name, rows)
    )
    monkeypatch.setattr(
        EpisodeStore, "frames", lambda self, c, a=0, b=None: frames(self, c, a, b) if b == 0 else pytest.fail("all")
    )
    train(store, tmp_path / "m", steps=3, batch=10)
    assert sum(sizes) >= 30
    assert max(sizes) <= 18  # retrieval looks at all frames of the two held-out episodes, training at 10


def test_pictures_of_another_size_are_brought_to_the_models(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", size=48)
    result = train(store, tmp_path / "m", steps=2)
    assert ClipEncoder(str(tmp_path / "m")).identity["preprocess"]["size"] in (32, [32, 32])
    assert result["retrieval"]["after"]
    flat = squashed(lambda numbers: np.full((len(numbers), 48, 60, 3), 77, np.uint8), 32)(np.arange(2))
    assert flat.shape == (2, 32, 32, 3)
    assert (flat == 77).all()


def test_episodes_without_pictures_are_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", without=2)
    train(store, tmp_path / "m", steps=1)
    (split,) = json.loads((tmp_path / "m" / "provenance.json").read_text())["trained_on"]["stores"]
    assert sorted(split["train"] + split["held_out"]) == [0, 1, 3, 4, 5, 6, 7]


# Sources of captions


def test_captions_of_a_file_stand_at_their_frames(store: EpisodeStore, tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("episode,start,stop,caption\n1,5,7,late\n0,0,2,early\n1,6,7,last\n0,1,2,early\n")
    found = _from_file(PretrainClip((), str(path), tmp_path), [store])
    assert found.rows.tolist() == [0, 1, 14, 15]
    assert found.episode.tolist() == [0, 0, 1, 1]
    assert found.captions == [("early",), ("early",), ("late",), ("late", "last")]
    for text, message in [
        ("8,0,1,x", "episodes 0 to 7"),
        ("0,3,3,x", "do not lie in episode 0, which has 9"),
        ("0,8,10,x", "'stop' is the frame after the last"),
        ("0,0,1,", "'caption' is ''"),
    ]:
        path.write_text(f"episode,start,stop,caption\n{text}\n")
        with pytest.raises(InputError, match=message):
            _from_file(PretrainClip((), str(path), tmp_path), [store])
    with pytest.raises(InputError, match="numbers the episodes of one store"):
        _from_file(PretrainClip((), str(path), tmp_path), [store, store])
    with pytest.raises(InputError, match="takes instruction, simulator or a file"):
        train(store, tmp_path / "m", "instructions")


def test_simulator_captions_have_grades_and_come_evenly(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    from embodied.sim.captions import NUM_STAGES, wordings
    from embodied.sim.robosuite_lift import TABLE_HEIGHT

    spec = DatasetSpec(
        {"cube_position": ArraySpec((3,)), "eef_position": ArraySpec((3,)), "cube_grasped": ArraySpec((1,))},
        {"side": ArraySpec((32, 32, 3), "uint8")},
        None,
        environment="robosuite/Lift",
    )
    writer = StoreWriter(tmp_path / "s", spec, {})
    distance = np.array([0.5, 0.5, 0.5, 0.02, 0.0])
    cube = np.tile([0.0, 0.0, TABLE_HEIGHT + 0.021], (5, 1))
    cube[4, 2] += 0.2
    observations = {
        "cube_position": cube,
        "eef_position": cube + np.stack([distance, 0 * distance, 0 * distance], 1),
        "cube_grasped": np.array([[0], [0], [0], [0], [1]]),
    }
    observations = {key: value.astype(np.float32) for key, value in observations.items()}
    no = np.zeros(5, bool)
    images: dict[str, Any] = {"side": np.zeros((5, 32, 32, 3), np.uint8)}
    writer.write_episode(0, Episode(observations, images, None, no, no, no, np.arange(5) * 0.1))
    store = writer.finish(1)
    found = _from_simulator(PretrainClip((), "simulator", tmp_path), [store])
    assert found.grades is not None
    np.testing.assert_allclose(found.grades, [0, 0, 0, 5 / (NUM_STAGES - 1), 1])
    assert found.captions == [wordings(0)] * 3 + [wordings(5), wordings(NUM_STAGES - 1)]
    many = found.take(np.tile(np.arange(5), 600))
    share = np.bincount((many.take(_evenly(many, np.arange(3000), 0)).grades * 9).round().astype(int))  # type: ignore[operator]
    assert share[[0, 5, 9]].sum() == 3000
    np.testing.assert_allclose(share[[0, 5, 9]] / 3000, 1 / 3, atol=0.04)
    with pytest.raises(InputError, match="robosuite/Lift only"):
        _from_simulator(PretrainClip((), "simulator", tmp_path), [make_store(tmp_path / "other")])


def test_taking_frames_keeps_what_belongs_together() -> None:
    whole = Captioned(np.array([5, 6, 7]), np.array([0, 0, 1]), [("a",), ("b",), ("c",)], np.array([0, 0.5, 1]))
    part = whole.take(np.array([2, 0, 2]))
    assert part.rows.tolist() == [7, 5, 7]
    assert part.episode.tolist() == [1, 0, 1]
    assert part.captions == [("c",), ("a",), ("c",)]
    assert part.grades is not None
    assert part.grades.tolist() == [1, 0, 1]


# Fine-tuning


def test_fine_tuning_keeps_architecture_and_transform_and_learns(
    store: EpisodeStore, folder: Path, tmp_path: Path
) -> None:
    settings = {"learning_rate": 2e-3, "warmup": 0.05}
    result = train(store, tmp_path / "m", model=str(folder), steps=60, settings=settings)
    assert result["retrieval"]["after"]["image_to_text"]["mean"] == 1.0
    assert result["loss"]["last"] < result["loss"]["first"]
    before, after = ClipEncoder(str(folder)), ClipEncoder(str(tmp_path / "m"))
    assert after.identity["weights_hash"] != before.identity["weights_hash"]
    configs = [json.loads((path / "open_clip_config.json").read_text()) for path in (folder, tmp_path / "m")]
    assert configs[0]["model_cfg"] == configs[1]["model_cfg"]
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert configs[0]["preprocess_cfg"][key] == configs[1]["preprocess_cfg"][key]
    record = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert record["inputs"]["weights"] == before.identity["weights_hash"]
    assert record["config"]["model"] == str(folder)
    # The folder holds what was judged: the same frames find the same sentences again.
    frames, red = store.frames("side"), np.repeat(np.arange(8) % 2 == 0, LENGTHS)
    held = np.isin(np.repeat(np.arange(8), LENGTHS), record["trained_on"]["stores"][0]["held_out"])
    cosine = after.embed(frames[held]) @ after.embed_text(SAID).T
    assert ((cosine[:, 0] > cosine[:, 1]) == red[held]).all()


def test_small_steps_survive_saving(store: EpisodeStore, folder: Path, tmp_path: Path) -> None:
    """Float16 would round steps of 1e-7 away."""
    from safetensors.torch import load_file

    train(store, tmp_path / "m", model=str(folder), steps=2, settings={"learning_rate": 1e-7, "weight_decay": 0.0})
    old, new = (load_file(path / "open_clip_model.safetensors") for path in (folder, tmp_path / "m"))
    moved = [(old[k].float() - new[k].float()).abs().max().item() for k in old if new[k].ndim >= 2]
    assert 0 < max(moved) < 1e-6
    assert all(tensor.dtype != torch.float16 for tensor in new.values())


def test_a_named_model_with_a_weights_file(store: EpisodeStore, folder: Path, tmp_path: Path) -> None:
    opened = json.loads((folder / "open_clip_config.json").read_text())
    (tmp_path / "tiny-named.json").write_text(json.dumps(opened["model_cfg"]))
    open_clip.add_model_config(tmp_path / "tiny-named.json")
    weights = str(folder / "open_clip_model.safetensors")
    train(store, tmp_path / "m", model="tiny-named", pretrained=weights, steps=1, settings={})
    found = json.loads((tmp_path / "m" / "open_clip_config.json").read_text())
    assert found["model_cfg"]["vision_cfg"] == opened["model_cfg"]["vision_cfg"]
    assert found["preprocess_cfg"]["resize_mode"] == "shortest", "the named model's own, not the folder's"
    assert np.isfinite(ClipEncoder(str(tmp_path / "m")).embed(store.frames("side", 0, 2))).all()


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "trained from scratch on the CPU"),
        ({"holdout": 1.0}, "must lie in"),
        ({"batch": 1}, "batch at least 2"),
        ({"settings": {"learning_rte": 1.0}}, "Did you mean 'learning_rate'"),
        ({"image_size": 40}, "multiple of 32"),
        ({"camera": "front"}, "no camera 'front'"),
        ({"model": "VIT-B32", "settings": {}}, "Similar names"),
        ({"captions": "simulator"}, "robosuite/Lift only"),
    ],
)
def test_refusals(store: EpisodeStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbodiedError, match=message):
        train(store, tmp_path / "m", **changes)
    assert not (tmp_path / "m").exists()


def test_equal_captions_and_existing_folders_are_refused(store: EpisodeStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same sentence"):
        train(make_store(tmp_path / "s", instructions=("one",)), tmp_path / "m")
    with pytest.raises(InputError, match="No episode has an instruction"):
        train(make_store(tmp_path / "e", instructions=("",)), tmp_path / "m")
    with pytest.raises(InputError, match="exists already"):
        train(store, tmp_path)
    with pytest.raises(ConfigError, match="--holdout"):
        train(store, tmp_path / "m", holdout=-0.1)


def test_the_command_line(store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "clip", store.path, "--captions", "instruction", "--out", str(tmp_path / "m"), "--steps", "2"]
    assert main([*words, "--batch", "8", "--holdout", "0.25", "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "retrieval before: of" in text
    assert "held-out episodes" in text
    assert (tmp_path / "m" / "open_clip_model.safetensors").is_file()
