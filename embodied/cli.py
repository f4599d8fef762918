"""`embodied VERB ...`: find the verb, fill its dataclass, run it, print its result.

Verbs are imported only when called, so that help and errors come at once. Errors a user can mend are one to three lines
on standard error and exit code 2; a traceback is a bug.
"""

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from embodied import __version__, claim
from embodied.contracts.errors import EmbodiedError, InputError, suggest
from embodied.verbs import VERBS, LoadedVerb, find_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr is None:  # closed by the caller; Python would print what is meant for it among the results
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        code = _dispatch(words)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a reader that has gone shows here, not at exit
        return code
    except EmbodiedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough
        _discard_output()
        return 141  # what a shell reports of a program that SIGPIPE ended
    except OSError as error:
        if error.errno is None:
            raise
        _discard_output()
        # The system refuses a path; rooms that know more have said it in an error of ours.
        print(f"error: {error.filename or 'reading or writing'}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where this one stopped.", file=sys.stderr)
        return 130


def _discard_output() -> None:
    """What is still buffered for standard output goes nowhere, so that Python's own flush at exit does not fail."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # where in the code is no news to users
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"embodied {__version__}")
        return 0
    name, rest = _split_verb(words)
    if name not in VERBS:
        group = [verb for verb in VERBS if verb.startswith(words[0] + " ")]
        if group and name == words[0]:
            print(overview(words[0]))
            return 0 if rest else 2
        raise InputError(f"There is no verb '{name}'.{suggest(name, group or VERBS)}")
    as_json = "--json" in rest
    rest = [word for word in rest if word != "--json"]
    loaded = find_verb(name).load()
    config = _parse(name, loaded, rest)
    with claim.claimed(loaded.touches(config)):
        result = loaded.run(config, _progress())
    print(json.dumps(_strict(result), indent=1, allow_nan=False) if as_json else _text(loaded, result))
    return loaded.exit_code(result) if loaded.exit_code else 0


def _split_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb's two words or one, and what follows them; `pretrain clip` is a verb, and so is `pretrain`."""
    two = " ".join(words[:2])
    if two in VERBS:
        return two, words[2:]
    groups = {verb.split()[0] for verb in VERBS if " " in verb}
    if words[0] not in VERBS and words[0] in groups and len(words) > 1 and not words[1].startswith("-"):
        return two, words[2:]
    return words[0], words[1:]


def overview(group: str = "") -> str:
    """The list of verbs, or of those that start with `group`."""
    verbs = {name: verb for name, verb in VERBS.items() if not group or name.startswith(group + " ")}
    lines = [f"usage: embodied {group or 'VERB'} ... [--json]", ""]
    if not group:
        lines = [
            f"embodied {__version__}: from robot recordings without rewards to a policy that runs on the robot.",
            "",
            *lines,
        ]
    width = max(map(len, VERBS)) + 2
    lines += [f"  {name:{width}s}{verb.summary}" for name, verb in verbs.items()]
    lines += ["", "'embodied VERB --help' says more; --json prints the result for a machine; --version."]
    return "\n".join(lines)


def _progress() -> Any:
    from embodied.progress import Progress

    return Progress()


def _parse(name: str, loaded: LoadedVerb, words: list[str]) -> Any:
    """Fill the verb's dataclass from the command line; its errors are brought into our one form."""
    import io

    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                loaded.config_type,
                prog=f"embodied {name}",
                args=words,
                config=(
                    tyro.conf.FlagCreatePairsOff,
                    tyro.conf.HelptextFromCommentsOff,
                    tyro.conf.PositionalMetavarFromFieldName,
                ),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_plain(captured.getvalue(), name, loaded, words)) from None


def _plain(boxed: str, name: str, loaded: LoadedVerb, words: list[str]) -> str:
    """tyro's framed message as one to three plain lines."""
    import dataclasses

    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(loaded.config_type)} | {
        "--json",
        "--help",
    }
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            return f"embodied {name} has no option '{flag}'.{suggest(flag, known)}"
    lines = [line.strip("│ ╭╰╮╯─").strip() for line in boxed.splitlines()]
    lines = [line for line in lines if line]
    # Line 0 is the box's title; below it stands the message, then help texts.
    message: list[str] = []
    for line in lines[1:]:
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        message.append(line)
    text = " ".join(message[:4]) or (lines[0] if lines else "the arguments cannot be read.")
    return f"{text}\nSee 'embodied {name} --help'."


def _strict(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(loaded: LoadedVerb, result: dict[str, Any]) -> str:
    if loaded.as_text is not None:
        return loaded.as_text(result)
    from embodied.config import plain_lines

    return "\n".join(plain_lines(result))


if __name__ == "__main__":
    sys.exit(main())
