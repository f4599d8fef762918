"""Replaying robosuite's recorded states in MuJoCo: where each body was, and what a camera saw.

The model comes with the recording, from a stranger. It is cut down to known elements, its files are looked up among the
installed robosuite's assets and nowhere else, and MuJoCo, which trusts its input, runs in a process of its own with
bounded memory: what crashes or hangs is that process.

Poses need bodies, joints and sites only. They are exact without meshes, so that demos of robosuite versions whose
meshes no longer exist give their observations too; pictures need every mesh.
"""

import atexit
import functools
import importlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError

XML_BYTES = 16 << 20
MEMORY = 1 << 30  # bytes that the replaying process may use
REPLY_SECONDS = 60.0
STATES_AT_ONCE = 512
PLACE = ("name", "pos", "quat", "axisangle", "xyaxes", "zaxis", "euler")
# Element -> attributes that decide where bodies and sites are.
SKELETON = {
    "body": (*PLACE, "childclass"),
    "joint": ("name", "class", "type", "pos", "axis", "ref"),
    "freejoint": ("name",),
    "site": (*PLACE, "class", "type", "fromto"),
}
SITES = re.compile(r"gripper\d+_(right_|left_)?grip_site")  # the others, markers mostly, are not looked at
WITHOUT_EFFECT = {"geom", "inertial", "camera", "light"}  # on poses; what else lies in a body may have one
COMPILER = ("angle", "eulerseq", "coordinate")
# What pictures need. No `include`, no plugins, nothing that multiplies (replicate, composite, flexcomp).
DRAWN = {
    *("mujoco", "compiler", "default", "visual", "map", "headlight", "rgba", "scale", "asset", "texture", "mesh"),
    *("material", "worldbody", "body", "inertial", "joint", "freejoint", "geom", "camera", "light"),
}
DROPPED = {
    "site",
    "size",
    "option",
    "actuator",
    "sensor",
    "contact",
    "equality",
    "tendon",
    "custom",
    "keyframe",
    "statistic",
}
ASSET_SUFFIXES = {".stl", ".obj", ".msh", ".png"}
TEXTURE_SIZE = 8192  # [px]


def skeleton(xml: str) -> str:
    """The model's bodies, joints and sites alone. Raises InputError where it holds what could move them otherwise."""
    root = _parse(xml)
    bare = ElementTree.Element("mujoco")
    for compiler in root.findall("compiler"):
        ElementTree.SubElement(bare, "compiler", {k: v for k, v in compiler.items() if k in COMPILER})
    for defaults in root.findall("default"):
        _copy(defaults, ElementTree.SubElement(bare, "default"), {**SKELETON, "default": ("class",)}, None)
    for world in root.findall("worldbody"):
        _copy(world, ElementTree.SubElement(bare, "worldbody"), SKELETON, WITHOUT_EFFECT)
    for body in list(bare.iter("body")):
        ElementTree.SubElement(body, "inertial", {"pos": "0 0 0", "mass": "1", "diaginertia": "1 1 1"})
    return _text(bare)


def drawable(xml: str) -> str:
    """The model with its files among the installed robosuite's assets.

    Raises:
        InputError: an asset that the installed robosuite lacks or that lies elsewhere, or an unknown element.
        MissingExtraError: robosuite is not installed.
    """
    root = _parse(xml)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in DROPPED]:
            parent.remove(child)
    for element in root.iter():
        if element.tag not in DRAWN:
            raise InputError(f"its model has an element <{str(element.tag)[:40]}>, which is not read")
        if element.tag == "compiler":
            for name in ("meshdir", "texturedir", "assetdir"):
                element.attrib.pop(name, None)
        for name, value in list(element.items()):
            if name in ("width", "height", "gridsize", "gridlayout") and element.tag == "texture":
                _check_texture_size(value)
            elif name.startswith("file") and element.tag in ("mesh", "texture"):
                element.set(name, str(asset(value)))
            elif "file" in name or "plugin" in name:
                raise InputError(f"its model names files by '{str(name)[:40]}', which is not read")
    return _text(root)


def asset(file: str) -> Path:
    """The installed robosuite's copy of an asset that another machine's path names."""
    found = re.search(r"(?:^|/)robosuite/models/assets/(.+)$", file.replace("\\", "/"))
    where = file[-80:]
    if found is None:
        raise InputError(f"its model names the file '{where}' outside robosuite's assets")
    parts: list[str] = []
    for part in PurePosixPath(found[1]).parts:
        if part == ".." and not parts:
            raise InputError(f"its model names the file '{where}' outside robosuite's assets")
        parts = parts[:-1] if part == ".." else [*parts, part]
    if parts[:1] == ["mounts"]:
        parts[0] = "bases"  # renamed in robosuite 1.5
    root = _robosuite_assets()
    path = root.joinpath(*parts)
    if path.suffix.lower() not in ASSET_SUFFIXES or not path.resolve().is_relative_to(root):
        raise InputError(f"its model names the file '{where}', which is no mesh or picture of robosuite")
    if "\0" in file or not path.is_file():
        raise InputError(f"its model needs robosuite's asset '{'/'.join(parts)}', which the installed version lacks")
    return path


@functools.cache
def _robosuite_assets() -> Path:
    found = importlib.util.find_spec("robosuite")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("robosuite", "sim", "Rendering robosuite demos")
    return (Path(found.submodule_search_locations[0]) / "models" / "assets").resolve()


def _parse(xml: str) -> ElementTree.Element:
    if len(xml) > XML_BYTES:
        raise InputError(f"its model is XML of {len(xml)} characters")
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", xml, re.IGNORECASE):
        raise InputError("its model declares XML entities, which are not read")
    try:
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"its model is no XML: {error}") from error
    if root.tag != "mujoco":
        raise InputError("its model is no MuJoCo XML")
    return root


def _copy(source: ElementTree.Element, target: ElementTree.Element, kept: dict, ignored: set[str] | None) -> None:
    """Copy known elements below `source`. Raises InputError for one neither kept nor ignored (None: all are)."""
    waiting = [(source, target)]
    while waiting:
        source, target = waiting.pop()
        for child in source:
            if child.tag == "site" and "name" in child.attrib and not SITES.fullmatch(child.attrib["name"]):
                continue
            if child.tag in kept:
                known = {name: value for name, value in child.items() if name in kept[child.tag]}
                waiting.append((child, ElementTree.SubElement(target, child.tag, known)))
            elif ignored is not None and child.tag not in ignored:
                raise InputError(f"its model has an element <{str(child.tag)[:40]}> in a body, which is not read")


def _text(root: ElementTree.Element) -> str:
    try:
        return ElementTree.tostring(root, encoding="unicode")
    except RecursionError as error:
        raise InputError("its model is nested too deeply") from error


def _check_texture_size(value: str) -> None:
    if not re.fullmatch(r"\s*\d{1,4}(\s+\d{1,4})*\s*", value) or max(int(v) for v in value.split()) > TEXTURE_SIZE:
        raise InputError(f"its model has a texture of size '{value[:40]}'")


class Replayer:
    """MuJoCo in a process of its own, one model at a time; started when first asked, and again after a crash."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="embodied-replay-")  # MuJoCo writes its log where it runs
        self._loaded = ""
        atexit.register(self._stop)

    def model(self, xml: str) -> dict[str, Any]:
        """Load a model. Returns nq, nv, joints [name, body, type, qpos address, dof address], bodies, sites, cameras.

        Raises InputError: MuJoCo refuses it, crashes on it or needs too long.
        """
        self._loaded = ""
        answer, _ = self._ask({"do": "load"}, xml.encode())
        self._loaded = xml
        return answer

    def poses(self, xml: str, states: np.ndarray) -> dict[str, np.ndarray]:
        """`body_pos` (n, bodies, 3), `body_quat_wxyz` (n, bodies, 4), `site_pos` (n, sites, 3) of (n, 1 + nq + nv)
        states. Raises InputError like `model`."""
        found: dict[str, list[np.ndarray]] = {"body_pos": [], "body_quat_wxyz": [], "site_pos": []}
        for start in range(0, len(states), STATES_AT_ONCE):
            answer, data = self._ask_states(xml, {"do": "poses"}, states[start : start + STATES_AT_ONCE])
            rows = np.frombuffer(data, np.float64).reshape(answer["rows"], -1)
            bodies, sites = answer["bodies"], answer["sites"]
            parts = np.split(rows, [3 * bodies, 7 * bodies], axis=1)
            for key, part, count in zip(found, parts, (bodies, bodies, sites), strict=True):
                found[key].append(part.reshape(len(rows), count, -1) if count else np.zeros((len(rows), 0, 3)))
        return {key: np.concatenate(blocks) for key, blocks in found.items()}

    def pictures(self, xml: str, states: np.ndarray, camera: str, height: int, width: int) -> Iterator[np.ndarray]:
        """(k, H, W, 3) uint8 blocks of what `camera` saw, shadows and reflections off."""
        order = {"do": "draw", "camera": camera, "height": height, "width": width}
        step = max(1, min(STATES_AT_ONCE, (1 << 20) // (height * width * 3)))
        for start in range(0, len(states), step):
            _, data = self._ask_states(xml, order, states[start : start + step])
            yield np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)

    def _ask_states(self, xml: str, order: dict[str, Any], states: np.ndarray) -> tuple[dict[str, Any], bytes]:
        if not np.isfinite(states).all():
            raise InputError("its states hold NaN or infinity")
        self._started()
        if self._loaded != xml:
            self.model(xml)
        return self._ask(order | {"rows": len(states)}, np.ascontiguousarray(states, np.float64).tobytes())

    def _ask(self, order: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        child = self._started()
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            _send(child.stdin, order, data)
            answer, payload = _receive(child.stdout, time.monotonic() + REPLY_SECONDS)
        except (OSError, EOFError, TimeoutError) as error:
            self._stop()
            what = "needs too long for" if isinstance(error, TimeoutError) else "crashes on"
            raise InputError(f"MuJoCo {what} its model") from error
        if "missing" in answer:
            raise MissingExtraError(answer["missing"], "sim", "Replaying robosuite demos")
        if "error" in answer:
            raise InputError(f"MuJoCo refuses its model: {answer['error']}")
        return answer, payload

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            root = str(Path(__file__).absolute().parents[2])  # not resolved: rooms may be links in the package
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._loaded = ""
            self._child = subprocess.Popen(
                [sys.executable, "-c", "from embodied.datasets.replay_robosuite import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self._folder.name,
                env={"MUJOCO_GL": "egl", "LP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
        self._loaded = ""


@functools.cache
def replayer() -> Replayer:
    """The one replaying process."""
    return Replayer()


def _send(stream: IO[bytes], header: dict[str, Any], data: bytes) -> None:
    head = json.dumps(header | {"bytes": len(data)}).encode()
    stream.write(len(head).to_bytes(4, "little") + head + data)
    stream.flush()


def _receive(stream: IO[bytes], deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
    header = json.loads(_read(stream, int.from_bytes(_read(stream, 4, deadline), "little"), deadline))
    return header, _read(stream, header["bytes"], deadline)


def _read(stream: IO[bytes], size: int, deadline: float | None) -> bytes:
    found = bytearray()
    while len(found) < size:
        if deadline is not None and not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        block = os.read(stream.fileno(), min(size - len(found), 1 << 20))
        if not block:
            raise EOFError
        found += block
    return bytes(found)


def serve() -> None:
    """The replaying process: answers orders from standard input until it ends."""
    import resource

    orders = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what MuJoCo prints is no answer
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except ImportError:
        _receive(orders)
        return _send(answers, {"missing": "mujoco"}, b"")
    model: Any = None
    data = renderer = None
    size = (0, 0)
    while True:
        try:
            order, payload = _receive(orders)
        except EOFError:
            return None
        try:
            if order["do"] == "load":
                model = data = renderer = _closed(renderer)
                model = mujoco.MjModel.from_xml_string(payload.decode())
                data = mujoco.MjData(model)
                _send(answers, _describe(model), b"")
                continue
            states = np.frombuffer(payload, np.float64).reshape(order["rows"], -1)
            if order["do"] == "draw" and (renderer is None or size != (order["height"], order["width"])):
                _closed(renderer)
                size = (order["height"], order["width"])
                renderer = _renderer(mujoco, model, *size)
            rows = [_answer(mujoco, model, data, renderer, order, state) for state in states]
            _send(answers, {"rows": len(rows), "bodies": model.nbody, "sites": model.nsite}, b"".join(rows))
        except Exception as error:  # whatever MuJoCo raises is the answer
            _send(answers, {"error": re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__}, b"")


def _closed(renderer: Any) -> None:
    if renderer is not None:
        renderer.close()


def _describe(model: Any) -> dict[str, Any]:
    kinds = {"bodies": model.nbody, "sites": model.nsite, "cameras": model.ncam}
    getters = {"bodies": model.body, "sites": model.site, "cameras": model.camera}
    joints = [
        [
            model.joint(i).name,
            int(model.jnt_bodyid[i]),
            int(model.jnt_type[i]),
            int(model.jnt_qposadr[i]),
            int(model.jnt_dofadr[i]),
        ]
        for i in range(model.njnt)
    ]
    names = {kind: [getters[kind](i).name for i in range(count)] for kind, count in kinds.items()}
    return {"nq": int(model.nq), "nv": int(model.nv), "joints": joints} | names


def _renderer(mujoco: Any, model: Any, height: int, width: int) -> Any:
    model.vis.global_.offheight, model.vis.global_.offwidth = height, width
    model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 0
    renderer = mujoco.Renderer(model, height, width)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = False
    return renderer


def _answer(mujoco: Any, model: Any, data: Any, renderer: Any, order: dict[str, Any], state: np.ndarray) -> bytes:
    """Poses or picture of one state, as bytes."""
    data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + model.nq], state[1 + model.nq :]
    mujoco.mj_kinematics(model, data)
    if order["do"] == "poses":
        return b"".join(np.ascontiguousarray(array).tobytes() for array in (data.xpos, data.xquat, data.site_xpos))
    mujoco.mj_camlight(model, data)
    option = mujoco.MjvOption()
    option.geomgroup[0], option.sitegroup[:] = 0, 0  # robosuite keeps collision shapes in group 0
    renderer.update_scene(data, order["camera"], option)
    return renderer.render().tobytes()
