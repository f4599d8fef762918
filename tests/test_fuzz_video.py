import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import change_bytes, fuzz
from lerobot_fixtures import grey_levels, write_video

FORMAT = "video"
HUGE = (0, 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
BOXES = (
    b"stsz",
    b"stts",
    b"stsc",
    b"stco",
    b"ctts",
    b"elst",
    b"stss",
    b"mdhd",
    b"mvhd",
    b"tkhd",
    b"avc1",
    b"hvc1",
    b"trun",
)


def seeds(folder: Path) -> list[Path]:
    levels = grey_levels(12)
    fast: dict[str, Any] = {"deadline": "realtime", "cpu-used": 8}
    quiet: dict[str, Any] = {"x265-params": "log-level=none"}
    paths = [
        write_video(folder / "h264.mp4", levels, bf=2),
        write_video(folder / "h265.mp4", levels, (32, 32), codec="libx265", **quiet),
        write_video(folder / "vp9.webm", levels, codec="libvpx-vp9", **fast),
        write_video(folder / "av1.mp4", levels[:6], (64, 64), codec="libsvtav1", preset=12),
        write_video(folder / "mpeg4.avi", levels, codec="mpeg4"),
        write_video(folder / "a.gif", levels, codec="gif", pix_fmt="rgb8"),
        write_video(folder / "ffv1.mkv", levels, codec="ffv1", pix_fmt="bgr0"),
        write_video(folder / "fragments.mp4", levels, container_options={"movflags": "frag_keyframe+empty_moov"}),
    ]
    write_video(folder / "many" / "take1.mp4", levels[:4])
    write_video(folder / "many" / "take2.mp4", levels[:3])
    (folder / "many" / "take1.txt").write_text("push")
    return [*paths, folder / "many"]


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str | None:
    """Headers that announce absurd numbers, where a random byte would rarely land."""
    if target.is_dir():
        files = sorted(target.iterdir())
        kind = rng.integers(4)
        if kind == 0:
            files[0].write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n")
            return "a playlist"
        if kind == 1:
            (target / "take1.txt").write_bytes(rng.bytes(50_000))
            return "a caption of noise"
        if kind == 2:
            write_video(target / "take3.mp4", grey_levels(2), (48, 32))
            return "another size"
        (target / "take2.mp4").rename(target / ("take" + "9" * 200 + ".mp4"))
        return "a number of 200 digits"
    data = bytearray(target.read_bytes())
    if target.suffix == ".gif":
        data[6:10] = struct.pack("<HH", *(int(rng.choice([0, 1, 4000, 20000, 65535])) for _ in range(2)))
    elif target.suffix == ".avi":
        for name in (b"avih", b"strh", b"strf"):
            at = data.index(name) + 8 + 4 * int(rng.integers(12))
            data[at : at + 4] = struct.pack("<I", int(rng.choice(HUGE)))
    elif target.suffix in (".webm", ".mkv"):
        # Width (0xB0) and height (0xBA) of the track, and sizes of elements.
        at = data.index(b"\xb0") + 1 + int(rng.integers(8)) if rng.random() < 0.5 else int(rng.integers(len(data) // 2))
        data[at : at + 4] = struct.pack(">I", int(rng.choice(HUGE)))
    else:
        there = [name for name in BOXES if name in data]
        name = there[int(rng.integers(len(there)))]
        at = data.index(name) + 4 + 4 * int(rng.integers(9))
        value = int(rng.choice([*HUGE, len(data), len(data) // 2, 100_000]))
        data[at : at + 4] = struct.pack(">I", value)
        if rng.random() < 0.3:
            data = bytearray(change_bytes(bytes(data), rng))
    target.write_bytes(data)
    return "absurd numbers in the header"


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 300
    assert counts.get("partial", 0) + counts.get("whole", 0) > 300
