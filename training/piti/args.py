"""The options of train_piti.py, and what can be said against them before anything is loaded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.pipelines.checks import check_guidance_scale
from diffusers_ext.training_utils.args import between, check_unet_widths, option, positive

Stage = Literal["prior", "prior_upsampler", "encoder", "joint", "upsampler"]
LATER_STAGES = ("prior_upsampler", "encoder", "joint", "upsampler")  # that this recipe does not train yet


@dataclass
class PITIArgs:
    """One stage of PITI or of its GLIDE prior: what it is told, its networks and its noise."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("guidance_scale",)
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("num_validation_images", "num_inference_steps", "validation_prompts")

    stage: Stage = option("prior", "Prior: small images of a text, which is GLIDE's base stage.")
    pretrained_model_name_or_path: str | None = option(
        None, "Pipeline to start from, a folder or a name on the Hub: its networks, tokenizer and noise levels "
        "replace those below."
    )  # fmt: skip

    cond_dropout_prob: float | None = option(
        None, "Samples trained without their condition, for guidance; 0.1 for a prior when unset."
    )

    pretrained_tokenizer_name_or_path: str | None = option(
        None, "Prior: tokenizer, such as gpt2; one is learnt from the captions when unset."
    )
    vocab_size: int = option(1000, "Prior: largest vocabulary of a tokenizer that is learnt.")
    text_max_length: int = option(128, "Prior: tokens of a text, padding included.")
    text_layers: int = option(16, "Prior: transformer blocks of the text encoder.")
    text_attention_heads: int = option(8, "Prior: heads of the text encoder.")
    token_init_std: float = option(
        1.0, "Standard deviation of a new encoder's token rows; its rows of places get at most 0.5."
    )

    beta_schedule: Literal["cosine", "linear"] = option("cosine", "Noise levels.")
    num_train_timesteps: int = option(1000, "Number of noise levels; the linear schedule is scaled to it.")
    loss_type: Literal["mse", "hybrid"] = option(
        "hybrid", "Error of the noise, or that with the variational bound of a learned variance."
    )
    max_loss_weight: float = option(
        1.0, "Error of the noise: a sample counts 1 / abar times, as if the error were that of v, but at most so "
        "often. 1 is the authors' plain mean; 25 makes small networks heed what they are told many steps earlier."
    )  # fmt: skip
    timestep_sampler: Literal["uniform", "loss_second_moment"] = option(
        "uniform", "Noise levels of a step: all alike, or the more often the larger their losses were."
    )

    block_out_channels: list[int] = option([192, 384, 576, 768], "U-Net: width of each level, finest first.")
    layers_per_block: int = option(3, "U-Net: residual blocks of a level.")
    attention_levels: list[int] = option([1, 2, 3], "U-Net: levels (0: finest) with attention besides the middle.")
    num_head_channels: int = option(64, "U-Net: width of a head.")
    cross_attention_dim: int = option(512, "Width of the condition's tokens, U-Net and encoder alike.")
    norm_num_groups: int = option(32, "U-Net: groups of the group norms.")
    dropout: float = option(0.1, "U-Net: dropout in the residual blocks.")
    rank: int | None = option(None, "Train LoRA matrices of this rank instead of all of the U-Net's weights.")

    validation_prompts: list[str] | None = option(
        None, "Prior: texts for the validation pictures; held-out captions when unset."
    )
    num_validation_images: int = option(8, "Pictures of a validation.")
    num_inference_steps: int = option(50, "For the validation pictures.")
    guidance_scale: float = option(3.0, "For the validation pictures, and the pipeline's default.")

    def __post_init__(self):
        if self.stage in LATER_STAGES:
            raise ValueError(f"--stage {self.stage} cannot be trained yet: --stage prior can.")
        positive(
            self, "vocab_size", "text_max_length", "text_layers", "text_attention_heads", "token_init_std",
            "num_train_timesteps", "layers_per_block", "num_head_channels", "cross_attention_dim", "norm_num_groups",
            "rank", "num_validation_images", "num_inference_steps",
        )  # fmt: skip
        between(self, 0, 1, "cond_dropout_prob", "dropout")
        between(self, 1, 1e6, "max_loss_weight")
        if self.num_train_timesteps < 2:
            raise ValueError(f"--num_train_timesteps must be >= 2, got {self.num_train_timesteps}.")
        check_guidance_scale(self.guidance_scale)
        check_unet_widths(self, num_head_channels=self.num_head_channels)
        if self.cross_attention_dim % self.text_attention_heads:
            raise ValueError(
                f"--text_attention_heads={self.text_attention_heads} must divide --cross_attention_dim="
                f"{self.cross_attention_dim}."
            )
        if self.guidance_scale != 1 and not self.dropout_of_condition:
            raise ValueError(
                f"--guidance_scale={self.guidance_scale} needs samples trained without their condition: raise "
                "--cond_dropout_prob above 0, or pass --guidance_scale 1."
            )

    @property
    def dropout_of_condition(self) -> float:
        """How often the condition is dropped."""
        return 0.1 if self.cond_dropout_prob is None else self.cond_dropout_prob
