"""`embodied data view`: look at episodes in a browser."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class DataView:
    """Write a self-contained HTML page per episode: frames beside plots of state, action, reward and labels, in step.

    Attributes:
        store: an EpisodeStore.
        out: HTML file, or a folder for several episodes, with an index; written anew.
        episode: numbers: 3,5:9 are 3, 5, 6, 7 and 8.
        rerun: also write the first of them as a recording for the Rerun viewer (.rrd).
    """

    store: Positional[Path]
    out: Path
    episode: str = "0"
    rerun: Path | None = None


def touches(config: DataView) -> Touches:
    return Touches((config.store,), (config.out, *([config.rerun] if config.rerun else [])))


def data_view(config: DataView, progress: Progress) -> dict[str, Any]:
    from embodied.data_edit import numbers
    from embodied.datasets.store import EpisodeStore
    from embodied.datasets.view import write_pages
    from embodied.datasets.view_rerun import write_rerun

    store = EpisodeStore(config.store)
    episodes = list(dict.fromkeys(numbers(config.episode, store.num_episodes, "--episode")))
    if config.rerun:
        write_rerun(store, episodes[0], config.rerun)
    pages = write_pages(store, episodes, config.out, progress)
    size = sum(page.stat().st_size for page in pages)
    return {"pages": [str(page) for page in pages], "size_mb": round(size / 1e6, 2)}


def as_text(result: dict[str, Any]) -> str:
    pages = result["pages"]
    more = f" and {len(pages) - 1} pages beside it" if len(pages) > 1 else ""
    return f"open in a browser: {pages[0]}{more} ({result['size_mb']} MB)"
