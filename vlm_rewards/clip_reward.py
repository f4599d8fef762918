"""CLIP rewards: how well a frame fits a goal sentence, sharpened by a baseline sentence (VLM-RM).

Rocamonde et al. 2023, "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning",
arXiv 2310.12921, definition 1. Frozen CLIP; nothing is learned here.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError, suggest

SHIPPED_MODEL = "clip-lift"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # what open_clip looks for in a local folder
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def goal_baseline_reward(
    image_embeddings: np.ndarray, goal: np.ndarray, baseline: np.ndarray | None = None, regularization: float = 0.0
) -> np.ndarray:
    """Goal-baseline regularized reward: 1 - |P (x - g)|^2 / 2, P = a d d^T / |d|^2 + (1 - a) I, d = g - b.

    P acts on x - g, not on x: it projects onto the line *through* g and b. a = 0 is the cosine (for unit g), and needs
    no baseline; a = 1 keeps only the coordinate along the line, a parabola with its maximum of 1 at g.

    Args:
        image_embeddings: (N, D) unit vectors x.
        goal: (D,) g; baseline: (D,) b.
        regularization: a in [0, 1].

    Returns:
        (N,) float64.

    Raises:
        ConfigError: a outside [0, 1], or above 0 with no baseline or one equal to the goal.
    """
    if not 0.0 <= regularization <= 1.0:
        raise ConfigError(f"regularization must lie in [0, 1]; got {regularization}.")
    offset = np.asarray(image_embeddings, np.float64) - np.asarray(goal, np.float64)  # (N, D)
    squared = np.einsum("nd,nd->n", offset, offset)
    if regularization == 0.0:
        return 1.0 - 0.5 * squared
    if baseline is None:
        raise ConfigError("regularization above 0 needs a baseline prompt; give one, or set regularization to 0.")
    direction = np.asarray(goal, np.float64) - np.asarray(baseline, np.float64)
    length = np.linalg.norm(direction)
    if length < 1e-6:
        raise ConfigError("Goal and baseline prompts have the same embedding; use sentences that differ in meaning.")
    along = offset @ (direction / length)  # (N,) the part of x - g that P keeps whole
    across = squared - along**2  # the part that P shrinks by 1 - a
    return 1.0 - 0.5 * (along**2 + (1.0 - regularization) ** 2 * across)


class FrameTransform:
    """A model's own preprocessing, for a whole batch of tensors instead of one PIL image at a time.

    Args:
        config: open_clip's preprocess_cfg: size, mean, std, interpolation, resize_mode.
        one_by_one: open_clip's transform of the same model, used where the batched form does not cover the config.
    """

    def __init__(self, config: dict[str, Any], one_by_one: Any) -> None:
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.config = config
        self.one_by_one = one_by_one
        self.mean = torch.tensor(config["mean"]).view(1, -1, 1, 1)
        self.std = torch.tensor(config["std"]).view(1, -1, 1, 1)

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float32, normalised."""
        mode = self.config["resize_mode"]
        height, width = frames.shape[1:3]
        square = self.size[0] == self.size[1]
        if mode == "longest" or (mode == "shortest" and not square):
            from PIL import Image

            return torch.stack([self.one_by_one(Image.fromarray(frame)) for frame in frames])
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        wanted = self.size
        if mode == "shortest":
            scale = self.size[0] / min(height, width)
            wanted = tuple(
                self.size[0] if side == min(height, width) else int(side * scale) for side in (height, width)
            )
        if wanted != (height, width):
            # In uint8, as PIL does: rounded and clipped after the resize, so that both paths agree to a grey level.
            interpolation = "bilinear" if self.config["interpolation"] == "bilinear" else "bicubic"
            pixels = functional.interpolate(
                pixels.contiguous(), size=wanted, mode=interpolation, antialias=True, align_corners=False
            )
        top, left = (round((have - want) / 2) for have, want in zip(wanted, self.size, strict=True))
        pixels = pixels[:, :, top : top + self.size[0], left : left + self.size[1]]
        return (pixels.float() / 255 - self.mean) / self.std


def locate(model: str, pretrained: str) -> tuple[str, str]:
    """The (model, pretrained) that open_clip understands, after checking what can be checked without loading.

    Raises:
        InputError: a folder without config or weights, an unknown model, an unknown tag.
        MissingExtraError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "clip", "CLIP labelling") from error
    folder = Path(__file__).parent / SHIPPED_MODEL if model == SHIPPED_MODEL else Path(model).expanduser()
    if model == SHIPPED_MODEL or folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"{folder} is no open_clip model: it has no open_clip_config.json.")
        # open_clip itself only logs a missing file and goes on with random weights.
        if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            raise InputError(f"{folder} has no weights: put open_clip_model.safetensors there.")
        return f"local-dir:{folder}", ""
    if model.startswith(("hf-hub:", "local-dir:")):
        return model, ""
    if model not in open_clip.list_models():
        similar = f" Similar names: {', '.join(close)}." if (close := _close(model)) else ""
        raise InputError(
            f"No folder and no open_clip model is called '{model}'.{similar}\n"
            f"--model takes {SHIPPED_MODEL}, a folder with open_clip_config.json, or a name of open_clip.list_models()."
        )
    if not pretrained:
        raise InputError(f"--model {model} needs --pretrained: a tag ({_tags(model)}) or a weights file.")
    file = Path(pretrained).expanduser()
    if not file.is_file() and pretrained not in open_clip.list_pretrained_tags_by_model(model):
        raise InputError(f"'{pretrained}' is neither a weights file nor a tag of {model} ({_tags(model)}).")
    return model, str(file) if file.is_file() else pretrained


def _close(model: str) -> list[str]:
    import difflib

    import open_clip

    return difflib.get_close_matches(model, [SHIPPED_MODEL, *open_clip.list_models()], n=4, cutoff=0.6)


def _tags(model: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    return ", ".join(tags[:6]) + (", ..." if len(tags) > 6 else "")


def load_open_clip(model: str, pretrained: str, precision: str, device: str) -> tuple[Any, FrameTransform, Any]:
    """(model in evaluation mode, its transform, its tokenizer).

    Raises:
        ConfigError: unknown precision.
        InputError: the model is unknown, damaged, or cannot be downloaded; says what to put where.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision '{precision}' is unknown.{suggest(precision, PRECISIONS)}")
    name, tag = locate(model, pretrained)
    import open_clip

    try:
        clip, _, one_by_one = open_clip.create_model_and_transforms(
            name, pretrained=tag or None, precision="fp32" if precision == "fp32" else "pure_bf16", device=device
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the hub raise many kinds; none of them says what to do
        if name.startswith("local-dir:") or Path(tag).is_file():
            raise InputError(f"Cannot load the CLIP model '{pretrained or model}': {_first_line(error)}") from error
        raise InputError(
            f"Cannot fetch the weights of {model} {pretrained}: {_first_line(error)}\n"
            "Download them where there is a network, then pass the file: "
            f"--model {model} --pretrained PATH/open_clip_model.safetensors (or a folder: --model FOLDER)."
        ) from error
    transform = FrameTransform(open_clip.get_model_preprocess_cfg(clip), one_by_one)
    return clip.eval().requires_grad_(False), transform, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256, hex, over names, types, shapes and bytes of the tensors: the same for any file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ClipLabeller:
    """Scores frames with CLIP. Satisfies `contracts.protocols.Labeller`.

    Several prompts are averaged and the mean is normalised again, unlike the reference code, so that
    regularization 0 is a cosine for any number of prompts.

    Args:
        goals: goal prompts, state sentences ("the cube is lifted above the table").
        baselines: neutral or opposite descriptions of the scene; needed for regularization above 0.
        regularization: strength in [0, 1]; see `goal_baseline_reward`.
        model: the shipped `clip-lift`, a folder in open_clip's format, an open_clip model name, or `hf-hub:...`.
        pretrained: for a model name: open_clip's tag or a weights file.
        batch: frames per forward pass. The last one is filled up, so that its length does not change the arithmetic;
            what remains of a frame's neighbours in its score is float32 rounding, below 1e-6.
        precision: `fp32`, or `bf16`, which is faster on CPUs with bf16 units and moves embeddings by about 1e-4.
        device: torch device.

    Attributes:
        unknown_words: words of the prompts that a small model was never trained on.

    Raises:
        ConfigError, InputError, MissingExtraError: as `goal_baseline_reward` and `load_open_clip`.
    """

    def __init__(
        self,
        goals: Sequence[str],
        baselines: Sequence[str] = (),
        regularization: float = 0.0,
        model: str = SHIPPED_MODEL,
        pretrained: str = "",
        batch: int = 256,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        if not goals or any(not prompt.strip() for prompt in [*goals, *baselines]):
            raise ConfigError("CLIP labelling needs at least one goal prompt, and no prompt may be empty.")
        if batch < 1:
            raise ConfigError(f"batch must be at least 1; got {batch}.")
        self._clip, self._transform, self._tokenizer = load_open_clip(model, pretrained, precision, device)
        self._batch, self._device, self._dtype = batch, device, PRECISIONS[precision]
        self.unknown_words = self._find_unknown_words([*goals, *baselines])
        if self.unknown_words:
            warnings.warn(f"{model} was not trained on the words {', '.join(self.unknown_words)}.", stacklevel=2)
        self._goal = self._mean_prompt(goals)
        self._baseline = self._mean_prompt(baselines) if baselines else None
        self._regularization = regularization
        # Wrong combinations are errors now, not after an hour of embedding.
        goal_baseline_reward(self._goal[None], self._goal, self._baseline, regularization)
        self.config: dict[str, Any] = {
            "model": model,
            "pretrained": pretrained,
            "weights_hash": hash_weights(self._clip),
            "goals": list(goals),
            "baselines": list(baselines),
            "regularization": regularization,
            "precision": precision,
            "preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in self._transform.config.items()},
        }

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, D) float32 unit vectors, `batch` frames at a time."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise InputError(f"Frames must be (N, H, W, 3) uint8; got {frames.shape} {frames.dtype}.")
        parts = []
        with torch.inference_mode():
            for start in range(0, len(frames), self._batch):
                pixels = self._transform(frames[start : start + self._batch])
                filling = pixels[-1:].expand(self._batch - len(pixels), -1, -1, -1)
                full = torch.cat([pixels, filling]).to(self._device, self._dtype)
                features = self._clip.encode_image(full)[: len(pixels)].float()
                parts.append(functional.normalize(features, dim=-1).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self._goal)), np.float32)

    def score(self, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N,) float32 rewards."""
        embeddings = self.embed(frames)
        return goal_baseline_reward(embeddings, self._goal, self._baseline, self._regularization).astype(np.float32)

    def embed_text(self, prompts: Sequence[str]) -> np.ndarray:
        """P prompts -> (P, D) float64 unit vectors."""
        with torch.inference_mode():
            features = self._clip.encode_text(self._tokenizer(list(prompts)).to(self._device)).double()
        return functional.normalize(features, dim=-1).cpu().numpy()

    def _mean_prompt(self, prompts: Sequence[str]) -> np.ndarray:
        mean = self.embed_text(prompts).mean(0)
        return mean / np.linalg.norm(mean)

    def _find_unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Words with a piece whose row in the token table is zero: `train_clip` leaves what it never saw so."""
        text = getattr(self._clip, "text", self._clip)
        table = getattr(text, "token_embedding", None)
        if table is None or not hasattr(self._tokenizer, "decoder"):
            return []
        words = sorted({word.strip(".,;:!?").lower() for prompt in prompts for word in prompt.split()})
        first, last = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        unknown = []
        for word in words:
            tokens = self._tokenizer([word])[0]
            inside = tokens[(tokens != 0) & (tokens != first) & (tokens != last)]
            if not table.weight[inside.to(table.weight.device)].any(dim=1).all():
                unknown.append(word)
        return unknown
