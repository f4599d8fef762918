import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import fuzz
from lerobot_fixtures import make_v2, make_v3

FORMAT = "lerobot"
HUGE = (-1, 0, 1, 2**31, 2**53, 2**63 - 1, -(2**63), 1e300, None, "x", [], {})
PATHS = (
    "../{episode_index}.parquet",
    "/etc/passwd",
    "{episode_index:0999999999d}.parquet",
    "{video_key.__class__}",
    "data/../../{episode_index}",
    "{",
    "",
    "a" * 2000,
    "{file_index}" * 80,
    "meta/info.json",
    "data",
    "\0",
    "~/x.parquet",
    "file:///etc/passwd",
)


def seeds(folder: Path) -> list[Path]:
    return [
        make_v2(folder / "v21", lengths=(4, 3)),
        make_v2(folder / "v20", lengths=(3, 3), version="2.0", embedded=True),
        make_v3(folder / "v30", lengths=(3, 4, 2)),
        make_v3(folder / "v30_embedded", lengths=(3, 2), embedded=True),
    ]


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str | None:
    kind = rng.integers(5)
    if kind == 0:
        return damage_info(target, rng)
    if kind == 1:
        return damage_text(target, rng)
    if kind == 2:
        return damage_files(target, rng)
    tables = sorted(target.rglob("*.parquet"))
    return damage_table(tables[int(rng.integers(len(tables)))], rng)


def damage_info(target: Path, rng: np.random.Generator) -> str:
    path = target / "meta" / "info.json"
    info = json.loads(path.read_text())
    if rng.random() < 0.4:
        key = str(rng.choice(["data_path", "video_path"]))
        info[key] = PATHS[int(rng.integers(len(PATHS)))]
    elif rng.random() < 0.5:
        key = str(rng.choice(list(info)))
        info[key] = HUGE[int(rng.integers(len(HUGE)))]
    else:
        name = str(rng.choice(list(info["features"])))
        feature = info["features"][name]
        key = str(rng.choice(["dtype", "shape", "names", "info"]))
        values: list[Any] = [*HUGE, "video", "image", "string", [2**40], [3, -1], [[["a"]] * 3], {"a": {"b": ["c"]}}]
        values += [["\ud800", "b", "c"], ["a"] * 1000, {"video.is_depth_map": True}]
        feature[key] = values[int(rng.integers(len(values)))]
        if rng.random() < 0.3:
            info["features"][str(rng.choice(["../../x", "a/b", "", ".", "images", "x" * 400, "\ud800"]))] = feature
    path.write_text(json.dumps(info))
    return f"info.json: {key}"


def damage_text(target: Path, rng: np.random.Generator) -> str | None:
    files = sorted((target / "meta").glob("*.json*"))
    path = files[int(rng.integers(len(files)))]
    lines = path.read_text().splitlines()
    kind = rng.integers(5)
    if kind == 0:
        lines = ["[" * 100_000]
    elif kind == 1:
        lines = ["1", '"x"', "null", "[]"]
    elif kind == 2:
        lines = lines + lines
    elif kind == 3 and path.suffix == ".jsonl":
        row = json.loads(lines[0])
        row[str(rng.choice(list(row)))] = HUGE[int(rng.integers(len(HUGE)))]
        lines[0] = json.dumps(row)
    else:
        lines = ["{" + ", ".join(f'"{i}": NaN' for i in range(1000)) + "}"]
    path.write_text("\n".join(lines))
    return f"text of {path.name}"


def damage_files(target: Path, rng: np.random.Generator) -> str:
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name != "info.json")
    path, other = (files[int(i)] for i in rng.integers(len(files), size=2))
    kind = rng.integers(3)
    if kind == 0:
        path.unlink()
        return f"without {path.name}"
    if kind == 1:
        path.write_bytes(other.read_bytes())
        return f"{path.name} is {other.name}"
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def damage_table(path: Path, rng: np.random.Generator) -> str:
    table = pq.read_table(path)
    names = [name for name in table.column_names if not name.startswith("stats")]
    name = str(rng.choice(names))
    rows = len(table)
    kind = int(rng.integers(12))
    if kind == 0 and "data" in path.parts:
        return bomb(path, rng)
    if kind == 1:
        table = table.drop_columns([name])
    elif kind == 2:
        table = pa.concat_tables([table, table])
    elif kind == 3:
        table = table.take(pa.array(rng.permutation(rows)))
    elif kind == 4:
        table = table.append_column(name, table.column(name))
    elif kind == 5:
        table = table.slice(0, 0)
    else:
        table = table.set_column(table.column_names.index(name), name, other_values(rows, rng))
    try:
        pq.write_table(table, path, use_dictionary=bool(rng.integers(2)), row_group_size=int(rng.choice([1, 2, 1000])))
    except (pa.ArrowException, ValueError):
        path.unlink()
    return f"{path.name}: {name}, kind {kind}"


def other_values(rows: int, rng: np.random.Generator) -> pa.Array:
    """A column of another type, shape, or of absurd numbers."""
    whole = [0, 1, -1, 7, 2**31, 2**62, 2**63 - 1, -(2**63)]
    cells: list[Any] = [
        pa.array([int(rng.choice(whole)) for _ in range(rows)], pa.int64()),
        pa.array([int(rng.choice(whole))] * rows, pa.int64()),
        pa.array(rng.choice([0.0, np.nan, np.inf, -1.0, 1e300, 0.5], rows)),
        pa.array(["text"] * rows),
        pa.array([None] * rows, pa.float32()),
        pa.array([None if i else 1.0 for i in range(rows)]),
        pa.array([[float(j) for j in range(i)] for i in range(rows)], pa.list_(pa.float64())),
        pa.array([[[1.0, 2.0]] * 3] * rows),
        pa.array([[]] * rows, pa.list_(pa.float32())),
        pa.array([{"bytes": b"\x89PNG\r\n\x1a\n" + rng.bytes(40), "path": "../../x.png"}] * rows),
        pa.array([{"bytes": None, "path": str(rng.choice(["/etc/passwd", "meta", "../v21/a.png", "\0"]))}] * rows),
        pa.array([rng.bytes(30)] * rows),
        pa.array([True] * rows),
        pa.array([{"a": 1}] * rows),
        pa.array(["a"] * rows).dictionary_encode(),
        pa.array([0] * rows, pa.timestamp("ns")),
        pa.array([[float(i)] * 20_000 for i in range(rows)], pa.list_(pa.float32())),
        pa.nulls(rows),
    ]
    return cells[int(rng.integers(len(cells)))]


def bomb(path: Path, rng: np.random.Generator) -> str:
    """A few kilobytes that stand for very much: rows, or values in one row."""
    schema = pq.read_schema(path)
    kind = int(rng.integers(3))
    count = int(rng.choice([30_000, 400_000]))
    if kind == 0:  # one episode of very many rows
        fields = [(f.name, f.type) for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
        table = pa.table({n: pa.array(np.zeros(count), t, safe=False) for n, t in fields})
    elif kind == 1:  # as many episodes as rows
        table = pa.table({"episode_index": np.arange(count), "observation.state": np.zeros(count)})
    else:  # one row of very many values
        values = pa.array(np.zeros(count * 4, np.float32))
        table = pa.table({"episode_index": [0], "action": pa.ListArray.from_arrays([0, len(values)], values)})
    pq.write_table(table, path, compression="zstd", use_dictionary=True)
    return f"{path.name}: bomb {kind} of {count}, {path.stat().st_size} bytes"


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 300
    assert counts.get("partial", 0) + counts.get("whole", 0) > 300
