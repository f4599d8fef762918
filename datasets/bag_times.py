"""The clocks of a bag: which time of a message counts, where a clock was set back, and which topics disagree.

Every message has a receive time on the recorder's clock and, if it has a header, a stamp on its sender's. In simulation
the two are different clocks, and a reset of the simulation sets the stamps back.
"""

import dataclasses

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.bag_series import Series, Table
from embodied.datasets.finding import Finding

RESET_NS = 1_000_000_000  # stamps that go back further, and stay back, are a clock that was set, not a late message
TOGETHER_NS = 5_000_000_000  # topics learn of one reset within this time, by the recorder's clock
APART_NS = 1_000_000_000  # stamps and receive times further apart than this are of two clocks
MAX_RESETS = 200


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One stretch of a recording without a reset, for one topic.

    Attributes:
        rows: (m,) which messages of the series these are.
        time_ns: (m,) their times [ns], never decreasing: a message that came late counts from when it came.
    """

    rows: np.ndarray
    time_ns: np.ndarray

    def last_not_after(self, times: np.ndarray) -> np.ndarray:
        """(n,) index into `rows` of the newest message at each time [ns]; -1 where there is none."""
        return np.searchsorted(self.time_ns, times, side="right") - 1


def timelines(table: Table, stamps: str) -> tuple[list[dict[str, Timeline]], list[Finding]]:
    """Per stretch without a reset: topic -> Timeline; and what is odd about the clocks.

    Args:
        stamps: `header` or `received`; a topic without stamps counts from when its messages were received.

    Raises:
        InputError: `stamps` is `header`, but topics that are to be aligned have stamps of different clocks.
    """
    findings = _two_clocks(table, stamps)
    rows = {topic: _usable(series, stamps) for topic, series in table.series.items()}
    received = {topic: series.log_ns[rows[topic]] for topic, series in table.series.items()}
    times: dict[str, np.ndarray] = {}
    own: dict[str, list[int]] = {}
    for topic, series in table.series.items():
        header = series.header_ns[rows[topic]]
        stamped = bool((header > 0).all())
        times[topic] = header if stamps == "header" and stamped else received[topic]
        clocks = [times[topic], *([header] if stamped else [])]  # a reset is one whichever clock is used
        own[topic] = sorted({row for clock in clocks for row in _resets(clock, f"{table.recording.path}: {topic}")})
    starts: list[int] = []
    for log_ns in sorted(int(received[topic][row]) for topic, resets in own.items() for row in resets):
        if not starts or log_ns > starts[-1] + TOGETHER_NS:
            starts.append(log_ns)
    stretches: list[dict[str, Timeline]] = [{} for _ in range(len(starts) + 1)]
    for topic, time_ns in times.items():
        cuts = [0, *(_cut(received[topic], own[topic], start) for start in starts), len(time_ns)]
        for stretch, begin, end in zip(stretches, cuts, cuts[1:], strict=False):
            if end > begin:
                stretch[topic] = Timeline(rows[topic][begin:end], np.maximum.accumulate(time_ns[begin:end]))
    if starts:
        findings.append(
            Finding(
                "clock-jump",
                "warning",
                f"{table.recording.name}: stamps go back {len(starts)} times, as when a simulation is reset",
                "Each stretch is an episode of its own.",
            )
        )
    return [stretch for stretch in stretches if stretch], findings


def _resets(clock: np.ndarray, where: str) -> list[int]:
    """Rows at which a clock goes back by more than RESET_NS and stays back."""
    found, begin = [], 0
    while begin < len(clock):
        newest = np.maximum.accumulate(clock[begin:])
        behind = clock[begin + 1 :] < newest[:-1] - RESET_NS
        stays = np.append(behind[1:], True)  # one message out of order is no reset
        back = np.flatnonzero(behind & stays)
        if len(back) == 0:
            break
        begin += int(back[0]) + 1
        found.append(begin)
        if len(found) > MAX_RESETS:
            raise InputError(f"{where}: stamps go back more than {MAX_RESETS} times. Try 'stamps: received'.")
    return found


def _usable(series: Series, stamps: str) -> np.ndarray:
    """(m,) rows that have a time. Where others have stamps, one without was sent before its sender had a clock."""
    stamped = np.flatnonzero(series.header_ns > 0)
    return stamped if stamps == "header" and len(stamped) else np.arange(len(series.header_ns))


def _cut(received: np.ndarray, own: list[int], start: int) -> int:
    """The row at which a topic's next stretch begins: its own reset near that time, or the first message after it."""
    for row in own:
        if start <= received[row] <= start + TOGETHER_NS:
            return row
    return int(np.searchsorted(np.maximum.accumulate(received), start))


def _two_clocks(table: Table, stamps: str) -> list[Finding]:
    stamped = {topic: series.header_ns > 0 for topic, series in table.series.items()}
    offsets = {
        topic: series.log_ns[stamped[topic]] - series.header_ns[stamped[topic]]
        for topic, series in table.series.items()
        if stamped[topic].any()
    }
    apart = {topic for topic, offset in offsets.items() if abs(np.median(offset)) > APART_NS}
    if not apart:
        return []
    headers = [table.series[topic].header_ns[stamped[topic]] for topic in apart]
    received = [table.series[topic].log_ns[stamped[topic]] for topic in apart]
    finding = Finding(
        "two-clocks",
        "warning",
        f"{table.recording.name}: headers of {', '.join(sorted(apart))} say {_range(headers)} s, "
        f"the recorder received them at {_range(received)} s: two clocks",
        f"Times are those of the mapping's 'stamps: {stamps}'.",
    )
    if stamps == "header":
        _check_one_clock(table, offsets)
    return [finding]


def _check_one_clock(table: Table, offsets: dict[str, np.ndarray]) -> None:
    """Raise InputError where a topic's stamps are not on the clock of the topic with most of them."""
    main = max(offsets, key=lambda topic: len(offsets[topic]))
    clock = table.series[main].log_ns[table.series[main].header_ns > 0]
    for topic, series in table.series.items():
        log_ns = series.log_ns[_usable(series, "header")]
        if not len(log_ns):
            continue
        # A sender's clock may be set back within the recording, so offsets are compared at the same time.
        there = np.interp(log_ns, clock, offsets[main])
        here = offsets.get(topic, np.zeros(len(log_ns)))
        if np.median(np.abs(there - here)) > APART_NS and not series.texts:
            why = "has stamps of another clock" if topic in offsets else "has messages without a stamp"
            raise InputError(
                f"{table.recording.path}: {topic} {why} than {main}, so their headers do not align them.\n"
                "Write 'stamps: received' into the mapping."
            )


def _range(stamps: list[np.ndarray]) -> str:
    return f"{min(s.min() for s in stamps) * 1e-9:.3f} to {max(s.max() for s in stamps) * 1e-9:.3f}"
