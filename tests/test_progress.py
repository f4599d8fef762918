"""Progress: a bar on a terminal, otherwise a log line now and then with a percentage and an estimate."""

import io

import pytest

from embodied import progress as module
from embodied.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_ten_seconds(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for step in range(101):
        clock[0] = 100.0 + step / 2  # half a second per step: 50 s in all
        progress(step, 100, "training")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "20 % (20/100), about 40 s left, training"
    assert lines[3] == "80 % (80/100), about 10 s left, training"


def test_resumed_work_does_not_flatter_the_estimate(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress(90, 100, "training")
    clock[0] += 20
    progress(92, 100, "training")  # 2 steps in 20 s: 80 s for the 8 that are left
    assert stream.getvalue() == "92 % (92/100), about 1 min 20 s left, training\n"


def test_a_text_that_changes_at_every_call_keeps_the_estimate(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for step in range(21):
        clock[0] = 100.0 + step
        progress(step, 40, f"loss {step}")
    assert stream.getvalue().splitlines()[-1] == "50 % (20/40), about 20 s left, loss 20"


def test_short_work_says_nothing(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for step in range(3):
        progress(step, 2, "quick")
    progress.close()
    assert stream.getvalue() == ""


def test_on_a_terminal_a_bar_that_ends_where_the_work_does() -> None:
    stream = Terminal()
    progress = Progress(stream, prefix="[1/2] ")
    for step in range(11):
        progress(step, 10, "labelling")
    assert progress._bar is not None
    assert (progress._bar.n, progress._bar.total) == (10, 10)
    progress.say("done")
    assert "[1/2] done\n" in stream.getvalue()
    progress(0, 5, "training")  # another total: another bar
    assert progress._bar.total == 5
    progress.close()
    assert "[1/2] labelling" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7805, "2 h 10 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
