"""Records episodes as rosbag2 MCAP bags, one folder each; `python -m embodied.robot_bridge.recorder --out DIR`.

    DIR/<name>/<name>_0.mcap    raw bytes as received, uncompressed, in chunks of 16 kB, written without buffering
    DIR/<name>/metadata.yaml    written when the episode ends

An `episode_start` event on /bridge/event opens a bag (its field `bag` is the name), `episode_end` closes it. The log
time of a message is its arrival, the publish time its header's stamp. The event's field `contract` (the bundle's
contract.json) is kept as the MCAP metadata record `embodied_contract`, so that reading a bag needs nothing else.

A killed recorder loses at most the last chunk; `recover` makes a bag of what is left.
"""

import argparse
import collections
import json
import logging
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.robot_bridge import messages
from embodied.robot_bridge.messages import BOOL, DIAGNOSTIC_ARRAY, IMAGE, JOINT_STATE, JOINT_TRAJECTORY, STRING
from embodied.robot_bridge.node import EVENT_TOPIC, EventLog, Stop, arguments, open_transport, run_process
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import EVENTS, LATCHED, LOG, QosProfile
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, ESTOP_TOPIC, MODE_TOPIC, STATE_TOPIC

log = logging.getLogger("recorder")

CONTRACT_RECORD = "embodied_contract"
_CHUNK_BYTES = 16 * 1024
_STAMPED = {JOINT_STATE, IMAGE, JOINT_TRAJECTORY, DIAGNOSTIC_ARRAY, messages.POSE_STAMPED}


class _Unbuffered:
    """A file whose every write reaches the kernel. (mcap wraps a plain raw file in a buffer.)"""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> int:
        return self._file.write(data) or 0

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None: ...

    def close(self) -> None:
        self._file.close()


class BagWriter:
    """One bag: a folder with one MCAP file. Not finished until `close`, but readable by `recover` at any time."""

    def __init__(self, folder: Path, metadata: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        try:
            from mcap.writer import CompressionType, Writer
        except ImportError as error:
            raise MissingExtraError("mcap", "ros", "recording") from error
        if folder.exists():
            raise InputError(f"{folder} exists. Name another folder for the recording, or remove it first.")
        folder.mkdir(parents=True)
        self.path = folder / f"{folder.name}_0.mcap"
        self._file = _Unbuffered(self.path)
        self._writer = Writer(self._file, chunk_size=_CHUNK_BYTES, compression=CompressionType.NONE)  # type: ignore[arg-type]
        self._writer.start(profile="ros2", library="embodied")
        for name, value in (metadata or {}).items():
            self._writer.add_metadata(name, {"json": json.dumps(value)})
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        self._types: dict[str, str] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self._first, self._last = 2**63 - 1, 0

    def write(self, topic: str, message_type: str, data: bytes, received_ns: int) -> None:
        """Append one message that arrived at `received_ns` (system clock)."""
        if topic not in self._channels:
            if message_type not in self._schemas:
                text = messages.definition(message_type).encode()
                self._schemas[message_type] = self._writer.register_schema(message_type, "ros2msg", text)
            self._channels[topic] = self._writer.register_channel(
                topic, "cdr", self._schemas[message_type], {"offered_qos_profiles": ""}
            )
            self._types[topic] = message_type
        stamp_ns = received_ns
        if message_type in _STAMPED:  # a header comes first: seconds and nanoseconds after the 4 encapsulation bytes
            seconds, nanoseconds = struct.unpack_from("<iI", data, 4)
            stamp_ns = seconds * 10**9 + nanoseconds if seconds > 0 else received_ns
        self._writer.add_message(self._channels[topic], received_ns, data, stamp_ns, self.counts[topic])
        self.counts[topic] += 1
        self._first, self._last = min(self._first, received_ns), max(self._last, received_ns)

    def close(self) -> None:
        """Write the index and metadata.yaml."""
        self._writer.finish()
        self._file.close()
        start, total = (self._first, sum(self.counts.values())) if self.counts else (0, 0)
        span = {"nanoseconds": max(0, self._last - start)}
        begin = {"nanoseconds_since_epoch": start}
        topics = [
            {
                "topic_metadata": {
                    "name": topic,
                    "type": message_type,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": [],
                    "type_description_hash": messages.type_hash(message_type),
                },
                "message_count": self.counts[topic],
            }
            for topic, message_type in self._types.items()
        ]
        name = self.path.name
        information = {
            "version": 9,
            "storage_identifier": "mcap",
            "duration": span,
            "starting_time": begin,
            "message_count": total,
            "topics_with_message_count": topics,
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [name],
            "files": [{"path": name, "starting_time": begin, "duration": span, "message_count": total}],
            "custom_data": None,
            "ros_distro": messages.DISTRO,
        }
        import yaml

        temporary = self.path.parent / ".metadata.yaml"
        temporary.write_text(yaml.safe_dump({"rosbag2_bagfile_information": information}, sort_keys=False))
        temporary.rename(self.path.parent / "metadata.yaml")


def read_records(path: Path) -> Iterator[tuple[str, str, bytes, int]]:
    """Yield (topic, message type, data, received_ns) up to the end or to where the file was cut off."""
    from mcap.records import Channel, Message, Schema
    from mcap.stream_reader import StreamReader

    schemas: dict[int, str] = {}
    channels: dict[int, tuple[str, str]] = {}
    with open(path, "rb") as file:
        try:
            for record in StreamReader(file).records:
                if isinstance(record, Schema):
                    schemas[record.id] = record.name
                elif isinstance(record, Channel):
                    channels[record.id] = (record.topic, schemas[record.schema_id])
                elif isinstance(record, Message):
                    yield (*channels[record.channel_id], record.data, record.log_time)
        except Exception as error:  # mcap raises a dozen kinds on a cut file
            log.info("%s ends early: %s", path, error)


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON metadata records of an MCAP file, by name; works on a file that was cut off."""
    from mcap.records import Metadata
    from mcap.stream_reader import StreamReader

    found = {}
    with open(path, "rb") as file:
        try:
            for record in StreamReader(file).records:
                if isinstance(record, Metadata) and "json" in record.metadata:
                    found[record.name] = json.loads(record.metadata["json"])
        except Exception as error:
            log.info("%s ends early: %s", path, error)
    return found


def recover(folder: Path) -> int:
    """Finish the bag of a killed recorder in place; returns how many messages it holds.

    Raises:
        InputError: there is no MCAP file in `folder`.
    """
    damaged = folder / f"{folder.name}_0.mcap"
    if not damaged.is_file():
        raise InputError(f"{folder} holds no {damaged.name}; it is no bag of this recorder.")
    if (folder / "metadata.yaml").is_file():
        return sum(1 for _ in read_records(damaged))
    partial = folder.parent / f".{folder.name}.recovered" / folder.name
    writer = BagWriter(partial, read_metadata(damaged))
    for record in read_records(damaged):
        writer.write(*record)
    writer.close()
    for name in (damaged.name, "metadata.yaml"):
        (partial / name).rename(folder / name)
    partial.rmdir()
    partial.parent.rmdir()
    return sum(writer.counts.values())


class Recorder:
    """Subscribes to what a bag holds and writes it while an episode runs. Call `step` in a loop."""

    def __init__(self, profile: Profile, transport: Any, out: Path, poses: tuple[str, ...] = ()) -> None:
        self._out, self._writer, self._events = out, None, EventLog(transport, "recorder")
        self._inbox: collections.deque[tuple[str, str, bytes, int]] = collections.deque()
        self.wake = threading.Event()
        topics: dict[str, tuple[str, QosProfile]] = {
            EVENT_TOPIC: (STRING, EVENTS),
            STATE_TOPIC: (DIAGNOSTIC_ARRAY, LATCHED),
            profile.topics.joint_states: (JOINT_STATE, LOG),
            CHUNK_TOPIC: (JOINT_TRAJECTORY, LOG),
            COMMAND_TOPIC: (JOINT_TRAJECTORY, LOG),
            MODE_TOPIC: (STRING, LOG),
            ESTOP_TOPIC: (BOOL, LOG),
        }
        topics |= {topic: (IMAGE, LOG) for topic in profile.topics.cameras.values()}
        topics |= {f"/sim/pose/{name}": (messages.POSE_STAMPED, LOG) for name in poses}
        for topic, (kind, qos) in topics.items():

            def keep(data: bytes, received_ns: int, topic: str = topic, kind: str = kind) -> None:
                wall_ns = time.time_ns() - (time.monotonic_ns() - received_ns)
                self._inbox.append((topic, kind, data, wall_ns))
                self.wake.set()

            transport.subscriber(topic, kind, qos, keep)

    def step(self) -> None:
        """Write everything that has arrived."""
        self.wake.clear()
        while self._inbox:
            topic, kind, data, received_ns = self._inbox.popleft()
            event = self._event(data) if topic == EVENT_TOPIC else {}
            try:
                if event.get("event") == "episode_start":
                    self._open(event)
                if self._writer is not None:
                    self._writer.write(topic, kind, data, received_ns)
                if event.get("event") == "episode_end":
                    self.close()
            except (OSError, InputError) as error:  # a full disk is the recorder's trouble, not the robot's
                self._writer = None
                self._events.write("recording_failed", error=str(error))

    @staticmethod
    def _event(data: bytes) -> dict[str, Any]:
        try:
            return messages.read_json(data)
        except InputError as error:
            log.warning("%s: %s", EVENT_TOPIC, error)
            return {}

    def _open(self, event: Mapping[str, Any]) -> None:
        self.close()
        metadata = {CONTRACT_RECORD: event["contract"]} if "contract" in event else {}
        self._writer = BagWriter(self._out / str(event["bag"]), metadata)
        self._events.write("recording", bag=str(event["bag"]))

    def close(self) -> None:
        """Finish the open bag, if there is one."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            self._events.write("recorded", bag=writer.path.parent.name, messages=sum(writer.counts.values()))


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    transport = open_transport("recorder", options)
    recorder = Recorder(profile, transport, out, tuple(options.poses))
    try:
        while not stop.is_set():
            recorder.wake.wait(0.2)
            recorder.step()
            stop.wait(0.02)  # a batch at a time: waking for every message costs more than writing it
    finally:
        recorder.step()
        recorder.close()
        transport.close()


if __name__ == "__main__":
    parser = arguments("Record episodes as rosbag2 MCAP bags.")
    parser.add_argument("--out", required=True, help="folder that gets one bag per episode")
    parser.add_argument("--poses", nargs="*", default=[], help="names under /sim/pose to record")
    run_process(main, parser)
