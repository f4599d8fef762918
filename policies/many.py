"""Many policies from one command: seeds times variations of settings, in one process per core, or stacked on a GPU.

On a CPU a stack of seeds is no faster than one after another, and a second torch thread gains little and loses much
(benchmarks/iql_speed.py); processes scale. Each policy is a run of its own, in `<out>/runs/<name>/`: what it becomes
depends neither on the number of workers nor on the policies beside it, and a killed command goes on with every one of
them. On a GPU the seeds of a variation are one stack, and variations follow one another.

Workers are forked: the data are shared, not copied, and start-up costs nothing.
"""

import ctypes
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from embodied.contracts import errors
from embodied.contracts.errors import ConfigError, EmbodiedError, TrainingError
from embodied.policies.configure import configure
from embodied.policies.loop import Progress, read_metrics
from embodied.policies.train import checked_seeds, train


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run: the seeds of a stack under one configuration.

    Attributes:
        name: of its folder in `<out>/runs`.
        suffix: after `seed_000` in the names of its bundles.
    """

    name: str
    suffix: str
    seeds: tuple[int, ...]
    config: Any

    @property
    def bundles(self) -> list[str]:
        return [f"seed_{seed:03d}{self.suffix}" for seed in self.seeds]


def units(config: Any, seeds: Sequence[int], vary: Mapping[str, Sequence[float]], stacked: bool) -> list[Unit]:
    """All combinations of the values in `vary`, each with all seeds: as one unit, or one per seed.

    Raises:
        ConfigError: a setting that the learner does not have or that is no number, or a value out of range or twice.
    """
    seeds = checked_seeds(seeds)
    for field, values in vary.items():
        current = getattr(config, field, 0.0)
        if isinstance(current, bool) or not isinstance(current, int | float):
            raise ConfigError(f"--vary {field}: only a setting that is one number can be varied; it is {current!r}.")
        if len(set(values)) != len(values) or not values:
            raise ConfigError(f"--vary {field}: give different values; found {list(values)}.")
    result = []
    for values in itertools.product(*vary.values()):
        changes = dict(zip(vary, values, strict=True))
        varied = configure({"": config}, "", changes, "--vary") if changes else config
        suffix = "".join(f"-{field}_{value:g}" for field, value in changes.items())
        for group in [tuple(seeds)] if stacked else [(seed,) for seed in seeds]:
            name = (suffix.lstrip("-") or "all") if stacked else f"seed_{group[0]:03d}{suffix}"
            result.append(Unit(name, suffix, group, varied))
    return result


def train_many(
    learner_name: str,
    data: Any,
    config: Any,
    seeds: Sequence[int],
    steps: int,
    out: str | Path,
    vary: Mapping[str, Sequence[Any]] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    device: str = "cpu",
    **options: Any,
) -> Path:
    """`policies.train.train` for every seed and variation; resumes what `out` holds.

    Args:
        vary: setting -> values; with several settings, every combination.
        workers: processes on a CPU; 0: one per core. The result does not depend on it.
        progress: called with (steps done of all, steps of all, text).
        options: of `train`.

    Returns:
        `<out>/train.json`; bundles are `<out>/seed_000/`, or `<out>/seed_000-expectile_0.7/` and so on.

    Raises:
        ConfigError, InputError: before anything is trained. TrainingError: of the first policy that cannot go on, or a
            worker that was killed. The other workers end too; the same command goes on from their checkpoints.
    """
    out, stacked = Path(out), torch.device(device).type != "cpu"
    todo = units(config, seeds, vary or {}, stacked)
    if len(todo) == 1 and not vary:
        return train(learner_name, data, config, seeds, steps, out, progress=progress, device=device, **options)
    if workers < 0:
        raise ConfigError(f"--workers: found {workers}; give how many processes, or 0 for one per core.")
    cores = 1 if stacked else workers or len(os.sched_getaffinity(0))
    data.check()

    def run(unit: Unit, tell: Progress) -> None:
        folder = out / "runs" / unit.name
        train(
            learner_name,
            data,
            unit.config,
            unit.seeds,
            steps,
            folder,
            progress=tell,
            device=device,
            **{**options, "run_names": unit.bundles},
        )

    board = _Board(todo, steps, progress)
    if min(cores, len(todo)) == 1:
        for unit in todo:
            run(unit, board.of(unit))
    else:
        _in_workers(todo, run, board, cores, out)
    return _collect(out, todo, vary or {})


class _Board:
    """How far each unit is, as one line of progress."""

    def __init__(self, todo: Sequence[Unit], steps: int, progress: Progress | None) -> None:
        self._steps, self._progress = steps, progress
        self.done = {unit.name: 0 for unit in todo}

    def of(self, unit: Unit) -> Progress:
        return lambda done, total, text: self.tell(unit.name, done, text)

    def tell(self, name: str, done: int, text: str) -> None:
        self.done[name] = done
        if self._progress:
            self._progress(sum(self.done.values()), self._steps * len(self.done), f"{name}: {text}" if text else name)


def _in_workers(todo: Sequence[Unit], run: Any, board: _Board, cores: int, out: Path) -> None:
    """Up to `cores` forked processes at a time, the next unit as soon as one is done."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(todo), {}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                unit = waiting.pop(0)
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(run, unit, send, os.getpid()), daemon=True)
                process.start()
                send.close()
                running[receive] = (unit, process)
            for receive in wait(list(running)):
                unit, process = running[receive]
                try:
                    message = json.loads(receive.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    process.join()
                    del running[receive]
                    if process.exitcode != 0:
                        raise _killed(unit, process.exitcode, board.done[unit.name], out) from None
                    continue
                if "error" in message:
                    kind = getattr(errors, message["error"], TrainingError)
                    error = kind if isinstance(kind, type) and issubclass(kind, EmbodiedError) else TrainingError
                    raise _with_text(error, f"{unit.name}: {message['text']}")
                board.tell(unit.name, message["done"], message["text"])
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _work(run: Any, unit: Unit, send: Connection, parent: int) -> None:
    """A worker: one unit, told to the parent as JSON. Ends with the parent, whatever ends that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    torch.set_num_threads(1)

    def tell(done: int, total: int, text: str) -> None:
        send.send_bytes(json.dumps({"done": done, "text": text}).encode())

    try:
        run(unit, tell)
    except EmbodiedError as error:
        send.send_bytes(json.dumps({"error": type(error).__name__, "text": str(error)}).encode())
    except Exception as error:  # a bug: its traceback is wanted, and the others must not go on for hours
        traceback.print_exc()
        send.send_bytes(json.dumps({"error": "", "text": f"{type(error).__name__}: {error}"}).encode())


def _with_text(kind: type[EmbodiedError], text: str) -> EmbodiedError:
    """An error of a kind, whatever its constructor takes."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def _killed(unit: Unit, code: int | None, done: int, out: Path) -> TrainingError:
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = f"signal {-code} ({signal.Signals(-code).name}"
        how += ", which is also what a machine without memory left does)" if -code == signal.SIGKILL else ")"
    return TrainingError(
        f"The worker that trained {unit.name} was ended by {how} after step {done}; the others were ended too.\n"
        f"The same command goes on from the checkpoints in {out / 'runs'}; with fewer --workers it takes less memory."
    )


def _collect(out: Path, todo: Sequence[Unit], vary: Mapping[str, Sequence[Any]]) -> Path:
    """Bundles up to `out`, and one `metrics.jsonl` and `train.json` of all."""
    summaries = [json.loads((out / "runs" / unit.name / "train.json").read_text()) for unit in todo]
    for unit, summary in zip(todo, summaries, strict=True):
        for inner, name in zip(summary["bundles"], unit.bundles, strict=False):
            target = out / name
            if (target / "hashes.json").is_file():
                shutil.rmtree(target)
            (out / "runs" / unit.name / inner).rename(target)
    tables = [{row["step"]: row for row in read_metrics(out / "runs" / unit.name)} for unit in todo]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    names = [name for name in next(iter(tables[0].values())) if name != "step"]
    rows = [
        {"step": step, **{name: [x for table in tables for x in table[step][name]] for name in names}} for step in steps
    ]
    _write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        **summaries[0],
        "seeds": sorted({seed for unit in todo for seed in unit.seeds}),
        "vary": {name: list(values) for name, values in vary.items()},
        "runs": [unit.name for unit in todo],
        "bundles": [name for unit, s in zip(todo, summaries, strict=True) for name in unit.bundles if s["bundles"]],
    }
    return _write(out / "train.json", json.dumps(summary, indent=2) + "\n")


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    return partial.rename(path)
