"""Goal pictures: frames of a store, or picture files, that show the task done."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.datasets.store import EpisodeStore

MOST = 16  # goal pictures taken where none are named


def goal_frames(store: EpisodeStore, camera: str, goals: Sequence[str] = ()) -> tuple[np.ndarray, list[str]]:
    """Pictures of the task done, as the camera would show it.

    Args:
        goals: each `EPISODE` (its final frame), `EPISODE:FRAME`, or a picture file, which is resized to the camera's
            frames. None: the final frames of the first successful episodes, at most MOST.

    Returns:
        (G, H, W, 3) uint8, and what each of them is, for the provenance.

    Raises:
        InputError: no such episode, frame or file, or no goal named and no episode known to have succeeded.
    """
    start, length, has = store.episode_start, store.episode_length, store.has_camera(camera)
    if not goals:
        succeeded = np.flatnonzero((store.success == 1) & has)[:MOST]
        if len(succeeded) == 0:
            raise InputError(
                f"{store.path} has no episode that is known to have succeeded.\n"
                "Name goal pictures: --goals EPISODE[:FRAME] or a picture file."
            )
        goals = [str(episode) for episode in succeeded]
    pictures, said = [], []
    for goal in goals:
        if Path(goal).is_file():
            pictures.append(_picture(Path(goal), store.spec.images[camera].shape))
            said.append(Path(goal).name)
            continue
        episode, _, frame = goal.partition(":")
        if not (episode.isdigit() and (frame.isdigit() or not frame)):
            raise InputError(f"--goals '{goal}' is neither EPISODE, EPISODE:FRAME nor a picture file.")
        number = int(episode)
        if number >= store.num_episodes or not has[number]:
            raise InputError(
                f"--goals '{goal}': {store.path} has no pictures of camera '{camera}' in episode {number}."
            )
        row = int(frame) if frame else int(length[number]) - 1
        if row >= length[number]:
            raise InputError(f"--goals '{goal}': episode {number} has frames 0 to {length[number] - 1}.")
        at = int(start[number]) + row
        pictures.append(store.frames(camera, at, at + 1)[0])
        said.append(f"episode {number} frame {row}")
    return np.stack(pictures), said


def _picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A picture file as (H, W, 3) uint8 of the camera's size."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "formats", "Reading goal pictures") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"--goals: {path} cannot be read as a picture: {error}.") from error
