"""What a reader hands to the importer: a spec, and episodes by number, each read only when asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embodied.contracts.errors import ConfigError, suggest
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding


@dataclasses.dataclass(frozen=True)
class Source:
    """A recording, opened.

    Attributes:
        spec: what its frames hold.
        num_episodes: episodes that `load` gives.
        load: index -> Episode. One at a time bounds the memory, and a resumed import skips what it has. Raises
            InputError for an episode that cannot be used: the importer leaves it out and says so.
        attributes: what the store should remember: environment arguments, filter keys, what was left out and why.
        findings: where files and metadata disagree, and other things a user should know. Files are the truth.
    """

    spec: DatasetSpec
    num_episodes: int
    load: Callable[[int], Episode]
    attributes: dict[str, Any]
    findings: tuple[Finding, ...] = ()


def check_options(format: str, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raise ConfigError naming the first option that a reader does not take."""
    for key in options:
        if key not in known:
            takes = suggest(key, known) if known else " It takes none."
            raise ConfigError(f"{format} has no option '{key}'.{takes}")
