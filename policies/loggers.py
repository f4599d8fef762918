"""Rows of metrics for other tools, beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio. Each is optional.

One run per policy, under the name of its bundle, so that seeds and variations lie side by side in the tool. W&B and
trackio read their own environment variables (`WANDB_MODE=offline` keeps everything on this machine).
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, MissingExtraError, suggest
from embodied.policies.loop import Log

Writer = tuple[Callable[[int, Mapping[str, float]], Any], Callable[[], Any]]  # write a row; close


@contextlib.contextmanager
def loggers(kinds: Sequence[str], out: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[Log | None]:
    """What `run_loop` takes as `log`, for a `with` block; None where no tool is wanted.

    Args:
        kinds: of `WRITERS`.
        out: folder of the run; the project of W&B and trackio is called after it.
        names: one per entry of the stack.
        settings: the learner's configuration, for the tools' tables.

    Raises:
        ConfigError: unknown tool. MissingExtraError: its package is not installed.
    """
    check(kinds)
    if not kinds:
        yield None
        return
    with contextlib.ExitStack() as stack:
        writers = []
        for name in names:
            for kind in kinds:
                write, close = WRITERS[kind](out, name, settings)
                stack.callback(close)
                writers.append((names.index(name), write))

        def log(step: int, row: Mapping[str, Any]) -> None:
            for index, write in writers:
                write(step, {metric: float(np.atleast_1d(values)[index]) for metric, values in row.items()})

        yield log


def check(kinds: Sequence[str]) -> None:
    """ConfigError for a tool we do not write for."""
    for kind in kinds:
        if kind not in WRITERS:
            raise ConfigError(f"--log: there is no '{kind}'.{suggest(kind, WRITERS)}")


def _tensorboard(out: Path, name: str, settings: Mapping[str, Any]) -> Writer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "log", "--log tensorboard") from error
    writer = SummaryWriter(str(out / "tensorboard" / name))
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def write(step: int, row: Mapping[str, float]) -> None:
        for metric, value in row.items():
            writer.add_scalar(metric, value, step)

    return write, writer.close


def _wandb(out: Path, name: str, settings: Mapping[str, Any]) -> Writer:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("wandb", None, "--log wandb") from error
    # The same id after a resume: the run goes on instead of beginning anew beside itself.
    identity = hashlib.sha256(f"{out.resolve()}/{name}".encode()).hexdigest()[:16]
    run = wandb.init(
        project=_project(out),
        name=name,
        id=identity,
        config=dict(settings),
        dir=str(out),
        resume="allow",
        reinit="create_new",
    )
    return lambda step, row: run.log(dict(row), step=step), run.finish


def _trackio(out: Path, name: str, settings: Mapping[str, Any]) -> Writer:
    try:
        import trackio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("trackio", None, "--log trackio") from error
    run: Any = trackio.init(project=_project(out), name=name, config=dict(settings), resume="allow", embed=False)
    return lambda step, row: run.log(dict(row), step=step), run.finish


def _project(out: Path) -> str:
    return out.resolve().name or "embodied"


WRITERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Writer]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
