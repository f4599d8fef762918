"""Prefetching: the same batches in the same order, bounded, exceptions passed on, and no thread left behind."""

import gc
import subprocess
import sys
import threading
import time
import traceback
import weakref

import numpy as np
import pytest
import torch

from embodied.datasets.prefetch import Prefetcher


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited for 10 s"
        time.sleep(0.001)


def batch(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.from_numpy(np.random.Generator(np.random.Philox(key=[3, step])).normal(size=8))}


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_batches_and_their_order_are_those_of_load(depth: int) -> None:
    with Prefetcher(batch, 50, depth) as batches:
        for step in range(20, 50):  # a resumed run
            assert torch.equal(batches(step)["x"], batch(step)["x"])
        assert threads() == []  # it ended with the last step
        for step in (3, 4, 9, 9, 8, 0, 1):  # any other order starts over, and gives the same
            assert torch.equal(batches(step)["x"], batch(step)["x"])
    assert threads() == []


class Held:
    """A batch that a weak reference can point to."""

    def __init__(self, step: int) -> None:
        self.step = step


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_batches_wait(depth: int) -> None:
    alive: weakref.WeakSet[Held] = weakref.WeakSet()
    begun: list[int] = []

    def load(step: int) -> Held:
        begun.append(step)
        made = Held(step)
        alive.add(made)
        return made

    with Prefetcher(load, 100, depth) as batches:
        for step in range(10):
            held = batches(step)
            wait_for(lambda: len(begun) == step + 1 + depth)  # noqa: B023 (called at once)
            time.sleep(0.005)
            assert begun == list(range(step + 1 + depth))
            assert len(alive) <= depth + 1
            assert held.step == step


def test_the_next_batch_is_made_while_this_one_is_in_use() -> None:
    made = threading.Event()

    def load(step: int) -> int:
        if step == 1:
            made.set()
        return step

    with Prefetcher(load, 10, depth=1) as batches:
        assert batches(0) == 0
        assert made.wait(10)


def test_an_exception_comes_with_its_traceback_at_its_own_step() -> None:
    def broken_source(step: int) -> int:
        if step == 3:
            raise OSError("disk gone")
        return step

    batches = Prefetcher(broken_source, 10)
    assert [batches(step) for step in range(3)] == [0, 1, 2]
    for _ in range(2):  # asking again tries again
        with pytest.raises(OSError, match="disk gone") as caught:
            batches(3)
        assert "broken_source" in "".join(traceback.format_exception(caught.value))
    assert threads() == []
    assert batches(4) == 4
    batches.close()
    assert threads() == []


def test_no_thread_is_left_when_the_consumer_raises_or_forgets() -> None:
    def consumer() -> None:
        with Prefetcher(batch, 1000) as batches:
            batches(0)
            raise KeyError("in the consumer")

    with pytest.raises(KeyError, match="in the consumer"):
        consumer()
    assert threads() == []
    forgotten = Prefetcher(batch, 1000)
    forgotten(0)
    assert threads() == ["prefetch"]
    del forgotten
    gc.collect()
    assert threads() == []


def test_a_program_that_ends_in_the_middle_ends() -> None:
    script = (
        "import time\nfrom embodied.datasets.prefetch import Prefetcher\n"
        "batches = Prefetcher(lambda step: time.sleep(0.01) or step, 10**9)\nprint(batches(0), batches(1))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


def test_tensors_go_to_the_device_and_the_rest_stays() -> None:
    def load(step: int) -> dict:
        return {"x": torch.ones(2), "count": step}

    moved = Prefetcher(load, 2, device="meta")(0)
    assert moved["x"].device.type == "meta"
    assert moved["count"] == 0
    same = Prefetcher(batch, 2, device="cpu")(0)
    assert torch.equal(same["x"], batch(0)["x"])
    assert not same["x"].is_pinned()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_reach_a_gpu_through_pinned_memory() -> None:
    with Prefetcher(batch, 20, device="cuda") as batches:
        for step in range(20):
            found = batches(step)["x"]
            assert found.device.type == "cuda"
            assert torch.equal(found.cpu(), batch(step)["x"])


def test_steps_that_are_not_there_and_no_depth() -> None:
    batches = Prefetcher(batch, 5)
    for step in (-1, 5):
        with pytest.raises(ValueError, match="steps 0 to 4"):
            batches(step)
    with pytest.raises(ValueError, match="depth"):
        Prefetcher(batch, 5, depth=0)
