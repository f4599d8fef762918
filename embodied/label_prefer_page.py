"""The HTML page of `embodied label prefer --report`: what was asked, what was answered, how far it can be trusted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied import report_figures
from embodied.contracts.errors import EmbodiedError
from embodied.contracts.preferences import Answer
from embodied.report import Page, details, figure, paragraph, table
from embodied.statistics import wilson

LEAD = "Which of two shows more of the task? What was answered, by whom, and how far it can be trusted."
SHOWN = 8  # pairs of pictures per section
WORDS = {
    Answer.FIRST: "first",
    Answer.SECOND: "second",
    Answer.NO_PREFERENCE: "no preference",
    Answer.ABSTAINED: "abstained",
}


def write_page(path: Path, store: Any, preferences: Any, name: str) -> None:
    """Write the page of one preference set.

    Args:
        name: of the set; a label set of the same name gives the reward model's part.
    """
    page = Page(f"Preferences: {preferences.task or name}", LEAD)
    answer, record = preferences.answer, preferences.provenance
    decided = int(preferences.decided.sum())
    page.tile(f"{len(preferences)}", f"pairs of {preferences.length} frame{'s' * (preferences.length > 1)}")
    page.tile(f"{decided}", "take a side")
    page.tile(f"{int((answer == Answer.ABSTAINED).sum())}", "abstained")
    fitted = _fit(store, name)
    if fitted and fitted["held_out"]["pairs"]:
        held = fitted["held_out"]
        page.tile(_share(held["correct"], held["pairs"]), "of held-out pairs the reward model gets right")
    page.section("Answers", _answers(preferences), *_abstentions(record))
    page.section("Does it like one side?", *_position(record["position_bias"]))
    if others := _agreement(store, preferences, name):
        page.section("Does it agree with others?", *others)
    truth = _truth(store)
    if truth is not None:
        page.section("Against the truth", *_against_truth(preferences, truth))
    if fitted:
        page.section("The reward model", *_model(fitted))
        score = store.label(name).score
        _pictures(page, store, preferences, score, fitted)
    page.section("What it cost", *_cost(preferences))
    page.write(path)


def _share(count: int, of: int) -> str:
    """`71 % [64, 77]`."""
    if not of:
        return "-"
    interval = wilson(count, of)
    return f"{100 * interval.estimate:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _answers(preferences: Any) -> str:
    rows = []
    for index, annotator in enumerate(preferences.annotators):
        mine = preferences.answer[preferences.annotator == index]
        rows.append([annotator, str(len(mine)), *(str(int((mine == answer).sum())) for answer in Answer)])
    head = ["who had the last word", "pairs", *(WORDS[answer] for answer in Answer)]
    return table(head, rows, numbers=tuple(range(1, 6)))


def _abstentions(record: Mapping[str, Any]) -> list[str]:
    if not record["abstentions"]:
        return []
    rows = [[reason, str(count)] for reason, count in record["abstentions"].items()]
    return [paragraph("Questions without an answer, by reason:"), table(["reason", "questions"], rows, numbers=(1,))]


def _position(bias: Mapping[str, int]) -> list[str]:
    parts = [
        paragraph(
            f"Of {bias['sided']} answers that took a side, {_share(bias['first_shown'], bias['sided'])} took the one "
            "shown first; 50 % is fair."
        )
    ]
    if bias["both_orders"]:
        share = _share(bias["consistent"], bias["both_orders"])
        parts.append(
            paragraph(f"Of {bias['both_orders']} pairs answered in both orders, {share} were judged alike in both.")
        )
    return parts


def _agreement(store: Any, preferences: Any, name: str) -> list[str]:
    """Agreement with the store's other sets about the same pairs, joined by the segments' rows."""
    from embodied.datasets.preferences import preference_names, read_preferences
    from embodied.vlm_rewards.preference_files import PairLabels
    from embodied.vlm_rewards.preference_report import agreement

    def labels(found: Any) -> PairLabels:
        return PairLabels(found.first[:, None], found.second[:, None], found.answer)

    rows = []
    for other in preference_names(store):
        found = read_preferences(store, other)
        if other == name or found.length != preferences.length:
            continue
        counted = agreement(labels(preferences), labels(found))
        if counted["pairs"]:
            share = _share(counted["agree"], counted["both_decided"])
            rows.append(
                [other, ", ".join(found.annotators), str(counted["pairs"]), str(counted["both_decided"]), share]
            )
    if not rows:
        return []
    head = ["set", "annotators", "pairs in both", "decided in both", "agree"]
    return [table(head, rows, numbers=(2, 3, 4))]


def _truth(store: Any) -> np.ndarray | None:
    """True reward or progress per frame, where the store knows it."""
    from embodied.vlm_rewards.prefer import truth_of

    known = [name for name in store.label_names() if store.label(name).provenance.get("labeller") == "truth"]
    progress = [name for name in known if "progress" in name]
    try:
        return truth_of(store, (progress or known or ["source"])[0])
    except EmbodiedError:
        return None


def _against_truth(preferences: Any, truth: np.ndarray) -> list[str]:
    from embodied.vlm_rewards.preference_report import accuracy, by_difficulty, cycles, true_sides

    difference = truth[preferences.rows()].sum(-1) @ np.array([-1.0, 1.0])
    counted = accuracy(preferences.answer, true_sides(difference))
    if not counted["pairs"]:
        return [paragraph("The truth differs in none of the pairs.")]
    bins = [part for part in by_difficulty(preferences.answer, difference) if part["decided"]]
    spans = [wilson(part["correct"], part["decided"]) for part in bins]
    circles = cycles(preferences.first, preferences.second, preferences.answer)
    parts = [
        paragraph(
            f"{_share(counted['correct'], counted['decided'])} of {counted['decided']} decided pairs name the truly "
            f"better one; {_share(counted['correct'], counted['pairs'])} of all {counted['pairs']} pairs that differ, "
            "if no side counts as wrong."
        )
    ]
    if bins:
        parts.append(figure(report_figures.accuracy_by_difficulty(bins, [(s.low, s.high) for s in spans])))
    if circles["triples"]:
        parts.append(paragraph(f"{circles['cyclic']} of {circles['triples']} triples go round in a circle."))
    return parts


def _fit(store: Any, name: str) -> dict[str, Any] | None:
    if name not in store.label_names():
        return None
    return store.label(name).provenance["config"].get("fit")


def _model(fitted: Mapping[str, Any]) -> list[str]:
    held, noisy = fitted["held_out"], fitted["noisy"]
    rows = [
        ["pairs fitted on", str(fitted["pairs"])],
        ["held-out pairs with a side", str(held["pairs"])],
        ["right on these", _share(held["correct"], held["pairs"])],
        ["always answering the commoner side", _share(held["majority_correct"], held["pairs"])],
        ["labels that the ensemble contradicts", f"{noisy['share']:.0%} of the pairs; done: {noisy['done']}"],
        ["temperature of the calibration", f"{fitted['temperature']:.3g}"],
    ]
    if held["ece"] is not None:
        rows.append(["expected calibration error", f"{held['ece']:.3f}"])
    if len(fitted["frame_weight_losses"]) > 1:
        rows.append(["pull towards the frame label", f"{fitted['frame_weight']:g}, by held-out loss"])
    parts = [table(["", ""], rows)]
    if held["bins"]:
        parts.append(paragraph("How sure it is against how often it is right, held-out pairs; numbers are pairs."))
        parts.append(figure(report_figures.calibration(held["bins"])))
    return parts


def _pictures(page: Page, store: Any, preferences: Any, score: np.ndarray, fitted: Mapping[str, Any]) -> None:
    """Pairs the model is least sure of, and those where it contradicts the answer most loudly."""
    if not preferences.camera:
        return
    margin = score[preferences.rows()].sum(-1) @ np.array([-1.0, 1.0])
    p_second = 1 / (1 + np.exp(-np.clip(margin / fitted["temperature"], -50, 50)))
    unsure = np.argsort(np.abs(p_second - 0.5), kind="stable")[:SHOWN]
    text = "The frame shown is the last of each segment."
    page.section(
        "Least sure",
        paragraph(text),
        figure(_montage(store, preferences, unsure, p_second)),
        _readings(preferences, unsure),
    )
    of_answer = np.where(preferences.answer == Answer.SECOND, p_second, 1 - p_second)
    wrong = np.flatnonzero(preferences.decided & (of_answer < 0.5))
    loudest = wrong[np.argsort(of_answer[wrong], kind="stable")][:SHOWN]
    if len(loudest):
        page.section(
            "Most confident contradictions",
            paragraph("The answer says one side, the model is sure of the other: a wrong answer, or a wrong model."),
            figure(_montage(store, preferences, loudest, p_second)),
            _readings(preferences, loudest),
        )


def _montage(store: Any, preferences: Any, chosen: np.ndarray, p_second: np.ndarray) -> str:
    pairs, captions = [], []
    for index in chosen:
        rows = np.array([preferences.first[index], preferences.second[index]]) + preferences.length - 1
        first, second = store.read_rows(f"observation/images/{preferences.camera}", rows)
        pairs.append((first, second))
        word = WORDS[Answer(preferences.answer[index])]
        captions.append(f"answer {word}, model {100 * p_second[index]:.0f} % second")
    return report_figures.pairs_of_pictures(pairs, captions)


def _readings(preferences: Any, chosen: np.ndarray) -> str:
    """What was said about these pairs, word for word."""
    lines = []
    for index in chosen:
        for question in json.loads(preferences.records[index]):
            for exchange in question.get("exchanges", ()):
                order = "second shown first" if question["swapped"] else "first shown first"
                lines.append([str(int(index)), order, question["answer"], exchange["answer"][:600]])
    return details("What was said", table(["pair", "order", "read as", "text"], lines)) if lines else ""


def _cost(preferences: Any) -> list[str]:
    exchanges = [e for text in preferences.records for q in json.loads(text) for e in q.get("exchanges", ())]
    if not exchanges:
        return [paragraph("Nothing was paid for.")]
    tokens = {key: sum(e["tokens"][key] for e in exchanges) for key in ("prompt", "completion")}
    seconds = np.array([e["seconds"] for e in exchanges])
    failures = sum(len(e["failures"]) for e in exchanges)
    rows = [
        ["calls answered", str(len(exchanges))],
        ["failures on the way", str(failures)],
        ["tokens in, out", f"{tokens['prompt']}, {tokens['completion']}"],
        ["cost", f"{sum(e['cost'] for e in exchanges):.4g}"],
        ["seconds per call", f"median {np.median(seconds):.2f}, 99 % {np.quantile(seconds, 0.99):.2f}"],
        ["models", ", ".join(sorted({e["model"] for e in exchanges}))],
    ]
    return [table(["", ""], rows)]
