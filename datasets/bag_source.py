"""Bags that a mapping describes, as a Source; and what to tell the user of a bag that has none."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.bag_episode import Rows, align, episode, period_s
from embodied.datasets.bag_files import Recording, stale_claims
from embodied.datasets.bag_images import picture
from embodied.datasets.bag_items import Message, Topic
from embodied.datasets.bag_mapping import (
    FILE_NAME,
    JOINT_STATE,
    JOINT_TRAJECTORY,
    BagMapping,
    draft_mapping,
    read_mapping,
)
from embodied.datasets.bag_series import ACTION, Table, listed_topics, read_table
from embodied.datasets.bag_times import Timeline, timelines
from embodied.datasets.bag_types import message_type
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.source import Source


def find_mapping(path: Path, recordings: Sequence[Recording], options: Mapping[str, Any]) -> BagMapping | None:
    """The mapping that the options name, or the one that lies beside the bags; None without either.

    With the option `propose` it writes a draft instead.

    Raises:
        ConfigError: the mapping is wrong; or a draft was written, to be edited before anything is imported.
    """
    if "propose" in options:
        file = Path(str(options["propose"]))
        try:
            with open(file, "x") as out:
                out.write(propose_mapping(path, recordings))
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error}. Name a file that does not exist.") from error
        raise ConfigError(
            f"Wrote {file}, a draft of what the topics mean. Edit it, then run again with --options mapping {file}"
        )
    if "mapping" in options:
        return read_mapping(Path(str(options["mapping"])))
    folders = [path if path.is_dir() else path.parent, recordings[0].files[0].parent]
    found = [folder / FILE_NAME for folder in folders if (folder / FILE_NAME).is_file()]
    return read_mapping(found[0]) if found else None


def propose_mapping(path: Path, recordings: Sequence[Recording]) -> str:
    """A YAML draft of a mapping, from the topics of the first recording that can be read."""
    table = _first_table(path, recordings)
    wanted = {name for name, count in table.counts.items() if count.topic.kind in (JOINT_STATE, JOINT_TRAJECTORY)}
    names: dict[str, tuple[str, ...]] = {}
    for item in table.recording.items(wanted):
        if isinstance(item, Message) and item.topic.name not in names:
            names[item.topic.name] = _joint_names(item)
            if len(names) == len(wanted):
                break
    return draft_mapping(
        (count.topic, count.count, count.rate, names.get(name, ())) for name, count in table.counts.items()
    )


def _joint_names(message: Message) -> tuple[str, ...]:
    try:
        kind = message_type(message.topic)
        return tuple(getattr(kind.decode(message.data), kind.names_list() or "", ()))
    except InputError:
        return ()


def refusal(path: Path, recordings: Sequence[Recording]) -> InputError:
    """The error for bags that say nothing of their joints and actions: what is in them, and how to go on."""
    try:
        table = _first_table(path, recordings)
    except InputError as error:
        return error
    reasons: dict[str, str] = {}
    for name, count in table.counts.items():
        try:
            message_type(count.topic)
        except InputError as error:
            reasons[name] = str(error)
    filled = [name for name, count in table.counts.items() if count.count]
    if all(name in reasons for name in filled):
        return InputError(
            f"{table.recording.path}: none of its topics can be read. "
            + "; ".join(f"{name} ({table.counts[name].topic.kind}): {reasons[name]}" for name in filled[:4])
            + "."
        )
    return InputError(
        f"{table.recording.path} does not say what its joints and actions mean: it holds no "
        "embodied_contract. Topics:\n"
        f"{listed_topics(table)}\n"
        "Map them with --options mapping FILE; --options propose FILE writes a draft to start from."
    )


def _first_table(path: Path, recordings: Sequence[Recording]) -> Table:
    failed: list[InputError] = []
    for recording in recordings:
        try:
            return read_table(recording, None)
        except InputError as error:
            failed.append(error)
    raise failed[0] if failed else InputError(f"{path} holds no bag.")


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """One episode: a stretch of a recording, or the reason why the recording gives none."""

    recording: int
    number: int
    name: str
    error: str


def mapped_source(recordings: Sequence[Recording], mapping: BagMapping) -> Source:
    """Every recording, or stretch of one between two resets of its clock, as an episode.

    Raises:
        InputError: no recording can be used; the message is the first one's.
    """
    stretches: list[_Stretch] = []
    findings: list[Finding] = []
    spec, left_out, dropped = None, {}, {}
    failed: InputError | None = None
    cache: dict[int, _Opened] = {}  # the numbers of one recording at a time
    topics: set[str] = set()
    for index, recording in enumerate(recordings):
        findings += recording.findings
        try:
            cache = {index: (opened := _Opened.of(recording, mapping))}
            topics |= opened.table.counts.keys()
            findings += opened.findings
            spec, left_out = _spec(opened, mapping, spec, left_out)
            for number in range(len(opened.lines)):
                name = recording.name + (f"#{number}" if len(opened.lines) > 1 else "")
                findings += opened.dropped(number, len(stretches))
                rows = opened.rows[number]
                dropped |= {name: rows.counts} if isinstance(rows, Rows) else {}
                stretches.append(_Stretch(index, number, name, ""))
        except InputError as error:
            failed = failed or error
            stretches.append(_Stretch(index, 0, recording.name, str(error)))
    if spec is None:
        assert failed is not None
        raise failed
    for camera, source in mapping.images.items():
        if source.topic not in topics:
            raise InputError(
                f"No bag has the topic '{source.topic}' of camera '{camera}'.{suggest(source.topic, topics)}"
            )
    complete = spec

    def load(number: int) -> Episode:
        stretch = stretches[number]
        if stretch.error:
            raise InputError(stretch.error)
        if stretch.recording not in cache:
            cache.clear()
            cache[stretch.recording] = _Opened.of(recordings[stretch.recording], mapping)
        opened = cache[stretch.recording]
        rows = opened.rows[stretch.number]
        if isinstance(rows, InputError):
            raise rows
        shown = {camera: rows.pictures[camera] for camera in rows.pictures if camera in complete.images}
        sizes = {camera: mapping.images[camera].size for camera in shown}
        no_camera = np.full(len(rows.time_ns), -1, np.float32)  # the age of a picture that there is not
        numbers = {key: rows.observations.get(key, no_camera) for key in complete.observations}
        rows = dataclasses.replace(rows, pictures=shown, observations=numbers)
        return episode(opened.table, rows, mapping, complete, stretch.name, sizes)

    attributes = {
        "mapping": mapping.to_json(),
        "timestamps": f"{'header stamps' if mapping.stamps == 'header' else 'receive times'} of the clock",
        "rows_dropped": dropped,
        "observations_left_out": left_out,
    }
    return Source(complete, len(stretches), load, attributes, tuple(findings))


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A recording, read and aligned.

    Attributes:
        lines: per stretch without a reset: topic -> Timeline.
        rows: per stretch: its rows, or why it has none.
        cameras: camera -> shape of its pictures; or the reason why they are left out.
    """

    table: Table
    lines: list[dict[str, Timeline]]
    rows: list[Rows | InputError]
    cameras: dict[str, tuple[int, int, int] | str]
    findings: list[Finding]

    @classmethod
    def of(cls, recording: Recording, mapping: BagMapping) -> "_Opened":
        table = read_table(recording, mapping)
        _check_topics(table, mapping)
        lines, findings = timelines(table, mapping.stamps)
        cameras = _cameras(table, mapping)
        usable = {camera for camera, shape in cameras.items() if not isinstance(shape, str)}
        rows: list[Rows | InputError] = []
        for stretch in lines:
            try:
                here = {camera for camera in usable if mapping.images[camera].topic in stretch}
                rows.append(align(table, stretch, mapping, here))
            except InputError as error:
                rows.append(error)
        if all(isinstance(found, InputError) for found in rows):
            raise next(found for found in rows if isinstance(found, InputError))
        return cls(table, lines, rows, cameras, [*_file_findings(table), *findings, *_topic_findings(table, mapping)])

    def dropped(self, number: int, index: int) -> list[Finding]:
        rows = self.rows[number]
        counts = rows.counts if isinstance(rows, Rows) else {}
        told = [f"{count} rows {why}" for why, count in counts.items() if "older" in why or "in between" in why]
        if not told:
            return []
        advice = "Steps across them are not learned from. Raise max_age in the mapping if the data is good enough."
        return [Finding("rows-dropped", "warning", f"dropped or cut: {', '.join(told)}", advice, index)]


def _check_topics(table: Table, mapping: BagMapping) -> None:
    """Raise InputError naming the first topic that the recording lacks. Cameras may be absent, but for the clock."""
    cameras = {source.topic for source in mapping.images.values()} - {mapping.clock.topic}
    for topic in sorted(mapping.topics() - cameras):
        if topic not in table.counts:
            raise InputError(f"{table.recording.path} has no topic '{topic}'.{suggest(topic, table.counts)}")
        if table.counts[topic].count == 0:
            raise InputError(f"{table.recording.path}: nothing was recorded of {topic}.")


def _cameras(table: Table, mapping: BagMapping) -> dict[str, tuple[int, int, int] | str]:
    found: dict[str, tuple[int, int, int] | str] = {}
    for camera, source in mapping.images.items():
        if source.topic not in table.first_pictures:
            continue
        topic: Topic = table.series[source.topic].topic
        try:
            height, width, _ = picture(topic, table.first_pictures[source.topic], source.size).shape
            found[camera] = (height, width, 3)
        except InputError as error:
            found[camera] = str(error)
    return found


def _spec(
    opened: _Opened, mapping: BagMapping, before: DatasetSpec | None, left_out: dict[str, str]
) -> tuple[DatasetSpec, dict[str, str]]:
    """The spec with what this recording adds to it: a camera that the ones before did not have."""
    images = {c: ArraySpec(shape, "uint8") for c, shape in opened.cameras.items() if not isinstance(shape, str)}
    left_out = left_out | {c: reason for c, reason in opened.cameras.items() if isinstance(reason, str)}
    left_out = {camera: reason for camera, reason in left_out.items() if camera not in images}
    if before is not None:
        images = images | before.images
        return dataclasses.replace(
            before, images=images, observations=_with_ages(before.observations, images)
        ), left_out
    table = opened.table
    observations = {}
    for key, source in mapping.observations.items():
        width = table.series[source.topic].columns[key].shape[1]
        names = table.names[key] if len(table.names[key]) == width else ()
        observations[key] = ArraySpec((width,), unit=source.unit, names=names, privileged=source.privileged)
    observations |= {f"age_{key}": ArraySpec((), unit="s", privileged=True) for key in mapping.observations}
    first = next(rows for rows in opened.rows if isinstance(rows, Rows))
    spec = DatasetSpec(
        observations=_with_ages(observations, images),
        images=images,
        action=_action_spec(table, mapping, observations),
        control_dt=1.0 / mapping.clock.rate if mapping.clock.rate else period_s(first),
        environment=mapping.environment,
    )
    return spec, left_out


def _with_ages(observations: Mapping[str, ArraySpec], images: Mapping[str, Any]) -> dict[str, ArraySpec]:
    ages = {f"age_{camera}": ArraySpec((), unit="s", privileged=True) for camera in images}
    return dict(observations) | ages


def _action_spec(table: Table, mapping: BagMapping, observations: Mapping[str, ArraySpec]) -> ActionSpec | None:
    action = mapping.action
    if action is None:
        return None
    if action.next:
        spec = observations[action.next]
        return ActionSpec(spec.shape, unit=action.unit or spec.unit, names=spec.names, control_mode=action.mode)
    width = table.series[action.topic].columns[ACTION].shape[1]
    names = table.names[ACTION] if len(table.names[ACTION]) == width else ()
    return ActionSpec((width,), unit=action.unit, names=names, control_mode=action.mode)


def _file_findings(table: Table) -> list[Finding]:
    recording = table.recording
    counts = {name: count.count for name, count in table.counts.items()}
    found = stale_claims(recording, counts, {name: count.topic.encoding for name, count in table.counts.items()})
    if table.damages:
        more = f", and {len(table.damages) - 3} more" if len(table.damages) > 3 else ""
        told = "; ".join(table.damages[:3])
        advice = "What could be read was imported. Copy the file again if the original is whole."
        found.append(Finding("bag-damaged", "warning", f"{recording.name}: {told}{more}", advice))
    return found


def _topic_findings(table: Table, mapping: BagMapping) -> list[Finding]:
    name, found = table.recording.name, []
    for topic, (bad, reason) in table.undecodable.items():
        message = f"{name}: {bad} messages of {topic} cannot be decoded: {reason}"
        found.append(Finding("undecodable-messages", "warning", message, "They were left out."))
    for key, odd in table.odd.items():
        message = f"{name}: {odd} messages of '{key}' have another count of numbers than its first"
        found.append(Finding("odd-messages", "warning", message, "They were left out."))
    for key, bad in table.not_finite.items():
        message = f"{name}: {bad} messages of '{key}' hold NaN or infinity"
        found.append(Finding("not-finite", "warning", message, "The last finite value was kept, and ages."))
    unreadable = []
    for topic, count in table.counts.items():
        try:
            message_type(count.topic)
        except InputError as error:
            unreadable += [f"{topic} ({error})"] if count.count else []
    if unreadable:
        listed = "; ".join(unreadable[:4]) + (f"; and {len(unreadable) - 4} more" if len(unreadable) > 4 else "")
        message = f"{name}: {len(unreadable)} topics cannot be read: {listed}"
        found.append(Finding("unreadable-topics", "note", message, "The mapping does not use them."))
    for camera, source in mapping.images.items():
        if source.topic not in table.first_pictures:
            message = f"{name}: no pictures of camera '{camera}' ({source.topic})"
            found.append(Finding("missing-media", "warning", message, "The store marks them as absent."))
    return found
