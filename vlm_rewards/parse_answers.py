"""What a vision-language model wrote, read: a choice between two pictures, or a percentage per frame.

Models decorate. A choice may stand alone, in bold, in a sentence, in JSON, behind a line of thought. What cannot be
read without guessing is an abstention with its reason; text is never executed, and nothing in it is an instruction.
"""

import json
import re

from embodied.contracts.preferences import Answer, Verdict

MAX_CHARACTERS = 100_000
VERSION = 1  # raise it when the same text is read otherwise: verdicts are kept under it, raw answers are not
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.S | re.I)
_UNFINISHED_THOUGHT = re.compile(r"<think(?:ing)?>(?!.*</think)", re.S | re.I)
_MARKS = re.compile(r"[*_`#>~]+")
_NUMBERS = {"0": Answer.FIRST, "1": Answer.SECOND, "-1": Answer.NO_PREFERENCE, "−1": Answer.NO_PREFERENCE}
_LABELLED = re.compile(
    r"^(?:final\s+)?(?:answer|choice|decision|verdict|label|preference|result)\s*(?:is|:|=|-)+\s*(.+)$"
)
_ALONE = re.compile(r"^[\s\"'([{<]*([-−]?\d+)[\s\"')\]}>.,;:!]*$")
_THING = r"(?:image|picture|frame|photo|segment|clip|video|option|state|observation)"


def _side(ordinals: str, names: str, hand: str) -> str:
    ways = (rf"(?:the\s+)?(?:{ordinals})(?:\s+(?:one|{_THING}))?", rf"{_THING}\s*(?:#\s*)?(?:{names})\b")
    return rf"(?:{'|'.join(ways)}|{hand}(?:\s+(?:one|{_THING}))?)"


_SIDES = (
    (_side("first|1st", "1|one|a", "left"), Answer.FIRST),
    (_side("second|2nd", "2|two|b", "right"), Answer.SECOND),
)
_WINS = (
    r"(?:is|was|looks|shows|seems|appears|represents|achieves|makes|does)\b(?! not| less)[^.]{0,60}?\b"
    r"(?:better|best|closer|closest|preferred|preferable|more|further|superior|higher)"
)
_NEITHER = re.compile(
    r"\b(?:no (?:clear |significant |discernible |real |visible )?(?:difference|preference|winner)|neither\b"
    r"|equally (?:good|well|close|bad)|tie\b|(?:are|is|look|about|exactly) the same\b|both are (?:equal|similar)"
    r"|(?:cannot|can't|can not) (?:decide|tell|determine)|unsure|indistinguishable)"
)
_FRAME = re.compile(r"(?:^|[^a-z0-9])(?:frame|image|picture|step)\s*[:#]?\s*(\d{1,4})\b", re.I)
_LABELLED_PERCENT = re.compile(r"(?:completion|progress)[^\d%\n-]{0,20}(-?\d{1,4}(?:\.\d+)?)\s*(?:%|percent)", re.I)
_PERCENT = re.compile(r"(?<![\d.])(-?\d{1,4}(?:\.\d+)?)\s*(?:%|percent\b)", re.I)


def parse_choice(text: str) -> Verdict:
    """Which of two was chosen, from the convention of RL-VLM-F: 0 first, 1 second, -1 no preference; or in words.

    The last line that states a choice counts, since models conclude at the end. A line that states two different ones,
    or a number other than these three, is not guessed at.
    """
    if len(text) > MAX_CHARACTERS:
        return Verdict(Answer.ABSTAINED, "answer too long")
    text = _THOUGHT.sub("\n", text)
    if _UNFINISHED_THOUGHT.search(text):
        return Verdict(Answer.ABSTAINED, "unfinished thought")
    if not text.strip():
        return Verdict(Answer.ABSTAINED, "empty answer")
    found = _json_choice(text)
    if found is not None:
        return Verdict(found)
    lines = [_MARKS.sub("", line).strip().lower() for line in text.splitlines()]
    odd = ""
    for line in reversed([line for line in lines if line]):
        choices, strange = _line_choices(line)
        if len(choices) == 1:
            return Verdict(choices.pop())
        odd = odd or ("two choices at once" if choices else "unknown number" if strange else "")
        if choices:
            break
    return Verdict(Answer.ABSTAINED, odd or "no choice found")


def _line_choices(line: str) -> tuple[set[Answer], bool]:
    """The choices that a line states, and whether it is a number that is none."""
    labelled = _LABELLED.match(line)
    body = labelled.group(1) if labelled else line
    alone = _ALONE.match(body) or (re.match(r"^([-−]?\d+)\s*[.:,;(\-–—]", body) if labelled else None)
    if alone:
        answer = _NUMBERS.get(alone.group(1))
        return ({answer} if answer is not None else set()), answer is None
    found = set()
    for words, answer in _SIDES:
        alone = re.fullmatch(rf"{words}[.!]?", body)
        wins = re.search(rf"\b{words}\s+{_WINS}", body)
        chosen = re.search(rf"\b(?:choose|chose|prefer|pick|select)\s+{words}", body)
        inside = re.search(rf"\b(?:better|best|closer|closest|more)\b[^.]{{0,40}}\bin {words}", body)
        if alone or wins or chosen or inside:
            found.add(answer)
    if not found and _NEITHER.search(body):
        found.add(Answer.NO_PREFERENCE)
    return found, False


def _json_choice(text: str) -> Answer | None:
    """The choice in the last JSON object that has one under a usual key."""
    for block in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            value = json.loads(block)
        except ValueError:
            continue
        for key in ("answer", "choice", "preference", "label", "decision", "better"):
            given = str(value.get(key, "")).strip().lower()
            if given in _NUMBERS:
                return _NUMBERS[given]
            choices, _ = _line_choices(given) if given else (set(), False)
            if len(choices) == 1:
                return choices.pop()
    return None


def parse_progress(text: str, frames: int) -> list[float] | None:
    """Percentages of task completion of all frames in the order of their numbers, from 1 or 0; None if unreadable.

    A frame's percentage is the first one after its number that is called completion or progress, else the first line
    with a single percentage. A frame that is missing, or given two different ones, or a number outside [0, 100], makes
    the answer unreadable.
    """
    found: dict[int, float] = {}
    text = _MARKS.sub("", text[:MAX_CHARACTERS])
    place = [(match.start(), int(match.group(1)), match.end()) for match in _FRAME.finditer(text)]
    for index, (_, number, start) in enumerate(place):
        end = place[index + 1][0] if index + 1 < len(place) else len(text)
        value = _completion(text[start:end])
        if value is not None and found.setdefault(number, value) != value:
            return None
    numbers = range(frames) if 0 in found else range(1, frames + 1)
    if set(found) != set(numbers) or not all(0 <= value <= 100 for value in found.values()):
        return None
    return [found[number] for number in numbers]


def _completion(text: str) -> float | None:
    """The percentage that a frame's text states."""
    if labelled := _LABELLED_PERCENT.search(text):
        return float(labelled.group(1))
    for line in text.splitlines():
        values = _PERCENT.findall(line)
        if len(set(values)) == 1:
            return float(values[0])
    return None
