"""The local vision-language model, here one of random weights: its garbage is judged, its answers are its own."""

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.preferences import Answer, Segment
from embodied.vlm_rewards.annotator_hf import HFAnnotator, HFConfig, _as_content
from embodied.vlm_rewards.annotator_openai import OpenAIAnnotator, OpenAIConfig
from embodied.vlm_rewards.answer_log import AnswerLog, Budget, question_key
from embodied.vlm_rewards.ask import AskConfig, ask
from embodied.vlm_rewards.vlm_prompts import data_url, first_step

sys.path.insert(0, str(Path(__file__).parent))
from tiny_vlm import make_tiny_vlm
from vlm_peer import Peer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
TASK = "open the drawer"


def segment(level: int, length: int = 1) -> Segment:
    frames = np.random.default_rng(level).integers(0, 256, (length, 24, 32, 3), dtype=np.uint8)
    return Segment(np.arange(length) + level, frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm(tmp_path_factory.mktemp("vlm") / "tiny")


def annotator(folder: Path, log: Path, calls: int | None = None, **settings: Any) -> HFAnnotator:
    chosen: dict[str, Any] = {"max_tokens": 12} | settings
    config = HFConfig(str(folder), **chosen)
    return HFAnnotator(config, Budget(AnswerLog(log / "answers.sqlite"), "test", calls))


def said(asked: HFAnnotator, sample: int = 0, levels: tuple[int, int] = (1, 2)) -> list[str]:
    verdict = asked.compare(TASK, segment(levels[0]), segment(levels[1]), sample)
    return [exchange["answer"] for exchange in verdict.record["exchanges"]]


def test_it_looks_writes_and_abstains_with_a_reason(folder: Path, tmp_path: Path) -> None:
    asked = annotator(folder, tmp_path)
    verdict = asked.compare(TASK, segment(1, 3), segment(2, 3))
    assert verdict.answer is Answer.ABSTAINED
    assert verdict.reason
    assert verdict.final, "garbage is an answer: asking again would give the same"
    first, second = verdict.record["exchanges"]
    assert first["prompt"].count("[picture]") == 6
    assert TASK in first["prompt"]
    assert second["prompt"].count("==========") == 2
    assert first["answer"] in second["prompt"]
    assert first["tokens"]["prompt"] > 6 * 4 + 50, "six pictures of four tokens, and the words"
    assert first["tokens"]["completion"] == 12
    assert first["seconds"] > 0
    assert first["device"] == "cpu"
    json.dumps(verdict.record)
    assert asked.name.startswith("hf:tiny@")
    assert str(folder) not in json.dumps([asked.name, dict(asked.identity), verdict.record])


def test_pictures_order_and_task_reach_the_model(folder: Path, tmp_path: Path) -> None:
    """Greedy: the same question gives the same words, another one others, and torch's random state is untouched."""
    state = torch.random.get_rng_state()
    words = said(annotator(folder, tmp_path / "a"))
    assert words == said(annotator(folder, tmp_path / "b"))
    asked = annotator(folder, tmp_path / "c")
    logits = [_next_logits(asked, pair) for pair in ((1, 2), (2, 1), (1, 3), (1, 2))]
    assert torch.equal(logits[0], logits[3])
    for other in logits[1:3]:
        assert (logits[0] - other).abs().max() > 1e-4
    assert torch.equal(state, torch.random.get_rng_state())
    frame = segment(1).frames[0]  # type: ignore[index]
    part = _as_content({"type": "image_url", "image_url": {"url": data_url(frame)}})
    np.testing.assert_array_equal(np.asarray(part["image"]), frame, "every colour as recorded")


def _next_logits(asked: HFAnnotator, pair: tuple[int, int]) -> Any:
    frames = [segment(level).frames for level in pair]
    inputs = asked._read(first_step(TASK, frames[0], frames[1], False))  # type: ignore[arg-type]
    with torch.no_grad():
        return asked._model(**inputs).logits[0, -1]


def test_samples_differ_by_their_seed_alone(folder: Path, tmp_path: Path) -> None:
    warm = annotator(folder, tmp_path / "a", temperature=1.0)
    words = [said(warm, sample) for sample in range(3)]
    assert len({texts[0] for texts in words}) == 3
    torch.manual_seed(99)
    again = annotator(folder, tmp_path / "b", temperature=1.0)
    assert [said(again, sample) for sample in (2, 1, 0)] == words[::-1]
    cold = annotator(folder, tmp_path / "c", calls=2)
    assert said(cold, 0) == said(cold, 5), "greedy: further samples cost no generation"


def test_nothing_is_generated_twice_and_the_budget_holds(folder: Path, tmp_path: Path) -> None:
    pairs = np.array([[1, 2], [3, 4], [5, 6]])

    def run(calls: int) -> tuple[dict[str, int], int, int]:
        asked = annotator(
            folder, tmp_path, calls=calls, temperature=1.0
        )  # no two answers, hence no second steps, alike
        answers = ask(
            asked, TASK, pairs, lambda row, frames: segment(row), AskConfig(both_orders=0.0), asked._budget.log
        )
        return answers.reasons, answers.found, asked._budget.spent()[0]

    reasons, found, spent = run(3)
    assert reasons["budget of 3 calls spent"] == 2
    assert (found, spent) == (0, 3)
    reasons, found, spent = run(100)
    assert sum(reasons.values()) <= 3
    assert (found, spent) == (1, 6), "one pair was answered, one was half answered"
    assert run(100)[1:] == (3, 6)


def test_identity_is_what_decides_and_not_where_it_lies(folder: Path, tmp_path: Path) -> None:
    def key(where: Path, **settings: Any) -> str:
        return question_key(annotator(where, tmp_path, **settings), TASK, segment(1), segment(2), 0)

    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    mine = key(folder)
    assert key(moved) == mine
    assert key(folder, dtype="bfloat16") != mine
    assert key(folder, max_tokens=13) != mine
    assert key(folder, stages="one") != mine
    (moved / "chat_template.jinja").write_text((moved / "chat_template.jinja").read_text() + " ")
    assert key(moved) != mine
    assert key(make_tiny_vlm(tmp_path / "other", seed=1)) != mine


def test_nothing_is_asked_of_the_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: tried.append(args) or [])
    said(annotator(folder, tmp_path))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        annotator(Path("HuggingFaceTB/SmolVLM-Instruct"), tmp_path)
    assert tried == []


def test_bfloat16_generates(folder: Path, tmp_path: Path) -> None:
    asked = annotator(folder, tmp_path, dtype="bfloat16", stages="one")
    assert asked.identity["dtype"] == "bfloat16"
    assert len(said(asked)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_generates(folder: Path, tmp_path: Path) -> None:
    state = torch.cuda.get_rng_state()
    asked = annotator(folder, tmp_path / "a", device="cuda", temperature=1.0)
    words = said(asked)
    assert words == said(annotator(folder, tmp_path / "b", device="cuda", temperature=1.0))
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert asked.identity == annotator(folder, tmp_path / "c", temperature=1.0).identity


def test_it_is_asked_as_a_server_is(folder: Path, tmp_path: Path) -> None:
    with Peer() as peer:
        budget = Budget(AnswerLog(tmp_path / "http.sqlite"), "test")
        http = OpenAIAnnotator(OpenAIConfig("m", peer.url), budget)
        remote = http.compare(TASK, segment(1, 2), segment(2, 2)).record["exchanges"]
        http.close()
    local = annotator(folder, tmp_path).compare(TASK, segment(1, 2), segment(2, 2)).record["exchanges"]
    assert local[0]["prompt"] == remote[0]["prompt"]
    frame = local[1]["prompt"].replace(local[0]["answer"], "X"), remote[1]["prompt"].replace(remote[0]["answer"], "X")
    assert frame[0] == frame[1]
    assert remote[0].keys() <= local[0].keys()


def _broken(folder: Path, to: Path, how: str) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    if how == "no weights":
        (to / "model.safetensors").unlink()
    elif how == "pickled weights":
        (to / "model.safetensors").unlink()
        torch.save({"x": torch.zeros(1)}, to / "pytorch_model.bin")
    elif how == "cut weights":
        data = (to / "model.safetensors").read_bytes()
        (to / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "half the tensors":
        from safetensors.torch import load_file, save_file

        tensors = load_file(to / "model.safetensors")
        kept = {name: tensors[name] for name in sorted(tensors)[::2]}
        save_file(kept, to / "model.safetensors", {"format": "pt"})
    elif how == "other shapes":
        config["text_config"]["hidden_size"] = 64
    elif how == "text only":
        config = config["text_config"]
    elif how == "own code":
        (to / "run.py").write_text(f"open({str(to / 'ran')!r}, 'w')\nclass A: pass\n")
        config["auto_map"] = {"AutoConfig": "run.A", "AutoModelForImageTextToText": "run.A"}
        config["model_type"] = "unheard-of"
    elif how == "no template":
        (to / "chat_template.jinja").unlink()
    elif how == "no processor":
        (to / "processor_config.json").unlink()
    elif how == "a template that fails":
        (to / "chat_template.jinja").write_text("{{ raise_exception('one picture only') }}")
    elif how == "no config":
        (to / "config.json").unlink()
        return to
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "holds no config.json"),
        ("no weights", "is no vision-language model that loads"),
        ("pickled weights", "is no vision-language model that loads"),
        ("cut weights", "is no vision-language model that loads"),
        ("half the tensors", r"lack \d+ tensors, such as"),
        ("other shapes", "lack|loads"),
        ("text only", "is no vision-language model that loads"),
        ("own code", "is no vision-language model that loads"),
        ("no template", "has no chat template"),
        ("no processor", "no image processor|loads"),
        ("a template that fails", "with 2 pictures: one picture only"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_words(folder: Path, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        said(annotator(_broken(folder, tmp_path / "m", how), tmp_path))
    assert str(error.value).count("\n") <= 2
    assert not (tmp_path / "m" / "ran").exists()


def test_bad_settings_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    for settings, message in [
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"device": "tpu9000"}, "device 'tpu9000'"),
        ({"stages": "three"}, "stages 'three' is unknown"),
        ({"max_tokens": 0}, "must be positive"),
        ({"temperature": -1.0}, "temperature -1.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            HFConfig("x", **settings)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds no GPU here"):
            annotator(folder, tmp_path, device="cuda")
    with pytest.raises(InputError, match="exceed the 4096 of this model"):
        said(annotator(folder, tmp_path, max_tokens=4090))
