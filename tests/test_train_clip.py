"""train_clip: the losses by hand, the toy of two squares, and the folder that open_clip must load."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError, InputError, TrainingError

open_clip = pytest.importorskip("open_clip")

from embodied.vlm_rewards.audit import spearman  # noqa: E402
from embodied.vlm_rewards.caption_pairs import index_captions  # noqa: E402
from embodied.vlm_rewards.clip_encoder import SHIPPED_MODEL, ClipEncoder  # noqa: E402
from embodied.vlm_rewards.clip_reward import ClipLabeller, PromptReward  # noqa: E402
from embodied.vlm_rewards.train_clip import VOCABULARY, KnownWords, SmallClipConfig, train_small_clip  # noqa: E402
from embodied.vlm_rewards.train_contrastive import augment, contrastive_loss, degree_of_truth  # noqa: E402

ROOM = Path(__file__).parents[1] / "vlm_rewards"
TINY = SmallClipConfig(embedding_dim=16, image_width=8, text_width=16, text_layers=1, text_heads=2, learning_rate=3e-3)
WORDINGS = (
    ("the gripper is far from the cube", "the gripper is far away"),
    ("the gripper is near the cube", "the gripper approaches the cube"),
    ("the gripper is at the cube", "the gripper touches the cube"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw_squares(count: int, seed: int) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
    """A dark square at a distance from a red one, (count, 32, 32, 3); what is said of it; 1 - distance / 13 pixels."""
    rng = np.random.default_rng(seed)
    images = np.full((count, 32, 32, 3), (180, 160, 130), np.int64) + rng.integers(-10, 11, (count, 1, 1, 1))
    images = images + rng.integers(-5, 6, images.shape)
    grades = rng.uniform(size=count)
    for image, grade in zip(images, grades, strict=True):
        centre, angle = rng.uniform(13, 19, 2), rng.uniform(-np.pi, np.pi)
        hand = centre + 13 * (1 - grade) * np.array([np.cos(angle), np.sin(angle)])
        for (x, y), colour in ((centre, (200, 30, 30)), (hand, (40, 40, 40))):
            row, column = int(np.clip(y, 2, 29)), int(np.clip(x, 2, 29))
            image[row - 2 : row + 2, column - 2 : column + 2] = colour
    sentences = [list(WORDINGS[min(2, int(3 * grade))]) for grade in grades]
    return images.clip(0, 255).astype(np.uint8), sentences, grades


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    images, sentences, grades = draw_squares(600, seed=0)
    out = tmp_path_factory.mktemp("trained") / "toy"
    return out, train_small_clip(images, sentences, out, steps=120, batch=48, grades=grades, config=TINY)


# The losses


def test_degree_of_truth_by_hand() -> None:
    grades, centres, spreads = torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.1]), torch.tensor([0.0, 0.3])
    truth = degree_of_truth(grades, centres, spreads, width=0.4)
    # Variances 0.16 and 0.25; distances 0, 0.4 and 0.4, 0.8.
    expected = [[1.0, math.exp(-0.5 * 0.16 / 0.25)], [math.exp(-0.5), math.exp(-0.5 * 0.64 / 0.25)]]
    torch.testing.assert_close(truth, torch.tensor(expected))


def test_contrastive_loss_is_clips_where_pairs_are_unique() -> None:
    features = torch.nn.functional.normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    theirs = open_clip.ClipLoss()(features[0], features[1], torch.tensor(10.0))
    torch.testing.assert_close(contrastive_loss(10.0 * features[0] @ features[1].T, torch.eye(6)), theirs)


def test_contrastive_loss_with_a_shared_caption_by_hand() -> None:
    """Two images share caption 0, a third has caption 1; all logits 0, so each cross-entropy is log of the size."""
    truth = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert contrastive_loss(torch.zeros(3, 2), truth).item() == pytest.approx(0.5 * (math.log(2) + math.log(3)))
    # Logits of 3 at the three pairs. Rows: log(1 + e^-3). Column 0: log(2 + e^-3); column 1: log(1 + 2 e^-3).
    e = math.exp(-3)
    expected = 0.5 * (math.log(1 + e) + 0.5 * (math.log(2 + e) + math.log(1 + 2 * e)))
    assert contrastive_loss(3 * truth, truth).item() == pytest.approx(expected, rel=1e-6)


def test_an_arc_fits_the_degree_of_truth() -> None:
    """Embeddings at angle arc * grade, scale (width * arc)^-2: the softmax is the normalised truth, nearly."""
    config = SmallClipConfig()
    grades = torch.linspace(0, 1, 9, dtype=torch.float64)
    truth = degree_of_truth(grades, grades, torch.zeros_like(grades), config.grade_width)
    logits = torch.cos(config.arc * (grades[:, None] - grades)) / (config.grade_width * config.arc) ** 2
    assert (logits.softmax(1) - truth / truth.sum(1, keepdim=True)).abs().max() < 0.01


# Parts


def test_augment_shifts_by_whole_pixels_and_keeps_the_range() -> None:
    images = torch.rand(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(images, 0, 0.0, torch.Generator()), images, atol=1e-6, rtol=0)
    shifted = augment(images, 2, 0.0, torch.Generator().manual_seed(1))
    inner = images[:, :, 4:8, 4:8]
    offsets = []
    for before, after in zip(inner, shifted, strict=True):
        found = [
            (r, c)
            for r in range(2, 7)
            for c in range(2, 7)
            if torch.allclose(after[:, r : r + 4, c : c + 4], before, atol=1e-6)
        ]
        assert len(found) == 1
        offsets += found
    assert {r for r, _ in offsets} == {c for _, c in offsets} == set(range(2, 7))
    jittered = augment(images, 2, 0.5, torch.Generator().manual_seed(1))
    assert 0 <= jittered.min() < jittered.max() <= 1
    assert (jittered - shifted).abs().mean() > 0.02


def test_index_captions_finds_centres_and_spreads() -> None:
    table = index_captions(["a", ["a", "b"], ["b", "b"]], np.array([0.0, 0.5, 1.0]))
    assert table.sentences == ["a", "b"]
    assert [row.tolist() for row in table.of_image] == [[0], [0, 1], [1]]
    torch.testing.assert_close(table.centres, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(table.spreads, torch.tensor([0.25, 0.25]))


def test_known_words_stand_in_for_the_whole_table() -> None:
    tokens = open_clip.SimpleTokenizer(context_length=12)(["the red cube", "the arm lifts"])
    words = KnownWords(tokens, 5, 0.9, torch.Generator().manual_seed(0))
    table = words.whole_table()
    assert table.shape == (VOCABULARY, 5)
    assert (table.abs().sum(1) > 0).sum() == len(tokens.unique())
    torch.testing.assert_close(words.eval()(tokens), table[tokens])
    dropped = words.train()(tokens)
    kept = (dropped != 0).any(-1)
    assert kept[tokens >= VOCABULARY - 2].all()  # never the marks: the end mark carries the sentence
    assert not kept.all()


# Training


def test_reward_rises_with_progress_on_images_never_seen(trained: tuple[Path, list[float]]) -> None:
    folder, losses = trained
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.2
    images, _, grades = draw_squares(300, seed=99)
    encoder = ClipEncoder(str(folder))
    for regularization in (0.0, 0.5, 1.0):
        reward = PromptReward(encoder, [WORDINGS[2][0]], [WORDINGS[0][0]], regularization)
        assert spearman(ClipLabeller(encoder, reward).score(images), grades) > 0.8
    goal, middle, far = encoder.embed_text([WORDINGS[2][1], WORDINGS[1][0], WORDINGS[0][1]])
    assert goal @ far < min(goal @ middle, middle @ far)  # the sentences lie on an arc


def test_folder_is_open_clips_own_format(trained: tuple[Path, list[float]]) -> None:
    folder, _ = trained
    assert sorted(file.name for file in folder.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "provenance.json",
    ]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.logit_scale.exp().item() == pytest.approx((TINY.grade_width * TINY.arc) ** -2, rel=1e-4)
    assert transform.transforms[-1].mean == [0.5, 0.5, 0.5]
    record = json.loads((folder / "provenance.json").read_text())
    assert record["config"]["uses_grades"] is True
    assert record["num_images"] == 600
    assert record["captions"] == sorted({sentence for wording in WORDINGS for sentence in wording})
    assert not folder.with_name("toy.partial").exists()


def test_same_seed_same_file(tmp_path: Path) -> None:
    images, sentences, grades = draw_squares(60, seed=1)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train_small_clip(images, sentences, tmp_path / name, 3, 16, seed, grades, TINY)
        torch.rand(7)  # the global generator has no say
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_captions_alone_and_progress_callback(tmp_path: Path) -> None:
    images, sentences, _ = draw_squares(60, seed=1)
    calls: list[tuple[int, int, str]] = []
    losses = train_small_clip(
        images, [row[0] for row in sentences], tmp_path / "m", 12, 16, config=TINY, progress=lambda *a: calls.append(a)
    )
    assert len(losses) == 12
    assert [(done, total) for done, total, _ in calls] == [(10, 12), (12, 12)]
    assert json.loads((tmp_path / "m" / "provenance.json").read_text())["config"]["uses_grades"] is False


def test_bad_inputs(tmp_path: Path) -> None:
    images, sentences, grades = draw_squares(8, seed=1)
    out = tmp_path / "m"
    with pytest.raises(InputError, match="exists already"):
        train_small_clip(images, sentences, tmp_path)
    with pytest.raises(InputError, match="uint8, square"):
        train_small_clip(images[:, :16], sentences, out)
    with pytest.raises(InputError, match="multiple of 32"):
        train_small_clip(images[:, :16, :16], sentences, out)
    with pytest.raises(InputError, match="8 images but 7 captions"):
        train_small_clip(images, sentences[:7], out)
    with pytest.raises(InputError, match=r"captions\[2\] has no sentence"):
        train_small_clip(images, [*sentences[:2], [], *sentences[3:]], out)
    with pytest.raises(InputError, match="same sentence"):
        train_small_clip(images, ["one"] * 8, out)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        train_small_clip(images, sentences, out, grades=grades * 2 + 1)
    with pytest.raises(ConfigError, match="batch at least 2"):
        train_small_clip(images, sentences, out, batch=1)
    assert not out.exists()


def test_divergence_is_said_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "embodied.vlm_rewards.train_contrastive.contrastive_loss", lambda logits, truth: logits.sum() * float("nan")
    )
    images, sentences, grades = draw_squares(16, seed=1)
    with pytest.raises(TrainingError, match="nan at step 0"):
        train_small_clip(images, sentences, tmp_path / "m", 5, 8, grades=grades, config=TINY)
    assert list(tmp_path.iterdir()) == []


# What the package ships


@pytest.mark.skipif(not (ROOM / SHIPPED_MODEL).is_dir(), reason=f"vlm_rewards/{SHIPPED_MODEL} has not been made")
def test_shipped_model_is_small_and_loads_with_open_clip_alone() -> None:
    folder = ROOM / SHIPPED_MODEL
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    assert json.loads((folder / "provenance.json").read_text())["captions"]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    text = open_clip.get_tokenizer(f"local-dir:{folder}")(["the gripper lifts the red cube high above the table"])
    assert torch.isfinite(model.encode_text(text)).all()
    assert ClipEncoder().unknown_words(["the gripper lifts the red cube"]) == []
