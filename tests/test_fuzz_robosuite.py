from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fuzzing import change_bytes, fuzz
from hdf5_attacks import attack
from test_read_robosuite import MODEL, make_file

FORMAT = "robosuite"
PIECES = [
    '<include file="/etc/passwd"/>',
    '<replicate count="100000000"><body/></replicate>',
    '<composite type="grid" count="1000 1000 1000" spacing="1"/>',
    '<flexcomp type="grid" count="1000 1000 1000" name="f"/>',
    '<extension><plugin plugin="x"/></extension>',
    '<body><joint type="free"/></body>',
    '<body name="robot0_right_hand"/>',
    '<joint name="robot0_joint9" axis="0 0 0"/>',
    '<geom type="mesh" mesh="absent"/>',
    '<asset><mesh name="m" file="/etc/passwd"/></asset>',
    '<asset><texture name="t" builtin="flat" width="99999" height="99999"/></asset>',
    '<size memory="1000G"/>',
    '<default class="a"><joint type="ball"/></default>',
    "<body>" * 500 + "</body>" * 500,
    '<frame euler="1 2 3"><body/></frame>',
]
NUMBERS = ["nan", "inf", "1e400", "-1", "", "0 0 0 0", "x", "99999999999999999999", "0 " * 9999]


def seeds(folder: Path) -> list[Path]:
    return [make_file(folder / "embedded.hdf5"), make_file(folder / "three.hdf5", demos=3)]


def damage(seed: Path, target: Path, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return attack(target, rng)
    xml, what = hostile(MODEL, rng)
    with h5py.File(target, "r+") as file:
        data: Any = file["data"]
        for demo in data if rng.random() < 0.7 else ["demo_1"]:
            data[demo].attrs["model_file"] = xml
    return what


def hostile(xml: str, rng: np.random.Generator) -> tuple[str, str]:
    """A model with bytes changed, an element put in, an attribute replaced or entities declared."""
    kind = int(rng.integers(5))
    if kind == 0:
        changed = change_bytes(xml.encode(), rng).replace(b"\0", b" ")
        return changed.decode(errors="replace"), "bytes of the model"
    if kind == 1:
        piece = PIECES[int(rng.integers(len(PIECES)))]
        at = [i for i, letter in enumerate(xml) if letter == ">" and xml[i - 1] != "/"]
        cut = int(rng.choice(at)) + 1
        return xml[:cut] + piece + xml[cut:], f"a model with {piece[:40]}"
    if kind == 2:
        parts = xml.split('"')
        which = int(rng.integers(len(parts) // 2)) * 2 + 1
        parts[which] = NUMBERS[int(rng.integers(len(NUMBERS)))]
        return '"'.join(parts), f"a model with '{parts[which][:20]}'"
    if kind == 3:
        entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
        return f'<!DOCTYPE m [<!ENTITY e0 "ha">{entities}]>' + xml.replace("base", "&e9;", 1), "a model of entities"
    names = ["../../../etc/passwd", "/etc/passwd", "model_1.xml", "a\\b.xml", ".xml", "models", "x" * 300 + ".xml"]
    name = str(rng.choice(names))
    return name, f"a model file {name[:40]}"


def test_fuzz():
    counts = fuzz(__file__, 2000)
    assert sum(counts.values()) == 2000
    assert counts.get("refused", 0) > 100
    assert counts.get("partial", 0) > 400
    assert counts.get("whole", 0) > 100
