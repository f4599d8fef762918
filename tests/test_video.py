import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.datasets import video as video_file
from embodied.datasets.episode import blocks_of
from embodied.datasets.video import pictures, scan, scan_decoded
from embodied.datasets.video_header import check_mp4

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_fixtures import grey_levels, read_levels, write_video

CODECS = [
    ("h264.mp4", "libx264", "yuv420p", {}),
    ("h264_444.mp4", "libx264", "yuv444p", {}),
    ("h265.mp4", "libx265", "yuv420p10le", {"x265-params": "log-level=none"}),
    ("av1.mp4", "libsvtav1", "yuv420p", {"preset": 12}),
    ("vp9.webm", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": 8}),
    ("mpeg4.avi", "mpeg4", "yuv420p", {}),
    ("ffv1.mkv", "ffv1", "bgr0", {}),
    ("h264.mov", "libx264", "yuv420p", {}),
    ("grey.mkv", "ffv1", "gray", {}),
]


def every(video):
    return np.arange(video.num_pictures)


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "options"), CODECS, ids=[case[0] for case in CODECS])
def test_every_codec_gives_the_pictures_that_were_written(tmp_path, name, codec, pix_fmt, options):
    levels = grey_levels(23)
    size = (64, 80) if "av1" in codec else (18, 26)
    path = write_video(tmp_path / name, levels, size, codec=codec, pix_fmt=pix_fmt, **options)
    for video in (scan(path), scan_decoded(path)):
        assert video.shape == (*size, 3)
        assert video.num_pictures == 23
        assert video.damage == ""
        assert not video.is_depth
        np.testing.assert_allclose(video.seconds - video.seconds[0], np.arange(23) / 10, atol=1e-3)
        found = pictures(video, every(video))
        assert found.shape == (23, *size, 3)
        np.testing.assert_allclose(read_levels(found), levels, atol=4)


def test_gif_and_odd_sizes(tmp_path):
    levels = [0, 255, 0, 0, 255, 255, 0, 255, 0]
    path = write_video(tmp_path / "a.gif", levels, (15, 21), codec="gif", pix_fmt="rgb8")
    video = scan(path)
    assert video.shape == (15, 21, 3)
    assert video.num_pictures == 9
    np.testing.assert_allclose(read_levels(pictures(video, every(video))), levels, atol=20)


X265 = "log-level=none:open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"
SEEKS = [
    ("h264.mp4", "libx264", {"bf": 3}),
    ("h264.mkv", "libx264", {"bf": 3}),
    ("h265.mp4", "libx265", {"x265-params": X265}),
    ("h265.mkv", "libx265", {"x265-params": X265}),
    ("mpeg4.avi", "mpeg4", {"bf": 2}),
    ("vp9.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": 8}),
]


@pytest.mark.parametrize(("name", "codec", "options"), SEEKS, ids=[case[0] for case in SEEKS])
def test_any_choice_of_pictures_equals_that_choice_of_all(tmp_path, name, codec, options):
    # B frames are stored in another order than shown, and key frames are eight apart: seeking must bear both.
    levels = grey_levels(60)
    video = scan(write_video(tmp_path / name, levels, (32, 32), codec=codec, gop=8, **options))
    whole = np.asarray(pictures(video, every(video)))
    count = len(whole)
    assert count == (59 if name.endswith("avi") else 60)  # FFmpeg's writer of AVI drops the last one
    np.testing.assert_allclose(whole[:, 8, 8, 1].astype(int), levels[:count], atol=7)
    rng = np.random.default_rng(0)
    for first in range(count):
        chosen = np.unique([first, *rng.integers(first, count, 3)])
        np.testing.assert_array_equal(np.asarray(pictures(video, chosen)), whole[chosen])
    assert len(pictures(video, np.arange(0))) == 0


def test_pictures_before_the_start_that_an_edit_list_sets_are_none(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_levels(12), gop=12)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 16  # media time of the first edit, after version, count and duration
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    (start,) = struct.unpack_from(">I", data, at)
    struct.pack_into(">I", data, at, start + 3 * timescale // 10)
    path.write_bytes(data)
    for video in (scan(path), scan_decoded(path)):
        assert video.num_pictures == 9
        np.testing.assert_allclose(read_levels(pictures(video, every(video))), grey_levels(12)[3:], atol=4)


def test_uneven_times_are_kept(tmp_path):
    times = [0.0, 0.1, 0.15, 0.9, 1.0, 5.25]
    video = scan(write_video(tmp_path / "a.mp4", grey_levels(6), times=times))
    np.testing.assert_allclose(video.seconds, times, atol=1e-3)


def test_blocks_are_small_and_can_be_asked_for_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(video_file, "BLOCK_BYTES", 10_000)
    video = scan(write_video(tmp_path / "a.mp4", grey_levels(50), (32, 48)))
    found = pictures(video, every(video))
    sizes = [block.nbytes for block in blocks_of(found)]
    assert max(sizes) <= 10_000
    assert sum(sizes) == 50 * 32 * 48 * 3
    assert sizes == [block.nbytes for block in blocks_of(found)]


def test_scaling_while_decoding_averages(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "bgr0"
        stripes = np.zeros((32, 64, 3), np.uint8)
        stripes[:, ::2] = 200
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stripes, format="rgb24")))
        container.mux(stream.encode(None))
    video = scan(path)
    small = np.asarray(pictures(video, every(video), (8, 16)))
    assert small.shape == (1, 8, 16, 3)
    assert abs(small.mean() - 100) < 3
    assert small.std() < 3


def test_rotation_in_the_header_turns_the_pictures(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        picture = np.full((32, 48, 3), 20, np.uint8)
        picture[:8, :8] = 220  # top left
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    one = 1 << 16
    straight = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    at = data.index(b"tkhd")
    place = data.index(straight, at)
    path.write_bytes(data[:place] + clockwise + data[place + len(clockwise) :])
    video = scan(path)
    assert video.shape == (48, 32, 3)
    turned = np.asarray(pictures(video, every(video)))[0]
    assert turned[:8, -8:].mean() > 180  # top left has gone to the top right
    assert turned[:8, :8].mean() < 60
    assert np.asarray(pictures(video, every(video), (24, 16)))[0][:4, -4:].mean() > 180


def test_a_truncated_file_gives_what_it_has(tmp_path):
    levels = grey_levels(40)
    path = write_video(tmp_path / "a.mkv", levels, (64, 64), codec="ffv1", pix_fmt="bgr0")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    video = scan_decoded(path)
    assert 10 < video.num_pictures < 30
    np.testing.assert_allclose(read_levels(pictures(video, every(video))), levels[: video.num_pictures], atol=4)


def test_a_picture_that_does_not_decode_is_named(tmp_path):
    path = write_video(tmp_path / "a.mkv", grey_levels(20), (64, 64), codec="ffv1", pix_fmt="bgr0")
    video = scan(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    decoded = scan_decoded(path)
    if decoded.num_pictures < 20:
        with pytest.raises(InputError, match=r"a\.mkv: picture \d+ of 20 does not decode"):
            np.asarray(pictures(video, every(video)))
    assert decoded.num_pictures >= 18


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(InputError, match=r"a\.mp4 cannot be read as video: .*\nIt is truncated or damaged \(5 bytes\)"):
        scan(tmp_path / "a.mp4")
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError, match="cannot be read as video"):
        scan(playlist)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match="holds no video"):
        scan(tmp_path / "sound.mp4")


def test_absurd_sizes_are_refused_before_a_picture_is_made(tmp_path):
    gif = write_video(tmp_path / "a.gif", grey_levels(2), codec="gif", pix_fmt="rgb8")
    data = bytearray(gif.read_bytes())
    data[6:10] = struct.pack("<HH", 20000, 20000)
    gif.write_bytes(data)
    with pytest.raises(InputError, match=r"20000x20000 pixels|no picture decodes"):
        scan(gif)


def test_depth_is_told_from_pictures(tmp_path):
    path = tmp_path / "depth.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "gray16le"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 32), 1500, np.uint16), format="gray16le")))
        container.mux(stream.encode(None))
    assert scan(path).is_depth


def test_a_header_may_not_announce_more_samples_than_bytes(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_levels(5))
    check_mp4(path)
    data = path.read_bytes()
    at = data.index(b"stsz") + 8
    for each, count in ((1, 2**31), (0, 2**31)):
        path.write_bytes(data[:at] + struct.pack(">II", each, count) + data[at + 8 :])
        with pytest.raises(InputError, match=r"announces 2,147,483,648 samples"):
            scan(path)
    at = data.index(b"elst") + 8
    path.write_bytes(data[:at] + struct.pack(">I", 2**30) + data[at + 4 :])
    with pytest.raises(InputError, match="edits"):
        scan(path)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", grey_levels(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"embodied-rl\[formats\]"):
        scan(path)
