"""clip_reward: the formula, the batched transform against open_clip's own, and what cannot be loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError, InputError, MissingExtraError

open_clip = pytest.importorskip("open_clip")

from embodied.vlm_rewards.audit import spearman  # noqa: E402
from embodied.vlm_rewards.clip_encoder import ClipEncoder, FrameTransform, locate  # noqa: E402
from embodied.vlm_rewards.clip_reward import ClipLabeller, PromptReward, goal_baseline_reward  # noqa: E402
from embodied.vlm_rewards.train_clip import SmallClipConfig, build_model, write_folder  # noqa: E402

TINY = SmallClipConfig(embedding_dim=16, image_width=8, text_width=8, text_layers=1, text_heads=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP in open_clip's format: enough for everything but meaning."""
    model = build_model(TINY, 32, seed=0)
    with torch.no_grad():
        for word in ("cube", "gripper"):  # two words it "was not trained on", one of them in two pieces
            model.token_embedding.weight[open_clip.SimpleTokenizer()([word])[0, 1]] = 0
    path = tmp_path_factory.mktemp("clip") / "tiny"
    write_folder(model, TINY.open_clip_config(32), {"made_by": "test"}, path)
    return path


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def frames(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make(goals: list[str], baselines: Sequence[str] = (), regularization: float = 0.0, **encoder: str) -> ClipLabeller:
    found = ClipEncoder(**encoder)
    return ClipLabeller(found, PromptReward(found, goals, baselines, regularization))


# The formula


def test_zero_regularization_is_the_cosine() -> None:
    rng = np.random.default_rng(0)
    x, g, b = unit(rng, 100, 512), unit(rng, 512), unit(rng, 512)
    np.testing.assert_allclose(goal_baseline_reward(x, g, b, 0.0), x @ g, atol=1e-9)
    np.testing.assert_array_equal(goal_baseline_reward(x, g, b, 0.0), goal_baseline_reward(x, g))


@pytest.mark.parametrize("regularization", [0.0, 0.3, 0.7, 1.0])
def test_agrees_with_the_projection_matrix(regularization: float) -> None:
    rng = np.random.default_rng(1)
    x, g, b = unit(rng, 50, 32), unit(rng, 32), unit(rng, 32)
    d = (g - b)[:, None]
    projection = regularization * d @ d.T / np.sum(d * d) + (1 - regularization) * np.eye(32)
    by_definition = 1 - 0.5 * np.sum(((x - g) @ projection) ** 2, axis=1)
    np.testing.assert_allclose(goal_baseline_reward(x, g, b, regularization), by_definition, atol=1e-12)


def test_projects_on_the_line_through_goal_and_baseline_not_on_its_direction() -> None:
    """Worked by hand: g = (1, 0), b = (0, 1), x = (0.6, 0.8), d = (1, -1).

    x - g = (-0.4, 0.8) has the part (-0.4 - 0.8) / sqrt 2 along d: square 0.72, reward 1 - 0.36 = 0.64.
    Projecting x itself gives (-0.1, 0.1), which lies (1.1, -0.1) from g: reward 1 - 1.22 / 2 = 0.39.
    """
    x, g, b = np.array([[0.6, 0.8]]), np.array([1.0, 0.0]), np.array([0.0, 1.0])
    np.testing.assert_allclose(goal_baseline_reward(x, g, b, 1.0), [0.64], atol=1e-12)


def test_full_regularization_peaks_at_the_goal_and_punishes_overshooting() -> None:
    rng = np.random.default_rng(2)
    g, b = unit(rng, 64), unit(rng, 64)
    nuisance = unit(rng, 64)
    nuisance -= (nuisance @ (g - b)) / ((g - b) @ (g - b)) * (g - b)
    along = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    reward = goal_baseline_reward(b + along[:, None] * (g - b) + 3 * nuisance, g, b, 1.0)
    assert reward[2] == pytest.approx(1.0)
    np.testing.assert_allclose(reward, reward[::-1], atol=1e-12)
    assert reward[0] < reward[1] < reward[2]


def test_regularization_removes_nuisance_directions() -> None:
    """Images = modality offset + b + t (g - b) + nuisance: the rank correlation with t rises with regularization."""
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
    correlations = np.zeros((20, len(strengths)))
    for draw in range(20):
        rng = np.random.default_rng(draw)
        g, offset, nuisance = unit(rng, 512), unit(rng, 512), unit(rng, 5, 512)
        b = g + 0.7 * unit(rng, 512)  # sentences about one scene are alike
        b /= np.linalg.norm(b)
        t = rng.uniform(size=200)
        x = offset + b + t[:, None] * (g - b) + 0.5 * rng.normal(size=(200, 5)) @ nuisance
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        correlations[draw] = [spearman(goal_baseline_reward(x, g, b, a), t) for a in strengths]
    mean = correlations.mean(0)
    assert (np.diff(mean) > 0).all()
    assert mean[-1] > 0.9
    assert mean[0] < 0.5


def test_refused_settings() -> None:
    x, g = np.eye(3), np.eye(3)[0]
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]; got 1.5"):
        goal_baseline_reward(x, g, g, 1.5)
    with pytest.raises(ConfigError, match="needs a baseline prompt"):
        goal_baseline_reward(x, g, None, 0.5)
    with pytest.raises(ConfigError, match="same embedding"):
        goal_baseline_reward(x, g, g, 0.5)


# The transform


@pytest.mark.parametrize("shape", [(64, 64), (20, 20), (48, 80), (80, 48), (32, 32)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_batched_transform_is_the_models_own(shape: tuple[int, int], mode: str, interpolation: str) -> None:
    from open_clip.transform import image_transform
    from PIL import Image

    config = {
        "size": 32,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.25),
        "interpolation": interpolation,
        "resize_mode": mode,
    }
    own = image_transform(32, False, config["mean"], config["std"], mode, interpolation)
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((shape[1], shape[0]))) for image in smooth])
    expected = torch.stack([own(Image.fromarray(image)) for image in images])  # type: ignore[operator]
    ours = FrameTransform(config, own)(images)
    assert ours.shape == expected.shape
    # One grey level of 255 over the smallest std.
    assert (ours - expected).abs().max() <= 1.01 / 255 / 0.2


# The labeller


def test_embeddings_are_open_clips(folder: Path) -> None:
    from PIL import Image

    images = frames(5)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
        expected = model.eval().encode_image(pixels, normalize=True).numpy()
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(["red"]), normalize=True).numpy()
    np.testing.assert_allclose(ClipEncoder(str(folder)).embed(images), expected, atol=1e-5)
    np.testing.assert_allclose(make(["red"], model=str(folder)).score(images), (expected @ text[0]), atol=1e-5)


def test_scores_do_not_depend_on_their_batch(folder: Path) -> None:
    images = frames(75)
    labeller = make(["up"], ["down"], 0.5, model=str(folder))
    whole = labeller.score(images)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([labeller.score(images[:64]), labeller.score(images[64:])]), whole)
    np.testing.assert_allclose(labeller.score(images[::-1])[::-1], whole, atol=1e-6)
    alone = np.concatenate([labeller.score(image[None]) for image in images[:5]])
    np.testing.assert_allclose(alone, whole[:5], atol=1e-6)
    assert labeller.score(images[:0]).shape == (0,)


def test_bf16_stays_close(folder: Path) -> None:
    images = frames(6)
    full = ClipEncoder(str(folder)).embed(images)
    half = ClipEncoder(str(folder), precision="bf16").embed(images)
    assert (full * half).sum(1).min() > 0.999


def test_mean_of_prompts_is_normalised_again(folder: Path) -> None:
    encoder = ClipEncoder(str(folder))
    mean = encoder.embed_text(["up", "down", "left"]).mean(0)
    images = frames(4)
    scores = make(["up", "down", "left"], model=str(folder)).score(images)
    np.testing.assert_allclose(scores, encoder.embed(images) @ mean / np.linalg.norm(mean), atol=1e-6)


def test_unknown_words_are_reported(folder: Path) -> None:
    with pytest.warns(UserWarning, match="not trained on the words cube, gripper"):
        labeller = make(["the Gripper lifts a cube."], model=str(folder))
    assert labeller.config["unknown_words"] == ["cube", "gripper"]
    assert make(["the arm"], model=str(folder)).config["unknown_words"] == []


def test_config_names_the_weights(folder: Path, tmp_path: Path) -> None:
    first = make(["up"], model=str(folder)).config
    assert first == json.loads(json.dumps(first))
    other = tmp_path / "other"
    write_folder(build_model(TINY, 32, seed=1), TINY.open_clip_config(32), {}, other)
    assert make(["up"], model=str(other)).config["weights_hash"] != first["weights_hash"]


def test_bad_prompts_batch_precision_and_frames(folder: Path) -> None:
    with pytest.raises(ConfigError, match="at least one goal"):
        make([], model=str(folder))
    with pytest.raises(ConfigError, match="no prompt may be empty"):
        make(["up"], [" "], model=str(folder))
    with pytest.raises(ConfigError, match="needs a baseline"):
        make(["up"], regularization=0.5, model=str(folder))
    with pytest.raises(ConfigError, match="fp16' is for GPUs"):
        make(["up"], model=str(folder), precision="fp16")
    with pytest.raises(ConfigError, match="Did you mean 'bf16'"):
        make(["up"], model=str(folder), precision="bf15")
    with pytest.raises(InputError, match="uint8"):
        ClipEncoder(str(folder)).embed(np.zeros((1, 32, 32, 3), np.float32))


# What cannot be loaded


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no open_clip_config\.json"):
        make(["up"], model=str(tmp_path))
    config = (folder / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(InputError, match=r"has no weights: put open_clip_model\.safetensors there"):
        make(["up"], model=str(tmp_path))
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="Cannot load the CLIP model"):
        make(["up"], model=str(tmp_path))


def test_weights_that_leave_something_out_are_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Where open_clip goes on with what a weight began with: it began with NaN."""
    monkeypatch.setattr("open_clip.factory.load_checkpoint", lambda *args, **kwargs: None)
    with pytest.raises(InputError, match=r"leave out, or spoil, positional_embedding, text_projection, visual\.conv1"):
        make(["up"], model=str(folder))


def test_unknown_models_and_tags() -> None:
    with pytest.raises(InputError, match="ViT-B-32"):
        make(["up"], model="ViT-B32")
    with pytest.raises(InputError, match="No folder and no open_clip model"):
        make(["up"], model="/no/such/folder")
    with pytest.raises(InputError, match=r"needs --pretrained: a tag .*openai"):
        make(["up"], model="ViT-B-32")
    with pytest.raises(InputError, match="neither a weights file nor a tag"):
        make(["up"], model="ViT-B-32", pretrained="laion9b")


def test_no_network_says_what_to_place_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nand twenty lines more")

    monkeypatch.setattr("open_clip.factory.download_pretrained", refuse)
    with pytest.raises(InputError) as caught:
        make(["up"], model="RN50", pretrained="openai")
    message = str(caught.value)
    assert "no route to host" in message
    assert "--pretrained PATH/open_clip_model.safetensors" in message
    assert len(message.splitlines()) <= 3


def test_a_weights_file_of_a_named_model_loads(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    architecture = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-test.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    file = str(folder / "open_clip_model.safetensors")
    named = make(["up"], model="tiny-test", pretrained=file).config
    assert named["weights_hash"] == make(["up"], model=str(folder)).config["weights_hash"]


def test_missing_open_clip_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"embodied-rl\[clip\]"):
        locate("clip-lift", "")
