"""`embodied export`: a policy bundle for other runtimes, with proof that it still gives the same actions."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a policy bundle as ONNX or torch.export: raw observations in, actions out, any batch size.

    Attributes:
        bundle: folder of one policy bundle.
        out: folder to write: policy.onnx or policy.pt2, and manifest.json.
        store: EpisodeStore with the bundle's keys and cameras; the parity is measured on its frames.
        format: onnx (runs in onnxruntime) or torch (runs in torch).
        frames: of the store, drawn at random.
        seed: of that draw.
    """

    bundle: Positional[Path]
    out: Positional[Path]
    store: Path
    format: Literal["onnx", "torch"] = "onnx"
    frames: int = 256
    seed: int = 0


def touches(config: Export) -> Touches:
    return Touches((config.bundle, config.store), (config.out,))


def export(config: Export, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.store import EpisodeStore
    from embodied.policies.bundle import load_policy
    from embodied.policies.export_policy import export_policy

    if config.frames < 1:
        raise InputError("--frames: at least one observation is needed.")
    policy = load_policy(config.bundle)
    store = EpisodeStore(config.store)
    rows, observations = sample(policy, store, config.frames, config.seed)
    progress(1, 2, "exporting")
    manifest = export_policy(
        config.bundle, config.out, config.format, observations, f"{len(rows)} frames of {store.path}"
    )
    progress(2, 2, "exporting")
    return {"out": str(config.out), **{key: value for key, value in manifest.items() if key != "contract"}}


def sample(policy: Any, store: Any, count: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows drawn without replacement, in order, and what the policy sees there and is told to reach."""
    from embodied.policies.goal import IN_OBSERVATION

    keys = [*policy.observation_spec, *(f"images/{camera}" for camera in policy.image_spec)]
    seen = np.ones(store.num_episodes, bool)
    for key in [*keys, *policy.goal_spec]:
        name = key.removeprefix("images/")
        known = store.spec.observations if name == key else store.spec.images
        if name not in known:
            raise InputError(
                f"{store.path} has no '{name}', which the policy takes. It has: {', '.join(sorted(known))}."
            )
        if name != key:
            seen &= store.has_camera(name)
    candidates = np.flatnonzero(np.repeat(seen, store.episode_length))
    if len(candidates) == 0:
        raise InputError(f"{store.path} has no episode with all of the policy's cameras.")
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xE0]))
    rows = np.sort(rng.permutation(candidates)[:count])
    # The last frames of the same episode, oldest first, its first repeated where there are too few.
    stack = policy.contract.stack
    starts = np.repeat(store.episode_start, store.episode_length)[rows]
    windows = np.maximum(rows[:, None] + np.arange(1 - stack, 1), starts[:, None])  # (n, N)
    observations = {key: read(store, key, windows if stack > 1 else rows) for key in keys}
    # To reach what each episode ended with.
    ends = np.repeat(store.episode_start + store.episode_length - 1, store.episode_length)[rows]
    goals = {IN_OBSERVATION + key: read(store, key, ends) for key in policy.goal_spec}
    return rows, observations | goals


def read(store: Any, key: str, rows: np.ndarray) -> np.ndarray:
    """(*rows.shape, ...) of an observation key or `images/<camera>`."""
    if not key.startswith("images/"):
        return store.read(f"observation/{key}")[rows]
    camera, (wanted, place) = key.removeprefix("images/"), np.unique(rows, return_inverse=True)
    pictures = np.stack([np.asarray(store.frames(camera, row, row + 1))[0] for row in wanted.tolist()])
    return pictures[place.reshape(rows.shape)]


def as_text(result: dict[str, Any]) -> str:
    runtime, parity = result["runtime"], result["parity"]
    details = ", ".join(f"{key} {value}" for key, value in runtime.items() if key != "name")
    inputs = ", ".join(f"{item['name']} {item['dtype']} {tuple(item['shape'])}" for item in result["inputs"])
    return "\n".join(
        [
            f"{result['out']}/{result['file']}: runs in {runtime['name']} ({details})",
            f"takes {inputs}; gives {result['output']['name']} {tuple(result['output']['shape'])}",
            f"parity with the bundle over {parity['count']} real observations, one by one and together: "
            f"max |difference| {parity['max_abs_difference']:.2g}",
        ]
    )
