"""The options of train_piti.py that concern its upsamplers alone, and what can be said against them."""

from dataclasses import dataclass
from typing import Any, Literal

from diffusers_ext.training_utils.adversarial import refuse_micro_steps
from diffusers_ext.training_utils.args import TrainArgs, between, option, positive

UPSAMPLERS = ("prior_upsampler", "upsampler")  # the stages


@dataclass
class UpsamplerArgs:
    """What an upsampler is given, and the terms on the clean image that its prediction amounts to."""

    pretrained_upsampler_name_or_path: str | None = option(
        None, "Upsamplers: pipeline whose upsampler is the start (for maps its U-Net alone, of a GLIDE or PITI "
        "pipeline); when unset that of --pretrained_model_name_or_path, if it has one, else a new one."
    )  # fmt: skip
    degradation: Literal["none", "bsr_light", "bsr_light_l0"] = option(
        "none", "Upsamplers: how the small image is made of the large one: as --downsampling says, or by PITI's "
        "random blur, noise and JPEG, without or with L0 smoothing (PITI: bsr_light_l0)."
    )  # fmt: skip
    perceptual_model: str = option(
        "none", "Upsamplers: network whose features of the clean image count: `none`, `vgg19` (from torchvision's "
        "cache), a file with VGG-19's weights, `lpips`, or a folder with a CLIP model."
    )  # fmt: skip
    perceptual_levels: Literal["conv2_2", "multi"] = option(
        "conv2_2", "Upsamplers, VGG-19: the one level of the released code, or five."
    )
    perceptual_weight: float = option(0.004, "Upsamplers: weight of the perceptual distance.")
    adversarial_loss: Literal["wgan_gp", "log"] = option(
        "wgan_gp", "Upsamplers: the released code's, with gradient penalty, or the paper's log GAN."
    )
    adversarial_weight: float | None = option(
        None, "Upsamplers: weight of the adversarial term, 0 without a discriminator; when unset 0.01 for maps, 0 for "
        "a prior."
    )  # fmt: skip
    start_step: int = option(100, "Upsamplers: first step with the perceptual and the adversarial term.")
    disc_channels: int = option(64, "Upsamplers: width of the discriminator's first layer.")
    disc_layers: int = option(3, "Upsamplers: strided layers of the discriminator.")
    disc_learning_rate: float | None = option(None, "Upsamplers: that of the discriminator; learning_rate when unset.")


def check_upsampler(args: Any) -> None:
    """Refuses values out of range, options that an upsampler lacks, and its own options at another stage.

    Args:
        args: All options of the recipe.

    Raises:
        ValueError: Names the option.
    """
    positive(args, "disc_channels", "disc_layers", "disc_learning_rate")
    between(args, 0, None, "perceptual_weight", "adversarial_weight", "start_step")
    if args.stage not in UPSAMPLERS:
        own = {"pretrained_upsampler_name_or_path": None, "adversarial_weight": None}
        for name, unset in {**own, "degradation": "none", "perceptual_model": "none"}.items():
            if getattr(args, name) != unset:
                raise ValueError(
                    f"--{name}={getattr(args, name)} goes with --stage {' and '.join(UPSAMPLERS)}, got --stage "
                    f"{args.stage}."
                )
        return
    if args.pretrained_model_name_or_path is None:
        base = "GLIDE prior (--stage prior)" if args.told == "text" else "PITI pipeline (--stage joint)"
        raise ValueError(
            f"--stage {args.stage} enlarges what a base stage draws: name a {base} with "
            "--pretrained_model_name_or_path."
        )
    for name in ("cond_dropout_prob", "guidance_scale"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name}={getattr(args, name)} goes with the base stages: an upsampler is not guided, got --stage "
                f"{args.stage}."
            )


def check_accumulation(args: Any, train: TrainArgs) -> None:
    """Refuses micro-steps with a discriminator; see `refuse_micro_steps`."""
    if args.weight_of_adversarial:
        refuse_micro_steps(train, "the discriminator learns from a whole batch", otherwise="--adversarial_weight 0")
