"""What the episodes of an RLDS dataset say about themselves: how they end, what they pay, which cameras they lack.

Makers of RLDS datasets fill in the flags as they please. A sample of the episodes is looked at before the import, so
that its user learns what was made of them.
"""

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.finding import Finding
from embodied.datasets.pictures import decode_picture, picture_shape
from embodied.datasets.rlds_features import Layout, Leaf
from embodied.datasets.rlds_shards import Shards
from embodied.datasets.tfrecord import Feature, read_example

NUM_SURVEYED = 200  # episodes, evenly spread
BLACK = 8  # JPEG keeps black below this


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of one episode.

    Attributes:
        num_steps: as the flags have it.
        columns: name -> (n,) float32, of those that the dataset has.
    """

    num_steps: int
    columns: dict[str, np.ndarray]

    def ends_with_observation(self) -> bool:
        """Whether the last step is marked `is_last`: by RLDS's rule only its observation counts."""
        return "is_last" in self.columns and bool(self.columns["is_last"][-1])

    def is_terminal(self) -> bool:
        return "is_terminal" in self.columns and bool(self.columns["is_terminal"][-1])

    def discount_ends(self) -> bool:
        """Whether the discount becomes 0 at the end; one that is 0 throughout says nothing."""
        discount = self.columns.get("discount", np.ones(1, np.float32))
        return bool((discount[-2:] == 0).any()) and bool(discount.any())


def read_flags(layout: Layout, example: Mapping[str, Feature]) -> Flags:
    """Raises InputError: no steps, lists of different lengths, a second start or an end before the last step."""
    columns = {
        name: leaf.values(example[leaf.path]).reshape(-1) for name, leaf in layout.flags.items() if leaf.path in example
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"its lists differ in length: {', '.join(f'{k} {v}' for k, v in lengths.items())}.")
    if lengths and not max(lengths.values()):
        raise InputError("it has no steps.")
    if "is_first" in columns and columns["is_first"][1:].any():
        raise InputError(f"a second episode starts within it: is_first at step {_first(columns['is_first'][1:]) + 1}.")
    if "is_last" in columns and columns["is_last"][:-1].any():
        raise InputError(
            f"it goes on after its end: is_last at step {_first(columns['is_last'])} of {lengths['is_last']}."
        )
    return Flags(max(lengths.values(), default=0), columns)


def shows_pictures(example: Mapping[str, Feature], leaf: Leaf) -> bool:
    """Whether a camera that the episode's metadata calls absent has a picture that is not black."""
    feature = example.get(leaf.path)
    if feature is None:
        return False
    # The stand-ins of an episode are mostly one picture: it is decoded once.
    return any(decode_picture(data, leaf.path).max() > BLACK for data in dict.fromkeys(feature.strings()))


def says_absent(example: Mapping[str, Feature], flag: Leaf) -> bool:
    """Whether `has_<camera>` is false in every step, or for the episode."""
    return flag.path in example and not flag.values(example[flag.path]).any()


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was seen.

    Attributes:
        num_seen: episodes that could be read, of those looked at.
        num_episodes: in all.
        counts: what -> in how many of the episodes seen.
        picture_shapes: camera -> (H, W, 3) of the first picture that could be read.
        unreadable: camera -> why no picture of it could be read.
    """

    num_seen: int
    num_episodes: int
    counts: Mapping[str, int]
    picture_shapes: dict[str, tuple[int, int, int]]
    unreadable: dict[str, str]

    def absent(self) -> list[str]:
        """Cameras that every episode calls absent, and that are black in each. Empty unless every one was seen."""
        whole = self.num_seen == self.num_episodes
        return [name for name in self.picture_shapes if whole and self.counts.get(f"absent {name}") == self.num_seen]

    def findings(self, layout: Layout, keeps_last: bool) -> list[Finding]:
        """What the user should know. `keeps_last`: the step marked `is_last` counts as a step."""
        found = []

        def report(what: str, severity: str, message: str, advice: str = "") -> None:
            if count := self.counts.get(what, 0):
                found.append(Finding(what, severity, f"{self._of(count)} {message}", advice))

        report(
            "no-last-step",
            "warning",
            "have no step marked is_last: windows, or recordings that were cut. Every step counts; "
            "the last has no successor.",
        )
        if not keeps_last:
            report(
                "paid-last-step",
                "warning",
                "pay a reward on the step marked is_last, where RLDS says only the observation is valid: left out.",
                "Keep action and reward of that step: --options last_step step.",
            )
        report(
            "early-terminal",
            "warning",
            "have is_terminal before their last step: it cuts nothing there.",
            "See what the dataset's maker means by it.",
        )
        report(
            "discount-disagrees",
            "warning",
            "end with a discount of 0, but not with is_terminal: taken as terminated.",
            "See which of the two the dataset's maker means.",
        )
        report("terminal-discount", "note", "end with is_terminal, but a discount above 0: taken as terminated.")
        report("instruction-changes", "note", "change their instruction on the way: the first one is kept.")
        if self.num_seen and self.counts.get("reward-zero") == self.num_seen:
            report("reward-zero", "note", "pay no reward: it is 0 in every step.", "Label the store before training.")
        for camera, leaf in layout.camera_flags.items():
            if count := self.counts.get(f"present {camera}", 0):
                message = (
                    f"{self._of(count)} say {leaf.name} = False, but their '{camera}' shows pictures: they are kept."
                )
                found.append(
                    Finding("camera-flag", "warning", message, "Leave the camera out with --drop-keys if not.")
                )
        for camera, shape in self.picture_shapes.items():
            declared = layout.cameras[camera].shape
            if any(size not in (None, real) for size, real in zip(declared, shape, strict=True)):
                message = f"features.json says pictures of {declared[:2]} for '{camera}'; they have {shape[:2]}."
                found.append(Finding("picture-size", "warning", message, "The pictures count."))
        return found

    def _of(self, count: int) -> str:
        looked = "" if self.num_seen == self.num_episodes else f" looked at ({self.num_episodes} in all)"
        return f"{count} of {self.num_seen} episodes{looked}"


def survey(shards: Shards, layout: Layout) -> Survey:
    """Look at up to 200 episodes, one at a time. What cannot be read is left to the import, which lists it."""
    indices = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), NUM_SURVEYED)).round().astype(int))
    counts: collections.Counter[str] = collections.Counter()
    shapes: dict[str, tuple[int, int, int]] = {}
    unreadable: dict[str, str] = {}
    num_seen = 0
    for index in indices.tolist():
        try:
            example = read_example(shards.read(index))
            counts.update(_seen(layout, example))
            num_seen += 1
        except InputError:
            continue
        for camera in [camera for camera in layout.cameras if camera not in shapes]:
            leaf = layout.cameras[camera]
            try:
                first = next(example[leaf.path].strings()) if leaf.path in example else b""
                shapes[camera] = picture_shape(first, f"'{leaf.path}' of {shards.name(index)}")
            except (InputError, StopIteration) as error:
                unreadable.setdefault(camera, str(error) or "it has no pictures")
    return Survey(
        num_seen, len(shards), counts, shapes, {key: why for key, why in unreadable.items() if key not in shapes}
    )


def _seen(layout: Layout, example: Mapping[str, Feature]) -> list[str]:
    """What is so in one episode."""
    flags = read_flags(layout, example)
    reward, terminal = flags.columns.get("reward"), flags.columns.get("is_terminal")
    texts = [list(dict.fromkeys(example[leaf.path].strings())) for leaf in layout.instructions if leaf.path in example]
    last, discounted = flags.ends_with_observation(), "discount" in flags.columns
    seen = {
        "no-last-step": not last,
        "reward-zero": reward is not None and not reward.any(),
        "paid-last-step": reward is not None and last and bool(reward[-1]),
        "early-terminal": terminal is not None and bool(terminal[:-1].any()),
        "discount-disagrees": terminal is not None and not flags.is_terminal() and flags.discount_ends(),
        "terminal-discount": flags.is_terminal() and discounted and not flags.discount_ends(),
        "instruction-changes": bool(texts) and len(texts[0]) > 1,
    }
    for camera, flag in layout.camera_flags.items():
        if says_absent(example, flag):
            shown = shows_pictures(example, layout.cameras[camera])
            seen |= {f"present {camera}": shown, f"absent {camera}": not shown}
    return [what for what, is_so in seen.items() if is_so]


def _first(flags: np.ndarray) -> int:
    return int(np.argmax(flags != 0))
