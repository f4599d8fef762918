"""Work in progress on disk: parts wait in a folder of one job, then the result appears whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import EmbodiedError


class Staging:
    """The staging folder of one job.

    Args:
        folder: holds `config.json`, which names the job, and one .npz file per finished part.
        job: hash of what decides the result; another job's folder is refused.
        what: names the result in messages, for example `store`.
        error: what to raise, StoreError or LabelError.
    """

    def __init__(self, folder: Path, job: str, what: str, error: type[EmbodiedError]) -> None:
        self.folder, self._job, self._what, self._error = folder, job, what, error

    def belongs(self) -> bool:
        """Whether the folder on disk is this job's."""
        try:
            return json.loads((self.folder / "config.json").read_text())["hash"] == self._job
        except (OSError, ValueError, KeyError):
            return False

    def claim(self, more: Mapping[str, Any], replace_if_without: str | None = None) -> None:
        """Make the folder this job's, or refuse.

        Args:
            more: written into config.json beside the hash.
            replace_if_without: pattern of parts; another job's folder without any is taken over: nothing is lost.
        """
        claim = self.folder / "config.json"
        temporary = self.folder / f"config.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if replace_if_without is None:
                free = not claim.exists()
            else:
                free = not self.belongs() and not any(self.folder.glob(replace_if_without))
            if free:
                temporary.write_text(json.dumps({"hash": self._job, **more}, indent=1))
                os.replace(temporary, claim)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._error(disk_message(error, claim)) from error
        if not self.belongs():
            raise self._error(
                f"{self.folder} holds an unfinished {self._what} of another configuration.\n"
                f"Run that command again to finish it, or delete it: rm -r {self.folder}"
            )

    def write(self, file: Path, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one part whole: temporary name, then rename."""
        temporary = file.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._error(disk_message(error, temporary)) from error

    def write_folder(self, folder: Path, fill: Callable[[Path], None]) -> None:
        """Write one folder of a part whole: `fill` a temporary one, then rename. What stood there is replaced."""
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            fill(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
        except OSError as error:
            raise self._error(disk_message(error, temporary)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def publish(self, join: Callable[[Path], None], destination: Path) -> None:
        """`join` the parts into a folder and rename it to `destination`.

        A join that was killed is started anew: it is a small part of the work and must end byte-identical.
        """
        joined = self.folder / self._what.replace(" ", "_")
        try:
            shutil.rmtree(joined, ignore_errors=True)
            join(joined)
            os.rename(joined, destination)
        except OSError as error:
            shutil.rmtree(joined, ignore_errors=True)
            raise self._error(disk_message(error, joined)) from error

    def remove(self) -> None:
        """Remove the folder, its claim last: what a kill leaves is still this job's, and removed by the next run."""
        for part in sorted(self.folder.iterdir()):
            if part.is_dir():
                shutil.rmtree(part)
            elif part.name != "config.json":
                part.unlink()
        shutil.rmtree(self.folder)


def disk_message(error: OSError, path: Path) -> str:
    """One or two lines for a write that failed: what, where, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"No space left while writing {path}.\nFree some and run the same command: it resumes where it stopped."
    return f"Cannot write {path}: {error.strerror or error}."
