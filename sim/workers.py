"""Processes that each own one simulator."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from embodied.contracts.errors import EmbodiedError, InputError

_PR_SET_PDEATHSIG = 1


def _start_worker() -> None:
    # One thread each: several processes with spinning thread pools slow one another down a hundredfold.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker dies with its parent, however that ends, so that a command started again does not race with it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_tasks(function: Callable[..., Any], tasks: Iterable[tuple], workers: int) -> Iterator[Any]:
    """Yield `function(*task)` of each task as it ends, in no order.

    Args:
        function: a module-level function; it runs in spawned processes and keeps its simulator between tasks.
        workers: number of processes; 0 means one per core.
    """
    if workers < 0:
        raise InputError("--workers: a number of processes, or 0 for one per core.")
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        pending = {pool.submit(function, *task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise EmbodiedError(
                "A simulator process ended early (out of memory?). Run the same command again."
            ) from error
        finally:
            for future in pending:
                future.cancel()
