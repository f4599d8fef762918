"""joint_limits.yaml in the three forms that arms come with: MoveIt's, Universal Robots' and Franka's."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import ConfigError


def read_joint_limits(path: Path) -> dict[str, dict[str, Any]]:
    """Joint -> any of position (low, high) [rad, m], velocity, acceleration, jerk.

    MoveIt: joint_limits: {joint: {has_velocity_limits: true, max_velocity: ...}}, also min_position, max_position,
    max_acceleration, max_jerk; a quantity whose has_ flag is false is not stated. Universal Robots and UFACTORY: the
    same with angles as `!degrees 180`. Franka: {joint: {limit: {lower, upper, velocity}}}.

    Raises:
        ConfigError: the file is absent, not YAML of these forms, or a number is malformed.
    """
    data = load_yaml(path)
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(f"{path} holds no joint limits.")
    table = data.get("joint_limits", data)
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: 'joint_limits' must map joints to limits.")
    limits = {}
    for joint, entry in table.items():
        if isinstance(entry, Mapping):
            limits[str(joint)] = _entry(entry, f"{path}: joint '{joint}'")
    if not any(limits.values()):
        raise ConfigError(f"{path} states no limit in a form of MoveIt, Universal Robots or Franka.")
    return limits


def load_yaml(path: Path) -> Any:
    """YAML by the safe loader, which here also knows `!degrees` and `!radians`.

    Raises:
        ConfigError: it is absent or not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A class of our own, so that the tags do not reach other users of the safe loader."""

    def angle(loader: Any, node: yaml.Node, factor: float) -> float:
        text = loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None
        try:
            return float(str(text)) * factor
        except ValueError:
            raise yaml.YAMLError(f"{node.tag} {text!r} is no number") from None

    Loader.add_constructor("!degrees", lambda loader, node: angle(loader, node, math.pi / 180.0))
    Loader.add_constructor("!radians", lambda loader, node: angle(loader, node, 1.0))
    if not path.is_file():
        raise ConfigError(f"{path} is no file.")
    try:
        return yaml.load(path.read_text(), Loader)  # a SafeLoader
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {(str(error).splitlines() or [''])[0]}.") from None


def _entry(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    nested = entry.get("limit")
    if isinstance(nested, Mapping):  # Franka
        if "lower" in nested and "upper" in nested:
            limits["position"] = (_number(nested["lower"], where), _number(nested["upper"], where))
        if "velocity" in nested:
            limits["velocity"] = _number(nested["velocity"], where)
        return limits
    low, high = entry.get("min_position"), entry.get("max_position")
    if entry.get("has_position_limits", low is not None) and low is not None and high is not None:
        limits["position"] = (_number(low, where), _number(high, where))
    for quantity in ("velocity", "acceleration", "jerk"):
        value = entry.get(f"max_{quantity}")
        if value is not None and entry.get(f"has_{quantity}_limits", True):
            limits[quantity] = _number(value, where)
    return limits


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ConfigError(f"{where} has the limit {value!r}; a finite number is needed.")
    return float(value)
