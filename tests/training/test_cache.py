"""The cache of tokens and embeddings: equal to computing them, refused where it belongs to something else."""

import json
import os
import pickle
import runpy
from pathlib import Path

import pytest
import torch
import train_paella
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoTokenizer

from diffusers_ext import PaellaPipeline
from diffusers_ext.data.image_folder import load_image_dataset
from diffusers_ext.data.scenes import load_scenes, write_scenes
from diffusers_ext.training.paella.conditions import freeze, in_batches, make_condition
from diffusers_ext.training.paella.networks import build_pipeline
from diffusers_ext.training_utils.cache import (
    CacheError,
    SampleCache,
    digest_network,
    digest_rows,
    digest_saved,
    open_cache,
)

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "paella-scenes-64"


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)  # the smoke preset names the bundled checkpoint from here
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------------------------
# in the recipe


def smoke(output_dir, *more: str, samples: int = 10) -> list[str]:
    """The smoke preset, three steps: with 10 samples, the third batch has two."""
    return [
        "training/presets/paella-smoke.yaml", "--max_train_samples", str(samples), "--max_train_steps", "3",
        "--logging_steps", "1", "--num_inference_steps", "1", "--center_crop", "--output_dir", str(output_dir), *more,
    ]  # fmt: skip


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    weights = {}
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        if (folder / name).is_file():
            weights |= {f"{name}:{key}": value for key, value in load_file(folder / name).items()}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return weights, [line["loss"] for line in lines if "loss" in line]


def assert_equal_runs(*folders: Path) -> None:
    (weights, losses), *others = map(result, folders)
    for other_weights, other_losses in others:
        assert weights.keys() == other_weights.keys() and losses == other_losses
        assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


CONDITIONS = {
    "text": (),
    "trained text": ("--train_text_encoder",),
    "image": ("--condition", "image"),
    "class": ("--condition", "class", "--num_labels", "48"),
    "semantic": ("--condition", "semantic", "--num_labels", "7"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_training_from_the_cache_equals_training_without(tmp_path, name):
    train_paella.main(smoke(tmp_path / "plain", *CONDITIONS[name]))
    cached = (*CONDITIONS[name], "--cache_dir", str(tmp_path / "cache"))
    train_paella.main(smoke(tmp_path / "written", *cached))
    assert_equal_runs(tmp_path / "plain", tmp_path / "written")
    names = {"tokens", *({"label"} if name == "class" else {"map"} if name == "semantic" else set())}
    if "text" in name or name == "image":
        names.add("text" if name == "trained text" else "vectors")
    shard = load_file(tmp_path / "cache" / "shard-000000.safetensors")
    assert {key.removesuffix(".offsets") for key in shard} == names and shard["tokens"].dtype != torch.int64
    if name == "text":  # and once more, from what was written, with loader processes
        stamp = (tmp_path / "cache" / "shard-000000.safetensors").stat().st_mtime_ns
        train_paella.main(smoke(tmp_path / "reused", *cached, "--dataloader_num_workers", "2"))
        assert_equal_runs(tmp_path / "plain", tmp_path / "reused")
        assert (tmp_path / "cache" / "shard-000000.safetensors").stat().st_mtime_ns == stamp


@pytest.fixture
def folder_with_captions(tmp_path) -> Path:
    """Pictures with one, two or three captions each, of which a training draws one."""
    folder = write_scenes(tmp_path / "scenes", 9, resolution=64)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = [line["text"], line["full_text"], line["negative_text"]][: 1 + number % 3]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize("more", [(), ("--train_text_encoder",)], ids=["frozen", "trained"])
def test_the_same_caption_is_drawn_from_the_cache(tmp_path, folder_with_captions, more):
    for name, cache in (("plain", ()), ("cached", ("--cache_dir", str(tmp_path / "cache")))):
        words = smoke(tmp_path / name, "--train_data_dir", str(folder_with_captions), *more, *cache)
        train_paella.main(words)
    assert_equal_runs(tmp_path / "plain", tmp_path / "cached")
    sizes = [len(sample["text" if more else "vectors"]) for sample in SampleCache(tmp_path / "cache")]
    assert more or sizes == [1, 2, 3] * 3


def test_an_interrupted_cache_is_completed_and_others_are_refused(tmp_path):
    """In one test, because each training takes a while: the recipe's own key, and what it refuses by name."""
    words = ("--cache_dir", str(tmp_path / "cache"))
    train_paella.main(smoke(tmp_path / "first", *words, samples=4))
    (tmp_path / "cache" / "shard-000000.safetensors").unlink()
    train_paella.main(smoke(tmp_path / "second", *words, samples=4))
    assert_equal_runs(tmp_path / "first", tmp_path / "second")
    other = tmp_path / "other"
    pipe = PaellaPipeline.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        pipe.text_encoder.text_projection.weight[0, 0] += 1
        pipe.vqvae.in_block[1].bias[0] += 1
    pipe.vqvae.save_pretrained(other / "vqvae")
    pipe.save_pretrained(other / "clip")
    for more, message in (
        (("--max_train_samples", "5"), r"made of something else: num_samples \(4 there, 5 here\), data \("),
        (("--dataset_config_name", "plain"), r"something else: data \(\w+ there, \w+ here\)\. Name another --cache"),
        (("--resolution", "32"), r"data \(.*resolution \(64 there, 32 here\)"),
        (("--condition", "image"), r"condition \(text there, image here\), column \(text there, image here\)"),
        (("--train_text_encoder",), r"train_text_encoder \(False there, True here\)"),
        (("--pretrained_vqvae_name_or_path", str(other / "vqvae")), r"something else: vqvae \("),
        (("--pretrained_clip_name_or_path", str(other / "clip")), r"something else: text_encoder \("),
    ):
        with pytest.raises(CacheError, match=message):
            train_paella.main([*smoke(tmp_path / "third", *words, samples=4), *more])


@pytest.mark.parametrize("words", [[], ["--center_crop", "--random_flip"]], ids=["random crop", "flip"])
def test_augmentation_excludes_the_cache(words):
    with pytest.raises(
        ValueError, match="which excludes augmentation: pass --center_crop and leave out --random_flip"
    ):
        train_paella.parse_args(["--dataset_name", "scenes", "--cache_dir", "x", *words])


@torch.no_grad()
def test_bf16_training_sees_the_tokens_and_vectors_that_sampling_sees(tmp_path):
    args, data, _ = train_paella.parse_args(smoke(tmp_path))
    pipe = build_pipeline(args, data.resolution)
    condition = make_condition(args, data, pipe, "text")
    encoders = freeze(pipe, torch.device("cpu"), 4)
    rows = [condition.read(row, torch.Generator()) for row in load_scenes(4)]
    texts, batch = [row["text"] for row in rows], condition.collate(rows)
    tokens, vectors = encoders.tokens(batch["image"]), condition.tensor(batch, encoders)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_tokens, autocast_vectors = encoders.tokens(batch["image"]), condition.tensor(batch, encoders)
        lossy = pipe.text_encoder(batch["ids"]).text_embeds
    assert torch.equal(autocast_tokens, tokens) and torch.equal(autocast_vectors, vectors)
    assert (lossy - vectors).abs().max() > 1e-4  # autocast would have made a difference
    prompt = pipe.encode_prompt(texts, num_images_per_prompt=1)
    torch.testing.assert_close(vectors, prompt[0] if isinstance(prompt, tuple) else prompt)


def test_the_benchmark_compares_speed_and_results(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "benchmarks" / "speed_paella_cache.py"))["main"]
    tiny = ["--train_batch_size", "4", "--block_out_channels", "16", "32", "--down_layers_per_block", "1", "1"]
    tiny += ["--up_layers_per_block", "1", "1"]
    words = ["--conditions", "class", "--rounds", "1", "--steps", "4", "--window", "1", "--num_samples", "8"]
    main([*words, *tiny, "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["equal"] and row["ratio"] == pytest.approx(row["cached"] / row["on_the_fly"]) and row["cached"] > 0
    assert f"| {row['ratio']:.2f} | yes |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--steps", "3", "--window", "2"])
    assert "at least one round and two windows" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# the parts


class Numbers(torch.utils.data.Dataset):
    """Ten samples, and a note of which were read."""

    def __init__(self, length: int = 10):
        self.length, self.seen = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.seen.append(index)
        return index


def read_number(index: int) -> int:
    return 100 * index


def encode_numbers(samples: list[int]) -> list[dict[str, torch.Tensor]]:
    return [
        {"tokens": torch.tensor([[s, -s]]), "vectors": torch.full((s // 100 % 4, 2), s / 7), "label": torch.tensor(s)}
        for s in samples
    ]


def open_numbers(folder, dataset=None, key=None, **options):
    options = {"batch_size": 2, "shard_size": 4, "ragged": ("vectors",), "encode": encode_numbers, **options}
    dataset = Numbers() if dataset is None else dataset
    return open_cache(
        folder, key or {"data": "a"}, dataset, read=read_number, accelerator=Accelerator(cpu=True), **options,
    )  # fmt: skip


def assert_numbers(cache: SampleCache, length: int = 10) -> None:
    assert len(cache) == length
    for index in range(length):
        (expected,) = encode_numbers([100 * index])
        sample = cache[index]
        assert sample.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(sample[name], value) and sample[name].dtype == value.dtype, name


def test_samples_come_back_as_they_were_encoded(tmp_path):
    cache = open_numbers(tmp_path / "cache")
    assert_numbers(cache)
    assert_numbers(pickle.loads(pickle.dumps(cache)))  # as a loader process gets it
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["cache.json"] + [
        f"shard-00000{number}.safetensors" for number in range(3)
    ]
    assert load_file(tmp_path / "cache" / "shard-000000.safetensors")["tokens"].dtype == torch.int16
    for index in (-1, 10):
        with pytest.raises(IndexError, match=rf"holds samples 0 to 9, not {index}"):
            cache[index]
    samples = cache[7]["vectors"]
    samples.zero_()
    assert cache[7]["vectors"].any()  # nobody writes into the file


def test_only_what_is_missing_is_written(tmp_path):
    open_numbers(tmp_path)
    (tmp_path / "shard-000001.safetensors").unlink()
    (tmp_path / "shard-000001.safetensors.tmp-1").write_bytes(b"cut")  # of an interrupted run
    dataset = Numbers()
    assert_numbers(open_numbers(tmp_path, dataset, num_workers=0, shard_size=3))  # the size stays that of the cache
    assert dataset.seen == [0, 9, 4, 5, 6, 7]  # the first and the last are compared
    dataset.seen.clear()
    open_numbers(tmp_path, dataset)
    assert dataset.seen == [0, 9]


@pytest.mark.parametrize(
    "change",
    [
        lambda sample: {**sample, "tokens": sample["tokens"] + 1},
        lambda sample: {**sample, "vectors": sample["vectors"] * 1.1},
        lambda sample: {**sample, "vectors": sample["vectors"][:0]},
        lambda sample: {"tokens": sample["tokens"]},
    ],
    ids=["tokens", "vectors", "number of captions", "names"],
)
def test_samples_that_have_changed_unnoticed_are_found(tmp_path, change):
    open_numbers(tmp_path)
    with pytest.raises(CacheError, match=r"Sample 9 of the cache .* is not what the encoders make of it now"):
        open_numbers(tmp_path, encode=lambda samples: [*encode_numbers(samples[:1]), change(*encode_numbers([900]))])
    open_numbers(  # another device rounds otherwise
        tmp_path, encode=lambda samples: [{**s, "vectors": s["vectors"] * 1.001} for s in encode_numbers(samples)]
    )


def test_other_folders_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(CacheError, match=r"something else: num_samples \(10 there, 9 here\)\. Name another"):
        open_numbers(tmp_path / "a") and open_numbers(tmp_path / "a", Numbers(9))
    with pytest.raises(CacheError, match=r"data \(a there, b here\), resolution \(None there, 64 here\)"):
        open_numbers(tmp_path / "a", key={"data": "b", "resolution": 64})
    (tmp_path / "b").mkdir()
    assert_numbers(open_numbers(tmp_path / "b"))  # an empty folder will do
    shard = tmp_path / "b" / "shard-000002.safetensors"
    shard.write_bytes((tmp_path / "b" / "shard-000001.safetensors").read_bytes())
    with pytest.raises(CacheError, match=r"shard-000002\.safetensors does not hold 2 samples: remove it"):
        open_numbers(tmp_path / "b")
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CacheError, match=r"shard-000002\.safetensors is damaged .*remove it, and the next run writes"):
        open_numbers(tmp_path / "b")
    (tmp_path / "b" / "cache.json").write_text("{")
    with pytest.raises(CacheError, match=r"is not empty, but holds no readable cache\.json"):
        open_numbers(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "holiday.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"is not empty, but holds no readable cache\.json.*Name another --cache_dir"):
        open_numbers(tmp_path / "c")


def test_rows_are_computed_in_batches_of_one_size():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.GELU(), torch.nn.Linear(53, 5)).eval()
    sizes = []

    def compute(rows):
        sizes.append(len(rows))
        return network(rows)

    inputs = torch.randn(11, 37)
    torch.testing.assert_close(in_batches(compute, inputs, 4), network(inputs))
    assert sizes == [4, 4, 4]
    alone = in_batches(compute, inputs, 1)
    assert torch.equal(in_batches(compute, inputs[[7, 2]], 1), alone[[7, 2]])  # to the bit, in any company


def test_digests_of_networks_know_weights_and_config_and_nothing_else(tmp_path):
    pipe = PaellaPipeline.from_pretrained(CHECKPOINT)
    again = PaellaPipeline.from_pretrained(str(CHECKPOINT))
    again.vqvae.save_pretrained(tmp_path)
    moved = type(again.vqvae).from_pretrained(tmp_path)
    assert digest_network(moved) == digest_network(pipe.vqvae)
    assert digest_network(again.text_encoder) == digest_network(pipe.text_encoder) != digest_network(pipe.vqvae)
    again.text_encoder.config.hidden_act = "relu"
    moved.to(torch.float16)
    assert digest_network(again.text_encoder) != digest_network(pipe.text_encoder)
    assert digest_network(moved) != digest_network(pipe.vqvae)

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert digest_saved(tokenizer) == digest_saved(pipe.tokenizer) != digest_saved(pipe.feature_extractor)
    tokenizer.add_tokens(["a-new-word"])
    assert digest_saved(tokenizer) != digest_saved(pipe.tokenizer)


def test_digests_of_data_know_rows_files_and_how_they_are_shown(tmp_path):
    def scenes(**options):
        return digest_rows(load_scenes(options.pop("size", 5), **options), ("image", "text"))

    assert scenes() == scenes()
    assert len({scenes(), scenes(size=6), scenes(resolution=32), scenes(seed=1), scenes(split="validation")}) == 5
    rows = load_scenes(5)
    chosen = [digest_rows(rows.select(order), ("image",)) for order in ([0, 1], [1, 0], [0, 1])]
    assert chosen[0] == chosen[2] != chosen[1]

    folder = write_scenes(tmp_path / "folder", 3, resolution=32)

    def on_disk(*columns: str) -> str:
        return digest_rows(load_image_dataset(folder, cache_dir=str(tmp_path)), columns)

    before = on_disk("image", "text")
    assert before == on_disk("image", "text") != on_disk("image")
    os.utime(folder / "000001.png", (1, 1))
    touched = on_disk("image", "text")
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("red", "blue").replace("green", "blue"))
    assert len({before, touched, on_disk("image", "text")}) == 3
