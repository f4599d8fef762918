"""The training loop: metrics, checkpoints, exact resume, refusal of NaN. Knows no algorithm.

A run folder holds `metrics.jsonl` (one line per log, means since the last line) and `checkpoint.safetensors` (tensors,
with the run's identity and step as JSON in its header), each written whole. The batch of step k depends on (seed, k)
only, so a killed run goes on from its checkpoint to the very weights of an uninterrupted one, on a CPU with the same
packages.
"""

import ctypes
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embodied.contracts.errors import ConfigError, TrainingError
from embodied.contracts.provenance import hash_json

if TYPE_CHECKING:
    from embodied.policies.probe import Probe

Progress = Callable[[int, int, str], None]  # done, total, text
Log = Callable[[int, Mapping[str, Any]], None]  # step, metric -> a number per seed
FIRST = ("value", "advantage", "log_prob", "q_over_return")  # of a progress line


class Trainable(Protocol):
    """What the loop drives: tensors in, tensors out, all state in one flat dict."""

    def update(self, batch: Any) -> Mapping[str, Tensor]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def run_loop(
    learner: Trainable,
    batch: Callable[[int], Any],
    steps: int,
    out: Path,
    identity: Mapping[str, Any],
    log_every: int = 100,
    checkpoint_every: int = 1000,
    progress: Progress | None = None,
    threads: int = 1,
    finished: Callable[[], bool] = lambda: False,
    probe: "Probe | None" = None,
    log: Log | None = None,
) -> bool:
    """Train `learner` for `steps` updates, going on from the checkpoint in `out` where there is one.

    Args:
        batch: step (from 0) -> what `learner.update` takes.
        identity: JSON-able; a checkpoint of another identity is refused.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; rounded up to a multiple of `log_every`.
        threads: torch threads of this process. With two, a second busy process makes CPU training tens of times slower.
        finished: asked before every step; the run ends when it is so, as it does after `steps`.
        probe: asked at every log for more metrics and whether values diverge.
        log: gets every row of `metrics.jsonl` that this call writes.

    Returns:
        True if the run was resumed.

    Raises:
        TrainingError: a loss is not finite, or values diverge: the step, the seed, the last good checkpoint.
        ConfigError: other identity.
    """
    if steps < 1 or log_every < 1 or checkpoint_every < 1:
        raise ConfigError("steps, log_every and checkpoint_every must be at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    checkpoint = out / "checkpoint.safetensors"
    checkpoint_every = -(-checkpoint_every // log_every) * log_every
    start = _resume(learner, checkpoint, hash_json(identity))
    _cut_metrics(out / "metrics.jsonl", start)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # a learner with phases gives each metric in some of the steps
    bad_step: Tensor | None = (
        None  # (S,) first step with a loss that is not finite; read at logs only: no sync per step
    )
    if progress:
        progress(start, steps, "resumed" if start else "")
    for step in range(start, steps):
        if finished():
            break
        metrics = learner.update(batch(step))
        for name, value in metrics.items():
            sums[name] = sums[name] + value if name in sums else value.clone()
            counts[name] = counts.get(name, 0) + 1
        total = torch.stack([value.reshape(-1) for value in metrics.values()]).sum(0)  # (S,)
        bad_now = torch.where(torch.isfinite(total), steps, step)
        bad_step = bad_now if bad_step is None else torch.minimum(bad_step, bad_now)
        done = step + 1
        last = done == steps or finished()
        if done % log_every and not last:
            continue
        assert bad_step is not None
        if int(bad_step.min()) < steps:
            raise _not_finite(bad_step, checkpoint)
        means = {name: value / counts[name] for name, value in sums.items()}
        if probe:
            means |= probe()
            probe.check(done, means["q_largest"], _last_good(checkpoint))
        row = {name: np.round(value.double().tolist(), 7).tolist() for name, value in means.items()}
        sums, counts = {}, {}
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": done, **row}) + "\n")
        if log:
            log(done, row)
        if last or (done % checkpoint_every == 0 and not (probe and probe.doubtful)):
            _save(learner, checkpoint, done, identity)
        if progress:
            progress(done, steps, describe(row))
    return start > 0


def describe(row: Mapping[str, Any]) -> str:
    """A row of metrics in words, means over seeds, what tells most first."""
    names = [*(name for name in FIRST if name in row), *(name for name in row if name not in FIRST)]
    return " ".join(f"{name} {np.mean(row[name]):.3g}" for name in names)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut by a kill is left out."""
    rows = []
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def module_tensors(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of a module as `prefix.name` -> tensor."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def load_module(prefix: str, module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of `module_tensors`."""
    module.load_state_dict({k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")})


class Adam:
    """Fused Adam, betas 0.9 and 0.999. Element-wise, so a stack trains as its entries would alone.

    Calls torch's operator itself: constructing `torch.optim.Adam` imports the compiler, 5 s of CPU in every process,
    and the functional form sorts the parameters into groups at every step.
    """

    def __init__(self, module: torch.nn.Module, learning_rate: float, epsilon: float = 1e-8) -> None:
        self.learning_rate = learning_rate
        self.epsilon = epsilon
        self._names = [name for name, _ in module.named_parameters()]
        self.parameters = [p for _, p in module.named_parameters()]
        self._moments = {kind: [torch.zeros_like(p) for p in self.parameters] for kind in ("mean", "square")}
        self._steps = torch.zeros((), device=self.parameters[0].device)

    def descend(self, loss: Tensor) -> None:
        """Gradient of a scalar loss, then one step."""
        self.step(list(torch.autograd.grad(loss, self.parameters)))

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        self.step_of(self.parameters, gradients, *self.moments)

    @property
    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Means and mean squares of the gradients, in the order of the parameters."""
        return self._moments["mean"], self._moments["square"]

    def step_of(
        self,
        parameters: list[Any],
        gradients: list[Any],
        means: list[Any],
        squares: list[Any],
    ) -> None:
        """The same for tensors that hold parameters and moments in another form."""
        self._steps += 1
        torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
            parameters,
            gradients,
            means,
            squares,
            [],
            [self._steps] * len(gradients),
            lr=self.learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=self.epsilon,
            amsgrad=False,
            maximize=False,
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Moments and step count, as `prefix.kind.name`."""
        state = {
            f"{prefix}.{k}.{n}": v for k, vs in self._moments.items() for n, v in zip(self._names, vs, strict=True)
        }
        return state | {f"{prefix}.steps": self._steps}

    @torch.no_grad()
    def load(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        for kind, moments in self._moments.items():
            for name, moment in zip(self._names, moments, strict=True):
                moment.copy_(state[f"{prefix}.{kind}.{name}"])
        self._steps.copy_(state[f"{prefix}.steps"])


ActorT = TypeVar("ActorT", bound=torch.nn.Module)


class ActorAlone(Generic[ActorT]):
    """The checkpoint of a learner that trains an actor and nothing else."""

    step: int
    actor: ActorT
    actor_optimizer: Adam

    def state_dict(self) -> dict[str, Tensor]:
        return (
            {"step": torch.tensor(self.step)}
            | module_tensors("actor", self.actor)
            | self.actor_optimizer.tensors("actor_optimizer")
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])
        load_module("actor", self.actor, state)
        self.actor_optimizer.load("actor_optimizer", state)


@torch.no_grad()
def update_target(target: torch.nn.Module, online: torch.nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate online, in place."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.lerp_(new, rate)


def _save(learner: Trainable, path: Path, step: int, identity: Mapping[str, Any]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in learner.state_dict().items()}
    record = json.dumps({"step": step, "identity_hash": hash_json(identity), "identity": dict(identity)})
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"embodied": record})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own class
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path}: could not write the checkpoint: {error}.") from error


def _resume(learner: Trainable, path: Path, identity_hash: str) -> int:
    """Load the checkpoint, if any; the number of steps done."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["embodied"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}.\nRemove it to start from the first step.") from error
    if record["identity_hash"] != identity_hash:
        raise ConfigError(
            f"{path.parent} holds a run with another configuration, other seeds or other data.\n"
            "Choose another output folder, or remove this one."
        )
    learner.load_state_dict(tensors)
    return int(record["step"])


def _cut_metrics(path: Path, step: int) -> None:
    """Drop lines after the checkpoint: the resumed run writes them again."""
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


def _last_good(checkpoint: Path) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"


def _keep_freed_memory() -> None:
    """Every step frees and takes the same megabytes: glibc is to keep them, instead of asking for fresh pages again."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library, which has its own ways
        return


def _not_finite(bad_step: Tensor, checkpoint: Path) -> TrainingError:
    seed = int(bad_step.argmin())
    return TrainingError(
        f"The loss of seed number {seed} is not finite at step {int(bad_step.min()) + 1}; {_last_good(checkpoint)}.\n"
        "Lower the learning rate or the inverse temperature, or look for extreme labels (`embodied data info`)."
    )
