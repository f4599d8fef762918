"""`embodied pretrain clip`: a CLIP that knows your scenes, from pictures with captions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import Setting, torch_device
from embodied.contracts.errors import ConfigError, InputError
from embodied.label_files import model_files
from embodied.progress import Progress
from embodied.verbs import Touches

SMALL = "small"


@dataclasses.dataclass(frozen=True)
class PretrainClip:
    """Train a small CLIP, or fine-tune any open_clip model, on the stores' frames and captions.

    Attributes:
        stores: EpisodeStores.
        out: folder to write, in open_clip's format: 'label clip --model OUT'.
        captions: instruction (the episode's), simulator (written from the state of Lift), or a CSV or JSON lines file
            with episode, start, stop, caption: true of frames start to stop - 1 of that episode.
        camera: whose frames.
        model: small (from scratch), or a model to fine-tune: clip-lift, an open_clip name, a folder.
        pretrained: open_clip's weights tag or a weights file, for a named model.
        steps: gradient steps.
        batch: frames per step.
        holdout: share of the episodes to measure retrieval on, before and after.
        image_size: side of the small model's pictures [pixel].
        settings: changes to the optimiser and sizes, for example learning_rate 1e-6.
        seed: of weights, split and batches.
        device: cpu or cuda, for fine-tuning.
    """

    stores: Positional[tuple[Path, ...]]
    captions: str
    out: Path
    camera: str = "side"
    model: str = SMALL
    pretrained: str = ""
    steps: int = 1500
    batch: int = 64
    holdout: float = 0.1
    image_size: int = 64
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"


def touches(config: PretrainClip) -> Touches:
    weights = () if config.model == SMALL else model_files(config.model, config.pretrained)
    file = () if config.captions in SOURCES else (Path(config.captions),)
    return Touches((*config.stores, *weights, *file), (config.out,), (Path(f"{config.out}.partial"),))


@dataclasses.dataclass(frozen=True)
class Captioned:
    """The frames of all stores that have captions.

    Attributes:
        rows: (N,) frame, counted through all stores.
        episode: (N,) its episode, counted through all stores.
        captions: N tuples of sentences.
        grades: (N,) in [0, 1], how far along the task, or None.
    """

    rows: np.ndarray
    episode: np.ndarray
    captions: list[tuple[str, ...]]
    grades: np.ndarray | None

    def take(self, chosen: np.ndarray) -> "Captioned":
        """The frames numbered `chosen`, which may repeat."""
        captions = [self.captions[number] for number in chosen]
        return Captioned(
            self.rows[chosen], self.episode[chosen], captions, None if self.grades is None else self.grades[chosen]
        )


def pretrain_clip(config: PretrainClip, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import hash_file
    from embodied.datasets.store import EpisodeStore
    from embodied.pretrain import JoinedStores
    from embodied.vlm_rewards.caption_pairs import squashed
    from embodied.vlm_rewards.train_contrastive import check_run

    if not config.stores:
        raise InputError("pretrain clip needs at least one store.")
    check_run(config.out, config.steps, config.batch)  # before anything is read
    stores = [EpisodeStore(path) for path in config.stores]
    joined = JoinedStores(stores, config.camera)
    file = config.captions not in SOURCES
    found = _from_file(config, stores) if file else SOURCES[config.captions](config, stores)
    seen = np.flatnonzero(joined.has_pictures[found.episode])
    if len(seen) == 0:
        raise InputError(f"No frame of camera '{config.camera}' has a caption.")
    found = found.take(seen)
    episodes = np.unique(found.episode)
    held = _held_out(episodes, config)
    train = np.flatnonzero(~np.isin(found.episode, held))
    if config.captions == "simulator":
        train = _evenly(found, train, config.seed)
    name = f"observation/images/{config.camera}"

    def pairs(part: Captioned, size: int | None) -> Any:
        return _pairs(part, lambda rows: joined.read_rows(name, rows), size, squashed)

    size = config.image_size if config.model == SMALL else None
    judged = found.take(np.flatnonzero(np.isin(found.episode, held)))
    if len({sentence for row in judged.captions for sentence in row}) < 2:
        if len(held):
            progress.say("the held-out episodes have fewer than two sentences: retrieval is not measured")
        judged = None
    offsets = np.cumsum([0, *(store.num_episodes for store in stores)])
    inputs = {
        "stores": [
            {
                "fingerprint": store.fingerprint,
                "train": [int(e - low) for e in np.setdiff1d(episodes, held) if low <= e < high],
                "held_out": [int(e - low) for e in held if low <= e < high],
            }
            for store, low, high in zip(stores, offsets[:-1], offsets[1:], strict=True)
        ],
        "camera": config.camera,
        "captions": hash_file(Path(config.captions)) if file else config.captions,
    }
    training = pairs(found.take(train), size)
    losses, measured = _train(config, training, judged and pairs(judged, size), inputs, progress)
    return {
        "model": str(config.out),
        "frames": len(np.unique(found.rows[train])),
        "sentences": len(training.captions.sentences),
        "episodes": {"train": len(episodes) - len(held), "held_out": len(held)},
        "loss": {"first": losses[0], "last": float(np.mean(losses[-20:]))},
        "retrieval": measured,
    }


def _train(
    config: PretrainClip, training: Any, held_out: Any, inputs: dict[str, Any], progress: Progress
) -> tuple[list[float], dict[str, Any]]:
    from embodied.policies.configure import configure

    if config.model == SMALL:
        from embodied.vlm_rewards.train_clip import SmallClipConfig, train_on_pairs

        if config.device != "cpu" or config.pretrained:
            raise ConfigError("--model small is trained from scratch on the CPU: leave out --device and --pretrained.")
        settings = configure({SMALL: SmallClipConfig()}, SMALL, config.settings, "pretrain clip")
        return train_on_pairs(
            training,
            config.image_size,
            config.out,
            inputs,
            config.steps,
            config.batch,
            config.seed,
            held_out,
            settings,
            progress,
        )
    from embodied.vlm_rewards.finetune_clip import FinetuneConfig, finetune_clip

    tuned = configure({"finetune": FinetuneConfig()}, "finetune", config.settings, "pretrain clip")
    return finetune_clip(
        training,
        config.model,
        config.pretrained,
        config.out,
        inputs,
        config.steps,
        config.batch,
        config.seed,
        held_out,
        tuned,
        torch_device(config.device),
        progress,
    )


def _pairs(part: Captioned, read: Any, size: int | None, squashed: Any) -> Any:
    """`CaptionedFrames` of `part`; pictures come as the store has them, or `size` pixels wide and high."""
    from embodied.vlm_rewards.caption_pairs import CaptionedFrames, index_captions

    def by_number(numbers: np.ndarray) -> np.ndarray:
        return read(part.rows[numbers])

    captions = index_captions(part.captions, part.grades)
    return CaptionedFrames(squashed(by_number, size) if size else by_number, captions, part.grades, part.episode)


def _held_out(episodes: np.ndarray, config: PretrainClip) -> np.ndarray:
    """Whole episodes, drawn by the seed; none of a single one."""
    if not 0.0 <= config.holdout < 1.0:
        raise ConfigError(f"--holdout is {config.holdout}; it must lie in [0, 1).")
    count = round(config.holdout * len(episodes))
    if config.holdout > 0:
        count = min(max(1, count), len(episodes) - 1)
    order = np.random.Generator(np.random.Philox(key=[config.seed, 3])).permutation(len(episodes))
    return np.sort(episodes[order[:count]])


def _evenly(found: Captioned, train: np.ndarray, seed: int) -> np.ndarray:
    """As many frames as `train` has, drawn so that each grade comes about as often as the others."""
    assert found.grades is not None
    grades, of_frame = np.unique(found.grades[train], return_inverse=True)
    weight = 1 / np.bincount(of_frame, minlength=len(grades))[of_frame]
    rng = np.random.Generator(np.random.Philox(key=[seed, 7]))
    return train[rng.choice(len(train), size=len(train), p=weight / weight.sum())]


def _whole(stores: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Every frame of all stores and its episode, both counted through."""
    lengths = np.concatenate([store.episode_length for store in stores])
    return np.arange(lengths.sum()), np.repeat(np.arange(len(lengths)), lengths)


def _from_instructions(config: PretrainClip, stores: Sequence[Any]) -> Captioned:
    rows, episode = _whole(stores)
    said = [text.strip() for store in stores for text in store.instructions]
    chosen = np.flatnonzero(np.array([bool(text) for text in said])[episode])
    if len(chosen) == 0:
        raise InputError("No episode has an instruction. Write captions into a file: --captions FILE.")
    sentences = [(said[e],) for e in episode[chosen]]
    return Captioned(rows[chosen], episode[chosen], sentences, None)


def _from_simulator(config: PretrainClip, stores: Sequence[Any]) -> Captioned:
    from embodied.sim.captions import NUM_STAGES, stage, wordings
    from embodied.sim.suites import environment

    stages = []
    for store in stores:
        if store.spec.environment != "robosuite/Lift":
            raise InputError(
                f"{store.path}: --captions simulator knows the scenes of robosuite/Lift only; this store is of "
                f"'{store.spec.environment}'.\nUse --captions instruction or a file."
            )
        keys = environment("robosuite/Lift").truth_keys
        stages.append(stage(**{key: store.read(f"observation/{key}") for key in keys}))
    reached = np.concatenate(stages)
    captions = [wordings(int(number)) for number in reached]
    return Captioned(*_whole(stores), captions, reached / (NUM_STAGES - 1))


def _from_file(config: PretrainClip, stores: Sequence[Any]) -> Captioned:
    from embodied.vlm_rewards.frame_table import read_table

    path = Path(config.captions)
    if not path.is_file():
        raise InputError(f"--captions '{config.captions}' is no file; it takes {', '.join(SOURCES)} or a file.")
    if len(stores) != 1:
        raise InputError(f"--captions {path} numbers the episodes of one store; {len(stores)} stores are given.")
    (store,) = stores
    said: dict[int, list[str]] = {}
    for line, row in read_table(path, {"episode": int, "start": int, "stop": int, "caption": str}):
        number = row["episode"]
        if number >= store.num_episodes:
            raise InputError(f"{path} line {line}: {store.path} has episodes 0 to {store.num_episodes - 1}.")
        if not row["start"] < row["stop"] <= store.episode_length[number]:
            raise InputError(
                f"{path} line {line}: frames {row['start']} to {row['stop']} do not lie in episode {number}, "
                f"which has {store.episode_length[number]}; 'stop' is the frame after the last."
            )
        first = int(store.episode_start[number])
        for frame in range(first + row["start"], first + row["stop"]):
            said.setdefault(frame, []).append(row["caption"])
    rows = np.array(sorted(said), np.int64)
    episode = np.searchsorted(store.episode_start, rows, side="right") - 1
    return Captioned(rows, episode, [tuple(dict.fromkeys(said[int(row)])) for row in rows], None)


SOURCES = {"instruction": _from_instructions, "simulator": _from_simulator}


def as_text(result: dict[str, Any]) -> str:
    from embodied.config import plain_lines

    lines = plain_lines({key: value for key, value in result.items() if key != "retrieval"})
    for when, found in result["retrieval"].items():
        if found is not None:
            seen, said = found["image_to_text"], found["text_to_image"]
            lines.append(
                f"retrieval {when}: of {found['images']} frames of {found['episodes']} held-out episodes "
                f"{seen['mean']:.2f} [{seen['low']:.2f}, {seen['high']:.2f}] find a true sentence among "
                f"{found['sentences']} (chance {seen['chance']:.2f}); {said['mean']:.2f} of the sentences find a "
                f"fitting frame (chance {said['chance']:.2f})"
            )
    return "\n".join(lines)
