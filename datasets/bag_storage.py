"""The containers of ROS recordings as one stream of messages: MCAP and sqlite3 of rosbag2, and ROS 1 bags.

Files are read forward, a chunk or a row at a time. Indexes are not used, so a file without one, or with a damaged one,
reads like any other; a file that is cut gives what was written before the break, then a `Damage` that says so.
"""

from collections.abc import Iterator, Set
from pathlib import Path

from embodied.contracts.errors import InputError
from embodied.datasets.bag_items import ZSTD_MAGIC, Item, inflate, rewound
from embodied.datasets.bag_mcap import MCAP_MAGIC, read_mcap
from embodied.datasets.bag_ros1 import ROS1_MAGIC, read_ros1
from embodied.datasets.bag_sqlite import SQLITE_MAGIC, read_sqlite


def read_items(path: Path, wanted: Set[str] | None = None) -> Iterator[Item]:
    """What a file holds, in the order it was written.

    Args:
        wanted: names of the topics whose messages are given; None for all.

    Raises:
        InputError: the file cannot be opened, or is none of the three containers.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(4) == ZSTD_MAGIC
            file.seek(0)
            stream = inflate(file, path) if packed else file
            magic = stream.read(16)
            if magic.startswith(SQLITE_MAGIC):
                yield from read_sqlite(path, packed, wanted)
            elif magic.startswith(MCAP_MAGIC):
                yield from read_mcap(rewound(stream, magic, len(MCAP_MAGIC)), wanted)
            elif magic.startswith(ROS1_MAGIC):
                yield from read_ros1(rewound(stream, magic, len(ROS1_MAGIC)), wanted)
            elif magic.startswith(b"#ROSBAG V1"):
                raise InputError(f"{path} is a ROS bag of version 1. Convert it with 'rosbag fix' of ROS 1.")
            elif not magic:
                raise InputError(f"{path} is empty: its recorder was killed before it wrote anything.")
            else:
                raise InputError(f"{path} is no bag: it starts with bytes of neither MCAP, sqlite3 nor ROS 1.")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
