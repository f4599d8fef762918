"""What drawing batches costs: beside an IQL step, of windows, goals and segments, and of random frames.

    python benchmarks/sampling.py

- `transitions`: batches of 256 of 1,000,000 transitions (observation 11, action 3) resident on the CPU, beside an IQL
  update (two layers of 256), taken in turns; per step over blocks of 64 steps, since indices are drawn for 64 at once.
- `draws`: microseconds per batch of 256 rows from 2,000 episodes of 500 rows; n-step and statistics of all in seconds.
- `frames`: milliseconds to read the frames of one ICVF batch (64 of s, s', g, z) out of 20,000 frames of 64x64 with
  all, half, a quarter and none of them kept decoded in memory.
- `prefetch`: milliseconds per ICVF update with the batch made before it and in the background, taken in turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result

from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.goals import GoalSampler
from embodied.datasets.prefetch import Prefetcher
from embodied.datasets.resident import STEPS_AT_ONCE, ResidentFrames, ResidentTransitions
from embodied.datasets.statistics import array_statistics
from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import TransitionIndex, n_step
from embodied.datasets.windows import Runs, SegmentSampler, window_rows
from embodied.datasets.write_store import StoreWriter
from embodied.policies.icvf import ICVF, ICVFConfig, gather
from embodied.policies.iql import IQL, PRESETS
from embodied.policies.networks import EncoderConfig
from embodied.policies.train import TransitionData

N, EPISODE = 1_000_000, 500
FRAMES, SIDE = 20_000, 64
BYTES = FRAMES * SIDE * SIDE * 3


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], scale: float) -> dict[str, float]:
    low, median, high = np.quantile(np.array(values) * scale, [0.25, 0.5, 0.75])
    return {"median": round(float(median), 4), "q25": round(float(low), 4), "q75": round(float(high), 4)}


def episodes(count: int, length: int) -> Runs:
    return Runs(np.arange(count) * length, np.full(count, length))


def transitions(blocks: int, seeds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    frame = np.flatnonzero(np.arange(N + N // EPISODE) % (EPISODE + 1) < EPISODE)
    rows = frame[-1] + 2
    data = TransitionData(
        observations=rng.normal(size=(rows, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        frame=frame,
        next_frame=frame + 1,
        reward=rng.normal(size=N).astype(np.float32),
        masks=np.ones(N, np.float32),
    )
    config, numbers = PRESETS["learned-reward"], list(range(seeds))
    batches = ResidentTransitions(data, data.reward, numbers, config.batch_size)
    learner = IQL(config, numbers, 11, 3, 1_000_000)
    draws, updates = [], []
    for block in range(blocks + 1):
        draw = update = 0.0
        for step in range(block * STEPS_AT_ONCE, (block + 1) * STEPS_AT_ONCE):
            start = time.perf_counter()
            batch = batches(step)
            middle = time.perf_counter()
            learner.update(batch)
            draw, update = draw + middle - start, update + time.perf_counter() - middle
        if block:  # the first warms up
            draws.append(draw / STEPS_AT_ONCE)
            updates.append(update / STEPS_AT_ONCE)
    return {
        "transitions": N,
        "seeds": seeds,
        "batch_us": spread(draws, 1e6),
        "update_us": spread(updates, 1e6),
        "share_of_update": round(float(np.median(np.array(draws) / updates)), 5),
    }


def draws(rounds: int) -> dict[str, Any]:
    runs = episodes(N // EPISODE, EPISODE)
    rng = np.random.default_rng(0)
    some = [rng.integers(N, size=256) for _ in range(rounds)]
    goals, segments = GoalSampler(runs), SegmentSampler(runs, 50)
    kinds: dict[str, Callable[[int], Any]] = {
        "stack_of_4": lambda k: window_rows(runs, some[k], range(-3, 1)),
        "chunk_of_16": lambda k: window_rows(runs, some[k], range(16)),
        "icvf_goals": lambda k: goals.sample(k, 256),
        "segments_of_50": lambda k: segments.sample(k, 256),
        "segments_of_50_stratified": lambda k: segments.stratified(k, 256),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for k in range(rounds):
        for name, work in kinds.items():
            times[name].append(seconds(lambda: work(k)))  # noqa: B023 (called at once)
    frame = np.flatnonzero(np.arange(N) % EPISODE < EPISODE - 1)
    ones = np.ones(len(frame), np.float32)
    index = TransitionIndex(frame, frame + 1, ones, ones, frame // EPISODE)
    table = rng.normal(size=(N, 14)).astype(np.float32)
    figures: dict[str, Any] = {f"{name}_us": spread(values, 1e6) for name, values in times.items()}
    figures["five_step_of_1e6_s"] = spread([seconds(lambda: n_step(index, 5, 0.99)) for _ in range(5)], 1)
    for name, quantiles in (("statistics", True), ("moments_only", False)):
        found = [seconds(lambda: array_statistics(table, quantiles)) for _ in range(5)]  # noqa: B023
        figures[f"{name}_of_1e6_x_14_s"] = spread(found, 1)
    return figures


def frame_store(path: Path) -> EpisodeStore:
    """Pictures with an edge that moves, a colour per episode and sensor noise of one unit."""
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(SIDE), np.arange(SIDE))[..., None]
    writer = StoreWriter(path, DatasetSpec({}, {"side": ArraySpec((SIDE, SIDE, 3), "uint8")}, None), {})
    length = 200
    for episode in range(FRAMES // length):
        frames = rng.integers(-1, 2, (length, SIDE, SIDE, 3)) + slope + rng.integers(0, 100, 3)
        for t in range(length):
            frames[t, 20:30, t // 4 : t // 4 + 10] = (200, 40, 30)
        no = np.zeros(length, bool)
        pictures = frames.clip(0, 255).astype(np.uint8)
        writer.write_episode(episode, Episode({}, {"side": pictures}, None, no, no, no, np.arange(length) * 0.1))
    return writer.finish(FRAMES // length)


def frames(store: EpisodeStore, rounds: int) -> dict[str, Any]:
    sampler = GoalSampler(store)
    shares = (1.0, 0.5, 0.25, 0.0)
    caches = {f"{100 * share:.0f}_percent_kept": ResidentFrames(store, "side", int(share * BYTES)) for share in shares}
    times: dict[str, list[float]] = {name: [] for name in caches}
    counts = []
    for step in range(rounds):
        rows = np.unique(np.concatenate(list(sampler.sample(step, 64).values())))
        counts.append(float(len(rows)))
        for name, cache in caches.items():
            times[name].append(seconds(lambda: cache[rows]))  # noqa: B023 (called at once)
    return {"frames_per_batch": spread(counts, 1)} | {f"{k}_ms": spread(v, 1e3) for k, v in times.items()}


def prefetch(store: EpisodeStore, rounds: int) -> dict[str, Any]:
    """Rounds of ten updates each way."""
    sampler = GoalSampler(store)
    memory, none = ResidentFrames(store, "side"), ResidentFrames(store, "side", limit=0)
    figures = {}
    for name, source, crop_pad in (("kept", memory, 0), ("kept_and_cropped", memory, 4), ("none_kept", none, 0)):
        config = ICVFConfig(encoder=EncoderConfig((SIDE, SIDE)), crop_pad=crop_pad)
        learner = ICVF(config, 0)

        def load(step: int) -> dict[str, Any]:
            rng = np.random.default_rng(step)
            return gather(source, sampler.sample(step, 64), crop_pad, rng)  # noqa: B023

        before, ahead = [], []
        for number in range(rounds + 1):
            steps = range(10 * number, 10 * number + 10)
            start = time.perf_counter()
            for step in steps:
                learner.update(load(step))
            middle = time.perf_counter()
            with Prefetcher(load, steps.stop) as batches:
                for step in steps:
                    learner.update(batches(step))
            if number:
                before.append((middle - start) / 10)
                ahead.append((time.perf_counter() - middle) / 10)
        figures[name] = {
            "before_ms": spread(before, 1e3),
            "ahead_ms": spread(ahead, 1e3),
            "speedup": round(float(np.median(np.array(before) / ahead)), 3),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="repetitions of each comparison")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = frame_store(Path(folder) / "store")
        figures = {
            "transitions": [transitions(rounds, seeds) for seeds in (1, 5)],
            "draws": draws(10 * rounds),
            "frames": frames(store, 5 * rounds),
            "prefetch": prefetch(store, max(3, rounds // 2)),
        }
    write_result("sampling", figures)


if __name__ == "__main__":
    main()
