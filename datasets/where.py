"""`--where` of `data filter`: a condition on an episode's columns. Parsed, never evaluated as Python."""

import ast
import io
import operator
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.datasets.store import EpisodeStore

LONGEST = 2_000  # characters
CONSTANTS: dict[str, Any] = {"true": True, "false": False, "unknown": None, "True": True, "False": False, "None": None}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
OVER_LABEL: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda score: float(score.mean()),
    "min": lambda score: float(score.min()),
    "max": lambda score: float(score.max()),
    "first": lambda score: float(score[0]),
    "last": lambda score: float(score[-1]),
}
COLUMNS = (
    "episode",
    "success",
    "length",
    "steps",
    "duration",
    "instruction",
    "source_id",
    "terminated",
    "truncated",
    "return",
)


def where(store: EpisodeStore, text: str) -> list[int]:
    """The episodes for which a condition holds, such as `success == true and length >= 20`.

    Columns: COLUMNS; `mean("clip")`, min, max, first, last of a label set; `has_camera("wrist")`. An unknown success
    is `unknown`. Operators: and, or, not, comparisons, in, + - * / %, parentheses, numbers and quoted text.

    Raises:
        InputError: it cannot be read, names a column or label set that is not there, or compares text with numbers.
    """
    tree = _parse(text)
    columns = _Columns(store)
    kept = []
    for episode in range(store.num_episodes):
        try:
            holds = _value(tree, columns, episode)
        except (TypeError, ZeroDivisionError) as error:
            raise InputError(f"--where: episode {episode}: {error} in '{text}'.") from None
        if not isinstance(holds, bool | np.bool_):
            raise InputError(f"--where: '{text}' is {holds!r} for episode {episode}; it must be true or false.")
        if holds:
            kept.append(episode)
    return kept


def _parse(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise InputError(f"--where: {len(text)} characters; at most {LONGEST}.")
    try:
        # `return` is the field's word for the sum of rewards and Python's for something else.
        tokens = [
            (token.type, "return_" if (token.type, token.string) == (tokenize.NAME, "return") else token.string)
            for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)
        ]
        return ast.parse(tokenize.untokenize(tokens).strip(), mode="eval").body
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
        raise InputError(f"--where: '{text}' cannot be read.\nFor example: success == true and length >= 20") from None


def _value(node: ast.expr, columns: "_Columns", episode: int) -> Any:
    """The value of one node; only what is listed here exists."""
    if isinstance(node, ast.BoolOp):
        values = (bool(_value(item, columns, episode)) for item in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, columns, episode)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(_value(node.operand, columns, episode))
    if isinstance(node, ast.Compare):
        left, holds = _value(node.left, columns, episode), True
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if type(op) not in COMPARE:
                raise InputError("--where: 'is' is not known here; use ==.")
            right = _value(right_node, columns, episode)
            holds, left = holds and bool(COMPARE[type(op)](left, right)), right
        return holds
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _value(node.left, columns, episode), _value(node.right, columns, episode)
        return ARITHMETIC[type(node.op)](_number(left), _number(right))
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, columns, episode) for item in node.elts]
    if isinstance(node, ast.Name):
        return columns.named(node.id, episode)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return columns.called(node.func.id, argument.value, episode)
    raise InputError(f"--where: '{ast.unparse(node)}' is not known here. Columns: {', '.join(COLUMNS)}.")


def _number(value: Any) -> Any:
    if isinstance(value, str | list) or value is None:
        raise TypeError(f"{value!r} is no number")
    return value


class _Columns:
    """Columns of episodes, read when first asked for."""

    def __init__(self, store: EpisodeStore) -> None:
        self._store = store
        self._read: dict[str, Any] = {}

    def named(self, name: str, episode: int) -> Any:
        if name in CONSTANTS:
            return CONSTANTS[name]
        name = name.removesuffix("_") if name == "return_" else name
        if name not in COLUMNS:
            functions = [f'{function}("LABEL")' for function in OVER_LABEL]
            raise InputError(f"--where: there is no column '{name}'.{suggest(name, [*COLUMNS, *functions])}")
        if name == "episode":
            return episode
        if name not in self._read:
            self._read[name] = self._column(name)
        return self._read[name][episode]

    def called(self, function: str, argument: str, episode: int) -> Any:
        key = f"{function}({argument})"
        if key not in self._read:
            if function == "has_camera":
                self._read[key] = self._store.has_camera(argument).tolist()
            elif function in OVER_LABEL:
                score = self._store.label(argument).score
                self._read[key] = [OVER_LABEL[function](part) for part in self._parts(score)]
            else:
                raise InputError(
                    f"--where: there is no function '{function}'.{suggest(function, [*OVER_LABEL, 'has_camera'])}"
                )
        return self._read[key][episode]

    def _column(self, name: str) -> list[Any]:
        store = self._store
        if name == "return":
            if not store.spec.has_reward:
                raise InputError(f"{store.path} has no reward of its own, so no return.")
            paid: Mapping[str, np.ndarray] = {"reward": store.read("reward"), "valid": store.read("step_valid")}
            return [float(part.sum()) for part in self._parts(paid["reward"] * paid["valid"])]
        columns: dict[str, Callable[[], list[Any]]] = {
            "success": lambda: [{1: True, 0: False}.get(int(value)) for value in store.success],
            "length": lambda: store.episode_length.tolist(),
            "steps": lambda: [int(part.sum()) for part in self._parts(store.read("step_valid"))],
            "duration": lambda: [float(part[-1]) for part in self._parts(store.read("timestamp"))],
            "instruction": lambda: store.instructions,
            "source_id": lambda: store.source_ids,
            "terminated": lambda: [bool(part.any()) for part in self._parts(store.read("terminated"))],
            "truncated": lambda: [bool(part.any()) for part in self._parts(store.read("truncated"))],
        }
        return columns[name]()

    def _parts(self, array: np.ndarray) -> list[np.ndarray]:
        return np.split(array, self._store.episode_start[1:])
