"""Parquet files, read in small batches.

A few kilobytes of Parquet may stand for billions of values (run lengths, dictionaries, compression), so nothing is read
whole: batches are sized by what a row holds, and a row that holds too much is refused.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError

BATCH_BYTES = 8_000_000  # of decoded values at a time
MAX_BATCH_ROWS = 65_536
MAX_ROW_BYTES = 64_000_000  # of one row of one column


@dataclasses.dataclass
class Rows:
    """Rows of one Parquet file by number. Asked for in ascending order, each is decoded once.

    Args:
        path: the file.
        columns: names of the columns to read.
    """

    path: Path
    columns: Sequence[str]

    def __post_init__(self) -> None:
        self._file = open_parquet(self.path)
        with readable_parquet(self.path):
            metadata = self._file.metadata
            self._batch_rows = _batch_rows(self.path, metadata, self.columns)
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None
        self._first = 0  # row number of the batch's first row

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Rows `start` to `stop` as record batches. Raises InputError where the file does not hold them."""
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        reached = self._first + (self._batch.num_rows if self._batch is not None else 0)
        if self._batches is None or start < self._first or self._starts[group] > reached:
            self._seek(group)
        while True:
            batch = self._batch
            end = self._first + (batch.num_rows if batch is not None else 0)
            if batch is not None and end > start:
                yield batch.slice(max(start - self._first, 0), min(stop, end) - max(start, self._first))
            if end >= stop:
                return
            self._next(end)

    def _seek(self, group: int) -> None:
        with readable_parquet(self.path):
            self._batches = self._file.iter_batches(
                batch_size=self._batch_rows,
                row_groups=range(group, len(self._starts) - 1),
                columns=list(self.columns),
                use_threads=False,
            )
        self._batch, self._first = None, int(self._starts[group])

    def _next(self, first: int) -> None:
        with readable_parquet(self.path):
            batch = next(self._batches or iter(()), None)
        if batch is None:
            raise InputError(f"{self.path} ends at row {first}, before the rows that its episodes need.")
        self._batch, self._first = batch, first


def batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """All rows of some columns as record batches of a few MB."""
    file = open_parquet(path)
    with readable_parquet(path):
        rows = _batch_rows(path, file.metadata, columns)
        yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises InputError where it is truncated or damaged."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "formats", "Reading Parquet") from error
    with readable_parquet(path):
        # Without a buffer pyarrow holds whole column chunks, which are whole files where pictures are embedded.
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False)


@contextlib.contextmanager
def readable_parquet(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors inside the block into an InputError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path} cannot be read: {reason}.\nIt is truncated or damaged: copy it again.") from error


def to_array(column: Any, name: str) -> np.ndarray:
    """A numeric column or batch of one as (n, ...) numbers; lists of equal length become axes.

    Raises:
        InputError: not numbers, with gaps (nulls), or lists of different lengths.
    """
    import pyarrow

    rows = len(column)
    shape: list[int] = [rows]
    while _is_list(column.type):
        if column.null_count:
            raise InputError(f"'{name}' has {column.null_count} empty rows (null).")
        values = column.flatten()
        outer = int(np.prod(shape))
        width = len(values) // outer if outer else 0
        if not pyarrow.types.is_fixed_size_list(column.type):
            widths = column.value_lengths().to_numpy(zero_copy_only=False)
            if len(widths) and (widths != width).any():
                raise InputError(
                    f"'{name}' holds lists of {widths.min()} to {widths.max()} numbers; one length is needed."
                )
        shape.append(width)
        column = values
    if not is_number(column.type):
        raise InputError(f"'{name}' holds {column.type}, not numbers.")
    if column.null_count:
        raise InputError(f"'{name}' has {column.null_count} empty values (null).")
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def is_number(kind: Any) -> bool:
    """Whether a pyarrow type is a plain number or bool."""
    import pyarrow

    types = pyarrow.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def is_picture(kind: Any) -> bool:
    """Whether a pyarrow type is what pictures are kept in: the bytes of a file, or a struct of bytes and path."""
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _batch_rows(path: Path, metadata: Any, columns: Sequence[str]) -> int:
    """Rows that fit in BATCH_BYTES, by the widest row group. Raises InputError: absurd rows."""
    widest = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        held = 0
        for j in range(group.num_columns):
            column = group.column(j)
            if any(column.path_in_schema == c or column.path_in_schema.startswith(c + ".") for c in columns):
                held += max(column.num_values * 8, column.total_uncompressed_size)
        widest = max(widest, held // max(1, group.num_rows))
    if widest > MAX_ROW_BYTES:
        raise InputError(f"{path}: a row holds {widest:,} bytes; the limit is {MAX_ROW_BYTES:,}. It is damaged.")
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // widest))
