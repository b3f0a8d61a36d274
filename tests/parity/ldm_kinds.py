"""The recorded networks of latent diffusion, through the converters."""

from random import Random

import torch
from parity.case import Case

from diffusers_ext.conditions.inpainting import composite, latent_mask, masked_image
from diffusers_ext.conditions.layout import LayoutObject, LayoutTokenizer
from diffusers_ext.conversion.ldm import split_ldm_checkpoint
from diffusers_ext.conversion.ldm_autoencoder import convert_ldm_autoencoder_kl, convert_ldm_vq
from diffusers_ext.conversion.ldm_encoders import (
    convert_ldm_bert,
    convert_ldm_class_embedder,
    convert_ldm_layout_encoder,
    convert_ldm_spatial_rescaler,
)
from diffusers_ext.conversion.ldm_unet import convert_ldm_unet
from diffusers_ext.guidance import classifier_free_guidance
from diffusers_ext.losses.kl import kl_divergence, latent_scale, sample_posterior
from diffusers_ext.models.encoders_ldm import LDMSpatialRescaler
from diffusers_ext.pipelines.ldm.denoising import predict_noise


def heads_of(args: dict) -> dict[str, int]:
    """How the original's config names the heads: -1 stands for not given."""
    if args.get("num_head_channels", -1) != -1:
        return {"num_head_channels": args["num_head_channels"]}
    return {"num_heads": args["num_heads"]}


def load_unet(case: Case):
    args = case.facts.get("args") or case.facts["unet_args"]
    weights = case.weights()
    if any(key.startswith("model.diffusion_model.") for key in weights):
        weights = split_ldm_checkpoint(weights).unet
    unet = convert_ldm_unet(weights, **heads_of(args), sample_size=args["image_size"])
    assert unet.config["in_channels"] == args["in_channels"]
    assert list(unet.config["block_out_channels"]) == [args["model_channels"] * m for m in args["channel_mult"]]
    assert unet.config["layers_per_block"] == args["num_res_blocks"]
    return unet


@torch.no_grad()
def unet_forward(case: Case) -> None:
    context = case["context"] if "context" in case else None
    unet = load_unet(case)
    case.check("out", predict_noise(unet, case["x"], case["timesteps"], context=context))


@torch.no_grad()
def unet_class_conditional(case: Case) -> None:
    facts = case.facts
    parts = split_ldm_checkpoint(case.weights())
    embedder = convert_ldm_class_embedder(parts.cond_stage, null_class=facts["null_class"])
    assert embedder.config["num_class_embeds"] == facts["class_embedder_args"]["n_classes"]
    context, null_context = embedder(case["class_labels"]), embedder(case["null_labels"])
    assert torch.all(case["null_labels"] == embedder.config["null_class"])
    case.check("context", context)
    case.check("null_context", null_context)
    unet, call = load_unet(case), (case["x"], case["timesteps"])
    cond = predict_noise(unet, *call, context=context)
    uncond = predict_noise(unet, *call, context=null_context)
    case.check("eps_cond", cond)
    case.check("eps_uncond", uncond)
    scale = facts["guidance_scale"]
    case.check("eps_guided", classifier_free_guidance(cond, uncond, scale))
    guided = predict_noise(unet, *call, context=context, null_context=null_context, guidance_scale=scale)
    case.check("eps_guided", guided)


@torch.no_grad()
def autoencoder_kl(case: Case) -> None:
    config = case.facts["ddconfig"]
    vae = convert_ldm_autoencoder_kl(case.weights(), sample_size=config["resolution"])
    posterior = vae.encode(case["x"]).latent_dist
    case.check("moments", posterior.parameters)
    case.check("mean", posterior.mean)
    case.check("logvar", posterior.logvar)
    case.check("std", posterior.std)
    sample = sample_posterior(posterior.parameters, case["noise"])
    case.check("z_sample", sample)
    sums = case["kl_per_sample"]  # over C*h*w elements: the tolerance is that of one element, times their number
    atol = max(case.facts["atol"], 1e-5 * float(sums.abs().max()))
    case.check("kl_per_sample", kl_divergence(posterior.parameters), atol=atol)
    scale = latent_scale(sample)
    case.check("scale_factor", torch.tensor(scale))
    case.check("z_scaled", scale * sample)
    case.check("dec_mode", vae.decode(posterior.mode()).sample)
    case.check("dec_sample", vae.decode(sample).sample)


@torch.no_grad()
def autoencoder_vq(case: Case) -> None:
    facts = case.facts
    vqvae = convert_ldm_vq(case.weights(), sample_size=facts["ddconfig"]["resolution"])
    assert vqvae.config["num_vq_embeddings"] == facts["n_embed"]
    latents = vqvae.encode(case["x"]).latents
    case.check("h", latents)
    quantized, loss, (_, _, indices) = vqvae.quantize(latents)
    case.check("indices", indices.view(case["indices"].shape))
    case.check("quantized", quantized)
    case.check("codebook_vectors", vqvae.quantize.embedding(case["indices"]).permute(0, 3, 1, 2))
    case.check("loss_legacy", loss)
    case.check("loss_mse_term", loss / (1 + vqvae.quantize.beta))
    case.check("dec", vqvae.decode(latents).sample)
    case.check("dec_not_quantized", vqvae.decode(latents, force_not_quantize=True).sample)


@torch.no_grad()
def bert_embedder(case: Case) -> None:
    weights, heads = case.weights(), case.facts.get("heads", 8)
    text, layout = convert_ldm_bert(weights, num_heads=heads), convert_ldm_layout_encoder(weights, num_heads=heads)
    for tokens, out in (("tokens", "out"), ("tokens_short", "out_short")):
        if tokens in case:
            case.check(out, text(case[tokens])[0])
            case.check(out, layout(case[tokens]))


@torch.no_grad()
def spatial_rescaler(case: Case) -> None:
    args = case.facts["args"]
    resizing = {"num_stages": args["n_stages"], "multiplier": args["multiplier"], "method": args["method"]}
    if args.get("out_channels") is None:
        model = LDMSpatialRescaler(args["in_channels"], None, **resizing)
    else:
        model = convert_ldm_spatial_rescaler(case.weights(), **resizing)
    case.check("out", model(case["labels"]))
    case.check("out", model(case["onehot"]))


@torch.no_grad()
def inpaint_conditioning(case: Case) -> None:
    image, mask = case["image"], case["mask01"]
    masked = masked_image(image, mask)
    case.check("masked_image", masked)
    latents = convert_ldm_vq(case.weights()).encode(masked).latents
    case.check("c_latent", latents)
    case.check("mask_pm1", latent_mask(mask, mask.shape[-2:]))
    small = latent_mask(mask, latents.shape[-2:])
    case.check("mask_down", small)
    case.check("cond_concat", torch.cat([latents, small], dim=1))
    case.check("composited", composite(image, mask, case["predicted"]))


def layout_tokens(case: Case) -> None:
    for facts in case.facts["cases"]:
        args, name = facts["builder_args"], facts["name"]
        tokenizer = LayoutTokenizer(
            num_classes=args["no_object_classes"],
            max_objects=args["no_max_objects"],
            vocab_size=args["no_tokens"],
            encode_crop=args["encode_crop"],
            use_group_flag=args["use_group_parameter"],
            use_other_flags=args["use_additional_parameters"],
            center_points=facts["builder"] == "center_points",
        )
        objects = [
            LayoutObject(
                a["category_no"],
                tuple(a["bbox_xywh"]),
                is_group_of=bool(a["is_group_of"]),
                is_occluded=bool(a["is_occluded"]),
                is_depiction=bool(a["is_depiction"]),
                is_inside=bool(a["is_inside"]),
            )
            for a in facts["annotations"]
        ]
        crop = None if facts["crop_xywh"] is None else tuple(facts["crop_xywh"])
        tokens = tokenizer.encode(objects, crop=crop, flip=facts["horizontal_flip"])
        case.check(f"{name}.tokens", tokens)
        assert tokens.tolist() == facts["tokens"]
        for record in case.names(f"{name}.tokens_shuffled_seed"):
            rng = Random(int(record.rpartition("seed")[2]))
            case.check(record, tokenizer.encode(objects, crop=crop, flip=facts["horizontal_flip"], shuffle=rng))
        placed, found_crop = tokenizer.decode(tokens)
        assert [[label, list(place)] for label, place in placed] == facts["inverse"], name
        assert (None if found_crop is None else list(found_crop)) == facts["inverse_crop"], name


KINDS = {
    "unet_crossattn_headch": unet_forward,
    "unet_crossattn_heads": unet_forward,
    "unet_concat_sr": unet_forward,
    "unet_concat_inpaint": unet_forward,
    "unet_uncond_scaleshift": unet_forward,
    "unet_class_conditional": unet_class_conditional,
    "autoencoder_kl": autoencoder_kl,
    "autoencoder_vq": autoencoder_vq,
    "bert_embedder": bert_embedder,
    "spatial_rescaler": spatial_rescaler,
    "inpaint_conditioning": inpaint_conditioning,
    "layout_tokens": layout_tokens,
}
