"""ROS 1 bags: uncompressed, bz2 or lz4, indexed or not. A mapping says what their topics mean; see `bag_mapping`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError
from embodied.datasets.bag_files import ROSBAG1, find_recordings, looks_like
from embodied.datasets.bag_source import find_mapping, mapped_source, refusal
from embodied.datasets.source import Source, check_options

OPTIONS = ("mapping", "propose")


def sniff(path: Path) -> bool:
    return looks_like(path, ROSBAG1)


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a bag or a folder of them.

    Args:
        options: `mapping`: a YAML file that says what the topics mean (`embodied_mapping.yaml` beside the bag is found
            without). `propose`: write a draft of one to this file, and import nothing.

    Raises:
        InputError: no bag, no mapping, or nothing in it can be used.
        ConfigError: the mapping is wrong, or a draft of one was written.
    """
    check_options("rosbag1", options, OPTIONS)
    recordings = find_recordings(path, ROSBAG1)
    if not recordings:
        raise InputError(f"{path} holds no .bag file.")
    mapping = find_mapping(path, recordings, options)
    if mapping is None:
        raise refusal(path, recordings)
    return mapped_source(recordings, mapping)
