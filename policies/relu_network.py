"""ReLU networks of a stack on the CPU, differentiated by hand: one network after another, through buffers kept in use.

The same numbers as autograd's within rounding, sooner (benchmarks/iql_speed.py): a layer's activations of a batch of
256 are a quarter of a megabyte, and fresh memory for every intermediate result means page faults and cache misses. And
since every network is computed alone, a stack of k networks gives bit for bit what k single ones give.

Products may be in bfloat16 (`set_precision`): weights, the last layer and everything outside stay float32, activations
and gradients between hidden layers are rounded to 8 bits of mantissa.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embodied.contracts.errors import ConfigError, suggest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo: processors that multiply bfloat16 themselves
_hidden = torch.float32
_relu_backward = torch.ops.aten.threshold_backward.grad_input


def set_precision(name: str, device: str = "cpu") -> None:
    """Products of this process's networks from here on: `fp32`, or `bf16` on a CPU that computes in it.

    Raises:
        ConfigError: another name, a GPU, or a CPU on which bfloat16 is emulated and therefore slower.
    """
    global _hidden
    if name not in PRECISIONS:
        raise ConfigError(f"--precision: there is no '{name}'.{suggest(name, PRECISIONS)}")
    if name == "bf16" and torch.device(device).type != "cpu":
        raise ConfigError("--precision bf16 is for training on a CPU. Leave it out on a GPU.")
    if name == "bf16" and not BF16_FLAGS & set(Path("/proc/cpuinfo").read_text().split()):
        raise ConfigError("--precision bf16: this CPU does not compute in bfloat16. Leave it out.")
    _hidden = PRECISIONS[name]


def apply(x: Tensor, parameters: Sequence[Tensor], num_active: int) -> Tensor:
    """(S, B, in) -> (S, B, out) through S networks.

    Args:
        parameters: weight (S, in, out) and bias (S, 1, out) of each layer in turn.
        num_active: how many layers are followed by a ReLU.
    """
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if x.device.type != "cpu" or x.shape[1] == 1 or tracing:  # a control loop's one row gains nothing
        return plain(x, parameters, num_active)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        return _Network.apply(num_active, x, *parameters)  # type: ignore[return-value]
    buffers = _borrow(x, parameters)
    out = _forward(x, parameters, num_active, buffers)
    buffers.give_back()
    return out


def plain(x: Tensor, parameters: Sequence[Tensor], num_active: int) -> Tensor:
    """What `apply` computes, batched and by autograd: for GPUs, tracing and second derivatives."""
    for n in range(len(parameters) // 2):
        x = torch.baddbmm(parameters[2 * n + 1], x, parameters[2 * n])
        x = torch.relu(x) if n < num_active else x
    return x


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """Of one forward and backward pass.

    Attributes:
        hidden: output of each layer but the last, S times (B, size): once where only the forward pass is wanted.
        scratch: gradient of each of these, (B, size).
    """

    key: Any
    hidden: list[tuple[Tensor, ...]]
    scratch: list[Tensor]

    def give_back(self) -> None:
        _free[self.key].append(self)


_free: dict[Any, list[_Buffers]] = defaultdict(list)


def _borrow(x: Tensor, parameters: Sequence[Tensor], stack: int = 1) -> _Buffers:
    """Buffers nobody uses. A pass that is still waited for keeps its own, so any number may be under way."""
    kind = _hidden if x.dtype == torch.float32 else x.dtype
    sizes = tuple(weight.shape[2] for weight in parameters[:-2:2])
    key = (stack, x.shape[1], sizes, x.dtype, kind)
    if _free[key]:
        return _free[key].pop()
    hidden = [x.new_empty(stack, x.shape[1], size, dtype=kind).unbind(0) for size in sizes]
    return _Buffers(key, hidden, [x.new_empty(x.shape[1], size, dtype=kind) for size in sizes])


@torch.no_grad()
def _forward(x: Tensor, parameters: Sequence[Tensor], num_active: int, buffers: _Buffers) -> Tensor:
    last = len(parameters) // 2 - 1
    out = x.new_empty(x.shape[0], x.shape[1], parameters[-1].shape[2])
    kind, inputs, outputs = buffers.key[-1], x.unbind(0), out.unbind(0)
    for i, network in enumerate(_networks(parameters)):
        h = _as(inputs[i], kind) if last else inputs[i]
        for n in range(last):
            into = buffers.hidden[n][i if buffers.key[0] > 1 else 0]
            torch.addmm(_as(network[2 * n + 1], kind), h, _as(network[2 * n], kind), out=into)
            h = into.relu_() if n < num_active else into
        torch.addmm(network[-1], _as(h, x.dtype), network[-2], out=outputs[i])
    return out.relu_() if last < num_active else out


def _as(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """`tensor.to(kind)`, which takes its time to find out that there is nothing to do."""
    return tensor if tensor.dtype == kind else tensor.to(kind)


def _networks(parameters: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Weights (in, out) and biases (1, out) of each network of the stack."""
    return list(zip(*(parameter.unbind(0) for parameter in parameters), strict=True))


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_active: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_active = num_active
        ctx.buffers = _borrow(x, parameters, x.shape[0])
        out = _forward(x, parameters, num_active, ctx.buffers)
        ctx.save_for_backward(out, x, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        out, x, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph: a gradient that is differentiated again
            inputs = [t for t, want in zip((x, *parameters), wanted, strict=True) if want]
            again = plain(x, parameters, ctx.num_active)
            found = iter(torch.autograd.grad(again, inputs, gradients[0], create_graph=True))
            return (None, *(next(found) if want else None for want in wanted))
        if ctx.buffers is None:
            raise RuntimeError("The backward pass overwrites its activations: retain_graph is not possible here.")
        found = _backward(ctx.buffers, out, gradients[0], x, parameters, ctx.num_active, wanted[0], any(wanted[1:]))
        ctx.buffers.give_back()
        ctx.buffers = None
        return (None, *found)


def _backward(
    buffers: _Buffers,
    out: Tensor,
    gradient: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    num_active: int,
    want_x: bool,
    want_parameters: bool,
) -> list[Tensor | None]:
    """Gradients of x and of the parameters from that of the output (S, B, out). Overwrites the activations."""
    last = len(parameters) // 2 - 1
    into_x = torch.empty_like(x) if want_x else None
    into = [torch.empty_like(p) for p in parameters] if want_parameters else [None] * len(parameters)
    gradients = _networks([p for p in into if p is not None]) or [()] * x.shape[0]
    for i, network in enumerate(_networks(parameters)):
        hidden = [buffer[i] for buffer in buffers.hidden]
        g = gradient[i] if last >= num_active else _relu_backward(gradient[i], out[i], 0, grad_input=out[i].clone())
        for n in range(last, -1, -1):
            if n < min(last, num_active):
                g = _relu_backward(g, hidden[n], 0, grad_input=hidden[n])
            given = _as(hidden[n - 1] if n else x[i], g.dtype)
            if want_parameters:
                _product(given.t(), g, gradients[i][2 * n])
                torch.sum(g, 0, keepdim=True, dtype=x.dtype, out=gradients[i][2 * n + 1])
            if n or into_x is not None:
                scratch = buffers.scratch[n - 1] if n else into_x[i]  # type: ignore[index]
                _product(g, _as(network[2 * n], g.dtype).t(), scratch)
                g = scratch
    return [into_x, *into]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, rounded or widened where `out` has another type."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
