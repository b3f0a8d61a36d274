"""The recorded networks, conditions and losses of GLIDE and PITI, through the converters."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from parity.case import Case
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext.conditions.palettes import COCO182_PALETTE, colorize_labels
from diffusers_ext.conditions.sketches import distance_map
from diffusers_ext.conversion.glide import convert_glide_text_encoder, convert_glide_unet
from diffusers_ext.conversion.piti import convert_piti
from diffusers_ext.degradations.l0 import l0_smooth
from diffusers_ext.guidance import both_branches, classifier_free_guidance, guide, normalized_guidance
from diffusers_ext.losses.adversarial import generator_loss, gradient_penalty, wasserstein_discriminator_loss
from diffusers_ext.losses.diffusion import VariationalLoss
from diffusers_ext.losses.perceptual import VGGDistance
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.pipelines.glide.base import GlideBasePipeline, GlideCondition, Run, Stage, call_unet, upsample
from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.pipelines.piti.pipeline_piti import PITIPipeline, truncate_to_8_bits
from diffusers_ext.schedulers.scheduling_normalized_cfg import NormalizedCFGScheduler
from diffusers_ext.schedulers.scheduling_respaced import RespacedScheduler, adm_scheduler


def to_unit(pixels: Tensor) -> Tensor:
    """8-bit pixels to [-1, 1], in the original's order of operations."""
    return (pixels.float() / 255 - 0.5) / 0.5


def joined(x: Tensor, low_res: Tensor | None) -> Tensor:
    if low_res is None:
        return x
    return torch.cat([x, F.interpolate(low_res, size=x.shape[2:], mode="bilinear", align_corners=False)], dim=1)


def load_glide(case: Case):
    arch, weights = case.facts["arch"], case.weights()
    text_encoder = convert_glide_text_encoder(weights, num_heads=arch["xf_heads"])
    assert text_encoder.config["max_length"] == arch["text_ctx"]
    assert len(text_encoder.blocks) == arch["xf_layers"]
    return text_encoder, load_decoder(arch, convert_glide_unet, weights)


def load_decoder(arch: dict, convert, weights):
    unet = convert(weights, num_head_channels=arch["num_head_channels"], sample_size=arch["hw"][0])
    assert list(unet.config["block_out_channels"]) == [arch["model_channels"] * m for m in arch["channel_mult"]]
    assert unet.config["layers_per_block"] == arch["num_res_blocks"]
    return unet


def load_piti(case: Case):
    arch = case.facts["arch"]
    encoder, unet = convert_piti(
        case.weights(),
        num_heads=arch["xf_heads"],
        num_head_channels=arch["num_head_channels"],
        sample_size=arch["hw"][0],
    )
    assert encoder.config["sample_size"] == arch["ref"] and encoder.config["in_channels"] == arch["n_class"]
    assert list(unet.config["block_out_channels"]) == [arch["model_channels"] * m for m in arch["channel_mult"]]
    return encoder, unet


def check_unet(case: Case, unet, tokens: Tensor, pooled: Tensor) -> None:
    """The output, and what the original's blocks gave on the way to it."""
    found: dict[str, Tensor] = {}
    watched = {
        "time_embed_out": unet.time_embedding,
        "input_block_0": unet.conv_in,
        "middle_block": unet.mid_block,
        "output_block_last": unet.up_blocks[-1],
    }
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: found.__setitem__(name, output))
        for name, module in watched.items()
    ]
    sample = joined(case["x"], case["low_res"] if "low_res" in case else None)
    case.check("out", unet(sample, case["timesteps"], encoder_hidden_states=tokens, class_labels=pooled).sample)
    for hook in hooks:
        hook.remove()
    for name, value in found.items():
        if name in case:
            case.check(name, value)
    if "sinusoid" in case:
        case.check("sinusoid", unet.time_proj(case["timesteps"]))


@torch.no_grad()
def glide_unet(case: Case) -> None:
    text_encoder, unet = load_glide(case)
    tokens, pooled = text_encoder(case["tokens"], case["mask"], return_dict=False)
    if "xf_out" in case:
        case.check("xf_out", tokens.transpose(1, 2))
    if "xf_proj" in case:
        case.check("xf_proj", unet.class_embedding(pooled))
    if "low_res_upsampled" in case:
        case.check("low_res_upsampled", joined(case["x"], case["low_res"])[:, case["x"].shape[1] :])
    check_unet(case, unet, tokens, pooled)


@torch.no_grad()
def piti_unet(case: Case) -> None:
    encoder, unet = load_piti(case)
    if "colormap182" in case:
        case.check("colormap182", torch.from_numpy(COCO182_PALETTE))
    if "label_u8_blocks" in case:  # an id beyond the classes is black
        blocks = case["label_u8_blocks"]
        labels = blocks.repeat_interleave(encoder.config["sample_size"] // blocks.shape[1], 1)
        labels = labels.repeat_interleave(encoder.config["sample_size"] // blocks.shape[2], 2).numpy()
        palette = np.concatenate([COCO182_PALETTE, np.zeros((256 - len(COCO182_PALETTE), 3), dtype=np.uint8)])
        colors = np.stack([colorize_labels(one, palette) for one in labels])
        case.check("ref_rgb_u8", torch.from_numpy(colors).permute(0, 3, 1, 2))
    if "sketch_u8" in case:
        case.check("dist_u8", distance_map(case["sketch_u8"] == 255))
        condition = to_unit(case["dist_u8"])[:, None]
    else:
        condition = to_unit(case["ref_rgb_u8"])
    if "cnn_out" in case:
        case.check("cnn_out", encoder.cnn(condition))
    tokens, pooled = encoder(condition, return_dict=False)
    if "xf_out" in case:
        case.check("xf_out", tokens.transpose(1, 2))
    if "xf_proj" in case:
        case.check("xf_proj", pooled)
    check_unet(case, unet, tokens, pooled)
    if "out_uncond" in case:
        tokens, pooled = encoder(torch.ones_like(condition), return_dict=False)
        sample = joined(case["x"], case["low_res"] if "low_res" in case else None)
        output = unet(sample, case["timesteps"], encoder_hidden_states=tokens, class_labels=pooled).sample
        case.check("out_uncond", output)


def normalized_cfg(case: Case) -> None:
    cond, uncond = case["eps_cond"], case["eps_uncond"]
    for name in case.names("plain_s"):
        text = name.removeprefix("plain_s")
        scale = float(text)
        guided = classifier_free_guidance(cond, uncond, scale)
        case.check(name, guided)
        case.check(f"norm_chw_s{text}", normalized_guidance(cond, uncond, scale))
        case.check(f"norm_chw_biased_s{text}", normalized_guidance(cond, uncond, scale))  # the ratio is the same
        case.check(f"norm_hw_s{text}", normalized_guidance(cond, uncond, scale, per_channel=True))
        case.check(f"analytic_sigma_s{text}", normalized_guidance(cond, uncond, scale, statistics="formula"))
        # diffusers' rescaling lacks the centring, and nothing else
        case.check(f"diffusers_rescale1_s{text}", rescale_noise_cfg(guided, cond, 1.0))


def l0_smoothing(case: Case) -> None:
    image = case["image_u8"].permute(2, 0, 1).float() / 127.5 - 1
    for name in case.names("out_float256_"):
        strength = name.rpartition("_")[2]
        smooth = ((l0_smooth(image, float(strength)) + 1) * 127.5).permute(1, 2, 0)
        check_most(case, name, smooth)
        if f"out_u8_{strength}" in case:
            check_most(case, f"out_u8_{strength}", smooth.to(torch.int32).to(torch.uint8).float())
        if f"released_bug_u8_{strength}" in case:
            case.unused(f"released_bug_u8_{strength}", "the released call hands over another range: see l0.py")


def check_most(case: Case, name: str, actual: Tensor) -> None:
    """As `case.check`, but a share of the pixels may differ: a hard threshold follows every rounding."""
    expected = case[name].float()
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}"
    close = (actual - expected).abs() <= case.facts["atol"] + case.facts["rtol"] * expected.abs()
    share = close.float().mean().item()
    assert share >= case.facts["fraction"], f"{case.folder.name}: {name}: {share:.4f} of the pixels are close"
    case.checked.add(name)


def discriminator_wgan_gp(case: Case) -> None:
    arch = case.facts["arch"]
    discriminator = PatchDiscriminator(arch["input_nc"], arch["ndf"], arch["n_layers"], norm_type="instance")
    discriminator.load_state_dict({key.replace("model.", "main.", 1): value for key, value in case.weights().items()})
    real, fake = case["real"], case["fake"]
    scores_real, scores_fake = discriminator(real), discriminator(fake)
    case.check("d_fake_before", scores_fake)
    case.check("d_real_before", scores_real)
    penalty = gradient_penalty(discriminator, real, fake, case["epsilon"])
    case.check("gradient_penalty", penalty.reshape(1))
    between = torch.lerp(fake, real, case["epsilon"]).requires_grad_()
    gradient = torch.autograd.grad(discriminator(between).sum(), between)[0]
    case.check("grad_norm_hat", gradient.flatten(1).norm(dim=1))
    loss = wasserstein_discriminator_loss(scores_real, scores_fake) + penalty
    case.check("loss_d", loss.reshape(1))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-5)
    loss.backward()
    optimizer.step()
    for name in case.names("after."):
        key = name.removeprefix("after.").replace("model.", "main.", 1)
        case.check(name, discriminator.state_dict()[key])
    judged = fake.clone().requires_grad_()
    scores = discriminator(judged)
    case.check("d_fake_after_step", scores)
    per_sample = torch.stack([generator_loss(score) for score in scores])
    case.check("g_loss_per_sample", per_sample)
    case.check("grad_g_wrt_fake", torch.autograd.grad(per_sample.sum(), judged)[0])


@torch.no_grad()
def perceptual_vgg22(case: Case) -> None:
    distance = VGGDistance.from_state_dict(case.weights())
    case.check("loss_per_sample", distance(case["pred_x0"], case["x0"]))
    features = distance.features(case["pred_x0"])[0]
    case.check("pred_features", features[:, :: features.shape[1] // case["pred_features"].shape[1]])


class Replayed(RespacedScheduler):
    """The scheduler with the recorded noise in place of its draws."""

    recorded: Iterator[Tensor]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, variance_noise=next(self.recorded), **kwargs)


def replayed(case: Case, noise: Tensor | None, **config: Any) -> RespacedScheduler:
    schedule = {"linear": "linear", "squaredcos_cap_v2": "cosine"}[case.facts["noise_schedule"]]
    usual = adm_scheduler(schedule, num_train_timesteps=case.facts.get("diffusion_steps", 1000))
    settings = {
        "timestep_respacing": case.facts["timestep_respacing"],
        "variance_type": "learned_range",
        "clip_sample": case.facts.get("clip_denoised", True),
    }
    kind = RespacedScheduler if noise is None else Replayed
    scheduler = kind.from_config(usual.config, **settings | config)
    if isinstance(scheduler, Replayed):
        scheduler.recorded = iter(noise)
    scheduler.set_timesteps()
    case.check("timestep_map", scheduler.timesteps.flip(0))
    case.check("betas", scheduler.respaced_betas.flip(0), atol=1e-12, rtol=1e-9)
    return scheduler


def of_weights(case: Case) -> Case:
    """The case whose weights, and so whose sizes, this one uses."""
    return Case((case.folder / case.facts["weights_from"]).parent)


def sample_stage(case: Case, pipe: GlideBasePipeline, stage: Stage, eta: float = 0.0) -> None:
    """Runs a stage on recorded noise; every sample on the way is the recorded one."""
    pipe.set_progress_bar_config(disable=True)
    samples: list[Tensor] = []

    def watch(_pipe: Any, _step: int, _t: Tensor, tensors: dict[str, Tensor]) -> None:
        samples.append(tensors["latents"])

    final = pipe.run_stage(stage, Run(stage.guidance_scale, eta, callback=watch, callback_tensors=["latents"]))
    case.check("x_prev", torch.stack(samples))
    if "final" in case:
        case.check("final", final)
    if "x_t" in case:
        case.check("x_t", torch.stack([stage.noise, *samples[:-1]]))


def check_steps(case: Case, scheduler: RespacedScheduler) -> None:
    """Each step from the recorded sample and prediction."""
    steps = list(enumerate(scheduler.timesteps))
    case.check("timesteps_passed_to_model", scheduler.timesteps.float())
    found = [scheduler.reverse_step(case["model_out"][k], t, case["x_t"][k]) for k, t in steps]
    for name, values in zip(("mean", "log_variance", "pred_xstart"), zip(*found, strict=True), strict=True):
        if name in case:
            case.check(name, torch.stack(values))


def predictions(case: Case, scheduler: RespacedScheduler, unet: Any, condition: GlideCondition, mix: Any) -> None:
    """What the network says of the recorded samples, guided; the variance is the conditional one."""
    scale = case.facts.get("guidance_scale", 1.0)
    outputs = []
    for k, t in enumerate(scheduler.timesteps):
        branches = both_branches(partial(call_unet, unet, t), *condition.branches(case["x_t"][k]), scale)
        outputs.append(guide(*branches, scale, mix=mix, channels=3))
    case.check("model_out", torch.stack(outputs))


@torch.no_grad()
def trace_glide_base_cfg(case: Case) -> None:
    text_encoder, unet = load_glide(of_weights(case))
    tokens, vector = text_encoder(case["tokens"], case["mask"], return_dict=False)
    embeds = torch.cat([tokens, vector[:, None]], dim=1)
    images = len(case["init_noise"])
    condition = GlideCondition(embeds[:images], embeds[images:])
    scheduler = replayed(case, case["noise"])
    check_steps(case, scheduler)
    predictions(case, scheduler, unet, condition, None)
    pipe = GlidePipeline(text_encoder, None, unet, scheduler)
    sample_stage(
        case, pipe, Stage("base", unet, scheduler, condition, case["init_noise"], case.facts["guidance_scale"])
    )


@torch.no_grad()
def trace_glide_upsampler_ddim(case: Case) -> None:
    text_encoder, unet = load_glide(of_weights(case))
    tokens, vector = text_encoder(case["tokens"], case["mask"], return_dict=False)
    noise = case.facts["upsample_temp"] * case["init_noise_unit"]
    condition = GlideCondition(
        torch.cat([tokens, vector[:, None]], dim=1), maps=upsample(case["low_res"], tuple(noise.shape[-2:]))
    )
    eta = case.facts.get("eta", 0.0)
    recorded = case["noise"] if "noise" in case else None
    scheduler = replayed(case, recorded, sampler="ddim")
    pipe = GlidePipeline(text_encoder, None, unet, scheduler)
    clean = [
        scheduler.reverse_step(call_unet(unet, t, x, condition.maps, condition.embeds), t, x).pred_original_sample
        for x, t in zip([noise, *case["x_prev"][:-1]], scheduler.timesteps, strict=True)
    ]
    case.check("pred_xstart", torch.stack(clean))
    sample_stage(case, pipe, Stage("upscale", unet, scheduler, condition, noise, 1.0), eta)


def trace_piti_base(case: Case, guides: bool) -> None:
    encoder, unet = load_piti(of_weights(case))
    scheduler = replayed(case, case["noise"])
    check_steps(case, scheduler)
    sampler = NormalizedCFGScheduler(scheduler) if guides else scheduler
    pipe = PITIPipeline(encoder, unet, sampler)
    embeds = pipe.encode_conditions(to_unit(case["ref_rgb_u8"]))
    condition = GlideCondition(embeds, pipe.null_embeds(len(embeds)))
    predictions(case, scheduler, unet, condition, normalized_guidance if guides else None)
    sample_stage(case, pipe, Stage("base", unet, sampler, condition, case["init_noise"], case.facts["guidance_scale"]))


@torch.no_grad()
def trace_piti_base_plain_cfg(case: Case) -> None:
    trace_piti_base(case, guides=False)


@torch.no_grad()
def trace_piti_base_norm_cfg(case: Case) -> None:
    trace_piti_base(case, guides=True)


@torch.no_grad()
def trace_piti_upsampler(case: Case) -> None:
    encoder, unet = load_piti(of_weights(case))
    small = truncate_to_8_bits(case["base_final"])
    case.check("low_res_truncated", small)
    size = tuple(case["low_res_used"].shape[-2:])
    case.check("low_res_used", F.interpolate(small, size=size, mode="nearest"))  # only so that the case is tiny
    scheduler = replayed(case, case["noise"])
    check_steps(case, scheduler)
    pipe = PITIPipeline(encoder, unet, scheduler)
    noise = case.facts["upsample_temp"] * case["init_noise_unit"]
    maps = upsample(case["low_res_used"], tuple(noise.shape[-2:]))
    condition = GlideCondition(pipe.encode_conditions(to_unit(case["ref_rgb_u8"])), maps=maps)
    predictions(case, scheduler, unet, condition, None)
    sample_stage(case, pipe, Stage("upscale", unet, scheduler, condition, noise, 1.0))


def training_loss(case: Case) -> None:
    schedule = {"linear": "linear", "squaredcos_cap_v2": "cosine"}[case.facts["noise_schedule"]]
    scheduler = adm_scheduler(schedule, num_train_timesteps=case.facts.get("diffusion_steps", 1000))
    loss = VariationalLoss(scheduler.betas, "rescaled_mse")
    noisy = scheduler.add_noise(case["x0"], case["noise"], case["t"])
    case.check("x_t", noisy)
    found = loss(case["model_out"], case["noise"], case["x0"], noisy, case["t"])
    for name in ("mse", "vb", "loss"):
        case.check(name, found[name])
    _, _, clean = loss.predict(case["model_out"], noisy, case["t"])
    case.check("pred_x0_for_perc_adv", clean.clamp(-1, 1))


KINDS = {
    "glide_base_unet": glide_unet,
    "glide_superres_unet": glide_unet,
    "piti_mask": piti_unet,
    "piti_sketch": piti_unet,
    "piti_superres": piti_unet,
    "normalized_cfg": normalized_cfg,
    "l0_smoothing": l0_smoothing,
    "discriminator_wgan_gp": discriminator_wgan_gp,
    "perceptual_vgg22": perceptual_vgg22,
    "trace_glide_base_cfg": trace_glide_base_cfg,
    "trace_glide_upsampler_ddim": trace_glide_upsampler_ddim,
    "trace_piti_base_plain_cfg": trace_piti_base_plain_cfg,
    "trace_piti_base_norm_cfg": trace_piti_base_norm_cfg,
    "trace_piti_upsampler": trace_piti_upsampler,
    "training_loss": training_loss,
}
