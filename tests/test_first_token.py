"""The last block of an image's transformer, for the token that is read: the same embeddings for less."""

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from embodied.vlm_rewards.clip_encoder import ClipEncoder, FirstToken, hash_weights, read_first_token_only


class Clip(torch.nn.Module):
    """What `read_first_token_only` looks at of a model."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = VisionTransformer(32, 8, 64, 3, 4, 4.0, output_dim=16, ls_init_value=0.5, **options)


@pytest.mark.parametrize("final_ln_after_pool", [False, True])
def test_embeddings_are_the_same(final_ln_after_pool: bool) -> None:
    whole = Clip(final_ln_after_pool=final_ln_after_pool).eval()
    spared = copy.deepcopy(whole)
    read_first_token_only(spared)
    assert isinstance(spared.visual.transformer.resblocks[-1], FirstToken)
    pictures = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(spared.visual(pictures), whole.visual(pictures), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"pool_type": "avg"}, {"attentional_pool": True}, {"output_tokens": True}])
def test_what_reads_the_other_tokens_is_left_alone(options: dict[str, Any]) -> None:
    clip = Clip(**options)
    read_first_token_only(clip)
    assert not any(isinstance(block, FirstToken) for block in clip.visual.transformer.resblocks)


def test_the_encoder_uses_it_and_the_weights_hash_does_not_change(tmp_path: Path) -> None:
    clip = open_clip.create_model("ViT-S-32-alt")
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    encoder = ClipEncoder("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    assert isinstance(encoder._clip.visual.transformer.resblocks[-1], FirstToken)
    assert encoder.identity["weights_hash"] == hash_weights(clip)
