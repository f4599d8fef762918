"""Open every export with the library whose format it is, and compare each value with what the store holds.

    python benchmarks/export_peers.py --work ~/.cache/embodied-peers

Makes one virtual environment per library below WORK with uv (lerobot pulls PyTorch: about 8 GB), or uses those that are
there. A generated store of 6 episodes, 2 cameras and 2 tasks is exported in all ways and opened there through the
library's own reader; what comes back is compared number by number. D4RL has no library that can still be installed:
tests/test_export_d4rl.py holds its file against the store.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PEERS = {
    "lerobot": [["lerobot==0.4.4"]],
    "minari": [["minari[hdf5]==0.5.3", "pillow"]],
    # robomimic's own requirements name libraries of its training scripts; its reader needs these.
    "robomimic": [
        ["torch==2.10.0", "torchvision==0.25.0", "numpy<2.3", "h5py", "tqdm", "termcolor", "psutil", "matplotlib"],
        ["tensorboard", "tensorboardX", "imageio"],
        ["--no-deps", "robomimic==0.3.0"],
    ],
}
EPISODES = (
    (40, True, True),
    (25, True, False),
    (33, True, True),
    (18, True, False),
    (29, True, True),
    (21, True, True),
)
SIDE = 96
# A file of each kind is ended early, so that several are read.
SMALL_FILES = {"data_files_size_in_mb": 0.015, "video_files_size_in_mb": 0.02}


# --- in the peer's environment ----------------------------------------------------------------------------------------


def open_lerobot(path: Path, sidecar: Path | None) -> dict[str, np.ndarray]:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("embodied/made", root=path, video_backend="pyav")
    found: dict[str, list[np.ndarray]] = {}
    for index in range(len(dataset)):
        item = dataset[index]
        task = item.pop("task")
        for key, value in {**item, "task": task}.items():
            found.setdefault(key, []).append(np.asarray(value))
    arrays = {key: np.stack(values) for key, values in found.items()}
    arrays["fps"] = np.array(dataset.fps)
    arrays["num_episodes"] = np.array(dataset.num_episodes)
    for key, of_key in dataset.meta.stats.items():
        arrays |= {f"stats/{key}/{name}": value for name, value in of_key.items()}
    window = LeRobotDataset(
        "embodied/made", root=path, video_backend="pyav", delta_timestamps={"action": [0.0, 1.0 / dataset.fps]}
    )
    arrays["action_window"] = np.stack([np.asarray(window[i]["action"]) for i in range(len(window))])
    if sidecar is not None:
        from lerobot.utils.rabc import RABCWeights

        weights = RABCWeights(sidecar, chunk_size=5, device="cpu")
        arrays["progress"] = np.array([weights.progress_lookup[i] for i in range(len(dataset))], np.float32)
    return arrays


def open_robomimic(path: Path, keys: list[str], cameras: list[str]) -> dict[str, np.ndarray]:
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys, "rgb": cameras}})
    dataset = SequenceDataset(
        str(path), (*keys, *cameras), ("actions", "rewards", "dones"), hdf5_cache_mode=None, load_next_obs=True
    )
    found: dict[str, list[np.ndarray]] = {}
    for index in range(len(dataset)):
        item = dataset[index]
        flat = {key: item[key] for key in ("actions", "rewards", "dones")}
        flat |= {f"{group}/{key}": item[group][key] for group in ("obs", "next_obs") for key in (*keys, *cameras)}
        for key, value in flat.items():
            found.setdefault(key, []).append(np.asarray(value)[0])
    filtered = SequenceDataset(
        str(path), tuple(keys), ("actions",), hdf5_cache_mode="all", filter_by_attribute="train", load_next_obs=True
    )
    return {key: np.stack(values) for key, values in found.items()} | {"filtered": np.array(len(filtered))}


def open_minari(path: Path) -> dict[str, np.ndarray]:
    import minari

    os.environ["MINARI_DATASETS_PATH"] = str(path.parent)
    dataset = minari.load_dataset(path.name)
    arrays: dict[str, np.ndarray] = {"total_steps": np.array(dataset.total_steps)}
    for number, episode in enumerate(dataset.iterate_episodes()):
        arrays |= {f"{number}/observations/{key}": value for key, value in episode.observations.items()}
        arrays |= {f"{number}/infos/{key}": value for key, value in episode.infos.items()}
        for name in ("actions", "rewards", "terminations", "truncations"):
            arrays[f"{number}/{name}"] = getattr(episode, name)
        observation = {key: value[0] for key, value in episode.observations.items()}
        arrays[f"{number}/in_space"] = np.array(
            dataset.observation_space.contains(observation) and dataset.action_space.contains(episode.actions[0])
        )
    return arrays


def open_in_peer(peer: str, request: Path) -> None:
    """Runs in the peer's environment: read what `request` names and write it beside, with versions."""
    from importlib import metadata

    wanted = json.loads(request.read_text())
    path = Path(wanted["path"])
    if peer == "lerobot":
        arrays = open_lerobot(path, Path(wanted["sidecar"]) if wanted.get("sidecar") else None)
    elif peer == "robomimic":
        arrays = open_robomimic(path, wanted["keys"], wanted["cameras"])
    else:
        arrays = open_minari(path)
    np.savez(request.with_suffix(".npz"), allow_pickle=False, **arrays)  # type: ignore[arg-type]
    names = (peer, "torch", "torchvision", "numpy", "h5py", "av", "datasets", "pyarrow", "gymnasium", "pillow")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    request.with_suffix(".versions.json").write_text(json.dumps(versions))


# --- here -------------------------------------------------------------------------------------------------------------


class Comparison:
    """Counts values and keeps the largest difference per name."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.largest: dict[str, float] = {}

    def add(self, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
        if found.shape != wanted.shape:
            raise SystemExit(f"{name}: shape {found.shape} came back, {wanted.shape} is in the store")
        difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0)
        self.values[name] = self.values.get(name, 0) + found.size
        self.largest[name] = max(self.largest.get(name, 0.0), float(difference))

    def figures(self) -> dict:
        return {
            "values_compared": sum(self.values.values()),
            "max_abs_difference": self.largest,
            "equal_to_1e-12": max(self.largest.values()) < 1e-12,
        }


def environment(work: Path, peer: str) -> Path:
    """The Python of the peer's environment, made if it is absent."""
    python = work / peer / "bin" / "python"
    if not python.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--python", sys.executable, str(work / peer)], check=True)
        for packages in PEERS[peer]:
            subprocess.run([*uv, "pip", "install", "--python", str(python), *packages], check=True)
    return python


def ask(work: Path, peer: str, name: str, **request: object) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What the peer's library reads of an export, and the versions there."""
    file = work / f"{name}.json"
    file.write_text(json.dumps(request, default=str))
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [str(environment(work, peer)), __file__, "--open", peer, str(file)]
    subprocess.run(command, check=True, env={**os.environ, **quiet}, stdout=subprocess.DEVNULL)
    with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
        return dict(arrays), json.loads(file.with_suffix(".versions.json").read_text())


def joined(store, read) -> np.ndarray:
    """`read(episode, N)` of all episodes, one after the other; N steps each."""
    episodes = [store.episode(i) for i in range(store.num_episodes)]
    return np.concatenate([read(episode, len(episode) - 1) for episode in episodes])


def check_lerobot(work: Path, store, label, folder: Path, sidecar: Path | None, lossless: bool) -> dict:
    found, versions = ask(work, "lerobot", folder.name, path=folder, sidecar=sidecar)
    comparison = Comparison()
    for key in store.spec.observations:
        wanted = joined(store, lambda e, n, key=key: e.observations[key][:n])
        comparison.add(key, found[f"observation.{key}"].reshape(wanted.shape), wanted)
    comparison.add("action", found["action"], actions := joined(store, lambda e, n: e.action[:n]))
    reward = joined(store, lambda e, n: e.reward[:n])
    if sidecar is not None:
        starts, lengths = store.episode_start, store.episode_length
        reward = np.concatenate([label.score[a + 1 : a + n] for a, n in zip(starts, lengths, strict=True)])
        progress = np.concatenate([label.score[a : a + n - 1] for a, n in zip(starts, lengths, strict=True)])
        comparison.add("progress (sidecar)", found["progress"], progress)
    comparison.add("next.reward", found["next.reward"], reward)
    counts = store.episode_length - 1
    last = np.concatenate([np.arange(n) == n - 1 for n in counts])
    terminated = joined(store, lambda e, n: e.terminated[:n])
    comparison.add("next.done", found["next.done"], last)
    comparison.add("next.terminated", found["next.terminated"], terminated)
    comparison.add("next.truncated", found["next.truncated"], last & ~terminated)
    comparison.add("next.success", found["next.success"], last & np.repeat(store.success == 1, counts))
    comparison.add("episode_index", found["episode_index"], np.repeat(np.arange(store.num_episodes), counts))
    comparison.add("frame_index", found["frame_index"], np.concatenate([np.arange(n) for n in counts]))
    comparison.add("index", found["index"], np.arange(counts.sum()))
    comparison.add("timestamp", found["timestamp"], joined(store, lambda e, n: e.timestamp[:n].astype(np.float32)))
    following = np.minimum(np.arange(len(actions)) + 1, np.repeat(np.cumsum(counts) - 1, counts))
    comparison.add(
        "action, two steps by delta_timestamps", found["action_window"], np.stack([actions, actions[following]], 1)
    )
    if found["task"].tolist() != np.repeat(store.instructions, counts).tolist():
        raise SystemExit("lerobot: tasks differ")
    comparison.values["task"] = len(found["task"])
    comparison.add("stats mean and std of action", found["stats/action/mean"], actions.astype(np.float64).mean(0))
    comparison.add("stats mean and std of action", found["stats/action/std"], actions.astype(np.float64).std(0))
    pictures = {}
    for camera in store.spec.images:
        wanted = joined(store, lambda e, n, camera=camera: np.asarray(e.images[camera])[:n])
        came = np.rint(found[f"observation.images.{camera}"].transpose(0, 2, 3, 1) * 255)
        if lossless:
            comparison.add(f"pictures of {camera}", came, wanted)
        else:
            error = came - wanted.astype(np.float64)
            squares = float((error**2).mean())
            pictures[camera] = {
                "values": error.size,
                "max_abs_difference": float(np.abs(error).max()),
                "mean_abs_difference": round(float(np.abs(error).mean()), 3),
                "psnr_db": round(10 * np.log10(255**2 / squares), 1),
            }
    figures = comparison.figures() | {"versions": versions}
    return figures | ({"lossy_pictures": pictures} if pictures else {})


def check_robomimic(work: Path, store, path: Path, train: list[int]) -> dict:
    keys, cameras = list(store.spec.observations), list(store.spec.images)
    found, versions = ask(work, "robomimic", path.stem, path=path, keys=keys, cameras=cameras)
    comparison = Comparison()
    comparison.add("actions", found["actions"], joined(store, lambda e, n: e.action[:n]))
    comparison.add("rewards", found["rewards"], joined(store, lambda e, n: e.reward[:n]))
    comparison.add("dones", found["dones"], joined(store, lambda e, n: e.terminated[:n]))
    for group, first in (("obs", 0), ("next_obs", 1)):
        for key in keys:
            wanted = joined(store, lambda e, n, key=key, first=first: e.observations[key][first : n + first])
            comparison.add(f"{group}/{key}", found[f"{group}/{key}"], wanted)
        for camera in cameras:
            wanted = joined(store, lambda e, n, c=camera, first=first: np.asarray(e.images[c])[first : n + first])
            comparison.add(f"{group}/{camera}", found[f"{group}/{camera}"], wanted)
    comparison.add("steps of filter key 'train'", found["filtered"], (store.episode_length[train] - 1).sum())
    return comparison.figures() | {"versions": versions}


def check_minari(work: Path, store, folder: Path) -> dict:
    found, versions = ask(work, "minari", folder.name, path=folder)
    comparison = Comparison()
    comparison.add("total_steps", found["total_steps"], (store.episode_length - 1).sum())
    for number in range(store.num_episodes):
        episode = store.episode(number)
        steps = len(episode) - 1
        arrays = {
            key: array for key, array in episode.observations.items() if not store.spec.observations[key].privileged
        }
        arrays |= {camera: np.asarray(pictures) for camera, pictures in episode.images.items()}
        if found[f"{number}/observations/instruction"].tolist() != [episode.instruction] * len(episode):
            raise SystemExit("minari: instructions differ")
        comparison.values["observations/instruction"] = store.num_frames
        for key, array in arrays.items():
            comparison.add(f"observations/{key}", found[f"{number}/observations/{key}"], array)
        comparison.add("infos/qpos", found[f"{number}/infos/qpos"], episode.observations["info_qpos"])
        assert episode.action is not None
        assert episode.reward is not None
        comparison.add("infos/success", found[f"{number}/infos/success"][-1:], np.array([episode.success]))
        comparison.add("actions", found[f"{number}/actions"], episode.action[:steps])
        comparison.add("rewards", found[f"{number}/rewards"], episode.reward[:steps])
        comparison.add("terminations", found[f"{number}/terminations"], episode.terminated[:steps])
        comparison.add("truncations", found[f"{number}/truncations"], episode.truncated[:steps])
        comparison.add("in the declared spaces", found[f"{number}/in_space"], np.array(True))
    return comparison.figures() | {"versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "embodied-peers")
    parser.add_argument("--open", nargs=2, metavar=("PEER", "REQUEST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_in_peer(arguments.open[0], Path(arguments.open[1]))
        return
    import tempfile

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from export_stores import add_label, make_spec, make_store
    from record import write_result

    from embodied.datasets.exporter import export_dataset

    work = arguments.work.expanduser().resolve()
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = [0, 2, 5]
        spec = make_spec(side=SIDE)
        store = make_store(folder / "store", spec, EPISODES, attributes={"filter_keys": {"train": train}})
        label = add_label(store)
        export_dataset(store.path, folder / "sarm_progress.parquet", "progress", label="progress")
        figures: dict[str, dict] = {}
        ways = {
            "lerobot h264": ({**SMALL_FILES}, None),
            "lerobot av1": ({**SMALL_FILES, "codec": "av1"}, None),
            "lerobot embedded, label as reward, sidecar": ({**SMALL_FILES, "images": "embedded"}, "progress"),
        }
        for number, (name, (options, reward)) in enumerate(ways.items()):
            out = folder / f"lerobot-{number}"
            result = export_dataset(store.path, out, "lerobot", options, reward)
            sidecar = folder / "sarm_progress.parquet" if reward else None
            figures[name] = check_lerobot(work, store, label, out, sidecar, "embedded" in name)
            figures[name] |= {"files": len(result["files"]), "left_out": result["left_out"]}
        result = export_dataset(store.path, folder / "robomimic.hdf5", "robomimic", {"compress": "gzip"})
        figures["robomimic"] = check_robomimic(work, store, folder / "robomimic.hdf5", train)
        figures["robomimic"]["left_out"] = result["left_out"]
        result = export_dataset(store.path, folder / "made-v0", "minari")
        figures["minari"] = check_minari(work, store, folder / "made-v0") | {"left_out": result["left_out"]}
    write_result("export_peers", figures)


if __name__ == "__main__":
    main()
