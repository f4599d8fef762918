"""Minari local dataset: `OUT/data/main_data.hdf5` and `OUT/data/metadata.json`, as Minari 0.5 writes and reads them.

Minari wants N + 1 observations for N actions. An episode without a final observation gives up its last action, or, with
`missing_final=repeat`, gets its last observation twice. Pictures are PNG where Minari itself would write JPEG: its
reader takes either, and PNG loses nothing. The task's words become a text observation, success `infos/success`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ArraySpec
from embodied.datasets.lerobot_files import png
from embodied.datasets.new_hdf5 import new_hdf5
from embodied.datasets.outgoing import (
    LeftOut,
    Outgoing,
    Progress,
    Steps,
    check_export_options,
    choice,
    single_pictures,
)

INSTRUCTION, SUCCESS = "instruction", "info_success"
VERSION = "0.5.3"  # of Minari, whose layout this is
IDENTIFIER = re.compile(r"([-_\w]+/)*[-_\w]+-v\d+")
PICTURE_SIDE = 32  # below it Minari takes a uint8 box for something else than a picture


def write(outgoing: Outgoing, path: Path, options: Mapping[str, Any], progress: Progress) -> list[LeftOut]:
    """Write a dataset folder.

    Options:
        id: Minari's name of the dataset, `namespace/name-v0`; by default from the name of the folder.
        missing_final: `drop` or `repeat`, for episodes without a final observation.
        reward: `zero` writes zeros where the store has no reward.

    Raises:
        InputError: no actions, no reward, or no episode of two rows.
        ConfigError: not an id that Minari takes.
        MissingExtraError: pictures without Pillow.
    """
    check_export_options("minari", options, ("id", "missing_final", "reward"))
    missing = choice("minari", options, "missing_final", ("drop", "repeat"))
    outgoing.require_actions("minari")
    outgoing.require_reward("minari", options)
    identifier = _identifier(options, path)
    if not _observed(outgoing):
        raise InputError(f"{outgoing.store.path} has privileged observations only; minari needs one that is not.")
    cut = ~outgoing.has_final if missing == "drop" else np.zeros(len(outgoing.counts), bool)
    counts = outgoing.counts - cut
    if not counts.any():
        raise InputError(
            f"{outgoing.store.path}: no episode has a step with a final observation, which minari needs.\n"
            "Repeat the last observation: --options missing_final repeat"
        )
    data = path / "data"
    data.mkdir(parents=True)
    with new_hdf5(data / "main_data.hdf5", track_order=True) as (file, check):
        number = 0
        for steps in outgoing.episodes():
            if counts[steps.number]:
                group = file.create_group(f"episode_{number}")
                group.attrs["id"] = number
                _write_episode(outgoing, group, steps, int(counts[steps.number]), check)
                number += 1
            progress(steps.number + 1, outgoing.store.num_episodes, "exporting")
    metadata = _metadata(outgoing, identifier) | {
        "total_episodes": number,
        "total_steps": int(counts.sum()),
        "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1),
    }
    (data / "metadata.json").write_text(json.dumps(metadata))
    return _left_out(outgoing, counts, cut, missing)


def _write_episode(outgoing: Outgoing, group: Any, steps: Steps, count: int, check: Callable[[], None]) -> None:
    episode = steps.episode
    group.attrs["total_steps"] = count
    assert episode.action is not None
    group["actions"] = episode.action[:count]
    group["rewards"] = np.zeros(count, np.float32) if steps.reward is None else steps.reward[:count]
    last = np.arange(count) == count - 1
    terminated = steps.terminated and count == steps.count  # else the step that ended the task is not here
    group["terminations"] = last & terminated
    group["truncations"] = last & (not terminated)
    single = _single(outgoing)
    rows = np.minimum(np.arange(count + 1), len(episode) - 1)
    for key, spec in outgoing.spec.observations.items():
        name = f"infos/{key.removeprefix('info_')}" if spec.privileged else f"observations/{key}"
        group["observations" if key == single else name] = episode.observations[key][rows]
    if _has_instruction(outgoing):
        texts = np.full(count + 1, episode.instruction.replace("\0", ""), object)  # HDF5 has no such text
        group.create_dataset(f"observations/{INSTRUCTION}", data=texts, dtype=h5py.string_dtype())
    if episode.success is not None and SUCCESS not in outgoing.spec.observations:
        group["infos/success"] = (np.arange(count + 1) == count) & episode.success
    for camera, spec in outgoing.spec.images.items():
        name = "observations" if camera == single else f"observations/{camera}"
        pictures = single_pictures(outgoing.pictures(steps, camera), count + 1)
        _write_pictures(group, name, pictures, spec, count + 1, check)
    check()


def _write_pictures(
    group: Any, name: str, pictures: Iterator[np.ndarray], spec: ArraySpec, rows: int, check: Callable[[], None]
) -> None:
    encoded = min(spec.shape[:2]) >= PICTURE_SIDE
    shape, dtype = ((rows,), h5py.vlen_dtype(np.uint8)) if encoded else ((rows, *spec.shape), np.dtype("uint8"))
    dataset = group.create_dataset(name, shape, dtype, chunks=None if encoded else (1, *spec.shape))
    row = -1
    for row, picture in enumerate(pictures):
        dataset[row] = np.frombuffer(png(picture, "Writing pictures for minari"), np.uint8) if encoded else picture
        check()
    for missing in range(row + 1, rows):  # the repeated final observation
        dataset[missing] = dataset[row]


def _has_instruction(outgoing: Outgoing) -> bool:
    """Whether the task's words are written as an observation: Minari has no other place for them."""
    return any(outgoing.store.instructions) and INSTRUCTION not in outgoing.spec.observations


def _single(outgoing: Outgoing) -> str | None:
    """The only observation where it is called as readers call an unnamed one: its space is a Box, no Dict."""
    keys = _observed(outgoing)
    return keys[0] if keys in (["observation"], ["image"]) and not _has_instruction(outgoing) else None


def _observed(outgoing: Outgoing) -> list[str]:
    """Keys and cameras that are observations in Minari; privileged ones are infos."""
    spec = outgoing.spec
    return [*(key for key, array in spec.observations.items() if not array.privileged), *spec.images]


def _metadata(outgoing: Outgoing, identifier: str) -> dict[str, Any]:
    spec = outgoing.spec
    assert spec.action is not None
    spaces = {key: _box(array) for key, array in spec.observations.items() if not array.privileged}
    spaces |= {camera: _box(array) for camera, array in spec.images.items()}
    single = _single(outgoing)
    if _has_instruction(outgoing):
        characters = "".join(sorted(set("".join(outgoing.store.instructions))))
        longest = max(map(len, outgoing.store.instructions))
        spaces[INSTRUCTION] = {"type": "Text", "max_length": longest, "min_length": 0, "charset": characters}
    space = _dict_space(spaces) if single is None else spaces[single]
    kept = outgoing.attributes.get("metadata")
    kept = kept if isinstance(kept, dict) else {}
    return {key: kept[key] for key in ("algorithm_name", "code_permalink") if isinstance(kept.get(key), str)} | {
        "dataset_id": identifier,
        "minari_version": VERSION,
        "data_format": "hdf5",
        "observation_space": json.dumps(space),
        "action_space": json.dumps(_box(spec.action)),
    }


def _dict_space(spaces: Mapping[str, Any]) -> dict[str, Any]:
    """Gymnasium's Dict; a slash in a key makes a Dict in it, as it makes a group in HDF5."""
    root: dict[str, Any] = {"type": "Dict", "subspaces": {}}
    for key, space in sorted(spaces.items()):
        *groups, name = key.split("/")
        node = root
        for group in groups:
            node = node["subspaces"].setdefault(group, {"type": "Dict", "subspaces": {}})
        node["subspaces"][name] = space
    return root


def _box(spec: ArraySpec) -> dict[str, Any]:
    """Gymnasium's Box as Minari serialises it; unknown bounds are infinite."""
    shape = spec.shape
    picture = spec.dtype == "uint8"
    low = np.broadcast_to(np.array(spec.low or (0 if picture else -np.inf), float), shape)
    high = np.broadcast_to(np.array(spec.high or (255 if picture else np.inf), float), shape)
    dtype = "uint8" if picture else "float32"
    kind = int if picture else float
    return {
        "type": "Box",
        "dtype": dtype,
        "shape": list(shape),
        "low": low.astype(kind).tolist(),
        "high": high.astype(kind).tolist(),
    }


def _identifier(options: Mapping[str, Any], path: Path) -> str:
    if "id" in options:
        if not IDENTIFIER.fullmatch(str(options["id"])):
            raise ConfigError(f"minari: '{options['id']}' is no dataset id; it must look like namespace/name-v0.")
        return str(options["id"])
    name = path.name.removesuffix(".export-partial")
    name = re.sub(r"[^-_\w]", "-", name)
    return name if IDENTIFIER.fullmatch(name) else f"{name}-v0"


def _left_out(outgoing: Outgoing, counts: np.ndarray, cut: np.ndarray, missing: str) -> list[LeftOut]:
    spec, store, found = outgoing.spec, outgoing.store, []
    if cut.any():
        found.append(LeftOut(f"last action of {int(cut.sum())} episodes", "no final observation was recorded after it"))
        starts, stops = store.episode_start, store.episode_start + store.episode_length
        terminated = store.read("terminated")
        ended = sum(bool(terminated[a:b].any()) for a, b in zip(starts[cut], stops[cut], strict=True))
        if ended:
            found.append(LeftOut(f"termination of {ended} episodes", "their terminal step was that last action"))
    elif missing == "repeat" and not outgoing.has_final.all():
        count = int((~outgoing.has_final).sum())
        found.append(LeftOut(f"absence of final observations in {count} episodes", "the last one is repeated there"))
    if dropped := int((counts == 0).sum()):
        found.append(LeftOut(f"{dropped} episodes of a single row", "minari needs two observations"))
    infos = [key for key, array in spec.observations.items() if array.privileged]
    if renamed := [key for key in infos if not key.startswith("info_")]:
        found.append(LeftOut(f"the names of {', '.join(renamed)}", "below infos/, read back as info_<name>"))
    if small := [camera for camera, array in spec.images.items() if min(array.shape[:2]) < PICTURE_SIDE]:
        found.append(LeftOut(f"that {', '.join(small)} are pictures", f"below {PICTURE_SIDE} pixels they are numbers"))
    if spec.control_dt or store.read("timestamp").any():
        found.append(LeftOut("timestamps", "minari has no field for them"))
    if not outgoing.has_reward:
        found.append(LeftOut("absence of a reward", "zeros stand there, as the option reward=zero says"))
    if INSTRUCTION in spec.observations and any(store.instructions):
        found.append(LeftOut("instructions", f"an observation is called '{INSTRUCTION}'"))
    return found + outgoing.left_out({"bounds", "the mark 'privileged'", "instruction", "success"}, "minari")
