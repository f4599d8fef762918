"""Tables about frames that people write by hand: CSV with a head line, or JSON lines."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError, suggest

TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def read_table(path: Path, columns: Mapping[str, type]) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file (any suffix but `.jsonl`) or of JSON lines, with their line numbers.

    Args:
        columns: name -> int, bool or str. Every row has all of them and no other.

    Raises:
        InputError: unreadable, a column missing or unknown, or a value that is not of its type; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}.") from None
    found = []
    for line, row in _json_lines(path, text) if path.suffix == ".jsonl" else _csv_lines(path, text):
        for name in row:
            if name not in columns:
                raise InputError(f"{path} line {line}: there is no column '{name}'.{suggest(str(name), columns)}")
        if missing := [name for name in columns if name not in row]:
            raise InputError(f"{path} line {line}: '{missing[0]}' is missing; a row has {', '.join(columns)}.")
        found.append((line, {name: _value(path, line, name, row[name], kind) for name, kind in columns.items()}))
    if not found:
        raise InputError(f"{path} has no rows; a row has {', '.join(columns)}.")
    return found


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {line} is no JSON object.")
        yield line, row


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if None in row:
                raise InputError(f"{path} line {reader.line_num} has more cells than the head line.")
            yield reader.line_num, {str(name).strip(): cell for name, cell in row.items() if cell is not None}
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}.") from None


def _value(path: Path, line: int, name: str, value: Any, kind: type) -> Any:
    text = str(value).strip()
    if kind is str and isinstance(value, str) and text:
        return text
    if kind is int and not isinstance(value, bool) and text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    if kind is bool and text.lower() in TRUTH:
        return TRUTH[text.lower()]
    wanted = {str: "text", int: "a whole number from 0", bool: "1 or 0"}[kind]
    raise InputError(f"{path} line {line}: '{name}' is {value!r:.60}; it must be {wanted}.")
