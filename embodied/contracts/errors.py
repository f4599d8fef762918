"""What goes wrong, said so that the reader knows what to do next.

The command line prints the message of an `EmbodiedError` (one to three lines) and exits with `exit_code`;
any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class EmbodiedError(Exception):
    """Base of every error a user can cause or mend. The message names the file or flag and the next step."""

    exit_code = 2


class InputError(EmbodiedError):
    """A source, a store or a flag that cannot be used as given."""


class ConfigError(EmbodiedError):
    """A configuration with an unknown key, a wrong type or values that contradict each other."""


class StoreError(EmbodiedError):
    """An EpisodeStore that is absent, incomplete or inconsistent."""


class LabelError(EmbodiedError):
    """A label set that is absent, already there, or without provenance."""


class BundleError(EmbodiedError):
    """A policy or value bundle that is altered, incomplete or does not fit what it is asked to drive."""


class TransportError(EmbodiedError):
    """A topic or service of the robot's graph that does not match, answer or accept."""


class SafetyError(EmbodiedError):
    """A refusal to move a robot."""


class TrainingError(EmbodiedError):
    """Training that cannot go on, with the step and the reason."""


class MissingExtraError(EmbodiedError):
    """An optional package is not installed; extra: the extra of ours that has it, None where none does."""

    def __init__(self, package: str, extra: str | None, needed_for: str) -> None:
        install = package if extra is None else f"'embodied-rl[{extra}]'"
        super().__init__(f"{needed_for} needs the package '{package}'.\nInstall it: pip install {install}")


def suggest(name: str, valid: Iterable[str]) -> str:
    """The tail of an unknown-name message: the closest valid name and the list of them all."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Valid: {', '.join(valid) if valid else '(none)'}."
