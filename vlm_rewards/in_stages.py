"""What annotators that are vision-language models share: asking in one or two stages, keeping every exchange."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from embodied.contracts.errors import ConfigError
from embodied.contracts.preferences import Answer, Segment, Verdict
from embodied.vlm_rewards import parse_answers, vlm_prompts
from embodied.vlm_rewards.answer_log import AnswerLog, BudgetSpent

Parts = list[dict[str, Any]]
Exchange = dict[str, Any]
VERSIONS: Mapping[str, Any] = {"prompts": vlm_prompts.VERSION, "parser": parse_answers.VERSION}


class Failed(Exception):
    """A call that gave nothing. Its text is a reason that can be counted.

    Args:
        again: whether trying again may help; wait: seconds to wait before that, where known.
    """

    def __init__(self, reason: str, again: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


def check_asking(stages: str, frames_shown: int, max_tokens: int, temperature: float) -> None:
    """ConfigError unless a model can be asked so."""
    if stages not in vlm_prompts.STAGES:
        raise ConfigError(f"stages '{stages}' is unknown. Valid: {', '.join(vlm_prompts.STAGES)}.")
    if min(frames_shown, max_tokens) < 1:
        raise ConfigError("frames_shown and max_tokens must be positive.")
    if not 0 <= temperature <= 10:
        raise ConfigError(f"temperature {temperature} must lie in [0, 10].")


def compare_in_stages(
    task: str,
    first: Segment,
    second: Segment,
    stages: str,
    frames_shown: int,
    model: str,
    say: Callable[[Parts], Exchange],
) -> Verdict:
    """Ask about two segments.

    Args:
        stages: `two`: describe and compare, then decide from that text alone; `one`: both at once.
        say: parts of one user message (text, pictures) -> exchange with the model's words under `answer`. It may raise
            Failed or BudgetSpent, which end in an abstention that is asked again by a later run.

    Returns:
        The verdict; its record holds `model` and the `exchanges` that came back.
    """
    shown = [vlm_prompts.shown_frames(segment, frames_shown) for segment in (first, second)]
    one = vlm_prompts.STAGES[stages] == 1
    exchanges: list[Exchange] = []
    record = {"model": model, "exchanges": exchanges}
    try:
        exchanges.append(say(vlm_prompts.first_step(task, shown[0], shown[1], one)))
        if not one and exchanges[0]["answer"].strip():
            clips = max(len(shown[0]), len(shown[1])) > 1
            decision = vlm_prompts.second_step(task, exchanges[0]["answer"], clips)
            exchanges.append(say([{"type": "text", "text": decision}]))
    except (BudgetSpent, Failed) as reason:
        return Verdict(Answer.ABSTAINED, str(reason), False, record)
    return dataclasses.replace(parse_answers.parse_choice(exchanges[-1]["answer"]), record=record)


def exchange_once(log: AnswerLog, key: str, parts: Parts, call: Callable[[], Exchange]) -> Exchange:
    """The exchange under `key`: from the log, or by `call`, kept at once with its prompt (less the pictures)."""
    with log.turn(key):
        exchange = log.find_exchange(key)
        if exchange is None:
            exchange = call() | {"prompt": vlm_prompts.without_pictures(parts)}
            log.keep_exchange(key, exchange)
    return exchange


def count_pictures(parts: Parts) -> int:
    return sum(part["type"] == "image_url" for part in parts)
