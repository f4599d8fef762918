"""Before a verb starts: its outputs are no inputs, and no other command is at work on them."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from embodied.contracts.errors import ConfigError, InputError
from embodied.verbs import Touches


def check(touches: Touches) -> None:
    """Raise InputError where an output is an input, or a training folder lies in a store."""
    reads = {path.resolve() for path in touches.reads}
    for path in touches.writes:
        if path.resolve() in reads:
            raise InputError(f"{path} would be read and written by the same command.\nName another output.")
        for folder in (path, *path.parents) if touches.resumable else ():
            if (folder / "zarr.json").is_file():
                raise InputError(f"{path} lies in the store {folder}, which is never written to.\nName another output.")


@contextlib.contextmanager
def claimed(touches: Touches) -> Iterator[None]:
    """Check, and hold the outputs: two commands at once would write over each other. A killed one lets go of them.

    The locks lie in the temporary folder, since an output that is not there yet cannot hold one.
    """
    check(touches)
    if int(os.environ.get("RANK", "0")) > 0:  # a helper of a torchrun, whose first process holds them
        yield
        return
    folder = Path(tempfile.gettempdir()) / f"embodied-{os.getuid()}"
    with contextlib.ExitStack() as held:
        for path in touches.writes:
            folder.mkdir(mode=0o700, exist_ok=True)
            name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
            file = held.enter_context(open(folder / name, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{path}: another command is writing there. Wait for it, or name another output."
                ) from None
        yield
