"""sqlite3, the container of rosbag2 before Iron: tables `topics`, `messages` and, since Iron, `message_definitions`."""

import contextlib
import shutil
import sqlite3
import tempfile
import urllib.parse
from collections.abc import Iterator, Set
from pathlib import Path

from embodied.contracts.errors import InputError
from embodied.datasets.bag_items import MAX_RECORD, PIECE, BrokenRecord, Damage, Item, Message, Topic, inflate

SQLITE_MAGIC = b"SQLite format 3\x00"


def read_sqlite(path: Path, packed: bool, wanted: Set[str] | None) -> Iterator[Item]:
    """The rows of a database that is never opened for writing; its journals are replayed in a copy."""
    journals = [Path(f"{path}{end}") for end in ("-wal", "-journal")]
    journals = [journal for journal in journals if journal.is_file() and journal.stat().st_size]
    if not packed and not journals:
        yield from _sqlite(path, path, True, wanted)
        return
    with tempfile.TemporaryDirectory(prefix="embodied-bag-") as folder:
        copy = Path(folder) / "bag.db3"
        if shutil.disk_usage(folder).free < 2 * path.stat().st_size:
            raise InputError(f"{path} needs a copy in {tempfile.gettempdir()}, which is full. Set TMPDIR to another.")
        with open(path, "rb") as file, open(copy, "wb") as out:
            shutil.copyfileobj(inflate(file, path) if packed else file, out, PIECE)
        for journal in journals:
            shutil.copyfile(journal, f"{copy}{journal.name[len(path.name) :]}")
        yield from _sqlite(copy, path, not journals, wanted)


def _sqlite(path: Path, name: Path, immutable: bool, wanted: Set[str] | None) -> Iterator[Item]:
    mode = "mode=ro&immutable=1" if immutable else "mode=rw"
    begun = False
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{urllib.parse.quote(str(path.absolute()))}?{mode}", uri=True)
        ) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_RECORD)
            connection.text_factory = lambda text: text.decode(errors="replace")
            # writable_schema: without it SQLite opens no file that is shorter than its head says. Nothing is written.
            for pragma in ("trusted_schema=OFF", "query_only=ON", "cell_size_check=ON", "writable_schema=ON"):
                connection.execute(f"PRAGMA {pragma}")
            topics = _sqlite_topics(connection, name)
            yield from topics.values()
            begun = True
            yield from _sqlite_messages(connection, topics, wanted)
    except (sqlite3.Error, OverflowError, BrokenRecord) as error:
        if not begun:
            raise InputError(f"{name} cannot be read as a sqlite3 bag: {error}.") from error
        yield Damage(f"its database is damaged: {error}")


def _sqlite_topics(connection: sqlite3.Connection, name: Path) -> dict[int, Topic]:
    tables = {
        table: {row[1] for row in connection.execute(f"PRAGMA table_xinfo({table})") if row[6] == 0}
        for (table,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0 AND sql NOT LIKE 'create virtual%' "
            "AND name IN ('topics', 'messages', 'message_definitions')"
        )
    }
    needed = {"topics": {"id", "name", "type"}, "messages": {"topic_id", "timestamp", "data"}}
    for table, columns in needed.items():
        if not columns <= tables.get(table, set()):
            raise InputError(f"{name} is a sqlite3 database but no bag: it has no table '{table}' as rosbag2 makes it.")
    definitions: dict[str, tuple[str, str]] = {}
    if {"topic_type", "encoding", "encoded_message_definition"} <= tables.get("message_definitions", set()):
        rows = connection.execute("SELECT topic_type, encoding, encoded_message_definition FROM message_definitions")
        for kind, encoding, text in rows:
            if isinstance(kind, str) and isinstance(text, str):
                definitions[kind] = text, {"ros2msg": "msg", "ros2idl": "idl"}.get(str(encoding), str(encoding))
    encoding = "serialization_format" if "serialization_format" in tables["topics"] else "'cdr'"
    topics: dict[int, Topic] = {}
    for number, topic, kind, form in connection.execute(f"SELECT id, name, type, {encoding} FROM topics NOT INDEXED"):
        if not (isinstance(number, int) and isinstance(topic, str) and isinstance(kind, str)):
            raise BrokenRecord("a row of its table 'topics' has values of other types")
        topics[number] = Topic(topic, kind, str(form), *definitions.get(kind, ("", "")))
        if len(topics) > 100_000:
            raise BrokenRecord("it has more than 100,000 topics")
    return topics


def _sqlite_messages(
    connection: sqlite3.Connection, topics: dict[int, Topic], wanted: Set[str] | None
) -> Iterator[Message | Damage]:
    numbers = [number for number, topic in topics.items() if wanted is None or topic.name in wanted]
    only = f"WHERE topic_id IN ({','.join(map(str, numbers))})" if wanted is not None else ""
    last, odd = None, 0
    for row, number, log_ns, data in connection.execute(
        f"SELECT rowid, topic_id, timestamp, data FROM messages NOT INDEXED {only}"
    ):
        if last is not None and row <= last:  # a damaged tree may lead to the same rows for ever
            raise BrokenRecord("its rows are out of order")
        last = row
        topic = topics.get(number) if isinstance(number, int) else None
        if topic is None or not isinstance(data, bytes) or not isinstance(log_ns, int) or log_ns < 0:
            odd += 1
        else:
            yield Message(topic, data, log_ns)
    if odd:
        yield Damage(f"{odd} rows of its table 'messages' belong to no topic or have values of other types")
