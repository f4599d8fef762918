"""Writes one rosbag2 MCAP bag: what has been written is on its way to the disk, whatever becomes of this process.

    <folder>/<name>_0.mcap    raw bytes as received, uncompressed, in chunks of 16 kB, written without buffering
    <folder>/metadata.yaml    written when the bag is closed; in the form of ROS 2 Jazzy (version 9)

The log time of a message is when it arrived, the publish time is its header's stamp. A killed writer loses at most the
last chunk; `bag_recover` makes a bag of what is left. The file is locked while it is written.
"""

import collections
import fcntl
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.robot_bridge import messages
from embodied.robot_bridge.qos import QosProfile

CHUNK_BYTES = 16 * 1024
OFFERED_QOS, TYPE_HASH = "offered_qos_profiles", "topic_type_hash"  # rosbag2's keys of a channel's metadata
_INFINITE = {"sec": 9223372036, "nsec": 854775807}


class UnbufferedFile:
    """A new file whose every write reaches the kernel, whole or with an OSError. (mcap buffers a plain raw file.)"""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by `close`)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # gone with the process: a lock means that the recorder lives

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:  # a disk that fills up takes a part and refuses the rest
            left = left[self._file.write(left) or 0 :]
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None: ...

    def close(self, sync: bool = False) -> None:
        try:
            if sync:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def open_writer(file: UnbufferedFile) -> Any:
    """A started mcap writer on `file`."""
    try:
        from mcap.writer import CompressionType, Writer
    except ImportError as error:
        raise MissingExtraError("mcap", "ros", "recording") from error
    writer = Writer(file, chunk_size=CHUNK_BYTES, compression=CompressionType.NONE)  # type: ignore[arg-type]
    writer.start(profile="ros2", library="embodied")
    return writer


def qos_text(offered: Iterable[QosProfile]) -> str:
    """Offered QoS as rosbag2 writes it, YAML; "" for none."""
    import yaml

    profiles = [
        {
            "history": "keep_last",
            "depth": qos.depth,
            "reliability": "reliable" if qos.reliable else "best_effort",
            "durability": "transient_local" if qos.latched else "volatile",
            "deadline": dict(_INFINITE),
            "lifespan": dict(_INFINITE),
            "liveliness": "automatic",
            "liveliness_lease_duration": dict(_INFINITE),
            "avoid_ros_namespace_conventions": False,
        }
        for qos in offered
    ]
    return yaml.safe_dump(profiles, sort_keys=False) if profiles else ""


def _qos_of(text: str) -> list[Any]:
    """The profiles in what `qos_text` wrote; none where the text is damaged."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return []
    return found if isinstance(found, list) else []


class Contents:
    """What metadata.yaml says of a file: per topic its type, QoS and count, and the time that the messages span."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._topics: dict[str, tuple[str, Mapping[str, str]]] = {}
        self._first, self._last = 2**63 - 1, 0

    def add_topic(self, topic: str, message_type: str, metadata: Mapping[str, str]) -> None:
        self._topics[topic] = (message_type, metadata)

    def count(self, topic: str, log_ns: int) -> None:
        self.counts[topic] += 1
        self._first, self._last = min(self._first, log_ns), max(self._last, log_ns)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def write(self, file: Path) -> None:
        """Put metadata.yaml beside the MCAP `file`: whole, or not at all."""
        import yaml

        start = self._first if self.total else 0
        span = {"nanoseconds": max(0, self._last - start)}
        begin = {"nanoseconds_since_epoch": start}
        topics = [
            {
                "topic_metadata": {
                    "name": topic,
                    "type": message_type,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": _qos_of(metadata.get(OFFERED_QOS, "")),
                    "type_description_hash": metadata.get(TYPE_HASH, ""),
                },
                "message_count": self.counts[topic],
            }
            for topic, (message_type, metadata) in self._topics.items()
        ]
        information = {
            "version": 9,
            "storage_identifier": "mcap",
            "duration": span,
            "starting_time": begin,
            "message_count": self.total,
            "topics_with_message_count": topics,
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [file.name],
            "files": [{"path": file.name, "starting_time": begin, "duration": span, "message_count": self.total}],
            "custom_data": None,
            "ros_distro": messages.DISTRO,
        }
        temporary = file.parent / ".metadata.yaml"
        temporary.write_text(yaml.safe_dump({"rosbag2_bagfile_information": information}, sort_keys=False))
        temporary.replace(file.parent / "metadata.yaml")


def _stamp(message_type: str, data: bytes, received_ns: int) -> int:
    """The stamp of a message whose type begins with a header, or the receive time [ns]."""
    if not _begins_with_header(message_type) or len(data) < 12:
        return received_ns
    seconds, nanoseconds = struct.unpack_from("<iI", data, 4)  # after the 4 encapsulation bytes
    return seconds * 10**9 + nanoseconds if seconds > 0 else received_ns


def _begins_with_header(message_type: str) -> bool:
    fields = messages.typestore().fielddefs[message_type][1]
    return bool(fields) and fields[0][0] == "header" and "std_msgs/msg/Header" in str(fields[0][1])


class BagWriter:
    """One bag: a new folder with one MCAP file.

    Args:
        metadata: name -> JSON-able value of each metadata record; written before anything else.
        offered: topic -> QoS profiles that its publishers offer; asked once, at the topic's first message. With it
            `ros2 bag play` publishes latched topics latched.

    Raises:
        InputError: the folder exists.
        OSError: the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        offered: Callable[[str], Sequence[QosProfile]] = lambda topic: (),
    ) -> None:
        if folder.exists():
            raise InputError(f"{folder} exists. Name another folder for the recording, or remove it first.")
        folder.mkdir(parents=True)
        self.path = folder / f"{folder.name}_0.mcap"
        self._offered = offered
        self._file = UnbufferedFile(self.path)
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        self._contents = Contents()
        try:
            self._writer = open_writer(self._file)
            for name, value in (metadata or {}).items():
                self._writer.add_metadata(name, {"json": json.dumps(value)})
        except BaseException:
            self._file.close()
            raise

    @property
    def counts(self) -> Mapping[str, int]:
        """Messages written, by topic."""
        return self._contents.counts

    def write(self, topic: str, message_type: str, data: bytes, received_ns: int) -> None:
        """Append one message that arrived at `received_ns` (system clock). Raises OSError when the disk refuses."""
        if topic not in self._channels:
            self._add_channel(topic, message_type)
        stamp = _stamp(message_type, data, received_ns)
        self._writer.add_message(self._channels[topic], received_ns, data, stamp, self.counts.get(topic, 0))
        self._contents.count(topic, received_ns)

    def _add_channel(self, topic: str, message_type: str) -> None:
        if message_type not in self._schemas:
            text = messages.definition(message_type).encode()
            self._schemas[message_type] = self._writer.register_schema(message_type, "ros2msg", text)
        metadata = {OFFERED_QOS: qos_text(self._offered(topic)), TYPE_HASH: messages.type_hash(message_type)}
        self._channels[topic] = self._writer.register_channel(topic, "cdr", self._schemas[message_type], metadata)
        self._contents.add_topic(topic, message_type, metadata)

    def close(self) -> None:
        """Write the index and metadata.yaml. Raises OSError when the disk refuses; then the bag can be recovered."""
        try:
            self._writer.finish()
        except BaseException:
            self._file.close()
            raise
        self._file.close(sync=True)
        self._contents.write(self.path)

    def abandon(self) -> None:
        """Let go of a file that cannot be written any more; `recover` makes a bag of it."""
        self._file.close()
