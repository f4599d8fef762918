"""`embodied label prefer`: preferences from a model, a person, a script or a file, and a reward fitted to them."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import Setting, check_result_path, plain_lines
from embodied.contracts.errors import ConfigError, InputError, LabelError
from embodied.label_files import SHIPPED, label_writes
from embodied.progress import Progress
from embodied.verbs import Touches

INPUTS = ("pixels", "state", "clip", "none")
KINDS = ("openai", "hf", "human", "scripted", "file")


@dataclasses.dataclass(frozen=True)
class LabelPrefer:
    """Ask which of two segments shows more of a task, keep the answers, fit a reward, score every frame by it.

    Attributes:
        store: an EpisodeStore.
        name: of the preference set and of the label set.
        task: one sentence, such as 'to open the drawer'.
        annotator: openai:MODEL@URL, hf:FOLDER, human:NAME, scripted:LABEL, file:PATH#WHO.
        pairs: how many to ask about.
        camera: whose frames are shown.
        inputs: pixels, state, clip, a folder of 'embodied pretrain'; none: only ask.
        person: human:NAME, who answers the share person_share.
        dry_run: say what it would cost, ask nothing.
        ask: length, strategy, both_orders, samples, person_share, max_calls, ...
        fit: network, members, ties, noisy, smoothing, frame_label, ...
        model: folder to keep the reward model in.
        report: HTML page to write.
    """

    store: Positional[Path]
    name: str
    task: str = ""
    annotator: str = ""
    pairs: int = 200
    camera: str = "side"
    inputs: str = "pixels"
    person: str = ""
    dry_run: bool = False
    ask: dict[str, Setting] = dataclasses.field(default_factory=dict)
    fit: dict[str, Setting] = dataclasses.field(default_factory=dict)
    model: Path | None = None
    report: Path | None = None


def touches(config: LabelPrefer) -> Touches:
    kind, _, rest = config.annotator.partition(":")
    reads = [config.store]
    if kind == "file":
        reads.append(Path(rest.partition("#")[0]))
    if kind == "scripted" and rest not in ("", "source"):
        reads.append(config.store / "labels" / rest)
    if frame_label := config.fit.get("frame_label"):
        reads.append(config.store / "labels" / str(frame_label))
    if config.inputs not in INPUTS:
        reads.append(Path(config.inputs))
    labels, staging = label_writes(config.store, config.name)
    more = [path for path in (config.model, config.report) if path]
    # Answers that are there already are used, so a set of preferences is an output only where nothing is fitted to it.
    made = (config.store / "preferences" / config.name,) if config.inputs == "none" else labels
    return Touches(tuple(reads), (*made, *more), staging)


def label_prefer(config: LabelPrefer, progress: Progress) -> dict[str, Any]:
    from embodied.data_info import label_summary
    from embodied.datasets.location import cache_folder
    from embodied.datasets.preferences import preference_names, read_preferences
    from embodied.datasets.store import EpisodeStore
    from embodied.vlm_rewards.answer_log import AnswerLog
    from embodied.vlm_rewards.prefer import gather, label_by_preferences
    from embodied.vlm_rewards.reward_model import RewardModelConfig, fit_reward_model

    store = EpisodeStore(config.store)
    store.frames(config.camera, 0, 0)
    check_result_path(config.report)
    if config.model and config.model.exists():
        raise LabelError(f"{config.model} exists already. Name another folder for the reward model.")
    there = config.name in preference_names(store)
    if config.inputs != "none" and not config.dry_run and config.name in store.label_names():
        if not there:
            raise LabelError(f"{config.store} has a label set '{config.name}' already.\nName another.")
        if config.report is None:
            raise LabelError(
                f"{config.store} has the label set '{config.name}'; --report FILE shows it, or name another."
            )
        return _shown(config, store, read_preferences(store, config.name))
    settings = _settings(config)
    learning = {key: value for key, value in config.fit.items() if key != "frame_label"}
    model_config = _configure(RewardModelConfig(), learning | _network(config), "--fit")
    if config.dry_run:
        return _estimate(config, settings)
    log = AnswerLog(cache_folder() / "answers.sqlite")
    inputs, about = (None, {}) if config.inputs == "none" else _inputs(config, store, progress)
    if there:
        found = read_preferences(store, config.name)
    else:
        annotator = _annotator(config.annotator, config, store, settings, log, progress)
        person = _annotator(config.person, config, store, settings, log, progress) if config.person else None
        try:
            found = gather(
                store,
                config.name,
                config.task,
                config.camera,
                annotator,
                settings["pairs"],
                settings["asking"],
                log,
                person,
                None if inputs is None else lambda pairs: fit_reward_model(inputs, pairs, model_config)[0],
                inputs,
                progress,
            )
        finally:
            for asked in (annotator, person):
                if hasattr(asked, "close"):
                    asked.close()  # type: ignore[union-attr]
    result: dict[str, Any] = {"preferences": _summary(found)}
    if inputs is not None:
        frame_label = config.fit.get("frame_label")
        pull = store.label(str(frame_label)).score if frame_label else None
        label, model, fitted = label_by_preferences(
            store, config.name, found, inputs, about, model_config, pull, progress
        )
        if config.model:
            model.save(config.model, label.provenance)
        result |= {"label": label_summary(label), "fit": fitted}
    if config.report:
        from embodied.label_prefer_page import write_page

        write_page(config.report, store, found, config.name)
        result["report"] = str(config.report)
    return result


def _shown(config: LabelPrefer, store: Any, preferences: Any) -> dict[str, Any]:
    """The page of what is there already."""
    from embodied.label_prefer_page import write_page

    assert config.report is not None
    write_page(config.report, store, preferences, config.name)
    return {"preferences": _summary(preferences), "report": str(config.report)}


def _summary(preferences: Any) -> dict[str, Any]:
    record = preferences.provenance
    return {
        "pairs": len(preferences),
        "annotators": list(preferences.annotators),
        "counts": record["counts"],
        "abstentions": record["abstentions"],
        "position_bias": record["position_bias"],
    }


def _network(config: LabelPrefer) -> dict[str, Any]:
    """The network that suits the inputs, where none is named."""
    return {} if "network" in config.fit else {"network": "cnn" if config.inputs == "pixels" else "mlp"}


def _settings(config: LabelPrefer) -> dict[str, Any]:
    """`pairs`, `asking` and what is left for the annotator under `own`."""
    from embodied.vlm_rewards.ask import AskConfig
    from embodied.vlm_rewards.prefer import PreferConfig

    left = dict(config.ask)
    found: dict[str, Any] = {}
    for key, kind in (("pairs", PreferConfig), ("asking", AskConfig)):
        names = {field.name for field in dataclasses.fields(kind)}
        mine = {name: left[name] for name in names & left.keys()}
        if key == "pairs":
            mine["pairs"] = config.pairs
        found[key] = _configure(kind(), mine, "--ask")
    shared = {field.name for kind in (PreferConfig, AskConfig) for field in dataclasses.fields(kind)}
    if config.annotator.startswith("scripted"):
        shared.remove("seed")  # it has one too
    found["budget"] = {name: left.pop(name) for name in ("max_calls", "max_cost") if name in left}
    return found | {"own": {name: value for name, value in left.items() if name not in shared}}


def _configure(base: Any, values: dict[str, Any], where: str) -> Any:
    """`base` with some settings changed; an unknown one or a wrong type is an error that names `where`."""
    from embodied.policies.configure import configure

    return configure({"": base}, "", values, where)


def _annotator(
    text: str, config: LabelPrefer, store: Any, settings: dict[str, Any], log: Any, progress: Progress
) -> Any:
    """Who `text` names."""
    import numpy as np

    kind, _, rest = text.partition(":")
    own = _own_settings(kind, config, settings["own"])
    if kind not in KINDS:
        raise ConfigError(f"--annotator '{text}' must start with one of {', '.join(KINDS)}.")
    if kind not in ("file", "scripted") and not config.task:
        raise ConfigError("--task is needed: one sentence that says what the robot should do.")
    if kind == "scripted":
        from embodied.vlm_rewards.annotator_scripted import ScriptedAnnotator, ScriptedConfig
        from embodied.vlm_rewards.prefer import truth_of

        source = rest or "source"
        return ScriptedAnnotator(truth_of(store, source), _configure(ScriptedConfig(), own, "--ask"), source)
    if kind == "file":
        from embodied.vlm_rewards.preference_files import FileAnnotator

        path, _, who = rest.partition("#")
        steps = np.flatnonzero(store.read("step_valid"))
        return FileAnnotator(Path(path), who, steps, store.episode_start)
    if kind == "openai":
        from embodied.vlm_rewards.annotator_openai import OpenAIAnnotator, OpenAIConfig, parse_address
        from embodied.vlm_rewards.answer_log import Budget, job_name

        model, url = parse_address(rest)
        settings_ = _configure(OpenAIConfig(model, url), own, "--ask")
        job = job_name({"store": store.fingerprint, "name": config.name})
        return OpenAIAnnotator(settings_, Budget(log, job, **settings["budget"]))
    if kind == "hf":
        from embodied.vlm_rewards.annotator_hf import HFAnnotator, HFConfig
        from embodied.vlm_rewards.answer_log import Budget, job_name

        local = _configure(HFConfig(rest), own, "--ask")
        job = job_name({"store": store.fingerprint, "name": config.name})
        return HFAnnotator(local, Budget(log, job, **settings["budget"]))
    if kind == "human":
        from embodied.vlm_rewards.annotator_human import HumanAnnotator, HumanConfig

        pace = HumanConfig(frames_per_second=min(max(1 / (store.spec.control_dt or 0.1), 5.0), 30.0))  # as it happened
        return HumanAnnotator(rest, _configure(pace, own, "--ask"), log, progress.say)
    raise InputError(f"--annotator {kind} is not built yet.")


def _own_settings(kind: str, config: LabelPrefer, left: dict[str, Any]) -> dict[str, Any]:
    """What of --ask is for this annotator; where a person helps a model, the page's settings are the person's."""
    if not config.person or config.annotator.startswith("human"):
        return dict(left)
    from embodied.vlm_rewards.annotator_human import HumanConfig

    page = {field.name for field in dataclasses.fields(HumanConfig)}
    return {name: value for name, value in left.items() if (name in page) == (kind == "human")}


def _inputs(config: LabelPrefer, store: Any, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """What the reward model sees of each frame, and what that is in words."""
    from embodied.vlm_rewards.prefer import CameraRows, state_rows

    if config.inputs == "pixels":
        return CameraRows(store, config.camera), {"kind": "pixels", "camera": config.camera}
    if config.inputs == "state":
        return state_rows(store), {"kind": "state"}
    if config.inputs == "clip":
        from embodied.vlm_rewards.clip_encoder import ClipEncoder
        from embodied.vlm_rewards.embeddings import embedding_name, frame_embeddings

        load = {"model": SHIPPED, "pretrained": "", "precision": "fp32", "device": "cpu"}
        encoder = ClipEncoder(**load)  # type: ignore[arg-type]
        vectors, _ = frame_embeddings(store, config.camera, encoder, load, 1, progress)
        return vectors, {"kind": "clip", "embeddings": embedding_name(store, config.camera, encoder)}
    from embodied.policies.bundle import load_value
    from embodied.policies.encode import encode_frames

    bundle = load_value(config.inputs)
    return encode_frames(bundle, store, config.camera, progress=progress), {
        "kind": "value bundle",
        "bundle": bundle.fingerprint,
        "camera": config.camera,
    }


def _estimate(config: LabelPrefer, settings: dict[str, Any]) -> dict[str, Any]:
    from embodied.vlm_rewards.annotator_openai import OpenAIConfig, estimate, parse_address
    from embodied.vlm_rewards.ask import questions

    count = len(questions(config.pairs, settings["asking"]))
    kind, _, rest = config.annotator.partition(":")
    result: dict[str, Any] = {"dry_run": True, "pairs": config.pairs, "questions": count}
    if kind == "openai":
        model, url = parse_address(rest)
        own = _configure(OpenAIConfig(model, url), _own_settings(kind, config, settings["own"]), "--ask")
        result |= estimate(own, count)
        budget = settings["budget"]
        limits = [(budget.get("max_calls"), result["calls"]), (budget.get("max_cost"), result["cost"])]
        result["within_budget"] = all(limit is None or value <= limit for limit, value in limits)
    if kind == "hf":
        from embodied.vlm_rewards.annotator_hf import HFConfig
        from embodied.vlm_rewards.vlm_prompts import STAGES

        most = settings["budget"].get("max_calls")
        own = _configure(HFConfig(rest), _own_settings(kind, config, settings["own"]), "--ask")
        result["calls"] = count * STAGES[own.stages]
        result["within_budget"] = most is None or result["calls"] <= most
    return result


def as_text(result: dict[str, Any]) -> str:
    return "\n".join(plain_lines(result))
