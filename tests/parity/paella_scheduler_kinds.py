"""Parity kinds of Paella's scheduler and losses, and of whole v1 sampling runs. The walker is `test_parity.py`."""

import re

import torch
from parity.case import Case
from torch import Tensor

from diffusers_ext.conversion.paella import convert_paella_unet
from diffusers_ext.guidance import classifier_free_guidance
from diffusers_ext.losses.discrete import loss_weight, token_cross_entropy, weighted_mean
from diffusers_ext.schedulers.scheduling_discrete_renoising import (
    DiscreteRenoisingScheduler,
    RenoisingDraws,
    typical_filter,
)
from diffusers_ext.schedulers.token_sampling import sample_tokens


def add_noise_and_loss(case: Case) -> None:
    tokens = case["tokens"]
    for version, time in (("v1", "r"), ("v3", "t")):
        scheduler = DiscreteRenoisingScheduler(
            num_vec_classes=case.facts["num_labels"],
            time_convention=version,
            noise_schedule="cosine" if version == "v1" else "linear",
        )
        timesteps = case[time]
        runs = [name[len(version) + 1 : -len("_mask")] for name in case.names(f"{version}_") if name.endswith("_mask")]
        assert runs, f"{case.folder} records no run of {version}"
        for run in runs:

            def recorded(name: str, version: str = version, run: str = run) -> Tensor:
                own = f"{version}_{run}_{name}"  # some are recorded once for both versions
                return case[own if own in case else f"{run}_{name}"]

            noise = recorded("random_tokens")
            noisy, mask = scheduler.add_noise(tokens, noise, timesteps, uniforms=recorded("u"), return_mask=True)
            case.check(f"{version}_{run}_mask", mask)
            case.check(f"{version}_{run}_result", noisy)
            case.check(f"{version}_{run}_result", scheduler.add_noise(tokens, noise, timesteps, mask=mask))
            if f"{version}_{run}_p" in case:
                ratio = scheduler.noise_ratio(timesteps).reshape(-1, *[1] * (tokens.ndim - 1))
                case.check(f"{version}_{run}_p", ratio.expand(tokens.shape), atol=1e-6)

            losses = token_cross_entropy(recorded("pred_logits"), tokens, label_smoothing=0.1, reduction="none")
            case.check(f"{run}_ce_map", losses)
            if version == "v1":
                loss = token_cross_entropy(recorded("pred_logits"), tokens)
            else:
                weight = loss_weight(mask, timesteps)
                case.check(f"v3_{run}_loss_weight", weight)
                loss = weighted_mean(losses, weight)
            case.check(f"{version}_{run}_loss", loss)
        if version == "v1" and "gamma_r" in case:
            case.check("gamma_r", scheduler.noise_ratio(timesteps), atol=1e-6)


def typical_filtering(case: Case) -> None:
    pattern = re.compile(r"(?:(?P<rows>.+)_)?(?P<what>filtered|probs)_mass(?P<mass>[0-9.]+)(?:_min(?P<min>\d+))?")
    for name in case.names():
        found = pattern.fullmatch(name)
        if found is None:
            continue
        logits = case[f"{found['rows']}_logits" if found["rows"] else "logits"]
        mass, min_tokens = float(found["mass"]), int(found["min"] or 1)
        filtered = typical_filter(logits, mass, min_tokens)
        assert torch.equal(filtered, typical_filter(logits, mass, min_tokens, chunk_rows=1))
        if found["what"] == "filtered":
            case.check(name, filtered)
        else:
            case.check(name, filtered.softmax(dim=-1), atol=1e-6)  # the last bit of exp differs between machines


def v1_sample(case: Case) -> None:
    """One recorded run of the original's `sample`, with the network, fed the recorded draws; every step exact."""
    call, size = case.facts["call"], case.facts["ctor"]["num_labels"]
    first = call.get("starting_t", 0)
    scale = call.get("classifier_free_scale", -1)
    typical = {"typical_mass": call.get("typical_mass", 0.2), "typical_min_tokens": call.get("typical_min_tokens", 1)}
    filtering = call.get("typical_filtering", True)
    mode = call.get("renoise_mode", "start")
    scheduler = DiscreteRenoisingScheduler(
        size,
        typical_filtering=filtering,
        renoise_mode=mode,
        temperature=tuple(call.get("temp_range", (1.0, 1.0))),
        **typical,
    )
    scheduler.set_timesteps(
        call["T"], start_index=first, renoise_steps=min(call.get("renoise_steps", 11), call["T"] - 1)
    )
    network = convert_paella_unet(case.weights(), time_embed_dim=case.facts["ctor"].get("c_r", 64)).eval()
    clip = case["clip"]

    if "start_u" in case:
        noisy, replaced = scheduler.add_noise(
            case["image_tokens"],
            case["start_random_tokens"],
            case["start_r"],
            uniforms=case["start_u"],
            return_mask=True,
        )
        case.check("start_mask", replaced)
        case.check("x", noisy)
    mask = case["mask"] if "mask" in case else None
    tokens = case["x"] if "x" in case else case["init_noise"]
    if mask is not None:
        tokens = torch.where(mask == 1, case["init_noise"], tokens)
    initial = tokens

    for k, timestep in enumerate(scheduler.timesteps):
        step = f"step{first + k:02d}_"

        def recorded(name: str, step: str = step) -> Tensor | None:
            return case[step + name] if step + name in case else None

        case.check(step + "tokens_in", tokens)
        case.check(step + "r", timestep.expand(len(tokens)))
        case.check(step + "temperature", scheduler.temperatures[k : k + 1])
        with torch.no_grad():
            logits = network(tokens, timestep, clip).sample
            _check_logits(case, step + "logits_cond", logits)
            guided_record = case[step + "logits_cond"]
            if scale >= 0:
                null = network(tokens, timestep, torch.zeros_like(clip)).sample
                _check_logits(case, step + "logits_uncond", null)
                logits = classifier_free_guidance(logits, null, scale)
                guided_record = classifier_free_guidance(guided_record, case[step + "logits_uncond"], scale)
        rows = guided_record.permute(0, 2, 3, 1).reshape(-1, size)
        if step + "kept" in case:
            kept = typical_filter(rows, *typical.values()) if filtering else rows
            case.check(step + "kept", kept.isfinite())
        drawn = sample_tokens(
            logits.permute(0, 2, 3, 1).reshape(-1, size),
            case[step + "gumbel_u"],
            scheduler.temperatures[k],
            **(typical if filtering else {}),
        )
        case.check(step + "sampled", drawn.view(tokens.shape))

        renoise = {"renoise_uniforms": recorded("renoise_u"), "renoise_tokens": recorded("renoise_tokens")}
        if renoise["renoise_uniforms"] is None:
            renoise["renoise_mask"] = recorded("renoise_mask")
        output = scheduler.step(
            logits,
            timestep,
            tokens,
            initial_noise=initial,
            mask=mask,
            draws=RenoisingDraws(gumbel_uniforms=case[step + "gumbel_u"], **renoise),
        )
        if step + "before_renoise" in case:
            case.check(step + "before_renoise", output.pred_original_sample)
        if step + "renoise_r" in case:
            case.check(step + "renoise_r", scheduler.renoise_levels[k].expand(len(tokens)))
        if step + "renoise_u" in case:
            replacement = {"start": initial, "prev": tokens, "rand": renoise["renoise_tokens"]}[mode]
            noisy, replaced = scheduler.add_noise(
                output.pred_original_sample,
                replacement,
                scheduler.renoise_levels[k],
                uniforms=renoise["renoise_uniforms"],
                return_mask=True,
            )
            case.check(step + "renoise_mask", replaced)
            case.check(step + "tokens_out", noisy)
        tokens = output.prev_sample
        case.check(step + "tokens_out", tokens)
    case.check("final_tokens", tokens)


def _check_logits(case: Case, name: str, logits: Tensor) -> None:
    case.check(name, logits, atol=2e-5 * float(case[name].abs().max()), rtol=0.0)


KINDS = {
    "add_noise_and_loss": add_noise_and_loss,
    "typical_filtering": typical_filtering,
    "v1_sample_txt2img": v1_sample,
    "v1_sample_inpaint": v1_sample,
    "v1_sample_start_from": v1_sample,
    "v1_sample_multicond_rand": v1_sample,
}
