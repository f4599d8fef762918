"""Minari's Arrow and Parquet storages: a folder `data/<i>` per episode, with `part-0.arrow` and `metadata.json`.

All columns have a row per observation: those of the steps are padded with one row, which is not read. An array of one
step is a list of fixed size, flattened; its shape stands in the space, or for infos in the field's metadata.
"""

import contextlib
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError, InputError, MissingExtraError
from embodied.datasets.hdf5 import is_key
from embodied.datasets.json_file import read_json
from embodied.datasets.minari_columns import (
    DEPTH,
    NUM_COLUMNS,
    Column,
    Space,
    Storage,
    is_picture,
    number_column,
    other,
    picture_column,
)
from embodied.datasets.parquet import batches as parquet_batches
from embodied.datasets.parquet import is_number, open_parquet, to_array
from embodied.datasets.pictures import lazy_pictures, picture_shape

FORMATS = ("arrow", "parquet")
EPISODE_BYTES = 256 << 20  # of one episode, decoded from Parquet, pictures as JPEG
STEPS = ("actions", "rewards", "terminations", "truncations")
COLUMNS = ("observations", *STEPS, "infos")
MAGIC = b"ARROW1\0\0"
HEADER, COMPRESSION = 2, 3  # slots of Arrow's tables Message and RecordBatch


def episode_folders(data: Path) -> dict[int, Path]:
    """Number -> folder with Arrow or Parquet files."""
    inner = data.iterdir() if os.access(data, os.R_OK) else ()
    folders = {int(folder.name): folder for folder in inner if re.fullmatch("[0-9]{1,9}", folder.name)}
    return {number: folder for number, folder in sorted(folders.items()) if folder.is_dir() and _parts(folder)}


def open_storage(data: Path, metadata: dict[str, Any], spaces: dict[str, Space]) -> Storage:
    """Open the folder that holds the episodes' folders."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pyarrow", "formats", "Reading Minari's Arrow storage") from error
    folders = episode_folders(data)

    def details(episode: int) -> dict[str, Any]:
        path = folders[episode] / "metadata.json"
        found = read_json(path) if path.exists() else {}
        return found if isinstance(found, dict) else {}

    def columns(episode: int) -> dict[str, Column]:
        table = _table(folders[episode])
        rows = table.num_rows
        try:
            claimed = details(episode).get("total_steps")
        except InputError:
            claimed = None
        # Nothing else says whether the last row is a step or its padding.
        steps = claimed if isinstance(claimed, int) and claimed in (rows, rows - 1) else rows - 1
        return dict(_columns(folders[episode], table, max(0, steps), spaces))

    return Storage(data, tuple(folders), metadata, columns, details)


def _parts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if re.fullmatch(rf"part-[0-9]+\.({'|'.join(FORMATS)})", file.name))


def _table(folder: Path) -> Any:
    """All rows of an episode; of an Arrow file nothing but what is looked at is read."""
    import pyarrow

    with _readable(folder):
        batches = [batch for path in _parts(folder) for batch in _batches(path)]
        if not batches:
            raise InputError(f"{folder} has no rows.")
        for batch in batches:
            batch.validate(full=True)  # offsets in the file are followed without a check otherwise
        return pyarrow.Table.from_batches(batches).combine_chunks()


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow

    if path.suffix == ".parquet":
        size = 0
        names = open_parquet(path).schema_arrow.names
        for batch in parquet_batches(path, [name for name in COLUMNS if name in names]):
            size += batch.nbytes
            if size > EPISODE_BYTES:
                raise InputError(f"{path} holds more than {EPISODE_BYTES >> 20} MiB: too large for one episode.")
            yield batch
        return
    # The file's footer may point anywhere; what it lists stands before it as a stream.
    source = pyarrow.memory_map(str(path))
    if source.read(len(MAGIC)) != MAGIC:
        raise InputError(f"{path} is no Arrow file.")
    schema = None
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        if message.type == "schema" and schema is None:
            schema = pyarrow.ipc.read_schema(message)
        elif message.type == "record batch" and schema is not None and not _is_compressed(message):
            yield pyarrow.ipc.read_record_batch(message, schema)
        else:
            raise InputError(f"{path} holds a compressed {message.type}, or one in the wrong place: not Minari's.")


def _is_compressed(message: Any) -> bool:
    """Whether a record batch's header (a flatbuffer) names a codec: nothing else bounds what it inflates to."""
    header = message.metadata.to_pybytes()

    def slot(table: int, number: int) -> int:
        """Where field `number` of the table lies, 0 where it is not set."""
        directory = table - struct.unpack_from("<i", header, table)[0]
        size = struct.unpack_from("<H", header, directory)[0]
        place = struct.unpack_from("<H", header, directory + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + place if place else 0

    try:
        content = slot(struct.unpack_from("<I", header)[0], HEADER)
        return bool(slot(content + struct.unpack_from("<I", header, content)[0], COMPRESSION))
    except struct.error as error:
        raise InputError("an Arrow header is damaged.") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns whatever pyarrow raises on damaged bytes into an InputError that names the episode's folder."""
    import pyarrow

    try:
        yield
    except EmbodiedError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path} cannot be read: {reason}.\nIt is truncated or damaged: copy it again.") from error


def _columns(folder: Path, table: Any, steps: int, spaces: dict[str, Space]) -> Iterator[tuple[str, Column]]:
    import pyarrow

    waiting = [
        (name, field, chunk, 0)
        for name, field, column in zip(table.column_names, table.schema, table.columns, strict=True)
        for chunk in [column.chunk(0) if column.num_chunks else pyarrow.array([], column.type)]
    ]
    count = 0
    while waiting:
        path, field, array, depth = waiting.pop()
        count += 1
        if depth > DEPTH or count > NUM_COLUMNS:
            raise InputError(f"it has more than {NUM_COLUMNS} arrays, or nested deeper than {DEPTH}.")
        rows = min(steps, len(array)) if path.partition("/")[0] in STEPS else len(array)
        if pyarrow.types.is_struct(field.type) and not array.null_count:
            inner = [(field.type.field(index), array.field(index)) for index in range(field.type.num_fields)]
            waiting += [(f"{path}/{each.name}", each, child, depth + 1) for each, child in inner if is_key(each.name)]
        else:
            try:
                with _readable(folder):
                    yield path, _column(folder, path, field, array.slice(0, rows), spaces.get(path))
            except InputError as error:
                yield path, other(rows, str(error))


def _column(folder: Path, path: str, field: Any, array: Any, space: Space | None) -> Column:
    import pyarrow

    types, kind, rows = pyarrow.types, field.type, len(array)
    if types.is_string(kind) or types.is_large_string(kind):
        return Column("text", rows, values=lambda wanted: [text or "" for text in array.slice(0, wanted).to_pylist()])
    if types.is_binary(kind) or types.is_large_binary(kind):
        return _encoded(path, array)
    shape, number = _shape(field, space)
    if number is None:
        return other(rows, f"{str(kind)[:50]} per step")
    dtype = np.dtype(number.to_pandas_dtype())

    def read(start: int, stop: int) -> np.ndarray:
        with _readable(folder):
            return to_array(array.slice(start, stop - start), path).reshape(-1, *shape)

    if is_picture(shape, dtype):
        return picture_column(rows, shape, read)
    return number_column(rows, shape, str(number), lambda wanted: read(0, wanted))


def _encoded(path: str, array: Any) -> Column:
    def encoded(start: int, stop: int) -> Iterator[bytes]:
        return (array[place].as_py() or b"" for place in range(start, stop))

    if not len(array):
        return other(0, "no pictures")
    shape = picture_shape(next(encoded(0, 1)), f"'{path}' 0")
    return Column("pictures", len(array), shape, lambda wanted: lazy_pictures((wanted, *shape), encoded, f"'{path}'"))


def _shape(field: Any, space: Space | None) -> tuple[tuple[int, ...], Any]:
    """Shape of one row and type of its numbers; None for what is no list of numbers of fixed size."""
    import pyarrow

    kind, sizes = field.type, []
    while pyarrow.types.is_fixed_size_list(kind) and len(sizes) < DEPTH:
        sizes.append(kind.list_size)
        kind = kind.value_type
    if not is_number(kind):
        return (), None
    parts = list(filter(None, (field.metadata or {}).get(b"shape", b"-").split(b",")))
    said = tuple(map(int, parts)) if all(re.fullmatch(b"[0-9]{1,9}", part) for part in parts) else None
    for shape in (space.shape if space else None, said):
        if sizes and shape is not None and math.prod(shape) == math.prod(sizes):
            return shape, kind
    return tuple(sizes), kind
