"""Batches made ahead of the step that takes them, in a background thread; to a GPU through pinned memory."""

import threading
import weakref
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """`prefetcher(step)` is `load(step)`, begun while the steps before it were in use.

    Steps are asked for one after another. The first one asked for, and any that is not the next, starts over there, so
    what comes back is always what `load` gives. An exception in `load` is raised by the call for its step, with its
    traceback. The thread ends with the last step, at `close`, at the end of a `with` block, and when the
    prefetcher is no longer referred to.

    Args:
        load: makes the batch of a step, a function of the step alone. It runs in the background thread only.
        stop: the number of steps; 0 to `stop` - 1 can be asked for.
        depth: how many batches are ready or being made, beside the one last handed out: the bound on memory.
        device: where torch tensors in a batch (a mapping) are to go. For a CUDA device they are copied to pinned memory
            in the background and from there without waiting for the copy. None leaves batches as they are.
    """

    def __init__(self, load: Callable[[int], T], stop: int, depth: int = 2, device: str | None = None) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1; found {depth}.")
        self._load, self._stop, self._depth, self._device = load, stop, depth, device
        self._next: int | None = None  # the step whose batch comes next out of the queue; None without a thread
        self._ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._free = threading.Semaphore(0)
        self._end: Callable[[], object] = lambda: None

    def __call__(self, step: int) -> T:
        if not 0 <= step < self._stop:
            raise ValueError(f"There are steps 0 to {self._stop - 1}; asked for {step}.")
        if step != self._next:
            self._start(step)
        batch, error = self._ready.get()
        self._free.release()
        if error is not None:
            self.close()
            raise error
        self._next = step + 1
        if self._next == self._stop:
            self.close()
        return _moved(batch, self._device)  # type: ignore[return-value]

    def _start(self, step: int) -> None:
        self.close()
        self._ready, self._free, closed = SimpleQueue(), threading.Semaphore(self._depth), threading.Event()
        pin = self._device is not None and self._device.startswith("cuda")
        # The thread knows the queue and not the prefetcher, which can therefore be collected while it runs.
        arguments = (self._load, range(step, self._stop), self._ready, self._free, closed, pin)
        thread = threading.Thread(target=_make, args=arguments, name="prefetch", daemon=True)
        self._end = weakref.finalize(self, _finish, thread, self._free, closed)
        thread.start()

    def close(self) -> None:
        """End the thread, waiting for the batch it is making. Another call starts it again."""
        self._end()
        self._next, self._ready = None, SimpleQueue()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _make(
    load: Callable[[int], Any],
    steps: range,
    ready: SimpleQueue,
    free: threading.Semaphore,
    closed: threading.Event,
    pin: bool,
) -> None:
    for step in steps:
        free.acquire()
        if closed.is_set():
            return
        try:
            ready.put((_pinned(load(step)) if pin else load(step), None))
        except BaseException as error:  # whatever it is, it belongs to the thread that asked
            ready.put((None, error))
            return


def _finish(thread: threading.Thread, free: threading.Semaphore, closed: threading.Event) -> None:
    closed.set()
    free.release()
    if thread is not threading.current_thread():  # the garbage collector may run in any thread
        thread.join()


def _pinned(batch: Any) -> Any:
    import torch

    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _moved(batch: Any, device: str | None) -> Any:
    if device is None or not isinstance(batch, Mapping):
        return batch
    import torch

    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
