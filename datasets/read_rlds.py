"""RLDS: episodes in TFRecord shards as TensorFlow Datasets writes them, read without TensorFlow.

One record is one episode: a tf.train.Example whose lists `steps/...` hold all steps (Ramos et al. 2021,
https://github.com/google-research/rlds). On the step that is `is_last` only the observation is valid; it becomes the
final observation. Where `is_last` is not set (windows cut from longer episodes) every step counts and the last has no
successor. `is_terminal`, or a discount that becomes 0, is a termination; any other end is a truncation.

Keys: `steps/observation/robot/joints` becomes `robot.joints`. Numbers of steps that are neither observation, action nor
flag (`steps/action_dict/...`), and embeddings of the instruction, are privileged observations.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, Frames, end_flags, padded_last
from embodied.datasets.pictures import lazy_pictures
from embodied.datasets.rlds_features import Layout, Leaf, layout_of, read_features
from embodied.datasets.rlds_shards import (
    Shards,
    dataset_folder,
    dataset_folders,
    has_shards,
    open_shards,
    read_description,
)
from embodied.datasets.rlds_survey import read_flags, says_absent, shows_pictures, survey
from embodied.datasets.source import Source, check_options
from embodied.datasets.tfrecord import Feature, read_example, read_part


def sniff(path: Path) -> bool:
    return path.is_dir() and any(has_shards(folder) for folder in dataset_folders(path))


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a dataset: the folder with features.json, or one above it (`<name>/<version>`, `<name>/<config>/<version>`).

    Options:
        split: read only this one; by default all, and each episode's source_id names its file, which names the split.
        last_step: `observation` (RLDS's rule: on the step marked is_last nothing else is valid) or `step`, for datasets
            that act and pay on it.

    Raises:
        InputError: no dataset, several, not one readable record, or features.json is damaged or has no steps.
        ConfigError: an option is unknown or has no such value.
    """
    check_options("rlds", options, ("split", "last_step"))
    last_step = str(options.get("last_step", "observation"))
    if last_step not in ("observation", "step"):
        raise ConfigError(f"rlds: last_step={last_step} is neither 'observation' nor 'step'.")
    split = str(options["split"]) if "split" in options else None
    folder = dataset_folder(path)
    layout = layout_of(read_features(folder / "features.json"))
    if not layout.observations and not layout.cameras:
        raise InputError(f"{folder / 'features.json'} has no observations below 'steps' that can be read: no RLDS.")
    shards, findings = open_shards(folder, split)
    description, differences = read_description(folder, shards, split)
    seen = survey(shards, layout)
    absent = seen.absent()
    left_out = layout.left_out | {layout.cameras[camera].path: why for camera, why in seen.unreadable.items()}
    left_out |= {layout.cameras[camera].path: "absent in every episode, which says so" for camera in absent}
    spec = DatasetSpec(
        observations={
            key: ArraySpec(tuple(size or 0 for size in leaf.shape), privileged=key in layout.privileged)
            for key, leaf in layout.observations.items()
        },
        images={
            camera: ArraySpec(shape, "uint8") for camera, shape in seen.picture_shapes.items() if camera not in absent
        },
        action=_action_spec(layout.actions),
        has_reward="reward" in layout.flags,
    )
    attributes = {
        "dataset": description,
        "splits": shards.episodes_of_splits(),
        "observations_left_out": left_out,
        "last_step": last_step,
        "timestamps": "absent in the source: zero",
    }

    def load(index: int) -> Episode:
        try:
            return _load(shards, layout, spec, index, last_step == "step")
        except InputError as error:
            raise InputError(f"Episode '{shards.name(index)}': {error}") from error

    findings = (*findings, *differences, *seen.findings(layout, last_step == "step"))
    return Source(spec, len(shards), load, attributes, findings)


def _load(shards: Shards, layout: Layout, spec: DatasetSpec, index: int, keeps_last: bool) -> Episode:
    example = read_example(shards.read(index))
    flags = read_flags(layout, example)
    observations = {key: _values(example, leaf) for key, leaf in layout.observations.items()}
    actions = [_values(example, leaf) for leaf in layout.actions]
    pictures = {camera: _spans(example, layout.cameras[camera]) for camera in spec.images}
    lengths = {key: len(rows) for key, rows in {**flags.columns, **observations, **pictures}.items()}
    lengths |= {leaf.path: len(rows) for leaf, rows in zip(layout.actions, actions, strict=True)}
    if len(set(lengths.values())) > 1:
        raise InputError(f"its lists differ in length: {', '.join(f'{k} {v}' for k, v in lengths.items())}.")
    rows = next(iter(lengths.values()))
    if not rows:
        raise InputError("it has no steps.")
    steps = rows - 1 if flags.ends_with_observation() and not keeps_last else rows
    if not steps:
        raise InputError("it has a single step, marked is_last: an observation, no action.")
    step_valid, terminated, truncated = end_flags(steps, rows, flags.is_terminal() or flags.discount_ends())
    if spec.has_reward and "reward" not in flags.columns:
        raise InputError("it lacks 'steps/reward'.")
    flagged = [camera for camera, flag in layout.camera_flags.items() if says_absent(example, flag)]
    return Episode(
        observations=observations,
        images={
            camera: _frames(shards, index, spans, (rows, *spec.images[camera].shape), camera)
            for camera, spans in pictures.items()
            if camera not in flagged or shows_pictures(example, layout.cameras[camera])
        },
        action=padded_last(np.concatenate([part.reshape(rows, -1) for part in actions], 1)[:steps], rows)
        if actions
        else None,
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.zeros(rows),
        reward=padded_last(flags.columns["reward"][:steps], rows) if spec.has_reward else None,
        instruction=_instruction(example, layout.instructions),
        success=_success(example, layout.success),
        source_id=shards.name(index),
    )


def _values(example: Mapping[str, Feature], leaf: Leaf) -> np.ndarray:
    if leaf.path not in example:
        raise InputError(f"it lacks '{leaf.path}'.")
    return leaf.values(example[leaf.path])


def _spans(example: Mapping[str, Feature], leaf: Leaf) -> np.ndarray:
    if leaf.path not in example:
        raise InputError(f"it lacks '{leaf.path}'.")
    return example[leaf.path].spans()


def _frames(shards: Shards, index: int, spans: np.ndarray, shape: tuple[int, ...], camera: str) -> Frames:
    """Pictures read from the shard again, one by one: the record with all of them is not kept."""
    path, offset, _ = shards.locate(index)

    def encoded(start: int, stop: int) -> Iterator[bytes]:
        for first, end in spans[start:stop].tolist():
            yield read_part(path, offset + first, end - first)

    height, width = shape[1:3]
    return lazy_pictures((len(spans), height, width, 3), encoded, f"Episode '{shards.name(index)}': '{camera}'")


def _action_spec(actions: tuple[Leaf, ...]) -> ActionSpec | None:
    """The parts of an action dictionary stand side by side in the order of their names."""
    if not actions:
        return None
    names: list[str] = []
    for leaf in actions:
        part = leaf.path.removeprefix("steps/action").strip("/").replace("/", ".")
        names += [part] if leaf.shape == () else [f"{part}.{place}" for place in range(leaf.size)]
    named = tuple(names) if actions[0].path != "steps/action" else ()
    return ActionSpec((len(names),), names=named, control_mode="raw")


def _instruction(example: Mapping[str, Feature], leaves: tuple[Leaf, ...]) -> str:
    """The first one that is not empty, of the best list that has one."""
    for leaf in leaves:
        for text in example[leaf.path].strings() if leaf.path in example else ():
            if text:
                return text.decode(errors="replace")
    return ""


def _success(example: Mapping[str, Feature], leaf: Leaf | None) -> bool | None:
    values = leaf.values(example[leaf.path]) if leaf is not None and leaf.path in example else np.zeros(0)
    return bool(values.reshape(-1)[0]) if len(values) else None
