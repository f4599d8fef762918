"""Every verb of the command line, and what a verb is.

A verb is one file with a frozen dataclass (its whole configuration), a function `verb(config, progress) -> dict`
whose result is JSON-able, and `touches(config) -> Touches`. It may have `as_text(result) -> str` for people and
`exit_code(result) -> int` for scripts. Rooms are imported inside the function, so that help comes at once. A new verb
is one new file and one new line in `VERBS`.
"""

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embodied.contracts.errors import InputError, suggest


@dataclasses.dataclass(frozen=True)
class Touches:
    """The paths a configured verb reads and writes; a pipeline caches and orders by them.

    Attributes:
        reads: inputs; a label set is the path `<store>/labels/<name>`.
        writes: outputs. Each appears whole or is resumable.
        staging: where an interrupted run keeps its work, if not inside `writes`.
        resumable: outputs that the same command continues; the others must not exist when the verb starts.
    """

    reads: tuple[Path, ...] = ()
    writes: tuple[Path, ...] = ()
    staging: tuple[Path, ...] = ()
    resumable: bool = False


@dataclasses.dataclass(frozen=True)
class Verb:
    """Where a verb is and what help says.

    Attributes:
        target: `module:function`.
        summary: one line.
        code: rooms and files that a cached result depends on, beside the verb's file and what that imports.
    """

    target: str
    summary: str
    code: tuple[str, ...] = ()

    def load(self) -> "LoadedVerb":
        module_name, function_name = self.target.split(":")
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        config_type = typing.get_type_hints(function)[next(iter(inspect.signature(function).parameters))]
        as_text, exit_code = getattr(module, "as_text", None), getattr(module, "exit_code", None)
        return LoadedVerb(function, config_type, module.touches, as_text, exit_code)


@dataclasses.dataclass(frozen=True)
class LoadedVerb:
    """A verb whose file has been imported."""

    run: Callable[..., dict[str, Any]]
    config_type: type
    touches: Callable[[Any], Touches]
    as_text: Callable[[dict[str, Any]], str] | None
    exit_code: Callable[[dict[str, Any]], int] | None


VIEW_PAGES = ("datasets/episode.html", "datasets/episodes.html")

VERBS: dict[str, Verb] = {
    "quickstart": Verb("embodied.quickstart:quickstart", "the whole loop, offline, in minutes"),
    "run": Verb("embodied.pipeline:run", "run the stages of a pipeline file; unchanged ones are skipped"),
    "data import": Verb("embodied.data_import:data_import", "read recordings into an EpisodeStore"),
    "data export": Verb("embodied.data_export:data_export", "write a store in another library's format"),
    "data info": Verb("embodied.data_info:data_info", "what a store holds"),
    "data doctor": Verb("embodied.data_doctor:data_doctor", "what is wrong with stores, and what to do"),
    "data view": Verb("embodied.data_view:data_view", "a page per episode: frames, plots, labels", VIEW_PAGES),
    "data split": Verb("embodied.data_edit:data_split", "one store into several, whole episodes, no leaks"),
    "data merge": Verb("embodied.data_edit:data_merge", "several stores into one"),
    "data filter": Verb("embodied.data_edit:data_filter", "keep the episodes for which a condition holds"),
    "data drop": Verb("embodied.data_edit:data_drop", "leave episodes, observations or cameras out"),
    "sim collect": Verb("embodied.sim_collect:sim_collect", "record episodes in simulation"),
    "pretrain": Verb("embodied.pretrain:pretrain", "value pre-training on frames alone (ICVF)"),
    "pretrain clip": Verb("embodied.pretrain_clip:pretrain_clip", "a CLIP of your own scenes, from captions"),
    "label clip": Verb("embodied.label_clip:label_clip", "score every frame with CLIP"),
    "label value": Verb("embodied.label_value:label_value", "score every frame with a pre-trained value function"),
    "label goal": Verb("embodied.label_goal:label_goal", "score every frame by its likeness to goal pictures"),
    "label success": Verb("embodied.label_success:label_success", "learn success from a few marked frames"),
    "label prefer": Verb("embodied.label_prefer:label_prefer", "a reward from preferences: a VLM, people, a script"),
    "label import": Verb("embodied.label_import:label_import", "read LeRobot's progress sidecar as a label set"),
    "label truth": Verb("embodied.label_truth:label_truth", "the simulator's own reward, to compare with"),
    "label audit": Verb("embodied.label_audit:label_audit", "can a label be trusted? A verdict, with reasons"),
    "train bc": Verb("embodied.train:train_bc", "behaviour cloning, many seeds at once"),
    "train flow": Verb("embodied.train:train_flow", "behaviour cloning of action chunks by flow matching"),
    "train iql": Verb("embodied.train:train_iql", "implicit Q-learning, many seeds at once"),
    "train dynamics": Verb("embodied.train_dynamics:train_dynamics", "what an action leads to: an ensemble"),
    "train td3bc": Verb("embodied.train:train_td3bc", "TD3 held near the data by cloning, many seeds at once"),
    "train rebrac": Verb("embodied.train:train_rebrac", "TD3+BC with a penalty in the critics too, many seeds at once"),
    "train cql": Verb("embodied.train:train_cql", "conservative Q-learning, or Cal-QL, many seeds at once"),
    "train edac": Verb("embodied.train_model_based:train_edac", "the minimum of N diverse critics, many seeds at once"),
    "train ravl": Verb("embodied.train_model_based:train_ravl", "EDAC on rollouts of learned dynamics"),
    "train mbrcsl": Verb("embodied.train_mbrcsl:train_mbrcsl", "the best of behaviour imagined in dynamics, cloned"),
    "train mopo": Verb("embodied.train_model_based:train_mopo", "rollouts of learned dynamics, their doubt penalised"),
    "diagnose reach": Verb("embodied.diagnose_reach:diagnose_reach", "are values beyond the edge of reach believed?"),
    "eval": Verb("embodied.evaluate:evaluate", "success in simulation, with intervals"),
    "compare": Verb("embodied.compare:compare", "intervals of several results side by side"),
    "select": Verb("embodied.select:select", "rank checkpoints and seeds without a simulator"),
    "export": Verb("embodied.export:export", "a policy as ONNX or torch.export, with proof of parity"),
    "robot check": Verb("embodied.robot_check:robot_check", "what a robot profile allows and what it lacks"),
    "robot sim": Verb("embodied.robot_sim:robot_sim", "a MuJoCo robot on the ROS 2 graph"),
    "robot watch": Verb("embodied.robot_watch:robot_watch", "the running bridge on a terminal; an operator's keys"),
    "robot record": Verb("embodied.robot_record:robot_record", "a robot's topics as rosbag2 bags, one per episode"),
    "robot recover": Verb("embodied.robot_recover:robot_recover", "a whole bag of what a killed recorder left"),
    "robot doctor": Verb("embodied.robot_doctor:robot_doctor", "what is wrong on the ROS 2 graph, in plain words"),
    # Its processes are started by name, so imports do not show them.
    "deploy": Verb("embodied.deploy:deploy", "run a bundle on the ROS 2 graph, safely", ("robot_bridge",)),
    "report": Verb("embodied.report:report", "one HTML page of what was run and found", ("report.html",)),
    "info": Verb("embodied.info:info", "versions and devices, for bug reports"),
}


def find_verb(name: str) -> Verb:
    """Look up a verb by its words; an unknown one is an InputError with a suggestion."""
    if not isinstance(name, str):  # a pipeline's YAML may hold anything
        raise InputError(f"{name!r} is no verb; it must be text such as 'data info'.")
    if name not in VERBS:
        raise InputError(f"There is no verb '{name}'.{suggest(name, VERBS)}")
    return VERBS[name]
