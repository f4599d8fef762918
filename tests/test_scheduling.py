"""Lateness is measured against a grid, priority falls back in words, garbage waits for the pause between ticks."""

import gc
import os

import numpy as np
import pytest

from embodied.robot_bridge.scheduling import WINDOW, Collector, Lateness, Percentiles, raise_priority


def test_a_punctual_loop_is_never_late() -> None:
    late = Lateness(100.0)
    for k in range(2500):
        late.started(5.0 + 0.01 * k)
        assert late.verdict() == ""
    assert late.recent.at(0.99) == pytest.approx(0.0, abs=1e-9)


def test_lateness_is_counted_from_the_grid_and_a_lost_grid_begins_anew() -> None:
    late = Lateness(100.0)
    for t in (0.0, 0.013, 0.021, 0.030, 0.5, 0.51):
        late.started(t)
    np.testing.assert_allclose([late.recent.at(q) for q in (0.0, 1.0)], [0.0, 0.46], atol=1e-9)
    assert late.recent.at(0.5) == pytest.approx(0.0005, abs=1e-9)  # 0, 3, 1, 0, 460, 0 ms


def test_a_loop_that_does_not_keep_its_rate_is_told_once_per_window() -> None:
    late, said = Lateness(100.0), []
    ticks = round(2.5 * WINDOW * 100)
    for k in range(ticks):
        late.started(0.01 * k + (0.007 if k % 20 == 0 else 0.0))
        if text := late.verdict():
            said.append((k, text))
    assert len(said) == 2
    assert "7.0 ms late" in said[0][1]
    assert "period is 10 ms" in said[0][1]


def test_a_few_late_ticks_are_no_verdict() -> None:
    late = Lateness(100.0)
    for k in range(3000):
        late.started(0.01 * k + (0.009 if k % 500 == 0 else 0.0))
        assert late.verdict() == ""


def test_percentiles_of_nothing_are_nan() -> None:
    values = Percentiles(3)
    assert np.isnan(values.at(0.5))
    for value in (9.0, 1.0, 2.0, 3.0):
        values.add(value)
    assert values.full
    assert values.at(1.0) == 3.0


def test_collections_happen_between_ticks_only() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with Collector() as collector:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > before
        counts = gc.get_stats()[0]["collections"]
        for _ in range(3 * Collector.EVERY):
            collector.between_ticks()
        assert gc.get_stats()[0]["collections"] == counts + 3
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_refused_priority_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    assert raise_priority(0) == "ordinary scheduling"
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    assert raise_priority(50) == "nice -10: SCHED_FIFO was refused (Operation not permitted)"
    monkeypatch.setattr(os, "setpriority", refuse)
    assert "rtprio" in raise_priority(50)
    given = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda *arguments: given.append(arguments))
    assert raise_priority(50) == "SCHED_FIFO, priority 50"
    assert given[0][:2] == (0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK)
