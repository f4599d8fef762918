"""Every answer, kept the moment it arrives, and every call, entered before it is made. SQLite: survives kill -9.

An answer is kept under the hash of annotator, task, pictures, order and sample, so nothing is asked twice, by whatever
run. A call counts against its budget from before it is sent: one that a killed run left open counts in full.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError, LabelError
from embodied.contracts.preferences import Annotator, Answer, Segment, Verdict
from embodied.contracts.provenance import hash_json

_TABLES = """
CREATE TABLE IF NOT EXISTS answers
  (key TEXT PRIMARY KEY, answer INTEGER, reason TEXT, record TEXT, annotator TEXT, at REAL);
CREATE TABLE IF NOT EXISTS exchanges (key TEXT PRIMARY KEY, exchange TEXT);
CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, job TEXT, reserved REAL, cost REAL, at REAL);
CREATE INDEX IF NOT EXISTS calls_of_job ON calls (job);
"""


def question_key(annotator: Annotator, task: str, first: Segment, second: Segment, sample: int) -> str:
    """The hash under which an answer is kept."""
    return hash_json([dict(annotator.identity), task, first.content, second.content, sample])


class AnswerLog:
    """One file; several threads and processes may use it.

    Raises:
        InputError: the file is there and is no answer log.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        try:
            self._database = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_TABLES)
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path} is no log of answers: {error}.\nName another file, or move it away."
            ) from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise LabelError(f"Cannot write {self.path}: {error}. What was answered so far is kept.") from None
            except BaseException:
                self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """One thread at a time per key: the same question put by two of them at once would be paid twice."""
        with self._lock:
            mine = self._turns.setdefault(key, threading.Lock())
        with mine:
            yield

    def find(self, key: str) -> Verdict | None:
        """The answer under `key`, or None."""
        with self._lock:
            row = self._database.execute("SELECT answer, reason, record FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Verdict(Answer(row[0]), row[1], True, json.loads(row[2]))

    def keep(self, key: str, verdict: Verdict, annotator: str) -> None:
        """Keep an answer; one that is there already stays."""
        row = (key, int(verdict.answer), verdict.reason, json.dumps(dict(verdict.record)), annotator, time.time())
        with self._writing() as database:
            database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def forget(self, key: str) -> None:
        """Take an answer back (a person's undo)."""
        with self._writing() as database:
            database.execute("DELETE FROM answers WHERE key = ?", (key,))

    def find_exchange(self, key: str) -> dict[str, Any] | None:
        """One question and answer of a model that is asked in several steps, or None."""
        with self._lock:
            row = self._database.execute("SELECT exchange FROM exchanges WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep_exchange(self, key: str, exchange: Mapping[str, Any]) -> None:
        """Keep one step's answer, paid for, before the next step is asked."""
        with self._writing() as database:
            database.execute("INSERT OR IGNORE INTO exchanges VALUES (?, ?)", (key, json.dumps(dict(exchange))))

    def close(self) -> None:
        self._database.close()


class BudgetSpent(Exception):
    """The next call could exceed the budget. Internal: an annotator turns it into an abstention."""


class Budget:
    """What one job may spend; shared by the threads of an annotator, and by the runs of a job that was killed.

    Args:
        job: name of what the money is for; calls of earlier runs under this name count.
        max_calls, max_cost: never exceeded; None: no limit.
    """

    def __init__(self, log: AnswerLog, job: str, max_calls: int | None = None, max_cost: float | None = None) -> None:
        self.log, self._job, self.max_calls, self.max_cost = log, job, max_calls, max_cost

    def spent(self) -> tuple[int, float]:
        """Calls, and cost; of a call that never returned what was set aside for it."""
        with self.log._lock:
            return self._spent(self.log._database)

    def _spent(self, database: sqlite3.Connection) -> tuple[int, float]:
        query = "SELECT COUNT(*), COALESCE(SUM(COALESCE(cost, reserved)), 0) FROM calls WHERE job = ?"
        calls, cost = database.execute(query, (self._job,)).fetchone()
        return int(calls), float(cost)

    @contextlib.contextmanager
    def call(self, at_most: float) -> Iterator[dict[str, Any]]:
        """Enter a call that costs no more than `at_most` before making it.

        Yields:
            A dictionary; put the true cost under `cost`. Without one, `at_most` stays booked.

        Raises:
            BudgetSpent: nothing was booked and nothing may be sent.
        """
        with self.log._writing() as database:
            calls, cost = self._spent(database)
            if self.max_calls is not None and calls + 1 > self.max_calls:
                raise BudgetSpent(f"budget of {self.max_calls} calls spent")
            if self.max_cost is not None and cost + at_most > self.max_cost + 1e-12:
                raise BudgetSpent(f"budget of {self.max_cost:g} spent")
            entry = database.execute(
                "INSERT INTO calls (job, reserved, at) VALUES (?, ?, ?)", (self._job, at_most, time.time())
            ).lastrowid
        booked: dict[str, Any] = {}
        try:
            yield booked
        finally:
            if "cost" in booked:
                with self.log._writing() as database:
                    database.execute("UPDATE calls SET cost = ? WHERE id = ?", (float(booked["cost"]), entry))


def job_name(parts: Mapping[str, Any]) -> str:
    """A short name for a budget's job."""
    return hash_json(dict(parts))[:16]
