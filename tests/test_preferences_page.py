"""docs/preferences.md says what is true: its commands parse, its settings exist, its figures are the measured ones."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from embodied.cli import _parse
from embodied.config import Setting
from embodied.label_prefer import LabelPrefer, _configure, _own_settings, _settings
from embodied.verbs import VERBS, find_verb
from embodied.vlm_rewards.annotator_hf import HFConfig
from embodied.vlm_rewards.annotator_human import HumanConfig
from embodied.vlm_rewards.annotator_openai import OpenAIConfig, parse_address
from embodied.vlm_rewards.annotator_scripted import ScriptedConfig
from embodied.vlm_rewards.ask import AskConfig
from embodied.vlm_rewards.prefer import PreferConfig
from embodied.vlm_rewards.reward_model import RewardModelConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "preferences.md").read_text()
TABLES: dict[str, tuple[type, ...]] = {
    "`--ask NAME VALUE": (PreferConfig, AskConfig),
    "`--ask` with `openai:`": (OpenAIConfig,),
    "`--ask` with `hf:`": (HFConfig,),
    "`--ask` with `human:`": (HumanConfig,),
    "`--ask` with `scripted:`": (ScriptedConfig,),
    "`--fit NAME VALUE": (RewardModelConfig,),
}


def commands() -> list[list[str]]:
    """Every command in a code block."""
    blocks = re.findall(r"```\n(.*?)```", TEXT, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.strip()]


def own_config(annotator: str) -> Any:
    kind, _, rest = annotator.partition(":")
    if kind == "openai":
        return OpenAIConfig(*parse_address(rest))
    return {"hf": lambda: HFConfig(rest), "human": HumanConfig, "scripted": ScriptedConfig}[kind]()


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_every_command_parses_with_its_settings(words: list[str]) -> None:
    name = " ".join(words[:2])
    assert name in VERBS
    config = _parse(name, find_verb(name).load(), words[2:])
    if not isinstance(config, LabelPrefer):
        return
    settings = _settings(config)
    for annotator in filter(None, (config.annotator, config.person)):
        kind = annotator.partition(":")[0]
        own = _own_settings(kind, config, settings["own"])
        assert kind == "file" or _configure(own_config(annotator), own, "--ask")
    _configure(RewardModelConfig(), {k: v for k, v in config.fit.items() if k != "frame_label"}, "--fit")


def test_each_annotator_has_a_command() -> None:
    asked = [words[words.index("--annotator") + 1] for words in commands() if "--annotator" in words]
    assert {text.partition(":")[0] for text in asked} == {"openai", "hf", "human", "scripted", "file"}


def as_text(value: Setting | tuple[Any, ...]) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"


@pytest.mark.parametrize("heading", TABLES)
def test_the_tables_hold_every_setting_and_its_default(heading: str) -> None:
    part = TEXT.partition("## Settings")[2].partition(heading)[2]
    table = part.partition("|---|---|---|\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", table, re.M)
    assert len(rows) == len(table.strip().splitlines())
    wanted = {
        field.name: as_text(field.default)  # type: ignore[arg-type]
        for kind in TABLES[heading]
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING and not (kind is PreferConfig and field.name == "pairs")
    }
    assert {name: default for name, default, _ in rows} == wanted


def test_the_seed_of_the_draw_is_no_setting_of_a_model() -> None:
    """Both have one with a script; a model has none and must not be told."""

    def own(annotator: str) -> dict[str, Setting]:
        config = LabelPrefer(Path("s"), "n", "t", annotator, ask={"seed": 3, "max_calls": 9})
        assert _settings(config)["pairs"].seed == 3
        return _settings(config)["own"]

    assert own("scripted:source") == {"seed": 3}
    assert own("openai:m@http://x") == own("hf:x") == own("human:") == {}


def test_settings_named_in_the_text_exist() -> None:
    """What stands in backquotes and looks like a setting or a flag is one."""
    settings = {field.name for kinds in TABLES.values() for kind in kinds for field in dataclasses.fields(kind)}
    settings |= {"max_calls", "max_cost", "frame_label"}
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(LabelPrefer)}
    text = TEXT.partition("## What was measured")[0]
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        for flag in re.findall(r"--[a-z-]+", quoted):
            assert flag in flags | {"--reward"}, quoted
        for match in re.finditer(r"--(?:ask|fit) (\w+) \S+(?: (\w+) \S+)?", quoted):
            assert set(filter(None, match.groups())) <= settings, quoted
        if re.fullmatch(r"[a-z]+(_[a-z]+)+", quoted) and not quoted.startswith("first_"):
            assert quoted in settings, quoted


def test_figures_are_the_measured_ones() -> None:
    path = ROOT / "benchmarks" / "results" / "preference_labels.json"
    figures = json.loads(path.read_text())["figures"]

    def spoken(part: dict[str, float]) -> str:
        return f"{part['estimate']:.3f} [{part['low']:.3f}, {part['high']:.3f}]"

    shares = sorted(part["agreement"]["estimate"] for part in figures["human_and_script"].values())
    judged, lift = figures["libero_judgements"], figures["ipl_lift_segments"]["human"]
    text = " ".join(TEXT.split())
    assert f"{shares[0]:.3f} (hopper-medium) to {shares[-1]:.3f} (antmaze-large-play)" in text
    assert f"{spoken(judged['ties_wrong'])} of {judged['pairs']}, ties counted as wrong" in text
    assert f"in {spoken(judged['decided_only'])} of those with a side" in text
    assert f"IPL's {lift['pairs']} Lift pairs" in text
    assert f"{spoken(lift['accuracy'])} right on held-out pairs, {lift['majority']['estimate']:.3f} for" in text
