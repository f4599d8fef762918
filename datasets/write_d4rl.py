"""D4RL HDF5: all steps of all episodes in flat arrays (keys of `d4rl.offline_env.OfflineEnv`).

Observations are one vector: the keys side by side. A termination is a `terminals`, every other end a `timeouts`.
`next_observations` is written when every episode has a final observation; without, D4RL's loader drops the last step of
a cut episode, as our own does.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.datasets.episode import blocks_of
from embodied.datasets.new_hdf5 import new_hdf5
from embodied.datasets.outgoing import LeftOut, Outgoing, Progress, Steps, check_export_options, choice

ROWS = 4096  # of a chunk


def write(outgoing: Outgoing, path: Path, options: Mapping[str, Any], progress: Progress) -> list[LeftOut]:
    """Write one HDF5 file.

    Options:
        keys: observations to put side by side, separated by commas; by default all that are not privileged, in the
            store's order. A single camera's name writes its pictures as the observations.
        compress: `none` or `gzip`.
        reward: `zero` writes zeros where the store has no reward.

    Raises:
        InputError: no actions, no reward, or no such key.
    """
    check_export_options("d4rl", options, ("keys", "compress", "reward"))
    compression = choice("d4rl", options, "compress", ("none", "gzip"))
    outgoing.require_actions("d4rl")
    outgoing.require_reward("d4rl", options)
    keys, camera = _keys(outgoing, options)
    infos = _infos(outgoing, keys)
    total = int(outgoing.counts.sum())
    with_next = bool(outgoing.has_final.all())
    with new_hdf5(path) as (file, check):
        make = _Maker(file, total, None if compression == "none" else compression)
        if camera is None:
            width = sum(_width(outgoing, key) for key in keys)
            file.attrs["observation_layout"] = json.dumps([[key, _width(outgoing, key)] for key in keys])
            observed = make("observations", (width,), "float32")
            following = make("next_observations", (width,), "float32") if with_next else None
        else:
            observed = make("observations", outgoing.spec.images[camera].shape, "uint8")
            following = make("next_observations", observed.shape[1:], "uint8") if with_next else None
        assert outgoing.spec.action is not None
        actions = make("actions", outgoing.spec.action.shape, "float32")
        rewards = make("rewards", (), "float32")
        terminals, timeouts = make("terminals", (), "bool"), make("timeouts", (), "bool")
        extra = {key: make(f"infos/{name}", outgoing.spec.observations[key].shape, "float32") for key, name in infos}
        for name, value in _file_attributes(outgoing).items():
            file.attrs[name] = value
        start = 0
        for steps in outgoing.episodes():
            stop = start + steps.count
            if camera is None:
                matrix = np.concatenate([_flat(steps, key) for key in keys], axis=1)
                observed[start:stop] = matrix[: steps.count]
                if following is not None:
                    following[start:stop] = matrix[1 : steps.count + 1]
            else:
                _write_pictures(outgoing, steps, camera, start, observed, following, check)
            actions[start:stop] = steps.episode.action[: steps.count]  # type: ignore[index]
            rewards[start:stop] = 0.0 if steps.reward is None else steps.reward
            (terminals if steps.terminated else timeouts)[stop - 1] = True
            for key, dataset in extra.items():
                dataset[start:stop] = steps.episode.observations[key][: steps.count]
            start = stop
            check()
            progress(steps.number + 1, outgoing.store.num_episodes, "exporting")
    return _left_out(outgoing, keys, camera, dict(infos), with_next)


def _keys(outgoing: Outgoing, options: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Keys that make up the observation vector, or none of them and the camera whose pictures are the observation."""
    spec = outgoing.spec
    keys = [key for key, array in spec.observations.items() if not array.privileged]
    if "keys" in options:
        keys = [key.strip() for key in str(options["keys"]).split(",")]
        if len(keys) == 1 and keys[0] in spec.images:
            return [], keys[0]
        for key in keys:
            if key not in spec.observations:
                raise InputError(f"d4rl: the store has no observation '{key}'.{suggest(key, spec.observations)}")
    elif not keys and len(spec.images) == 1:
        return [], next(iter(spec.images))
    if not keys:
        raise InputError(
            f"{outgoing.store.path} has no observation that d4rl can hold as its vector.\n"
            f"Name some: --options keys A,B. It has: {', '.join([*spec.observations, *spec.images]) or '(none)'}"
        )
    return keys, None


def _infos(outgoing: Outgoing, keys: list[str]) -> list[tuple[str, str]]:
    """(key, name below `infos/`) of the privileged observations that are not part of the vector."""
    privileged = [key for key, array in outgoing.spec.observations.items() if array.privileged and key not in keys]
    return [(key, key.removeprefix("info_")) for key in privileged]


class _Maker:
    """Makes datasets of `total` rows."""

    def __init__(self, file: Any, total: int, compression: str | None) -> None:
        self._file, self._total, self._compression = file, total, compression

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        # A picture is a chunk of its own: readers ask for single ones.
        rows = 1 if len(shape) == 3 else min(ROWS, self._total)
        return self._file.create_dataset(
            name,
            (self._total, *shape),
            dtype,
            chunks=(rows, *shape),
            compression=self._compression,
        )


def _write_pictures(
    outgoing: Outgoing,
    steps: Steps,
    camera: str,
    start: int,
    observed: Any,
    following: Any | None,
    check: Callable[[], None],
) -> None:
    row = 0
    for block in blocks_of(outgoing.pictures(steps, camera)):
        here = block[: max(0, steps.count - row)]
        observed[start + row : start + row + len(here)] = here
        if following is not None:
            next_block = block[1:] if row == 0 else block
            first = start + max(0, row - 1)
            following[first : first + len(next_block)] = next_block
        row += len(block)
        check()


def _width(outgoing: Outgoing, key: str) -> int:
    return int(np.prod(outgoing.spec.observations[key].shape, dtype=np.int64))


def _flat(steps: Steps, key: str) -> np.ndarray:
    array = steps.episode.observations[key]
    return array.reshape(len(array), -1)


def _file_attributes(outgoing: Outgoing) -> dict[str, Any]:
    """The attributes of the D4RL file that the store was read from, and the environment."""
    kept = outgoing.attributes.get("attributes")
    kept = {k: v for k, v in kept.items() if isinstance(v, str | int | float)} if isinstance(kept, dict) else {}
    kept.pop("observation_layout", None)
    if outgoing.spec.environment and not {"env_id", "env_name", "env"} & set(kept):
        kept["env_id"] = outgoing.spec.environment
    return kept


def _left_out(
    outgoing: Outgoing, keys: list[str], camera: str | None, infos: dict[str, str], with_next: bool
) -> list[LeftOut]:
    spec, found = outgoing.spec, []
    if len(keys) > 1:
        found.append(LeftOut(f"the division into {', '.join(keys)}", "d4rl has one observation vector"))
    elif keys and spec.observations[keys[0]].shape != (_width(outgoing, keys[0]),):
        found.append(LeftOut(f"the shape {spec.observations[keys[0]].shape} of {keys[0]}", "d4rl has vectors"))
    if keys and keys != ["observation"]:
        found.append(LeftOut(f"the name of {', '.join(keys)}", "d4rl calls it 'observations'"))
    if cameras := [c for c in spec.images if c != camera]:
        found.append(LeftOut(f"cameras {', '.join(cameras)}", "d4rl has one observation array"))
    if camera not in (None, "image"):
        found.append(LeftOut(f"the name of camera {camera}", "d4rl calls it 'observations'"))
    if others := [key for key in spec.observations if key not in keys and key not in infos]:
        found.append(LeftOut(f"observations {', '.join(others)}", "not among the keys that were asked for"))
    if renamed := [key for key, name in infos.items() if f"info_{name}" != key]:
        found.append(LeftOut(f"the names of {', '.join(renamed)}", "below infos/, read back as info_<name>"))
    if infos and outgoing.has_final.any():
        found.append(LeftOut(f"final rows of {', '.join(infos)}", "infos/ holds one row per step"))
    if not with_next and outgoing.has_final.any():
        count = int(outgoing.has_final.sum())
        found.append(LeftOut(f"final observations of {count} episodes", "others have none: no next_observations"))
    if spec.control_dt or outgoing.store.read("timestamp").any():
        found.append(LeftOut("timestamps", "d4rl has no field for them"))
    if not outgoing.has_reward:
        found.append(LeftOut("absence of a reward", "zeros stand there, as the option reward=zero says"))
    return found + outgoing.left_out({"the mark 'privileged'", "environment"}, "d4rl")
