"""Peak memory of `embodied data import` above the idle process, on data that fits no memory.

    python benchmarks/import_memory.py                        every case, 5 GB of HDF5 and 500 videos
    python benchmarks/import_memory.py hdf5 --scale 0.02      one case, a fiftieth of its size

Sources are generated below --work and removed again; each import runs in a process of its own. Memory is the largest
VmHWM of that process and its children, from /proc, every 20 ms. Idle is a process that has imported every module that
an import uses. `limit` (1 GiB above idle) is asserted.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from record import write_result

LIMIT = 1 << 30  # bytes above idle
IDLE = """
import embodied.cli, embodied.data_import, embodied.data_info, embodied.datasets.importer
import av, h5py, pyarrow.parquet, zarr
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """`make(folder, scale)` writes a source below `folder` and returns it; `disk` is what a full run needs [B]."""

    make: Callable[[Path, float], Path]
    disk: int


def make_hdf5(folder: Path, scale: float) -> Path:
    """robomimic's layout: 200 demos of an 84x84 and a 224x224 camera, 5 GB in all, one of them 0.5 GB."""
    path = folder / "demos.hdf5"
    rng = np.random.default_rng(0)
    lengths = np.full(200, 131)
    lengths[100] = 3000
    noise = rng.integers(0, 256, 8 << 20, np.uint8)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "synthetic", "env_kwargs": {"control_freq": 20}})
        for number, length in enumerate(np.maximum(2, lengths * scale).astype(int)):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["rewards"] = np.zeros(length)
            demo["dones"] = np.arange(length) == length - 1
            demo["obs/robot0_eef_pos"] = rng.normal(size=(length, 3))
            for camera, size in (("agentview_image", 84), ("robot0_eye_in_hand_image", 224)):
                shape = (length, size, size, 3)
                images = demo.create_dataset(f"obs/{camera}", shape, np.uint8, chunks=(min(16, length), *shape[1:]))
                for start in range(0, length, 16):
                    rows = min(16, length - start)
                    at = int(rng.integers(len(noise) - rows * size * size * 3))
                    images[start : start + rows] = noise[at : at + rows * size * size * 3].reshape(rows, *shape[1:])
        data.attrs["total"] = int(np.maximum(2, lengths * scale).astype(int).sum())
    return path


def make_videos(folder: Path, scale: float) -> Path:
    """500 mp4 files (H.264, 320x240, 100 pictures at 20/s): 20 different ones, copied."""
    import av

    source = folder / "videos"
    source.mkdir()
    rows, columns = np.mgrid[:240, :320]
    num_files = max(2, round(500 * scale))
    for number in range(min(20, num_files)):
        with av.open(str(source / f"take_{number:03d}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=20, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for step in range(100):
                x, y = 40 + 2 * step, 120 + 60 * np.sin(0.1 * step + number)
                blob = 200 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 400)
                picture = np.stack([blob + 30, columns * 0.4, rows * 0.5 + number], 2).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    for number in range(20, num_files):
        shutil.copy(source / f"take_{number % 20:03d}.mp4", source / f"take_{number:03d}.mp4")
    return source


CASES = {
    # Source, staged pictures and store: noise is kept uncompressed.
    "hdf5": Case(make_hdf5, 17_000_000_000),
    "video": Case(make_videos, 14_000_000_000),
}


def measure(name: str, work: Path, scale: float, idle: int) -> dict[str, Any]:
    """Generate one source, import it, remove it. Raises AssertionError above the limit."""
    case = CASES[name]
    free = shutil.disk_usage(work).free
    if free < case.disk * scale + (2 << 30):
        raise SystemExit(f"{work} has {free / 1e9:.0f} GB free; {name} needs {case.disk * scale / 1e9 + 2:.0f}.")
    with tempfile.TemporaryDirectory(dir=work, prefix=f"import-{name}-") as text:
        folder = Path(text)
        source, store = case.make(folder, scale), folder / "store"
        files = [source] if source.is_file() else list(source.rglob("*"))
        size = sum(file.stat().st_size for file in files)
        command = [sys.executable, "-m", "embodied.cli", "data", "import", str(source), str(store), "--json"]
        start = time.monotonic()
        with open(folder / "out", "wb") as out:
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
            peak = _peak(child)
        seconds = time.monotonic() - start
        if child.returncode:
            raise SystemExit(f"the import of {name} failed: {(folder / 'out').read_text()[-1000:]}")
        result = json.loads((folder / "out").read_text())
    figures = {
        "source_bytes": size,
        "episodes": result["episodes"],
        "frames": result["frames"],
        "seconds": round(seconds, 1),
        "peak_mib": round(peak / 2**20, 1),
        "above_idle_mib": round((peak - idle) / 2**20, 1),
    }
    assert peak - idle < LIMIT, f"{name}: {figures}"
    return figures


def _peak(child: "subprocess.Popen[bytes]") -> int:
    """Largest sum of VmHWM of a process and its children until it ends [B]."""
    largest = 0
    while child.poll() is None:
        children = _text(f"/proc/{child.pid}/task/{child.pid}/children").split()
        largest = max(largest, sum(_high_water(int(pid)) for pid in [child.pid, *children]))
        time.sleep(0.02)
    return largest


def _high_water(pid: int) -> int:
    lines = [line for line in _text(f"/proc/{pid}/status").splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) << 10 if lines else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--scale", type=float, default=1.0, help="size of the sources; below 1 nothing is recorded")
    arguments = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True, env=environment)
    idle = int(found.stdout) << 10
    figures: dict[str, Any] = {"idle_mib": round(idle / 2**20, 1), "limit_mib": LIMIT >> 20}
    for name in arguments.cases or CASES:
        figures[name] = measure(name, arguments.work, arguments.scale, idle)
        print(name, json.dumps(figures[name]), flush=True)
    if arguments.scale >= 1:
        write_result("import_memory", figures)


if __name__ == "__main__":
    main()
