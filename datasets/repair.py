"""`data doctor --repair`: a new store without what the doctor can mend. The old one stays as it is.

What it does, and the finding that each answers:

- leaves out episodes that hold NaN or infinities [not-finite], whose time goes back [clock-backwards], or that have no
  valid step [short-episode];
- cuts episodes at ends inside them [end-inside] and at jumps [jump]; parts of one or two frames are left out;
- leaves out all but the first of equal episodes [duplicate-episode];
- clears `truncated` where a step is terminal [terminal-and-timeout], and `step_valid` on a last row that is not
  terminal [no-successor];
- with `drop_constant`, leaves out observations of which no element ever changes [constant-column].
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.doctor import FLAGS, new_columns
from embodied.datasets.doctor_checks import SHORT_FRAMES, listed
from embodied.datasets.doctor_columns import Column, jumps
from embodied.datasets.duplicates import content_names, digest_rows, frames_digest, rows_of_episodes
from embodied.datasets.edit import Edit, Progress, without_keys, write_edit
from embodied.datasets.episode import Episode
from embodied.datasets.finding import Finding
from embodied.datasets.pieces import Piece
from embodied.datasets.store import EpisodeStore

ROUNDS = 10  # cutting changes what an ordinary step is, so jumps are looked for again


@dataclasses.dataclass
class Plan:
    """What is left of a store.

    Attributes:
        left_out: episode -> the check that it fails.
        cuts: episode -> row that starts a new part -> the check that asks for the cut.
        duplicates: (episode, first row) of parts that are there already.
    """

    left_out: dict[int, str] = dataclasses.field(default_factory=dict)
    cuts: dict[int, dict[int, str]] = dataclasses.field(default_factory=dict)
    duplicates: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    def parts(self, episode: int, rows: dict[str, np.ndarray]) -> Iterator[tuple[int, int]]:
        """[start, stop) of the parts of an episode that can be learned from."""
        if episode in self.left_out:
            return
        length = len(rows["step_valid"])
        edges = [0, *sorted(self.cuts.get(episode, {})), length]
        for start, stop in itertools.pairwise(edges):
            whole = (start, stop) == (0, length)
            if (whole or stop - start >= SHORT_FRAMES) and (episode, start) not in self.duplicates:
                yield start, stop


def repair(
    store: EpisodeStore,
    path: Path,
    drop_constant: bool = False,
    progress: Progress = lambda done, total, text: None,
) -> tuple[EpisodeStore, list[str]]:
    """Write the repaired store; gives it, and one line for each thing done.

    Raises:
        InputError: nothing would be left.
        StoreError: the new store exists, or the old one is damaged: chunks that are gone cannot be repaired.
    """
    plan = Plan()
    columns = new_columns(store, store.num_frames)
    for episode, rows in rows_of_episodes(store, [*columns, *FLAGS, "timestamp"]):
        _look_at(plan, store, episode, rows, list(columns))
    for _ in range(ROUNDS):
        plan.duplicates |= _duplicates(store, plan)
        columns = _filled(store, plan)
        if not _cut_jumps(store, plan, columns):
            break
    pieces, changed = _pieces(store, plan)
    constant = [key for key in store.spec.observations if _is_constant(columns[f"observation/{key}"])]
    dropped = constant if drop_constant else []
    done = _lines(store, plan, changed, dropped)
    if not pieces:
        raise InputError(f"{store.path}: nothing would be left. {' '.join(done)}")
    spec = without_keys(store, dropped)

    def change(piece: Piece, episode: Episode) -> Episode:
        del piece
        episode = dataclasses.replace(
            episode,
            truncated=episode.truncated & ~episode.terminated,
            step_valid=episode.step_valid.copy(),
            observations={key: episode.observations[key] for key in spec.observations},
        )
        episode.step_valid[-1] &= episode.terminated[-1]
        return episode

    findings = [Finding("repaired", "note", line) for line in done]
    config = {"repair": True, "drop_constant": drop_constant}
    edit = Edit(Path(path), "data doctor", config, [store], pieces, spec, None, change, findings)
    return write_edit(edit, progress).store, done


def _look_at(plan: Plan, store: EpisodeStore, episode: int, rows: dict[str, np.ndarray], names: list[str]) -> None:
    """What one episode's own rows ask for."""
    if not all(np.isfinite(rows[name]).all() for name in [*names, "timestamp"]):
        plan.left_out[episode] = "not-finite"
    elif (np.diff(rows["timestamp"]) < 0).any():
        plan.left_out[episode] = "clock-backwards"
    elif store.spec.action is not None and not rows["step_valid"].any():
        plan.left_out[episode] = "short-episode"
    valid = rows["step_valid"]
    ended = rows["terminated"] | rows["truncated"]
    for row in np.flatnonzero(ended).tolist():
        # A row after the end without a valid step, or the very last one, is its final observation.
        final = row + 1 < len(valid) and not ended[row + 1] and (not valid[row + 1] or row + 2 == len(valid))
        after = row + 2 if final else row + 1
        if after < len(valid):
            plan.cuts.setdefault(episode, {})[after] = "end-inside"


def _duplicates(store: EpisodeStore, plan: Plan) -> set[tuple[int, int]]:
    """(episode, first row) of parts whose content an earlier part has."""
    names = content_names(store)
    earlier: dict[tuple[object, ...], list[tuple[int, int, int]]] = {}
    found = set()
    for episode, rows in rows_of_episodes(store, [*names, *FLAGS]):
        for start, stop in plan.parts(episode, rows):
            key = (stop - start, *(digest_rows(rows[name][start:stop]) for name in names))
            for other in earlier.setdefault(key, []):
                if all(
                    frames_digest(store, camera, *other) == frames_digest(store, camera, episode, start, stop)
                    for camera in store.spec.images
                ):
                    found.add((episode, start))
                    break
            else:
                earlier[key].append((episode, start, stop))
    return found


def _filled(store: EpisodeStore, plan: Plan) -> dict[str, Column]:
    """Columns over what is left, exactly as the doctor will see them in the new store."""
    parts = {episode: list(plan.parts(episode, rows)) for episode, rows in rows_of_episodes(store, ["step_valid"])}
    columns = new_columns(store, sum(stop - start for found in parts.values() for start, stop in found))
    for episode, rows in rows_of_episodes(store, list(columns)):
        for start, stop in parts[episode]:
            for name, column in columns.items():
                column.add(rows[name][start:stop])
                column.add_steps(rows[name][start:stop])
    return columns


def _cut_jumps(store: EpisodeStore, plan: Plan, columns: dict[str, Column]) -> bool:
    """Add the cuts at jumps; whether there are new ones."""
    names = [name for name in columns if name.startswith("observation/")]
    limits = {name: columns[name].jump_limit() for name in names}
    new = False
    for episode, rows in rows_of_episodes(store, [*names, "step_valid"]):
        for start, stop in list(plan.parts(episode, rows)):
            for jump in jumps({name: rows[name][start:stop] for name in names}, columns, limits):
                if not jump.alone:
                    plan.cuts.setdefault(episode, {})[start + jump.row] = "jump"
                    new = True
    return new


def _pieces(store: EpisodeStore, plan: Plan) -> tuple[list[Piece], dict[str, list[int]]]:
    """What is left, in order; and check -> episodes in which flags are set right."""
    pieces, changed = [], {"terminal-and-timeout": [], "no-successor": []}
    for episode, rows in rows_of_episodes(store, list(FLAGS)):
        parts = list(plan.parts(episode, rows))
        length = len(rows["step_valid"])
        pieces += [Piece(0, episode, start, None if stop == length else stop) for start, stop in parts]
        if parts and (rows["terminated"] & rows["truncated"]).any():
            changed["terminal-and-timeout"].append(episode)
        if parts and rows["step_valid"][-1] and not rows["terminated"][-1]:
            changed["no-successor"].append(episode)
    return pieces, changed


def _is_constant(column: Column) -> bool:
    return len(column.constant()) == len(column.names)


def _lines(store: EpisodeStore, plan: Plan, changed: dict[str, list[int]], dropped: list[str]) -> list[str]:
    lines = []
    for check in dict.fromkeys(plan.left_out.values()):
        episodes = [episode for episode, why in plan.left_out.items() if why == check]
        lines.append(f"left out {_episodes(episodes)} [{check}]")
    if whole := sorted(episode for episode, start in plan.duplicates if start == 0 and episode not in plan.cuts):
        lines.append(f"left out {_episodes(whole)}, there already [duplicate-episode]")
    if parts := len(plan.duplicates) - len(whole):
        lines.append(f"left out {parts} parts of episodes, there already [duplicate-episode]")
    for check in ("end-inside", "jump"):
        episodes = [e for e, cuts in plan.cuts.items() if e not in plan.left_out and check in cuts.values()]
        if episodes:
            count = sum(list(plan.cuts[episode].values()).count(check) for episode in episodes)
            lines.append(f"cut {_episodes(sorted(episodes))} at {count} places [{check}]")
    words = {
        "terminal-and-timeout": "cleared 'truncated' at terminals",
        "no-successor": "cleared the last 'step_valid'",
    }
    lines += [f"{words[check]} in {_episodes(found)} [{check}]" for check, found in changed.items() if found]
    lines += [f"left out the observation '{key}' [constant-column]" for key in dropped]
    return lines


def _episodes(numbers: list[int]) -> str:
    return f"{len(numbers)} episode{'' if len(numbers) == 1 else 's'} ({listed(numbers)})"
