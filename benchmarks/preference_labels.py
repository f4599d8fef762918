"""Real preference labels: how people, scripts and models agree, and what a reward model learns from 90 human pairs.

    python benchmarks/preference_labels.py ../shared/data

Writes benchmarks/results/preference_labels.json. The IPL segments' evaluation pairs are all among the training pairs:
they are removed from it first. A fold's held-out pairs are never trained on; early stopping has a share of the others.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

from embodied.contracts.preferences import Answer
from embodied.statistics import wilson
from embodied.vlm_rewards.preference_files import PairLabels, read_pair_labels
from embodied.vlm_rewards.preference_report import accuracy, agreement
from embodied.vlm_rewards.reward_model import Pairs, RewardModelConfig, fit_reward_model, majority

FOLDS, SEEDS = 5, 5


def read_libero(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answer as shown, true side as shown, and whether the better one was shown first; (P,) each."""
    samples = json.loads(path.read_text())["samples"]
    better_first = np.array([sample["chosen_is_first"] for sample in samples])
    truth = np.where(better_first, Answer.FIRST, Answer.SECOND).astype(np.int8)
    said = [sample["preference"] for sample in samples]
    right, tie = np.array([s == "chosen" for s in said]), np.array([s == "tie" for s in said])
    wrong = np.where(better_first, Answer.SECOND, Answer.FIRST)
    answer = np.where(tie, Answer.NO_PREFERENCE, np.where(right, truth, wrong)).astype(np.int8)
    return answer, truth, better_first


def without(train: PairLabels, taken: PairLabels) -> tuple[np.ndarray, int]:
    """Indices of the training pairs that are not evaluation pairs, duplicates once; and how many were removed."""
    assert train.segments is not None
    assert taken.segments is not None
    seen = {segment.tobytes() for segment in taken.segments}
    kept = []
    for index, segment in enumerate(train.segments):
        if segment.tobytes() not in seen:
            seen.add(segment.tobytes())
            kept.append(index)
    return np.array(kept), len(train) - len(kept)


def fit_segments(folder: Path, who: str) -> dict[str, Any]:
    """Cross-validated accuracy of a reward model on IPL's Lift segments, and on the evaluation pairs."""
    train = read_pair_labels(folder / f"num100_q50_{who}_train.npz")["human"]
    final = read_pair_labels(folder / f"num100_q50_{who}_eval.npz")["human"]
    kept, removed = without(train, final)
    assert train.segments is not None
    assert final.segments is not None
    segments = np.concatenate([train.segments[kept], final.segments])
    inputs = segments.reshape(-1, segments.shape[-1])
    rows = np.arange(len(inputs)).reshape(segments.shape[:3])
    answer = np.concatenate([train.answer[kept], final.answer])
    weight = np.ones(len(answer), np.float32)
    number, evaluation = np.arange(len(kept)), np.arange(len(kept), len(answer))
    right, guess_right, decided = 0, 0, 0
    fold = np.random.default_rng(0).permutation(len(kept)) % FOLDS
    for k in range(FOLDS):
        learn, test = number[fold != k], number[(fold == k) & (answer[: len(kept)] <= Answer.SECOND)]
        margin = fitted_margin(inputs, Pairs(rows[learn], answer[learn], weight[learn]), rows[test])
        right += int(((margin > 0) == answer[test]).sum())
        guess_right += int((answer[test] == majority(answer[learn])).sum())
        decided += len(test)
    test = evaluation[answer[evaluation] <= Answer.SECOND]
    margin = fitted_margin(inputs, Pairs(rows[number], answer[number], weight[number]), rows[test])
    return {
        "pairs": len(kept),
        "removed_evaluation_or_duplicate_pairs": removed,
        "decided": decided,
        "accuracy": wilson(right, decided).to_json(),
        "majority": wilson(guess_right, decided).to_json(),
        "evaluation_decided": len(test),
        "evaluation_correct": int(((margin > 0) == answer[test]).sum()),
    }


def fitted_margin(inputs: np.ndarray, pairs: Pairs, rows: np.ndarray) -> np.ndarray:
    """Mean margin over `SEEDS` fits."""
    found = []
    for seed in range(SEEDS):
        model, _ = fit_reward_model(inputs, pairs, RewardModelConfig(hidden_sizes=(64, 64), members=3, seed=seed))
        found.append(model.margins(inputs, rows).mean(0))
    return np.mean(found, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    data = parser.parse_args().data
    figures: dict[str, Any] = {"human_and_script": {}}
    for path in sorted((data / "pref-unirlhf-human-script").glob("*.npz")):
        labels = read_pair_labels(path)
        counted = agreement(labels["human"], labels["script"])
        share = wilson(counted["agree"], counted["both_decided"]).to_json()
        figures["human_and_script"][path.stem] = counted | {"agreement": share}
    answer, truth, _ = read_libero(data / "vlm-judgements-libero" / "gvl_eval_20250901_221330.json")
    counted = accuracy(answer, truth)
    figures["libero_judgements"] = counted | {
        "ties_wrong": wilson(counted["correct"], counted["pairs"]).to_json(),
        "decided_only": wilson(counted["correct"], counted["decided"]).to_json(),
    }
    folder = data / "pref-ipl-segments" / "Lift"
    figures["ipl_lift_segments"] = {who: fit_segments(folder, who) for who in ("human", "script")}
    write_result("preference_labels", figures)


if __name__ == "__main__":
    main()
