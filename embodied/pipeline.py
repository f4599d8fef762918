"""`embodied run`: the stages of a YAML file, one verb each, in order; what is unchanged is skipped.

    out: results                       # {out} below; --out overrides it
    stages:
      collect: {verb: sim collect, env: robosuite/Lift, store: "{out}/lift", episodes: 200}
      clone:   {verb: train bc, store: "{out}/lift", out: "{out}/bc"}

Besides `verb`, a stage's keys are those of the verb's dataclass. `{out}` is the output folder, `{here}` the file's own.

A stage's key is a hash of the verb, its whole configuration, its inputs and the code it imports. An input that an
earlier stage writes counts with that stage's key, so a change runs what depends on it and nothing else; other inputs
count with their fingerprint. `OUT/.stages/<stage>.json` holds the key of the last start and, once done, the result. An
interrupted stage is called again with its partial work in place: every verb resumes.
"""

import ast
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tyro.conf import Positional

import embodied
from embodied import claim
from embodied.config import check_keys, fill, to_json
from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.provenance import hash_file, hash_json
from embodied.datasets.location import filesystem, is_remote, location, remote_errors
from embodied.progress import Progress, duration
from embodied.verbs import VERBS, LoadedVerb, Touches, find_verb

ROOT = Path(embodied.__file__).parent
PLUMBING = {"verbs.py", "progress.py", "config.py", "pipeline.py"}  # decide how a verb is called, not what it makes


@dataclasses.dataclass(frozen=True)
class Run:
    """Run the stages of a pipeline file; unchanged stages are skipped, an interrupted run goes on where it stopped.

    Attributes:
        pipeline: YAML file of stages.
        out: output folder, `{out}` in the file; the file's own `out` by default.
        set: changes to the file, each STAGE.KEY=VALUE with the value in YAML.
        plan: only say which stages would run.
    """

    pipeline: Positional[Path]
    out: Path | None = None
    set: tuple[str, ...] = ()
    plan: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, checked and ready to run."""

    name: str
    verb: str
    loaded: LoadedVerb
    config: Any
    touches: Touches
    key: str


def touches(config: Run) -> Touches:
    return Touches(reads=(config.pipeline,))


def run(config: Run, progress: Progress) -> dict[str, Any]:
    """Run a pipeline; the result holds each stage's state, seconds and result."""
    data = load_yaml(config.pipeline)
    check_keys(data, {"out", "stages"}, str(config.pipeline))
    named = data.get("out") or "out"
    if not isinstance(named, str):
        raise ConfigError(f"{config.pipeline}: 'out' is {named!r}; it must be the path of a folder.")
    out = Path(config.out or named).absolute()
    stages = plan_stages(data, config, out)
    states = {stage.name: ("done" if is_done(stage, out) else "to run") for stage in stages}
    if config.plan:
        return {"out": str(out), "stages": {name: {"state": state} for name, state in states.items()}}
    results: dict[str, Any] = {}
    started = time.monotonic()
    with _claimed(out):
        for number, stage in enumerate(stages, start=1):
            progress.prefix = f"[{number}/{len(stages)}] {stage.name}: "
            if is_done(stage, out):
                marker = _read_marker(out, stage.name)
                progress.say("unchanged, skipped")
                results[stage.name] = {"state": "skipped", "seconds": 0.0, "result": marker["result"]}
            else:
                results[stage.name] = {"state": "ran", **_run_stage(stage, out, progress)}
    progress.prefix = ""
    return {"out": str(out), "seconds": round(time.monotonic() - started, 1), "stages": results}


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"  {name:20s}{stage['state']:10s}{duration(stage['seconds']) if 'seconds' in stage else '':>12s}"
        for name, stage in result["stages"].items()
    ]
    total = f"  total {duration(result['seconds'])}, " if "seconds" in result else "  "
    return "\n".join([*lines, f"{total}output in {result['out']}"])


# ---- reading the file ----------------------------------------------------------------------------


def load_yaml(path: Path, what: str = "pipeline file", key: str = "stages") -> dict[str, Any]:
    """A YAML file that is a mapping; a key given twice, which YAML would silently let win, is an error.

    Args:
        what, key: what the file is and a key it must have, for the messages.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: the key '{key}' is given twice (line {node.start_mark.line + 1}).")
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        text = path.read_text()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: there is no such {what}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this is not a text file.") from None
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}:{line} is not YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a {what} is a mapping with the key '{key}'.")
    return data


def plan_stages(data: Mapping[str, Any], config: Run, out: Path) -> list[Stage]:
    """Check every stage before the first one runs, and give each its key.

    Raises:
        ConfigError: unknown stage, verb or key (with a suggestion), a missing key, a wrong type, or a stage that reads
            what only a later one writes.
    """
    raw = data.get("stages")
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{config.pipeline}: 'stages' must be a mapping of stage names to stages.")
    raw = _with_changes(raw, config)
    stages: list[Stage] = []
    written: dict[Path, str] = {}
    for name, entry in raw.items():
        if not isinstance(name, str) or "/" in name:
            raise ConfigError(f"{config.pipeline}: the stage name {name!r} must be text without '/'.")
        where = f"{config.pipeline}: stage '{name}'"
        if not isinstance(entry, dict) or "verb" not in entry:
            raise ConfigError(f"{where}: the key 'verb' is missing.")
        verb = entry["verb"]
        try:
            loaded = find_verb(verb).load()
        except InputError as error:
            raise ConfigError(f"{where}: {error}") from None
        values = {k: _expand(v, out, config.pipeline) for k, v in entry.items() if k != "verb"}
        filled = fill(loaded.config_type, values, where)
        touched = loaded.touches(filled)
        try:
            claim.check(touched)
        except InputError as error:
            raise ConfigError(f"{where}: {error}") from None
        inputs = {_portable(str(path), out): _input_key(path, written) for path in touched.reads}
        key = hash_json(
            {"verb": verb, "config": _portable(to_json(filled), out), "inputs": inputs, "code": code_key(verb)}
        )
        stages.append(Stage(name, verb, loaded, filled, touched, key))
        written |= {path.absolute(): key for path in touched.writes}
    _check_order(stages, config.pipeline)
    return stages


def _with_changes(raw: dict[str, Any], config: Run) -> dict[str, Any]:
    import yaml

    stages = {name: dict(entry) if isinstance(entry, dict) else entry for name, entry in raw.items()}
    for change in config.set:
        target, _, value = change.partition("=")
        stage, _, key = target.partition(".")
        if not key or "=" not in change:
            raise ConfigError(f"--set: '{change}' is not of the form STAGE.KEY=VALUE.")
        check_keys({stage: None}, set(stages), "--set")
        if not isinstance(stages[stage], dict):
            raise ConfigError(f"{config.pipeline}: stage '{stage}' is no mapping; --set cannot change it.")
        try:
            stages[stage][key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set: the value of '{change}' is not YAML.") from None
    return stages


def _expand(value: Any, out: Path, pipeline: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{out}", str(out)).replace("{here}", str(pipeline.absolute().parent))
    if isinstance(value, list):
        return [_expand(item, out, pipeline) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, out, pipeline) for key, item in value.items()}
    return value


def _portable(value: Any, out: Path) -> Any:
    """The inverse of `_expand` for `{out}`: a result folder that was moved stays cached."""
    if isinstance(value, str):
        return value.replace(str(out), "{out}")
    if isinstance(value, list):
        return [_portable(item, out) for item in value]
    if isinstance(value, dict):
        return {key: _portable(item, out) for key, item in value.items()}
    return value


def _check_order(stages: list[Stage], pipeline: Path) -> None:
    for number, stage in enumerate(stages):
        for later in stages[number + 1 :]:
            for path in stage.touches.reads:
                if path.absolute() in [p.absolute() for p in later.touches.writes]:
                    raise ConfigError(
                        f"{pipeline}: stage '{stage.name}' reads {path.name}, which '{later.name}' writes later.\n"
                        f"Move '{later.name}' before '{stage.name}'."
                    )


# ---- keys ----------------------------------------------------------------------------------------


def code_key(verb: str) -> str:
    """Hash of the source that decides a verb's result: its file, what that imports of this project, and `Verb.code`."""
    entry = VERBS[verb]
    files = {Path(inspect.getfile(entry.load().run))}
    for name in entry.code:
        files |= {ROOT / name} if "." in name else set((ROOT / name).glob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(_imported(files), key=lambda path: (path.parent.name, path.name)):
        digest.update(f"{path.parent.name}/{path.name}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _imported(files: set[Path]) -> set[Path]:
    """`files` and the project's files that they import, at any depth; imports inside functions count."""
    found: set[Path] = set()
    waiting = set(files)
    while waiting:
        path = waiting.pop()
        found.add(path)
        if path.suffix == ".py":
            waiting |= _imports_of(path, path.stat().st_mtime_ns) - found
    return found


@functools.lru_cache(maxsize=1024)
def _imports_of(path: Path, mtime_ns: int) -> frozenset[Path]:
    del mtime_ns  # part of the cache's key only
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = (
        ROOT / (name.removeprefix("embodied.").replace(".", "/") + ".py") for name in names if "embodied." in name
    )
    return frozenset(file for file in inside if file.name not in PLUMBING and file.is_file())


def _input_key(path: Path, written: Mapping[Path, str]) -> str:
    """The key of the stage that writes `path` or the nearest folder above it; otherwise its fingerprint."""
    absolute = path.absolute()
    for candidate in (absolute, *absolute.parents):
        if candidate in written:
            return written[candidate]
    return fingerprint(path)


def fingerprint(path: Path) -> str:
    """A store's or label set's own fingerprint; a file's SHA-256; a folder's names, sizes and times; `absent`.

    Of what lies at a URL: a store's own fingerprint, or its files' names and sizes.
    """
    if is_remote(path):
        return _remote_fingerprint(path)
    zarr_json = path / "zarr.json"
    if zarr_json.is_file():
        with contextlib.suppress(ValueError):  # a damaged store: the verb that reads it says so
            attributes = json.loads(zarr_json.read_text()).get("attributes", {})
            if "fingerprint" in attributes:
                return str(attributes["fingerprint"])
    if path.is_file():
        return hash_file(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return hash_json([[p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files])
    return "absent"


def _remote_fingerprint(path: Path) -> str:
    url = location(path)
    system, place = filesystem(url)
    with remote_errors(url):
        if system.exists(f"{place}/zarr.json"):
            with contextlib.suppress(ValueError):
                attributes = json.loads(system.cat_file(f"{place}/zarr.json")).get("attributes", {})
                if "fingerprint" in attributes:
                    return str(attributes["fingerprint"])
        if not system.exists(place):
            return "absent"
        return hash_json(sorted([name, info["size"]] for name, info in system.find(place, detail=True).items()))


def _exists(path: Path) -> bool:
    if not is_remote(path):
        return path.exists()
    system, place = filesystem(location(path))
    with remote_errors(location(path)):
        return bool(system.exists(place))


# ---- running -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the output folder: two runs at once would write over each other. A killed run lets go of it."""
    (out / ".stages").mkdir(parents=True, exist_ok=True)
    with open(out / ".stages" / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another run is at work there. Wait for it, or choose another --out.") from None
        yield


def is_done(stage: Stage, out: Path) -> bool:
    """Whether the stage ran to its end with this very key and its outputs are still there."""
    marker = _read_marker(out, stage.name)
    return (
        marker.get("state") == "done" and marker["key"] == stage.key and all(_exists(p) for p in stage.touches.writes)
    )


def _run_stage(stage: Stage, out: Path, progress: Progress) -> dict[str, Any]:
    _clear_stale(stage, out)
    record = {
        "key": stage.key,
        "verb": stage.verb,
        "config": to_json(stage.config),
        "writes": [str(path) for path in stage.touches.writes],
    }
    _write_marker(out, stage.name, record | {"state": "started"})
    progress.say(stage.verb)
    start = time.monotonic()
    with claim.claimed(stage.touches):
        result = to_json(stage.loaded.run(stage.config, progress))
    progress.close()
    if stage.loaded.exit_code and (code := stage.loaded.exit_code(result)):
        # What is wrong was found, not broken: the stages after this one must not build on it.
        text = stage.loaded.as_text(result) if stage.loaded.as_text else json.dumps(result, indent=1)
        raise InputError(f"Stage '{stage.name}' ({stage.verb}) ended with exit code {code}.\n{text}")
    seconds = round(time.monotonic() - start, 1)
    progress.say(f"done in {duration(seconds)}")
    peak = [resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    done = {
        "seconds": seconds,
        "finished": time.time(),
        "peak_memory_gb": {"self": round(peak[0], 2), "largest_child": round(peak[1], 2)},
    }
    _write_marker(out, stage.name, record | {"state": "done", "result": result} | done)
    return {"seconds": seconds, "result": result}


def _clear_stale(stage: Stage, out: Path) -> None:
    """Make way for a stage that must run: remove what an earlier version of it wrote, keep what it can resume."""
    marker = _read_marker(out, stage.name)
    same = marker.get("key") == stage.key
    for path in stage.touches.writes:
        if _exists(path) and not (same and stage.touches.resumable):
            if str(path) not in marker.get("writes", []) or out not in path.absolute().parents:
                raise ConfigError(
                    f"Stage '{stage.name}' would overwrite {path}, which this pipeline did not make.\n"
                    "Move it away, or choose another --out."
                )
            _remove(path)
    if not same and marker:
        for path in stage.touches.staging:
            if out in path.absolute().parents:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _marker_path(out: Path, name: str) -> Path:
    return out / ".stages" / f"{name}.json"


def _read_marker(out: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads(_marker_path(out, name).read_text())
    except (OSError, ValueError):
        return {}


def _write_marker(out: Path, name: str, marker: dict[str, Any]) -> None:
    path = _marker_path(out, name)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(marker, indent=1))
    os.replace(temporary, path)
