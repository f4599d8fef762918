"""Random reads of frames: this store, mp4 as LeRobot writes it, and HDF5 as robomimic writes it, in one run.

    python benchmarks/frame_reads.py                    the comparison, and what the store's layout was chosen from
    python benchmarks/frame_reads.py --sizes 84 --seconds 0.1 --rounds 2 --no-matrix      a quick look

Pictures: 40 episodes of 51 frames of robosuite/Lift (camera `side`, static; the arm moves), as rendered (`clean`) and
with Gaussian noise of 2 grey levels per channel as a sensor has (`noisy`). Each contender keeps its files open and
answers batches of 256 random rows, in one array that is used again; contenders take turns in every round, in
alternating order. Warm file cache, one thread. HDF5 filters beyond gzip and lzf are measured where `hdf5plugin` can be
imported. HDF5's cache of decoded chunks, 1 MB per demonstration, is off but for one line: these demonstrations are so
small that it would hold most of them decoded, which it cannot do with thousands.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import zarr
from record import write_result

from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets import read_frames
from embodied.datasets.episode import Episode
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_arrays import PICTURE_CODECS
from embodied.datasets.write_store import StoreWriter

BATCH = 256
EPISODES = 40
MATRIX = 10  # episodes of which the layouts are compared
NOISE = 2.0  # [grey levels]
NAME = "observation/images/side"
STORE = "store"  # its folder
Read = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Contender:
    """`read` gives (B, H, W, 3) for (B,) rows; `size` is on disk [B]."""

    read: Read
    size: int
    close: Callable[[], Any] = lambda: None


def pictures(size: int, cache: Path | None) -> list[np.ndarray]:
    """Episodes of (51, size, size, 3) uint8, rendered, or from an earlier run's `cache`."""
    file = cache / f"lift_{size}.npz" if cache else None
    if file and file.exists():
        with np.load(file, allow_pickle=False) as data:
            return [data[name] for name in data.files][:EPISODES]
    from embodied.sim.collect import run_episode
    from embodied.sim.suites import environment

    task = environment("robosuite/Lift")
    env = task.make(cameras=("side",), image_size=size)
    episodes = [
        np.asarray(run_episode(env, task.behaviours["scripted"](env), seed).images["side"]) for seed in range(EPISODES)
    ]
    if file:
        np.savez(file, *episodes, allow_pickle=False)
    return episodes


def noisy(episodes: list[np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        np.clip(np.rint(e + rng.normal(0, NOISE, e.shape).astype(np.float32)), 0, 255).astype(np.uint8)
        for e in episodes
    ]


def disk(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def write_ours(path: Path, episodes: list[np.ndarray]) -> EpisodeStore:
    spec = DatasetSpec({}, {"side": ArraySpec(episodes[0].shape[1:], "uint8")}, None)
    writer = StoreWriter(path, spec, {})
    for index, frames in enumerate(episodes):
        flags = np.zeros(len(frames), bool)
        times = np.arange(len(frames)) * 0.1
        writer.write_episode(index, Episode({}, {"side": frames}, None, flags, flags, flags, times))
    return writer.finish(len(episodes))


def ours(path: Path, episodes: list[np.ndarray]) -> Contender:
    store = write_ours(path, episodes)
    out = np.empty((BATCH, *episodes[0].shape[1:]), np.uint8)
    return Contender(lambda rows: store.read_rows(NAME, rows, out[: len(rows)]), disk(path / NAME))


def hdf5(path: Path, episodes: list[np.ndarray], chunk: int | None, cache: int = 0, **filters: Any) -> Contender:
    """robomimic's layout: one dataset per demonstration; `chunk` None leaves the chunk's shape to h5py."""
    with h5py.File(path, "w") as file:
        for index, frames in enumerate(episodes):
            chunks = (chunk, *frames.shape[1:]) if chunk else None
            file.create_dataset(f"data/demo_{index}/obs/side_image", data=frames, chunks=chunks, **filters)
    file = h5py.File(path, "r", rdcc_nbytes=cache)
    datasets: list[Any] = [file[f"data/demo_{i}/obs/side_image"] for i in range(len(episodes))]
    start = np.cumsum([0, *map(len, episodes)])

    out = np.empty((BATCH, *episodes[0].shape[1:]), np.uint8)

    def read(rows: np.ndarray) -> np.ndarray:
        which = np.searchsorted(start, rows, "right") - 1
        for i, (episode, row) in enumerate(zip(which.tolist(), (rows - start[which]).tolist(), strict=True)):
            out[i] = datasets[episode][row]
        return out[: len(rows)]

    return Contender(read, disk(path), file.close)


def video(path: Path, episodes: list[np.ndarray], codec: str, options: dict[str, str]) -> Contender:
    """One mp4 of all episodes, as LeRobot v3.0 lays them; the exact frame by seek and decode."""
    import av

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *episodes[0].shape[1:3], "yuv420p"
        for frames in episodes:
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    container = av.open(str(path))
    track = container.streams.video[0]
    track.thread_type, track.codec_context.thread_count = "NONE", 1
    times = sorted(packet.pts for packet in container.demux(track) if packet.pts is not None)

    out = np.empty((BATCH, *episodes[0].shape[1:]), np.uint8)

    def read(rows: np.ndarray) -> np.ndarray:
        for i, row in enumerate(rows.tolist()):
            container.seek(times[row], stream=track)
            for frame in container.decode(track):
                if frame.pts is not None and frame.pts >= times[row]:
                    out[i] = frame.to_ndarray(format="rgb24")
                    break
        return out[: len(rows)]

    return Contender(read, disk(path), container.close)


def zarr_array(path: Path, episodes: list[np.ndarray], codec: Any, chunk: int, shard_bytes: int) -> zarr.Array:
    """One camera as the store lays it out, with another chunk, shard or codec."""
    shape = episodes[0].shape[1:]
    per_shard = max(1, shard_bytes // (chunk * int(np.prod(shape))))
    frames = sum(map(len, episodes))
    array = zarr.create_array(
        path,
        shape=(frames, *shape),
        dtype="uint8",
        chunks=(chunk, *shape),
        shards=(chunk * per_shard, *shape),
        compressors=codec,
    )
    joined = np.concatenate(episodes)
    for start in range(0, frames, chunk * per_shard):
        array[start : start + chunk * per_shard] = joined[start : start + chunk * per_shard]
    return zarr.open_array(path, mode="r")


def shards(array: zarr.Array, path: Path, decode: Any = read_frames.decode) -> Read:
    """Our own reader, with any codec."""
    reader = read_frames.ShardReader(array, read_frames.LocalShards(path, array.ndim))
    reader.decode = decode
    return reader.read


def tensorstore(path: Path) -> Read:
    import tensorstore as ts

    limits = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    kvstore = {"driver": "file", "path": f"{path}/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore, "context": limits}, read=True).result()
    return lambda rows: array[rows].read().result()


def zarr_read(path: Path, pipeline: str) -> Read:
    """zarr-python's `oindex`, with its own pipeline or that of zarrs."""
    with zarr.config.set({"codec_pipeline.path": pipeline, "threading.max_workers": 1}):
        array = zarr.open_array(path, mode="r")
    return lambda rows: np.asarray(array.oindex[rows])


def zstd(data: memoryview, out: np.ndarray) -> None:
    import numcodecs.zstd

    numcodecs.zstd.decompress(data, out)


def measure(contenders: dict[str, Read], frames: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Frames/s of each contender in each round, contenders taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    rng = np.random.default_rng(1)
    for read in contenders.values():
        read(rng.integers(0, frames, BATCH))
    for number in range(rounds):
        names = list(contenders)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            count, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds:
                contenders[name](rng.integers(0, frames, BATCH))
                count += BATCH
            rates[name].append(count / passed)
    return rates


def summary(rates: list[float], size: float = 0) -> dict[str, Any]:
    out = {"frames_per_s": statistics.median(rates), "min": min(rates), "max": max(rates)}
    return {key: round(value) for key, value in out.items()} | ({"bytes_per_frame": round(size)} if size else {})


def comparison(folder: Path, episodes: list[np.ndarray], rounds: int, seconds: float) -> dict[str, Any]:
    """Ours against video and HDF5: rates, sizes, and the ratios with their range over rounds."""
    one: dict[str, Callable[[Path], Contender]] = {
        "store": lambda p: ours(p, episodes),
        "mp4 AV1 g=2 crf 30 (LeRobot), PyAV": lambda p: video(p, episodes, "libsvtav1", {"g": "2", "crf": "30"}),
        "mp4 H.264 g=2, PyAV": lambda p: video(p, episodes, "libx264", {"g": "2"}),
        "HDF5 gzip, h5py's chunks (robomimic --compress)": lambda p: hdf5(p, episodes, None, compression="gzip"),
        "HDF5 gzip, 1-frame chunks": lambda p: hdf5(p, episodes, 1, compression="gzip"),
        "HDF5 gzip, 1-frame chunks, 1 MB cache per demo": lambda p: hdf5(p, episodes, 1, 2**20, compression="gzip"),
        "HDF5 lzf, 1-frame chunks": lambda p: hdf5(p, episodes, 1, compression="lzf"),
        "HDF5 uncompressed": lambda p: hdf5(p, episodes, None),
    }
    try:
        import hdf5plugin as plugin  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        one |= {
            "HDF5 zstd 1, 1-frame chunks": lambda p: hdf5(p, episodes, 1, compression=plugin.Zstd(clevel=1)),
        }
        for name, level, shuffle in PICTURE_CODECS:
            how = plugin.Blosc.BITSHUFFLE if shuffle == "bitshuffle" else plugin.Blosc.NOSHUFFLE
            filters = plugin.Blosc(cname=name, clevel=level, shuffle=how)
            one[f"HDF5 blosc {name} {level} {shuffle}, 1-frame chunks"] = lambda p, filters=filters: hdf5(
                p, episodes, 1, compression=filters
            )
    contenders = {
        name: make(folder / (STORE if name == "store" else f"{i}.mp4")) for i, (name, make) in enumerate(one.items())
    }
    joined = np.concatenate(episodes)
    rows = np.random.default_rng(2).integers(0, len(joined), 32)
    for name, contender in contenders.items():
        if not name.startswith("mp4"):
            np.testing.assert_array_equal(contender.read(rows), joined[rows], err_msg=name)
    rates = measure({name: c.read for name, c in contenders.items()}, len(joined), rounds, seconds)
    own = rates["store"]
    result: dict[str, Any] = {}
    for name, contender in contenders.items():
        ratios = [a / b for a, b in zip(own, rates[name], strict=True)]
        result[name] = summary(rates[name], contender.size / len(joined)) | {
            "store_is_times_as_fast": [round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios))],
            "store_is_times_the_size": round(contenders["store"].size / contender.size, 3),
        }
        contender.close()
    store = EpisodeStore(folder / STORE)
    result["store, 2 threads"] = summary(two_threads(store, len(joined), rounds, seconds))
    codec: Any = store.array(NAME).compressors[0]
    result["store_codec"] = f"blosc {codec.cname.value} {codec.clevel} {codec.shuffle.value}"
    return result


def sequential(folder: Path, episodes: list[np.ndarray], rounds: int, seconds: float) -> dict[str, Any]:
    """Whole passes, 256 frames at a time: the store, and its former layout (lz4, 200 kB chunks) read by Zarr."""
    from zarr.codecs import BloscCodec

    store = EpisodeStore(folder / STORE)
    row_bytes = int(np.prod(episodes[0].shape[1:]))
    chunk = 1 << max(0, int(np.log2(200_000 / row_bytes)))
    lz4 = BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle", typesize=1, blocksize=chunk * row_bytes)
    before = zarr_array(folder / "before", episodes, lz4, chunk, 6_400_000)
    frames = store.num_frames
    starts = list(range(0, frames, BATCH))

    def passes(read: Callable[[int, int], Any]) -> Read:
        return lambda rows: read(s := starts[int(rows[0]) % len(starts)], min(s + BATCH, frames))

    reads = {
        "store": passes(lambda start, stop: store.frames("side", start, stop)),
        "before": passes(lambda start, stop: np.asarray(before[start:stop])),
    }
    return {name: summary(rates) for name, rates in measure(reads, frames, rounds, seconds).items()}


def two_threads(store: EpisodeStore, frames: int, rounds: int, seconds: float) -> list[float]:
    """Frames/s of two threads that read from one store at once, together."""
    rates = []
    for number in range(rounds):
        counts = [0, 0]
        end = time.perf_counter() + seconds

        def work(which: int, number: int = number, counts: list[int] = counts, end: float = end) -> None:
            rng = np.random.default_rng([number, which])
            while time.perf_counter() < end:
                store.read_rows(NAME, rng.integers(0, frames, BATCH))
                counts[which] += BATCH

        workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(sum(counts) / (time.perf_counter() - start))
    return rates


def layouts(row_bytes: int) -> Iterator[tuple[str, Any, int, int, Any]]:
    """(name, codec, frames per chunk, bytes per shard, decode)."""
    from zarr.codecs import BloscCodec, ZstdCodec

    def lz4(frames: int) -> Any:
        return BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=1, blocksize=frames * row_bytes)

    for chunk in (1, 2, 4, 8):
        yield f"blosc lz4 5 bitshuffle, chunk {chunk}", lz4(chunk), chunk, 25_600_000, read_frames.decode
    for megabytes in (1.6, 6.4):
        yield f"blosc lz4 5 bitshuffle, shard {megabytes} MB", lz4(1), 1, int(megabytes * 1e6), read_frames.decode
    yield "zstd 1", ZstdCodec(level=1), 1, 25_600_000, zstd
    yield "zstd 3", ZstdCodec(level=3), 1, 25_600_000, zstd
    blosc_codecs: list[tuple[Any, int, Any]] = [
        ("lz4", 5, "noshuffle"),
        ("lz4hc", 3, "noshuffle"),
        ("lz4hc", 6, "noshuffle"),
        ("zstd", 1, "noshuffle"),
        ("zstd", 1, "shuffle"),
        ("zstd", 1, "bitshuffle"),
        ("zstd", 3, "bitshuffle"),
        ("zstd", 5, "noshuffle"),
    ]
    for name, level, shuffle in blosc_codecs:
        typesize = 3 if shuffle == "shuffle" else 1
        codec = BloscCodec(cname=name, clevel=level, shuffle=shuffle, typesize=typesize, blocksize=row_bytes)
        yield f"blosc {name} {level} {shuffle}", codec, 1, 25_600_000, read_frames.decode


def matrix(folder: Path, episodes: list[np.ndarray], rounds: int, seconds: float) -> dict[str, Any]:
    """Layouts with our reader, and the other readers on three of the layouts."""
    reads: dict[str, Read] = {}
    sizes: dict[str, float] = {}
    written: dict[str, float] = {}
    frames = sum(map(len, episodes))
    for number, (name, codec, chunk, shard_bytes, decode) in enumerate(layouts(int(np.prod(episodes[0].shape[1:])))):
        path = folder / f"layout_{number}"
        start = time.perf_counter()
        array = zarr_array(path, episodes, codec, chunk, shard_bytes)
        written[name] = frames / (time.perf_counter() - start)
        sizes[name], reads[name] = disk(path) / frames, shards(array, path, decode)
        if name in ("blosc lz4 5 bitshuffle, chunk 1", "blosc lz4 5 bitshuffle, chunk 4", "zstd 1"):
            reads[f"{name}: zarr-python"] = zarr_read(path, "zarr.core.codec_pipeline.BatchedCodecPipeline")
            for reader, make in (
                ("zarrs", lambda path=path: zarr_read(path, "zarrs.ZarrsCodecPipeline")),
                ("tensorstore", lambda path=path: tensorstore(path)),
            ):
                try:
                    reads[f"{name}: {reader}"] = make()
                except ImportError:
                    print(f"{reader} is not installed and not measured")
    rates = measure(reads, frames, rounds, seconds)
    result = {name: summary(values, sizes.get(name, 0)) for name, values in rates.items()}
    for name, rate in written.items():
        result[name]["written_frames_per_s"] = round(rate)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[84, 224])
    parser.add_argument("--sequential-sizes", type=int, nargs="*", default=[64], help="of these only whole passes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each contender in each round")
    parser.add_argument("--no-matrix", dest="matrix", action="store_false")
    parser.add_argument("--cache", type=Path, help="keeps rendered pictures here for the next run")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"batch": BATCH, "frames": EPISODES * 51, "load_at_start": os.getloadavg()[0]}
    for size in [*arguments.sequential_sizes, *arguments.sizes]:
        clean = pictures(size, arguments.cache)
        for kind, episodes in (("clean", clean), ("noisy", noisy(clean))):
            folder = Path(tempfile.mkdtemp(prefix="frame_reads_"))
            try:
                case = figures[f"{size}x{size} {kind}"] = {}
                if size not in arguments.sizes:
                    write_ours(folder / STORE, episodes)
                    case["sequential"] = sequential(folder, episodes, arguments.rounds, arguments.seconds)
                    print(json.dumps(case["sequential"], indent=1), flush=True)
                    continue
                case["comparison"] = comparison(folder, episodes, arguments.rounds, arguments.seconds)
                case["sequential"] = sequential(folder, episodes, arguments.rounds, arguments.seconds)
                print(json.dumps(case["sequential"], indent=1), flush=True)
                print(json.dumps({f"{size} {kind}": case["comparison"]}, indent=1), flush=True)
                if arguments.matrix:
                    case["layouts"] = matrix(
                        folder, episodes[:MATRIX], max(3, arguments.rounds // 2), arguments.seconds / 2
                    )
                    print(json.dumps(case["layouts"], indent=1), flush=True)
            finally:
                shutil.rmtree(folder)
    if not arguments.dry:
        write_result("frame_reads", figures)


if __name__ == "__main__":
    main()
