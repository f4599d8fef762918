"""Feed a reader thousands of damaged files: a clear refusal or a correct partial import, never anything worse.

Used by `tests/test_fuzz_*.py`. The cases run in a child process with bounded memory, file sizes and time, because a
C library that crashes or hangs takes its process with it. The child imports the test module by path; that module has

    FORMAT: str                                                  # key of importer.FORMATS
    def seeds(folder: Path) -> list[Path]                        # valid sources, small, made anew
    def damage(seed: Path, target: Path, rng) -> str | None      # optional: a structured change (dtypes, shapes, absurd
                                                                 # lengths, path traversal, bombs); None: not this time

Every case is a copy of a seed with either `damage` or random bytes changed. A case passes if reading it raises an
EmbodiedError, or gives episodes that pass `Episode.check` or raise an EmbodiedError each.
"""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np

CASE_SECONDS = 20  # a case that takes longer hangs
MEMORY = 1 << 30  # bytes above what the child uses when it starts
FILE_BYTES = 1 << 28
FRAMES_READ = 200_000_000  # bytes of pictures that are drained per case


def fuzz(test_file: str, cases: int, first_seed: int = 0) -> dict[str, int]:
    """Run `cases` damaged sources through the reader named by `test_file`'s FORMAT. Returns how they ended.

    Raises AssertionError naming the case (run it alone with `python tests/fuzzing.py TEST_FILE CASE`) where the child
    crashed, hung, ran out of memory, raised anything but an EmbodiedError, or wrote outside its own folder.
    """
    counts: dict[str, int] = {}
    done = 0
    while done < cases:
        command = [sys.executable, __file__, test_file, str(first_seed + done), str(cases - done)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, errors = child.communicate(timeout=CASE_SECONDS * 3 + cases)
        except subprocess.TimeoutExpired:
            child.kill()
            out, errors = child.communicate()
        lines = out.splitlines()
        for line in lines:
            kind, _, _ = line.partition(" ")
            if kind != "begin":
                counts[kind] = counts.get(kind, 0) + 1
                done += 1
        bad = [line for line in lines if line.startswith("bad ")]
        assert not bad, bad[0]
        if child.returncode != 0:
            begun = [line for line in lines if line.startswith("begin ")]
            where = begun[-1] if begun else "before the first case"
            raise AssertionError(f"the reader took its process with it ({child.returncode}): {where}\n{errors[-2000:]}")
    return counts


def change_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, overwritten, removed, repeated or inserted ranges, extreme integers, or a truncation."""
    if not data:
        return data
    changed = bytearray(data)
    kind = rng.integers(7)
    if kind == 0:
        return bytes(changed[: rng.integers(len(changed))])
    for _ in range(int(rng.choice([1, 1, 2, 4, 16, 64]))):
        at = int(rng.integers(len(changed)))
        size = int(rng.choice([1, 2, 4, 8, 64, 512]))
        if kind == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            changed[at : at + size] = rng.bytes(len(changed[at : at + size]))
        elif kind == 3 and len(changed) > size:
            del changed[at : at + size]
        elif kind == 4:
            changed[at:at] = changed[at : at + size]
        elif kind == 5:
            value = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            changed[at : at + size] = bytes([value]) * len(changed[at : at + size])
        else:
            width = int(rng.choice([2, 4, 8]))
            value = int(rng.choice([1, 2**15 - 1, 2**15, 2**16 - 1]))
            extreme = rng.choice([value, -1, 2 ** (8 * width - 1) - 1])
            changed[at : at + width] = (int(extreme) % 2 ** (8 * width)).to_bytes(width, rng.choice(["little", "big"]))
        if not changed:
            break
    return bytes(changed)


def damage_bytes(target: Path, rng: np.random.Generator) -> str:
    """Change the bytes of one file of a source, chosen at random."""
    files = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    file = files[int(rng.integers(len(files)))]
    file.write_bytes(change_bytes(file.read_bytes(), rng))
    return f"bytes of {file.name}"


def drain(format: str, path: Path) -> str:
    """Read everything of a source as the importer would, without writing a store. Returns how it ended."""
    from embodied.contracts.errors import EmbodiedError
    from embodied.datasets.episode import blocks_of
    from embodied.datasets.importer import FORMATS

    try:
        FORMATS[format].sniff(path)
        source = FORMATS[format].read(path, {})
    except EmbodiedError:
        return "refused"
    kept = 0
    budget = FRAMES_READ
    for index in range(min(source.num_episodes, 50)):
        try:
            episode = source.load(index)
            episode.check(source.spec)
            for pictures in episode.images.values():
                for block in blocks_of(pictures):
                    assert block.shape[1:] == tuple(pictures.shape[1:])
                    budget -= block.nbytes
                    if budget < 0:
                        break
            kept += 1
        except EmbodiedError:
            continue
    json.dumps(source.attributes)  # goes into the store's attributes
    json.dumps([finding.to_json() for finding in source.findings])
    if kept == 0:
        return "refused"
    return "whole" if kept == source.num_episodes and not source.findings else "partial"


def _load(test_file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzzed", test_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _child(test_file: str, first: int, count: int) -> None:
    """Cases `first` to `first + count`, one line before and one after each."""
    import tempfile

    module = _load(test_file)
    from embodied.datasets.importer import FORMATS

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        seeds = module.seeds(folder / "seeds")
        for seed in seeds:
            ended = drain(module.FORMAT, seed)  # loads every library before memory is bounded
            assert ended != "refused", f"the seed {seed.name} is no valid {module.FORMAT}"
        assert module.FORMAT in FORMATS
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a case that hangs ends the process
        os.chdir(folder)
        for case in range(first, first + count):
            rng = np.random.default_rng([20261123, case])
            seed = seeds[case % len(seeds)]
            work = folder / "work"
            work.mkdir()
            target = work / seed.name
            shutil.copytree(seed, target) if seed.is_dir() else shutil.copy(seed, target)
            what = None
            if hasattr(module, "damage") and rng.random() < 0.5:
                what = module.damage(seed, target, rng)
            if what is None:
                what = damage_bytes(target, rng)
            print(f"begin {case} {seed.name}: {what}", flush=True)
            before = sorted(p for p in folder.rglob("*"))
            start = time.monotonic()
            signal.alarm(CASE_SECONDS)
            try:
                ended = drain(module.FORMAT, target)
            except BaseException as error:
                print(f"bad {case} {seed.name}: {what}: {type(error).__name__}: {str(error)[:300]!r}", flush=True)
                raise
            signal.alarm(0)
            if sorted(p for p in folder.rglob("*")) != before:
                ended = "bad wrote files:"
            print(f"{ended} {case} {seed.name}: {what} {time.monotonic() - start:.2f} s", flush=True)
            shutil.rmtree(work)


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
