"""The options of train_cascaded.py, and what can be said against them before anything is loaded."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.pipelines.checks import check_guidance_scale
from diffusers_ext.training_utils.args import between, check_rank, option, positive
from diffusers_ext.training_utils.noise_prediction import NoisePredictionArgs, check_levels

Stage = Literal["base", "super_resolution"]


@dataclass
class CascadedArgs(NoisePredictionArgs):
    """One stage of a cascade: what it is given, its network, its noise, and the stages that validation draws with."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("guidance_scale", "noise_level")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        "num_validation_images", "num_inference_steps", "stages_before", "stages_after",
    )  # fmt: skip

    stage: Stage = option("base", "Pictures from nothing (or a class), or from smaller pictures.")
    pretrained_model_name_or_path: str | None = option(
        None, "Stage to fine-tune, a pipeline: its network, noise levels and names replace those below."
    )
    pretrained_unet_name_or_path: str | None = option(
        None, "Network alone to start from, such as a converted ADM upsampler; an embedding of the level is added "
        "where it lacks one, and starts at zero."
    )  # fmt: skip
    unet_subfolder: str | None = option(None, "Where it lies there: `unet` in a pipeline.")

    condition: Literal["class", "unconditional"] = option("class", "Whether the stage is told the picture's class.")
    num_labels: int | None = option(None, "Classes; read from the data where they tell.")
    cond_dropout_prob: float | None = option(
        None, "Samples trained without their class, for guidance; 0.1 when unset (0 where there are no classes)."
    )

    low_resolution: int | None = option(
        None, "Super-resolution: side of the smaller pictures; half of --resolution when unset."
    )
    downsampling: Literal["area", "bicubic"] = option(
        "area", "How pictures are made smaller, for a base stage as for the small pictures of the next one."
    )
    augmentation: Literal["none", "blur", "truncated"] = option(
        "truncated",
        "Super-resolution: the small picture stays as it is, is blurred at times, or is noised as the stage before "
        "would leave it after stopping early. Pipelines then choose how far.",
    )
    blur_prob: float = option(0.5, "Blur: share of samples.")
    blur_sigma: list[float] = option([0.4, 0.6], "Blur: range of the standard deviation in pixels.")
    truncation_level: int | None = option(
        None,
        "Truncated: one level s for all samples, which the network is then not told; unset: a level a sample, uniform "
        "from 1 to the last.",
    )
    clean_prob: float = option(0.05, "Truncated: share of samples at level 0, whose small picture is clean.")
    aug_cond_type: Literal["timestep", "log_snr", "alpha_cumprod"] = option(
        "timestep", "Truncated: in what the network is told the level; the last two do not depend on the schedule."
    )
    conditioning_schedule: Literal["cosine", "linear"] | None = option(
        None, "Truncated: noise of the small pictures, that of the stage before; --beta_schedule when unset."
    )
    conditioning_timesteps: int | None = option(None, "Truncated: its levels; --num_train_timesteps when unset.")
    min_timestep: int = option(
        0, "Base: levels of noise that are never trained, since the next stage takes pictures with so many steps left."
    )

    num_heads: int | None = option(None, "U-Net: heads, on every level the same number.")
    num_head_channels: int | None = option(None, "U-Net: width of a head; 64 when num_heads is unset too.")
    resnet_time_scale_shift: Literal["scale_shift", "default"] = option(
        "scale_shift", "U-Net: time, class and level scale and shift, or they shift."
    )
    resample: Literal["resnet", "conv"] = option("resnet", "U-Net: residual blocks or convolutions between levels.")
    upsampling: Literal["bilinear", "bicubic"] = option(
        "bilinear", "U-Net: how the small picture is brought to the size of the large one."
    )
    rank: int | None = option(None, "Train LoRA matrices of this rank instead of all weights.")

    stages_before: list[str] | None = option(
        None, "Validation: the stages below, base first; folders or names on the Hub. Unset: a super-resolution stage "
        "enlarges held-out pictures."
    )  # fmt: skip
    stages_after: list[str] | None = option(None, "Validation: the stages above, in their order.")
    num_validation_images: int = option(8, "Pictures of a validation.")
    num_inference_steps: int = option(50, "For the validation pictures, at the stage that is trained.")
    noise_level: float | None = option(
        None, "For the validation pictures, and the pipeline's default: level s of the small picture; "
        "--truncation_level, else 0, when unset."
    )  # fmt: skip
    guidance_scale: float = option(1.0, "For the validation pictures, and the pipeline's default.")

    def __post_init__(self):
        self._check_ranges()
        check_rank(self, "pretrained_model_name_or_path", "pretrained_unet_name_or_path")
        upscales = self.stage == "super_resolution"
        if not upscales:
            for name in ("low_resolution", "truncation_level", "noise_level", "stages_before"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name}={getattr(self, name)} goes with --stage super_resolution: a base stage has no "
                        "smaller picture."
                    )
        if self.min_timestep and upscales:
            raise ValueError(
                f"--min_timestep={self.min_timestep} goes with --stage base: a super-resolution stage is run to its "
                "end."
            )
        if self.truncation_level is not None and self.augmentation != "truncated":
            raise ValueError(
                f"--truncation_level={self.truncation_level} goes with --augmentation truncated, got "
                f"--augmentation {self.augmentation}."
            )
        if self.noise_level is not None and not self.noises_low:
            raise ValueError(
                f"--noise_level={self.noise_level} goes with --augmentation truncated, got "
                f"--augmentation {self.augmentation}."
            )
        fixed = self.truncation_level
        if self.noise_level is not None and fixed is not None and self.noise_level != fixed:
            raise ValueError(
                f"--noise_level={self.noise_level}, but --truncation_level={fixed} trains no other level: "
                "leave it out."
            )
        if self.condition == "unconditional":
            for name in ("cond_dropout_prob", "num_labels"):
                if getattr(self, name):
                    raise ValueError(
                        f"--{name}={getattr(self, name)} goes with --condition class, got --condition unconditional."
                    )
        if self.guidance_scale != 1 and not self.dropout_of_condition:
            raise ValueError(
                f"--guidance_scale={self.guidance_scale} needs samples trained without their class: raise "
                "--cond_dropout_prob above 0, or leave it at 1."
            )
        if self.num_heads is not None and self.num_head_channels is not None:
            raise ValueError(
                f"--num_heads={self.num_heads} and --num_head_channels={self.num_head_channels} say the same thing: "
                "leave one out."
            )
        if self.pretrained_model_name_or_path and self.pretrained_unet_name_or_path:
            raise ValueError(
                f"--pretrained_model_name_or_path={self.pretrained_model_name_or_path} holds a network, as does "
                f"--pretrained_unet_name_or_path={self.pretrained_unet_name_or_path}: leave one out."
            )

    def _check_ranges(self) -> None:
        positive(
            self, "num_labels", "low_resolution", "truncation_level", "conditioning_timesteps", "num_heads",
            "num_head_channels", "rank", "num_validation_images", "num_inference_steps",
        )  # fmt: skip
        between(self, 0, 1, "cond_dropout_prob", "blur_prob", "clean_prob")
        self.check_noise_prediction(num_heads=self.num_heads, num_head_channels=self.head_channels)
        if self.noises_low or self.conditioning_timesteps is not None:
            schedule = self.conditioning_schedule or self.beta_schedule
            check_levels("conditioning_timesteps", self.num_conditioning_timesteps, schedule)
        between(self, 0, self.num_train_timesteps - 1, "min_timestep")
        between(self, 0, self.num_conditioning_timesteps, "truncation_level", "noise_level")
        check_guidance_scale(self.guidance_scale)
        if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise ValueError(f"--blur_sigma needs two numbers, 0 < first <= second, got {self.blur_sigma}.")

    @property
    def upscales(self) -> bool:
        return self.stage == "super_resolution"

    @property
    def noises_low(self) -> bool:
        """Whether the small picture is noised."""
        return self.upscales and self.augmentation == "truncated"

    @property
    def tells_level(self) -> bool:
        """Whether the network is told how much noise the small picture carries."""
        return self.noises_low and self.truncation_level is None

    @property
    def num_conditioning_timesteps(self) -> int:
        return self.conditioning_timesteps or self.num_train_timesteps

    @property
    def head_channels(self) -> int | None:
        return self.num_head_channels or (None if self.num_heads else 64)

    @property
    def dropout_of_condition(self) -> float:
        """How often the class is dropped."""
        if self.cond_dropout_prob is not None:
            return self.cond_dropout_prob
        return 0.1 if self.condition == "class" else 0.0

    def low_side(self, resolution: int) -> int:
        """Side of the smaller pictures.

        Raises:
            ValueError: it does not divide `--resolution`, or is not smaller.
        """
        side = self.low_resolution or resolution // 2
        if side >= resolution or resolution % side:
            raise ValueError(
                f"--low_resolution={side} must be smaller than --resolution={resolution} and divide it; for a factor "
                f"of 2 it is {resolution // 2}."
            )
        return side
