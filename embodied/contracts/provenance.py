"""Who made this, from what: code version, hashes of inputs, versions of the packages that matter."""

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import embodied

PACKAGES = ("torch", "numpy", "zarr", "open_clip_torch", "mujoco", "robosuite", "cyclonedds", "rosbags")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON, hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hex, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_version() -> str:
    """This package's version and a hash of its source, so that an edited checkout does not pass for a release."""
    root = Path(embodied.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{embodied.__version__}+{digest.hexdigest()[:12]}"


def package_versions() -> dict[str, str]:
    """Versions of the installed packages among `PACKAGES`, and Python's."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def provenance(made_by: str, config: Mapping[str, Any], inputs: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """The record stored beside everything we write.

    Args:
        made_by: the verb or function, for example `label clip`.
        config: the full configuration that was used.
        inputs: name -> fingerprint or hash of each input.
        more: counts, seeds, model names.

    The date makes attributes differ between two runs; arrays are byte-identical, and fingerprints cover arrays only.
    """
    return {
        "made_by": made_by,
        "config": dict(config),
        "inputs": dict(inputs),
        "code_version": code_version(),
        "packages": package_versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }
