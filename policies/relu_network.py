"""ReLU networks of a stack on the CPU, differentiated by hand: one network after another, through buffers kept in use.

The same numbers as autograd's within rounding, sooner (benchmarks/iql_speed.py): a layer's activations of a batch of
256 are a quarter of a megabyte, and fresh memory for every intermediate result means page faults and cache misses. And
since every network is computed alone, a stack of k networks gives bit for bit what k single ones give.

`apply` is one autograd function; `Networks` goes without autograd (`descent.py`).

Products may be in bfloat16 (`set_precision`): both factors of hidden layers with `WIDE` inputs or more, forwards and
backwards, are rounded to 8 bits of mantissa, and so are their products. Weights, narrow first layers, the last layer,
biases and everything outside stay float32.
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
WIDE = 64  # inputs from which rounding a layer's factors costs less than it gains
NARROW = 16  # columns below which MKL's product with a row-major matrix takes five times as long (Zen 4)
_products = torch.float32
_relu_backward = torch.ops.aten.threshold_backward.grad_input


def product_type(name: str, device: str = "cpu") -> torch.dtype:
    """Of `fp32`, or of `bf16` on a CPU that computes in it.

    Raises:
        ConfigError: another name, a GPU, or a CPU on which bfloat16 is emulated and therefore slower.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision: there is no '{name}'.{suggest(name, PRECISIONS)}")
    if name == "bf16" and torch.device(device).type != "cpu":
        raise ConfigError("precision bf16 is for training on a CPU. Leave it out on a GPU.")
    if name == "bf16" and not BF16_FLAGS & set(Path("/proc/cpuinfo").read_text().split()):
        raise ConfigError("precision bf16: this CPU does not compute in bfloat16. Leave it out.")
    return PRECISIONS[name]


def set_precision(name: str, device: str = "cpu") -> None:
    """Products of this process's networks from here on; see `product_type`."""
    global _products
    _products = product_type(name, device)


def precision_in_use() -> torch.dtype:
    """Of this process's products: what `set_precision` chose."""
    return _products


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
    out = _forward(x.unbind(0), _networks(parameters), num_active, buffers)
    buffers.give_back()
    return out


def plain(x: Tensor, parameters: Sequence[Tensor], num_active: int) -> Tensor:
    """What `apply` computes, batched and by autograd: for GPUs, tracing and second derivatives."""
    for n in range(len(parameters) // 2):
        x = torch.baddbmm(parameters[2 * n + 1], x, parameters[2 * n])
        x = torch.relu(x) if n < num_active else x
    return x


class Networks:
    """The same without autograd, for parameters that stay where they are in memory.

    Args:
        parameters, num_active: as `apply` takes them, of S * E networks.
        gradients: tensors of the same shapes, which `backward` overwrites.
        members: E; network s * E + e is given entry s of the input.
    """

    def __init__(
        self, parameters: Sequence[Tensor], num_active: int, gradients: Sequence[Tensor] = (), members: int = 1
    ) -> None:
        self._parameters = [p.detach() for p in parameters]  # no operation on them is recorded for autograd
        self._networks, self._gradients = _networks(self._parameters), _networks(gradients)
        self._num_active, self._members = num_active, members
        self._kept: tuple[_Buffers, list[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, keep: bool = False) -> Tensor:
        """(S, B, in) -> (S * E, B, out). `keep`: what `backward` needs, until then or the next such pass."""
        inputs = [given for given in x.detach().unbind(0) for _ in range(self._members)]
        if keep and self._kept:
            self._kept[0].give_back()
        buffers = _borrow(x, self._parameters, len(inputs) if keep else 1)
        out = _forward(inputs, self._networks, self._num_active, buffers)
        if keep:
            self._kept = buffers, inputs, out
        else:
            buffers.give_back()
        return out

    def backward(self, gradient: Tensor) -> None:
        """Fill the gradients from that of the output of the last pass kept, (S * E, B, out)."""
        assert self._kept is not None
        (buffers, inputs, out), self._kept = self._kept, None
        for i, x in enumerate(inputs):
            _backward(buffers, i, x, self._networks[i], self._num_active, out[i], gradient[i], self._gradients[i], None)
        buffers.give_back()


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """Of one forward and backward pass, layer by layer.

    Attributes:
        hidden: output of each layer but the last, (B, size), of every network kept.
        rounded: input of each layer but the last in bfloat16 and its weight, of every network kept; None where the
            layer's products are not in bfloat16.
        gradient: of each hidden output, (B, size).
        product, weight: bfloat16 results on their way, (B, size) and (in, size) of each layer.
    """

    key: Any
    hidden: list[tuple[Tensor, ...]]
    rounded: list[tuple[tuple[Tensor, Tensor] | None, ...]]
    gradient: list[Tensor]
    product: list[Tensor]
    weight: list[Tensor]

    def give_back(self) -> None:
        _free[self.key].append(self)


_free: dict[Any, list[_Buffers]] = defaultdict(list)


@torch.inference_mode(False)  # what is made in that mode could not be written to outside it
def _borrow(x: Tensor, parameters: Sequence[Tensor], kept: int = 1) -> _Buffers:
    """Buffers nobody uses. A pass that is still waited for keeps its own, so any number may be under way."""
    low = _products != torch.float32 and x.dtype == torch.float32
    shapes = tuple((weight.shape[1], weight.shape[2]) for weight in parameters[:-2:2])
    key = (kept, x.shape[1], shapes, x.dtype, low)
    if _free[key]:
        return _free[key].pop()
    rows = x.shape[1]

    def half(size: int, width: int) -> Tensor:
        return x.new_empty(size, width, dtype=torch.bfloat16)

    def pairs() -> tuple[tuple[Tensor, Tensor] | None, ...]:
        return tuple((half(rows, i), half(i, o)) if low and i >= WIDE else None for i, o in shapes)

    return _Buffers(
        key,
        [tuple(x.new_empty(rows, o) for _, o in shapes) for _ in range(kept)],
        [pairs() for _ in range(kept)],
        [x.new_empty(rows, o) for _, o in shapes],
        [half(rows, o) for _, o in shapes if low],
        [half(i, o) for i, o in shapes if low],
    )


def _forward(
    inputs: Sequence[Tensor], networks: Sequence[tuple[Tensor, ...]], num_active: int, buffers: _Buffers
) -> Tensor:
    """(B, in) of each network -> (S, B, out). Buffers of one network only serve all of them, and keep the last."""
    last, first = len(networks[0]) // 2 - 1, inputs[0]
    out = first.new_empty(len(inputs), first.shape[0], networks[0][-1].shape[1])
    for i, (x, network) in enumerate(zip(inputs, networks, strict=True)):
        place = i % len(buffers.hidden)
        hidden, rounded = buffers.hidden[place], buffers.rounded[place]
        for n in range(last):
            weight, into = network[2 * n], hidden[n]
            if (pair := rounded[n]) is None:
                torch.mm(x, weight, out=into)
            else:
                into.copy_(torch.mm(pair[0].copy_(x), pair[1].copy_(weight), out=buffers.product[n]))
            into.add_(network[2 * n + 1])  # sooner than addmm, which first copies the bias into every row
            x = into.relu_() if n < num_active else into
        torch.addmm(network[-1], x, _columns(network[-2]), out=out[i])
    return out.relu_() if last < num_active else out


def _columns(weight: Tensor) -> Tensor:
    """The same matrix, laid out column by column where it has but a few."""
    return weight.t().contiguous().t() if 1 < weight.shape[1] < NARROW else weight


def _networks(parameters: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Weights (in, out) and biases (1, out) of each network of the stack."""
    return list(zip(*(parameter.unbind(0) for parameter in parameters), strict=True))


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_active: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_active = num_active
        ctx.buffers = _borrow(x, parameters, x.shape[0])
        out = _forward(x.unbind(0), _networks(parameters), num_active, ctx.buffers)
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
        found = _gradients(ctx.buffers, out, gradients[0], x, parameters, ctx.num_active, wanted[0], any(wanted[1:]))
        ctx.buffers.give_back()
        ctx.buffers = None
        return (None, *found)


def _gradients(
    buffers: _Buffers,
    out: Tensor,
    gradient: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    num_active: int,
    want_x: bool,
    want_parameters: bool,
) -> list[Tensor | None]:
    """Gradients of x and of the parameters from that of the output (S, B, out), as new tensors."""
    into_x = torch.empty_like(x) if want_x else None
    into = [torch.empty_like(p) if want_parameters else None for p in parameters]
    found = _networks([p for p in into if p is not None]) or [()] * x.shape[0]
    for i, network in enumerate(_networks(parameters)):
        for_x = None if into_x is None else into_x[i]
        _backward(buffers, i, x[i], network, num_active, out[i], gradient[i], found[i], for_x)
    return [into_x, *into]


def _backward(
    buffers: _Buffers,
    place: int,
    x: Tensor,
    network: tuple[Tensor, ...],
    num_active: int,
    out: Tensor,
    gradient: Tensor,
    into: tuple[Tensor, ...],
    into_x: Tensor | None,
) -> None:
    """One network's gradients of its parameters (none where `into` is empty) and of x (where wanted)."""
    hidden, rounded, last = buffers.hidden[place], buffers.rounded[place], len(network) // 2 - 1
    g = gradient if last >= num_active else _relu_backward(gradient, out, 0, grad_input=torch.empty_like(out))
    for n in range(last, -1, -1):
        if n < min(last, num_active):
            _relu_backward(g, hidden[n], 0, grad_input=g)
        pair = rounded[n] if n < last else None
        low = None if pair is None else buffers.product[n].copy_(g)
        if into:
            if pair is not None:
                into[2 * n].copy_(torch.mm(pair[0].t(), low, out=buffers.weight[n]))  # type: ignore[arg-type]
            elif 1 < g.shape[1] < NARROW:
                into[2 * n].copy_(torch.mm(g.t(), hidden[n - 1] if n else x).t())
            else:
                torch.mm((hidden[n - 1] if n else x).t(), g, out=into[2 * n])
            torch.sum(g, 0, keepdim=True, out=into[2 * n + 1])
        if n or into_x is not None:
            before = buffers.gradient[n - 1] if n else into_x
            assert before is not None
            if pair is not None:
                before.copy_(torch.mm(low, pair[1].t()))  # type: ignore[arg-type]
            else:
                torch.mm(g, network[2 * n].t(), out=before)
            g = before
