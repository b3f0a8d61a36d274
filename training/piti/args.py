"""The options of train_piti.py, and what can be said against them before anything is loaded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.pipelines.checks import check_guidance_scale
from diffusers_ext.training_utils.adversarial import refuse_micro_steps
from diffusers_ext.training_utils.args import TrainArgs, between, check_rank, option, positive
from diffusers_ext.training_utils.noise_prediction import NoisePredictionArgs
from diffusers_ext.training_utils.tokenizers import SMALLEST_VOCABULARY

Stage = Literal["prior", "prior_upsampler", "encoder", "joint", "upsampler"]
GUIDANCE_SCALES = {"text": 3.0, "map": 1.3}  # the authors'
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


@dataclass
class PITIArgs(UpsamplerArgs, NoisePredictionArgs):
    """One stage of PITI or of its GLIDE prior: what it is told, its networks and its noise."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("guidance_scale", "disc_learning_rate")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("num_validation_images", "num_inference_steps", "validation_prompts")

    stage: Stage = option(
        "prior", "Prior: small images of a text, which is GLIDE's base stage. Encoder: of a map, by a new encoder in "
        "front of a U-Net that stays as it is. Joint: both are trained. Prior_upsampler and upsampler: large images "
        "of the small ones that a prior or PITI draws."
    )  # fmt: skip
    pretrained_model_name_or_path: str | None = option(
        None, "Pipeline to start from, a folder or a name on the Hub: its networks, tokenizer, palette and noise "
        "levels replace those below. Encoder and joint: a GLIDE prior, or a PITI stage of the same condition; joint "
        "without any starts from nothing. Upsamplers: the pipeline whose images are enlarged, a prior or PITI's."
    )  # fmt: skip

    condition: Literal["label_map", "sketch", "geometry"] = option(
        "label_map", "Encoder, joint, upsampler: what images follow: columns `semantic`, `sketch`, or `normals` and "
        "`depth`."
    )  # fmt: skip
    cond_dropout_prob: float | None = option(
        None, "Samples trained without their condition, for guidance; when unset 0.1 for a prior, 0 for an encoder, "
        "0.2 for both together."
    )  # fmt: skip
    palette: str | None = option(
        None, "Label maps: colours of the labels, coco182, ade150, or a JSON file with a list of [red, green, blue]; "
        "when unset those of the pipeline or of `scenes`, else coco182."
    )  # fmt: skip

    downsampling: Literal["bicubic", "area"] = option("bicubic", "How pictures are made smaller.")

    pretrained_tokenizer_name_or_path: str | None = option(
        None, "Prior: tokenizer, such as gpt2; one is learnt from the captions when unset."
    )
    vocab_size: int = option(1000, "Prior: largest vocabulary of a tokenizer that is learnt.")
    text_max_length: int = option(128, "Prior: tokens of a text, padding included.")
    text_layers: int = option(16, "Prior: transformer blocks of the text encoder.")
    text_attention_heads: int = option(8, "Prior: heads of the text encoder.")

    encoder_sample_size: int = option(
        256, "Encoder, joint: side of the maps that a new encoder takes; a multiple of 16. They may be larger than "
        "the images."
    )  # fmt: skip
    encoder_layers: int = option(8, "Encoder, joint: transformer blocks of a new encoder.")
    encoder_attention_heads: int = option(8, "Encoder, joint: heads of a new encoder.")
    token_init_std: float = option(
        1.0, "Standard deviation of a new text encoder's token rows, and of a new encoder's class token; rows of "
        "places get at most 0.5."
    )  # fmt: skip

    timestep_sampler: Literal["uniform", "loss_second_moment"] = option(
        "uniform", "Noise levels of a step: all alike, or the more often the larger their losses were."
    )

    attention_levels: list[int] = option([1, 2, 3], "U-Net: levels (0: finest) with attention besides the middle.")
    num_head_channels: int = option(64, "U-Net: width of a head.")
    cross_attention_dim: int = option(512, "Width of the condition's tokens, U-Net and encoder alike.")
    dropout: float = option(0.1, "U-Net: dropout in the residual blocks.")
    rank: int | None = option(
        None, "Prior, joint: train LoRA matrices of this rank instead of the U-Net's weights; PITI's encoder is "
        "trained whole beside them."
    )  # fmt: skip

    validation_prompts: list[str] | None = option(
        None, "Prior: texts for the validation pictures; held-out captions when unset."
    )
    num_validation_images: int = option(8, "Pictures of a validation.")
    num_inference_steps: int = option(50, "For the validation pictures.")
    guidance_scale: float | None = option(
        None, "For the validation pictures, and the pipeline's default; when unset the authors' 3 for a prior and 1.3 "
        "for maps, 1 where no condition is dropped."
    )  # fmt: skip

    def __post_init__(self):
        positive(
            self, "vocab_size", "text_max_length", "text_layers", "text_attention_heads", "token_init_std",
            "num_head_channels", "cross_attention_dim", "rank", "num_validation_images", "num_inference_steps",
            "encoder_sample_size", "encoder_layers", "encoder_attention_heads",
        )  # fmt: skip
        between(self, 0, 1, "cond_dropout_prob")
        between(self, SMALLEST_VOCABULARY, None, "vocab_size")
        between(self, 3, None, "text_max_length")  # start, one token, end
        self.check_noise_prediction(num_head_channels=self.num_head_channels)
        check_guidance_scale(self.scale)
        self._check_encoder()
        check_upsampler(self)
        if self.scale != 1 and not self.dropout_of_condition:
            raise ValueError(
                f"--guidance_scale={self.scale} needs samples trained without their condition: raise "
                "--cond_dropout_prob above 0, or pass --guidance_scale 1."
            )
        if self.stage == "encoder" and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "--stage encoder needs a U-Net that can draw: name a GLIDE prior with --pretrained_model_name_or_path "
                "(--stage prior trains one). From nothing --stage joint starts."
            )
        if self.stage == "encoder" and self.rank is not None:
            raise ValueError(f"--rank={self.rank} goes with --stage joint: --stage encoder leaves the U-Net as it is.")
        check_rank(self, "pretrained_model_name_or_path")
        if self.palette is not None and self.told != "label_map":
            raise ValueError(
                f"--palette={self.palette} goes with --condition label_map, got "
                f"{'--stage prior' if self.told == 'text' else f'--condition {self.condition}'}."
            )

    def _check_encoder(self) -> None:
        heads = "text_attention_heads" if self.told == "text" else "encoder_attention_heads"
        if self.cross_attention_dim % getattr(self, heads):
            raise ValueError(
                f"--{heads}={getattr(self, heads)} must divide --cross_attention_dim={self.cross_attention_dim}."
            )
        if self.told != "text" and (self.encoder_sample_size < 32 or self.encoder_sample_size % 16):
            raise ValueError(
                f"--encoder_sample_size={self.encoder_sample_size} must be a multiple of 16, at least 32."
            )
        if self.told != "text" and self.cross_attention_dim % 16:
            raise ValueError(f"--cross_attention_dim={self.cross_attention_dim} must be a multiple of 16.")

    @property
    def told(self) -> str:
        """What a stage is told of an image: "text", or the type of PITI's condition."""
        return "text" if self.stage.startswith("prior") else self.condition

    @property
    def map_side(self) -> int:
        """Side of the maps of a new encoder, 0 for a text."""
        return 0 if self.told == "text" else self.encoder_sample_size

    @property
    def dropout_of_condition(self) -> float:
        """How often the condition is dropped."""
        usual = {"prior": 0.1, "joint": 0.2}.get(self.stage, 0.0)
        return usual if self.cond_dropout_prob is None else self.cond_dropout_prob

    @property
    def upsamples(self) -> bool:
        """Whether the stage makes large images of small ones."""
        return self.stage in UPSAMPLERS

    @property
    def weight_of_adversarial(self) -> float:
        """The weight of the adversarial term."""
        if self.adversarial_weight is not None:
            return self.adversarial_weight
        return 0.01 if self.stage == "upsampler" else 0.0

    @property
    def scale(self) -> float:
        """The guidance scale."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        usual = GUIDANCE_SCALES["text" if self.told == "text" else "map"]
        return usual if self.dropout_of_condition else 1.0

    def columns(self, caption_column: str) -> tuple[str, ...]:
        """The columns that the stage reads beside the picture."""
        columns = {"label_map": ("semantic",), "sketch": ("sketch",), "geometry": ("normals", "depth")}
        return columns.get(self.told, (caption_column,))


def check_upsampler(args: PITIArgs) -> None:
    """Refuses values out of range, options that an upsampler lacks, and its own options at another stage.

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


def check_accumulation(args: PITIArgs, train: TrainArgs) -> None:
    """Refuses micro-steps with a discriminator; see `refuse_micro_steps`."""
    if args.weight_of_adversarial:
        refuse_micro_steps(train, "the discriminator learns from a whole batch", otherwise="--adversarial_weight 0")
