"""A policy bundle as one file for other runtimes: ONNX or torch.export, raw observations in, actions out.

    policy.onnx or policy.pt2   encoder, normaliser and actor in one graph, any batch size
    manifest.json               runtime, inputs in order, output, control period, hashes, the parity that was measured

The graph does what `BundlePolicy.act_batch` does; an export whose answers differ from the bundle's on the observations
given is not written. The folder appears whole or not at all, and an altered file is refused when it is read.
"""

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
from embodied.policies.bundle import BundlePolicy, PolicyContract, load_policy

SCHEMA = 1
FILES = {"onnx": "policy.onnx", "torch": "policy.pt2"}
TOLERANCE = 1e-5  # of an action in [-1, 1]
OPSET = 18


class ExportedNetwork(torch.nn.Module):
    """(B, ...) of every observation key and (B, H, W, 3) uint8 of every camera -> (B, A) actions in [-1, 1]."""

    def __init__(self, policy: BundlePolicy) -> None:
        super().__init__()
        self.actor = policy._actor
        self.encoder = policy._encoder
        self.keys = len(policy.observation_spec)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", policy._mean.clone())
        self.register_buffer("std", policy._std.clone())

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = [value.reshape(value.shape[0], -1) for value in inputs[: self.keys]]
        if self.encoder is not None:
            parts += [self.encoder(images) for images in inputs[self.keys :]]
        x = (torch.cat(parts, -1) - self.mean) / self.std  # (B, D)
        mean, _ = self.actor(x[None])
        return mean[0].clamp(-1.0, 1.0)


class ExportedPolicy:
    """An exported policy with the bundle's own `act`: NumPy in, NumPy out."""

    def __init__(self, manifest: Mapping[str, Any], run: Any) -> None:
        self.manifest = manifest
        self.contract = PolicyContract.from_json(manifest["contract"])
        self.control_dt = self.contract.control_dt
        self._run = run

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """One step's action (1, A) from keys in SI units and `images/<camera>` (H, W, 3) uint8."""
        return self.act_batch({key: np.asarray(value)[None] for key, value in observation.items()})

    def act_batch(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same for B observations: (B, A). InputError where one is missing or has another shape or type."""
        given = []
        for item in self.manifest["inputs"]:
            name, dtype = item["name"], np.dtype(item["dtype"])
            if name not in observations:
                raise InputError(f"The observation lacks '{name}'. It has: {sorted(observations)}.")
            value = np.asarray(observations[name])
            if value.shape[1:] != tuple(item["shape"]) or (dtype == np.uint8 and value.dtype != np.uint8):
                raise InputError(
                    f"'{name}' is {value.dtype} {value.shape[1:]}; this policy takes {dtype} {tuple(item['shape'])}."
                )
            given.append(np.ascontiguousarray(value, dtype))
        return self._run(given)


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
        observations: (N, ...) of every key and `images/<camera>`, real ones: the parity is measured on them, one at a
            time and all together.
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
    inputs = _inputs(policy.contract)
    wanted = policy.act_batch(observations)  # refuses what does not fit
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
            "output": {"name": "action", "shape": list(policy.action_spec.shape), "dtype": "float32", "range": [-1, 1]},
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


def _inputs(contract: PolicyContract) -> list[dict[str, Any]]:
    """The graph's inputs in their order."""
    keys = [
        {"name": key, "shape": list(spec.shape), "dtype": "float32", "unit": spec.unit}
        for key, spec in contract.observations.items()
    ]
    cameras = [
        {"name": f"images/{camera}", "shape": list(spec.shape), "dtype": "uint8", "unit": ""}
        for camera, spec in contract.images.items()
    ]
    return keys + cameras


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
                output_names=["action"],
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
    """List of (B, ...) arrays -> (B, A), one thread."""
    if manifest["format"] == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path).module()

        def run_torch(given: list[np.ndarray]) -> np.ndarray:
            with torch.inference_mode():
                return module(*(torch.from_numpy(value) for value in given)).numpy()

        return run_torch
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item["name"] for item in manifest["inputs"]]
    return lambda given: session.run(["action"], dict(zip(names, given, strict=True)))[0]


def _parity(exported: ExportedPolicy, observations: Mapping[str, np.ndarray], wanted: np.ndarray) -> dict[str, Any]:
    together = exported.act_batch(observations)
    alone = np.concatenate(
        [
            exported.act_batch({key: value[row : row + 1] for key, value in observations.items()})
            for row in range(len(wanted))
        ]
    )
    gaps = np.maximum(np.abs(together - wanted), np.abs(alone - wanted))  # (N, A)
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
