import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.contracts.errors import InputError
from embodied.datasets import read_lerobot
from embodied.datasets.importer import import_dataset
from embodied.datasets.lerobot_cameras import match

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_fixtures import edit_info, features, grey_levels, make_v2, png, read_levels, write_video


def read(path, **options):
    return read_lerobot.read(path, options)


def findings(source):
    return {(finding.check, finding.message) for finding in source.findings}


def video_of(root, episode):
    return root / f"videos/chunk-{episode // 2:03d}/observation.images.cam/episode_{episode:06d}.mp4"


def test_missing_videos_are_said_once_and_the_rest_is_imported(tmp_path):
    root = make_v2(tmp_path / "set")
    for episode in (0, 2):
        video_of(root, episode).unlink()
    source = read(root)
    assert findings(source) == {("missing-media", "camera 'cam': no video for 2 of 3 episodes: 0, 2")}
    assert [sorted(source.load(i).images) for i in range(3)] == [[], ["cam"], []]
    store = import_dataset(root, tmp_path / "store")
    np.testing.assert_array_equal(store.has_camera("cam"), [False, True, False])
    video_of(root, 1).unlink()
    source = read(root)
    assert source.spec.images == {}
    assert "none of 3 episodes" in source.attributes["observations_left_out"]["observation.images.cam"]


def test_a_camera_without_a_picture_per_row_is_left_out_of_that_episode(tmp_path):
    root = make_v2(tmp_path / "set")
    write_video(video_of(root, 1), grey_levels(5))
    write_video(video_of(root, 2), grey_levels(3), size=(32, 32))
    source = read(root)
    messages = findings(source)
    assert ("frame-row-mismatch", "camera 'cam': 1 of 3 episodes: 1 (5 pictures for 6 rows)") in messages
    assert ("frame-size", "camera 'cam': 1 of 3 episodes: 2 (32x32, others are (16, 24))") in messages
    assert [sorted(source.load(i).images) for i in range(3)] == [["cam"], [], []]
    source.load(1).check(source.spec)


def test_more_pictures_than_rows_pair_by_time(tmp_path):
    root = make_v2(tmp_path / "set")
    write_video(video_of(root, 1), grey_levels(9, 10))
    source = read(root)
    assert findings(source) == {("frame-row-mismatch", "camera 'cam': 3 pictures belong to no row: 1")}
    np.testing.assert_allclose(read_levels(source.load(1).images["cam"]), grey_levels(6, 10), atol=4)


def test_pictures_are_chosen_by_their_times_not_by_a_rate(tmp_path):
    # A recorder that paused: the times of rows and pictures are uneven, and a surplus picture lies between.
    root = make_v2(tmp_path / "set", lengths=(4,))
    table = pq.read_table(root / "data/chunk-000/episode_000000.parquet")
    times = pa.array(np.array([0.0, 0.1, 0.7, 0.8], np.float32))
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", times)
    pq.write_table(table, root / "data/chunk-000/episode_000000.parquet")
    write_video(video_of(root, 0), [20, 60, 100, 140, 180], times=[0.0, 0.1, 0.4, 0.7, 0.8])
    source = read(root)
    np.testing.assert_allclose(read_levels(source.load(0).images["cam"]), [20, 60, 140, 180], atol=4)
    np.testing.assert_allclose(source.load(0).timestamp, [0.0, 0.1, 0.7, 0.8], atol=1e-6)


def test_times_that_differ_are_paired_in_order_and_said(tmp_path):
    root = make_v2(tmp_path / "set", lengths=(4,))
    write_video(video_of(root, 0), grey_levels(4), times=[0.0, 0.13, 0.22, 0.3])
    source = read(root)
    ((check, message),) = findings(source)
    assert check == "frame-times"
    assert "differ by up to 0.0300 s (episode 0; 1 of 1 episodes)" in message
    np.testing.assert_allclose(read_levels(source.load(0).images["cam"]), grey_levels(4), atol=4)


def test_match_pairs_rows_and_pictures():
    tenths = np.arange(20) / 10
    np.testing.assert_array_equal(match(tenths[:5], 5, tenths, 1.0, 1.5).chosen, np.arange(10, 15))
    # A window whose end is off by rounding, and one that holds a picture too few.
    np.testing.assert_array_equal(match(tenths[:5], 5, tenths, 0.99999, 1.49999).chosen, np.arange(10, 15))
    with pytest.raises(InputError, match="2 pictures for 5 rows"):
        match(tenths[:5], 5, tenths, 1.8, 2.3)
    with pytest.raises(InputError, match="4 pictures for 5 rows"):  # the fifth is the next episode's first
        match(tenths[:5], 5, tenths, 1.0, 1.4)
    np.testing.assert_array_equal(match(None, 5, tenths, 1.0, 1.5).chosen, np.arange(10, 15))
    with pytest.raises(InputError, match="no timestamps to pair them by"):
        match(None, 6, tenths, 1.0, 1.5)
    # float32 timestamps an hour into an episode are off by more than LeRobot's 1e-4.
    long = np.arange(0, 3600, 0.1)
    paired = match(long.astype(np.float32).astype(float), len(long), long, -np.inf, np.inf)
    np.testing.assert_array_equal(paired.chosen, np.arange(len(long)))
    assert paired.deviation == 0
    np.testing.assert_array_equal(match(tenths[:1], 1, tenths[:1], -np.inf, np.inf).chosen, [0])
    with pytest.raises(InputError, match="1 pictures for 2 rows"):
        match(tenths[:2], 2, tenths[:1], -np.inf, np.inf)
    # Two rows of one time: as many pictures as rows, so each gets its own.
    np.testing.assert_array_equal(
        match(np.array([0.0, 0.1, 0.1, 0.2]), 4, tenths[:4], -np.inf, np.inf).chosen, range(4)
    )
    # Every row finds a picture near it, but two rows the same one.
    with pytest.raises(InputError, match="3 pictures for 4 rows"):
        match(tenths[:4], 4, tenths[:4][[0, 1, 3]], -np.inf, np.inf)


def test_a_camera_called_to_lead_out_of_the_dataset_has_no_pictures(tmp_path):
    root = make_v2(tmp_path / "set")
    write_video(tmp_path / "outside/episode_000000.mp4", grey_levels(4))
    more = features()
    more["../../../outside"] = more.pop("observation.images.cam")
    edit_info(root, features=more)
    source = read(root)
    assert source.spec.images == {}
    assert any("leads out of the dataset" in message for _, message in findings(source))


def test_pictures_by_path_stay_inside(tmp_path):
    root = make_v2(tmp_path / "set", lengths=(2,), embedded=True)
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})

    def with_paths(*paths):
        cells = pa.array([{"bytes": None, "path": p} for p in paths], kind)
        pq.write_table(
            table.set_column(table.column_names.index("observation.images.cam"), "observation.images.cam", cells), path
        )
        return read(root)

    (tmp_path / "outside.png").write_bytes(png(9))
    (root / "images").mkdir()
    for i in range(2):
        (root / f"images/{i}.png").write_bytes(png(50 + 100 * i))
    source = with_paths("images/0.png", "images/1.png")
    np.testing.assert_array_equal(read_levels(source.load(0).images["cam"]), [50, 150])
    source = with_paths("images/0.png", "../outside.png")
    with pytest.raises(InputError, match="names a picture outside the dataset"):
        np.asarray(source.load(0).images["cam"])
    source = with_paths(str(tmp_path / "outside.png"), "images/1.png")
    assert source.spec.images == {}
    assert "outside the dataset" in source.attributes["observations_left_out"]["observation.images.cam"]
