"""Where a store or a recording is: a local path, or an fsspec URL such as `s3://bucket/store`."""

import re
from pathlib import Path


def location(path: str | Path) -> str:
    """`path` as text, a URL with its two slashes: pathlib turns `s3://bucket/x` into `s3:/bucket/x`."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", str(path))


def is_remote(path: str | Path) -> bool:
    """Whether `path` is an fsspec URL; everything else is a local path."""
    return "://" in location(path)
