"""The recorded networks, samplers, losses and degradations of ADM, from which Cascaded Diffusion is built."""

import torch
from parity.case import Case

from diffusers_ext.conversion.cascaded import convert_adm_unet
from diffusers_ext.degradations.blur import gaussian_blur_3x3
from diffusers_ext.degradations.resizing import resize_batch
from diffusers_ext.losses.diffusion import VariationalLoss, posterior_variance
from diffusers_ext.models.unet_cascaded import CascadedUNet
from diffusers_ext.schedulers.scheduling_respaced import RespacedScheduler, adm_scheduler
from diffusers_ext.schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler

# names of the original -> ours
PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample"}
SAMPLERS = {"p_sample": "ancestral", "ddim": "ddim"}
DOWNSAMPLINGS = {
    "area": "area",
    "bicubic_antialias": "bicubic_antialias",
    "bilinear_antialias": "bilinear_antialias",
    "bilinear_plain": "bilinear",
}


def load_unet(case: Case) -> CascadedUNet:
    """The case's network; its constructor's arguments say what the shapes do not, and are held against the rest."""
    args = case.facts["init"]
    assert args.get("num_heads_upsample", -1) == -1 and args.get("conv_resample", True), "no released model has it"
    head_width = args.get("num_head_channels", -1)
    unet = convert_adm_unet(
        case.weights(),
        **({"num_heads": args.get("num_heads", 1)} if head_width == -1 else {"num_head_channels": head_width}),
        attention_order="new" if args.get("use_new_attention_order") else "legacy",
        is_upscaler="SuperRes" in case.facts["cls"],
        sample_size=args["image_size"],
        dropout=args.get("dropout", 0.0),
    )
    mult = args.get("channel_mult", (1, 2, 4, 8))
    config = unet.config
    assert config.in_channels == args["in_channels"] and config.out_channels == args["out_channels"]
    assert list(config.block_out_channels) == [int(m * args["model_channels"]) for m in mult]
    assert config.layers_per_block == args["num_res_blocks"] and config.num_class_embeds == args.get("num_classes")
    assert list(config.attention_levels) == [2**level in args["attention_resolutions"] for level in range(len(mult))]
    assert (config.resample == "resnet") == bool(args.get("resblock_updown"))
    assert (config.resnet_time_scale_shift == "scale_shift") == bool(args.get("use_scale_shift_norm"))
    if "n_params" in case.facts:
        assert sum(parameter.numel() for parameter in unet.parameters()) == case.facts["n_params"]
    return unet


def condition(case: Case, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    return others | ({"class_labels": case["y"]} if "y" in case else {})


@torch.no_grad()
def adm_unet(case: Case) -> None:
    unet = load_unet(case)
    case.check("out", unet(case["x"], case["t"], **condition(case)).sample)
    if "t_float" in case:
        case.check("out_t_float", unet(case["x"], case["t_float"], **condition(case)).sample)


@torch.no_grad()
def adm_superres(case: Case) -> None:
    unet, low_res = load_unet(case), case["low_res"]
    case.check("upsampled", resize_batch(low_res, *case["x"].shape[2:], "bilinear"))
    case.check("out", unet(case["x"], case["t"], low_res=low_res, **condition(case)).sample)
    if "t_float" in case:
        case.check("out_t_float", unet(case["x"], case["t_float"], low_res=low_res, **condition(case)).sample)


def trace_scheduler(case: Case, **changes) -> RespacedScheduler:
    facts = case.facts["diffusion"]
    settings = {
        "timestep_respacing": facts.get("timestep_respacing") or None,
        "sampler": SAMPLERS[facts["sampler"]],
        "variance_type": facts["model_var_type"].lower(),
        "prediction_type": PREDICTIONS[facts["mean"]],
        "clip_sample": facts.get("clip_denoised", True),
    }
    scheduler = adm_scheduler(facts["schedule"], num_train_timesteps=facts["T"], **settings | changes)
    scheduler.set_timesteps()
    return scheduler


@torch.no_grad()
def trace(case: Case) -> None:
    """Each step from recorded samples, then the whole run from the recorded start."""
    facts, scheduler, unet = case.facts["diffusion"], trace_scheduler(case), load_unet(case)
    case.check("timestep_map", scheduler.timesteps.flip(0))
    check_tables(case, scheduler)
    low_res = augmented_low_res(case)
    given = condition(case, **({} if low_res is None else {"low_res": low_res}))
    scale = 1000 / facts["T"] if facts.get("rescale_timesteps") else 1

    def predict(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(sample, t * scale, **given).sample

    steps = list(enumerate(scheduler.timesteps))
    noise, eta = case["noise"], facts.get("eta", 0.0)
    before = [case["x_T"], *case["sample"][:-1]]
    outputs, reverses, samples, free = [], [], [], []
    for k, t in steps:
        outputs.append(predict(before[k], t))
        reverses.append(scheduler.reverse_step(case["model_out"][k], t, before[k]))
        samples.append(scheduler.step(case["model_out"][k], t, before[k], eta=eta, variance_noise=noise[k])[0])
        x = free[-1] if free else case["x_T"]
        free.append(scheduler.step(predict(x, t), t, x, eta=eta, variance_noise=noise[k])[0])
    tolerance = case.facts.get("atol_by_mode", {})
    one_step = tolerance.get("scheduler step fed recorded model_out and recorded previous sample")
    case.check("model_out", torch.stack(outputs), atol=tolerance.get("model_out given x (first step)"))
    for name, values in zip(("mean", "log_variance", "pred_xstart"), zip(*reverses, strict=True), strict=True):
        case.check(name, torch.stack(values), atol=one_step)
    case.check("sample", torch.stack(samples), atol=one_step)
    case.check("sample", torch.stack(free), atol=tolerance.get("free-running whole trace"))
    stops_are_in_the_trace(case, scheduler, eta)


def check_tables(case: Case, scheduler: RespacedScheduler) -> None:
    case.check("respaced_betas", scheduler.respaced_betas.flip(0), atol=1e-12, rtol=1e-9)
    case.check("respaced_alphas_cumprod", scheduler.alphas_cumprod[case["timestep_map"]], atol=1e-12, rtol=1e-9)
    small, nothing = trace_scheduler(case, variance_type="fixed_small"), torch.zeros(1, 3, 1, 1)
    logs = [small.reverse_step(nothing, t, nothing).log_variance[0, 0, 0, 0] for t in small.timesteps.flip(0)]
    case.check("posterior_log_variance_clipped", torch.stack(logs), atol=1e-6, rtol=1e-6)


def stops_are_in_the_trace(case: Case, scheduler: RespacedScheduler, eta: float) -> None:
    """A run that stops at a level ends with the recorded sample at that level."""
    if len(scheduler.timesteps) < 3:
        return
    truncated = TruncatedConditioningScheduler(scheduler)
    stop = len(scheduler.timesteps) // 2  # this many steps are run
    truncated.set_timesteps(stop_level=int(scheduler.timesteps[stop]) + 1)
    assert len(truncated.timesteps) == stop
    x = case["x_T"]
    for k, t in enumerate(truncated.timesteps):
        x = truncated.step(case["model_out"][k], t, x, eta=eta, variance_noise=case["noise"][k])[0]
    atol = case.facts.get("atol_by_mode", {}).get("free-running whole trace", case.facts["atol"])
    torch.testing.assert_close(x, case["sample"][stop - 1], atol=atol, rtol=case.facts["rtol"])


def augmented_low_res(case: Case) -> torch.Tensor | None:
    """The low-resolution image as the network gets it, noised with a schedule of its own if the case says so."""
    if not case.facts.get("augmentation"):
        names = [name for name in ("low_res", "low_res_clean") if name in case]
        return case[names[0]] if names else None
    schedule, T = case.facts["augmentation"]["schedule"]
    index, clean, noise = case.facts["augmentation"]["t_index"], case["low_res_clean"], case["aug_noise"]
    scheduler = adm_scheduler(schedule, num_train_timesteps=T)
    case.check("low_res_aug", scheduler.add_noise(clean, noise, torch.tensor(index)), atol=1e-6)
    corrupted = TruncatedConditioningScheduler(scheduler).corrupt(clean, index + 1, noise=noise)
    case.check("low_res_aug", corrupted, atol=1e-6)
    return corrupted


def q_sample_schedules(case: Case) -> None:
    clean, noise = case["x_start"], case["noise"]
    for schedule, T in case.facts["schedules"]:
        prefix = f"{schedule}{T}."
        scheduler = adm_scheduler(schedule, num_train_timesteps=T)
        loss, timesteps = VariationalLoss(scheduler.betas), case[prefix + "t"]
        for name in ("betas", "alphas_cumprod"):
            case.check(prefix + name, getattr(scheduler, name), atol=1e-12)
        rows = [t.expand(len(clean)) for t in timesteps]
        noisy = [scheduler.add_noise(clean, noise, t) for t in rows]
        case.check(prefix + "q_sample", torch.stack(noisy))
        means = [loss.posterior(clean, x, t)[0] for x, t in zip(noisy, rows, strict=True)]
        case.check(prefix + "posterior_mean", torch.stack(means))
        case.check(prefix + "posterior_variance", posterior_variance(scheduler.betas)[timesteps])
        every, dot = torch.arange(T), torch.zeros(T, 1, 1, 1)
        logs = loss.posterior(dot, dot, every)[1].flatten()
        case.check(prefix + "posterior_log_variance_clipped", logs, rtol=1e-6)


def losses_hybrid_vlb(case: Case) -> None:
    clean, noise = case["x_start"], case["noise"]
    for schedule, T, kind in case.facts["schedules"]:
        prefix, betas = f"{schedule}{T}.", adm_scheduler(schedule, num_train_timesteps=T).betas
        loss, scheduler = VariationalLoss(betas, kind.lower()), adm_scheduler(schedule, num_train_timesteps=T)
        noisy, timesteps = case[prefix + "x_t"], case[prefix + "t"]
        case.check(prefix + "x_t", scheduler.add_noise(clean, noise, timesteps))
        output = case[prefix + "model_out"].clone().requires_grad_()
        found = loss(output, noise, clean, noisy, timesteps)
        for name in ("loss", "mse", "vb"):
            if f"{prefix}{kind}.{name}" in case:
                case.check(f"{prefix}{kind}.{name}", found[name])
        if f"{prefix}{kind}.grad_model_out" in case:
            found["loss"].sum().backward()
            case.check(f"{prefix}{kind}.grad_model_out", output.grad)
        output = output.detach()
        mean, log_variance, pred_xstart = loss.predict(output, noisy, timesteps)
        case.check(prefix + "mean", mean)
        case.check(prefix + "log_variance", log_variance)
        case.check(prefix + "pred_xstart", pred_xstart)
        mean, log_variance = loss.posterior(clean, noisy, timesteps)
        case.check(prefix + "true_mean", mean)
        case.check(prefix + "true_log_variance_clipped", log_variance)
        case.check(prefix + "prior_bpd", loss.prior(clean))
        for name, clip in (("vb_clipped", True), ("vb_unclipped", False)):
            case.check(prefix + name, loss.bound_term(output, clean, noisy, timesteps, clip_sample=clip))


def gaussian_blur(case: Case) -> None:
    image, sigmas = case["img"], case["sigma"].tolist()
    for sigma in sigmas:
        case.check(f"blur_{sigma}", gaussian_blur_3x3(image, sigma))
    if "blur_per_sample" in case:
        case.check("blur_per_sample", gaussian_blur_3x3(image, case["blur_per_sample_sigma"]))
    dot = torch.zeros(len(sigmas), 1, 5, 5)
    dot[..., 2, 2] = 1
    case.check("kernel1d", gaussian_blur_3x3(dot, torch.tensor(sigmas)).sum(-2)[:, 0, 1:4])


def resize_choices(case: Case) -> None:
    images, area = case["x"], case["area"]
    for name, method in DOWNSAMPLINGS.items():
        case.check(name, resize_batch(images, *case[name].shape[2:], method))
    for name in ("bicubic", "bilinear", "nearest"):
        case.check(f"up_{name}", resize_batch(area, *case[f"up_{name}"].shape[2:], name))
    pixels = case["img_u8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    for name in ("bicubic", "box"):
        small = resize_batch(pixels, *case[f"pil_{name}_u8"].shape[:2], f"pil_{name}")[0]
        case.check(f"pil_{name}_u8", ((small + 1) * 127.5).round().byte().permute(1, 2, 0))


KINDS = {
    "adm_unet": adm_unet,
    "adm_superres": adm_superres,
    "trace_psample": trace,
    "trace_ddim": trace,
    "trace_superres": trace,
    "q_sample_schedules": q_sample_schedules,
    "losses_hybrid_vlb": losses_hybrid_vlb,
    "gaussian_blur_3x3_reflect": gaussian_blur,
    "resize_choices": resize_choices,
}
