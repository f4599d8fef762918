"""One thing that is wrong, or odd, with a recording or a store: what it is, where, and what to do."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a reader met, what the importer left out, or what `data doctor` found.

    Attributes:
        check: short name of the check, for filters: `frame-count`, `missing-media`, `two-clocks`, ...
        severity: `error` (learning from this goes wrong, or data is gone), `warning` (it may), `note` (good to know).
        message: what is the case, with names and numbers.
        advice: what to do about it; empty where nothing needs doing.
        episode: episode number in the store, or in the source for what was not imported; None: the whole dataset.
    """

    check: str
    severity: str
    message: str
    advice: str = ""
    episode: int | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity '{self.severity}' is none of {', '.join(SEVERITIES)}")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Finding":
        return cls(**data)

    def as_text(self) -> str:
        """One line for a person, without the advice."""
        where = "" if self.episode is None else f"episode {self.episode}: "
        return f"{self.severity}: {where}{self.message} [{self.check}]"
