"""An episode as a recording of the Rerun viewer."""

from pathlib import Path

from embodied.contracts.errors import MissingExtraError
from embodied.datasets.store import EpisodeStore


def write_rerun(store: EpisodeStore, episode: int, path: Path) -> None:
    """Write `path` (.rrd). Raises MissingExtraError where rerun-sdk is not installed."""
    try:
        import rerun as rr  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtraError("rerun-sdk", None, "A recording for the Rerun viewer") from error

    start = int(store.episode_start[episode])
    labels = {f"label/{name}": store.label(name).score[start:] for name in store.label_names()}
    names = [name for name in store.names() if name == "reward" or name == "action" or "observation/" in name]
    cameras = [f"observation/images/{camera}" for camera in store.spec.images if store.has_camera(camera)[episode]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with rr.RecordingStream("embodied", recording_id=f"{store.fingerprint}/{episode}") as recording:
        recording.save(path)
        for row in range(int(store.episode_length[episode])):
            recording.set_time("frame", sequence=row)
            recording.set_time("time", duration=float(store.read("timestamp", start + row, start + row + 1)[0]))
            for name in names:
                if not name.startswith("observation/images/"):
                    recording.log(name, rr.Scalars(store.read(name, start + row, start + row + 1).reshape(-1)))
            for name in cameras:
                recording.log(name, rr.Image(store.read(name, start + row, start + row + 1)[0]).compress())
            for name, score in labels.items():
                recording.log(name, rr.Scalars(score[row : row + 1]))
