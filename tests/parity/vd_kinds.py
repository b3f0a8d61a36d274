"""The recorded networks, contexts and samplers of Versatile Diffusion, through the converters."""

from itertools import product

import pytest
import torch
from parity.case import Case
from torch import Tensor, nn

from diffusers_ext.conditions.focus import focus_scales, rescale_ranks, select_ranks
from diffusers_ext.conversion.keys import load_strict, rename_keys, under
from diffusers_ext.conversion.versatile import convert_versatile_unet, data_layer_rules, read_versatile_unet
from diffusers_ext.conversion.versatile_checkpoint import convert_versatile_clip
from diffusers_ext.losses.diffusion import noise_error
from diffusers_ext.models.blocks.versatile import FCLinear, FCResBlock, VersatileHead
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.color_matching import match_color_distribution, match_color_statistics
from diffusers_ext.pipelines.versatile.conditions import image_context, mask_to_token_weights, text_context
from diffusers_ext.pipelines.versatile.denoising import FlowContext, predict_flow_noise, versatile_scheduler
from diffusers_ext.pipelines.versatile.repeated_words import merge_repeated_words
from diffusers_ext.schedulers.gaussian import set_original_timesteps

TYPES = ("image", "text")
STEPS = {"save": "save_hidden_feature", "load": "load_hidden_feature", "context": "c"}  # all others are "d"


def load_unet(case: Case) -> VersatileUNet:
    facts = case.facts["config"]
    unet = convert_versatile_unet(case.weights(), num_heads=facts["num_heads"], attention_levels=facts["with_attn"])
    config = unet.config
    assert config["data_types"]["image"] == {"kind": "map", "channels": facts["image_channels"]}
    positions = facts["second_dim"][0]
    assert config["data_types"]["text"] == {"kind": "vector", "channels": facts["text_dim"], "positions": positions}
    assert config["context_types"] == dict.fromkeys(TYPES, facts["context_dim"])
    assert list(config["block_out_channels"]) == [facts["model_channels"] * mult for mult in facts["channel_mult"]]
    assert list(config["layers_per_block"]) == facts["num_res_blocks"]
    return unet


@torch.no_grad()
def unet_flows(case: Case) -> None:
    unet = load_unet(case)
    order = [step for part in "imo" for step in case.facts["layer_order"][part]]
    assert [STEPS.get(step.op, "d") for step in unet.walk] == order
    timesteps, both = case["timesteps"], [case["ctx_text"], case["ctx_image"]]
    case.check("t_sinusoid", unet.time_proj(timesteps))
    case.check("t_emb", unet.time_embedding(unet.time_proj(timesteps)))
    scheduler = versatile_scheduler()
    for data, context in product(TYPES, TYPES):
        options = {"data_type": data, "context_type": context}
        out = unet(case[f"x_{data}"], timesteps, case[f"ctx_{context}"], **options).sample
        case.check(f"out_{data}_from_{context}", out)
        noise = case[f"noise_{data}"]
        noisy = scheduler.add_noise(case[f"x_{data}"], noise, timesteps)
        loss = noise_error(unet(noisy, timesteps, case[f"ctx_{context}"], **options).sample, noise).mean()
        case.check(f"loss_{data}_from_{context}", loss.reshape(1))
    for data in TYPES:
        options = {"data_type": data, "context_type": ["text", "image"]}
        for name in case.names(f"out_{data}_dual_text"):
            share = float(name.rpartition("text")[2])
            out = unet(case[f"x_{data}"], timesteps, both, context_ratios=[share, 1 - share], **options)
            case.check(name, out.sample)
    choices = case["layer_choice"].tolist()
    out = unet(case["x_image"], timesteps, both, context_type=["text", "image"], layer_choices=choices)
    case.check("out_image_dual_layer", out.sample)
    three = [*both, 0.5 * case["ctx_image"].flip(1)]
    types = ["text", "image", "image"]
    out = unet(case["x_image"], timesteps, three, context_type=types, context_ratios=[1, 2, 1])
    case.check("out_image_triple", out.sample)


def build_fc(name: str, kind: str, x: Tensor, y: Tensor, emb_dim: int) -> tuple[nn.Module, str]:
    """An empty layer of a recorded kind, by the shapes of its input and output, and its step of the walk."""
    if kind.startswith("FCBlock"):
        positions = x.shape[2] if x.ndim == 4 else 1
        return FCResBlock(x.shape[1], y.shape[1], positions=positions, temb_channels=emb_dim), "res"
    if kind == "Linear_MultiDim":
        return FCLinear(x[0].numel(), tuple(y.shape[1:])), "in"
    assert kind == "GroupNorm32+SiLU+Linear_MultiDim", f"{name} is a {kind}"
    return VersatileHead(x.shape[1], 32, FCLinear(x[0].numel(), tuple(y.shape[1:]))), "out"


@torch.no_grad()
def fcblock(case: Case) -> None:
    weights = case.weights()
    for name, kind in case.facts["modules"].items():
        x, y = case[f"{name}.x"], case[f"{name}.y"]
        layer, op = build_fc(name, kind, x, y, case.facts["emb_dim"])
        own = {key: value for key, value in weights.items() if key.startswith(f"{name}.")}
        load_strict(layer, rename_keys(own, under(f"{name}.", "", data_layer_rules("vector"))))
        case.check(f"{name}.y", layer(x, case["emb"]) if op == "res" else layer(x))


def full_key_map(case: Case) -> None:
    """All keys of the full size in all three layouts, on the meta device; there is nothing to compute."""
    with torch.device("meta"):
        network = VersatileUNet()
        wanted = network.state_dict()
        tensors = [torch.empty(row["shape"]) for row in case.facts["rows"]]
    renamed = []
    for layout in ("original", "deprecated", "diffusers"):
        keys = [row[layout].replace("_unet/", "_unet.") for row in case.facts["rows"]]
        weights = dict(zip(keys, tensors, strict=True))
        assert len(weights) == len(tensors)
        copies = {key: value for key, value in weights.items() if key.startswith("image_unet.time_embedding.")}
        weights |= {key.replace("image_unet", "text_unet"): value for key, value in copies.items()}
        config, found = read_versatile_unet(weights)
        assert found.keys() == wanted.keys()
        # the same tensor, not only one of the same shape, lies under a name in all layouts
        assert {id(tensor) for tensor in found.values()} == {id(tensor) for tensor in tensors}
        renamed.append({key: id(tensor) for key, tensor in found.items()})
        assert config["block_out_channels"] == network.config["block_out_channels"] == (320, 640, 1280, 1280)
        assert config["attention_levels"] == network.config["attention_levels"] == (True, True, True, False)
        assert config["layers_per_block"] == (2, 2, 2, 2) and network.config["layers_per_block"] == 2
        for name in ("data_types", "context_types"):
            assert config[name] == network.config[name]
        assert sorted(config["flows"]) == sorted(network.known_flows)
        for key, tensor in found.items():
            # convolutions of 1x1 are linear layers here
            assert [n for n in tensor.shape if n != 1] == [n for n in wanted[key].shape if n != 1], key
    assert renamed[0] == renamed[1] == renamed[2]
    assert sum(tensor.numel() for tensor in tensors) == sum(tensor.numel() for tensor in wanted.values())
    case.checked.add("rows")


@torch.no_grad()
def ddim_cfg(case: Case) -> None:
    unet, scheduler = load_unet(case), versatile_scheduler()
    case.check("betas", scheduler.betas, atol=1e-7)
    case.check("alphas_cumprod", scheduler.alphas_cumprod, atol=1e-6)
    for name, facts in case.facts["runs"].items():
        data, atol = facts["data"], case.facts["atol_by_mode"][facts["data"]]
        types = [facts["context"]] if isinstance(facts["context"], str) else facts["context"]
        nothing = {"text": "uncond_text", "image": "uncond_image_zero" if data == "image" else "uncond_image_other"}
        ratios = facts.get("ratio", [1.0])
        contexts = [
            FlowContext(kind, case[f"ctx_{kind}"], case[nothing[kind]], ratio)
            for kind, ratio in zip(types, ratios, strict=True)
        ]
        set_original_timesteps(scheduler, facts["steps"])
        timesteps = scheduler.timesteps
        if start := facts.get("x0_forward_timesteps"):
            noised_at = timesteps.flip(0)[start]
            clean, latents = case[f"{name}.x0"], case[f"{name}.x_init"]
            noise = recover_noise(scheduler, clean, latents, noised_at)
            bound = 6 / noise.numel() ** 0.5  # six standard errors; at any other level it is not N(0, 1)
            assert abs(noise.mean()) < bound and abs(noise.std() - 1) < bound
            timesteps = timesteps[len(timesteps) - start :]
        case.check(f"{name}.timesteps", timesteps)
        latents = case[f"{name}.x_init"]
        states, clean_states = [], []
        for t, noise in zip(timesteps, case[f"{name}.noise"], strict=True):
            eps = predict_flow_noise(unet, latents, t, contexts, data_type=data, guidance_scale=facts["scale"])
            out = scheduler.step(eps, t, latents, eta=facts["eta"], variance_noise=noise)
            latents = out.prev_sample
            states.append(latents)
            clean_states.append(out.pred_original_sample)
        case.check(f"{name}.x_prev", torch.stack(states), atol=atol)
        case.check(f"{name}.pred_x0", torch.stack(clean_states), atol=atol)
    grids = [original_timesteps(scheduler, facts["steps"]) for facts in case.facts["runs"].values()]
    ascending = next(grid for grid in grids if len(grid) == len(case["ddim_alphas"]))
    case.check("ddim_alphas", scheduler.alphas_cumprod[ascending], atol=1e-6)
    before = torch.cat([torch.zeros(1, dtype=torch.long), ascending[:-1]])
    case.check("ddim_alphas_prev", scheduler.alphas_cumprod[before], atol=1e-6)


def original_timesteps(scheduler, steps: int) -> Tensor:
    set_original_timesteps(scheduler, steps)
    return scheduler.timesteps.flip(0)


def recover_noise(scheduler, clean: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    signal = scheduler.alphas_cumprod[timestep]
    return (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()


@torch.no_grad()
def clip_context(case: Case) -> None:
    config = case.facts["config"]
    (hidden_act,) = {config[tower]["act"] for tower in ("text", "vision")}  # a CLIP has one for both
    text, vision = convert_versatile_clip(
        case.weights(),
        text_heads=config["text"]["heads"],
        vision_heads=config["vision"]["heads"],
        eos_token_id=config["text"]["eos_token_id"],
        hidden_act=hidden_act,
    )
    assert vision.config.image_size == config["vision"]["image_size"]
    hidden = text.text_model(case["input_ids"])
    case.check("text_last_hidden", hidden.last_hidden_state)
    case.check("text_pooler", hidden.pooler_output)
    case.check("ctx_text", text_context(text, case["input_ids"]))
    pixels = case["pixel_values"].float()
    case.check("vision_last_hidden", vision(pixels).last_hidden_state)
    case.check("ctx_image", image_context(vision, pixels))
    weights = mask_to_token_weights(case["mask"], vision.config.image_size, vision.config.patch_size)
    case.check("token_mask", weights)
    case.check("ctx_image_masked", image_context(vision, pixels, weights))
    case.check("ctx_image", image_context(vision, pixels, torch.ones_like(weights)))


def disentangle(case: Case) -> None:
    facts = case.facts
    dropped, kept = facts["max_drop_rank"]
    options = {"ranks": facts["q"], "dropped": dropped, "kept": kept}
    for level, recorded in facts["scales"].items():
        scales = focus_scales(float(level), **options)
        changed = {str(rank): scale for rank, scale in enumerate(scales) if str(rank) in recorded["scale"]}
        assert changed == {rank: pytest.approx(scale, abs=1e-9) for rank, scale in recorded["scale"].items()}
        assert all(scale == 1 for rank, scale in enumerate(scales) if str(rank) not in recorded["scale"])
    x = case["x"]
    for name in case.names("y_"):
        case.check(name, rescale_ranks(x, float(name.removeprefix("y_")), **options))
    case.check("x_mean", x.mean(dim=-1, keepdim=True))
    case.check("singular_values", torch.linalg.svdvals(x - case["x_mean"])[:, : facts["q"]])
    for name in case.names("v0_"):
        # not converged in the original: its numbers need its draws
        generator = torch.Generator().manual_seed(facts["seed"])
        number = int(name.rpartition("_")[2].removeprefix("q"))
        start, stop = (0, number) if "find" in name else (number, 50)
        case.check(name, select_ranks(x, start, stop, iterations=10, generator=generator))
    for text, merged in facts["remove_duplicate_word"].items():
        assert merge_repeated_words(text) == merged, text


def color_adjust(case: Case) -> None:
    case.check("simple_v1", match_color_statistics(case["generated"], case["ref"]))
    image, reference = case["generated_u8"].numpy(), case["ref_u8"].numpy()
    for name in case.names("simple_v0") + case.names("pdf_v0"):
        keep = name.split("_")[2].removeprefix("keep")  # "05" is 0.5; the simple one keeps nothing
        share = float(f"{keep[0]}.{keep[1:]}") if keep.isdigit() else 0.0
        result = match_color_distribution(image, reference, keep=share, histogram=name.startswith("pdf"))
        off = (torch.from_numpy(result).int() - case[name].int()).abs()
        assert int(off.max()) <= 1, f"{name}: off by {int(off.max())}"  # the tolerance of the record
        case.checked.add(name)


KINDS = {
    "unet_flows": unet_flows,
    "fcblock": fcblock,
    "full_key_map": full_key_map,
    "ddim_cfg": ddim_cfg,
    "clip_context": clip_context,
    "disentangle": disentangle,
    "color_adjust": color_adjust,
}
