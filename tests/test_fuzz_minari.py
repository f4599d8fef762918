import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import change_bytes, fuzz
from hdf5_attacks import attack
from minari_files import TEXT, arrow_table, box, discrete, episode, jpegs, nested, sequence, write_dataset, write_table

FORMAT = "minari"
SPACE = nested(
    joints=box(3),
    mode=sequence(discrete(4), box(2, 2)),
    camera=box(32, 32, 3, low=0, high=255, dtype="uint8"),
    mission=TEXT,
)
ACTION = nested(move=box(2), grip=discrete(2))


def arrays(steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(steps)
    rows = steps + 1
    observations = {
        "joints": rng.normal(size=(rows, 3)).astype("f4"),
        "mode": (np.arange(rows), rng.normal(size=(rows, 2, 2))),
        "camera": jpegs(rng.integers(0, 256, (rows, 32, 32, 3), np.uint8)),
        "mission": ["open"] * rows,
    }
    actions = {"move": rng.normal(size=(steps, 2)).astype("f4"), "grip": np.arange(steps) % 2}
    return episode(
        steps, observations, actions, infos={"qpos": rng.normal(size=(rows, 2)), "deep": {"x": np.ones(rows)}}
    )


def seeds(folder: Path) -> list[Path]:
    episodes = {number: arrays(steps) for number, steps in enumerate((3, 2))}
    found = [write_dataset(folder / name, name, episodes, SPACE, ACTION) for name in ("hdf5", "arrow", "parquet")]
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    raw = {0: episode(3, pictures, np.zeros((3, 2), "f4"))}
    space = box(32, 32, 3, low=0, high=255, dtype="uint8")
    return [*found, write_dataset(folder / "raw", "hdf5", raw, space, box(2))]


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str:
    if rng.random() < 0.25:
        return odd_metadata(target, rng)
    if (target / "data" / "main_data.hdf5").exists():
        return attack(target / "data" / "main_data.hdf5", rng)
    attacks: list[Callable[[Path, np.random.Generator], str]] = [
        odd_column,
        odd_column,
        odd_column,
        odd_file,
        odd_folder,
    ]
    return attacks[int(rng.integers(len(attacks)))](target / "data", rng)


def pick(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def odd_metadata(target: Path, rng: np.random.Generator) -> str:
    """A value of metadata.json, or of a space in it, is replaced; or the file is no JSON."""
    path = pick(rng, sorted(target.rglob("metadata.json")))
    if rng.random() < 0.2:
        path.write_text(
            pick(rng, ["[" * 100_000, "", "null", "3", '"\\ud800"', '{"observation_space": 3}', "9" * 10_000])
        )
        return f"{path.name} is no metadata"
    metadata = json.loads(path.read_text())
    odd = [
        None,
        -1,
        2**63,
        1e300,
        "",
        "x" * 10_000,
        [],
        {},
        [[]],
        True,
        "[" * 50_000,
        "../../..",
        "\ud800",
        float("nan"),
    ]
    node, name = metadata, str(pick(rng, sorted(metadata)))
    if "_space" in name and rng.random() < 0.8:
        space = json.loads(metadata[name])
        node, key = space, str(pick(rng, sorted(space)))
        while isinstance(node[key], dict) and rng.random() < 0.8:
            node = node[key]
            key = str(pick(rng, sorted(node)))
        deep: Any = box(1)
        for _ in range(60):
            deep = nested(a=deep)
        shapes = [[2**31, 2**31], [-1], [0], [3.5], ["a"], [1] * 100, [96]]
        node[key] = pick(rng, [*odd, deep, *shapes, box(32, 32, 3, dtype="uint8"), discrete(-5), discrete(10**400)])
        metadata[name] = json.dumps(space)
    else:
        node[name] = pick(rng, odd)
    path.write_text(json.dumps(metadata))
    return f"{path.name}: {name}"


def odd_column(data: Path, rng: np.random.Generator) -> str:
    """One column of an episode has another type or length, or none."""
    path = pick(rng, sorted(data.rglob("part-0.*")))
    table = arrow_table(arrays(3))
    rows = table.num_rows
    name = str(pick(rng, table.column_names))
    zeros = np.zeros(rows)
    columns: list[Callable[[], Any]] = [
        lambda: pyarrow.nulls(rows),
        lambda: pyarrow.array([None] * rows, pyarrow.float32()),
        lambda: pyarrow.array([1.0, None, 2.0, 3.0]),
        lambda: pyarrow.array([[0.0] * place for place in range(rows)]),
        lambda: pyarrow.array(["text"] * rows),
        lambda: pyarrow.array([b"\xff\xd8"] * rows),
        lambda: pyarrow.array(["a", "b", "a", "b"]).dictionary_encode(),
        lambda: pyarrow.array(zeros, pyarrow.float16()),
        lambda: pyarrow.array([np.nan, np.inf, 1e300, -1.0]),
        lambda: (
            pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array([], pyarrow.int8()), type=pyarrow.list_(pyarrow.int8(), 0)
            )
            if rows == 0
            else pyarrow.array([[[1.0, 2.0]]] * rows, pyarrow.list_(pyarrow.list_(pyarrow.float64(), 2), 1))
        ),
        lambda: pyarrow.array([{}] * rows, pyarrow.struct([])),
        lambda: pyarrow.array([{"..": 1.0, "a/b": 2.0, "": 3.0}] * rows),
        lambda: pyarrow.array([None] * rows, pyarrow.struct([("x", pyarrow.float32())])),
        lambda: pyarrow.array([[("k", 1.0)]] * rows, pyarrow.map_(pyarrow.string(), pyarrow.float64())),
        lambda: pyarrow.array([0] * rows, pyarrow.timestamp("s")),
        lambda: pyarrow.array(["x"] * rows, pyarrow.string_view()),
        lambda: deep(rows, 200),
    ]
    column = pick(rng, columns)()
    change = int(rng.integers(4))
    if change == 0:
        table = table.drop_columns([name])
    elif change == 1:
        table = pyarrow.concat_tables([table] * int(pick(rng, [2, 50])))
    else:
        table = table.set_column(table.column_names.index(name), name, column)
    try:
        write_table(path, table)
    except (pyarrow.ArrowException, OSError):
        path.write_bytes(b"")
    return f"{name} {column.type!s:.40}"


def deep(rows: int, depth: int) -> Any:
    array = pyarrow.array(np.zeros(rows))
    for _ in range(depth):
        array = pyarrow.StructArray.from_arrays([array], ["a"])
    return array


def odd_file(data: Path, rng: np.random.Generator) -> str:
    """An episode's file is a bomb, compressed, another table, or damaged where its reader looks first."""
    path = pick(rng, sorted(data.rglob("part-0.*")))
    whole = path.read_bytes()
    change = int(rng.integers(10))
    if change == 0:
        path.write_bytes(bomb(path.suffix))
    elif change < 4:
        write_table(path, arrow_table(arrays(3)), compression="zstd")
    elif change < 6:
        write_table(path, pyarrow.table({"x": [1, 2, 3]}))
    else:
        start = int(pick(rng, [0, 8, len(whole) - 200]))
        path.write_bytes(whole[:start] + change_bytes(whole[start : start + 1500], rng) + whole[start + 1500 :])
    return path.suffix


@functools.cache
def bomb(suffix: str) -> bytes:
    """A file of some kB that holds 400 MB of zeros."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"part-0{suffix}"
        zeros = np.zeros(1 << 25)
        write_table(path, pyarrow.table({"observations": zeros.astype("f4"), "rewards": zeros}), compression="zstd")
        return path.read_bytes()


def odd_folder(data: Path, rng: np.random.Generator) -> str:
    """Episodes are missing, empty, misnamed, folders in place of files, or links."""
    folder = data / "1"
    change = int(rng.integers(5))
    if change == 0:
        shutil.rmtree(folder)
    elif change == 1:
        folder.rename(data / str(pick(rng, ["999999999", "0001", "-1", "٣", "x" * 200])))
    elif change == 2:
        shutil.copytree(folder, data / "01")
    else:
        part = next(folder.glob("part-0.*"))
        part.unlink()
        pick(rng, [part.mkdir, lambda: part.symlink_to("/etc/passwd"), lambda: part.write_bytes(b"")])()
    return f"change {change}"


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 200
    assert counts.get("partial", 0) + counts.get("whole", 0) > 800
