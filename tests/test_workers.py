import os
import signal

import pytest

from embodied.contracts.errors import EmbodiedError
from embodied.sim.workers import run_tasks


def test_every_task_runs_once():
    assert sorted(run_tasks(abs, [(-n,) for n in range(5)], workers=0)) == [0, 1, 2, 3, 4]


def test_a_killed_worker_is_said_in_one_line():
    """As the kernel ends it when memory is short; the pool's own error is a traceback that names no cause."""
    with pytest.raises(EmbodiedError, match="ended early"):
        list(run_tasks(signal.raise_signal, [(signal.SIGKILL,)], workers=1))


def test_an_error_of_a_task_passes_unchanged():
    with pytest.raises(FileNotFoundError):
        list(run_tasks(os.stat, [("/no/such/path",)], workers=1))
