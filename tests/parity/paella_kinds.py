"""The recorded networks of Paella v1 and of v3's tokenizer, through the converters."""

import math

import torch
from parity.case import Case
from torch.nn import functional as F

from diffusers_ext.conversion.paella import convert_paella_unet, convert_paella_vqgan, convert_paella_vqgan_gumbel
from diffusers_ext.losses.quantization import vector_quantize
from diffusers_ext.models.token_codec import codebook_weight, decode_indices, encode_indices
from diffusers_ext.models.unet_paella import paella_time_embedding


@torch.no_grad()
def v1_unet_forward(case: Case) -> None:
    ctor = case.facts["ctor"]
    unet = convert_paella_unet(case.weights(), time_embed_dim=ctor.get("c_r", 64))
    assert unet.config["num_vq_embeddings"] == ctor["num_labels"]
    assert list(unet.config["down_layers_per_block"]) == ctor["down_levels"]
    assert list(unet.config["up_layers_per_block"]) == ctor["up_levels"]
    tokens, r = case["tokens"], case["r"]
    if "gamma_r" in case:
        case.check("gamma_r", torch.cos(r * (torch.pi / 2)))
    if "r_embed" in case:
        case.check("r_embed", paella_time_embedding(r, unet.config["time_embed_dim"]))

    outputs: list[torch.Tensor] = []
    hooks = [level.register_forward_hook(lambda _, __, output: outputs.append(output)) for level in unet.down_levels]
    logits = unet(tokens, r, case["clip"]).sample
    for hook in hooks:
        hook.remove()
    for name in case.names("level_output_"):  # recorded deepest first
        depth = len(outputs) - 1 - int(name.removeprefix("level_output_"))
        case.check(name, outputs[depth].permute(0, 3, 1, 2))

    case.check("logits", logits)
    if "logits_zero_clip" in case:
        case.check("logits_zero_clip", unet(tokens, r, torch.zeros_like(case["clip"])).sample)
    if "logits_spatial_clip" in case:
        case.check("logits_spatial_clip", unet(tokens, r, case["clip_spatial"]).sample)


@torch.no_grad()
def v1_vqgan_gumbel_f8(case: Case) -> None:
    config = case.facts["ctor"]["ddconfig"]
    vqvae = convert_paella_vqgan_gumbel(case.weights(), sample_size=config["resolution"])
    assert len(vqvae.config["block_out_channels"]) == len(config["ch_mult"])
    assert vqvae.config["layers_per_block"] == config["num_res_blocks"]
    image = 2 * case["image"] - 1
    latents = vqvae.encode(image).latents
    case.check("latents", latents)
    case.check("codebook_logits", vqvae.quantize_proj(latents))
    indices = encode_indices(vqvae, image)
    case.check("indices_argmax", indices)
    if "indices_sampled" in case:
        case.check("indices_sampled", encode_indices(vqvae, image, gumbel_noise=case["gumbel_noise"]))
    case.check("codebook_vectors", vqvae.quantize.embedding(indices).permute(0, 3, 1, 2))
    raw = decode_indices(vqvae, indices)
    case.check("decoded_raw", raw)
    case.check("decoded_image", (raw.clamp(-1, 1) + 1) / 2)
    if "kl_loss" in case:  # tiny numbers: only a relative tolerance says anything
        log_p = torch.log_softmax(vqvae.quantize_proj(latents), dim=1)
        divergence = (log_p.exp() * (log_p + math.log(log_p.shape[1]))).sum(dim=1).mean()
        case.check("kl_loss", (case.facts["ctor"]["kl_weight"] * divergence)[None], atol=0.0, rtol=1e-4)


@torch.no_grad()
def v3_vqgan_f4(case: Case) -> None:
    ctor = case.facts["ctor"]
    vqvae = convert_paella_vqgan(case.weights(), scale_factor=ctor["scale_factor"])
    assert vqvae.config["levels"] == ctor["levels"] and vqvae.config["bottleneck_blocks"] == ctor["bottleneck_blocks"]
    assert vqvae.config["embed_dim"] == ctor["c_hidden"] and vqvae.config["num_vq_embeddings"] == ctor["codebook_size"]
    scale = vqvae.config["scale_factor"]
    image = 2 * case["image"] - 1
    latents = vqvae.encode(case["image"]).latents
    case.check("latents_unscaled", latents)
    case.check("latents_scaled", latents / scale)
    indices = encode_indices(vqvae, image)
    case.check("indices", indices)
    codes, loss = vector_quantize(latents, codebook_weight(vqvae), indices, beta=0.25)
    error = F.mse_loss(codes, latents)
    case.check("vq_loss", error.reshape(case["vq_loss"].shape))
    case.check("commit_loss", error.reshape(case["commit_loss"].shape))
    case.check("loss", loss.reshape(case["loss"].shape))
    case.check("quantized_scaled", codes / scale)
    case.check("decoded_from_quantized", vqvae.decode(codes).sample)
    case.check("decoded_from_latents", vqvae.decode(latents).sample)
    case.check("decoded_from_indices", (decode_indices(vqvae, indices) + 1) / 2)


KINDS = {
    "v1_unet_forward": v1_unet_forward,
    "v1_vqgan_gumbel_f8": v1_vqgan_gumbel_f8,
    "v3_vqgan_f4": v3_vqgan_f4,
}
