import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import read_video
from embodied.datasets.importer import import_dataset, recognise

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_fixtures import grey_levels, make_v2, read_levels, write_video

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "video-human").exists(), reason="real data is not here")


def read(path, **options):
    return read_video.read(path, options)


def folder_of(tmp_path):
    """Three takes in an order that only numbers give, a sub-folder, a caption and a stranger."""
    root = tmp_path / "clips"
    write_video(root / "take10.mp4", grey_levels(7, 10))
    write_video(root / "take2.mp4", grey_levels(5))
    write_video(root / "more/take1.avi", grey_levels(4, 5), codec="mpeg4")
    (root / "take2.txt").write_text("pick up\n the cube\n")
    (root / "notes.csv").write_text("1,2")
    return root


def test_a_folder_becomes_a_store_without_actions(tmp_path):
    root = folder_of(tmp_path)
    assert recognise(root) == "video"
    store = import_dataset(root, tmp_path / "store")
    assert store.spec.action is None
    assert store.spec.observations == {}
    assert store.spec.images["image"].shape == (16, 24, 3)
    assert store.source_ids == ["more/take1.avi", "take2.mp4", "take10.mp4"]
    assert store.instructions == ["", "pick up the cube", ""]
    assert store.episode_length.tolist() == [4, 5, 7]
    levels = [*grey_levels(4, 5), *grey_levels(5), *grey_levels(7, 10)]
    np.testing.assert_allclose(read_levels(store.frames("image")), levels, atol=6)
    np.testing.assert_allclose(store.read("timestamp")[4:9], np.arange(5) / 10, atol=1e-3)
    assert store.findings == []
    attributes = store.attributes["provenance"]["source_attributes"]
    assert attributes["other_files"] == {"number": 2, "first": ["notes.csv", "take2.txt"]}
    truncated = store.read("truncated")
    assert np.flatnonzero(truncated).tolist() == [3, 8, 15]


def test_a_file_alone(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_levels(6))
    assert recognise(path) == "video"
    source = read(path, camera="front", instruction="push")
    episode = source.load(0)
    episode.check(source.spec)
    assert list(episode.images) == ["front"]
    assert episode.instruction == "push"
    assert episode.source_id == "a.mp4"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"a\.mp4 cannot be read as video"):
        read(path)


def test_other_formats_come_first(tmp_path):
    assert recognise(make_v2(tmp_path / "set")) == "lerobot"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="of no format known"):
        recognise(tmp_path / "empty")


def test_files_of_different_sizes_need_one(tmp_path):
    root = folder_of(tmp_path)
    write_video(root / "wide.mp4", grey_levels(3), (16, 48))
    with pytest.raises(InputError, match=r"more/take1\.avi is 16x24 .*, wide\.mp4 is 16x48.*\nGive one: size=16x24"):
        read(root)
    source = read(root, size="8x12")
    for i in range(source.num_episodes):
        episode = source.load(i)
        episode.check(source.spec)
        assert np.asarray(episode.images["image"]).shape == (len(episode), 8, 12, 3)


def test_fps_keeps_pictures_and_their_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_levels(21), times=[*np.arange(20) / 10, 2.55])
    episode = read(path, fps=5).load(0)
    np.testing.assert_allclose(episode.timestamp, [*np.arange(0, 2, 0.2), 2.55], atol=1e-3)
    np.testing.assert_allclose(
        read_levels(episode.images["image"]), [*grey_levels(20)[::2], grey_levels(21)[20]], atol=4
    )
    assert len(read(path, fps=100).load(0)) == 21
    assert len(read(path, fps=3).load(0)) == 6


def test_damaged_files_are_left_out_or_give_what_they_have(tmp_path):
    root = folder_of(tmp_path)
    (root / "bad.mp4").write_bytes(b"\0" * 100)
    path = write_video(root / "cut.mkv", grey_levels(20), codec="ffv1", pix_fmt="bgr0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = read(root)
    assert source.attributes["files"] == ["cut.mkv", "more/take1.avi", "take2.mp4", "take10.mp4"]
    ((check, message),) = {(f.check, f.message) for f in source.findings if "bad.mp4" in f.message}
    assert check == "episode-left-out"
    assert "cannot be read as video" in message
    cut = source.load(0)
    assert 5 <= len(cut) < 20
    np.testing.assert_allclose(read_levels(cut.images["image"]), grey_levels(len(cut)), atol=4)


def test_a_header_that_promises_more_is_said(tmp_path):
    root = tmp_path / "clips"
    path = write_video(
        root / "a.mp4", grey_levels(40), (64, 64), codec="mpeg4", container_options={"movflags": "faststart"}
    )
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[20]])
    source = read(root)
    assert len(source.load(0)) == 20
    ((check, message),) = {(finding.check, finding.message) for finding in source.findings}
    assert check == "frame-count"
    assert "a.mp4: " in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("size", "84", "is no size. Give height x width"),
        ("size", "0x5", "is no size"),
        ("size", "99999x99999", "up to 4096"),
        ("fps", 0, "is no rate"),
        ("fps", "fast", "is no rate"),
        ("fps", float("nan"), "is no rate"),
        ("camera", "../x", "is no name for a camera"),
        ("cam", "x", "Did you mean 'camera'"),
    ],
)
def test_options_are_checked(tmp_path, option, value, message):
    path = write_video(tmp_path / "a.mp4", grey_levels(2))
    with pytest.raises(ConfigError, match=message):
        read(path, **{option: value})


@real
def test_real_metaworld_rollouts(tmp_path):
    folder = DATA / "video-metaworld-rollouts"
    facts = json.loads((folder / "facts.json").read_text())
    store = import_dataset(folder, tmp_path / "store", options={"size": "48x48"})
    assert store.source_ids == [f"{name}.mp4" for name in sorted(facts, key=lambda n: (int(n.split("/")[0][4:]), n))]
    for name, length, i in zip(store.source_ids, store.episode_length, range(10), strict=True):
        video = facts[name.removesuffix(".mp4")]["video"]
        assert length == video["frames"]
        assert store.episode(i).timestamp[-1] == pytest.approx(video["last_pts"], abs=1e-3)
    assert store.findings == []


@real
@pytest.mark.parametrize("name", ["video-human", "video-robot-tasks"])
def test_real_clips(name):
    folder = DATA / name
    facts = json.loads((folder / "facts.json").read_text())
    with pytest.raises(InputError, match="a dataset has one size"):
        read(folder)
    source = read(folder, size="24x24")
    assert set(source.attributes["files"]) == set(facts)
    for i, file in enumerate(source.attributes["files"]):
        episode = source.load(i)
        episode.check(source.spec)
        assert len(episode) == facts[file]["frames"], file
        if "last_pts" in facts[file]:
            assert episode.timestamp[-1] == pytest.approx(facts[file]["last_pts"], abs=1e-3)
        else:
            assert episode.timestamp[-1] == pytest.approx(facts[file]["duration_ms"] / 1000, abs=0.2)
        alone = read(folder / file)
        assert alone.spec.images["image"].shape == (facts[file]["height"], facts[file]["width"], 3)
