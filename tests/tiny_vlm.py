"""A LLaVA of random weights and a tokenizer trained on a paragraph: built offline in a second, a megabyte on disk.

Put this folder on `sys.path` to import it; run it as a script to serve one by transformers' own OpenAI-compatible
server: `tiny_vlm.py FOLDER PORT`. The server ends when its standard input does, so it cannot outlive who started it.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

TEXT = """The robot's task is to open the drawer. What does the first picture show? What does the second picture show?
Compare the two with respect to this task: in which one is it further along? The answer must end with one line that
holds a single number and nothing else: 0 if the task is further along in the first picture, 1 if it is further along
in the second picture, -1 if there is no difference or it cannot be told. A gripper, a handle, a table and a door."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SIZE, PATCH = 32, 16  # pixels; an image is (32 / 16)^2 = 4 tokens


def make_tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """Write a model that transformers' Auto classes load: 2 layers of width 32 over a vision tower of the same."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token: Any = fast.convert_tokens_to_ids("<image>")
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ends: dict[str, Any] = {
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
    }
    tower: Any = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, projection_dim=32, **shape)
    text: Any = LlamaConfig(vocab_size=len(fast), num_key_value_heads=2, max_position_embeddings=4096, **shape, **ends)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(SIZE // PATCH) ** 2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def main() -> None:
    def leave() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()
    from transformers.cli.transformers import main as command

    sys.argv = ["transformers", "serve", sys.argv[1], "--host", "127.0.0.1", "--port", sys.argv[2], "--device", "cpu"]
    command()


if __name__ == "__main__":
    main()
