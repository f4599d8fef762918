"""A policy bundle as one file for other runtimes: ONNX or torch.export, raw observations in, actions out.

    policy.onnx or policy.pt2   encoder, normaliser and actor in one graph, any batch size
    manifest.json               runtime, inputs in order, output, control period, hashes, the parity that was measured

The graph does what `BundlePolicy` does but for its memory of earlier steps and its dice: stacked observations, goal,
noise and the return still wanted are inputs, and `ExportedPolicy` brings them. An export whose answers differ from the
bundle's on the observations given is not written. The folder appears whole or not at all, and an altered file is
refused when it is read.
"""

import collections
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import BundleError, ConfigError, InputError, MissingExtraError, suggest
from embodied.contracts.provenance import hash_file
from embodied.datasets.draws import Stream, philox
from embodied.policies.actors import FlowActor, ReturnActor
from embodied.policies.bundle import BundlePolicy, load_policy
from embodied.policies.contract import PolicyContract
from embodied.policies.goal import IN_OBSERVATION, Goals, Pursuer, embedded

SCHEMA = 1
FILES = {"onnx": "policy.onnx", "torch": "policy.pt2"}
TOLERANCE = 1e-5  # of an action in [-1, 1]
OPSET = 18
ACTION, PAYS, WANTED = "action", "pays", "return_still_wanted"


class ExportedNetwork(torch.nn.Module):
    """Raw observations to actions in [-1, 1], the whole of `BundlePolicy` but for its memory and its dice.

    Inputs in the manifest's order: (B, ...) of every observation key and (B, H, W, 3) uint8 of every camera, or
    (B, N, ...) oldest first for a policy that sees stacks; (B, ...) of every key of the goal; then, for a flow that
    draws, noise (B, chunk * A), and for a policy that follows the return still wanted, that return (B,).
    Output: (B, A), or (B, chunk, A) for a policy that gives chunks; and with a return what the step pays (B,).
    """

    def __init__(self, policy: BundlePolicy) -> None:
        super().__init__()
        self.actor = policy._actor
        self.encoder = policy._encoder
        self.keys, self.cameras = len(policy.observation_spec), len(policy.image_spec)
        self.stack, self.chunk = policy.contract.stack, policy.contract.chunk
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", policy._mean.clone())
        self.register_buffer("std", policy._std.clone())
        self.goals = len(policy.goal_spec)
        self.goal_mean: Tensor
        self.goal_std: Tensor
        self.register_buffer("goal_mean", policy._goal.mean.clone())
        self.register_buffer("goal_std", policy._goal.std.clone())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch, skip = inputs[0].shape[0], 1 if self.stack == 1 else 2
        parts = [value.reshape(batch * self.stack, -1) for value in inputs[: self.keys]]
        if self.encoder is not None:
            pictures = inputs[self.keys : self.keys + self.cameras]
            parts += [self.encoder(images.reshape(batch * self.stack, *images.shape[skip:])) for images in pictures]
        x = ((torch.cat(parts, -1) - self.mean) / self.std).reshape(1, batch, -1)  # (1, B, N * D)
        if self.goals:
            first = self.keys + self.cameras
            goal = torch.cat([embedded(value, self.encoder) for value in inputs[first : first + self.goals]], -1)
            x = torch.cat([x, ((goal - self.goal_mean) / self.goal_std)[None]], -1)
        pays: tuple[Tensor, ...] = ()
        if isinstance(self.actor, FlowActor):
            noise = x.new_zeros(1, batch, self.actor.size) if self.actor.noise == "zero" else inputs[-1][None]
            actions = self.actor.generate(x, noise)
        elif isinstance(self.actor, ReturnActor):
            actions = self.actor(x, inputs[-1][None])
            pays = (self.actor.pays(x, actions)[0],)
        else:
            actions, _ = self.actor(x)
        actions = actions[0].clamp(-1.0, 1.0)
        return (actions if self.chunk == 1 else actions.reshape(batch, self.chunk, -1), *pays)


class ExportedPolicy(Pursuer[Goals]):
    """An exported policy with the bundle's own `reset`, `observe` and `act`: NumPy in, NumPy out."""

    def __init__(self, manifest: Mapping[str, Any], run: Any) -> None:
        self.manifest = manifest
        self.contract = PolicyContract.from_json(manifest["contract"])
        self.control_dt = self.contract.control_dt
        self.execute = self.contract.execute
        self._run = run
        self._noise = manifest["noise"]
        self._returns = manifest.get("returns")
        self.goal_spec = self.contract.goal
        self._goal = Goals(self.goal_spec)
        self.reset()

    def reset(self) -> None:
        """A new episode begins: forget what was seen and paid, and repeat the draws of a policy that draws."""
        self._seen: collections.deque[list[np.ndarray]] = collections.deque(maxlen=self.contract.stack)
        self._asked, self._wanted = 0, self._returns["target"] if self._returns else 0.0

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """See one step without acting."""
        row = self._checked({key: np.asarray(value)[None] for key, value in observation.items()})
        self._seen.extend([row] * (1 if self._seen else self.contract.stack))

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The actions from now on, (chunk, A): keys in SI units, `images/<camera>` (H, W, 3) uint8."""
        self.observe(observation)
        given = [np.stack(rows, 1) if self.contract.stack > 1 else rows[0] for rows in zip(*self._seen, strict=True)]
        goal = self._goal.pursued(observation) if self.goal_spec else []
        actions, *pays = self._run(given + goal + self._brought(1))
        if pays:
            self._wanted -= pays[0].item()
        return actions.reshape(self.contract.chunk, -1)

    def act_batch(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """First actions (B, A) of B observations that stand alone, towards the chosen goal.

        Raises:
            InputError: a policy that sees stacks or wants a return: one observation is not enough.
        """
        if self._returns:
            raise InputError("This policy follows the return still wanted in an episode; ask it step by step.")
        if self.contract.stack > 1:
            raise InputError(f"This policy sees the last {self.contract.stack} observations; ask it step by step.")
        given = self._checked(observations)
        batch, goal = len(given[0]), self._goal.pursued({}) if self.goal_spec else []
        actions = self._run(given + [np.repeat(value, batch, 0) for value in goal] + self._brought(batch))[0]
        return actions.reshape(batch, self.contract.chunk, -1)[:, 0]

    def _brought(self, batch: int) -> list[np.ndarray]:
        """What the graph takes beside observations and goal."""
        if self._returns:
            return [np.full(batch, self._wanted, np.float32)]
        if self._noise is None:
            return []
        rng = philox(self._noise["seed"], self._asked, Stream.FLOW_ACTING)
        self._asked += 1
        return [rng.standard_normal((1, batch, self._noise["size"]), dtype=np.float32)[0]]

    def _checked(self, observations: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """(B, ...) of every input but the noise."""
        specs = [(key, spec, np.dtype(np.float32)) for key, spec in self.contract.observations.items()]
        specs += [(f"images/{camera}", spec, np.dtype(np.uint8)) for camera, spec in self.contract.images.items()]
        given = []
        for name, spec, dtype in specs:
            if name not in observations:
                raise InputError(f"The observation lacks '{name}'. It has: {sorted(observations)}.")
            value = np.asarray(observations[name])
            if value.shape[1:] != spec.shape or (dtype == np.uint8 and value.dtype != np.uint8):
                raise InputError(
                    f"'{name}' is {value.dtype} {value.shape[1:]}; this policy takes {dtype} {spec.shape}."
                )
            given.append(np.ascontiguousarray(value, dtype))
        return given


def export_policy(
    bundle: str | Path,
    out: str | Path,
    kind: str,
    observations: Mapping[str, np.ndarray],
    where: str = "",
) -> dict[str, Any]:
    """Write `bundle` as a folder `out` for another runtime, and say how far its answers are from the bundle's.

    Args:
        kind: `onnx` or `torch`.
        observations: (n, ...) of every key and `images/<camera>`, real ones; (n, N, ...), oldest first, for a policy
            that sees stacks; (n, ...) of `goal/<key>` for one that pursues a goal. The parity is measured on them, one
            at a time, each asked twice, and all together.
        where: they are from, for the manifest.

    Returns:
        The manifest.

    Raises:
        ConfigError: unknown kind. BundleError: `out` exists, the bundle is unsound, or the answers differ by more than
            `TOLERANCE`. MissingExtraError: ONNX without its packages.
    """
    if kind not in FILES:
        raise ConfigError(f"There is no format '{kind}'.{suggest(kind, FILES)}")
    bundle, out = Path(bundle), Path(out)
    if out.exists():
        raise BundleError(f"{out} exists. Name another folder, or remove it first.")
    policy = load_policy(bundle)
    noise = _noise(policy)
    returns = {"target": policy._actor.target_return} if isinstance(policy._actor, ReturnActor) else None
    inputs = _inputs(policy.contract, noise, returns)
    wanted = _answers(policy, observations, policy.contract.stack)  # refuses what does not fit
    partial = out.parent / f".{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        runtime = _write(ExportedNetwork(policy).eval(), inputs, partial / FILES[kind], kind)
        manifest = {
            "kind": "exported policy",
            "schema": SCHEMA,
            "format": kind,
            "file": FILES[kind],
            "runtime": runtime,
            "inputs": inputs,
            "noise": noise,
            "returns": returns,
            "output": _output(policy.contract),
            "contract": policy.contract.to_json(),
            "source": {"bundle": bundle.name, "hashes": hash_file(bundle / "hashes.json")},
            "sha256": hash_file(partial / FILES[kind]),
        }
        exported = ExportedPolicy(manifest, _runner(partial / FILES[kind], manifest))
        manifest["parity"] = {**_parity(exported, observations, wanted), "observations": where}
        worst = manifest["parity"]["max_abs_difference"]
        if not worst <= TOLERANCE:
            raise BundleError(
                f"{out}: the exported policy differs from the bundle by {worst:.2g}; at most {TOLERANCE:g} is allowed. "
                "Nothing was written."
            )
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        partial.rename(out)
    except OSError as error:
        raise BundleError(f"{out}: could not write the export: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def load_exported(folder: str | Path) -> ExportedPolicy:
    """Read what `export_policy` wrote. BundleError: missing or altered. MissingExtraError: its runtime is not there."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["kind"] != "exported policy" or manifest["schema"] != SCHEMA or manifest["format"] not in FILES:
            raise BundleError(f"{folder}: schema {manifest['schema']} of a {manifest['kind']} cannot be read here.")
        path = folder / FILES[manifest["format"]]
        expected = manifest["sha256"]
        if not path.is_file():
            raise BundleError(f"{folder}: {path.name} is missing. Copy the whole folder again.")
        if hash_file(path) != expected:
            raise BundleError(
                f"{folder}: {path.name} was altered after it was written: its SHA-256 is not that in manifest.json.\n"
                "Copy the folder again, or export the bundle again."
            )
        return ExportedPolicy(manifest, _runner(path, manifest))
    except FileNotFoundError:
        raise BundleError(f"{folder} is no exported policy: it has no manifest.json.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder} cannot be read as an exported policy: {type(error).__name__}: {error}.") from None


def _inputs(
    contract: PolicyContract, noise: Mapping[str, Any] | None, returns: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The graph's inputs in their order; shapes are those behind the batch."""
    window = [] if contract.stack == 1 else [contract.stack]
    images = {f"images/{camera}": spec for camera, spec in contract.images.items()}
    specs = [(key, key, spec, window) for key, spec in (contract.observations | images).items()]
    specs += [(IN_OBSERVATION + key, key, spec, []) for key, spec in contract.goal.items()]
    found = []
    for name, key, spec, steps in specs:
        picture = key.startswith("images/")
        dtype, unit = ("uint8", "") if picture else ("float32", spec.unit)
        found.append({"name": name, "shape": [*steps, *spec.shape], "dtype": dtype, "unit": unit})
    if noise is not None:
        found.append({"name": "noise", "shape": [noise["size"]], "dtype": "float32", "unit": "standard normal"})
    if returns is not None:
        found.append({"name": WANTED, "shape": [], "dtype": "float32", "unit": "reward"})
    return found


def _output(contract: PolicyContract) -> dict[str, Any]:
    shape = [*([contract.chunk] if contract.chunk > 1 else []), int(np.prod(contract.action.shape))]
    return {"name": ACTION, "shape": shape, "dtype": "float32", "range": [-1, 1]}


def _noise(policy: BundlePolicy) -> dict[str, Any] | None:
    """What a policy that draws has to be given beside the observations."""
    actor = policy._actor
    if not isinstance(actor, FlowActor) or actor.noise == "zero":
        return None
    return {"size": actor.size, "seed": actor.noise_seed}


def _answers(policy: Any, observations: Mapping[str, np.ndarray], stack: int) -> np.ndarray:
    """(n, 2 * chunk, A) of windows, each as the beginning of an episode.

    Asked a second time, what a policy remembers of its first answer counts.
    """
    answers = []
    for row in range(len(next(iter(observations.values())))):
        policy.reset()
        window = {
            key: value[row] if stack > 1 and not key.startswith(IN_OBSERVATION) else value[row][None]
            for key, value in observations.items()
        }
        for step in range(stack - 1):
            policy.observe({key: value[step] for key, value in window.items() if len(value) == stack})
        last = {key: value[-1] for key, value in window.items()}
        answers.append(np.concatenate([policy.act(last), policy.act(last)]))
    policy.reset()
    return np.stack(answers)


def _write(network: ExportedNetwork, inputs: list[dict[str, Any]], path: Path, kind: str) -> dict[str, str]:
    """The graph as a file; what runs it."""
    examples = tuple(torch.zeros((2, *item["shape"]), dtype=getattr(torch, item["dtype"])) for item in inputs)
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' advice to their own developers
        program = torch.export.export(network, examples, dynamic_shapes=(tuple({0: batch} for _ in examples),))
        if kind == "torch":
            torch.export.save(program, path)
            return {"name": "torch", "call": "torch.export.load", "version": str(torch.__version__)}
        onnx = _onnx_packages()
        logger = logging.getLogger("onnxscript")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[item["name"] for item in inputs],
                output_names=[ACTION, PAYS] if inputs[-1]["name"] == WANTED else [ACTION],
                opset_version=OPSET,
                verbose=False,
            )
        finally:
            logger.setLevel(level)
        assert written is not None
        written.save(str(path))
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    opset = next(item.version for item in model.opset_import if item.domain == "")
    return {"name": "onnxruntime", "opset": str(opset), "version": _onnxruntime().__version__}


def _runner(path: Path, manifest: Mapping[str, Any]) -> Any:
    """List of (B, ...) arrays -> list of the outputs, (B, ...) each; one thread."""
    if manifest["format"] == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path).module()

        def run_torch(given: list[np.ndarray]) -> list[np.ndarray]:
            with torch.inference_mode():
                return [output.numpy() for output in module(*(torch.from_numpy(value) for value in given))]

        return run_torch
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item["name"] for item in manifest["inputs"]]
    return lambda given: session.run(None, dict(zip(names, given, strict=True)))


def _parity(exported: ExportedPolicy, observations: Mapping[str, np.ndarray], wanted: np.ndarray) -> dict[str, Any]:
    """Largest and mean difference from the bundle's answers, one observation at a time and all in one batch."""
    alone = _answers(exported, observations, exported.contract.stack)
    given = [
        np.ascontiguousarray(observations[i["name"]], i["dtype"])
        for i in exported.manifest["inputs"]
        if i["name"] in observations
    ]
    brought = [np.repeat(value, len(wanted), 0) for value in exported._brought(1)]  # as after each reset
    exported.reset()
    first = wanted[:, : exported.contract.chunk]
    together = exported._run(given + brought)[0].reshape(first.shape)
    gaps = np.concatenate([np.abs(alone - wanted), np.abs(together - first)], 1)
    worst = float(gaps.max()) if np.isfinite(gaps).all() else float("inf")
    return {"count": len(wanted), "max_abs_difference": worst, "mean_abs_difference": float(gaps.mean())}


def _onnx_packages() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export", "exporting to ONNX") from error
    return onnx


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export", "running an ONNX policy") from error
    return onnxruntime
