"""An annotator in this process: a vision-language model that transformers loads from a folder, weights in safetensors.

Nothing is downloaded and no code from the folder runs. The same prompts and stages as over HTTP; greedy at temperature
0, otherwise sampled from a seed that task, pictures, step and sample decide, so that any run of it says the same.
"""

import base64
import hashlib
import io
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError
from embodied.contracts.preferences import Segment, Verdict
from embodied.contracts.provenance import hash_json
from embodied.vlm_rewards import in_stages
from embodied.vlm_rewards.answer_log import Budget
from embodied.vlm_rewards.clip_encoder import hash_weights
from embodied.vlm_rewards.in_stages import Exchange, Parts

DTYPES = ("auto", "float32", "bfloat16", "float16")
_READS = {".json", ".jinja", ".txt", ".model"}  # what decides beside the weights: tokenizer, transform, template


@dataclass(frozen=True)
class HFConfig:
    """How a local model is asked.

    Attributes:
        folder: with config.json, *.safetensors, tokenizer, processor and chat template.
        stages: `two`: describe and compare, then decide from the text; `one`: both at once.
        frames_shown: of each segment, evenly spread.
        temperature: 0 answers every sample alike; raise it to ask several times.
        max_tokens: of one answer.
        device: torch device, such as cpu, cuda, cuda:1.
        dtype: of the weights: auto (as they were saved), float32, bfloat16, float16.
    """

    folder: str
    stages: str = "two"
    frames_shown: int = 4
    temperature: float = 0.0
    max_tokens: int = 512
    device: str = "cpu"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        in_stages.check_asking(self.stages, self.frames_shown, self.max_tokens, self.temperature)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype '{self.dtype}' is unknown. Valid: {', '.join(DTYPES)}.")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ConfigError(f"device '{self.device}' is none of torch's. Use cpu, cuda or cuda:N.") from None


class HFAnnotator:
    """Asks a local model, one question at a time.

    Args:
        budget: counts a generation as one call without cost.

    Raises:
        MissingExtraError: transformers is not installed.
        InputError: the folder holds no such model, or not all of it.
    """

    sees = True
    workers = 1

    def __init__(self, config: HFConfig, budget: Budget) -> None:
        self.config, self._budget = config, budget
        folder = Path(config.folder)
        self._processor, self._model = _load(folder, config)
        weights = hash_weights(self._model)
        self.name = f"hf:{folder.resolve().name}@{weights[:12]}"
        settings = {key: value for key, value in asdict(config).items() if key not in ("folder", "device", "dtype")}
        self.identity: Mapping[str, Any] = {
            "annotator": "hf",
            **in_stages.VERSIONS,
            **settings,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "weights": weights,
            "files": _hash_files(folder),
        }
        self._turn = threading.Lock()

    def compare(self, task: str, first: Segment, second: Segment, sample: int = 0) -> Verdict:
        c = self.config
        return in_stages.compare_in_stages(
            task, first, second, c.stages, c.frames_shown, self.name, lambda parts: self._exchange(parts, sample)
        )

    def _exchange(self, parts: Parts, sample: int) -> Exchange:
        """One step's question and answer, asked for unless it is known."""
        sample = sample if self.config.temperature else 0  # greedy says the same to every sample
        decides = {
            key: value for key, value in self.identity.items() if key not in ("stages", "frames_shown", "parser")
        }
        key = hash_json(["exchange", decides, parts, sample])

        def say() -> Exchange:
            with self._turn, self._budget.call(0.0) as booked:
                booked["cost"] = 0.0
                return self._generate(parts, int(key[:15], 16))

        return in_stages.exchange_once(self._budget.log, key, parts, say)

    def _generate(self, parts: Parts, seed: int) -> Exchange:
        """What the model writes to one message. Leaves torch's random state as it was. Raises InputError."""
        started = time.time()
        inputs = self._read(parts)
        asked = int(inputs["input_ids"].shape[1])
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and asked + self.config.max_tokens > room:
            raise InputError(
                f"{asked} tokens of question and {self.config.max_tokens} of answer exceed the {room} of this model.\n"
                "Lower frames_shown or max_tokens of --ask."
            )
        inputs = inputs.to(self._model.device, self._model.dtype)  # casts the pictures only
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed)
            try:
                output = self._model.generate(**inputs, generation_config=self._generation())
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{device} has too little memory for this model and {in_stages.count_pictures(parts)} pictures.\n"
                    "Lower frames_shown or max_tokens of --ask, or set its dtype to bfloat16."
                ) from None
        written = output[0, asked:]
        return {
            "answer": self._processor.decode(written, skip_special_tokens=True),
            "model": self.name,
            "tokens": {"prompt": asked, "completion": len(written)},
            "at": started,
            "seconds": round(time.time() - started, 3),
            "cost": 0.0,
            "device": str(device),
            "failures": [],
        }

    def _read(self, parts: Parts) -> Any:
        """A message as the model's inputs, by the folder's own template, tokenizer and transform."""
        try:
            return self._processor.apply_chat_template(
                [{"role": "user", "content": [_as_content(part) for part in parts]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except Exception as error:  # a template is a program of the folder's
            pictures = in_stages.count_pictures(parts)
            raise InputError(
                f"{self.config.folder} cannot read a message with {pictures} pictures: {_first_line(error)}.\n"
                "Use a model whose chat template takes several pictures."
            ) from error

    def _generation(self) -> Any:
        """Greedy or plain sampling, whatever the folder would rather; only its special tokens are taken over."""
        from transformers import GenerationConfig

        ends = {k: getattr(self._model.generation_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if ends["pad_token_id"] is None:
            end = ends["eos_token_id"]
            ends["pad_token_id"] = end[0] if isinstance(end, list) else end
        t = self.config.temperature
        sampling = {"do_sample": True, "temperature": t, "top_k": 0, "top_p": 1.0} if t else {"do_sample": False}
        return GenerationConfig(max_new_tokens=self.config.max_tokens, **ends, **sampling)


def _load(folder: Path, config: HFConfig) -> tuple[Any, Any]:
    """Processor and model of a folder. Raises MissingExtraError, InputError, ConfigError."""
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError("transformers", "vlm", "asking a local vision-language model") from error
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{config.device}': torch finds no GPU here.\nUse --ask device cpu.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json.\nUse hf:FOLDER with a model that save_pretrained wrote.")
    local = {"local_files_only": True, "trust_remote_code": False}
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, **local)
        found: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=config.dtype, use_safetensors=True, output_loading_info=True, **local
        )
        model, loaded = found
        model.eval().to(config.device)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"{folder} is no vision-language model that loads: {_first_line(error)}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
    lacking = sorted(loaded["missing_keys"]) + sorted(map(str, loaded["mismatched_keys"]))
    if lacking:
        raise InputError(f"The weights in {folder} lack {len(lacking)} tensors, such as {lacking[0]}.\nCopy it anew.")
    if not hasattr(processor, "image_processor"):
        raise InputError(
            f"{folder} has no image processor. Copy processor_config.json or preprocessor_config.json too."
        )
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{folder} has no chat template.\nUse a model tuned to follow instructions ('Instruct').")
    return processor, model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0][:300] if lines else type(error).__name__}"


def _hash_files(folder: Path) -> str:
    """SHA-256, hex, over names and bytes of the small files that a model is read from."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _READS and path.is_file() and not path.name.endswith(".index.json"):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _as_content(part: dict[str, Any]) -> dict[str, Any]:
    """A part as chat templates of transformers know it: pictures as PIL images."""
    if part["type"] != "image_url":
        return part
    from PIL import Image

    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}
