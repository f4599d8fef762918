"""robomimic HDF5: one group `data/demo_<i>` per episode (https://robomimic.github.io/docs/datasets/overview.html).

`dones` is set where the task itself ended the episode and nowhere else, so that a cut episode keeps its bootstrap.
`next_obs` is written for the demos whose final observation is known.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.datasets.episode import blocks_of
from embodied.datasets.new_hdf5 import new_hdf5
from embodied.datasets.outgoing import LeftOut, Outgoing, Progress, Steps, check_export_options, choice

ROBOSUITE, GYM = 1, 2  # robomimic's EnvType


def write(outgoing: Outgoing, path: Path, options: Mapping[str, Any], progress: Progress) -> list[LeftOut]:
    """Write one HDF5 file.

    Options:
        compress: `none` or `gzip`, for pictures.
        next_obs: `all`; `vectors` leaves the cameras out there, which halves the file; `none`.

    Raises:
        InputError: no actions.
    """
    check_export_options("robomimic", options, ("compress", "next_obs"))
    compression = choice("robomimic", options, "compress", ("none", "gzip"))
    next_obs = choice("robomimic", options, "next_obs", ("all", "vectors", "none"))
    outgoing.require_actions("robomimic")
    with new_hdf5(path) as (file, check):
        data = file.create_group("data")
        data.attrs["total"] = int(outgoing.counts.sum())
        data.attrs["env_args"] = json.dumps(_env_args(outgoing))
        for steps in outgoing.episodes():
            demo = data.create_group(f"demo_{steps.number}")
            _write_demo(outgoing, demo, steps, None if compression == "none" else compression, next_obs, check)
            check()
            progress(steps.number + 1, outgoing.store.num_episodes, "exporting")
        for name, numbers in _filter_keys(outgoing).items():
            file[f"mask/{name}"] = np.array([f"demo_{number}" for number in numbers], dtype="S")
    return _left_out(outgoing, next_obs)


def _write_demo(
    outgoing: Outgoing, demo: Any, steps: Steps, compression: str | None, next_obs: str, check: Callable[[], None]
) -> None:
    episode, count = steps.episode, steps.count
    demo.attrs["num_samples"] = count
    if episode.success is not None:
        demo.attrs["success"] = episode.success
    if episode.instruction:
        demo.attrs["instruction"] = episode.instruction.replace("\0", "")  # HDF5 has no such text
    assert episode.action is not None
    demo["actions"] = episode.action[:count]
    demo["dones"] = np.arange(count) == (count - 1 if steps.terminated else count)
    if steps.reward is not None:
        demo["rewards"] = steps.reward
    with_next = steps.has_final and next_obs != "none"
    for group in ("obs", "next_obs") if with_next else ("obs",):
        demo.create_group(group, track_order=True)  # keys in the store's order
    for key, array in episode.observations.items():
        demo[f"obs/{key}"] = array[:count]
        if with_next:
            demo[f"next_obs/{key}"] = array[1 : count + 1]
    for key in ("states", "state"):
        if key in episode.observations and outgoing.spec.observations[key].privileged:
            demo["states"] = episode.observations[key][:count]  # where robomimic's playback looks for them
            break
    for camera, spec in outgoing.spec.images.items():
        targets = [(demo, f"obs/{camera}", 0)]
        if with_next and next_obs == "all":
            targets.append((demo, f"next_obs/{camera}", 1))
        datasets = [
            (
                group.create_dataset(
                    name, (count, *spec.shape), "uint8", chunks=(1, *spec.shape), compression=compression
                ),
                first,
            )
            for group, name, first in targets
        ]
        for row, block in _numbered(blocks_of(outgoing.pictures(steps, camera))):
            for dataset, first in datasets:
                # Row r of the episode is row r - first of the dataset.
                begin, end = max(0, first - row), min(len(block), count + first - row)
                if end > begin:
                    dataset[row + begin - first : row + end - first] = block[begin:end]
            check()


def _numbered(blocks: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Each block with the number of its first row."""
    row = 0
    for block in blocks:
        yield row, block
        row += len(block)


def _env_args(outgoing: Outgoing) -> dict[str, Any]:
    """Of the robomimic file that the store was read from, else made from the spec."""
    kept = outgoing.attributes.get("env_args")
    if isinstance(kept, dict) and "env_name" in kept:
        return kept
    spec = outgoing.spec
    rate = 1.0 / spec.control_dt if spec.control_dt else 0.0
    near = round(rate)
    return {
        "env_name": spec.environment,
        "type": ROBOSUITE if "robosuite" in spec.environment else GYM,
        "env_kwargs": {"control_freq": near if abs(rate - near) < 1e-9 * rate else rate} if rate else {},
    }


def _filter_keys(outgoing: Outgoing) -> dict[str, list[int]]:
    """`mask/<name>` -> episodes, where the numbers of the source's demos can be told from those of the store."""
    kept = outgoing.attributes.get("filter_keys")
    provenance = outgoing.store.attributes.get("provenance", {})
    if not isinstance(kept, dict) or provenance.get("made_by") != "data import":
        return {}
    skipped = {finding.episode for finding in outgoing.store.findings if finding.check == "episode-left-out"}
    in_source = [i for i in range(outgoing.store.num_episodes + len(skipped)) if i not in skipped]
    number = {source: index for index, source in enumerate(in_source)}
    return {name: [number[i] for i in episodes if i in number] for name, episodes in kept.items()}


def _left_out(outgoing: Outgoing, next_obs: str) -> list[LeftOut]:
    spec, store, found = outgoing.spec, outgoing.store, []
    finals = int(outgoing.has_final.sum())
    if finals and next_obs == "none":
        found.append(LeftOut(f"final observations of {finals} episodes", "next_obs=none"))
    elif finals and next_obs == "vectors" and spec.images:
        found.append(LeftOut(f"final pictures of {finals} episodes", "next_obs=vectors"))
    if 0 < finals < store.num_episodes and next_obs != "none":
        count = store.num_episodes - finals
        found.append(LeftOut(f"next_obs of {count} demos", "no final observation was recorded; robomimic wants it"))
    terminated = np.array([store.read("terminated")[a : a + n].any() for a, n in _bounds(outgoing)])
    if failures := int((terminated & (store.success == 0)).sum()):
        found.append(
            LeftOut(f"termination of {failures} failures", "a failed demo's last done is read as its end only")
        )
    if store.read("timestamp").any() and not _regular(outgoing):
        found.append(LeftOut("timestamps as recorded", "robomimic has none; steps are control_freq apart"))
    holds = {"environment", "success", "instruction"} | ({"control_dt"} if spec.control_dt else set())
    return found + outgoing.left_out(holds, "robomimic")


def _bounds(outgoing: Outgoing) -> Iterator[tuple[int, int]]:
    return zip(outgoing.store.episode_start.tolist(), outgoing.store.episode_length.tolist(), strict=True)


def _regular(outgoing: Outgoing) -> bool:
    """Whether the timestamps are step * control period."""
    times = outgoing.store.read("timestamp")
    return all(np.allclose(times[a : a + n], np.arange(n) * outgoing.spec.control_dt) for a, n in _bounds(outgoing))
