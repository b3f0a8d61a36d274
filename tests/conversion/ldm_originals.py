"""Stand-ins for the original checkpoints of latent diffusion: every key, in the sizes that a test asks for.

Keys and sizes are facts of CompVis/latent-diffusion@a506df5 and CompVis/taming-transformers@3ba01b2 (MIT).
"""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from noise_levels import scaled_linear_betas

from diffusers_ext.models.unet_ldm import LDMUNet

Shapes = dict[str, tuple[int, ...]]

# name: sizes of the U-Net, its heads, the class that it becomes, millions of parameters
UNETS = {
    "celeba256, ffhq256, lsun_beds256": {
        "sizes": {"ch": 224, "mult": (1, 2, 3, 4), "layers": 2, "attention": (8, 4, 2)},
        "heads": {"num_head_channels": 32}, "class": UNet2DModel, "millions": 274.1,
    },
    "lsun_churches256": {
        "sizes": {"ch": 192, "mult": (1, 2, 2, 4, 4), "layers": 2, "attention": (1, 2, 4, 8), "film": True,
                  "updown": True, "in_channels": 4},
        "heads": {"num_heads": 8}, "class": LDMUNet, "millions": 295.0,
    },
    "cin256 (LDM-8)": {
        "sizes": {"ch": 256, "mult": (1, 2, 4), "layers": 2, "attention": (4, 2, 1), "context": 512, "in_channels": 4},
        "heads": {"num_head_channels": 32}, "class": UNet2DConditionModel, "millions": 395.0,
    },
    "cin256-v2 (LDM-4)": {
        "sizes": {"ch": 192, "mult": (1, 2, 3, 5), "layers": 2, "attention": (8, 4, 2), "context": 512},
        "heads": {"num_heads": 1}, "class": UNet2DConditionModel, "millions": 400.9,
    },
    "txt2img-1p4B": {
        "sizes": {"ch": 320, "mult": (1, 2, 4, 4), "layers": 2, "attention": (4, 2, 1), "context": 1280,
                  "in_channels": 4},
        "heads": {"num_heads": 8}, "class": UNet2DConditionModel, "millions": 872.3,
    },
    "text2img256": {
        "sizes": {"ch": 192, "mult": (1, 2, 3, 5), "layers": 2, "attention": (8, 4, 2), "context": 640},
        "heads": {"num_head_channels": 32}, "class": UNet2DConditionModel, "millions": 403.6,
    },
    "layout2img-openimages256": {
        "sizes": {"ch": 128, "mult": (1, 2, 3, 4), "layers": 2, "attention": (8, 4, 2), "context": 512, "depth": 3},
        "heads": {"num_head_channels": 32}, "class": UNet2DConditionModel, "millions": 246.3,
    },
    "semantic_synthesis256, 512": {
        "sizes": {"ch": 128, "mult": (1, 4, 8), "layers": 2, "attention": (32, 16, 8), "in_channels": 6},
        "heads": {"num_heads": 8}, "class": UNet2DModel, "millions": 215.2,
    },
    "bsr_sr": {
        "sizes": {"ch": 160, "mult": (1, 2, 2, 4), "layers": 2, "attention": (16, 8), "in_channels": 6},
        "heads": {"num_head_channels": 32}, "class": UNet2DModel, "millions": 113.6,
    },
    "inpainting_big": {
        "sizes": {"ch": 256, "mult": (1, 2, 3, 4), "layers": 2, "attention": (8, 4, 2), "updown": True,
                  "in_channels": 7},
        "heads": {"num_heads": 8}, "class": LDMUNet, "millions": 387.2,
    },
}  # fmt: skip

# name: sizes of the autoencoder, whether it has a codebook, millions of parameters
AUTOENCODERS = {
    "kl-f4": ({"mult": (1, 2, 4), "z": 3}, 55.3),
    "kl-f8": ({"mult": (1, 2, 4, 4), "z": 4}, 83.7),
    "kl-f16": ({"mult": (1, 1, 2, 2, 4), "attention": (4,), "z": 16}, 69.6),
    "kl-f32": ({"mult": (1, 1, 2, 2, 4, 4), "attention": (4, 5), "z": 64}, 103.9),
    "vq-f4": ({"mult": (1, 2, 4), "z": 3, "codes": 8192}, 55.3),
    "vq-f4-noattn": ({"mult": (1, 2, 4), "z": 3, "codes": 8192, "mid_attention": False}, 53.2),
    "vq-f8": ({"mult": (1, 2, 2, 4), "attention": (3,), "z": 4, "codes": 16384}, 67.7),
    "vq-f8-n256": ({"mult": (1, 2, 2, 4), "attention": (3,), "z": 4, "codes": 256}, 67.7),
    "vq-f16": ({"mult": (1, 1, 2, 2, 4), "attention": (4,), "z": 8, "codes": 16384}, 69.6),
}

CONDITIONERS: dict[str, Shapes] = {
    "class": {"embedding.weight": (1001, 512)},
    "semantic": {"channel_mapper.weight": (3, 182, 1, 1)},
}


def random_weights(shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def unet_shapes(
    ch: int,
    mult: tuple[float, ...],
    layers: int,
    attention: tuple[int, ...],
    *,
    in_channels: int = 3,
    out_channels: int | None = None,
    context: int | None = None,
    depth: int = 1,
    film: bool = False,
    updown: bool = False,
    labels: int | None = None,
    start: int | None = None,
) -> Shapes:
    """The original's `UNetModel`; `attention` lists downsampling factors, `start` another width of the first layer."""
    shapes: Shapes = {}
    out_channels = out_channels or (4 if in_channels == 4 else 3)
    first = start or int(ch * mult[0])

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = (weight[0],)

    def resnet(name: str, cin: int, cout: int) -> None:
        add(f"{name}.in_layers.0", cin), add(f"{name}.in_layers.2", cout, cin, 3, 3)
        add(f"{name}.emb_layers.1", cout * (1 + film), 4 * ch)
        add(f"{name}.out_layers.0", cout), add(f"{name}.out_layers.3", cout, cout, 3, 3)
        if cin != cout:
            add(f"{name}.skip_connection", cout, cin, 1, 1)

    def attend(name: str, c: int) -> None:
        add(f"{name}.norm", c)
        if context is None:
            add(f"{name}.qkv", 3 * c, c, 1), add(f"{name}.proj_out", c, c, 1)
            return
        add(f"{name}.proj_in", c, c, 1, 1), add(f"{name}.proj_out", c, c, 1, 1)
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for index, width in ((1, c), (2, context)):
                add(f"{block}.attn{index}.to_q", c, c, bias=False)
                add(f"{block}.attn{index}.to_k", c, width, bias=False)
                add(f"{block}.attn{index}.to_v", c, width, bias=False)
                add(f"{block}.attn{index}.to_out.0", c, c)
            add(f"{block}.ff.net.0.proj", 8 * c, c), add(f"{block}.ff.net.2", c, 4 * c)
            for index in (1, 2, 3):
                add(f"{block}.norm{index}", c)

    add("time_embed.0", 4 * ch, ch), add("time_embed.2", 4 * ch, 4 * ch)
    if labels:
        shapes["label_emb.weight"] = (labels, 4 * ch)
    add("input_blocks.0.0", first, in_channels, 3, 3)
    skips, c, index = [first], first, 1
    for level, factor in enumerate(mult):
        for _ in range(layers):
            resnet(f"input_blocks.{index}.0", c, int(ch * factor))
            c = int(ch * factor)
            if 2**level in attention:
                attend(f"input_blocks.{index}.1", c)
            skips.append(c)
            index += 1
        if level < len(mult) - 1:
            if updown:
                resnet(f"input_blocks.{index}.0", c, c)
            else:
                add(f"input_blocks.{index}.0.op", c, c, 3, 3)
            skips.append(c)
            index += 1
    resnet("middle_block.0", c, c), attend("middle_block.1", c), resnet("middle_block.2", c, c)
    index = 0
    for level, factor in reversed(list(enumerate(mult))):
        for layer in range(layers + 1):
            resnet(f"output_blocks.{index}.0", c + skips.pop(), int(ch * factor))
            c, element = int(ch * factor), 1
            if 2**level in attention:
                attend(f"output_blocks.{index}.1", c)
                element = 2
            if level and layer == layers:
                if updown:
                    resnet(f"output_blocks.{index}.{element}", c, c)
                else:
                    add(f"output_blocks.{index}.{element}.conv", c, c, 3, 3)
            index += 1
    add("out.0", c), add("out.2", out_channels, c, 3, 3)
    return shapes


def autoencoder_shapes(
    mult: tuple[int, ...],
    z: int,
    *,
    ch: int = 128,
    layers: int = 2,
    attention: tuple[int, ...] = (),
    codes: int | None = None,
    embed_dim: int | None = None,
    mid_attention: bool = True,
) -> Shapes:
    """`AutoencoderKL`, or with `codes` `VQModel`; `attention` lists levels."""
    shapes: Shapes = {}
    embed_dim = embed_dim or z
    moments = 1 if codes else 2

    def add(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (weight[0],)

    def resnet(name: str, cin: int, cout: int) -> None:
        add(f"{name}.norm1", cin), add(f"{name}.conv1", cout, cin, 3, 3)
        add(f"{name}.norm2", cout), add(f"{name}.conv2", cout, cout, 3, 3)
        if cin != cout:
            add(f"{name}.nin_shortcut", cout, cin, 1, 1)

    def attend(name: str, c: int) -> None:
        add(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", c, c, 1, 1)

    widths, last = [ch * m for m in mult], len(mult) - 1
    add("encoder.conv_in", ch, 3, 3, 3), add("decoder.conv_in", widths[-1], z, 3, 3)
    c = ch
    for level, width in enumerate(widths):
        for layer in range(layers):
            resnet(f"encoder.down.{level}.block.{layer}", c, width)
            c = width
            if level in attention:
                attend(f"encoder.down.{level}.attn.{layer}", c)
        if level < last:
            add(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
    for level in reversed(range(last + 1)):
        for layer in range(layers + 1):
            resnet(f"decoder.up.{level}.block.{layer}", c, widths[level])
            c = widths[level]
            if level in attention:
                attend(f"decoder.up.{level}.attn.{layer}", c)
        if level:
            add(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    for side, width, out in (("encoder", widths[-1], moments * z), ("decoder", widths[0], 3)):
        resnet(f"{side}.mid.block_1", widths[-1], widths[-1]), resnet(f"{side}.mid.block_2", widths[-1], widths[-1])
        if mid_attention:
            attend(f"{side}.mid.attn_1", widths[-1])
        add(f"{side}.norm_out", width), add(f"{side}.conv_out", out, width, 3, 3)
    add("quant_conv", moments * embed_dim, moments * z, 1, 1), add("post_quant_conv", z, embed_dim, 1, 1)
    if codes:
        shapes["quantize.embedding.weight"] = (codes, embed_dim)
    return shapes


def bert_shapes(layers: int, width: int, vocab: int, length: int, inner: int = 512) -> Shapes:
    """`BERTEmbedder`: attention `inner` wide whatever the model's width."""
    shapes: Shapes = {
        "transformer.token_emb.weight": (vocab, width),
        "transformer.pos_emb.emb.weight": (length, width),
    }

    def add(name: str, *weight: int) -> None:
        shapes[f"transformer.{name}.weight"], shapes[f"transformer.{name}.bias"] = weight, (weight[0],)

    for layer in range(layers):
        attention, mlp = f"attn_layers.layers.{2 * layer}", f"attn_layers.layers.{2 * layer + 1}"
        add(f"{attention}.0", width), add(f"{mlp}.0", width)
        for part in ("to_q", "to_k", "to_v"):
            shapes[f"transformer.{attention}.1.{part}.weight"] = (inner, width)
        add(f"{attention}.1.to_out", width, inner)
        add(f"{mlp}.1.net.0.0", 4 * width, width), add(f"{mlp}.1.net.2", width, 4 * width)
    add("norm", width), add("to_logits", vocab, width)
    return shapes


def checkpoint(
    unet: dict[str, torch.Tensor],
    *,
    averaged: dict[str, torch.Tensor] | None = None,
    first_stage: dict[str, torch.Tensor] | None = None,
    cond: dict[str, torch.Tensor] | None = None,
    scale_factor: float | None = None,
) -> dict:
    """A file as the original's training writes it: all parts, the schedule's buffers, and what Lightning adds."""
    if first_stage is None:
        first_stage = random_weights(autoencoder_shapes((1,), 3, ch=32, layers=1, codes=5))
    betas = scaled_linear_betas(0.0015, 0.0195)
    abar = (1 - betas).cumprod(0)
    weights = {
        "betas": betas.float(), "alphas_cumprod": abar.float(), "alphas_cumprod_prev": abar.roll(1).float(),
        "sqrt_alphas_cumprod": abar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(), "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(), "posterior_variance": betas,
        "posterior_log_variance_clipped": betas.log(), "posterior_mean_coef1": betas, "posterior_mean_coef2": betas,
    }  # fmt: skip
    if scale_factor is not None:
        weights["scale_factor"] = torch.tensor(scale_factor)
    weights |= {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    if averaged is not None:
        weights |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        weights |= {f"model_ema.diffusion_model{key.replace('.', '')}": value for key, value in averaged.items()}
    weights |= {f"first_stage_model.{key}": value for key, value in first_stage.items()}
    weights |= {f"cond_stage_model.{key}": value for key, value in (cond or {}).items()}
    return {"state_dict": weights, "epoch": 3, "global_step": 1000, "callbacks": {}, "lr_schedulers": []}
