"""features.json of TFDS 4: what each step of an RLDS episode holds, and how it lies in a tf.train.Example.

TFDS writes the tree of features flattened: the state in `steps/observation/state` is one list for all steps of the
episode. Booleans and integers are int64, a tensor with an `encoding` is one byte string per step, a picture a JPEG or
PNG file per step.
"""

import dataclasses
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.hdf5 import is_key
from embodied.datasets.json_file import read_json
from embodied.datasets.tfrecord import NUM_VALUES, Feature

DEPTH = 16  # of the tree of features
NUM_FEATURES = 10_000
STEP_VALUES = 1 << 20  # of one array of one step
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLAGS = ("is_first", "is_last", "is_terminal", "discount", "reward")
INSTRUCTIONS = ("language_instruction", "natural_language_instruction", "instruction", "language")
SUCCESS = ("success", "is_success")
FLOATS = ("float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One list of the flattened tree.

    Attributes:
        path: its name in the Example, `steps/observation/state`.
        kind: `numbers`, `text`, `picture`, or `other`: not read, for the `reason`.
        shape: of one step; None where a size is not declared.
        dtype: NumPy name.
        encoding: of numbers: `none`, `bytes` or `zlib`.
    """

    path: str
    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    encoding: str = "none"
    reason: str = ""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def size(self) -> int:
        """Values per step."""
        return math.prod(size or 0 for size in self.shape)

    def values(self, feature: Feature) -> np.ndarray:
        """(n, *shape) float32 of all steps. Raises InputError: the list is no whole number of steps, or is damaged."""
        shape = tuple(size or 0 for size in self.shape)
        if self.encoding == "none":
            found = feature.numbers()
            if len(found) % self.size:
                raise InputError(f"'{self.path}' holds {len(found)} values, which is no whole number of steps {shape}.")
        else:
            found = self._decoded(feature)
        with np.errstate(over="ignore"):  # what does not fit float32 is inf, which no store takes
            return found.astype(np.float32).reshape(-1, *shape)

    def _decoded(self, feature: Feature) -> np.ndarray:
        dtype = np.dtype("uint8" if self.dtype == "bool" else self.dtype).newbyteorder("<")
        size = self.size * dtype.itemsize
        steps = []
        for data in feature.strings():
            if (len(steps) + 1) * self.size > NUM_VALUES:
                raise InputError(f"'{self.path}' holds more than {NUM_VALUES} values.")
            plain = _inflate(data, size, self.path) if self.encoding == "zlib" else data
            if len(plain) != size:
                raise InputError(f"'{self.path}' holds {len(plain)} bytes in step {len(steps)}, not {size}.")
            steps.append(plain)
        return np.frombuffer(b"".join(steps), dtype)


def read_features(path: Path) -> list[Leaf]:
    """The leaves of a features.json, in its order. Raises InputError: it is damaged or of another version of TFDS."""
    tree = read_json(path)
    if not isinstance(tree, dict) or "type" in tree or not isinstance(tree.get("featuresDict"), dict):
        raise InputError(f"{path} is no tree of features as TFDS 4.4 and newer write it: it has no 'featuresDict'.")
    found: dict[str, Leaf] = {}
    waiting: list[tuple[str, Any, int, int]] = [("", tree, 0, 0)]
    while waiting:
        at, node, depth, sequences = waiting.pop()
        if not isinstance(node, dict) or depth > DEPTH or len(found) > NUM_FEATURES:
            raise InputError(f"{path}: the tree of features is damaged, or deeper than {DEPTH}, at '{at[:200]}'.")
        if isinstance(inner := node.get("sequence"), dict):
            waiting.append((at, inner.get("feature"), depth + 1, sequences + 1))
        elif isinstance(inner := node.get("featuresDict"), dict):
            children = inner.get("features", {})
            if not isinstance(children, dict):
                raise InputError(f"{path}: the features of '{at[:200]}' are no dictionary.")
            named = [(f"{at}/{name}" if at else name, child) for name, child in children.items()]
            waiting.extend((name, child, depth + 1, sequences) for name, child in reversed(named))
        else:
            leaf = _leaf(at, node)
            if sequences > 1:
                leaf = Leaf(at, "other", reason="a sequence within each step")
            found[at] = leaf
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which list of the Example is what.

    Attributes:
        flags: name of FLAGS -> leaf.
        observations: key -> leaf of numbers.
        privileged: keys of `observations` that no policy gets unless asked for.
        cameras: camera -> leaf of pictures.
        camera_flags: camera -> leaf that says whether it has pictures.
        actions: the action's parts, in order.
        instructions: leaves of text, the best first.
        success: the episode's own verdict, if it has one.
        left_out: path -> why it is not read.
    """

    flags: dict[str, Leaf]
    observations: dict[str, Leaf]
    privileged: frozenset[str]
    cameras: dict[str, Leaf]
    camera_flags: dict[str, Leaf]
    actions: tuple[Leaf, ...]
    instructions: tuple[Leaf, ...]
    success: Leaf | None
    left_out: dict[str, str]


def layout_of(leaves: list[Leaf]) -> Layout:
    """What an RLDS reader makes of each leaf."""
    flags, observations, cameras, left_out = {}, {}, {}, {}
    privileged, actions, texts, marks, success = [], [], [], {}, None
    for leaf in leaves:
        in_steps = leaf.path.startswith("steps/")
        key = leaf.path.removeprefix("steps/").removeprefix("observation/").replace("/", ".")
        scalar = leaf.kind == "numbers" and leaf.size == 1
        if leaf.kind == "other":
            left_out[leaf.path] = leaf.reason
        elif scalar and leaf.path in (f"steps/{name}" for name in FLAGS):
            flags[leaf.name] = leaf
        elif leaf.kind == "text" and leaf.name in INSTRUCTIONS:
            texts.append(leaf)
        elif scalar and leaf.name.startswith("has_"):
            marks[leaf.name.removeprefix("has_")] = leaf
        elif scalar and leaf.name in SUCCESS and not in_steps:
            success = leaf
        elif leaf.kind == "text" or not in_steps:
            left_out[leaf.path] = "text" if leaf.kind == "text" else "not one value per step"
        elif leaf.kind == "numbers" and (leaf.path == "steps/action" or leaf.path.startswith("steps/action/")):
            actions.append(leaf)
        elif not is_key(key) or key in observations or key in cameras:
            left_out[leaf.path] = "its name cannot be a key of a store"
        elif leaf.kind == "picture":
            cameras[key] = leaf
        else:
            observations[key] = leaf
            # Who runs a policy has the instruction, but seldom the model that made this vector of it.
            if not leaf.path.startswith("steps/observation/") or ("language" in key and "embedding" in key):
                privileged.append(key)
    return Layout(
        flags=flags,
        observations=observations,
        privileged=frozenset(privileged),
        cameras=cameras,
        camera_flags={camera: marks[leaf.name] for camera, leaf in cameras.items() if leaf.name in marks},
        actions=tuple(sorted(actions, key=lambda leaf: leaf.path)),
        instructions=tuple(sorted(texts, key=lambda leaf: (INSTRUCTIONS.index(leaf.name), leaf.path))),
        success=success,
        left_out=left_out,
    )


def _leaf(path: str, node: dict[str, Any]) -> Leaf:
    known = ("tensor", "image", "text", "classLabel", "boundingBox")
    kind = next((name for name in known if isinstance(node.get(name), dict)), "")
    content = node.get(kind, {})
    if kind == "text":
        return Leaf(path, "text")
    if kind == "classLabel":
        return Leaf(path, "numbers", (), "int64")
    shape = _shape(content)
    if kind == "" or shape is None:
        name = str(node.get("pythonClassName", "nothing known")).rpartition(".")[2]
        return Leaf(path, "other", reason=f"a feature of kind {name[:50]}" if not kind else "its shape is damaged")
    dtype, encoding = str(content.get("dtype")), str(content.get("encoding") or "none").lower()
    if kind == "image":
        return _picture(path, shape or (None, None, 3), dtype)
    if dtype in ("string", "object") and encoding == "none":
        return Leaf(path, "text") if not shape else Leaf(path, "other", reason="a list of texts")
    if dtype not in DTYPES + FLOATS or encoding not in ("none", "bytes", "zlib"):
        return Leaf(path, "other", reason=f"of dtype {dtype[:30]}, encoding {encoding[:30]}")
    if dtype == "uint8" and len(shape) == 3 and shape[2] == 3 and encoding != "none":
        return Leaf(path, "other", reason="a picture without JPEG or PNG")
    if None in shape:
        return Leaf(path, "other", reason="of no fixed shape")
    if not 0 < math.prod(size or 0 for size in shape) <= STEP_VALUES or len(shape) > 2:
        return Leaf(path, "other", reason=f"{dtype} {shape} per step: neither a vector nor a picture")
    return Leaf(path, "numbers", shape, dtype, encoding)


def _picture(path: str, shape: tuple[int | None, ...], dtype: str) -> Leaf:
    if dtype != "uint8" or len(shape) != 3 or shape[2] not in (1, 3, 4) or 0 in shape:
        return Leaf(path, "other", reason=f"{dtype} {shape} per step: no RGB picture of bytes")
    return Leaf(path, "picture", (*shape[:2], 3), "uint8")


def _shape(content: dict[str, Any]) -> tuple[int | None, ...] | None:
    """Sizes are text in this file, `-1` where none is declared. None: this is no shape."""
    shape = content.get("shape")
    sizes = shape.get("dimensions", []) if isinstance(shape, dict) else []
    if not isinstance(sizes, list) or len(sizes) > 8:
        return None
    if not all(isinstance(size, str | int) and re.fullmatch(r"-1|[0-9]{1,9}", str(size)) for size in sizes):
        return None
    return tuple(None if int(size) < 0 else int(size) for size in sizes)


def _inflate(data: bytes, size: int, path: str) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, size + 1)
    except zlib.error as error:
        raise InputError(f"'{path}' is not compressed as features.json says: {error}.") from error
