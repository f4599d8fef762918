"""`embodied quickstart`: the shipped pipeline, from an empty folder to a report."""

import dataclasses
from pathlib import Path
from typing import Any

from embodied import pipeline
from embodied.progress import Progress
from embodied.verbs import Touches

PIPELINE = Path(__file__).parent / "quickstart.yaml"


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """The whole loop on a simulated Panda, offline: recordings, pre-training, CLIP labels, policies, evaluation,
    deployment over ROS 2 topics, a report. Started again, it goes on where it stopped.

    Attributes:
        out: folder for everything it makes.
        set: changes to the shipped pipeline, each STAGE.KEY=VALUE, for example collect.episodes=50.
        plan: only say which stages would run.
    """

    out: Path = Path("quickstart-out")
    set: tuple[str, ...] = ()
    plan: bool = False


def touches(config: Quickstart) -> Touches:
    return Touches(writes=(config.out,), resumable=True)


def quickstart(config: Quickstart, progress: Progress) -> dict[str, Any]:
    return pipeline.run(pipeline.Run(PIPELINE, config.out, config.set, config.plan), progress)


def as_text(result: dict[str, Any]) -> str:
    lines = [pipeline.as_text(result)]
    report = result["stages"].get("report", {}).get("result")
    if report:
        lines.append(f"  report  {report['report']}")
    return "\n".join(lines)
