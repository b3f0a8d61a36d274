"""train_clip.py on data with classes: equal captions are one text, in the loss, in the figures and in the log."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import train_clip
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel

from diffusers_ext.training.clip.networks import build_clip
from diffusers_ext.training.clip.objective import ClipObjective, contrastive_losses
from diffusers_ext.training_utils.tokenizers import train_clip_tokenizer

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "training" / "presets" / "clip-smoke.yaml")


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build(*captions: str, **options) -> tuple[ClipObjective, dict[str, torch.Tensor]]:
    """A tiny objective and a batch with these captions (then those of further columns)."""
    args, _, _ = train_clip.parse_args([SMOKE])
    tokenizer = train_clip_tokenizer(captions, args.vocab_size, args.max_length)
    torch.manual_seed(0)
    objective = ClipObjective(build_clip(args, tokenizer, 32), **options)
    ids = tokenizer(list(captions), padding=True, return_tensors="pt")
    return objective, {"input_ids": ids.input_ids, "attention_mask": ids.attention_mask}


def embeddings(objective, pixels, ids) -> tuple[torch.Tensor, torch.Tensor]:
    clip = objective.clip
    seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    read = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def test_equal_captions_share_the_target():
    objective, texts = build("a red circle", "a blue star", "a red circle", has_paraphrases=False)
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        seen, read = embeddings(objective, pixels, texts["input_ids"])
        logits = objective.clip.logit_scale.exp() * seen @ read.T
        target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
        got = objective.contrast(pixels, **texts)
    wanted = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    torch.testing.assert_close(got["loss"], wanted)
    hits = target.gather(1, logits.argmax(1, keepdim=True)) > 0
    torch.testing.assert_close(got["accuracy"], hits.float().mean())


def test_validation_is_against_the_distinct_captions():
    captions = ["a red circle", "a blue star", "a red circle", "a red circle"]
    objective, texts = build(*captions, has_paraphrases=False)
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        seen, read = embeddings(objective, pixels, texts["input_ids"])
        logits = objective.clip.logit_scale.exp() * seen @ read[:2].T  # (4, 2): two captions
        got = objective.eval().contrast(pixels, **texts)
    right = torch.tensor([0, 1, 0, 0])
    of_texts = F.cross_entropy(logits.T, torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3], [0, 1, 0, 0]]))
    torch.testing.assert_close(got["loss"], 0.5 * (F.cross_entropy(logits, right) + of_texts))
    torch.testing.assert_close(got["accuracy"], (logits.argmax(1) == right).float().mean())


def test_a_negative_that_is_true_of_another_picture_is_no_negative_there():
    objective, texts = build("a red circle", "a blue star", "a blue star", "a ring", has_paraphrases=False)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        seen, read = embeddings(objective, pixels, texts["input_ids"])
        scale = objective.clip.logit_scale.exp()
        positives = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]).bool()
        wanted = contrastive_losses(seen, read, scale, positives)
        got = objective.contrast(pixels, **texts)
    torch.testing.assert_close(got["loss"], wanted["loss"])


def test_paraphrases_of_an_equal_caption_are_true_as_well():
    captions, paraphrases = (
        ["a red circle", "a blue star", "a red circle"],
        ["circle, red", "star, blue", "red, round"],
    )
    objective, texts = build(*captions, *paraphrases, has_paraphrases=True)
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        _, read = embeddings(objective, pixels, texts["input_ids"])
        true = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
        scale = objective.clip.logit_scale.exp()
        wanted = contrastive_losses(read[:3], read[3:], scale, true)["loss"]
        got = objective.contrast(pixels, **texts)
    torch.testing.assert_close(got["text_loss"], wanted)


def test_distinct_captions_give_the_plain_loss_to_the_bit():
    torch.manual_seed(0)
    images, texts, scale = torch.randn(6, 8), torch.randn(9, 8), torch.tensor(14.3)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(6)
    plain = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :6].T, target))
    for positives in (None, torch.eye(6, 9).bool()):
        assert torch.equal(contrastive_losses(images, texts, scale, positives)["loss"], plain)


def test_the_contrast_is_in_float32_under_autocast():
    torch.manual_seed(0)
    images, texts, scale = torch.randn(6, 8), torch.randn(9, 8), torch.tensor(100.0)
    plain = contrastive_losses(images, texts, scale)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        got = contrastive_losses(images, texts, scale)["loss"]
    assert torch.equal(got, plain)


def test_the_scale_of_the_logits_stays_within_the_papers_bound_and_can_come_back():
    objective, texts = build("a red circle", "a blue star", has_paraphrases=False)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    objective.clip.logit_scale.data.fill_(6.0)
    objective.contrast(pixels, **texts)["loss"].backward()
    assert objective.clip.logit_scale.item() == pytest.approx(math.log(100)) and objective.clip.logit_scale.grad != 0


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Pictures of two classes, one folder each, hence two captions."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(60):
        name, color = ("red things", (200 + index % 50, 10, 10)), ("blue things", (10, 10, 200 + index % 50))
        place, shade = name if index % 2 else color
        (folder / place).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), shade).save(folder / place / f"{index:02}.png")
    return folder


def words(folder: Path, output_dir: Path, *more: str) -> list[str]:
    """The smoke preset for a folder of classes, whose names are the captions."""
    preset = ("dataset_name", "negative_caption_column", "output_dir")
    lines = [line for line in Path(SMOKE).read_text().splitlines() if not line.startswith(preset)]
    (output_dir.parent / "own.yaml").write_text("\n".join(lines))
    return [
        str(output_dir.parent / "own.yaml"),
        "--train_data_dir",
        str(folder),
        "--captions_from_names",
        "--output_dir",
        str(output_dir),
        *more,
    ]


def test_the_log_counts_captions_and_tells_when_classes_are_told_apart(classes, tmp_path, caplog):
    more = ("--max_train_steps", "30", "--learning_rate", "1e-2", "--checkpointing_steps", "30")
    with caplog.at_level("INFO"):
        train_clip.main(words(classes, tmp_path / "clip", *more))
    assert "2 distinct captions among 54" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "clip" / "log.jsonl").read_text().splitlines()]
    # of the 6 held-out pictures 2 at most could be right if only their own copy of the caption were a hit
    assert [line["validation_accuracy"] for line in lines if "validation_accuracy" in line] == [1.0]
    assert CLIPModel.from_pretrained(tmp_path / "clip").logit_scale <= math.log(100) + 1e-6


@pytest.mark.parametrize(
    "more, message",
    [
        (["--train_batch_size", "1"], "--train_batch_size=1: a contrast needs two different captions"),
        (["--train_batch_size", "1", "--gradient_accumulation_steps", "8"], "micro-batches are not contrasted"),
    ],
)
def test_a_contrast_with_nothing_is_refused(classes, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train_clip.parse_args(words(classes, tmp_path / "clip", *more))
    train_clip.parse_args(words(classes, tmp_path / "clip", *more, "--caption_weight", "1"))  # has something to learn


def test_data_with_one_caption_are_refused(classes, tmp_path):
    one = tmp_path / "data" / "red things"
    one.mkdir(parents=True)
    for picture in sorted((classes / "red things").iterdir())[:6]:
        shutil.copy(picture, one)
    with pytest.raises(ValueError, match="of which 1 differ: a contrast needs two different captions"):
        train_clip.main(words(tmp_path / "data", tmp_path / "clip"))
