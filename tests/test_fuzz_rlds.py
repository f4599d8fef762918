import functools
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import change_bytes, fuzz
from tfrecord_files import TEXT, encoded, example, field, framed, image, masked, steps, tensor, tree, write_dataset

FORMAT = "rlds"
FLAGS = {"is_first": tensor(dtype="bool"), "is_last": tensor(dtype="bool"), "is_terminal": tensor(dtype="bool")}
VECTORS = tree(
    steps=steps(
        **FLAGS,
        discount=tensor(),
        reward=tensor(),
        observation=tree(state=tensor((3,)), packed=tensor((2, 2), "uint8", "zlib"), natural_language_instruction=TEXT),
        action=tree(grip=tensor(dtype="int32"), move=tensor((2,))),
    ),
    episode_metadata=tree(success=tensor(dtype="bool")),
)
PICTURES = tree(
    steps=steps(
        **FLAGS, reward=tensor(), observation=tree(top=image((8, 6, 3)), state=tensor((2,))), action=tensor((2,))
    ),
    episode_metadata=tree(has_top=tensor(dtype="bool")),
)


def lists(pictures: bool, n: int) -> dict[str, Any]:
    """The lists of one episode."""
    rng = np.random.default_rng(n)
    common = {
        "steps/is_first": np.arange(n) == 0,
        "steps/is_last": np.arange(n) == n - 1,
        "steps/is_terminal": (np.arange(n) == n - 1) & (n % 2 == 0),
        "steps/reward": np.arange(n)[::-1] + 0.0,
    }
    if pictures:
        return common | {
            "steps/observation/top": encoded(rng.integers(0, 256, (n, 8, 6, 3), np.uint8), "PNG" if n % 2 else "JPEG"),
            "steps/observation/state": rng.normal(size=2 * n),
            "steps/action": rng.normal(size=2 * n),
            "episode_metadata/has_top": np.array([n % 2]),
        }
    return common | {
        "steps/discount": np.where((np.arange(n) == n - 1) & (n % 2 == 0), 0.0, 1.0),
        "steps/observation/state": rng.normal(size=3 * n),
        "steps/observation/packed": [zlib.compress(rng.bytes(4)) for _ in range(n)],
        "steps/observation/natural_language_instruction": [b"open the door"] * n,
        "steps/action/grip": np.arange(n),
        "steps/action/move": rng.normal(size=2 * n),
        "episode_metadata/success": np.array([1]),
    }


def seeds(folder: Path) -> list[Path]:
    def records(pictures: bool, *counts: int) -> list[bytes]:
        return [example(lists(pictures, n)) for n in counts]

    return [
        write_dataset(folder / "vectors", VECTORS, {"train": [records(False, 4, 3), records(False, 5)]}),
        write_dataset(
            folder / "pictures" / "1.0.0", PICTURES, {"train": [records(True, 3)], "val": [records(True, 2)]}
        ).parent,
    ]


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str:
    folder = next(target.rglob("features.json")).parent
    shards = sorted(folder.glob("*.tfrecord-*"))
    attack: Callable[..., str | None] = ATTACKS[int(rng.integers(len(ATTACKS)))]
    shard = shards[int(rng.integers(len(shards)))]
    return f"{attack.__name__}: {attack(folder, shard, seed.name == 'pictures', rng) or shard.name}"


def pick(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def damaged_example(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> None:
    """Bytes of an Example are changed and its checksum made to fit."""
    record = example(lists(pictures, 4))
    shard.write_bytes(framed(change_bytes(record, rng)) + framed(record))


def odd_list(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> str:
    """One list of an episode has another kind, length or content."""
    found = lists(pictures, 4)
    name = str(pick(rng, sorted(found)))
    found[name] = pick(
        rng,
        [
            [],
            [b"", b"\xff\xfe", b"x" * 10_000],
            [zlib.compress(bytes(1 << 24))] * 4,
            [large_picture()] * 4,
            encoded(np.zeros((4, 8, 6), np.uint8)),
            np.zeros(int(pick(rng, [0, 1, 3, 5, 100_000]))),
            np.full(4, np.nan),
            np.full(12, np.inf),
            np.array([0, 1, 1, 0]),
            np.array([2**63 - 1, -(2**63), -1, 0]),
            np.zeros(0, np.int64),
        ],
    )
    record = example(found if rng.random() < 0.8 else {key: value for key, value in found.items() if key != name})
    shard.write_bytes(framed(record) + framed(example(lists(pictures, 3))))
    return name


def odd_wire(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> None:
    """Messages that no writer makes: endless integers, groups, lengths beyond the end, lists one by one, nesting."""
    deep = b""
    for _ in range(2000):
        deep = field(1, deep)
    odd = [
        b"\xff" * 20,
        b"\x0b" * 100,
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        deep,
        field(1, field(1, field(1, b"steps/reward") + field(2, field(2, b"\x0d\x00\x00\x80\x3f" * 50_000)))),
        field(1, field(1, field(1, b"steps/is_last") + field(2, field(3, field(1, b"\x80" * 1_000_000))))),
        field(1, field(1, field(1, b"steps/is_last") + field(2, field(3, field(1, bytes(20_000_000)))))),
        field(1, b"\x0a\x00" * 200_000),
    ]
    shard.write_bytes(framed(pick(rng, odd)) + framed(example(lists(pictures, 3))))


def odd_frame(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> None:
    """A header whose checksum fits and whose length does not."""
    length = struct.pack("<Q", int(pick(rng, [0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])))
    whole = framed(example(lists(pictures, 3)))
    odd = length + masked(length) + pick(rng, [b"", bytes(16), whole])
    shard.write_bytes(pick(rng, [whole + odd, odd + whole, framed(b"") * 10_000]))


def odd_shards(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> str:
    """Shards are missing, empty, too many, misnamed, folders or links."""
    name = str(
        pick(
            rng,
            [
                "toy-train.tfrecord-00000-of-99999",
                "toy-train.tfrecord-999999999-of-999999999",
                "toy-train.tfrecord-00007-of-00002",
                "toy-\udcff.tfrecord-00000-of-00001",
                "toy-" + "x" * 200 + ".tfrecord-00000-of-00001",
                "..-...tfrecord-00000-of-00001",
                "toy-train.array_record-00000-of-00001",
            ],
        )
    )
    change = int(rng.integers(4))
    if change == 0:
        shard.unlink()
    elif change == 1:
        shard.rename(folder / name)
    elif change == 2:
        shard.write_bytes(b"")
    else:
        shard.unlink()
        pick(rng, [shard.mkdir, lambda: shard.symlink_to("/etc/passwd"), lambda: shard.symlink_to(shard.name)])()
    return ascii(name)


def odd_tree(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> str:
    """One node of features.json is replaced."""
    features = json.loads((folder / "features.json").read_text())
    nodes: list[tuple[Any, Any]] = []
    waiting = [features]
    while waiting:
        node = waiting.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    node, key = pick(rng, nodes)
    deep: Any = tensor()
    for _ in range(40):
        deep = tree(a=deep)
    values = [None, 3, -1, 1e300, "", "\ud800", "x" * 10_000, [], {}, [[]], True, "../../..", deep, "9" * 5000]
    values += ["2147483647", "-1", "0", "uint8", "float64", "bool", "object", "bytes", "zlib", "jpeg"]
    values += [
        tensor((2**30, 2**30)),
        tensor((30_000, 30_000, 3), "uint8"),
        image((30_000, 30_000, 3)),
        image((0, 0, 3)),
    ]
    values += [{"dimensions": ["4", "4", "4", "4"]}, {"dimensions": [str(2**20)] * 8}, steps(a=steps(b=tensor())), TEXT]
    node[key] = pick(rng, values)
    if isinstance(node, dict) and rng.random() < 0.2:
        node[pick(rng, ["..", "a/b", "a\\b", "", "zarr.json", "\n", "\udc00", "x" * 5000])] = node.pop(key)
    (folder / "features.json").write_text(json.dumps(features))
    return str(key)[:50]


def odd_json(folder: Path, shard: Path, pictures: bool, rng: np.random.Generator) -> str:
    """features.json or dataset_info.json is no such JSON."""
    name = str(pick(rng, ["features.json", "dataset_info.json"]))
    bombs = ["[" * 100_000, '{"a":' * 50_000, "", "null", "3", "[]", '"\\ud800"', "NaN", '{"splits": 3}', "9" * 10_000]
    splits: list[Any] = [
        [{"name": "train", "shardLengths": ["9" * 30, "-1", None, {}], "numBytes": []}],
        [{"name": ["train"], "shardLengths": "x"}, 7, None, {}],
        [{"name": "../../..", "shardLengths": ["1"] * 100_000}],
        {"train": {"shardLengths": ["1"]}},
    ]
    text = json.dumps({"name": {"a": 1}, "version": 3, "redistributionInfo": [], "splits": pick(rng, splits)})
    (folder / name).write_text(pick(rng, [*bombs, text, text, text]))
    if rng.random() < 0.1:
        (folder / name).unlink()
        shutil.copytree(folder, folder / "again")
    return name


@functools.cache
def large_picture() -> bytes:
    """A PNG of 30,000 x 30,000 black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + 30_000 // 8)
    data = b"".join(packer.compress(row) for _ in range(30_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


ATTACKS = [
    damaged_example,
    damaged_example,
    damaged_example,
    odd_list,
    odd_list,
    odd_wire,
    odd_frame,
    odd_shards,
    odd_tree,
    odd_tree,
    odd_tree,
    odd_json,
]


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 300
    assert counts.get("partial", 0) + counts.get("whole", 0) > 800
