"""The text autoencoder's recipe: end to end, one step by hand, resuming, its three starting points, its refusals."""

import json
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import train_optimus
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model

from diffusers_ext import AutoencoderOptimus
from diffusers_ext.data.sentences import load_sentences
from diffusers_ext.losses.sentences import gaussian_kl
from diffusers_ext.pipelines.versatile.optimus_text import read_sentences, sentence_ids
from diffusers_ext.training.optimus.data import collate_samples, read_sample
from diffusers_ext.training.optimus.networks import build_model
from diffusers_ext.training_utils.plan import LOSS_STREAM, StepPlan, keyed_generator

PRESETS = Path(__file__).parents[2] / "training" / "presets"
SMOKE = str(PRESETS / "optimus-smoke.yaml")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(folder: Path, *words: str) -> Path:
    train_optimus.main([SMOKE, "--output_dir", str(folder), "--logging_steps", "1", *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return run(tmp_path_factory.mktemp("optimus") / "smoke")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder) if name in line]


def load(folder: Path):
    tokenizers = [AutoTokenizer.from_pretrained(folder / f"{part}_tokenizer") for part in ("encoder", "decoder")]
    return AutoencoderOptimus.from_pretrained(folder), tokenizers


def test_smoke_run_ends_with_a_model_that_loads(smoke):
    model, (encoder, decoder) = load(smoke)
    assert model.config.latent_dim == 16 and model.config.encoder_pad_token_id == encoder.pad_token_id == 0
    assert (model.config.bos_token_id, model.config.eos_token_id) == (decoder.bos_token_id, decoder.eos_token_id)
    latents = model.encode(sentence_ids(encoder, ["A small blue star", "über"])).mean
    assert latents.shape == (2, 16)  # no word is unknown
    assert len(read_sentences(decoder, model.decode(latents, max_length=12))) == 2
    report = lines(smoke)[-1]
    pairs = [json.loads(line) for line in (smoke / "validation-6.jsonl").read_text().splitlines()]
    right = sum(pair["sentence"] == pair["reconstruction"] for pair in pairs)
    assert len(pairs) == 256 and report["validation_exact"] == right / 256
    card = (smoke / "README.md").read_text()
    assert "import diffusers_ext" in card and f"{right / 256:.1%} of held-out sentences come back exactly" in card


def test_the_weight_of_the_divergence_goes_through_its_cycle(smoke, tmp_path):
    assert logged(smoke, "beta") == pytest.approx([0, 0, 0, 1 / 1.8, 1, 1], abs=1e-5)  # one cycle: 1.8 steps each
    cycles = ["--beta_cycles", "2", "--beta", "0.5", "--beta_rise_fraction", "0", "--max_train_samples", "20"]
    accumulated = run(tmp_path, *cycles, "--gradient_accumulation_steps", "2", "--train_batch_size", "4")
    assert logged(accumulated, "beta") == pytest.approx([0, 0.5, 0.5] * 2)  # 3, 3, 2 ... micro-batches a step


def test_one_step_by_hand(tmp_path):
    """Every logged term of the first step with the divergence in it, from the same weights, sentences and draws."""
    words = ["--max_train_steps", "1", "--beta_zero_fraction", "0", "--beta_rise_fraction", "0", "--beta", "0.7"]
    words += ["--max_train_samples", "4", "--train_batch_size", "4", "--free_bits", "0.3", "--dropout", "0"]
    record = lines(run(tmp_path, *words))[0]

    args, data, train = train_optimus.parse_args([SMOKE, *words])
    set_seed(train.seed)
    train_set, _ = load_sentences(data)
    model, tokenizers = build_model(args, [row["text"] for row in train_set])
    ((keys, _),) = StepPlan(4, 4, seed=train.seed).micro_batches(0)
    batch = collate_samples([{"sentence": train_set[i]["text"]} for _, i in keys], tokenizers, args)
    generators = [keyed_generator(train.seed, epoch, i, LOSS_STREAM) for epoch, i in keys]
    noise = torch.stack([torch.randn(16, generator=g) for g in generators])
    with torch.no_grad():
        posterior = model.encode(batch["input_ids"])
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * noise
        chances = model.predict(latents, batch["token_ids"]).log_softmax(-1)
    nll, weighted, right = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for row, ids in enumerate(batch["token_ids"].tolist()):
        ids = [i for i in ids if i != tokenizers[1].pad_token_id]
        nll[row] = -sum(chances[row, at, token] for at, token in enumerate(ids[1:]))
        right[row] = sum(int(chances[row, at].argmax()) == i for at, i in enumerate(ids[1:])) / (len(ids) - 1)
        weighted[row] = nll[row] / len(ids)
    divergence = gaussian_kl(posterior.mean, posterior.logvar)
    counted = divergence * (divergence > 0.3)
    assert 1 < counted.sum() < divergence.sum() - 1
    expected = {
        "loss": weighted.mean() + 0.7 * counted.sum(1).mean(),
        "nll": nll.mean(),
        "kl": divergence.sum(1).mean(),
        "beta": torch.tensor(0.7),
        "accuracy": right.mean(),
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value.item(), rel=1e-4, abs=2e-6), name


def test_unweighted_loss_is_the_sum_over_the_sentence(tmp_path):
    words = ["--max_train_steps", "1", "--beta", "0", "--length_weighted_loss", "false"]
    record = lines(run(tmp_path, *words))[0]
    assert record["loss"] == pytest.approx(record["nll"], rel=1e-5)


def test_resuming_is_exact_with_dropout_and_cycle(smoke, tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()  # as if the run had been killed after step 3
    run(tmp_path, "--resume_from_checkpoint", "latest")
    straight, resumed = load_file(smoke / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert logged(tmp_path, "beta") == logged(smoke, "beta")


def test_sentences_can_be_learnt_by_heart(tmp_path):
    """Eight sentences, which without held-out ones are those that are reported."""
    text = tmp_path / "few.txt"
    text.write_text(
        "\n".join(f"{color} {shape}" for color in ("red", "blue") for shape in ("ring", "star", "cross", "X"))
    )
    folder = tmp_path / "run"
    words = ["--train_data_dir", str(text), "--max_train_steps", "200", "--learning_rate", "3e-3", "--beta", "0.1"]
    words += ["--dropout", "0", "--max_length", "8", "--checkpointing_steps", "999", "--logging_steps", "20"]
    train_optimus.main([SMOKE, *words, "--output_dir", str(folder)])
    assert logged(folder, "validation_exact") == [1.0] and logged(folder, "validation_active_latents")[0] > 0
    model, (encoder, decoder) = load(folder)
    latents = model.encode(sentence_ids(encoder, ["Blue Ring"])).mean  # lower case, also the X
    assert read_sentences(decoder, model.decode(latents, do_sample=False, max_length=8)) == ["blue ring"]


def test_fine_tuning_goes_on_with_weights_and_tokenizers(smoke, tmp_path):
    words = ["--pretrained_model_name_or_path", str(smoke), "--max_train_steps", "1", "--learning_rate", "0"]
    tuned = run(tmp_path, *words, "--dropout", "0.25")
    before, after = load_file(smoke / WEIGHTS), load_file(tuned / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoencoderOptimus.from_pretrained(tuned).config.dropout == 0.25
    for part in ("encoder", "decoder"):
        assert (tuned / f"{part}_tokenizer/tokenizer.json").read_text() == (
            smoke / f"{part}_tokenizer/tokenizer.json"
        ).read_text()


def test_it_starts_from_bert_and_gpt2(smoke, tmp_path):
    _, (encoder, decoder) = load(smoke)
    for special in ("pad_token", "bos_token", "eos_token"):  # as GPT-2's own tokenizer: without ours
        setattr(decoder, special, None)
    bert = BertModel(BertConfig(
        vocab_size=len(encoder), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=90,
    ))  # fmt: skip
    gpt2 = GPT2Model(GPT2Config(vocab_size=len(decoder), n_embd=12, n_layer=1, n_head=3, n_positions=40))
    for name, parts in (("bert", (bert, encoder)), ("gpt2", (gpt2, decoder))):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    words = ["--pretrained_encoder_name_or_path", str(tmp_path / "bert"), "--pretrained_decoder_name_or_path"]
    words += [str(tmp_path / "gpt2"), "--max_train_steps", "1", "--learning_rate", "0", "--latent_dim", "5"]
    model, tokenizers = load(run(tmp_path / "run", *words))
    assert model.config.latent_dim == 5 and model.config.encoder_intermediate_size == 24
    assert len(tokenizers[1]) == model.config.decoder_vocab_size
    assert tokenizers[1].convert_tokens_to_ids("<EOS>") == model.config.eos_token_id
    for part, network in ((model.encoder, bert), (model.decoder, gpt2)):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(part.state_dict()[key][: len(value)], value)


def test_loader_processes_need_no_fork(smoke):
    args, _, _ = train_optimus.parse_args([SMOKE])
    _, tokenizers = load(smoke)
    for work in (
        partial(read_sample, column="text", lower_case=True),
        partial(collate_samples, tokenizers=tokenizers, args=args),
    ):
        pickle.loads(pickle.dumps(work))
    assert read_sample({"text": ["A b"]}, torch.Generator(), "text", True) == {"sentence": "a b"}
    assert read_sample({"text": "A b"}, torch.Generator(), "text", False) == {"sentence": "A b"}


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("optimus-*.yaml")), ids=lambda path: path.stem)
def test_presets_are_accepted(preset):
    train_optimus.parse_args([str(preset)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrained_encoder_name_or_path", "bert"], "go together, got 'bert' and None"),
        (["--pretrained_decoder_name_or_path", "gpt2"], "go together, got None and 'gpt2'"),
        (
            [f"--pretrained_{name}_name_or_path=x" for name in ("model", "encoder", "decoder")],
            "--pretrained_model_name_or_path holds an encoder and a decoder",
        ),
        (["--vocab_size", "258"], "--vocab_size must be >= 259 .* got 258"),
        (["--latent_dim", "0"], "--latent_dim must be >= 1, got 0"),
        (["--max_word_pieces", "0"], "--max_word_pieces must be >= 1, got 0"),
        (["--max_length", "2"], "--max_length must be >= 3, got 2"),
        (["--initializer_range", "0"], "--initializer_range must be > 0, got 0.0"),
        (["--free_bits", "-1"], "--free_bits must be >= 0, got -1.0"),
        (["--beta", "-0.5"], "--beta must be >= 0, got -0.5"),
        (["--gradient_checkpointing"], "--gradient_checkpointing: AutoencoderOptimus has none"),
        (["--beta_cycles", "0"], "--beta_cycles.*`num_cycles` is 0"),
        (["--beta_zero_fraction", "0.9"], "--beta_zero_fraction.*`rise_fraction` 0.25"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(words, message):
    with pytest.raises(ValueError, match=message):
        train_optimus.parse_args(["--dataset_name", "scenes", *words])
