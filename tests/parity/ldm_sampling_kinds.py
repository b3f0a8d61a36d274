"""Recorded losses, schedules, sampling runs and tiled passes of latent diffusion."""

import torch
from noise_levels import scaled_linear_betas
from parity.case import Case
from parity.ldm_kinds import heads_of
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_ext.conversion.ldm import convert_ldm_schedule, split_ldm_checkpoint
from diffusers_ext.conversion.ldm_autoencoder import convert_ldm_vq
from diffusers_ext.conversion.ldm_unet import convert_ldm_unet
from diffusers_ext.losses.adversarial import (
    adaptive_weight,
    delayed_factor,
    generator_loss,
    hinge_discriminator_loss,
    vanilla_discriminator_loss,
)
from diffusers_ext.losses.diffusion import (
    latent_diffusion_loss,
    posterior_variance,
    vlb_weights,
)
from diffusers_ext.losses.kl import kl_divergence, reconstruction_nll
from diffusers_ext.losses.perceptual import LPIPSDistance
from diffusers_ext.losses.quantization import codebook_perplexity
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.pipelines.ldm.denoising import keep_known_latents, predict_noise
from diffusers_ext.pipelines.ldm.tiling import TileGrid
from diffusers_ext.schedulers.gaussian import ldm_scheduler, set_original_timesteps
from diffusers_ext.training_utils.schedules import Cycles, WarmupDecay, ldm_ema


def lender(case: Case, weights_from: str) -> Case:
    """The case whose weights this one uses."""
    return Case((case.folder / weights_from).parent)


def borrowed_unet(case: Case, weights_from: str):
    """The U-Net of another case, with the heads that its own facts name."""
    other = lender(case, weights_from)
    weights = other.weights()
    if any(key.startswith("model.diffusion_model.") for key in weights):
        weights = split_ldm_checkpoint(weights).unet
    return convert_ldm_unet(weights, **heads_of(other.facts.get("args") or other.facts["unet_args"]))


def autoencoder_loss(case: Case) -> None:
    """The generator's and the discriminator's loss, the step before the adversarial terms begin and at their start."""
    args, weights = case.facts["args"], case.weights()
    kl = "kl" in case.kind
    own = {key.removeprefix("discriminator."): v for key, v in weights.items() if key.startswith("discriminator.")}
    lpips = {
        key.removeprefix("perceptual_loss."): v for key, v in weights.items() if key.startswith("perceptual_loss.")
    }
    perceptual = LPIPSDistance.from_state_dict(lpips) if lpips and args.get("perceptual_weight", 1.0) else None
    image, last_layer = case["inputs"], nn.Parameter(case["last_layer_weight"])
    reconstruction = F.conv2d(case["feat"], last_layer, case["last_layer_bias"], padding=1)
    case.check("reconstructions", reconstruction, atol=1e-6)
    if perceptual is not None:
        case.check("lpips_value", perceptual(reconstruction, image).view(-1, 1, 1, 1))

    def fresh_discriminator() -> PatchDiscriminator:
        network = PatchDiscriminator(image.shape[1], own["main.0.weight"].shape[0], args.get("disc_num_layers", 3))
        network.load_state_dict(own)
        return network.train()

    def check_all(prefix: str, results: dict[str, Tensor]) -> None:
        """Relative to each tensor's largest value: gradients of a sum over a picture reach thousands."""
        for name in case.names(prefix):
            largest = float(case[name].abs().max())
            case.check(name, results[name.removeprefix(prefix)], atol=1e-6 * max(1.0, largest))

    check_all("disc_logits_fake_train", {"": fresh_discriminator()(reconstruction)})
    check_all("disc_logits_fake_eval", {"": fresh_discriminator().eval()(reconstruction)})
    judge = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}[args.get("disc_loss", "hinge")]

    for run, step in (("before", args["disc_start"] - 1), ("after", args["disc_start"])):
        factor = delayed_factor(step, args["disc_start"], args.get("disc_factor", 1.0))

        difference = image - reconstruction
        pixels = difference.square() if args.get("pixel_loss", "l1") == "l2" else difference.abs()
        distance = image.new_zeros(()) if perceptual is None else perceptual(reconstruction, image).mean()
        error = pixels.mean() + args.get("perceptual_weight", 1.0) * distance
        logvar = weights["logvar"] if kl and "logvar" in weights else 0.0
        nll = reconstruction_nll(error, image[0].numel(), logvar=logvar, reduction="sum" if kl else "mean")
        fooling = generator_loss(fresh_discriminator()(reconstruction))
        balance = args.get("disc_weight", 1.0) * adaptive_weight(nll, fooling, last_layer)
        results = {"rec_loss": error, "nll_loss": nll, "g_loss": fooling, "d_weight": balance}
        results["disc_factor"] = torch.tensor(factor)
        if kl:
            bottleneck, weight = kl_divergence(case["moments"]).mean(), args.get("kl_weight", 1.0)
            results["kl_loss"] = bottleneck
            results["logvar"] = torch.as_tensor(logvar)
        else:
            bottleneck, weight = case["codebook_loss"].mean(), args.get("codebook_weight", 1.0)
            counts = torch.bincount(case["predicted_indices"].flatten(), minlength=args["n_classes"])
            results |= {"quant_loss": bottleneck, "p_loss": distance, "perplexity": codebook_perplexity(counts)}
            results["cluster_usage"] = (counts > 0).sum()
        results["loss"] = results["total_loss"] = nll + weight * bottleneck + balance * factor * fooling
        results["grad_last_layer"] = torch.autograd.grad(results["loss"], last_layer, retain_graph=True)[0]
        check_all(f"{run}_opt0_", results)

        network = fresh_discriminator()
        real, fake = network(image), network(reconstruction.detach())
        loss = factor * judge(real, fake)
        results = {"loss": loss, "disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if factor:  # without, nothing reaches the discriminator
            results["grad_first_conv"] = torch.autograd.grad(loss, network.main[0].weight)[0]
        check_all(f"{run}_opt1_", results)
    for name in ("codebook_loss", "predicted_indices") if kl else ("moments",):
        if name in case:
            case.unused(name, "the other kind of bottleneck's input, recorded for both")


@torch.no_grad()
def training_loss(case: Case) -> None:
    facts = case.facts
    betas = scaled_linear_betas(facts["linear_start"], facts["linear_end"])
    weights = vlb_weights(betas)
    case.check("lvlb_weights", weights)
    scheduler = ldm_scheduler(facts["linear_start"], facts["linear_end"])
    noisy = scheduler.add_noise(case["x_start"], case["noise"], case["timesteps"])
    case.check("x_noisy", noisy, atol=2e-5)
    unet = borrowed_unet(case, facts["weights_from"])
    prediction = predict_noise(unet, noisy, case["timesteps"], context=case["context"])
    case.check("eps", prediction, atol=2e-5)
    for run in sorted({name.rpartition(".")[0] for name in case.names("l") if "_elbo" in name}):
        loss_type, _, weight = run.partition("_elbo")
        losses = latent_diffusion_loss(
            prediction, case["noise"], case["timesteps"], weights, loss_type=loss_type, vlb_weight=float(weight)
        )
        for name, value in losses.items():
            case.check(f"{run}.{name}", value)


@torch.no_grad()
def ddim_cfg_trace(case: Case) -> None:
    facts = case.facts

    def close(name: str, actual: Tensor, expected: Tensor) -> None:
        """The case's own rule: 1e-5 of the largest value, and 1e-5."""
        bound = 1e-5 * float(expected.abs().max()) + 1e-5
        difference = float((actual - expected).abs().max())
        assert difference <= bound, f"{case.folder.name}: {name} differs by {difference:.3g} > {bound:.3g}"

    start, end = facts["linear_start"], facts["linear_end"]
    exact = scaled_linear_betas(start, end, facts["timesteps"])
    case.check("betas", exact, atol=0.0, rtol=1e-6)
    case.check("posterior_variance", posterior_variance(exact), atol=1e-12, rtol=1e-5)
    case.check("lvlb_weights", vlb_weights(exact), atol=0.0, rtol=1e-5)
    unet = borrowed_unet(case, facts["weights_from"])
    for run, options in facts["runs"].items():
        scheduler = convert_ldm_schedule(case["betas"])
        case.check("alphas_cumprod", scheduler.alphas_cumprod, atol=0.0, rtol=1e-5)
        set_original_timesteps(scheduler, options["S"])
        timesteps = scheduler.timesteps
        assert len(timesteps) == options["n_steps_actually_run"]
        recorded = case[f"{run}.timesteps"]
        case.check(f"{run}.timesteps", timesteps if recorded[0] > recorded[-1] else timesteps.flip(0))
        ascending = timesteps.flip(0)
        previous = torch.cat([ascending.new_zeros(1), ascending[:-1]])
        case.check(f"{run}.alphas", scheduler.alphas_cumprod[ascending], atol=0.0, rtol=1e-5)
        case.check(f"{run}.alphas_prev", scheduler.alphas_cumprod[previous], atol=0.0, rtol=1e-5)
        variances = [scheduler._get_variance(int(t), int(p)) for t, p in zip(ascending, previous, strict=True)]
        case.check(f"{run}.sigmas", options["eta"] * torch.stack(variances).sqrt(), atol=1e-6, rtol=1e-4)

        latents = case[f"{run}.x_T"]
        for index, timestep in enumerate(timesteps):
            if options["masked"]:
                latents = keep_known_latents(
                    latents, case["known_x0"], case["known_mask"], case[f"{run}.q_noise"][index], scheduler, timestep
                )
            noise = predict_noise(
                unet,
                latents,
                timestep,
                context=case["context"],
                null_context=case["uncond_context"],
                guidance_scale=options["guidance_scale"],
            )
            step = {"variance_noise": case[f"{run}.noise"][index]} if options["eta"] else {}
            output = scheduler.step(noise, timestep, latents, eta=options["eta"], **step)
            latents = output.prev_sample
            close(f"{run}.x[{index}]", latents, case[f"{run}.x"][index])
            close(f"{run}.pred_x0[{index}]", output.pred_original_sample, case[f"{run}.pred_x0"][index])
        close(f"{run}.out", latents, case[f"{run}.out"])
        case.unused(f"{run}.noise", "drawn but multiplied by zero where eta is 0")


@torch.no_grad()
def ema_and_lr(case: Case) -> None:
    facts = case.facts
    parameter = nn.Parameter(case["step0.weight"].clone())
    ema = ldm_ema([parameter], facts["ema"]["decay"])
    for step in range(1, 1 + len(case.names("param"))):
        parameter.copy_(case[f"param{step}.weight"])
        ema.step([parameter])
        largest = float(case[f"ema{step}.weight"].abs().max())  # float32 sums are exact to their largest term only
        case.check(f"ema{step}.weight", ema.shadow_params[0], atol=5e-7 * largest)

    def cycles(args: dict, shape: str) -> Cycles:
        fields = (args[name] for name in ("warm_up_steps", "f_start", "f_max", "f_min", "cycle_lengths"))
        return Cycles([WarmupDecay(*values, shape=shape) for values in zip(*fields, strict=True)])

    single = facts["warmup_cosine"]
    schedules = {
        "lin": cycles(facts["lambda_linear"], "linear"),
        "cos": WarmupDecay(
            single["warm_up_steps"], single["lr_start"], single["lr_max"], single["lr_min"], single["max_decay_steps"]
        ),
        "cos2": cycles(facts["warmup_cosine2"], "cosine"),
    }
    for name, schedule in schedules.items():
        multipliers = [schedule(int(step)) for step in case[f"{name}_n"]]
        case.check(f"{name}_f", torch.tensor(multipliers, dtype=torch.float64))


@torch.no_grad()
def fold_unfold(case: Case) -> None:
    facts = case.facts
    clips = facts["split_input_params"]
    limits = {
        "min_weight": clips["clip_min_weight"],
        "max_weight": clips["clip_max_weight"],
        "min_tie_weight": clips["clip_min_tie_weight"],
        "max_tie_weight": clips["clip_max_tie_weight"],
    }
    for run in facts["cases"]:
        name, values = run["name"], case[f"{run['name']}.x"]
        grid = TileGrid(
            tuple(run["hw"]), tuple(run["ks"]), tuple(run["stride"]),
            up=run["uf"], down=run["df"], tie_breaker=run["tie_braker"], **limits,
        )  # fmt: skip
        assert len(grid) == run["n_patches"]
        case.check(f"{name}.weighting", torch.stack(list(grid.weights()), dim=-1)[None, None])
        case.check(f"{name}.normalization", grid.normalization()[None, None])
        if f"{name}.patches" in case:
            case.check(f"{name}.patches", torch.stack(list(grid.cut(values)), dim=-1))
        if f"{name}.blended" in case:
            scales = iter(case[f"{name}.patch_scale"])
            case.check(f"{name}.blended", grid.apply(lambda tile, scales=scales: tile * next(scales), values))

    tiled = facts["tiled_vq"]
    vqvae = convert_ldm_vq(lender(case, tiled["weights_from"]).weights())
    for source, name, factor in (("z", "dec", "up"), ("x", "enc", "down")):
        options, values = tiled["decode" if name == "dec" else "encode"], case[f"tiled_vq.{source}"]
        grid = TileGrid(
            tuple(values.shape[-2:]), tuple(options["ks"]), tuple(options["stride"]),
            **{factor: options["vqf"]}, **limits,
        )  # fmt: skip
        network = (lambda z: vqvae.decode(z).sample) if name == "dec" else (lambda x: vqvae.encode(x).latents)
        case.check(f"tiled_vq.{name}", grid.apply(network, values))

    tiled = facts["tiled_unet"]
    unet = borrowed_unet(case, tiled["weights_from"])
    latents, cond, timestep = case["tiled_unet.x"], case["tiled_unet.cond"], case["tiled_unet.t"]
    grid = TileGrid(tuple(latents.shape[-2:]), tuple(tiled["ks"]), tuple(tiled["stride"]), **limits)
    eps = grid.apply(lambda x, maps: predict_noise(unet, x, timestep, concat=[maps]), latents, cond)
    case.check("tiled_unet.eps", eps)


KINDS = {
    **{
        f"loss_{kind}_{perceptual}": autoencoder_loss for kind in ("kl", "vq") for perceptual in ("noperc", "tinyperc")
    },
    "training_loss": training_loss,
    "ddim_cfg_trace": ddim_cfg_trace,
    "ema_and_lr": ema_and_lr,
    "fold_unfold": fold_unfold,
}
