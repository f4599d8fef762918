"""robomimic HDF5: one group `data/demo_<i>` per episode (https://robomimic.github.io/docs/datasets/overview.html).

Ends: `dones` means success, end of the demo or both, depending on how the file was made, and the file does not say.
Here a demo ends where its group ends; it is `terminated` when its last done is set and the file does not call the demo
a failure, else `truncated`. Dones before the last step (success held over several steps) cut nothing.

Isaac Lab writes the same layout with groups of observations (`obs/camera/rgb` becomes `camera.rgb`) and its simulator's
states beside them, which are left out.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, Frames, end_flags, padded_last
from embodied.datasets.finding import Finding
from embodied.datasets.hdf5 import (
    NumberArray,
    array_at,
    as_text,
    attribute,
    check_episode_bytes,
    find,
    group_at,
    is_hdf5,
    members,
    open_hdf5,
    readable,
    texts,
    with_final_row,
)
from embodied.datasets.hdf5_pictures import frames, picture_form
from embodied.datasets.source import Source, check_options

USED = ("actions", "rewards", "dones", "obs", "next_obs")  # of a demo; what else it holds is listed
NESTED = 4  # groups of observations in each other
NUM_OBSERVATIONS = 1000
NAMED = 5  # demos that a finding names


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the first usable demo holds, and the others are expected to.

    Attributes:
        spec: of the dataset.
        paths: observation or camera -> its path below `obs`.
        left_out: path below `obs` -> why it is not imported.
    """

    spec: DatasetSpec
    paths: dict[str, str]
    left_out: dict[str, str]


def sniff(path: Path) -> bool:
    if not is_hdf5(path):
        return False
    with readable(path), open_hdf5(path) as file:
        return bool(demo_names(file))


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a robomimic file. Raises InputError: truncated, or no demo with `obs` and `actions`."""
    check_options("robomimic", options)
    file = open_hdf5(path)
    with readable(path):
        demos = demo_names(file)
        if not demos:
            raise InputError(f"{path} has no group 'data/demo_0': it is not in robomimic's layout.")
        environment = environment_of(file)
        layout, first = _layout(path, file, demos, environment)
        spec = layout.spec
        final = set(members(group_at(first, "next_obs")))
        filters, mask_findings = _filter_keys(file, demos)
        lengths, early = _lengths(path, file, demos)
        remembered = {
            "env_args": environment,
            "filter_keys": filters,
            "observations_left_out": layout.left_out,
            "groups_left_out": [name for name in members(first) if name not in USED],
            "final_observation_repeated": sorted(k for k in layout.paths if layout.paths[k] not in final)
            if final
            else [],
            "timestamps": "step * control period of the simulator" if spec.control_dt else "absent in the source: zero",
            "early_dones": early,
        }
        findings = [
            *_environment_findings(environment),
            *_count_findings(file, demos, lengths),
            *mask_findings,
            *[
                Finding("observation-left-out", "note", f"'obs/{name}' is left out: {reason}")
                for name, reason in sorted(layout.left_out.items())
            ],
        ]
    return Source(spec, len(demos), lambda index: _load(path, file, demos[index], layout), remembered, tuple(findings))


def demo_names(file: Any) -> list[str]:
    """Groups `demo_<i>` in `data` by number: demo_2 before demo_10."""
    names = {name: re.fullmatch(r"demo_([0-9]{1,18})", name) for name in members(group_at(file, "data"))}
    return sorted((n for n, m in names.items() if m), key=lambda n: (int(n.removeprefix("demo_")), n))


def environment_of(file: Any) -> dict[str, Any]:
    """`env_args` of the file as JSON, `{"unreadable": text}`, or nothing where it has none."""
    text = attribute(file["data"], "env_args")
    if text is None:
        return {}
    try:
        found = json.loads(as_text(text))
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"unreadable": as_text(text)[:1000]}


def _load(path: Path, file: Any, demo: str, layout: Layout) -> Episode:
    name = f"{path.name}/{demo}"
    try:
        with readable(path):
            return _episode(path, file, demo, layout, name)
    except InputError as error:
        raise InputError(f"Episode '{name}': {error}") from None


def _episode(path: Path, file: Any, demo: str, layout: Layout, name: str) -> Episode:
    group, spec = group_at(file, f"data/{demo}"), layout.spec
    if group is None:
        raise InputError("it is no group.")
    actions = _actions(group)
    steps = len(actions)
    if steps == 0:
        raise InputError("it has no actions. Drop it from the source.")
    observations = group_at(group, "obs")
    cameras = [key for key in spec.images if find(observations, layout.paths[key]) is not None] if observations else []
    if missing := [k for k in spec.observations if observations is None or find(observations, layout.paths[k]) is None]:
        raise InputError(f"it lacks observations that the first demo has: {', '.join(missing)}.")
    arrays = {key: array_at(observations, layout.paths[key]) for key in [*spec.observations, *cameras]}
    after = group_at(group, "next_obs")
    # Some makers keep N + 1 observations of N actions instead of next_obs.
    rows = steps + (after is not None or (bool(arrays) and all(len(array) == steps + 1 for array in arrays.values())))
    final = {key: _final(after, layout.paths[key], array, steps, rows) for key, array in arrays.items()}
    optional = {key: array_at(group, key) for key in ("rewards", "dones") if find(group, key) is not None}
    lengths = {"actions": steps} | {key: len(array) for key, array in optional.items()}
    lengths |= {f"obs/{layout.paths[key]}": len(array) - (len(array) == rows > steps) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"arrays differ in length: {', '.join(f'{k} {n}' for k, n in lengths.items())}.")
    for key, array in optional.items():
        if array.shape[1:] not in ((), (1,)):
            raise InputError(f"'{key}' must be one number per step; found {array.shape}.")
    check_episode_bytes([actions, *optional.values(), *(arrays[key] for key in spec.observations)], rows)
    success = _success(group)
    done = bool(optional["dones"].rows(steps - 1).any()) if "dones" in optional else False
    step_valid, terminated, truncated = end_flags(steps, rows, done and success is not False)
    vectors = {}
    for key in spec.observations:
        vectors[key] = arrays[key].float32(0, min(rows, len(arrays[key])))
        if len(vectors[key]) < rows:
            last = final[key]
            vectors[key] = with_final_row(vectors[key], last[0].float32(last[1], last[1] + 1)[0] if last else None)
    images: dict[str, np.ndarray | Frames] = {
        key: frames(path, arrays[key], 0, min(rows, len(arrays[key])), final[key] or _repeated(arrays[key], rows))
        for key in cameras
    }
    reward = optional["rewards"].float32().reshape(steps) if "rewards" in optional and spec.has_reward else None
    return Episode(
        observations=vectors,
        images=images,
        action=padded_last(actions.float32(), rows),
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=np.arange(rows) * spec.control_dt,
        reward=None if reward is None else padded_last(reward, rows),
        instruction=_instruction(group),
        success=success,
        source_id=name,
    )


def _actions(group: Any) -> NumberArray:
    if find(group, "actions") is None:
        raise InputError("it has no actions: 'actions' is absent.")
    actions = array_at(group, "actions")
    if len(actions.shape) != 2 or actions.shape[1] == 0:
        raise InputError(f"'actions' must be numbers (N, A); found {actions.dtype} {actions.shape}.")
    return actions


def _final(after: Any, name: str, array: NumberArray, steps: int, rows: int) -> tuple[NumberArray, int] | None:
    """Array and row of the final observation; None where it is in `array` itself, or nowhere."""
    if after is None or len(array) >= rows or find(after, name) is None:
        return None
    found = array_at(after, name)
    if len(found) != steps or found.shape[1:] != array.shape[1:]:
        raise InputError(f"'next_obs/{name}' is {found.shape}, 'obs/{name}' {array.shape} for {steps} actions.")
    return found, steps - 1


def _repeated(array: NumberArray, rows: int) -> tuple[NumberArray, int] | None:
    return (array, len(array) - 1) if len(array) < rows else None


def _success(group: Any) -> bool | None:
    value = attribute(group, "success")
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return bool(value) if isinstance(value, bool | int | float) else None


def _instruction(group: Any) -> str:
    """Some makers keep the task's words in the demo's attributes; robomimic itself has no field for them."""
    found = (attribute(group, key) for key in ("instruction", "language_instruction", "lang"))
    return next((text for text in found if isinstance(text, str)), "")


def _layout(path: Path, file: Any, demos: list[str], environment: dict[str, Any]) -> tuple[Layout, Any]:
    """The layout and the group of the first demo that has one. Raises the first demo's InputError where none has."""
    reason = InputError(f"{path} has no demo.")
    for index, demo in enumerate(demos):
        try:
            with readable(path):
                group = group_at(file, f"data/{demo}")
                if group is None:
                    raise InputError("it is no group.")
                return _layout_of(group, environment), group
        except InputError as error:
            if index == 0:
                reason = InputError(f"Episode '{path.name}/{demo}': {error}")
    raise reason


def _layout_of(group: Any, environment: dict[str, Any]) -> Layout:
    actions = _actions(group)
    obs = group_at(group, "obs")
    if obs is None:
        raise InputError(
            "it has no 'obs', only simulator states.\nReplay them with --format robosuite, or extract observations "
            "with robomimic's dataset_states_to_obs.py."
        )
    observations, images, paths, left_out = {}, {}, {}, {}
    for name in _below(obs, "", NESTED):
        key = name.replace("/", ".")
        try:
            array = array_at(obs, name)
        except InputError as error:
            left_out[name] = str(error)
            continue
        if key in paths:
            left_out[name] = f"'{key}' is another array's name already"
        elif len(array.shape) <= 2 and 0 not in array.shape[1:]:
            observations[key] = ArraySpec(array.shape[1:], privileged=key in ("object", "object-state"))
            paths[key] = name
        elif isinstance(form := picture_form(array), str):
            left_out[name] = form
        else:
            images[key] = ArraySpec(form.shape, "uint8")
            paths[key] = name
    if not paths:
        raise InputError(f"none of its observations can be used: {left_out or 'obs is empty'}.")
    settings = environment.get("env_kwargs")
    control_hz = settings.get("control_freq") if isinstance(settings, dict) else None
    if not isinstance(control_hz, int | float) or not 1e-3 < control_hz < 1e6:
        control_hz = 0
    name = environment.get("env_name", "")
    spec = DatasetSpec(
        observations=observations,
        images=images,
        action=ActionSpec(actions.shape[1:], control_mode="raw"),
        control_dt=1.0 / control_hz if control_hz else 0.0,
        environment=name if isinstance(name, str) else "",
        has_reward=find(group, "rewards") is not None,
    )
    return Layout(spec, paths, left_out)


def _below(group: Any, prefix: str, depth: int) -> list[str]:
    """Paths of what is below a group, groups in groups included. Raises InputError for more than can be meant."""
    found = []
    for name in members(group):
        inner = _group_or_none(group, name) if depth else None
        found += _below(inner, f"{prefix}{name}/", depth - 1) if inner is not None else [prefix + name]
        if len(found) > NUM_OBSERVATIONS:  # groups that hold each other have any number of paths
            raise InputError(f"'obs' holds more than {NUM_OBSERVATIONS} arrays.")
    return found


def _group_or_none(group: Any, name: str) -> Any | None:
    try:
        return group_at(group, name)
    except InputError:
        return None  # a link out of the file: `array_at` says so


def _lengths(path: Path, file: Any, demos: list[str]) -> tuple[dict[str, int], int]:
    """Steps of each demo that can be opened, and the number of demos with a done before their last step."""
    lengths, early = {}, 0
    for demo in demos:
        try:
            with readable(path):
                group = group_at(file, f"data/{demo}")
                lengths[demo] = len(array_at(group, "actions")) if group is not None else 0
                if find(group, "dones") is not None:
                    dones = array_at(group, "dones")
                    early += bool(dones.rows(0, len(dones))[:-1].any())
        except InputError:
            continue  # loading the demo gives the reason
    return lengths, early


def _environment_findings(environment: dict[str, Any]) -> list[Finding]:
    if "unreadable" not in environment:
        return []
    text = "'env_args' of the file is no JSON object: environment and control rate are unknown"
    return [Finding("environment-unreadable", "warning", text, "Write env_args as JSON text.")]


def _count_findings(file: Any, demos: list[str], lengths: dict[str, int]) -> list[Finding]:
    found, wrong = [], []
    for index, demo in enumerate(demos):
        claimed = attribute(file[f"data/{demo}"], "num_samples") if demo in lengths else None
        if isinstance(claimed, bool | int | float) and claimed != lengths[demo]:
            wrong.append((index, f"{demo} says {claimed} and holds {lengths[demo]}"))
    if wrong:
        named = ", ".join(text for _, text in wrong[:NAMED]) + (", ..." if len(wrong) > NAMED else "")
        text = f"'num_samples' is not the number of actions in {len(wrong)} demos: {named}"
        episode = wrong[0][0] if len(wrong) == 1 else None
        found.append(Finding("frame-count", "warning", text, "The arrays count; correct the attribute.", episode))
    total, held = attribute(file["data"], "total"), sum(lengths.values())
    if isinstance(total, bool | int | float) and total != held:
        text = f"'total' says {total} steps, the demos hold {held}"
        found.append(Finding("frame-count", "warning", text, "The arrays count; correct the attribute."))
    return found


def _filter_keys(file: Any, demos: list[str]) -> tuple[dict[str, list[int]], list[Finding]]:
    """`mask/<name>` -> episode numbers, and what is wrong with them."""
    number = {demo: index for index, demo in enumerate(demos)}
    filters, found = {}, []
    masks = group_at(file, "mask")
    for name in members(masks):
        try:
            listed = texts(masks, name)
        except InputError as error:
            found.append(Finding("filter-key", "warning", f"filter key '{name}' is left out: {error}"))
            continue
        filters[name] = [number[demo] for demo in listed if demo in number]
        absent = [demo for demo in listed if demo not in number]
        if absent:
            named = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
            text = f"filter key '{name}' names {len(absent)} demos that the file does not hold: {named[:200]}"
            found.append(Finding("filter-key", "warning", text))
    return filters, found
