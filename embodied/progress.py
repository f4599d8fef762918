"""Long work shows how far it is: a bar with an estimate on a terminal, otherwise a log line now and then."""

import sys
import time
from typing import TextIO

LOG_EVERY = 10.0  # [s]


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Call it as `progress(done, total, text)`; every room's long function takes such a callable.

    A `total` that changed, or a `done` that fell, starts a new bar; `text` may change at any time. The estimate is made
    from this run's own pace: what a resumed run finds finished does not count.

    Args:
        stream: standard error by default.
        prefix: put before every text, for example `[3/9] `.
        log_every: seconds between two log lines where there is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, prefix: str = "", log_every: float = LOG_EVERY) -> None:
        self._stream = stream or sys.stderr
        self.prefix = prefix
        self._log_every = log_every
        self._bar = None
        self._total: int | None = None
        self._start = self._last = 0.0
        self._first = self._done = 0

    def __call__(self, done: int, total: int, text: str) -> None:
        if total != self._total or done < self._done:
            self.close()
            self._total, self._first = total, done
            self._start = self._last = time.monotonic()
        self._done = done
        if self._stream.isatty():
            self._show(done, total, text)
        else:
            self._log(done, total, text)

    def _show(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=self.prefix + text, file=self._stream, dynamic_ncols=True, leave=False
            )
        self._bar.set_description_str(self.prefix + text, refresh=False)
        self._bar.update(done - self._bar.n)

    def _log(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self._last < self._log_every or done <= self._first:
            return
        self._last = now
        left = (now - self._start) / (done - self._first) * (total - done)
        share = 100 * done / total if total else 100.0
        self.say(f"{share:.0f} % ({done}/{total}), about {duration(left)} left{', ' if text else ''}{text}")

    def say(self, message: str) -> None:
        """One line above the bar, or in the log."""
        if self._bar is not None:
            self._bar.clear()
        print(self.prefix + message, file=self._stream, flush=True)

    def close(self) -> None:
        """End the present bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._total = None, None
