"""A node's parameters: the six services by which `ros2 param` and other nodes list, read and set them.

All six or none: the command line waits for every one of them.
"""

import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError
from embodied.robot_bridge import messages

OnSet = Callable[[str, Any], str]  # (name, value) -> "" accepts, text refuses

SERVICES = (
    "describe_parameters",
    "get_parameters",
    "get_parameter_types",
    "list_parameters",
    "set_parameters",
    "set_parameters_atomically",
)

# rcl_interfaces/ParameterType, and the field of a ParameterValue that holds it.
_SCALARS: dict[type, tuple[int, str]] = {
    bool: (1, "bool_value"),
    int: (2, "integer_value"),
    float: (3, "double_value"),
    str: (4, "string_value"),
}
_ARRAYS: dict[type, tuple[int, str, Any]] = {
    bool: (6, "bool_array_value", np.bool_),
    int: (7, "integer_array_value", np.int64),
    float: (8, "double_array_value", np.float64),
    str: (9, "string_array_value", None),
}
_FIELDS = {number: name for number, name in _SCALARS.values()} | {n: name for n, name, _ in _ARRAYS.values()}
_NAMES = {0: "not set", 1: "bool", 2: "integer", 3: "double", 4: "string", 5: "byte array"}
_NAMES |= {n + 5: f"{_NAMES[n]} array" for n in (1, 2, 3, 4)}


def type_number(value: Any) -> int:
    """rcl_interfaces/ParameterType of a value; ConfigError if it is none. An empty list counts as strings."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        kinds = {type(item) for item in value} or {str}
        if len(kinds) == 1 and (kind := kinds.pop()) in _ARRAYS:
            return _ARRAYS[kind][0]
    elif type(value) in _SCALARS:
        return _SCALARS[type(value)][0]
    raise ConfigError(f"a parameter is bool, int, float, str or a list of one of them, not {value!r}.")


def to_message(value: Any) -> Any:
    """rcl_interfaces/ParameterValue; None makes one that is not set."""
    empty = [np.zeros(0, np.uint8), *(np.zeros(0, kind) for kind in (np.bool_, np.int64, np.float64)), []]
    message = messages.new("rcl_interfaces/msg/ParameterValue", 0, False, 0, 0.0, "", *empty)
    if value is None:
        return message
    message.type = type_number(value)
    if message.type >= 6:
        kind = next(kind for number, _, kind in _ARRAYS.values() if number == message.type)
        value = list(value) if kind is None else np.array(value, kind)
    setattr(message, _FIELDS[message.type], value)
    return message


def from_message(message: Any) -> Any:
    """The value in a ParameterValue; None if it is not set or a byte array, which no parameter of ours is."""
    if message.type not in _FIELDS:
        return None
    value = getattr(message, _FIELDS[message.type])
    if message.type == 9:
        return list(value)
    return value.tolist() if message.type >= 6 else value


class _Server:
    def __init__(self, values: Mapping[str, Any], on_set: OnSet | None) -> None:
        for value in values.values():
            type_number(value)
        self.values, self._on_set, self._lock = dict(values), on_set, threading.RLock()

    def describe_parameters(self, request: Any) -> list[Any]:
        found = []
        for name in request.names:
            value = self.values.get(name)
            number = 0 if value is None else type_number(value)
            rest = ("", "", self._on_set is None, False, [], [])  # no text, typed, no range
            found.append(messages.new("rcl_interfaces/msg/ParameterDescriptor", name, number, *rest))
        return [found]

    def get_parameters(self, request: Any) -> list[Any]:
        return [[to_message(self.values.get(name)) for name in request.names]]

    def get_parameter_types(self, request: Any) -> list[Any]:
        known = [self.values.get(name) for name in request.names]
        return [np.array([0 if value is None else type_number(value) for value in known], np.uint8)]

    def list_parameters(self, request: Any) -> list[Any]:
        names, prefixes = [], set()
        for name in sorted(self.values):
            inside = [p for p in request.prefixes if name == p or name.startswith(f"{p}.")]
            if request.prefixes and not inside:
                continue
            below = min(name[len(p) :].count(".") for p in inside) if inside else name.count(".") + 1
            if request.depth == 0 or below <= request.depth:
                names.append(name)
                if "." in name:
                    prefixes.add(name.rsplit(".", 1)[0])
        return [messages.new("rcl_interfaces/msg/ListParametersResult", names, sorted(prefixes))]

    def set_parameters(self, request: Any) -> list[Any]:
        return [[_result(self._set([parameter])) for parameter in request.parameters]]

    def set_parameters_atomically(self, request: Any) -> list[Any]:
        return [_result(self._set(request.parameters))]

    def _set(self, wanted: Sequence[Any]) -> str:
        """All or none; returns why not."""
        with self._lock:
            changes = {parameter.name: from_message(parameter.value) for parameter in wanted}
            refusals = [self._refusal(name, value) for name, value in changes.items()]
            reason = next(filter(None, refusals), "")
            if not reason:
                self.values.update(changes)
            return reason

    def _refusal(self, name: str, value: Any) -> str:
        if name not in self.values:
            return f"the node has no parameter '{name}'"
        if self._on_set is None:
            return f"'{name}' cannot be changed while the node runs"
        have, given = type_number(self.values[name]), 0 if value is None else type_number(value)
        if have != given and not (have >= 6 and value == []):
            return f"'{name}' is of type {_NAMES[have]}, not {_NAMES[given]}"
        return self._on_set(name, value)


def _result(reason: str) -> Any:
    return messages.new("rcl_interfaces/msg/SetParametersResult", not reason, reason)


def _type(service: str) -> str:
    return "rcl_interfaces/srv/" + "".join(word.capitalize() for word in service.split("_"))


def serve(transport: Any, values: Mapping[str, Any], on_set: OnSet | None = None) -> Mapping[str, Any]:
    """Serve `values` as the parameters of a transport's node; see `Transport.parameters`."""
    server = _Server(values, on_set)

    def handler(name: str) -> Callable[[bytes], bytes]:
        service_type, answer = _type(name), getattr(server, name)

        def handle(data: bytes) -> bytes:
            fields = answer(messages.decode(data, f"{service_type}_Request"))
            return messages.encode(messages.new(f"{service_type}_Response", *fields))

        return handle

    for name in SERVICES:
        transport.service(f"~/{name}", _type(name), handler(name))
    return types.MappingProxyType(server.values)


def get_remote(transport: Any, node: str, names: Sequence[str], timeout_s: float) -> list[Any]:
    """Another node's parameters, None where it has none. `node`: its full name. Raises TransportError."""
    service_type = _type("get_parameters")
    request = messages.encode(messages.new(f"{service_type}_Request", list(names)))
    answer = transport.call(f"{node}/get_parameters", service_type, request, timeout_s)
    return [from_message(value) for value in messages.decode(answer, f"{service_type}_Response").values]


def set_remote(transport: Any, node: str, values: Mapping[str, Any], timeout_s: float) -> dict[str, str]:
    """Set another node's parameters, each by itself: name -> why it was refused, empty if it was not."""
    service_type = _type("set_parameters")
    wanted = [messages.new("rcl_interfaces/msg/Parameter", name, to_message(value)) for name, value in values.items()]
    request = messages.encode(messages.new(f"{service_type}_Request", wanted))
    answer = messages.decode(
        transport.call(f"{node}/set_parameters", service_type, request, timeout_s), f"{service_type}_Response"
    )
    return {
        name: "" if result.successful else result.reason or "refused"
        for name, result in zip(values, answer.results, strict=True)
    }
