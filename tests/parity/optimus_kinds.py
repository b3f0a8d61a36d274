"""The recorded text autoencoder of Versatile Diffusion, through the converter."""

from typing import Any

import torch
from parity.case import Case

from diffusers_ext.conversion.optimus import convert_optimus
from diffusers_ext.losses.sentences import gaussian_kl, sentence_nll
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus, filter_logits


def load(case: Case, **flags: bool) -> AutoencoderOptimus:
    facts, tokens = case.facts, case.facts["tokens"]
    fixed = facts["bert"]["hidden_act"], facts["bert"]["layer_norm_eps"], facts["gpt2"]["layer_norm_epsilon"]
    assert fixed == ("gelu", 1e-12, 1e-5)  # of the published Optimus; not read off the weights
    model = convert_optimus(
        case.weights(),
        encoder_heads=facts["bert"]["num_attention_heads"],
        decoder_heads=facts["gpt2"]["n_head"],
        encoder_pad_token_id=tokens["bert_pad"],
        pad_token_id=tokens["pad"],
        bos_token_id=tokens["bos"],
        eos_token_id=tokens["eos"],
        **flags,
    )
    assert model.config["latent_dim"] == facts["latent_size"]
    return model


def decode_one_by_one(model: AutoencoderOptimus, latents, **options) -> list[torch.Tensor]:
    """As the original: a sentence after the other, so that one generator serves them in turn."""
    return [model.decode(latents[i : i + 1], **options)[0] for i in range(len(latents))]


def check_ids(case: Case, name: str, sentences: list[torch.Tensor]) -> None:
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    case.check(f"{name}_len", lengths)
    padded = torch.full_like(case[f"{name}_ids"], case.facts["tokens"]["pad"])
    for row, sentence in enumerate(sentences):
        padded[row, : len(sentence)] = sentence
    case.check(f"{name}_ids", padded)


def cut_padding(batch: torch.Tensor, eos_token_id: int) -> list[torch.Tensor]:
    """Each sentence up to its first <EOS>; a sampled token may well be the padding."""
    return [row[: int((row == eos_token_id).int().argmax()) + 1] for row in batch]


def filter_options(name: str) -> dict[str, Any]:
    """What "filter_topk5", "filter_topp06" or "filter_topk5_topp06" asks for; the digits "06" are 0.6."""
    options: dict[str, Any] = {}
    for part in name.split("_")[1:]:
        option, digits = part[:4], part[4:]
        if option == "topk":
            options["top_k"] = int(digits)
        else:
            assert option == "topp", f"{name}: no filter {part!r}"
            options["top_p"] = float(digits if "." in digits else f"{digits[0]}.{digits[1:]}")
    return options


@torch.no_grad()
def optimus(case: Case) -> None:
    model, facts = load(case), case.facts
    hidden = model.encoder(case["bert_ids"], attention_mask=case["bert_mask"])
    case.check("bert_sequence", hidden.last_hidden_state)
    case.check("bert_pooled", hidden.pooler_output)
    for mask in (None, case["bert_mask"]):
        posterior = model.encode(case["bert_ids"], mask)
        case.check("mu", posterior.mean)
        case.check("logvar", posterior.logvar)
    latents, ids = posterior.mean, case["gpt_ids"]
    logits = model.predict(latents, ids)
    case.check("tf_logits", logits)
    case.check("loss_rec", sentence_nll(logits, ids, pad_token_id=facts["tokens"]["pad"]))
    case.check("kl", gaussian_kl(posterior.mean, posterior.logvar).sum(dim=1))
    case.check("tf_logits_emb_only", load(case, latent_as_memory=False).predict(latents, ids))
    case.check("tf_logits_mem_only", load(case, latent_as_embedding=False).predict(latents, ids))

    sample, longest = dict(facts["sample"]), facts["greedy"]["max_length"]
    seed = sample.pop("seed")
    for use_cache in (True, False):
        greedy = {"do_sample": False, "max_length": longest, "use_cache": use_cache}
        check_ids(case, "greedy", decode_one_by_one(model, latents, **greedy))
        check_ids(case, "greedy", cut_padding(model.decode(latents, **greedy), facts["tokens"]["eos"]))
        generator = torch.Generator().manual_seed(seed)
        sampled = decode_one_by_one(model, latents, generator=generator, use_cache=use_cache, **sample)
        check_ids(case, "sample", sampled)

    logits = case["filter_in"]
    for name in case.names("filter_top"):
        case.check(name, filter_logits(logits, **filter_options(name)))


KINDS = {"optimus": optimus}
