"""Comparing two segments: what is shown, what may be answered, who answers."""

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Answer(enum.IntEnum):
    """What an annotator may say about two segments, in the order in which they were shown."""

    FIRST = 0
    SECOND = 1
    NO_PREFERENCE = 2  # it compared them and found neither better
    ABSTAINED = 3  # it did not, or could not be understood

    @property
    def swapped(self) -> "Answer":
        """The same opinion had the segments been shown in the other order."""
        return {Answer.FIRST: Answer.SECOND, Answer.SECOND: Answer.FIRST}.get(self, self)


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive frames of one episode; one frame alone is a segment of length 1.

    Attributes:
        rows: (T,) rows of the store.
        frames: (T, H, W, 3) uint8, or None for an annotator that does not look.
    """

    rows: np.ndarray
    frames: np.ndarray | None = None

    @functools.cached_property
    def content(self) -> str:
        """SHA-256 of what an annotator sees, hex: equal pictures are one question, whatever store they lie in."""
        digest = hashlib.sha256()
        if self.frames is None:
            digest.update(b"rows" + np.ascontiguousarray(self.rows, np.int64).tobytes())
        else:
            frames = np.ascontiguousarray(self.frames, np.uint8)
            digest.update(str(frames.shape).encode() + frames.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        reason: why it abstained, in a few words that can be counted; empty otherwise.
        final: whether asking again would give the same: False after a failure of network or budget, which is not kept.
        record: JSON-able: raw answers, prompts, model, seconds, tokens, cost; whatever the annotator knows.
    """

    answer: Answer
    reason: str = ""
    final: bool = True
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Annotator(Protocol):
    """Who compares two segments: a vision-language model, a person, a script, a file of earlier labels.

    Attributes:
        name: kept with every answer, for example `openai:gpt-4o@https://...`; never holds a key.
        identity: everything beside task, pictures and sample that decides an answer: model, prompt, temperature, seed.
            Answers are kept under its hash.
        sees: whether it needs frames; without, segments come with rows only.
        workers: how many questions it answers at once.
    """

    name: str
    identity: Mapping[str, Any]
    sees: bool
    workers: int

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        """Which segment shows more of `task`, as shown.

        Args:
            sample: number of the question among several about the same pair in the same order.
        """
        ...
