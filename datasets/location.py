"""Where a store or a recording is: a local path, or an fsspec URL such as `s3://bucket/store`.

Credentials and endpoints are fsspec's own business: FSSPEC_S3_KEY, AWS_ENDPOINT_URL, ~/.config/fsspec and so on.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from embodied.contracts.errors import EmbodiedError, StoreError

# Another process, or another instance in this one, may have written since.
STORAGE_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
CLAIM = ".upload.json"  # beside what is being uploaded, until it is whole
BATCH = 16  # files that are sent together


def location(path: str | Path) -> str:
    """`path` as text, a URL with its two slashes: pathlib turns `s3://bucket/x` into `s3:/bucket/x`."""
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/+", r"\1://", str(path))
    return re.sub(r"^(file|local)://", "/", text)


def is_remote(path: str | Path) -> bool:
    """Whether `path` is an fsspec URL; everything else, `file://` included, is a local path."""
    return "://" in location(path)


def zarr_path(path: str | Path) -> str:
    """What Zarr is given. Of a relative folder `s` its LocalStore strips `s/` anywhere in a key: `successzarr.json`."""
    return location(path) if is_remote(path) else str(Path(location(path)).absolute())


def cache_folder() -> Path:
    """Where work on remote stores waits: EMBODIED_CACHE, or `embodied` in the user's cache folder."""
    if folder := os.environ.get("EMBODIED_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embodied"


def local_place(url: str) -> Path:
    """The path under the cache folder that stands for `url`: the same in every run."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", url.rstrip("/").rpartition("/")[2])
    return cache_folder() / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises StoreError."""
    import fsspec.core

    with remote_errors(url):
        return fsspec.core.url_to_fs(url.rstrip("/"), **STORAGE_OPTIONS)


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn what a file system raises into a StoreError: each has exceptions of its own."""
    try:
        yield
    except EmbodiedError:
        raise
    except Exception as error:
        raise StoreError(reason(url, error)) from error


def reason(url: str, error: Exception) -> str:
    """Why a URL could not be used, and what to do, in a line or two."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return f"{url} cannot be opened: {words}.\nFor S3: pip install 'embodied-rl[s3]'"
    if isinstance(error, PermissionError) or "credentials" in words.lower():
        return f"No permission for {url}: {words}.\nSet the credentials that fsspec reads, such as AWS_ACCESS_KEY_ID."
    if isinstance(error, FileNotFoundError):
        return f"{url} is not there: {words}."
    if isinstance(error, (ConnectionError, TimeoutError)) or "connect" in words.lower():
        return f"{url} cannot be reached: {words}.\nCheck the network and the endpoint, for S3 AWS_ENDPOINT_URL."
    return f"{url} cannot be used: {words}."


class Upload:
    """Sends a finished folder to a URL so that it is absent or whole: its root `zarr.json` goes last.

    A claim object names the job, and once files are on their way the hash of what is sent: an upload that was killed
    goes on where it stopped, and what another content left behind is removed first.

    Args:
        url: where the folder shall be.
        job: hash of what decides its content.
        what: names it in messages, for example `store`.
    """

    def __init__(self, url: str, job: str, what: str) -> None:
        self.url, self._job, self._what = url, job, what

    def attributes(self) -> dict[str, Any] | None:
        """The Zarr attributes of what stands there whole; None while nothing does. Raises StoreError."""
        filesystem_, path = filesystem(self.url)
        with remote_errors(self.url):
            if self._claimed(filesystem_, path) is not None or not filesystem_.exists(f"{path}/zarr.json"):
                return None
            try:
                return dict(json.loads(filesystem_.cat_file(f"{path}/zarr.json")).get("attributes", {}))
            except ValueError:
                return {}

    def claim(self) -> None:
        """Make the place this job's before any work is done. Raises StoreError: not writable, or not free."""
        filesystem_, path = filesystem(self.url)
        with remote_errors(self.url):
            found = self._claimed(filesystem_, path)
            if found is None and _sizes(filesystem_, path):
                raise StoreError(f"{self.url} exists already.\nNothing is ever overwritten: delete it or name another.")
            if found is not None and found["job"] != self._job and found["digest"]:
                raise StoreError(
                    f"{self.url} holds an unfinished {self._what} of another configuration.\n"
                    "Run that command again to finish it, or delete it."
                )
            if found is None or found["job"] != self._job:
                self._write_claim(filesystem_, path, "")

    def send(self, folder: Path) -> None:
        """Send every file of `folder` that is not there yet, `zarr.json` last. Raises StoreError."""
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        files.remove("zarr.json")
        digest = _digest(folder, files)
        filesystem_, path = filesystem(self.url)
        with remote_errors(self.url):
            found = self._claimed(filesystem_, path)
            there = {name[len(path) :].lstrip("/"): size for name, size in _sizes(filesystem_, path).items()}
            if found is None or found["digest"] != digest:
                if left := [f"{path}/{name}" for name in there if name != CLAIM]:
                    filesystem_.rm(left)
                there = {}
                self._write_claim(filesystem_, path, digest)
            missing = [name for name in files if there.get(name) != (folder / name).stat().st_size]
            for start in range(0, len(missing), BATCH):
                names = missing[start : start + BATCH]
                filesystem_.put([str(folder / name) for name in names], [f"{path}/{name}" for name in names])
            filesystem_.pipe_file(f"{path}/zarr.json", (folder / "zarr.json").read_bytes())
            filesystem_.rm_file(f"{path}/{CLAIM}")

    def give_up(self) -> None:
        """Remove the claim, and what was sent of an unfinished folder."""
        filesystem_, path = filesystem(self.url)
        with remote_errors(self.url):
            if self._claimed(filesystem_, path) is not None:
                filesystem_.rm(path, recursive=True)

    def _claimed(self, filesystem_: Any, path: str) -> dict[str, str] | None:
        try:
            found = json.loads(filesystem_.cat_file(f"{path}/{CLAIM}"))
            return {"job": str(found["job"]), "digest": str(found["digest"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.url}/{CLAIM} is damaged.\nDelete {self.url} and run the command again.") from error

    def _write_claim(self, filesystem_: Any, path: str, digest: str) -> None:
        filesystem_.pipe_file(f"{path}/{CLAIM}", json.dumps({"job": self._job, "digest": digest}).encode())


@contextlib.contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local path with the content of `path`: itself, or for a URL a copy in the cache folder that is removed after.

    Raises:
        StoreError: nothing is there, it cannot be reached, or the disk is full.
    """
    url = location(path)
    if not is_remote(url):
        yield Path(url)
        return
    filesystem_, source = filesystem(url)
    name = PurePosixPath(source.rstrip("/")).name or "source"
    with contextlib.ExitStack() as stack:
        with remote_errors(url):
            cache_folder().mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="source-", dir=cache_folder()))
            copy = Path(folder) / name
            found = filesystem_.find(source)
            if not found:
                raise StoreError(f"{url} does not exist.")
            for file in found:
                inside = PurePosixPath(file[len(source) :].lstrip("/"))
                if ".." in inside.parts:
                    raise StoreError(f"{url}: '{inside}' leads outside it. Remove that file.")
                target = copy / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                filesystem_.get_file(file, str(target))
        yield copy


def _sizes(filesystem_: Any, path: str) -> dict[str, int]:
    try:
        return {name: int(info["size"]) for name, info in filesystem_.find(path, detail=True).items()}
    except FileNotFoundError:
        return {}


def _digest(folder: Path, files: list[str]) -> str:
    """SHA-256 over the names and contents of `files`."""
    digest = hashlib.sha256()
    for name in files:
        with open(folder / name, "rb") as stream:
            digest.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
