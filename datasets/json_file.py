"""JSON files that nobody vouches for."""

import json
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError

JSON_BYTES = 16 << 20


def read_json(path: Path) -> Any:
    """A JSON file nobody vouches for. Raises InputError: absent, too large, too deep, damaged or no text."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise InputError(f"{path} has more than {JSON_BYTES >> 20} MiB; it should have some kB.")
        found = json.loads(path.read_bytes())
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair can be read, but not written again
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {str(error)[:200]}.") from error
    return found
