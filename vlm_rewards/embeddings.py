"""Image embeddings of a store's frames, made once per model, camera and transform, and kept beside the frames.

The encoder is nearly all the cost of a CLIP label. Another prompt, baseline or regularization reads the embeddings and
never runs it again.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from embodied.contracts.errors import ConfigError, InputError, StoreError
from embodied.contracts.provenance import hash_json, provenance
from embodied.datasets.frame_sets import FrameSetWriter
from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards.clip_encoder import ClipEncoder
from embodied.vlm_rewards.ranks import rank_and_world, wait_for_all

KIND = "embeddings"
BLOCK = 256  # frames per staged block; a multiple of every encoder's forward pass, so that passes always start alike
Progress = Callable[[int, int, str], None]


def frame_embeddings(
    store: EpisodeStore,
    camera: str,
    encoder: ClipEncoder,
    load: dict[str, Any],
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of every frame of a camera: read where the store has them, made and kept where it has not.

    A killed call continues at the first missing block, and the result has the same bytes for any number of workers.
    Memory is bounded by one forward pass per worker, and the result.

    Args:
        encoder: this process's own.
        load: arguments of `ClipEncoder` for other processes.
        workers: processes with one torch thread each, on a CPU. On GPUs start the command with torchrun instead: every
            rank takes its share of the blocks.

    Returns:
        (F, D) float32 unit vectors, and (F,) bool: False where a frame cannot be decoded; its vector is zero.

    Raises:
        InputError: no such camera, or one that some episodes have no pictures of.
    """
    name = embedding_name(store, camera, encoder)
    wait_for_all()  # every rank has looked whether its output is free before one of them writes
    if name not in store.group_names(KIND):
        _embed(store, camera, encoder, load, workers, progress)
    arrays, _ = store.frame_set(KIND, name)
    return arrays["vector"], arrays["valid"] > 0


def require_pictures(store: EpisodeStore, camera: str) -> None:
    """Raise InputError where the camera is unknown or some episodes have no pictures of it: they would be black."""
    missing = ~store.has_camera(camera)
    if missing.any():
        raise InputError(
            f"{store.path}: {int(missing.sum())} of {store.num_episodes} episodes have no pictures of '{camera}', "
            f"first episode {int(np.argmax(missing))}.\nLeave them out: "
            f"embodied data filter {store.path} NEW_STORE --where \"has_camera('{camera}')\""
        )


def embedding_name(store: EpisodeStore, camera: str, encoder: ClipEncoder) -> str:
    """`<camera>-<hash>` over everything that decides an embedding. Raises InputError as `frame_embeddings`."""
    require_pictures(store, camera)
    return f"{camera}-{hash_json(encoder.identity)[:16]}"


def _embed(
    store: EpisodeStore,
    camera: str,
    encoder: ClipEncoder,
    load: dict[str, Any],
    workers: int,
    progress: Progress | None,
) -> None:
    rank, world = rank_and_world()
    if workers < 1 or (workers > 1 and (world > 1 or torch.device(load["device"]).type != "cpu")):
        raise ConfigError(f"workers is {workers}; more than 1 are for CPUs. On several GPUs start with torchrun.")
    writer = _writer(store, camera, encoder)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        started = [
            context.Process(target=_work, args=(store.path, camera, load, number, workers), daemon=True)
            for number in range(1, workers)
        ]
        for process in started:
            process.start()
        _fill(writer, store, camera, encoder, 0, workers, progress)
        for process in started:
            process.join()
            if process.exitcode:
                raise StoreError(f"A worker ended with code {process.exitcode}. Run the command again: it goes on.")
    else:
        _fill(writer, store, camera, encoder, rank, world, progress)
    wait_for_all()
    if rank == 0:
        writer.finish()
    wait_for_all()


def _work(path: str, camera: str, load: dict[str, Any], number: int, workers: int) -> None:
    """One worker process: its share of the blocks, and no finish."""
    torch.set_num_threads(1)
    store, encoder = EpisodeStore(path), ClipEncoder(**load)
    _fill(_writer(store, camera, encoder), store, camera, encoder, number, workers, None)


def _writer(store: EpisodeStore, camera: str, encoder: ClipEncoder) -> FrameSetWriter:
    config = {**encoder.identity, "camera": camera}
    record = provenance("embed frames", config, {"dataset": store.fingerprint})
    record["dataset_fingerprint"] = store.fingerprint
    return FrameSetWriter(store, KIND, embedding_name(store, camera, encoder), record, ("config",), BLOCK)


def _fill(
    writer: FrameSetWriter,
    store: EpisodeStore,
    camera: str,
    encoder: ClipEncoder,
    share: int,
    shares: int,
    progress: Progress | None,
) -> None:
    """Embed the missing blocks of one share, decoding the next frames while the encoder is at work."""
    todo = [(index, start, stop) for index, start, stop in writer.blocks() if index % shares == share]
    groups = [
        (index, first, min(first + encoder.forward, stop))
        for index, start, stop in todo
        for first in range(start, stop, encoder.forward)
    ]
    ends = {index: stop for index, _, stop in todo}
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    done = 0
    for (index, first, stop), (pixels, valid) in zip(groups, _prepared(store, camera, encoder, groups), strict=True):
        vectors = encoder.encode(pixels)
        vectors[~valid] = 0.0
        parts.append((vectors, valid.astype(np.float32)))
        done += stop - first
        if stop == ends[index]:
            vector, good = (np.concatenate(column) for column in zip(*parts, strict=True))
            writer.write_arrays(index, vector=vector, valid=good)
            parts.clear()
            if progress:
                progress(min(store.num_frames, done * shares), store.num_frames, "frames embedded")


def _prepared(
    store: EpisodeStore, camera: str, encoder: ClipEncoder, groups: list[tuple[int, int, int]]
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Pixels and validity of each group, one ahead of what is asked for."""

    def prepare(group: tuple[int, int, int]) -> tuple[torch.Tensor, np.ndarray]:
        frames, valid = readable_frames(store, camera, group[1], group[2])
        return encoder.prepare(frames), valid

    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for group in groups:
            ahead = thread.submit(prepare, group)
            if waiting is not None:
                yield waiting.result()
            waiting = ahead
        if waiting is not None:
            yield waiting.result()


def readable_frames(store: EpisodeStore, camera: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames, and which of them could be decoded; those that could not are black."""
    try:
        return store.frames(camera, start, stop), np.ones(stop - start, bool)
    except StoreError:
        frames = np.zeros((stop - start, *store.spec.images[camera].shape), np.uint8)
        valid = np.zeros(stop - start, bool)
        for row in range(stop - start):
            try:
                frames[row] = store.frames(camera, start + row, start + row + 1)[0]
                valid[row] = True
            except StoreError:
                continue
        return frames, valid
