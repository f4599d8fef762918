"""Any open_clip model as an encoder of frames and sentences: the model's own weights, transform and tokenizer."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError, suggest

SHIPPED_MODEL = "clip-lift"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # what open_clip looks for in a local folder
# name -> (type of the weights, open_clip's name for it)
PRECISIONS = {
    "fp32": (torch.float32, "fp32"),
    "bf16": (torch.bfloat16, "pure_bf16"),
    "fp16": (torch.float16, "pure_fp16"),
}
# Frames per forward pass. Always this many: matrix products of another size round differently.
FORWARD_CPU, FORWARD_GPU = 32, 256


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
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise ConfigError("precision 'fp16' is for GPUs; on a CPU use 'bf16' or 'fp32'.")
    name, tag = locate(model, pretrained)
    import open_clip

    try:
        with _Unset():
            clip, _, one_by_one = open_clip.create_model_and_transforms(
                name, pretrained=tag or None, precision=PRECISIONS[precision][1], device=device
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
    if unset := [name for name, tensor in clip.state_dict().items() if tensor.sum().isnan()]:
        raise InputError(f"The weights of '{pretrained or model}' leave out, or spoil, {', '.join(unset[:3])}.")
    transform = FrameTransform(open_clip.get_model_preprocess_cfg(clip), one_by_one)
    return clip.eval().requires_grad_(False), transform, tokenizer


class _Unset(TorchFunctionMode):
    """Within it new weights are NaN, not random: drawing those takes longer than reading what replaces them."""

    DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in self.DRAWS:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).fill_(float("nan"))
        found = func(*args, **kwargs)
        return found * float("nan") if name == "randn" else found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FirstToken(torch.nn.Module):
    """A transformer's last block for the first token alone, which is all that is read of it afterwards.

    The others are still attended to. In ViT-B-32 this spares 7 % of the encoder.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, T, W) -> (B, 1, W)."""
        del args, kwargs  # neither keys of their own nor a mask in an image's encoder
        block, attention = self.block, self.block.attn
        batch, _, width = x.shape
        normed, weight, bias = block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias
        query = functional.linear(normed[:, :1], weight[:width], bias[:width])
        both = functional.linear(normed, weight[width:], bias[width:])
        heads = batch, -1, attention.num_heads, width // attention.num_heads
        query, key, value = (part.reshape(heads).transpose(1, 2) for part in (query, *both.chunk(2, -1)))
        seen = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, 1, width)
        first = x[:, :1] + block.ls_1(attention.out_proj(seen))
        return first + block.ls_2(block.mlp(block.ln_2(first)))


def read_first_token_only(clip: torch.nn.Module) -> None:
    """Let the image's encoder spare what it would throw away, if it is a transformer that does."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    visual = getattr(clip, "visual", None)
    if type(visual) is not VisionTransformer or visual.pool_type != "tok" or visual.attn_pool is not None:
        return
    blocks = visual.transformer.resblocks
    if not visual.output_tokens and visual.transformer.batch_first and type(blocks[-1]) is ResidualAttentionBlock:
        blocks[-1] = FirstToken(blocks[-1])


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256, hex, over names, types, shapes and bytes of the tensors: the same for any file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ClipEncoder:
    """Frames and sentences as unit vectors of one space.

    The embedding of a frame depends on the frames it shares a forward pass with only by the rounding of the matrix
    products, and a pass always takes `forward` frames: passes that start at the same frames give the same bytes.

    Args:
        model: the shipped `clip-lift`, a folder in open_clip's format, an open_clip model name, or `hf-hub:...`.
        pretrained: for a model name: open_clip's tag or a weights file.
        precision: of the weights: `fp32`; `bf16`, faster on CPUs and GPUs with bf16 units, moves embeddings by about
            1e-4; `fp16`, GPUs only.
        device: torch device.

    Attributes:
        identity: what decides an embedding: model, weights, precision, transform. JSON-able.
        forward: frames per forward pass.

    Raises:
        ConfigError, InputError, MissingExtraError: as `load_open_clip`.
    """

    def __init__(
        self, model: str = SHIPPED_MODEL, pretrained: str = "", precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self._clip, self._transform, self._tokenizer = load_open_clip(model, pretrained, precision, device)
        self._device, self._dtype = device, PRECISIONS[precision][0]
        self.forward = FORWARD_CPU if torch.device(device).type == "cpu" else FORWARD_GPU
        self.identity: dict[str, Any] = {
            "model": model,
            "pretrained": pretrained,
            "weights_hash": hash_weights(self._clip),
            "precision": precision,
            "preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in self._transform.config.items()},
        }
        read_first_token_only(self._clip)

    @functools.cached_property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.embed_text(["a"]).shape[1])

    def prepare(self, frames: np.ndarray) -> torch.Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, S, S) float32, as the model wants its pictures."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise InputError(f"Frames must be (N, H, W, 3) uint8; got {frames.shape} {frames.dtype}.")
        return self._transform(frames)

    def encode(self, pixels: torch.Tensor) -> np.ndarray:
        """(N, 3, S, S) from `prepare`, N at most `forward` -> (N, D) float32 unit vectors."""
        with torch.inference_mode():
            filling = pixels[-1:].expand(self.forward - len(pixels), -1, -1, -1)
            full = torch.cat([pixels, filling]).to(self._device, self._dtype)
            features = self._clip.encode_image(full)[: len(pixels)].float()
            return functional.normalize(features, dim=-1).cpu().numpy()

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, D) float32 unit vectors, `forward` frames at a time."""
        starts = range(0, len(frames), self.forward)
        parts = [self.encode(self.prepare(frames[start : start + self.forward])) for start in starts]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def embed_text(self, prompts: Sequence[str]) -> np.ndarray:
        """P prompts -> (P, D) float64 unit vectors."""
        with torch.inference_mode():
            features = self._clip.encode_text(self._tokenizer(list(prompts)).to(self._device)).double()
        return functional.normalize(features, dim=-1).cpu().numpy()

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
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
