"""Makes a whole bag of what a killed recorder, a full disk or a power cut left of one.

Everything up to the break is kept, the messages of a half-written chunk too. The damaged file stays beside the new one
as `<name>.mcap.damaged` and is never changed; readers pass it by. An interrupted recovery is simply run again.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.robot_bridge.bag_writer import Contents, UnbufferedFile, open_writer

_MAGIC = b"\x89MCAP0\r\n"
_CHUNK, _DATA_END = 0x06, 0x0F
DAMAGED = ".damaged"


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What `recover` did.

    Attributes:
        messages: that the bag holds now.
        changed: False where it was whole already.
        damaged: the file as it was found, kept; None where nothing was rewritten.
        lost_bytes: at the break, of which nothing could be made.
    """

    folder: Path
    messages: int
    changed: bool
    damaged: Path | None = None
    lost_bytes: int = 0


class Records:
    """The records of an MCAP file up to where it breaks; iterate once.

    Attributes:
        lost_bytes: at the end of the file, once the iteration is over; 0 for a whole file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.lost_bytes = path, 0

    def __iter__(self) -> Iterator[Any]:
        try:
            import mcap.records  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("mcap", "ros", "reading a bag") from error
        size = self._path.stat().st_size
        with open(self._path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                self.lost_bytes = size
                return
            used = len(_MAGIC)
            while len(head := file.read(9)) == 9:
                opcode, length = struct.unpack("<BQ", head)
                if opcode == _DATA_END:
                    return
                body = file.read(min(length, size))
                cut = len(body) < length
                taken = yield from _parsed(opcode, body, cut)
                if cut:
                    used += 9 + taken if taken else 0
                    break
                used += 9 + length
            self.lost_bytes = size - used


def _parsed(opcode: int, body: bytes, cut: bool) -> Iterator[Any]:
    """The records in a record's body (a chunk holds several); returns how many of its bytes were of use."""
    from mcap.data_stream import ReadDataStream
    from mcap.exceptions import McapError
    from mcap.records import Attachment, Channel, Message, Metadata, Schema

    readers = {0x03: Schema.read, 0x04: Channel.read, 0x09: Attachment.read, 0x0C: Metadata.read}
    stream = ReadDataStream(io.BytesIO(body))
    try:
        if opcode == _CHUNK:
            return (yield from _chunk(body, cut))
        if cut:
            return 0
        if opcode == 0x05:
            yield Message.read(stream, len(body))
        elif opcode in readers:
            yield readers[opcode](stream)
    except (McapError, ValueError, struct.error):  # no record, for all that its length was right
        return 0
    return len(body)


def _chunk(body: bytes, cut: bool) -> Iterator[Any]:
    """The records of a chunk; of an uncompressed one, those before a cut too."""
    (name_length,) = struct.unpack_from("<I", body, 28)
    start = 32 + name_length + 8
    compression = body[32 : 32 + name_length].decode()
    if compression or not cut:
        if cut:
            return 0
        from mcap.data_stream import ReadDataStream
        from mcap.records import Chunk
        from mcap.stream_reader import breakup_chunk

        try:
            yield from breakup_chunk(Chunk.read(ReadDataStream(io.BytesIO(body))))
        except Exception:  # decompression raises what each library raises
            return 0
        return len(body)
    at = start
    while at + 9 <= len(body):
        opcode, length = struct.unpack_from("<BQ", body, at)
        if at + 9 + length > len(body):
            break
        yield from _parsed(opcode, body[at + 9 : at + 9 + length], False)
        at += 9 + length
    return at


def read_records(path: Path) -> Iterator[tuple[str, str, bytes, int]]:
    """Yield (topic, message type, data, received_ns) up to the end or to where the file was cut off."""
    schemas: dict[int, str] = {}
    channels: dict[int, tuple[str, str]] = {}
    for record in Records(path):
        kind = type(record).__name__
        if kind == "Schema":
            schemas[record.id] = record.name
        elif kind == "Channel":
            channels[record.id] = (record.topic, schemas.get(record.schema_id, ""))
        elif kind == "Message" and record.channel_id in channels:
            yield (*channels[record.channel_id], record.data, record.log_time)


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON metadata records of an MCAP file, by name; works on a file that was cut off."""
    found = {}
    for record in Records(path):
        if type(record).__name__ == "Metadata" and "json" in record.metadata:
            with contextlib.suppress(json.JSONDecodeError):
                found[record.name] = json.loads(record.metadata["json"])
    return found


def recover(folder: Path) -> Recovery:
    """Finish the bag of a killed recorder. Does nothing to a whole one.

    Raises:
        InputError: there is not one MCAP file in `folder`, or its recorder still writes it.
        OSError: the disk refuses; the damaged file is as it was.
    """
    path = _the_file(folder)
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is still being recorded. End the recorder first.") from None
        if _is_whole(file):
            contents, changed = _survey(path), False
            if not (folder / "metadata.yaml").is_file():
                contents.write(path)
                changed = True
            return Recovery(folder, contents.total, changed)
        return _rewrite(folder, path)


def _the_file(folder: Path) -> Path:
    files = sorted(p for p in folder.glob("*.mcap") if not p.name.startswith(".")) if folder.is_dir() else []
    if len(files) != 1:
        found = f"holds {len(files)} .mcap files" if files else "holds no .mcap file"
        raise InputError(f"{folder} {found}; it is no bag of this recorder.")
    return files[0]


def _is_whole(file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(_MAGIC)))
    return size > 2 * len(_MAGIC) and file.read() == _MAGIC


def _survey(path: Path) -> Contents:
    contents, schemas, topics = Contents(), {}, {}
    for record in Records(path):
        kind = type(record).__name__
        if kind == "Schema":
            schemas[record.id] = record.name
        elif kind == "Channel":
            topics[record.id] = record.topic
            contents.add_topic(record.topic, schemas.get(record.schema_id, ""), record.metadata)
        elif kind == "Message" and record.channel_id in topics:
            contents.count(topics[record.channel_id], record.log_time)
    return contents


def _rewrite(folder: Path, path: Path) -> Recovery:
    fresh = folder / f".{path.name}.recovering"
    fresh.unlink(missing_ok=True)  # of a recovery that was interrupted
    file = UnbufferedFile(fresh)
    try:
        records = Records(path)
        contents = _copy(records, open_writer(file))
        file.close(sync=True)
    except BaseException:
        file.close()
        fresh.unlink(missing_ok=True)
        raise
    kept = path.with_name(path.name + DAMAGED)
    if not kept.exists():
        try:
            os.link(path, kept)  # at every moment one name at least leads to the damaged file
        except OSError:  # exFAT has no links
            path.rename(kept)
    fresh.replace(path)
    contents.write(path)
    return Recovery(folder, contents.total, True, kept, records.lost_bytes)


def _copy(records: Records, writer: Any) -> Contents:
    contents, schemas, channels = Contents(), {0: (0, "")}, {}
    for record in records:
        kind = type(record).__name__
        if kind == "Schema" and record.id not in schemas:
            number = writer.register_schema(record.name, record.encoding, record.data)
            schemas[record.id] = (number, record.name)
        elif kind == "Channel" and record.id not in channels and record.schema_id in schemas:
            number, name = schemas[record.schema_id]
            channels[record.id] = (
                writer.register_channel(record.topic, record.message_encoding, number, record.metadata),
                record.topic,
            )
            contents.add_topic(record.topic, name, record.metadata)
        elif kind == "Message" and record.channel_id in channels:
            channel, topic = channels[record.channel_id]
            writer.add_message(channel, record.log_time, record.data, record.publish_time, record.sequence)
            contents.count(topic, record.log_time)
        elif kind == "Metadata":
            writer.add_metadata(record.name, record.metadata)
        elif kind == "Attachment":
            writer.add_attachment(record.create_time, record.log_time, record.name, record.media_type, record.data)
    writer.finish()
    return contents
