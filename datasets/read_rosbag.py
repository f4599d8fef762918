"""rosbag2: MCAP and sqlite3 bags, split or not, with or without metadata.yaml; an MCAP of ROS 1 messages too.

A bag that says what its joints and actions mean, because `embodied deploy` recorded it, is read by that contract; see
`bag_contract`. Any other bag needs a mapping, a small YAML; see `bag_mapping`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets.bag_contract import contract_source
from embodied.datasets.bag_files import ROSBAG2, find_recordings, looks_like
from embodied.datasets.bag_meaning import find_contract
from embodied.datasets.bag_source import find_mapping, mapped_source, refusal
from embodied.datasets.source import Source, check_options

OPTIONS = ("contract", "mapping", "propose")


def sniff(path: Path) -> bool:
    return looks_like(path, ROSBAG2)


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a bag or a folder of them.

    Args:
        options: `mapping`: a YAML file that says what the topics mean (`embodied_mapping.yaml` beside the bag is found
            without). `propose`: write a draft of one to this file, and import nothing. `contract`: a policy's
            `contract.json`, for bags of `embodied deploy` that hold none.

    Raises:
        InputError: no bag, neither mapping nor contract, or nothing in it can be used.
        ConfigError: the mapping is wrong, or a draft of one was written.
    """
    check_options("rosbag2", options, OPTIONS)
    if "contract" in options and "mapping" in options:
        raise ConfigError("rosbag2: give either a contract or a mapping.")
    recordings = find_recordings(path, ROSBAG2)
    if not recordings:
        raise InputError(f"{path} holds no .mcap or .db3 file.")
    mapping = None if "contract" in options else find_mapping(path, recordings, options)
    if mapping is not None:
        return mapped_source(recordings, mapping)
    contract = find_contract(recordings, options.get("contract"))
    if contract is None:
        raise refusal(path, recordings)
    return contract_source(recordings, contract)
